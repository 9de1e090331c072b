"""The honest agents of a bus under siege: what each of them does, what it was told, and whether that was kept.

An agent is a thread with a token and one connection. It notes each exchange, and asks again what a fault left open. A
message is known by its sender, and by its receiver with the text, so that the copies of a list differ.
"""
import concurrent.futures
import contextlib
import functools
import hashlib
import itertools
import json
import random
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
import zlib
from typing import NamedTuple

from tests.faults.crash import broken
from tests.faults.history import LAST, Delivered, Sent, background, tick, violations
from tests.kit.peers import TIMED_OUT, Closed, Peer, closed
from tests.kit.processes import PATIENCE, wait_until

HOLD = 2  # s that a poll, a claim or a question is held
LARGE, RARE = 30000, 1 / 40  # characters of some messages, and how many of all are so large
LEASE = 4  # s; a job whose answer went with a kill is free again after so long
OLDER = 30  # s that prune leaves: nobody's answer is on its way for so long
READERS = ["bob", "carol", "dave", "asker", "oracle", "drawer", "prober"]
TARGETS = ["bob", "carol", "dave", ["bob", "carol", "dave"], "all"]
WRITERS, WORKERS = [f"writer-{number}" for number in range(6)], ["worker-0", "worker-1"]
NAMES = [*READERS, *WRITERS, "recaller", "producer", "courier", "clerk", "mallory"]
GRANTS = {**dict.fromkeys(NAMES, []), **dict.fromkeys(WORKERS, ["--also", "queue"]), "watcher": ["--operator"]}


CROSSED = 0.02  # s in which a connection that is kept proves to be closed: then a GET is repeated (RFC 9112, 9.3.1)


class Exchange(NamedTuple):
    """One request of an honest agent. The status is 0 if the bus hung up without an answer, None if it said nothing."""

    kind: str
    began: float  # monotonic
    took: float  # s
    status: "int | None"
    agent: str


class Field:
    """What the agents of a siege share: the bus, their tokens, and when to begin nothing more or to end."""

    def __init__(self, bus, tokens, directory, seed):
        self.bus, self.tokens, self.directory, self.chance = bus, tokens, directory, random.Random(seed)
        self.calm, self.over = threading.Event(), threading.Event()
        self.patience = PATIENCE  # s for what is on its way in the end
        self.jumped = -OLDER  # when the clock of the bus was last changed
        self.agents = []  # all of them
        self.readers, self.doers, self.others = [], [], []  # of them; doers end when it is calm, others when it is over

    def send_out(self, agents, role, name, **settings):
        agent = Agent(self, name, self.tokens[name])
        agent.thread = background(functools.partial(role, **settings), agent)
        agents.append(agent)

    def sent(self):
        return [each for agent in self.agents for each in agent.sent]

    def exchanges(self):
        return [each for agent in self.agents for each in agent.exchanges]


class Agent:
    """Owned by its thread; others read its lists when it has ended."""

    def __init__(self, field, name, token):
        self.field, self.name, self.token, self.peer = field, name, token, None
        self.chance = random.Random(field.chance.random())  # of its own: how its thread runs changes nothing for others
        self.exchanges, self.found = [], []
        self.sent, self.got = [], []  # Sent to whom, with `to: text`; Delivered
        self.polled, self.recalled = {}, {}  # when the poll began that brought it; when its recall was answered
        self.claimed, self.done = [], {}  # (job, when the claim began); when its ack was answered
        field.agents.append(self)

    def ask(self, kind, method, path, body=b"", hold=0):
        """One exchange: the Reply, or None. If the end of the connection that is kept crosses a request, a new one."""
        began, status, reply = time.monotonic(), None, None
        kept = self.peer and not closed(self.peer.sock)
        try:
            self.peer = self.peer if kept else Peer(self.field.bus, self.token)
            self.peer.sock.settimeout(PATIENCE + hold)
            reply = self.peer.send(method, path, body).answer()
            status = reply.status
        except TIMED_OUT:
            self.hang_up()
        except (OSError, Closed):
            status = 0
            self.hang_up()
            if kept and method == "GET" and time.monotonic() < began + CROSSED:
                return self.ask(kind, method, path, body, hold)
        self.exchanges.append(Exchange(kind, began, time.monotonic() - began, status, self.name))
        return reply

    def hang_up(self):
        if self.peer:
            self.peer.close()
        self.peer = None

    def settle(self, statuses, kind, *request, hold=0):
        """The first Reply with one of these statuses; None if the siege is over before."""
        while not self.field.over.is_set():
            reply = self.ask(kind, *request, hold=hold)
            if reply and reply.status in statuses:
                return reply
            self.rest(float(reply.fields.get("retry-after", 0.1)) if reply else 0.1)
        return None

    def rest(self, seconds):
        self.field.over.wait(seconds)

    def counted(self):
        return itertools.takewhile(lambda _: not self.field.calm.is_set(), itertools.count())

    def send(self, to, msg, kind="send", path="/send", hold=0, **members):
        """Send a message under one key until it is acknowledged, and note it; the answer, or None."""
        key = hashlib.sha256(f"{to} {msg}".encode()).hexdigest()
        body = {"to": to, "msg": msg, "key": key, **members}
        reply = self.settle({200}, kind, "POST", path, body, hold=hold)
        answer = reply and json.loads(reply.body, parse_float=str)
        for name in [to] if isinstance(to, str) else to:
            stored = answer and int(answer["ids"][name] if "ids" in answer else answer["id"], 16)
            self.sent.append((name, Sent(self.name, known(name, msg), stored)))
        return answer


