"""Processes end, or stand still, while others send and receive: what was acknowledged is there, once, in order."""
import contextlib
import fcntl
import itertools
import json
import os
import random
import selectors
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time

from tests.faults import Result, faulty, unless
from tests.faults.history import LAST, Conversation, Sent, delivered, get, observed, tick, violations
from tests.kit import new_client, old_client
from tests.kit.processes import PATIENCE, ROOT, Server, wait_until

LIFE = 150  # sends between two strokes of fate at most; at least none: some processes die before their first
SHORT = 50  # the same, where the suite takes part of a row


def crash(bus):
    bus.kill()
    bus.start()


def storm(directory, strokes, stroke=crash, life=LIFE, **server):
    """Let a stroke of fate hit a bus so often, each time after some sends, while three conversations go on.

    Then ask all who were there. After `stroke(bus)` it runs again.
    """
    calm = threading.Event()
    with contextlib.ExitStack() as stack:
        bus = stack.enter_context(Server(directory / "bus.db", **server))
        talks = [stack.enter_context(talk) for talk in conversations(bus.url, calm)]
        for _ in range(strokes):
            wait_for_sends(talks, random.randrange(life))
            stroke(bus)
        calm.set()
        found = [f"{talk.name}: {violation}" for talk in talks for violation in talk.finish()]
        everything = [each for talk in talks for each in talk.sent]
        found += [f"the log: {violation}" for violation in violations(everything, observed(bus.url))]
        bus.stop()
    return Result(f"{strokes} times; {told(talks)}", found + broken(bus.db))


def broken(path):
    with contextlib.closing(sqlite3.connect(path)) as database:
        return [f"the database: {row[0]}" for row in database.execute("PRAGMA integrity_check") if row[0] != "ok"]


def told(talks):
    """What there was in these conversations, in figures."""
    sent = [each for talk in talks for each in talk.sent]
    known = sum(each.tick is not None for each in sent)
    delivered = sum(len(talk.delivered) for talk in talks)
    return f"{known:,} acknowledged, {len(sent) - known:,} unknown, {delivered:,} delivered"


def wait_for_sends(talks, more):
    enough = sum(len(talk.sent) for talk in talks) + more
    wait_until(lambda: sum(len(talk.sent) for talk in talks) >= enough)


def conversations(url, calm):
    """One reader that keeps its cursor, one that relies on the bus for it, and one of the old contract."""
    for name, client, senders, settings in (
        ("keeper", new_client, 2, {}),
        ("asker", new_client, 2, {"forgetful": True}),
        ("veteran", old_client, 2, {}),
    ):
        talk = Conversation(client, url, name)
        talk.listen(**settings)
        for number in range(senders):
            texts = (f"message {count}" for count in itertools.count())
            talk.speak(f"{name}-{number}", itertools.takewhile(lambda _: not calm.is_set(), texts))
        yield talk


def early(directory, deaths=5, stroke=crash, life=LIFE):
    """The control: a bus that acknowledges before it commits."""
    return storm(directory, deaths, stroke, life, **faulty("early"))


CROWD = 150  # senders: two full batches and more


def crowd(directory, deaths, **server):
    """As many senders at once as fill batches; each sends again, with its key, what a death left unanswered."""
    sent, counts = [], [0] * CROWD
    with Server(directory / "bus.db", **server) as bus:
        for _ in range(deaths):
            live(bus, sent, counts, random.randrange(2 * LIFE))
            crash(bus)
        live(bus, sent, counts, CROWD, goes_on=False)
        found = violations(sent, observed(bus.url))
        bus.stop()
    return Result(f"{deaths} times; {len(sent):,} acknowledged", found + broken(bus.db))


def live(bus, sent, counts, answers, goes_on=True):
    """Everyone sends message number counts[sender], and the next when that is answered, until there were so many."""
    with contextlib.ExitStack() as stack, selectors.DefaultSelector() as selector:
        for sender in range(CROWD):
            peer = stack.enter_context(socket.create_connection(("127.0.0.1", bus.port), PATIENCE))
            selector.register(peer, selectors.EVENT_READ, sender)
            peer.sendall(numbered(sender, counts[sender]))
        while answers > 0:
            ready = selector.select(PATIENCE)
            assert ready, f"nobody was answered in {PATIENCE} s"
            for key, _ in ready:
                sender, answer = key.data, json.loads(key.fileobj.recv(1 << 16).partition(b"\r\n\r\n")[2])
                sent.append(Sent(f"sender-{sender}", str(counts[sender]), tick(answer["ts"])))
                counts[sender] += 1
                answers -= 1
                if goes_on:
                    key.fileobj.sendall(numbered(sender, counts[sender]))


