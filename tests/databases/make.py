"""Make a database with the bus_server.py of some version, and dump it as SQL.

    git worktree add /tmp/old COMMIT
    python tests/databases/make.py /tmp/old/bus_server.py tests/databases/v4.sql

Before a migration is added, make a dump with the last version that does not have it, and never change it afterwards.
v1.sql was made by the server of commit 78be319, v2.sql by that of 324aee9, v3.sql by that of 0fb41c7, v4.sql by
that of 6fce0dd.
tests/core/test_old_databases.py starts the server of today on each.

The traffic is real, only the clock of the server is not: it begins at BEGIN, long ago, so that every lease in the dump
has run out wherever it is loaded, and no message in it is from the future. What a version does not know is left out.
"""

import contextlib
import json
import pathlib
import sqlite3
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request

BEGIN = 1735689600  # 2025-01-01
SERVE = """
import sys, time
ahead, folder = int(sys.argv.pop(1)), sys.argv.pop(1)
ns, s = time.time_ns, time.time
time.time_ns, time.time = (lambda: ns() - ahead * 10**9), (lambda: s() - ahead)
sys.path.insert(0, folder)
import bus_server
sys.exit(bus_server.main())
"""


class Bus:
    """A server of the version, in the past."""

    def __init__(self, program, database, ahead, *options):
        command = [sys.executable, "-c", SERVE, str(ahead), str(program.parent), "--port", "0", "--db", str(database)]
        self.process = subprocess.Popen([*command, "--rate", "0", *options], stdout=subprocess.PIPE, text=True)
        self.url = self.process.stdout.readline().split()[-1]

    def ask(self, path, body=None):
        """The JSON of an answer; None if there is no such endpoint in this version."""
        data = None if body is None else json.dumps(body).encode()
        try:
            with urllib.request.urlopen(self.url + path, data, timeout=20) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            said = json.load(error)
            assert error.code == 404, (path, body, said)
            return None

    def send(self, sender, to, msg, **members):
        return self.ask("/send", {"from": sender, "to": to, "msg": msg, **members})

    def read(self, name, upto=None, **query):
        """Fetch everything, and acknowledge it up to the message with this number."""
        path = "/recv?to=" + name + "".join(f"&{key}={value}" for key, value in query.items())
        messages = self.ask(path)["messages"]
        if upto is not None:
            self.ask(f"{path}&since={messages[upto]['ts']}")
        return messages

    def claim(self, queue, **members):
        answer = self.ask("/claim", {"to": queue, "wait": 0, **members})
        return answer["messages"] if answer else []

    def settle(self, verb, job, **members):
        self.ask(f"/{verb}", {"id": job["id"], "lease": job["lease"], **members})

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.terminate()
        assert self.process.wait(20) == 0
        self.process.stdout.close()


def what_retention_removes(bus):
    """A mailbox that loses its first messages, one of them unread."""
    for number in range(4):
        bus.send("spark", "pruned", f"old {number}")
    bus.read("pruned", upto=1)


def traffic(bus):
    for number in range(2):
        bus.send("spark", "pruned", f"new {number}")
    # Marks: nobody, a reader that has fetched, one that is half way, a group, a broadcast, another channel
    for number in range(3):
        bus.send("spark", "never-read", f"message {number}")
        bus.send("spark", "fetched-only", f"message {number}")
        bus.send("dell", "half-way", f"message {number}", subject=f"S{number}")
    bus.read("fetched-only", max=2)
    bus.read("half-way", upto=1)
    bus.send("spark", ["dell", "team"], "to two", priority="high")
    bus.read("dell&to=team", upto=0)
    bus.send("spark", "team", "for the group")
    bus.send("dell", "all", "hear me", channel="lab")
    bus.send("dell", "nano", "on another channel", channel="lab")
    bus.read("nano", upto=0, channel="lab")
    bus.ask("/send", [{"from": "dell", "to": "array", "msg": str(number)} for number in range(3)])
    # Texts and members that must come out as they went in
    text = 'line one\n\ttab "quotes" \\ \' / \u00e9 \u4e2d \U0001f41d \u2028 -- ; );\n'
    extra = {"x-new": [1, {"a": None, "b": [True, 1.5, -7, "\u00e9"]}], "Msg": "", "type": "result"}
    bus.send("spark", "texts", text, **extra, content_type="text/markdown")
    # Keys: of one message, of two copies, on a channel
    bus.send("spark", "keys", "once", key="k-1")
    bus.send("spark", ["keys", "keys-too"], "to both", key="k-2")
    bus.send("dell", "keys", "elsewhere", key="k-1", channel="lab", subject="S")
    # Lifetimes: over, and not over for decades
    bus.send("spark", "short", "gone", ttl=0.001)
    bus.send("spark", "short", "lasting", ttl=1e9)
    # A conversation
    root = bus.send("spark", "dell", "a question")["id"]
    reply = bus.send("dell", "spark", "an answer", reply_to=root)["id"]
    bus.send("spark", "dell", "thank you", reply_to=reply, key="thanks")
    bus.send("dell", "spark", "another answer", reply_to=root)
    taken_back = bus.send("spark", "recalled", "never mind", key="k-3")["id"]
    bus.send("spark", "recalled", "this one stays")
    bus.ask("/recall", {"id": taken_back})
    work(bus)
    bus.ask("/ask?wait=0", {"from": "spark", "to": "dell", "msg": "anybody?", "key": "ask-1"})


def work(bus):
    """A job in each state: never claimed, done, given back, given back for later, out, out for the last time, dead."""
    for msg in ("done", "given back", "later", "out", "extended", "waits"):
        bus.send("spark", "queue", msg, subject=f"job {msg}")
    for number in range(5):
        for job in bus.claim("queue", worker="dell", lease=60):
            if number == 0:
                bus.settle("ack", job)
            elif number == 1:
                bus.settle("nack", job, reason="not mine", delay=0.5)
            elif number == 2:
                bus.settle("nack", job, delay=3600)
            elif number == 4:
                bus.settle("extend", job, seconds=7200)
    for queue, last in (("failing", "nack"), ("last-try", "")):
        bus.send("spark", queue, f"{queue}, five times", subject="S")
        for number in range(5):
            for job in bus.claim(queue, worker="nano"):
                if last or number < 4:
                    bus.settle("nack", job, reason="it does not compile")


def dump(database, out):
    with contextlib.closing(sqlite3.connect(database)) as file:
        [version] = file.execute("PRAGMA user_version").fetchone()
        lines = [*file.iterdump(), f"PRAGMA user_version={version};"]
    pathlib.Path(out).write_text("\n".join(lines) + "\n")
    print(f"{out}: schema {version}, {len(lines)} lines")


def main(program, out):
    ahead = int(time.time()) - BEGIN
    with tempfile.TemporaryDirectory() as folder:
        database = pathlib.Path(folder, "bus.db")
        program = pathlib.Path(program).resolve()
        with Bus(program, database, ahead, "--keep", "0") as bus:
            what_retention_removes(bus)
        time.sleep(1.2)
        with Bus(program, database, ahead, "--keep", "1s") as bus:
            deadline = time.monotonic() + 20
            while bus.ask("/log")["messages"]:
                assert time.monotonic() < deadline, "retention removes nothing"
                time.sleep(0.1)
        with Bus(program, database, ahead, "--keep", "0") as bus:
            traffic(bus)
        dump(database, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
