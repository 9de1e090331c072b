"""The check itself: it finds each kind of fault, and none where there is none."""
import pytest

from tests.faults.history import Delivered, Sent, violations

SENT = [Sent("ann", "1", 10), Sent("bob", "1", 20), Sent("ann", "2", 30), Sent("ann", "3", None), Sent("ann", "4", 50)]
WHOLE = [Delivered(*each[:2], tick) for each, tick in zip(SENT, (10, 20, 30, 40, 50))]
WITHOUT_3 = WHOLE[:3] + WHOLE[4:]


@pytest.mark.parametrize("delivered", [WHOLE, WITHOUT_3])
def test_a_message_that_was_not_acknowledged_may_arrive_or_not(delivered):
    assert violations(SENT, delivered) == []


def test_an_empty_history_keeps_the_promise():
    assert violations([], []) == []


@pytest.mark.parametrize(
    ("fault", "delivered"),
    [
        ("lost", WHOLE[1:]),
        ("lost", WHOLE[:-1]),
        ("lost", []),
        ("duplicated", [*WHOLE, Delivered("ann", "4", 60)]),
        ("duplicated", [*WHOLE, WHOLE[-1]]),
        ("duplicated", [*WHOLE, Delivered("ann", "3", 60)]),
        ("unexpected", [*WHOLE, Delivered("ann", "5", 60)]),
        ("unexpected", [*WHOLE, Delivered("eve", "1", 60)]),
        ("unexpected", [Delivered("ann", "1", 11), *WHOLE[1:]]),
        ("reordered", [WHOLE[1], WHOLE[0], *WHOLE[2:]]),
        ("reordered", [*WHOLE[:-1], Delivered("ann", "4", 40)]),
    ],
)
def test_each_kind_of_fault_is_found_and_named(fault, delivered):
    assert any(violation.startswith(fault) for violation in violations(SENT, delivered))


def test_a_sender_whose_later_message_has_the_lower_tick_was_reordered():
    sent = [Sent("ann", "1", 20), Sent("ann", "2", 10)]
    found = violations(sent, [Delivered("ann", "2", 10), Delivered("ann", "1", 20)])
    assert len(found) == 1 and found[0].startswith("reordered")


def test_a_send_that_was_given_up_may_overtake_nothing_but_may_come_late():
    sent = [Sent("ann", "1", None), Sent("ann", "2", 10)]
    assert violations(sent, [Delivered("ann", "2", 10), Delivered("ann", "1", 20)]) == []


def test_what_retention_removed_must_lie_in_a_gap_that_its_reader_was_told_of():
    assert violations(SENT, WHOLE[2:], gaps=[(5, 20)], removed_below=25) == []
    assert violations(SENT, WHOLE, gaps=[], removed_below=25) == []
    (found,) = violations(SENT, WHOLE[2:], gaps=[(10, 20)], removed_below=25)
    assert found.startswith("gap not announced") and "tick=10" in found
    assert all(found.startswith("lost") for found in violations(SENT, WHOLE[2:], gaps=[(5, 20)], removed_below=10))