def numbered(sender, number):
    """To a name of its own, as many messages that nobody reads fill a mailbox."""
    message = {"from": f"sender-{sender}", "to": f"reader-{sender}", "msg": str(number), "key": str(number)}
    body = json.dumps(message).encode()
    return b"POST /send HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)


HEALTHY_WITHIN = 5.0  # s


def standstill(directory, seconds):
    """SIGSTOP, and after so long SIGCONT: as when a laptop sleeps. It is healthy when it answers, and stores again."""
    recovery = []

    def stroke(bus):
        bus.process.send_signal(signal.SIGSTOP)
        threading.Event().wait(seconds)
        bus.process.send_signal(signal.SIGCONT)
        began, last = time.monotonic(), get(bus.url, "/healthz")["now"]
        wait_until(lambda: get(bus.url, "/healthz")["now"] > last)
        recovery.append(time.monotonic() - began)

    result = storm(directory, 1, stroke)
    found = unless(recovery[0] < HEALTHY_WITHIN, f"healthy after {recovery[0]:.1f} s")
    return Result(f"{result.figures}; healthy after {recovery[0]:.2f} s", result.violations + found)


# The reader

BATCH = 100  # messages in an answer, at most
F_SETPIPE_SZ = 1031  # of fcntl, on Linux
READS = 40  # messages that a reader lives through at most; about as many wait for it when it begins
FILLING = "." * 1000  # of a message, so that an answer does not fit into a pipe
PAUSE = 0.004  # s between two messages of a sender: what a reader that is killed all the time can keep up with


def reader_storm(directory, deaths, script="bus_recv.py"):
    """kill -9 of bus_recv.py, again and again, at its start or after some messages; then one reads to the end."""
    over, lives = threading.Event(), []
    with Server(directory / "bus.db") as bus, Conversation(new_client, bus.url, "bob") as talk:

        def texts():
            for number in itertools.count():
                over.wait(PAUSE)
                if over.is_set():
                    return
                yield f"message {number} {FILLING}"

        for number in range(2):
            talk.speak(f"sender-{number}", texts())
        for _ in range(deaths):
            with reading(bus, directory, script) as process:
                lives.append(messages(itertools.islice(process.stdout, random.randrange(READS))))
                process.kill()
                lives[-1] += messages(process.stdout)
        over.set()
        talk.wait_for_senders()
        talk.send("herald", [LAST])
        with reading(bus, directory, script) as process:
            deadline = threading.Timer(PATIENCE, process.kill)
            deadline.start()
            lives.append(messages(itertools.takewhile(lambda line: LAST.encode() not in line, process.stdout)))
            deadline.cancel()
            process.kill()
            talk.sent.pop()
    return judged(talk.sent, lives)


@contextlib.contextmanager
def reading(bus, directory, script):
    """A process that reads bob's mail, and is ended inside. Its pipe is small: it is often stopped amidst an answer."""
    environment = {**os.environ, "AGENT_BUS_URL": bus.url, "AGENT_BUS_STATE_DIR": str(directory / "state")}
    command = [sys.executable, str(ROOT / script), "bob", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process:
        fcntl.fcntl(process.stdout, F_SETPIPE_SZ, 4096)
        yield process
        process.wait(PATIENCE)


def messages(lines):
    """What a reader has said, as far as it said it whole."""
    return [delivered(json.loads(line)) for line in lines if line.endswith(b"\n")]


def judged(sent, lives):
    """A Result: how often a life began with what the one before had said already, and what is wrong without that."""
    seen, kept, repeats = set(), [], []
    for life in lives:
        repeats.append(sum(message in seen for message in life))
        kept += [message for message in life if message not in seen]
        seen.update(life)
    found = violations(sent, kept)
    found += unless(max(repeats) <= BATCH, f"duplicated: {max(repeats)} messages again after one end")
    figures = f"{len(lives) - 1} times; {len(sent):,} acknowledged, {len(kept):,} delivered"
    return Result(f"{figures}; {sum(repeats)} repeats, at most {max(repeats)} after one end", found)
