"""What PROTOCOL.md promises, as lists and sets: a bus that keeps everything in memory and is never killed.

It is written from the document and not from the server; sections are those of the document. A tick is an int of
microseconds. test_model.py holds it against the server.
"""
from __future__ import annotations

import copy
from collections import defaultdict
from decimal import ROUND_HALF_UP, Decimal
from typing import Any, NamedTuple

ALL = "all"
RECALLED = 0  # as a time: long ago
FAST_CLOCK = 300 * 10**6  # us that a cursor may be ahead of the bus's clock


class Draft(NamedTuple):
    """A message as its sender gave it."""

    sender: str
    to: tuple[str, ...]
    channel: str
    members: dict[str, Any]  # msg, ttl, and what passes unchanged
    key: str | None = None


class Stored(NamedTuple):
    tick: int
    to: str
    draft: Draft
    expires: float  # us of the bus's clock; or RECALLED

    @property
    def place(self):
        return self.draft.channel, self.to

    def as_delivered(self):
        members = {"from": self.draft.sender, "to": self.to, "channel": self.draft.channel, **self.draft.members}
        return {"ts": self.tick / 1e6, "id": f"{self.tick:x}", **members}


class Mark:
    """How far a name was read on one channel (section 3)."""

    def __init__(self):
        self.reader = False  # somebody reads it as their own; else it is a group, if anything
        self.polled = False
        self.read = None  # the highest cursor presented; None before the first
        self.fetched = 0
        self.above = (0, 0)  # above a hole: what lies between these was fetched as well
        self.firm = False  # it had a message or a cursor; a name that was only looked at may be forgotten
        self.polled_at = 0  # the last poll, by the clock of the bus

    def certain(self):
        """Does the bus know for sure that this name was polled?"""
        return self.polled and self.firm

    def has_passed(self, message):
        low, high = self.above
        return message.tick <= self.fetched or low < message.tick <= high

    def seen(self):
        """What lies above is unread: for a group, what nobody fetched (section 9)."""
        return (self.read or 0) if self.reader else self.fetched


def tick(text):
    """`since`, rounded to the nearest microsecond (section 2)."""
    return int((Decimal(text) * 10**6).to_integral_value(ROUND_HALF_UP))


