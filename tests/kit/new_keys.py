"""A client of TLS 1.3 that sends new keys (KeyUpdate) without data, which the module ssl cannot: with libssl itself."""
import contextlib
import ctypes
import ctypes.util
import socket

FOUND = [ctypes.util.find_library(name) for name in ("ssl", "crypto")]


class NewKeys:
    """Its connection, to a port of this machine; it trusts everyone."""

    def __init__(self, port, patience):
        self.ssl, self.crypto = map(ctypes.CDLL, FOUND)
        context = self.made(self.ssl.SSL_CTX_new, self.made(self.ssl.TLS_client_method))
        self.tls = self.made(self.ssl.SSL_new, context)
        self.coming, self.going = (self.made(self.crypto.BIO_new, self.made(self.crypto.BIO_s_mem)) for _ in "io")
        self.ssl.SSL_set_bio(self.tls, self.coming, self.going)
        self.ssl.SSL_set_connect_state(self.tls)
        self.peer = socket.create_connection(("127.0.0.1", port), patience)
        while self.ssl.SSL_do_handshake(self.tls) != 1:
            self.peer.sendall(self.sealed())
            self.take(self.peer.recv(65536))
        self.peer.sendall(self.sealed())

    @staticmethod
    def made(function, *given):
        function.restype = ctypes.c_void_p
        return ctypes.c_void_p(function(*given))

    def take(self, data):
        self.crypto.BIO_write(self.coming, data, len(data))

    def sealed(self):
        """What OpenSSL wants to send."""
        room, found = ctypes.create_string_buffer(65536), b""
        while (size := self.crypto.BIO_read(self.going, room, len(room))) > 0:
            found += room.raw[:size]
        return found

    def keys(self, number):
        """So many new keys, each a record of its own."""
        for _ in range(number):
            assert self.ssl.SSL_key_update(self.tls, 0) == 1
            assert self.ssl.SSL_do_handshake(self.tls) == 1
        return self.sealed()

    def data(self, text):
        assert self.ssl.SSL_write(self.tls, text, len(text)) == len(text)
        return self.sealed()

    def heard(self):
        """What the peer says next; nothing if it has closed."""
        room = ctypes.create_string_buffer(65536)
        while (size := self.ssl.SSL_read(self.tls, room, len(room))) <= 0:
            data = b""
            with contextlib.suppress(ConnectionError):
                data = self.peer.recv(65536)
            if not data:
                return b""
            self.take(data)
        return room.raw[:size]
