"""What was sent, what arrived, and whether that keeps the promise: the check behind every test with a fault in it.

A Conversation makes such a history, `violations` judges it. A message is known by its sender and text, so a sender uses
no text twice.
"""
from __future__ import annotations

import json
import socket
import sys
import threading
import urllib.request
from collections import Counter
from concurrent.futures import Future
from typing import NamedTuple

from tests.kit.processes import comes_true, wait_until

PATIENCE = 60  # s, for what is still on its way when a conversation ends
LAST = "the last message"


class Sent(NamedTuple):
    sender: str
    msg: str
    tick: int | None  # None: there was no acknowledgement, so nobody knows


class Delivered(NamedTuple):
    sender: str
    msg: str
    tick: int


def violations(sent, delivered, gaps=(), removed_below=0):
    """Every way in which `delivered`, all that one reader kept, breaks what the bus promised those who sent.

    lost               a message was acknowledged and did not arrive
    gap not announced  the same, and retention may have removed it, but its reader was told of no gap that it lies in
    duplicated         it arrived more than once, under whatever tick; unacknowledged, it may arrive once, or not
    unexpected         nobody sent it, or it has another tick than its sender was told
    reordered          its tick is not above the one before it, or its sender had sent it before one that came earlier

    `gaps` are those that the reader was told of, each from above one tick up to another; retention has removed nothing
    from the tick `removed_below` on.

    `sent` has the messages of each sender in the order it sent them, each after the one before was answered. Only what
    was acknowledged is held to that order: a send that was given up may still be on its way when the next one arrives.
    """
    ticks = {each[:2]: each.tick for each in sent}
    places = {each[:2]: place for place, each in enumerate(sent) if each.tick is not None}
    arrivals = Counter(each[:2] for each in delivered)
    missing = [each for each in sent if each.tick is not None and not arrivals[each[:2]]]
    found = [f"lost: {each}" for each in missing if each.tick >= removed_below]
    found += [f"gap not announced: {each}" for each in missing
              if each.tick < removed_below and not any(start < each.tick <= end for start, end in gaps)]
    found += [f"duplicated: {message} came {times} times" for message, times in arrivals.items() if times > 1]
    found += [f"unexpected: {each}" for each in delivered if ticks.get(each[:2], -1) not in (None, each.tick)]
    found += [f"reordered: {b} after {a}" for a, b in zip(delivered, delivered[1:]) if b.tick <= a.tick]
    furthest = {}
    for each in delivered:
        place = places.get(each[:2], -1)
        if -1 < place < furthest.get(each.sender, -1):
            found.append(f"reordered: {each} after what {each.sender} sent later")
        furthest[each.sender] = max(place, furthest.get(each.sender, -1))
    return found


class Conversation:
    """Senders to one name and the reader of that name, a thread each, and what they saw.

    `client` has receive(url, name, pause=, ...), which yields messages, and send(url, sender, to, msg, pause=), which
    returns the ts, or None for a message that was not acknowledged. Both call `pause` on errors; true means: give up.
    The senders send at `at`, another front of the same bus, if it is given.
    """

    def __init__(self, client, url, name, patience=PATIENCE, at=None):
        self.client, self.url, self.name, self.patience, self.at = client, url, name, patience, at or url
        self.sent, self.delivered, self.senders = [], [], []
        self.over = threading.Event()
        self.errors = Counter()  # why the clients paused

    def pause(self, seconds):
        """What a client calls when it handles an error; true when it is to give up."""
        self.errors[repr(sys.exc_info()[1])] += 1
        return self.over.wait(seconds)

    def listen(self, **settings):
        """Start the reader. It has polled when this returns: all that is sent from now on is for it."""
        messages = self.client.receive(self.url, self.name, pause=self.pause, **settings)
        self.reader = background(self.keep, messages)
        wait_until(lambda: self.name in get(self.url, "/inbox")["recipients"].get("default", {}))

    def speak(self, sender, texts):
        self.senders.append(background(self.send, sender, texts))

    def send(self, sender, texts):
        for msg in texts:
            if self.over.is_set():
                break
            ts = self.client.send(self.at, sender, self.name, msg, pause=self.pause)
            self.sent.append(Sent(sender, msg, None if ts is None else tick(ts)))
            if ts is None:  # while nobody listens there, the next one would only be refused
                comes_true(lambda: self.over.is_set() or listens(self.at), self.patience)

    def keep(self, messages):
        for message in messages:
            self.delivered.append(delivered(message))
            if message["msg"] == LAST:
                break

    def wait_for_sends(self, count):
        wait_until(lambda: len(self.sent) >= count, PATIENCE)

    def wait_for_senders(self):
        for sender in self.senders:
            sender.result(PATIENCE)

    def finish(self):
        """Wait for the senders, and for the reader to have it all; returns the violations.

        LAST is sent when its forerunner has arrived, so it comes in one more answer, where repeats would show. What has
        not arrived after `patience` seconds is lost.
        """
        self.wait_for_senders()
        herald = f"herald-of-{self.name}"
        for msg in (f"next comes {LAST}", LAST):
            self.send(herald, [msg])
            try:
                wait_until(lambda: self.delivered and self.delivered[-1][:2] == (herald, msg), self.patience)  # noqa: B023
            except AssertionError:
                break
        return violations(self.sent, self.delivered)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.over.set()


def listens(url):
    try:
        socket.create_connection(url.rpartition("/")[2].split(":"), PATIENCE).close()
    except OSError:
        return False
    return True


def observed(url):
    """All that the bus has, in its order, as an observer is told."""
    found, answer = [], {"more": True, "now": 0}
    while answer["more"]:
        answer = get(url, f"/log?since={answer['now']}&max=1000")
        found += map(delivered, answer["messages"])
    return found


def get(url, path):
    with urllib.request.urlopen(url + path, timeout=PATIENCE) as response:
        return json.load(response)


def delivered(message):
    return Delivered(message["from"], message["msg"], tick(message["ts"]))


def tick(ts):
    return round(float(ts) * 1000000)


def background(work, *arguments):
    """The Future of a call in a thread of its own, which does not keep a failed test from ending."""
    future = Future()

    def run():
        try:
            future.set_result(work(*arguments))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future