class Model:
    """The messages that are kept, and two sets of marks.

    Marks are on disk up to a second late (section 4). So after a kill the bus has them somewhere between `least`, what
    was on disk for certain, and `most`, what happened. While nobody kills it the two are equal, and exact.
    """

    def __init__(self, newest, keep, clock):
        self.newest, self.keep, self.clock = newest, keep, clock  # us, us, a function that gives us
        self.kept = []
        self.first_sends = {}  # (sender, channel, key): what was sent with it, and its messages
        self.removed = defaultdict(int)  # (channel, name): the highest tick that retention took
        self.cursors = defaultdict(set)  # (channel, name): every cursor it presented
        self.most, self.least = defaultdict(Mark), defaultdict(Mark)
        self.saved = copy.deepcopy(self.least)

    # Section 8: sending

    def verdict(self, drafts):
        """The status for these drafts, which are valid, and for each of them its first messages, if it is a retry."""
        first = [self.first_sends.get((each.sender, each.channel, each.key)) for each in drafts]
        if any(known and known[0] != each for known, each in zip(first, drafts)):
            return 409, None
        return 200, [known and known[1] for known in first]

    def store(self, draft, ticks):
        """Keep a message for each name, with the ticks that its sender was told."""
        assert len(ticks) == len(draft.to) and self.newest < ticks[0] and sorted(set(ticks)) == ticks, "not in order"
        expires = self.clock() + draft.members.get("ttl", 1e9) * 1e6
        fresh = [Stored(each, to, draft, expires) for each, to in zip(ticks, draft.to)]
        self.kept += fresh
        for marks in (self.most, self.least):
            for each in fresh:
                marks[each.place].firm = True
        self.newest = ticks[-1]
        if draft.key:
            self.first_sends[draft.sender, draft.channel, draft.key] = draft, fresh
        return fresh

    # Section 9: reading

    def too_far_ahead(self, since):
        return since > self.newest and since > self.clock() + FAST_CLOCK

    def present(self, names, channel, cursors):
        """A reader comes with one of these cursors; one ahead of the bus moves the bus."""
        self.newest = max(self.newest, *cursors, 0)
        if names[0] == ALL:  # nobody's own
            return
        self.cursors[channel, names[0]] |= cursors
        for marks, since in ((self.most, max(cursors)), (self.least, min(cursors))):
            own = marks[channel, names[0]]
            own.read = max(own.read or 0, since)
            own.fetched = max(own.fetched, since)
            own.firm = own.firm or since > 0

    def poll(self, names, channel):
        for marks in (self.most, self.least):
            marks[channel, names[0]].reader = names[0] != ALL
            for name in {*names, ALL}:
                marks[channel, name].polled = True
                marks[channel, name].polled_at = self.clock()

    def fetch(self, names, channel, upto, cursors):
        """An answer to one of these cursors, with messages up to this tick, arrived.

        A group's mark passes no message that nobody got: one that lies below the cursor and above the mark.
        """
        for marks, since in ((self.most, min(cursors)), (self.least, max(cursors))):
            for name in {*names, ALL}:
                mark = marks[channel, name]
                hole = any(each.place == (channel, name) and mark.fetched < each.tick <= since
                           and not self.is_expired(each) for each in self.kept)
                if name in (names[0], ALL) or not hole:
                    mark.fetched = max(mark.fetched, upto)
                else:
                    low, high = mark.above
                    mark.above = min(low or since, since), max(high, upto)

    def resumed(self, names, channel):
        """The cursors that `since=last` may stand for; after a kill an earlier one than the highest."""
        place = channel, names[0]
        if self.least[place].read is not None:
            return {each for each in self.cursors[place] if each >= self.least[place].read}
        first = [each.tick for each in self.kept if each.place == place]
        before_all = self.removed[place] or (first or [self.newest + 1])[0]
        return {before_all - 1, *self.cursors[place]}

    def visible(self, names, channel, since):
        return [each for each in self.addressed(names, channel, since) if not self.is_expired(each)
                and not (each.to == ALL and each.draft.sender == names[0])]

    def addressed(self, names, channel, since):
        return [each for each in self.kept
                if each.draft.channel == channel and each.to in {*names, ALL} and each.tick > since]

    def gap(self, names, channel, since):
        """The last removed tick above the cursor, or None."""
        last = max(self.removed[channel, name] for name in {*names, ALL})
        return last if last > since else None

    def is_expired(self, message):
        return message.expires <= self.clock()

    # Section 11: looking

    def unread(self, place):
        """The fewest and the most there may be; equal unless the server was killed."""
        most, least = self.most[place], self.least[place]
        marks = {most.seen(), least.seen()}
        if most.reader != least.reader:  # it is a group's again, or somebody's own: with any cursor, or with none yet
            marks |= {most.fetched, 0, *self.cursors[place]}
        counts = {sum(each.place == place and each.tick > mark and not self.is_expired(each) for each in self.kept)
                  for mark in marks}
        return min(counts), max(counts)

    def states(self, message):
        """What `state` may be."""
        return {self.state(message, marks[message.place]) for marks in (self.most, self.least)}

    def state(self, message, mark):
        if message.expires == RECALLED:  # whatever cursor passed it since: nobody has it
            return "recalled"
        if mark.reader and message.tick <= mark.seen():
            return "acknowledged"
        if message.tick <= mark.fetched:
            return "fetched"
        return "expired" if self.is_expired(message) else "queued"

    # Section 12: taking back

    def recall(self, message):
        """The statuses there may be: it is too late once it was fetched, unless it was recalled before."""
        if message.expires == RECALLED:
            return {200}
        return {409 if marks[message.place].has_passed(message) else 200 for marks in (self.most, self.least)}

    def recalled(self, message):
        self.kept[self.kept.index(message)] = message._replace(expires=RECALLED)

    # What happens to a bus

    def retain(self):
        """Remove what is older than --keep."""
        for each in [each for each in self.kept if each.tick < self.clock() - self.keep]:
            self.kept.remove(each)
            self.removed[each.place] = each.tick
            self.first_sends.pop((each.draft.sender, each.draft.channel, each.draft.key), None)
        having_mail = {each.place for each in self.kept}
        for marks in (self.least, self.saved):
            for place, mark in list(marks.items()):
                if place[1] != ALL and place not in having_mail and mark.polled_at < self.clock() - self.keep:
                    marks[place] = Mark()  # the bus forgets it (section 11), soon

    def stop(self):
        """An orderly end writes the marks, but not of a name that was only looked at."""
        for place, mark in list(self.least.items()):
            if not mark.firm:
                self.least[place] = Mark()
        self.saved = copy.deepcopy(self.least)
        self.forget()

    def kill(self):
        self.least = copy.deepcopy(self.saved)
        self.forget()

    def forget(self):
        """How far messages to everyone came, and what was fetched above holes, is not written."""
        for marks in (self.most, self.least, self.saved):
            for (_, name), mark in marks.items():
                mark.above = (0, 0)
                if name == ALL:
                    mark.fetched = 0
