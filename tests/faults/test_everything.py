import types

import pytest

from tests.faults import linux, program, skipped_without
from tests.faults.disk import mounts
from tests.faults.everything import FAULTS, Window, early, grown, siege, times, unanswered
from tests.faults.history import Delivered, Sent
from tests.faults.honest import Agent, Exchange, Field, judged
from tests.kit.processes import in_cpu

besieged = skipped_without(linux, mounts, program("mkfs.ext4"), program("gcc"))


@besieged
@pytest.mark.slow("9 s of load, in which each fault comes once; then it waits until everything has arrived")
def test_everything_at_once_loses_nothing_and_leaves_nobody_without_an_answer(tmp_path):
    """The facts are those of the hour. The bars in seconds are at least ten times as wide, as others run at the same
    time and one window in a few seconds weighs much; that memory stays flat cannot be seen in so short a time.
    """
    result = siege(tmp_path, 9, slack=in_cpu(10), at_once=3)
    assert result.violations == []
    assert all(fault in result.figures for fault in FAULTS), "each was injected"


@besieged
@pytest.mark.slow("six kills at least: fewer may lose nothing by chance; and the wait for what is lost")
def test_a_bus_under_siege_that_acknowledges_before_it_commits_is_found_out(tmp_path):
    assert any("lost: " in violation for violation in early(tmp_path, 11, ["kill"] * 6).violations)


# The checker


def besieged_field():
    """One writer and one reader, who were promised nothing yet."""
    field = Field(None, {}, None, 0)
    writer, reader = Agent(field, "writer-0", ""), Agent(field, "bob", "")
    field.readers.append(reader)
    return field, writer, reader


def test_what_is_lost_comes_twice_or_after_its_recall_is_found():
    field, writer, reader = besieged_field()
    writer.sent += [("bob", Sent("writer-0", f"bob: {number}", number)) for number in (1, 2, 3)]
    writer.sent += [("carol", Sent("writer-0", "carol: 4", 4)), ("queue", Sent("writer-0", "queue: 5", 5))]
    reader.got += [Delivered("writer-0", f"bob: {number}", number) for number in (1, 2, 3)]
    writer.done["5"] = 10.0
    assert judged(field) == []
    writer.claimed.append(("5", 11.0))
    writer.recalled["writer-0", "bob: 2"], reader.polled["writer-0", "bob: 2"] = 10.0, 11.0
    del reader.got[2]
    writer.sent.append(("queue", Sent("writer-0", "queue: 6", 6)))
    kinds = ["bob: lost: ", "bob: unexpected: ", "queue: lost: ", "queue: duplicated: "]
    assert [found.startswith(kind) for found, kind in zip(judged(field), kinds)] == [True] * 4


@pytest.mark.parametrize(
    ("status", "kind", "began", "violations"),
    [(200, "send", 5, 0), (0, "send", 5, 1), (0, "send", 25, 0), (0, "guest", 5, 0), (None, "guest", 25, 1)],
    ids=["answered", "hung-up-on", "killed", "revoked", "silent"],
)
def test_who_is_not_answered_is_found_unless_we_did_it(status, kind, began, violations):
    field, writer, _ = besieged_field()
    writer.exchanges.append(Exchange(kind, began, 0.1, status, "writer-0"))
    it = types.SimpleNamespace(field=field, windows=[], downs=[Window("down", 20, 30, None)])
    assert len(unanswered(it)) == violations


@pytest.mark.parametrize(
    ("kind", "began", "took", "violations"),
    [("send", 15, 0.04, 0), ("send", 15, 0.06, 1), ("send", 25, 1.04, 0), ("send", 25, 1.06, 1), ("read", 25, 0.04, 0),
     ("health", 15, 0.06, 1)],
)  # fmt: skip
def test_who_waits_too_long_is_found(kind, began, took, violations):
    """Quiet until 10, a slow disk from 20 on; a quiet send takes 10 ms."""
    field, writer, _ = besieged_field()
    writer.exchanges += [Exchange("send", number / 10, 0.01, 200, "writer-0") for number in range(90)]
    writer.exchanges += [Exchange(kind, began, took, 200, "writer-0")] * 2
    it = types.SimpleNamespace(field=field, windows=[Window("slow fsync", 20, 30, 0.5)])
    assert len(times(it, 10, 1)[1]) == violations


def test_memory_that_grows_is_found():
    assert grown([9, 100, 100, 104], 3600).violations == []
    assert grown([9, 100, 100, 106], 3600).violations
