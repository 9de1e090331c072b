import threading


class Serving:
    """Beside a socketserver: it serves, in a thread of its own, from when it is entered until it is left."""

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=[0.02], daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()
