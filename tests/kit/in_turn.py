"""In front of several fronts: each connection goes to the next one of them, as through a load balancer.

It waits until that one has applied what the others had when the connection came, which takes a few ms.
"""
import contextlib
import itertools
import socket
import socketserver
import threading

from tests.faults.history import get
from tests.kit.processes import wait_until
from tests.kit.serving import Serving


class InTurn(Serving, socketserver.ThreadingTCPServer):
    daemon_threads, request_queue_size = True, 128

    def __init__(self, *buses):
        super().__init__(("127.0.0.1", 0), Passing)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.buses, self.next = buses, itertools.cycle(buses)

    def caught_up(self):
        """The next front, when it has come as far as all others are now."""
        bus, newest = next(self.next), max(get(each.url, "/healthz")["now"] for each in self.buses)
        wait_until(lambda: get(bus.url, "/healthz")["now"] >= newest)
        return bus


class Passing(socketserver.BaseRequestHandler):
    """One connection: it lives until both sides have said their last."""

    def handle(self):
        with socket.create_connection(("127.0.0.1", self.server.caught_up().port)) as behind:
            back = threading.Thread(target=passes, args=[behind, self.request], daemon=True)
            back.start()
            passes(self.request, behind)
            back.join()


def passes(source, target):
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            target.sendall(data)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_WR)
