"""What lies between: a proxy that cuts, stalls and duplicates, nginx and its patience, bytes in pieces; a naive bus."""
import contextlib
import functools
import json
import os
import random
import re
import socket
import struct
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from unittest import mock

import bus_recv
from tests.core.test_connection import cuts, expected
from tests.core.test_deploy import AROUND, Nginx, replaced
from tests.faults import Result, unless
from tests.faults.crash import told
from tests.faults.history import PATIENCE, Conversation, observed, violations
from tests.kit import hostile, new_client, old_client
from tests.kit.naive_server import Naive
from tests.kit.processes import Server, wait_until
from tests.kit.wire import heard, statuses

# A bad proxy

HASTE = 0.3  # s that a client waits for the answer to a send
STALL = 1.5 * HASTE
RESET = struct.pack("ii", 1, 0)  # linger for no time: closing resets


class Exchange:
    """A request that the proxy has got from a client, whole, and what it may do with it."""

    def __init__(self, client, request, port):
        self.client, self.request, self.port = client, request, port

    def forward(self):
        """Send the request on; returns the whole answer."""
        with socket.create_connection(("127.0.0.1", self.port), PATIENCE) as bus:
            bus.sendall(self.request)
            return b"".join(iter(lambda: bus.recv(65536), b""))

    def hang_up(self):
        self.client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)

    # Its fates

    def passes(self):
        self.client.sendall(self.forward())

    def is_cut(self):
        with socket.create_connection(("127.0.0.1", self.port), PATIENCE) as bus:
            bus.sendall(part(self.request))
        self.hang_up()

    def loses_its_answer(self):
        self.forward()
        self.hang_up()

    def has_its_answer_cut(self):
        self.client.sendall(part(self.forward()))

    def stalls(self):
        time.sleep(STALL)
        self.forward()

    def has_its_answer_stalled(self):
        answer = self.forward()
        time.sleep(STALL)
        self.client.sendall(answer)

    def is_sent_twice(self):
        self.forward()
        self.client.sendall(self.forward())


FATES = [
    Exchange.passes, Exchange.is_cut, Exchange.loses_its_answer, Exchange.has_its_answer_cut, Exchange.stalls,
    Exchange.has_its_answer_stalled, Exchange.is_sent_twice,
]  # fmt: skip


def part(data):
    return data[: random.randrange(len(data))] if data else data


