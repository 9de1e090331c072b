"""A limit: the least that a durable bus on SQLite does for a send. One INSERT, fsync, one answer; nothing is parsed.

    python least_server.py PORT DATABASE loop|thread     the commit in the loop as in the bus, or in a thread of its own
"""
import queue
import select
import socket
import sqlite3
import sys
import threading
import time

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
TEXT = "x" * 110  # what the bus stores of the message that everybody sends


class Store:
    def __init__(self, path):
        self.database = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self.database.executescript(
            "PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL;"
            "CREATE TABLE messages(tick INTEGER PRIMARY KEY, mailbox INTEGER NOT NULL, text TEXT NOT NULL);"
            "CREATE INDEX in_order ON messages(mailbox, tick);"
        )
        self.last = 0

    def commit(self):
        self.last = max(self.last + 1, time.time_ns() // 1000)
        self.database.execute("INSERT INTO messages VALUES (?, 1, ?)", (self.last, TEXT))


def in_the_loop(peer, store):
    while peer.recv(4096):
        store.commit()
        peer.send(ANSWER)


def in_a_thread(peer, store):
    sends, (done, told) = queue.SimpleQueue(), socket.socketpair()

    def journal():
        while sends.get():
            store.commit()
            told.send(b"!")

    thread = threading.Thread(target=journal)
    thread.start()
    ready = select.epoll()
    ready.register(peer, select.EPOLLIN)
    ready.register(done, select.EPOLLIN)
    try:
        while True:
            for descriptor, _ in ready.poll():
                if descriptor == done.fileno():
                    done.recv(1)
                    peer.send(ANSWER)
                elif peer.recv(4096):
                    sends.put(True)
                else:
                    return
    finally:
        sends.put(False)
        thread.join()


def main():
    port, path, where = sys.argv[1:]
    serve, store = {"loop": in_the_loop, "thread": in_a_thread}[where], Store(path)
    with socket.create_server(("127.0.0.1", int(port))) as listener:
        while True:
            peer, _ = listener.accept()
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            try:
                serve(peer, store)
            except ConnectionError:  # the generator has gone
                pass
            finally:
                peer.close()


if __name__ == "__main__":
    main()
