"""session.py at random: no two sessions ever have one name, and no mail goes astray.

`NAMES_SECONDS=120 python -m pytest tests/integrations/test_names_at_random.py` is the long run. It sends real messages
through a bus, and has a log of its own of who should get them.
"""
import collections
import os
import random
import sys
import time

import bus_recv
import bus_send
from tests.kit import sessions
from tests.kit.processes import ROOT

sys.path[:0] = [str(ROOT / "integrations" / "claude_code"), str(ROOT / "tools")]
import session  # noqa: E402

project, lives = sessions.project, sessions.lives  # fixtures

SECONDS = float(os.environ.get("NAMES_SECONDS", "3"))


class Log:
    """Who had which name, what was sent to it, and who got that: the facts for check(), each with its step."""

    def __init__(self):
        self.step, self.held, self.sent, self.got = 0, {}, {}, collections.defaultdict(list)

    def has(self, process, names):
        """The process reads these names from now on, and no others."""
        for name in {*names, *(name for each, name in self.held if each == process)}:
            spans = self.held.setdefault((process, name), [])
            if name in names and not (spans and spans[-1][1] is None):
                spans.append([self.step, None])
            elif name not in names and spans and spans[-1][1] is None:
                spans[-1][1] = self.step

    def held_at(self, process, name, step):
        return any(begin <= step and (end is None or step < end) for begin, end in self.held.get((process, name), ()))

    def holders(self, name):
        return [each for each, its in self.held if its == name and self.held_at(each, name, self.step)]

    def check(self):
        """A message went to whom it was sent, as long as that had the name; to nobody else afterwards, and once."""
        for id, (name, holder, at) in self.sent.items():
            for process, step in self.got[id]:
                assert self.held_at(process, name, step), f"{process} got mail for {name}, which it was not"
                lost = [end for begin, end in self.held[holder, name] if end is not None and at < end <= step]
                assert process == holder or lost, f"{process} got mail for {name}, which was {holder}"
            assert len(self.got[id]) < 2, f"mail for {name} came more than once: {self.got[id]}"
            assert self.got[id] or not self.holders(name), f"mail for {name} never came"


class Folder:
    """100 conversations in one folder, and the bus that they are on."""

    def __init__(self, dice, lives):
        self.dice, self.lives, self.log = dice, lives, Log()
        self.runs = {f"s{number}": None for number in range(100)}  # by conversation: the process that runs it now
        self.names = {}  # by process: all that it reads, its own name first

    def life(self, process):
        """A process for the log, which has the number of no other one."""
        return self.lives.born["pid:[1]", process]

    def look(self, process, id, title=None):
        me = session.this_session(process, "/x/api", id, title)
        theirs = {name for each, names in self.names.items() if each != process for name in names}
        assert not theirs.intersection(me.names), f"{me.names} are read by two"
        self.names[process] = me.names
        self.log.has(self.life(process), me.names)

    def idle(self):
        return self.dice.choice([id for id, process in self.runs.items() if process is None])

    def start(self, id, process):
        self.runs[id] = self.dice.choice([each for each in range(1000, 1400) if each not in self.names])
        self.lives.begin(self.runs[id])
        self.look(self.runs[id], id)

    def kill(self, id, process):
        self.log.has(self.life(process), [])
        self.lives.end(process)
        del self.names[process]
        self.runs[id] = None

    def clear(self, id, process):
        """The conversation can be resumed later."""
        new = f"{id.partition('.')[0]}.{self.dice.randrange(3)}"
        if self.runs.get(new) is None:
            self.runs.update({id: None, new: process})
            self.look(process, new)

    def resume(self, id, process):
        """Within the session: its process goes on with another conversation."""
        other = self.idle()
        self.runs.update({id: None, other: process})
        self.look(process, other)

    def rename(self, id, process):
        try:
            session.rename(process, f"n{self.dice.randrange(60)}")
        except ValueError as error:
            assert "another session" in str(error)
        self.look(process, id)

    def title(self, id, process):
        self.look(process, id, f"t{self.dice.randrange(60)}")

    def send(self, id, process):
        """Somebody sends a message to one of its names."""
        to = self.dice.choice(self.names[process])
        self.log.sent[bus_send.send(to, "hi", sender="spark")["id"]] = (to, self.life(process), self.log.step)

    def read(self, id, process):
        """As its reader would."""
        for message in bus_recv.receive(self.names[process], once=True, timeout=0):
            self.log.got[message["id"]].append((self.life(process), self.log.step))

    def hook(self, id, process):
        before = self.names[process][0]
        self.look(process, id)
        assert self.names[process][0] == before, "one session has two names"

    def server(self, id, process):
        self.hook(None, process)

    def step(self):
        self.log.step += 1
        id = self.dice.choice(list(self.runs))
        process = self.runs[id]
        often = [self.kill, self.hook, self.server] * 2 + [self.kill, self.read] + [self.send] * 3
        act = self.dice.choice([*often, self.clear, self.resume, self.rename, self.title]) if process else self.start
        act(id, process)
        return act.__name__


def test_at_random_no_two_sessions_ever_have_one_name_and_no_mail_goes_astray(bus, lives, monkeypatch):
    monkeypatch.setenv("AGENT_BUS_URL", bus.url)
    seed, end, steps = random.randrange(10**6), time.monotonic() + SECONDS, collections.Counter()
    print("seed", seed)  # pytest shows it with a failure
    folder = Folder(random.Random(seed), lives)
    while time.monotonic() < end or len(steps) < 10:
        steps[folder.step()] += 1
    for process in folder.names:
        folder.read(None, process)
    folder.log.check()
    print(sum(steps.values()), "steps:", dict(steps), len(folder.log.sent), "messages")
