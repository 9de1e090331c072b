"""In front of several fronts: each connection goes to the next one of them, as through a load balancer."""
import contextlib
import itertools
import socket
import socketserver
import threading

from tests.kit.serving import Serving


class InTurn(Serving, socketserver.ThreadingTCPServer):
    daemon_threads, request_queue_size = True, 128

    def __init__(self, *buses):
        super().__init__(("127.0.0.1", 0), Passing)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.ports = itertools.cycle([bus.port for bus in buses])


class Passing(socketserver.BaseRequestHandler):
    """One connection: it lives until both sides have said their last."""

    def handle(self):
        with socket.create_connection(("127.0.0.1", next(self.server.ports))) as behind:
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
