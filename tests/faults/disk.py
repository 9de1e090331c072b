"""The disk loses its power, fills up, fails, or takes its time."""
import contextlib
import fcntl
import os
import pathlib
import signal
import struct
import subprocess

from tests.faults import faulty, root
from tests.faults.crash import storm
from tests.processes import PATIENCE, wait_until

SHUTDOWN, WITHOUT_FLUSH = 0x8004587D, 2  # ioctl FS_IOC_SHUTDOWN and EXT4_GOING_FLAGS_NOLOGFLUSH of Linux


def mounts():
    if root():
        return root()
    allowed = subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode == 0
    return None if allowed else "this root may not mount"


def run(*command):
    subprocess.run([*map(str, command)], check=True, capture_output=True, timeout=PATIENCE)


class Disk:
    """An ext4 file system of its own, on a file, mounted on `place`."""

    def __init__(self, directory, megabytes=64):
        self.image, self.place = directory / "disk.image", directory / "disk"
        self.place.mkdir()
        with self.image.open("wb") as image:
            image.truncate(megabytes << 20)
        run("mkfs.ext4", "-q", "-F", self.image)

    def mount(self):
        run("mount", "-o", "loop", self.image, self.place)

    def unmount(self):
        run("umount", self.place)

    def cut(self, bus):
        """The power goes: what no fsync has brought to the disk is gone. Then it comes back.

        The bus stops first, as the whole machine would. It must not see the file system being shut down: an fsync that
        is under way then may say that all is well (Linux 6.18: 29 of 400 times, to a program that did nothing else).
        """
        stop(bus)
        place = os.open(self.place, os.O_RDONLY)
        fcntl.ioctl(place, SHUTDOWN, struct.pack("I", WITHOUT_FLUSH))
        os.close(place)
        bus.kill()
        self.unmount()
        self.mount()

    def __enter__(self):
        self.mount()
        return self

    def __exit__(self, *_):
        with contextlib.suppress(subprocess.CalledProcessError):
            run("umount", "--lazy", self.place)


def stop(bus):
    """SIGSTOP; returns when no thread of it runs. One that is in the kernel, waiting for the disk, comes no further."""
    bus.process.send_signal(signal.SIGSTOP)
    wait_until(lambda: states(bus.process) <= {"T", "D"})


def states(process):
    """What the threads of a process do, in the letters of Linux."""
    stats = pathlib.Path(f"/proc/{process.pid}/task").glob("*/stat")
    return {stat.read_text().rpartition(")")[2].split()[0] for stat in stats}


def power_cut(directory, cuts, **server):
    with Disk(directory) as disk:
        return storm(disk.place, cuts, disk.cut, **server)


def not_flushed(directory, cuts=5):
    """The control: a bus that leaves it to the system when a commit is on the disk."""
    return power_cut(directory, cuts, **faulty("synchronous=NORMAL"))
