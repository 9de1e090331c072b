"""The names that are most like one that nobody knows. Part of people.py, which is loaded with this file."""

from __future__ import annotations

import os
import time
from bisect import bisect_left
from collections.abc import Iterator
from itertools import islice

from bus_server import EVERYONE, Budget, Bus, Draft, encode


class Similar:
    """Finds the names that a sender may have meant. Used by the loop only.

    It looks at a bounded number of names, however many there are: names that differ from the wanted one by one letter
    and need one look-up each, then names that are near to it in the order of names. On a bus with few names it finds
    every similar name; with many, most that differ by one letter, and some that differ by two.
    """

    SHOWN = 3
    LETTERS = 2  # a name that differs by more is another name
    SHORT, CASES = 2, 4  # letters: every other such name differs by as few, so only another case of it is similar
    LOOKED_UP, NEAR, COMPARED = 300, 40, 25  # names; 0.5 ms for the worst of them
    SHARE, BURST = 0.02, 0.02  # s of CPU that looks may take: in each second, at once
    FRESH = 0.1  # s; so long the last look is good for further sends to the same name

    def __init__(self, bus: Bus) -> None:
        self.bus = bus
        self.looks = Budget(time.monotonic, self.SHARE, self.BURST)
        self.rests = 0.0  # until when there is no time for a look, on the monotonic clock, s
        self.last: tuple[str, str, float, str] = "", "", 0.0, ""  # channel, name, until when it is good, the member
        bus.unknown.append(self.member)

    def member(self, one: Draft, own: str) -> str:
        """A member of the answer to a sender that may see names; a token that may only send must not learn any."""
        now = time.monotonic()
        *last, good, member = self.last
        is_fresh = now < good and last == [one.channel, own]
        if not is_fresh and now < self.rests:
            return ""
        grants = self.bus.gate.tokens.named.get(one.sender, ())
        if any(grant.send_only for grant in grants):
            return ""
        return member if is_fresh else self.look(one.channel, own, now)

    def look(self, channel: str, own: str, now: float) -> str:
        self.rests = now + self.looks.spend("", 0)
        if now < self.rests:
            return ""
        start = time.thread_time()
        found = self.to(channel, own)
        self.looks.take("", time.thread_time() - start)
        member = f', "similar": {encode(found)}' if found else ""
        self.last = channel, own, now + self.FRESH, member
        return member

    def to(self, channel: str, unknown: str) -> list[str]:
        """The known names on a channel that are most like this one, the nearest first."""
        own, letters, short = unknown.lower(), set(unknown.lower()), len(unknown) <= self.SHORT
        first = islice(spelled(unknown), self.CASES if short else self.LOOKED_UP)
        found = {each: 1 for each in first if self.is_known(channel, each)}
        alike = (
            each
            for each in dict.fromkeys(self.near(channel, unknown) if len(found) < self.SHOWN and not short else ())
            if abs(len(each) - len(own)) <= self.LETTERS
            and len(letters.symmetric_difference(each.lower())) <= 2 * self.LETTERS
        )
        for each in islice(alike, self.COMPARED):
            if differ(own, each.lower(), self.LETTERS) and self.is_known(channel, each):
                found.setdefault(each, 1 if differ(own, each.lower(), 1) else 2)
        found.pop(EVERYONE, None)
        return sorted(found, key=lambda each: (each.lower() != own, found[each], each))[: self.SHOWN]

    def is_known(self, channel: str, own: str) -> bool:
        box = self.bus.mailboxes.boxes.get((channel, own))
        return bool(box and box.seen) or own in self.bus.gate.tokens.named

    def near(self, channel: str, unknown: str) -> Iterator[str]:
        """Names that are beside this one in the order of names, in each case; then those with tokens."""
        ordered = self.bus.mailboxes.ordered
        for each in (unknown, unknown.lower(), unknown.capitalize(), unknown.upper()):
            place = bisect_left(ordered, (channel, each))
            for at in sorted(range(max(place - self.NEAR, 0), place + self.NEAR), key=lambda at: abs(at - place)):
                if at < len(ordered) and ordered[at][0] == channel:
                    yield ordered[at][1]
        yield from islice(self.bus.gate.tokens.named, self.NEAR)


LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789-_."


def spelled(text: str) -> Iterator[str]:
    """The text in other cases, and with one letter more, less or changed, or with two neighbours swapped."""
    yield from (text.lower(), text.upper(), text.capitalize(), text.swapcase())
    for at in range(len(text)):
        yield text[:at] + text[at + 1 :]
        yield text[:at] + text[at + 1 : at + 2] + text[at] + text[at + 2 :]
    for at in range(len(text)):
        for letter in LETTERS:
            yield text[:at] + letter + text[at:]
            yield text[:at] + letter + text[at + 1 :]


def differ(one: str, other: str, letters: int) -> bool:
    """Do the texts differ by at most so many letters that were changed, added or left out?"""
    same = len(os.path.commonprefix([one, other]))
    one, other = one[same:], other[same:]
    if not one or not other or not letters:
        return len(one) + len(other) <= letters
    return abs(len(one) - len(other)) <= letters and (
        differ(one[1:], other[1:], letters - 1)
        or differ(one[1:], other, letters - 1)
        or differ(one, other[1:], letters - 1)
    )
