import threading

from tests.kit.processes import PATIENCE


class Serving:
    """Beside a socketserver: it serves, in a thread of its own, from when it is entered until it is left."""

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=[0.02], daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()


class Beside:
    """Its `run` runs in a thread of its own, from when it is entered until it is left: then `over` is set."""

    def __init__(self):
        self.over = threading.Event()
        self.thread = threading.Thread(target=self.run, daemon=True)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.over.set()
        self.thread.join(PATIENCE)
