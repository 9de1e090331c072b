"""Hostile connections of every kind, each without end: a process that is ended by its id, or ends after LIFE.

    python -m tests.kit.strangers KIND PORT TOKEN

It has a low priority, as on a real network it has a processor of its own. It may do whatever it can with the token of
one ordinary agent, `mallory`.
"""
import contextlib
import itertools
import os
import random
import resource
import signal
import socket
import struct
import sys
import time
import types

from tests.kit.hostile import BROKEN
from tests.kit.peers import TIMED_OUT, Closed, Peer, closed

LIFE = 120  # s
CROWD = 150  # connections at once
ROOM = 4096  # bytes that a peer takes which does not read
GET = b"GET /%s HTTP/1.1\r\nHost: localhost\r\n\r\n"


def drip(bus, opening, byte):
    """Connections that say this, and then a byte a second."""
    peers = []
    while True:
        peers = [each for each in peers if not closed(each.sock)]
        while len(peers) < CROWD:
            peers.append(Peer(bus))
            peers[-1].sock.sendall(opening)
        for each in peers:
            with contextlib.suppress(OSError):
                each.sock.sendall(byte)
        time.sleep(1)


def slow_heads(bus, token):
    drip(bus, b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nA: ", b"b")


def slow_bodies(bus, token):
    drip(bus, GET % b"healthz" + b"POST /send HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9000\r\n\r\n{", b" ")


def keep_newest(peers):
    """Close all but a crowd."""
    for each in peers[:-CROWD]:
        each.close()
    del peers[:-CROWD]


def half_open(bus, token):
    """They say nothing at all, or have closed their side, or break off in the middle."""
    peers = []
    for number in itertools.count():
        peer = Peer(bus)
        if number % 3 == 1:
            peer.sock.sendall(GET % b"bus_recv.py")
            peer.sock.shutdown(socket.SHUT_WR)
        if number % 3 == 2:
            peer.sock.sendall(GET % b"bus_recv.py")
            peer.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            peer.close()
        peers.append(peer)
        keep_newest(peers)
        time.sleep(0.002)


def unread_answers(bus, token):
    """Each asks for 200 answers of many KiB and takes none."""
    peers = []
    while True:
        peer = Peer(bus, room=ROOM)
        with contextlib.suppress(OSError):
            peer.sock.sendall(GET % b"bus_recv.py" * 200)
        peers.append(peer)
        keep_newest(peers)
        time.sleep(0.05)


def pipelines(bus, token):
    """Four connections with 200 requests behind each other each; their answers are read."""
    while True:
        peers = [Peer(bus, token) for _ in range(4)]
        for peer in peers:
            peer.sock.sendall(peer.request("GET", "/recv?to=mallory&since=0&max=1000&channel=void") * 200)
        for peer in peers:
            for _ in range(200):
                peer.answer()
            peer.close()


def garbage(bus, token):
    """Random bytes, and every request that is none."""
    for each in itertools.cycle(BROKEN):
        for sent in (each.sent, random.randbytes(1000), random.randbytes(50) + b"\r\n\r\n"):
            with Peer(bus) as peer:
                peer.sock.sendall(sent)
                peer.sock.shutdown(socket.SHUT_WR)
                peer.outcome()


def huge_heads(bus, token):
    while True:
        with Peer(bus) as peer:
            peer.sock.sendall(b"GET /healthz HTTP/1.1\r\n" + b"A: %s\r\n" % (b"b" * 7000) * 20)
            peer.outcome()


def new_names(bus, token):
    """Each message to a name that nobody has used."""
    with Peer(bus, token) as peer:
        while True:
            name = f"{random.getrandbits(64):x}"
            peer.send("POST", "/send", {"to": name, "channel": "void", "msg": "x"}).answer()


def new_polls(bus, token):
    """Each poll on a channel that nobody has used."""
    with Peer(bus, token) as peer:
        while True:
            peer.send("GET", f"/recv?to=mallory&since=0&channel={random.getrandbits(64):x}").answer()


EACH = (slow_heads, slow_bodies, half_open, unread_answers, pipelines, garbage, huge_heads, new_names, new_polls)
KINDS = {each.__name__.replace("_", " "): each for each in EACH}


def main(kind, port, token):
    """Again and again, as the bus may hang up, or be killed."""
    signal.alarm(LIFE)
    os.nice(10)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    bus = types.SimpleNamespace(port=int(port))
    while True:
        with contextlib.suppress(OSError, Closed, *TIMED_OUT):
            KINDS[kind](bus, token)
        time.sleep(0.05)


if __name__ == "__main__":
    main(*sys.argv[1:])
