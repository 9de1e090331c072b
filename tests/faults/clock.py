"""The wall clock of the bus steps, and the bus is killed: cursors, order and holds do not notice, but messages age."""
import contextlib
import json
import os
import random
import struct
import threading
import time
from collections import Counter

from tests.faults import Result, faulty, unless
from tests.faults.crash import crash, told
from tests.faults.history import PATIENCE, Conversation, Sent, background, delivered, get, tick, violations
from tests.kit import new_client, old_client
from tests.kit.processes import Server, in_time, wait_until

SENDERS = 8
CRASH = "kill -9, and a new start"
HOUR, DAY = 3600, 86400
KEEP, LATER = 1200, 1800  # s of --keep, and a step of the clock past it: a step over an hour is not believed at once
TROUBLE = [CRASH, -HOUR, CRASH, +DAY, CRASH, 0]  # spread over the sends; a number is by how much the clock is wrong
HOLD, TOO_LONG = 0.5, 2.0  # s; a poll is held, and may take; longer by as long as the machine stood still


def make_wrong(file, error):
    """Write by how many s the clock of faulty_server.py is wrong. It has the file mapped: this stays the same one."""
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT, 0o600)
    os.pwrite(descriptor, struct.pack("q", round(error * 1e9)), 0)
    os.close(descriptor)


class SteppedServer(Server):
    """A server whose wall clock is wrong by as many seconds as `step` said."""

    def __init__(self, db, *options, fault="none", beside=None, env=None):
        self.error = (beside or db.parent) / "clock.error"
        make_wrong(self.error, 0)
        settings = faulty(fault)
        settings["env"].update({"CLOCK_ERROR": str(self.error), **(env or {})})
        super().__init__(db, *options, **settings)

    def step(self, error):
        """Returns when the bus has answered a poll by its new clock."""
        make_wrong(self.error, error)
        wait_until(lambda: self.get("/recv?to=surveyor") and abs(self.polled("surveyor") - time.time() - error) < 60)

    def polled(self, name):
        """When this name polled last, by the clock of the bus; 0 for never."""
        agents = json.loads(self.get("/agents"))["agents"]
        return max((agent["last_seen"] or 0 for agent in agents if agent["name"] == name), default=0)


def clock_steps(directory, sends, trouble=TROUBLE, skew=0.0, fault="none", patience=PATIENCE):
    """Clients of the old contract, whose own clock is wrong by `skew`, and of the new, while the bus's clock steps.

    Half of the sends are for either reader. A third one gets no mail, and has a poll in hand at each step.
    """
    holds = []  # (s that one took, and might take)
    with contextlib.ExitStack() as stack:
        bus = stack.enter_context(SteppedServer(directory / "bus.db", fault=fault))
        old = stack.enter_context(Conversation(old_client, bus.url, "veteran", patience))
        new = stack.enter_context(Conversation(new_client, bus.url, "keeper", patience))
        talks = [old, new]
        old.listen(skew=skew)
        wait_until(lambda: abs(get(bus.url, "/healthz")["now"] - time.time() - skew) < 60)
        crash(bus)  # the bus had taken over the cursor of its reader, and this is on disk
        new.listen()
        over = threading.Event()
        stack.callback(over.set)
        background(hold, bus.url, over, holds)
        for number in range(SENDERS):
            talks[number % 2].speak(f"sender-{number}", [f"message {count}" for count in range(sends // SENDERS)])
        for place, event in enumerate(trouble, 1):
            enough = place * sends // (len(trouble) + 1)
            wait_until(lambda: sum(len(talk.sent) for talk in talks) >= enough, 60)  # noqa: B023
            if event is CRASH:
                crash(bus)
            else:
                before = len(holds)
                bus.step(event)
                wait_until(lambda: len(holds) > before)  # noqa: B023
        found = [violation for talk in talks for violation in talk.finish()]
    unknown = sum(each.tick is None for talk in talks for each in talk.sent)
    found += [f"a hold of {HOLD} s took {took:.1f} s" for took, most in holds if not HOLD <= took <= most]
    why = sum((talk.errors for talk in talks), Counter()).most_common(5)
    found += unless(unknown < sends / 10, f"{unknown} of {sends} sends were not acknowledged: {why}")
    steps = ", ".join(f"{event:+,} s" for event in trouble if event is not CRASH)
    figures = f"clock wrong by {steps}; {trouble.count(CRASH) + 1} crashes; {told(talks)}; "
    return Result(f"{figures}{len(holds)} holds of {HOLD} s took {min(holds)[0]:.2f} to {max(holds)[0]:.2f} s", found)


def hold(url, over, times):
    """Poll for a reader without mail, again and again; note how long each poll took that was answered."""
    while not over.is_set():
        began = time.monotonic()
        with contextlib.suppress(*new_client.ERRORS):
            get(url, f"/recv?to=idle&since=0&wait={HOLD}")
            times.append((time.monotonic() - began, in_time(TOO_LONG)))


def retention(directory, rounds, faults="tidy"):
    """A reader comes now and then, reads a part of what waits, and between its visits all of it grows too old."""
    sent, kept, gaps, horizon, cursor = [], [], [], 0, 0
    with SteppedServer(directory / "bus.db", "--keep", f"{KEEP}s", fault=faults) as bus:

        def read(limit):
            answer = get(bus.url, f"/recv?to=bob&since={cursor}&max={limit}")
            kept.extend(map(delivered, answer["messages"]))
            if "gap" in answer:
                gaps.append((tick(answer["gap"]["from"]), tick(answer["gap"]["to"])))
            return answer

        for visit in range(1, rounds + 1):
            waiting = random.randrange(2, 60)
            for number in range(waiting):
                msg = f"message {number} before visit {visit}"
                sent.append(Sent("ann", msg, tick(new_client.send(bus.url, "ann", "bob", msg))))
            cursor = read(random.randrange(1, waiting))["now"]
            horizon = sent[-1].tick + 1
            bus.step(visit * LATER)
            wait_until(lambda: not get(bus.url, "/log")["messages"])
        sent.append(Sent("ann", "the last", tick(new_client.send(bus.url, "ann", "bob", "the last"))))
        read(1000)
    figures = f"{rounds} visits; {len(sent):,} acknowledged, {len(kept):,} delivered, {len(gaps)} gaps announced"
    return Result(figures, violations(sent, kept, gaps, horizon))
