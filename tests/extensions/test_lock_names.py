"""Names with wildcards overlap exactly when there is a path that both stand for: compared with all short paths."""
import importlib.util
import itertools
import random
import re

import pytest

from tests.kit.processes import ROOT

spec = importlib.util.spec_from_file_location("_locks_names", ROOT / "bus_extensions/_locks_names.py")
paths = importlib.util.module_from_spec(spec)
spec.loader.exec_module(paths)

TOKENS = ["a", "b", "/", "/", "*", "?", "**", "[ab]", "[!a]", "[^b]", "[b-c]"]
LONGEST = 6  # characters of the paths; enough for a path that two names of 4 tokens have in common


def stands_for(parts, path):
    """Does the name match the path, by the definition in PROTOCOL.md? Both are lists of parts."""
    if not parts:
        return not path
    if parts[0] == "**":
        least = 1 if len(parts) == 1 else 0  # src/** is what is below src, and not src
        return any(stands_for(parts[1:], path[more:]) for more in range(least, len(path) + 1))
    return bool(path) and matches(parts[0], path[0]) and stands_for(parts[1:], path[1:])


def matches(part, text):
    if not part:
        return not text
    if part[0] == "*":
        return any(matches(part[1:], text[more:]) for more in range(len(text) + 1))
    choice = re.match(r"\[([!^]?)([^\]]+)\]", part)
    if choice:
        low, _, high = choice[2].partition("-")
        among = text[:1] in choice[2] if not high else low <= text[:1] <= high
        return bool(text) and among is not bool(choice[1]) and matches(part[choice.end() :], text[1:])
    return bool(text) and part[0] in ("?", text[0]) and matches(part[1:], text[1:])


def is_path(text):
    return all(text.split("/"))


ALL = [
    "".join(text)
    for length in range(1, LONGEST + 1)
    for text in itertools.product("abc/", repeat=length)
    if is_path("".join(text))
]


def some_names(seed, number):
    chance, names = random.Random(seed), set()
    while len(names) < number:
        name = "".join(chance.choice(TOKENS) for _ in range(chance.randint(1, 4)))
        names.update([name] if is_path(name) else [])
    return sorted(names)


def whole(part):
    """Several stars beside each other are one, but where they are the whole part."""
    return part if part == "**" else re.sub(r"\*+", "*", part)


@pytest.mark.parametrize("seed", range(2))
def test_names_overlap_exactly_if_a_path_is_common(seed):
    names = some_names(seed, 50)
    found = {}
    for name in names:
        parts = [whole(part) for part in name.split("/")]
        found[name] = {number for number, path in enumerate(ALL) if stands_for(parts, path.split("/"))}
    both = 0
    for one, other in itertools.product(names, repeat=2):
        expected = not found[one].isdisjoint(found[other])
        mine, its = paths.readings(one)[0], paths.readings(other)[0]  # without the one in which [ is a character
        assert paths.share(mine, its) is expected, (one, other)
        assert paths.overlap(one, other) or not expected, (one, other)
        both += expected
    assert 300 < both < len(names) ** 2 - 300, "these names show little"


@pytest.mark.parametrize("seed", range(2))
def test_a_name_covers_the_paths_that_it_stands_for(seed):
    for name in some_names(seed, 15):
        parts = [whole(part) for part in name.split("/")]
        for path in ALL[seed::3]:
            assert paths.covers(name, path) is stands_for(parts, path.split("/")), (name, path)


@pytest.mark.parametrize("one, other, expected", [
    ("app/[id]/page.tsx", "app/[id]/page.tsx", True), ("app/[id]/page.tsx", "app/i/page.tsx", True),
    ("app/[id]/page.tsx", "app/id/page.tsx", False), ("app/[id]/*", "app/[[]id]/page.tsx", True),
    ("/etc/*", "/etc/hosts", True), ("**", "/etc/hosts", False), ("*/hosts", "/hosts", False),
    ("src/*", "src/.env", True), ("[z-a]", "q", True), ("[]]x", "]x", True), ("[!]]x", "]x", False),
    ("a[", "a[", True), ("a[", "a[b", False), ("a[b/c]", "a[b/c]", True), ("\u00fc*", "\u00fcber", True),
    ("\u00fc*", "uber", False), ("[a-\u00ff]", "\u00fc", True), ("a" * 255, "a" * 254 + "?", True),
])  # fmt: skip
def test_these_names_overlap_or_do_not(one, other, expected):
    assert paths.overlap(one, other) is paths.overlap(other, one) is expected


def hostile():
    stars, parts = paths.WILDCARDS, paths.LENGTH // 4
    yield "*a" * stars + "a" * (paths.LENGTH - 2 * stars), "a" * paths.LENGTH
    yield "*a" * (stars - 1) + "a" * 200 + "?", "*a" * (stars - 1) + "a" * 200 + "b"
    yield "**/" + "*a/" * (stars - 2) + "a/" * parts + "a", "**/" + "*a/" * (stars - 2) + "a/" * parts + "b"
    yield "[!a]*" * (stars // 2) + "b" * 200, "*[!b]" * (stars // 2) + "a" * 200


@pytest.mark.parametrize("one, other", [*hostile()])
def test_a_comparison_takes_a_step_for_each_character(one, other, monkeypatch):
    """However many wildcards there are: a search that tried all ways would take years."""
    assert not paths.fault(one) and not paths.fault(other)
    floods = []
    really = paths.Pattern.flood
    monkeypatch.setattr(paths.Pattern, "flood", lambda *arguments: floods.append(1) or really(*arguments))
    paths.overlap(one, other)
    assert len(floods) <= 4 * (paths.LENGTH + 2), "two readings of each of the two names"
    assert len(floods) <= paths.cost(one, other) == paths.cost(other, one)


def test_a_name_that_is_none_is_refused_in_words():
    for name, words in (
        (None, "a text of 1 to 255"), ("", "1 to 255"), ("x" * 256, "1 to 255"), ("a\u202eb", "invisible"),
        ("a\\b", "/ instead of"), ("a//b", "without //"), ("a/../b", "without //"), ("src/", "src/**"),
        ("*a*b*c*d*e*f*g*h*i", "at most 8"),
    ):  # fmt: skip
        assert words in paths.fault(name), name
    for name in ("a", "/a", "a b", "a*b", "\u00fc/\U0001f600", "...", "-", "[", "src/**"):
        assert paths.fault(name) == "", name
