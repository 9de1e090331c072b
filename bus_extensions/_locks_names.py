"""Names with wildcards, as a shell reads them: do two names have a path in common?

A name is a path of parts between `/`. In a part, `*` is any number of characters, `?` is one, and `[a-z]` or `[!a-z]`
is one of some; none of them is a `/`. A part that is `**` stands for any number of parts: `src/**` is everything below
src, `src/**/a.py` is also src/a.py. Unlike in a shell, `*` also matches a dot at the beginning of a part.

A name becomes a list of tokens: a character, `?`, `[...]`, `*`, `**`, or OPTIONAL, which stands before each `**/`: it
may be left out whole. Position n stands between the token n - 1 and the token n. share() walks through the tokens of
one name. The bits of a number are the positions in the other name that the same text can lead to. So the time is one
step for each token, whatever the names are.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from bus_server import Refused

OPTIONAL = ""
WILD = re.compile(r"[*?\[]")
TOKEN = re.compile(r"\*\*|\[[!^]?\]?[^\]/]*\]|.", re.DOTALL)
LENGTH, WILDCARDS = 255, 8  # of one name
SLASH = ord("/")
LAST = 0x10FFFF

Spans = list[tuple[int, int]]  # from one code point to another, in order


def spans(token: str) -> Spans:
    """The characters that a token `[...]` stands for."""
    negated = token[1] in "!^"
    parts = re.findall("(.)-(.)|(.)", token[1 + negated : -1], re.DOTALL)
    given = [(min(ends), max(ends)) for low, high, one in parts for ends in [(ord(low or one), ord(high or one))]]
    return others([*(given if negated else others(given)), (SLASH, SLASH)])


def others(given: Spans) -> Spans:
    """All characters that are in none of these spans."""
    found, start = [], 0
    for low, high in sorted(given):
        if start < low:
            found.append((start, low - 1))
        start = max(start, high + 1)
    return [*found, (start, LAST)] if start <= LAST else found


def have_common(one: Spans, other: Spans) -> bool:
    return any(max(low, its_low) <= min(high, its_high) for low, high in one for its_low, its_high in other)


class Pattern:
    """A name as tokens, and as numbers of which bit n says something about its token n."""

    def __init__(self, tokens: list[str]) -> None:
        self.tokens: list[str] = []
        for at, token in enumerate(tokens):
            optional = token == "**" and at + 1 < len(tokens)
            self.tokens += [OPTIONAL, token] if optional else [token]
        self.end = 1 << len(self.tokens)
        self.characters: dict[str, int] = {}  # the tokens that are this character
        self.classes: list[tuple[int, Spans]] = []
        self.stars = self.deep = self.optional = 0  # `*`; `**`; OPTIONAL
        for at, token in enumerate(self.tokens):
            self.add(1 << at, token)
        self.slashes = self.characters.get("/", 0)
        self.skipped = self.stars | self.deep | self.optional  # these tokens may stand for nothing
        self.singles = (self.end - 1) & ~(self.skipped | self.slashes)  # for one character that is no `/`

    def add(self, bit: int, token: str) -> None:
        if token == "*":
            self.stars |= bit
        elif token == "**":
            self.deep |= bit
        elif token == OPTIONAL:
            self.optional |= bit
        elif len(token) > 1:
            self.classes.append((bit, spans(token)))
        else:
            self.characters[token] = self.characters.get(token, 0) | bit

    def flood(self, row: int, passed: int) -> int:
        """The positions that one can be in after these, if the tokens `passed` can be passed."""
        while True:
            wider = row | ((row & passed) + passed ^ passed)  # a carry runs through all neighbours that are passed
            wider |= (wider & self.optional) << 3
            if wider == row:
                return row
            row = wider

    def taking(self, token: str) -> int:
        """The tokens for one character that this token, which is one too, has a character in common with."""
        if token == "/":
            return self.slashes
        any_other = self.characters.get("?", 0)
        if token == "?":
            return self.singles
        mine = spans(token) if len(token) > 1 else [(ord(token), ord(token))]
        found = sum(bit for bit, its in self.classes if have_common(mine, its)) | any_other
        if len(token) == 1:
            return found | self.characters.get(token, 0)
        literal = ((each, bits) for each, bits in self.characters.items() if each not in "?/")
        return found | sum(bits for each, bits in literal if have_common(mine, [(ord(each), ord(each))]))


def share(one: Pattern, other: Pattern) -> bool:
    """Is there a path that both stand for?"""
    row = other.flood(1, other.skipped)
    without = 0  # the row in front of an OPTIONAL
    for at, token in enumerate(one.tokens):
        if token == OPTIONAL:
            without = row
        elif token == "**":
            row = other.flood(row, other.end - 1)
        elif token == "*":
            row = other.flood(row, other.skipped | other.singles)
        else:
            staying = row & (other.deep if token == "/" else other.deep | other.stars)  # they take this token too
            row = other.flood((row & other.taking(token)) << 1 | staying, other.skipped)
            if token == "/" and at > 1 and one.tokens[at - 2] == OPTIONAL:
                row |= without
        if not row:
            return False
    return bool(row & other.end)


def readings(name: str) -> tuple[Pattern, ...]:
    """What a name may mean. One with `[` is also that very path: there are files called app/[id]/page.tsx."""
    parts = [part if part == "**" else re.sub(r"\*+", "*", part) for part in name.lstrip("/").split("/")]
    tokens = TOKEN.findall("/".join(parts))
    each = [[*token] if token.startswith("[") else [token] for token in tokens]
    plain = [token for one in each for token in one]
    return (Pattern(tokens),) if plain == tokens else (Pattern(tokens), Pattern(plain))


def fault(name: object) -> str:
    """What is wrong with a name, and what to do; an empty text if nothing is."""
    if not isinstance(name, str) or not 1 <= len(name) <= LENGTH:
        return f"a name is a text of 1 to {LENGTH} characters"
    if not name.isprintable():
        return "a name must not have invisible characters"
    if "\\" in name:
        return f"{name!a}: write a name with / instead of \\"
    if {"", ".", ".."}.intersection(name.removeprefix("/").split("/")):
        return f"{name!a}: write a name without //, . and .. and without a / at its end; src/** is all below src"
    if len(WILD.findall(name)) > WILDCARDS:
        return f"{name!a}: a name has at most {WILDCARDS} of * ? [, so give several names"
    return ""


def is_wild(name: str) -> bool:
    return bool(WILD.search(name))


def ends(name: str) -> tuple[str, str]:
    """What each path that the name stands for begins with, and what it ends with."""
    first = WILD.search(name)
    return (name[: first.start()], name[max(map(name.rfind, "*?]/")) + 1 :]) if first else (name, name)


def may_overlap(one: str, other: str) -> bool:
    """A quick look: do their ends fit together?"""
    return fit(ends(one), ends(other)) and (one[:1] == "/") == (other[:1] == "/")


def fit(one: tuple[str, str], other: tuple[str, str]) -> bool:
    (first, last), (its_first, its_last) = one, other
    starts = first.startswith(its_first) or its_first.startswith(first)
    return starts and (last.endswith(its_last) or its_last.endswith(last))


def cost(one: str, other: str) -> int:
    """How long overlap() or covers() takes at most, in characters that are compared: about 1 us for each."""
    shorter, longer = sorted((one, other), key=len)
    classes, its = shorter.count("["), longer.count("[")
    both, its_both = 1 + (classes > 0), 1 + (its > 0)  # its meanings
    walked = len(shorter) * (1 + its) + classes * (10 + len(longer))
    return walked * both * its_both + (len(shorter) * both + len(longer) * its_both) // 2


def overlap(one: str, other: str) -> bool:
    """Do two names have a path in common? It is exact, with both readings of a name that has a `[`."""
    if one == other or not (is_wild(one) or is_wild(other)):
        return one == other
    shorter, longer = sorted((one, other), key=len)
    return may_overlap(one, other) and any(share(mine, its) for mine in readings(shorter) for its in readings(longer))


def exact(path: str) -> Pattern:
    return Pattern([*path.lstrip("/")])


def covers(name: str, path: str) -> bool:
    """Does the name stand for this one path? In a path, no character is a wildcard."""
    if name == path or not (is_wild(name) and may_overlap(name, path)):
        return name == path
    return any(share(exact(path), its) for its in readings(name))


class Wanted:
    """The names of one request, to be compared with names that others hold; and what that has cost."""

    MOST = 16000  # characters that one request may compare, some 16 ms

    def __init__(self, names: Iterable[str]) -> None:
        self.names = [(own, ends(own)) for own in names]  # in order
        self.wild = [each for each in self.names if is_wild(each[0])]
        self.plain = {own for own, _ in self.names if not is_wild(own)}
        self.cost = 0

    def spend(self, characters: int) -> None:
        """It is called before they are compared."""
        self.cost += characters
        if self.cost > self.MOST:
            raise Refused(413, "too many wildcards to compare: give fewer names, with more before their first * ? [")

    def overlapping(self, own: str, its_wild: bool) -> str | None:
        """The first of these names that has a path in common with this one, which `its_wild` says has wildcards."""
        among, its_ends = (self.names if its_wild else self.wild), ends(own)
        self.spend(1 + len(among) // 2)
        for wanted, both in among:
            if fit(both, its_ends) and (wanted == own or self.overlap(wanted, own)):
                return wanted
        return own if own in self.plain else None

    def overlap(self, wanted: str, own: str) -> bool:
        self.spend(cost(wanted, own))
        return overlap(wanted, own)

    def covered(self, own: str) -> bool:
        """Does this name stand for one of these, which are paths?"""
        self.spend(1 + sum(cost(path, own) for path, _ in self.names if may_overlap(path, own)))
        return any(covers(own, path) for path, _ in self.names)