class BadProxy:
    """In front of a bus; half of what is sent and received through it meets another fate than to pass."""

    def __init__(self, bus):
        self.port, self.fates = bus.port, Counter()
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"

    def serve(self):
        with contextlib.suppress(OSError):  # until the listener is closed
            while True:
                threading.Thread(target=self.meet, args=[self.listener.accept()[0]], daemon=True).start()

    def meet(self, client):
        with client, contextlib.suppress(OSError):
            client.settimeout(PATIENCE)
            request = b""
            while not whole(request):
                request += client.recv(65536)
            mangled = request.startswith((b"POST /send", b"GET /recv")) and random.random() < 0.5
            fate = random.choice(FATES) if mangled else Exchange.passes
            self.fates[fate.__name__] += 1
            fate(Exchange(client, request, self.port))

    def __enter__(self):
        threading.Thread(target=self.serve, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.listener.close()


def whole(request):
    head, end, body = request.partition(b"\r\n\r\n")
    length = re.search(rb"\r\nContent-Length: (\d+)", head)
    return end and len(body) >= int(length[1] if length else 0)


def unkeyed(sender, to, msg):
    return json.dumps({"from": sender, "to": to, "msg": msg}).encode()


SENDERS = 20


def bad_proxy(directory, sends, body=new_client.keyed, patience=PATIENCE):
    """Senders and a reader, in haste, on both sides of a bad proxy."""
    client = SimpleNamespace(
        send=functools.partial(new_client.send, timeout=HASTE, body=body),
        receive=functools.partial(new_client.receive, timeout=2 * HASTE),
    )
    with Server(directory / "bus.db") as bus, BadProxy(bus) as proxy:
        with Conversation(client, proxy.url, "bob", patience) as talk:
            talk.listen()
            for number in range(SENDERS):
                talk.speak(f"sender-{number}", [f"message {count}" for count in range(sends // SENDERS)])
            wait_until(lambda: len(talk.sent) >= sends // SENDERS * SENDERS, sends)
            found = talk.finish()
        found += [f"the mailbox: {violation}" for violation in violations(talk.sent, observed(bus.url))]
    bad = sum(proxy.fates.values()) - proxy.fates["passes"]
    return Result(f"{told([talk])}; {bad:,} of {sum(proxy.fates.values()):,} exchanges were mangled", found)


# nginx

AS_IT_COMES = """server {
    listen 127.0.0.1:PORT;
    location / { proxy_pass http://127.0.0.1:BUS; MORE }
}"""
MOODS = {"default": "", "impatient": "proxy_read_timeout SECONDSs;"}


def behind_nginx(directory, bursts, patience=3):
    """nginx as it comes, and one that cuts each poll after a silence of `patience` s; bursts come when it has cut some.

    One of the readers is bus_recv.py, the other has the old contract.
    """
    results = [behind(directory / mood, bursts, mood, patience) for mood in MOODS]
    return Result("; ".join(result.figures for result in results), [each for result in results for each in result[1]])


def behind(place, bursts, mood, patience):
    place.mkdir()

    def config(front, bus, _):
        more = MOODS[mood].replace("SECONDS", str(patience))
        server = replaced(AS_IT_COMES, PORT=str(front.port), BUS=str(bus.port), MORE=more)
        return replaced(AROUND, SERVER=server, MORE="", PLACE=str(front.place))

    with contextlib.ExitStack() as stack:
        bus = stack.enter_context(Server(place / "bus.db"))
        proxy = stack.enter_context(Nginx(place, bus, None, config))
        url = f"http://127.0.0.1:{proxy.port}"
        stack.enter_context(mock.patch.dict(os.environ, AGENT_BUS_STATE_DIR=str(place / "state")))
        ours = SimpleNamespace(send=new_client.send, receive=lambda url, name, pause: bus_recv.receive(name, url=url))
        talks = [stack.enter_context(Conversation(ours, url, "keeper")),
                 stack.enter_context(Conversation(old_client, url, "veteran"))]  # fmt: skip
        for talk in talks:
            talk.listen()
        for burst in range(bursts):
            enough = 2 * (burst + 1) * (mood == "impatient")
            wait_until(lambda: proxy.log.read_text().count("504 upstream") >= enough)  # noqa: B023
            for talk in talks:
                talk.speak(f"sender-{burst}", [f"message {number}" for number in range(50)])
                talk.wait_for_senders()
        found = [violation for talk in talks for violation in talk.finish()]
        polls = proxy.log.read_text().count("504 upstream")
    return Result(f"{mood}: {told(talks)}, {polls} polls were cut", found)


# Bytes in pieces

CASES = [case for case in [*hostile.BROKEN, *hostile.WHOLE, *hostile.CUT] if "would wait" not in case.name]
APART = 0.0005  # s between two pieces, so that the bus mostly reads them one by one; less if there are many


def framing(directory, limit):
    """Each case of hostile.py, cut in two at each byte in turn (at most `limit` places for a case), over sockets."""
    with Server(directory / "bus.db") as bus, ThreadPoolExecutor(16) as pool:
        found, count, stored = [], 0, 0
        for case in CASES:
            sent, right, messages, ends = expected(case)
            ways = list(cuts(sent))
            ways = random.sample(ways, min(limit, len(ways)))
            for way, answers in zip(ways, pool.map(functools.partial(talk_in_pieces, bus, ends), ways)):
                place = f"cut at {len(way[0])}" if len(way) == 2 else "in single bytes"
                found += unless(answers == right, f"{case.name}, {place}: {answers}, not {right}")
            count, stored = count + len(ways), stored + messages * len(ways)
        senders = Counter(message.sender for message in observed(bus.url))
        found += unless(senders == {"alice": stored}, f"stored, and {stored} of alice's are right: {senders}")
        found += unless(not bus.log.read_text(), f"on stderr: {bus.log.read_text()[:500]}")
    return Result(f"{len(CASES)} cases, {count:,} connections, {stored:,} messages stored as they should be", found)


def talk_in_pieces(bus, ends, pieces):
    """The statuses of what is answered; a reset, or half an answer, in words."""
    with socket.create_connection(("127.0.0.1", bus.port), PATIENCE) as peer:
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # refused before its last piece
                for piece in pieces:
                    peer.sendall(piece)
                    time.sleep(min(APART, 1 / len(pieces)))
                if ends:
                    peer.shutdown(socket.SHUT_WR)
            return statuses(heard(peer))
        except (AssertionError, OSError) as error:
            return repr(error)


# A naive bus


def live_reading(bus, queued, live, patience=PATIENCE):
    """A reader of the first contract gets what was queued, and what is sent meanwhile."""
    with bus, Conversation(old_client, bus.url, "dell", patience) as talk:
        talk.speak("before", [f"queued {number}" for number in range(queued)])
        talk.wait_for_senders()
        talk.listen(since=0)
        for sender in range(4):
            talk.speak(f"sender-{sender}", [f"message {number}" for number in range(live)])
        found = talk.finish()
    return Result(told([talk]), found)


def reading(directory, sends):
    return live_reading(Server(directory / "bus.db"), sends // 5, sends // 5)


def wall_clock(directory):
    return live_reading(Naive({"now is the wall clock"}), 150, 100, patience=1)
