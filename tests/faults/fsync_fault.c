/* LD_PRELOAD: fsync and fdatasync as a bad disk has them. The file $FSYNC_FAULT says how: "fails" is EIO and writes
 * nothing, "once" is the same for the one call that removes the file, a number is so many ms more; no file: all is well.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static int synchronise(const char *name, int descriptor)
{
    int (*real)(int) = (int (*)(int))dlsym(RTLD_NEXT, name);
    const char *path = getenv("FSYNC_FAULT");
    char fault[8] = "";
    int file = open(path, O_RDONLY);
    if (file >= 0) {
        if (read(file, fault, sizeof fault - 1) < 0)
            fault[0] = 0;
        close(file);
    }
    if (!strcmp(fault, "fails") || (!strcmp(fault, "once") && unlink(path) == 0)) {
        errno = EIO;
        return -1;
    }
    usleep(1000 * atoi(fault));
    return real(descriptor);
}

int fsync(int descriptor) { return synchronise("fsync", descriptor); }

int fdatasync(int descriptor) { return synchronise("fdatasync", descriptor); }
