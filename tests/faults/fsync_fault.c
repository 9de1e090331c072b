/* LD_PRELOAD: fsync, fdatasync and pwrite as a bad disk has them. The file $FSYNC_FAULT says how: "fails" is EIO and
 * writes nothing, "once" is the same for the one call that removes the file, a number is so many ms more; no file: all is
 * well. A second number is so many ms more for the first pwrite to a file after its own fsync: SQLite's first one in a
 * transaction. The fsync of another file, in another thread, does not count.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static volatile char of_file[1024];

/* Is the last thing that happened to this file its fsync? */
static volatile char *synchronised(int descriptor) { return &of_file[descriptor % sizeof of_file]; }

static void read_fault(char fault[16])
{
    int file = open(getenv("FSYNC_FAULT"), O_RDONLY);
    memset(fault, 0, 16);
    if (file >= 0) {
        if (read(file, fault, 15) < 0)
            fault[0] = 0;
        close(file);
    }
}

static int synchronise(const char *name, int descriptor)
{
    int (*real)(int) = (int (*)(int))dlsym(RTLD_NEXT, name);
    char fault[16];
    read_fault(fault);
    if (!strcmp(fault, "fails") || (!strcmp(fault, "once") && unlink(getenv("FSYNC_FAULT")) == 0)) {
        errno = EIO;
        return -1;
    }
    usleep(1000 * atoi(fault));
    *synchronised(descriptor) = 1;
    return real(descriptor);
}

int fsync(int descriptor) { return synchronise("fsync", descriptor); }

int fdatasync(int descriptor) { return synchronise("fdatasync", descriptor); }

ssize_t pwrite64(int descriptor, const void *bytes, size_t count, off64_t place)
{
    static ssize_t (*real)(int, const void *, size_t, off64_t);
    int sync = 0, write = 0;
    char fault[16];
    if (!real)
        real = (ssize_t (*)(int, const void *, size_t, off64_t))dlsym(RTLD_NEXT, "pwrite64");
    if (*synchronised(descriptor)) {
        *synchronised(descriptor) = 0;
        read_fault(fault);
        sscanf(fault, "%d %d", &sync, &write);
        usleep(1000 * write);
    }
    return real(descriptor, bytes, count, place);
}