def known(to, msg):
    """What a message is called here: a long text by its beginning and its checksum."""
    return f"{to}: {msg}" if len(msg) < 100 else f"{to}: {msg[:30]} {zlib.crc32(msg.encode())}"


# What they do


def write(agent, pace=0.1):
    for number in agent.counted():
        more = "." * LARGE if agent.chance.random() < RARE else ""
        agent.send(agent.chance.choice(TARGETS), f"message {number}{more}")
        agent.rest(pace)


def read(agent, path=None, kind="hold", hold=HOLD, rest=0.0, then=None):
    """Each message once, with a cursor of its own; `then` is called with each."""
    since, seen, path = "0", set(), path or f"/recv?to={agent.name}"
    while not agent.field.over.is_set():
        began = time.monotonic()
        reply = agent.ask(kind, "GET", f"{path}&since={since}&max=1000&wait={hold}", hold=hold)
        if reply and reply.status == 200:
            answer = json.loads(reply.body, parse_float=str)
            agent.found += [f"a gap: {answer['gap']}"] if "gap" in answer else []
            for message in answer["messages"]:
                if message["id"] not in seen:
                    seen.add(message["id"])
                    keep(agent, message, began)
                    if then:
                        then(agent, message)
            since = answer["now"]
        agent.rest(float(reply.fields.get("retry-after", rest)) if reply else 0.1)


def keep(agent, message, began):
    each = Delivered(message["from"], known(message["to"], message["msg"]), tick(message["ts"]))
    agent.got.append(each)
    agent.polled[each[:2]] = began


def look(agent):
    while not agent.field.over.is_set():
        agent.ask("health", "GET", "/healthz")
        agent.rest(0.05)


def ask(agent):
    for number in agent.counted():
        answer = agent.send("oracle", f"question {number}", "ask", f"/ask?wait={HOLD}", hold=HOLD)
        reply = answer and answer["reply"]
        if reply and reply["msg"] != f"answer to question {number}":
            agent.found.append(f"the reply to question {number} is {reply['msg']}")
        agent.rest(0.5)


def reply(agent, message):
    if message["msg"].startswith("question"):
        agent.send(message["from"], f"answer to {message['msg']}", reply_to=message["id"])


def recall(agent):
    """Half of what is sent to a reader that comes once a second is taken back: then nobody may get it any more."""
    for number in agent.counted():
        answer = agent.send("drawer", f"a thought {number}")
        if answer and agent.chance.random() < 0.5:
            settled = agent.settle({200, 409}, "recall", "POST", "/recall", {"id": answer["id"]})
            if settled and settled.status == 200:
                to, sent = agent.sent[-1]
                agent.sent[-1] = to, sent._replace(tick=None)
                agent.recalled[sent[:2]] = time.monotonic()
        agent.rest(0.2)


def produce(agent):
    for number in agent.counted():
        agent.send("queue", f"job {number}")
        agent.rest(0.2)


def work(agent):
    while not agent.field.over.is_set():
        began = time.monotonic()
        wanted = {"to": "queue", "lease": LEASE, "wait": HOLD, "max": 3}
        reply = agent.ask("claim", "POST", "/claim", wanted, hold=HOLD)
        for job in reply.json["messages"] if reply and reply.status == 200 else []:
            agent.claimed.append((job["id"], began))
            settled = agent.settle({200, 409}, "ack", "POST", "/ack", {"id": job["id"], "lease": job["lease"]})
            if settled and settled.status == 200:
                agent.done[job["id"]] = time.monotonic()
        agent.rest(0 if reply else 0.1)


def carry(agent):
    """A file is there again as it was put."""
    for _ in agent.counted():
        content = agent.chance.randbytes(agent.chance.randrange(1, 40000))
        path = f"/blob/{hashlib.sha256(content).hexdigest()}"
        agent.settle({200, 201}, "file", "PUT", path, content)
        found = agent.settle({200, 404}, "file", "GET", path)
        if found and found.body != content:
            agent.found.append(f"lost: the file {path}")
        agent.rest(2)


# The clerk, with the commands of an operator


def administrate(agent, pace=1.0):
    for number in agent.counted():
        for duty in (host_a_guest, back_up, prune):
            duty(agent, number)
            agent.rest(pace)


def command(agent, *arguments):
    """What a command beside the bus printed; nothing, if it failed as the bus or the disk did."""
    bus = agent.field.bus
    line = [sys.executable, *bus.command[1:2], *arguments, "--db", bus.db]
    environment = {**bus.env, "FAULT": "none"}
    began = time.monotonic()
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=3 * PATIENCE)
    status = 200 if done.returncode == 0 else 503
    agent.exchanges.append(Exchange(arguments[0], began, time.monotonic() - began, status, agent.name))
    if done.returncode and "Traceback" in done.stderr:
        agent.found.append(f"{arguments[0]}: {done.stderr[-300:]}")
    return done.stdout if done.returncode == 0 else ""


