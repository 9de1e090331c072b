"""The end of a loop inside the test. In a process of its own its threads end with that process."""
import sys
import threading
from unittest import mock


def stop(loop):
    """End the threads of a loop, each with an exception that is no fault, and close its sockets."""
    with mock.patch.object(threading, "excepthook"):
        loop.watch_over = sys.exit  # what the deputy does next
        if loop.alert.locked():
            loop.alert.release()
        for _ in range(loop.FILE_THREADS):
            loop.works.put((sys.exit, None))
        for thread in loop.threads:
            thread.join()
    for each in (loop.selector, loop.sock, loop.bell):
        each.close()
