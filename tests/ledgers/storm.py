"""Conversations across several fronts of one bus, while something fails again and again, and who saw what."""
import contextlib
import itertools
import json
import pathlib
import random
import threading
import time
import urllib.request
from collections import Counter

from tests.faults import Result
from tests.faults.history import Conversation, Sent, background, get, observed, tick, violations
from tests.kit import new_client, old_client
from tests.kit.processes import comes_true, wait_until

ANSWER = 10  # s for one send; a front gives up after 8
CALM = 0.02  # s between two sends of a Pulse


class Pulse:
    """One sender without a reader: the next message is sent when the one before was acknowledged, at the next front.

    A message that a front does not acknowledge is sent at the next one under the same key, as by a client with several
    URLs. So each tick must be above the one before, at whatever front.
    """

    def __init__(self, name, *buses):
        self.name, self.urls = name, itertools.cycle([bus.url for bus in buses])
        self.sent, self.moments = [], []  # when each was acknowledged
        self.failed = Counter()  # attempts, by the status of the answer
        self.over = threading.Event()
        self.work = background(self.send)

    def send(self):
        for number in itertools.count():
            body = json.dumps({"from": self.name, "to": self.name, "msg": f"{number}", "key": f"{number}"}).encode()
            while not self.over.wait(CALM):
                try:
                    with urllib.request.urlopen(f"{next(self.urls)}/send", body, timeout=ANSWER) as answer:
                        self.sent.append(Sent(self.name, f"{number}", tick(json.load(answer)["ts"])))
                    self.moments.append(time.monotonic())
                    break
                except new_client.ERRORS as error:
                    self.failed[getattr(error, "code", "no answer")] += 1
            else:
                return

    def history(self):
        """All that it has sent: the last one may be under way."""
        return [*self.sent, Sent(self.name, f"{len(self.sent)}", None)]

    def acknowledged(self, since, until):
        return sum(since < moment < until for moment in self.moments)

    def silence(self, since):
        """The longest time between two acknowledgements that ended after `since`, in s."""
        moments = list(self.moments)
        return max(b - a for a, b in zip([since, *moments], moments) if b >= since)

    def goes_on(self, patience=60):
        """Wait for a message that is sent from now on to be acknowledged: the second one that comes."""
        enough = len(self.sent) + 2
        assert comes_true(lambda: len(self.sent) >= enough, patience), f"{self.name}: no send for {patience} s"

    def end(self):
        self.over.set()
        self.work.result(2 * ANSWER)

    def violations(self):
        return [f"reordered: {b} after {a}" for a, b in zip(self.sent, self.sent[1:]) if b.tick <= a.tick]


def crash(bus, with_copy=False):
    """kill -9 of a front, and its start; `with_copy`: its copy is lost, as when its machine is."""
    bus.kill()
    for file in pathlib.Path(bus.db).parent.glob(f"{pathlib.Path(bus.db).name}*") if with_copy else ():
        file.unlink()
    bus.start()


def storm(buses, strokes, pulses=(), calm=0.0):
    """Let these strokes of fate come while conversations go on across these fronts. A stroke returns when it is over.

    `calm` is how long each sender waits between two messages, in s. The Result has what was broken for a reader, or in
    what each front has at the end.
    """
    over, count = [], 0
    with contextlib.ExitStack() as stack:
        talks = []
        for number, (at, to, client) in enumerate(itertools.product(buses, buses, (new_client, old_client))):
            talk = stack.enter_context(Conversation(client, to.url, f"reader-{number}", at=at.url))
            talks.append(talk)
            talk.listen()
            texts = (time.sleep(calm) or f"message {count}" for count in itertools.count())
            talk.speak(f"sender-{number}", itertools.takewhile(lambda _: not over, texts))
        for count, stroke in enumerate(strokes, 1):  # noqa: B007
            enough = sum(len(talk.sent) for talk in talks) + random.randrange(150)
            wait_until(lambda: sum(len(talk.sent) for talk in talks) >= enough, 60)  # noqa: B023
            stroke()
        over.append(True)
        for pulse in pulses:
            pulse.end()
        found = [f"{talk.name}: {violation}" for talk in talks for violation in talk.finish()]
    sent = [each for talk in talks for each in talk.sent] + [each for pulse in pulses for each in pulse.history()]
    newest = max(get(bus.url, "/healthz")["now"] for bus in buses)
    for bus in buses:
        wait_until(lambda: get(bus.url, "/healthz")["now"] >= newest)  # noqa: B023
        found += [f"the log of {bus.url}: {violation}" for violation in violations(sent, observed(bus.url))]
    found += [violation for pulse in pulses for violation in pulse.violations()]
    unknown = sum(each.tick is None for each in sent)
    return Result(f"{count} times; {len(sent) - unknown:,} acknowledged, {unknown:,} unknown", found)