def host_a_guest(agent, number):
    """A guest is invited, sends, is revoked, and is then refused."""
    name = f"guest-{number}"
    words = command(agent, "invite", name).split()
    if not words:
        return
    guest = Agent(agent.field, name, next(word for word in words if word.startswith("abt_")))
    guest.send("bob", "hello", "guest")
    while not (command(agent, "revoke", name) or agent.field.over.is_set()):
        agent.rest(0.1)
    guest.settle({401}, "guest", "GET", f"/recv?to={name}&since=0")
    late = guest.settle({200, 401}, "guest", "POST", "/send", {"to": "bob", "msg": "I am still here"})
    agent.found += [f"{name} was revoked, refused, and could send again"] if late and late.status == 200 else []
    guest.hang_up()


def back_up(agent, number):
    """A copy has what was acknowledged before it began, and is sound."""
    copy = agent.field.directory / f"copy-{number}.db"
    answer = agent.send("bob", f"before copy {number}")
    if answer and command(agent, "backup", str(copy)):
        agent.found += [f"a copy: {each}" for each in broken(copy)]
        agent.found += [] if int(answer["id"], 16) in ticks(copy) else [f"lost: {answer['id']} in a copy"]
    for each in agent.field.directory.glob(f"{copy.name}*"):
        shutil.rmtree(each) if each.is_dir() else each.unlink()


def ticks(path):
    with contextlib.closing(sqlite3.connect(path)) as database:
        return {row[0] for row in database.execute("SELECT tick FROM messages")}


def prune(agent, number):
    if time.monotonic() - agent.field.jumped > OLDER:
        command(agent, "prune", "--older", f"{OLDER}s")


# All of them, from their first request to what is wrong with what they saw


def begin(field):
    """Send out everybody. Readers come first, and have polled when the others begin."""
    for name in ("bob", "carol", "dave", "asker"):
        field.send_out(field.readers, read, name)
    field.send_out(field.readers, read, "oracle", then=reply)
    field.send_out(field.readers, read, "drawer", kind="read", hold=0, rest=1.0)
    field.send_out(field.readers, read, "prober", kind="read", hold=0, rest=0.05)
    field.send_out(field.readers, read, "watcher", path="/log?channel=default")
    wait_until(lambda: all(agent.exchanges or agent.peer for agent in field.readers))
    field.send_out(field.others, look, "prober")
    for name in WORKERS:
        field.send_out(field.others, work, name)
    roles = {"asker": ask, "recaller": recall, "producer": produce, "courier": carry, "clerk": administrate}
    for name, role in {**roles, **dict.fromkeys(WRITERS, write)}.items():
        field.send_out(field.doers, role, name)


def finish(field):
    """Let everybody end what is begun, and everything arrive: LAST is told to all, so that nothing is behind it."""
    field.calm.set()
    late = concurrent.futures.wait([agent.thread for agent in field.doers], 3 * field.patience).not_done
    for agent in field.doers:
        agent.found += ["it did not end what it had begun"] if agent.thread in late else []
    herald = Agent(field, "clerk", field.tokens["clerk"])
    herald.send("all", LAST)
    herald.hang_up()
    with contextlib.suppress(AssertionError):  # what has not come is lost
        told = f"all: {LAST}"
        wait_until(lambda: all(agent.got and agent.got[-1].msg == told for agent in field.readers), field.patience)
        wait_until(lambda: not undone(field), min(LEASE + 2 * HOLD, field.patience))
    field.over.set()
    for agent in [*field.doers, *field.readers, *field.others]:
        agent.thread.result(2 * PATIENCE)
        agent.hang_up()


def undone(field):
    done = {job for agent in field.agents for job in agent.done}
    return [each for to, each in field.sent() if to == "queue" and each.tick and f"{each.tick:x}" not in done]


def is_for(reader, to, sender):
    return reader in (to, "watcher") or (to == "all" and reader != sender)


def judged(field):
    """Everything that is wrong with what the agents got and were told."""
    sent, found = field.sent(), [f"{agent.name}: {each}" for agent in field.agents for each in agent.found]
    for agent in field.readers:
        mine = [each for to, each in sent if is_for(agent.name, to, each.sender)]
        found += [f"{agent.name}: {each}" for each in violations(mine, agent.got)]
    recalled = {each: when for agent in field.agents for each, when in agent.recalled.items()}
    found += [f"{agent.name}: unexpected: {each} was recalled before the poll that brought it"
              for agent in field.agents for each, began in agent.polled.items() if began > recalled.get(each, began)]
    done = {job: when for agent in field.agents for job, when in agent.done.items()}
    found += [f"queue: lost: {each}" for each in undone(field)]
    found += [f"queue: duplicated: job {job} came again after it was done"
              for agent in field.agents for job, began in agent.claimed if began > done.get(job, began)]
    return found
