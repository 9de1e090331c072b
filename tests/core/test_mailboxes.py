"""Who reads, how far, and who is parked: with a clock that the test moves."""

import math
import sys

import pytest

from bus_server import EVERYONE, GRACE, PARKED_PER_NAME, Deadlines, Message, Poll, news
from tests.kit import inside
from tests.kit.clock import Clock


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def mailboxes(clock):
    return inside.mailboxes(clock)


def poll(*names, since=0, hold=25.0, observer=False, limit=100, channel="default"):
    return Poll(
        None if observer else names[0],
        names + (() if observer else (EVERYONE,)),
        channel,
        None,
        since,
        limit,
        hold,
        False,
    )


def message(tick, to, sender="alice", channel="default"):
    return Message(tick, channel, to, sender, '"msg": "x"', 1, None)


def polled(mailboxes, poll, address, wall):
    """As for each poll at /recv, which names the reader's own mailbox first."""
    mailboxes.polled(poll, address, wall)
    mailboxes.owned(poll)


def claimed(mailboxes, *visible):
    woken = mailboxes.wake(list(visible))
    for connection, came in mailboxes.behind.items():
        its = [each for each in sorted(sum(came, [])) if mailboxes.parked[connection].wants(each)]
        woken.update({connection: its} if its else {})
    mailboxes.behind.clear()
    for connection in woken:
        mailboxes.unpark(connection)
    return {connection: [each.tick for each in fresh] for connection, fresh in woken.items()}


def test_a_parked_reader_is_woken_once_with_all_that_is_for_it(mailboxes):
    mailboxes.park("bob's", poll("bob"))
    mailboxes.park("eve's", poll("eve", "bob"))
    assert claimed(mailboxes, message(1, "bob"), message(2, "eve"), message(3, "carl"), message(4, EVERYONE)) == {
        "bob's": [1, 4],
        "eve's": [1, 2, 4],
    }
    assert claimed(mailboxes, message(5, "bob")) == {}, "a reader that was answered is still parked"
    assert not mailboxes.parked and not mailboxes.waiting


def test_a_reader_is_not_woken_by_its_own_broadcast_or_another_channel(mailboxes):
    mailboxes.park("bob's", poll("bob"))
    assert claimed(mailboxes, message(1, EVERYONE, sender="bob"), message(2, "bob", channel="lab")) == {}
    assert list(mailboxes.parked) == ["bob's"]


def test_an_unparked_reader_leaves_nothing_behind(mailboxes):
    mailboxes.park("bob's", poll("bob", "team"))
    mailboxes.unpark("bob's")
    assert claimed(mailboxes, message(1, "bob")) == {} and not mailboxes.waiting


def test_of_many_that_wait_for_one_name_the_oldest_are_sent_away_unless_they_share_its_messages(mailboxes):
    for number in range(PARKED_PER_NAME):
        mailboxes.park(number, poll("bob"))
    mailboxes.park("ann's", poll("ann", "bob"))
    assert mailboxes.surplus(poll("bob")) == []  # ann's waits for ann
    for number in ("the ninth", "the tenth"):
        mailboxes.park(number, poll("bob"))
    assert mailboxes.surplus(poll("bob")) == [0, 1]
    mailboxes.exclusive.add(Poll)
    assert mailboxes.surplus(poll("bob")) == []


def test_presence_is_the_hold_and_the_grace(mailboxes, clock):
    box = mailboxes.box("default", "bob")
    assert not mailboxes.online(box)
    polled(mailboxes, poll("bob", hold=40), "10.0.0.7", 5)
    clock.now += 40 + GRACE - 0.1
    assert mailboxes.online(box) and box.address == "10.0.0.7" and box.seen == box.listening == 5
    polled(mailboxes, poll("bob", hold=0), "10.0.0.7", 6)
    assert box.listening == 5 and box.seen == 6, "listening began anew without a break"
    clock.now += 36
    assert not mailboxes.online(box)
    polled(mailboxes, poll("bob"), "10.0.0.7", 7)
    assert box.listening == 7


def test_a_reader_that_hangs_up_is_gone_after_the_grace_unless_another_waits(mailboxes, clock):
    for connection in ("one", "two"):
        polled(mailboxes, poll("bob", hold=60), "", 5)
        mailboxes.park(connection, poll("bob", hold=60))
    clock.now += 1
    mailboxes.left(mailboxes.unpark("one"))
    clock.now += GRACE + 1
    box = mailboxes.box("default", "bob")
    assert mailboxes.online(box), "the other one still waits"
    mailboxes.left(mailboxes.unpark("two"))
    assert mailboxes.online(box), "it may be about to poll again"
    clock.now += GRACE + 0.1
    assert not mailboxes.online(box)


def test_the_first_name_is_the_readers_own(mailboxes):
    polled(mailboxes, poll("bob", "team"), "", 5)
    mailboxes.presented(poll("bob", "team", since=70))
    bob, team = mailboxes.box("default", "bob"), mailboxes.box("default", "team")
    assert (bob.own, bob.read, bob.mark()) == (True, 70, 70)
    assert (team.own, team.read, team.mark()) == (False, None, 0), "of a group, a cursor says nothing"
    mailboxes.delivered(poll("bob", "team", since=70), 80)
    assert team.mark() == 80 and mailboxes.online(team)


def test_who_joins_a_group_later_has_not_fetched_its_older_mail(mailboxes):
    mailboxes.look = lambda _, own, upto, most, above: (50 if own == "team" and above < 50 <= upto else None, above, 1)
    mailboxes.add([message(50, "team"), message(90, "team")])
    polled(mailboxes, poll("bob", "team"), "", 5)
    mailboxes.presented(poll("bob", "team", since=70))
    mailboxes.delivered(poll("bob", "team", since=70), 90)
    assert mailboxes.box("default", "team").mark() == 0, "the message of 50 was delivered to nobody"
    mailboxes.delivered(poll("eve", "team", since=0), 90)
    assert mailboxes.box("default", "team").mark() == 90


def test_a_name_that_was_only_looked_at_is_forgotten_and_not_written(mailboxes):
    polled(mailboxes, poll("bob"), "", 5)
    assert mailboxes.take_marks() == [], "there is a row for a name that was only looked at"
    mailboxes.clock = lambda: 1e9  # nobody listens any more
    mailboxes.idle(list(mailboxes.boxes), 5 + 500_000_000, 0)
    assert ("default", "bob") in mailboxes.boxes
    mailboxes.idle(list(mailboxes.boxes), 5 + 601_000_000, 0)
    assert ("default", "bob") not in mailboxes.boxes


def test_a_row_without_mail_and_without_a_poll_goes_unless_its_reader_must_be_told_of_a_gap(mailboxes):
    for name, seen, removed in (("idle", 5, 0), ("behind", 5, 40), ("fresh", 900, 0)):
        polled(mailboxes, poll(name), "", seen)
        mailboxes.presented(poll(name, since=30))
        mailboxes.add([message(20, name)])
        mailboxes.box("default", name).removed = max(removed, 20)
    mailboxes.clock = lambda: 1e9  # nobody listens any more
    assert mailboxes.idle(list(mailboxes.boxes), 1000, 500) == [], "who reads it along could still miss a gap"
    assert mailboxes.idle(list(mailboxes.boxes), 1021, 500) == [["default", "idle"]]


def test_a_name_that_listens_is_not_forgotten_however_long_ago_the_clock_says_its_poll_was(mailboxes):
    """The wall clock may jump, and presence goes by the other one."""
    for name, since in (("idle", 30), ("looked-at", 0)):
        polled(mailboxes, poll(name), "", 5)
        mailboxes.presented(poll(name, since=since))
    there = list(mailboxes.boxes)
    assert mailboxes.idle(there, 1 << 50, 500) == [] and list(mailboxes.boxes) == there


def test_a_reader_above_all_that_was_removed_is_told_so_without_a_look_at_each_mailbox(mailboxes):
    mailboxes.add([message(50, "bob")])
    mailboxes.note_removed({("default", "bob"): 50})
    mailboxes.boxes = None  # so no look
    assert mailboxes.gap(poll(observer=True, since=50)) is None and mailboxes.gap(poll("bob", since=50)) is None


def test_all_counts_as_a_new_name_unless_another_name_brings_it(mailboxes):
    """Else polls of `all` on ever new channels would make mailboxes without a limit."""
    assert mailboxes.new("lab", ["all"]) == mailboxes.new("lab", ["bob", "all"]) == 1
    mailboxes.box("lab", "all")
    assert mailboxes.new("lab", ["all"]) == 0


def test_another_reader_of_a_name_does_not_move_its_cursor(mailboxes):
    polled(mailboxes, poll("bob"), "", 5)
    mailboxes.presented(poll("bob", since=10))
    polled(mailboxes, poll("boss", "bob"), "", 6)
    mailboxes.presented(poll("boss", "bob", since=500))
    assert mailboxes.resume(poll("bob"), None, 900).since == 10


def test_a_cursor_only_goes_up(mailboxes):
    for since in (10, 30, 20):
        mailboxes.presented(poll("bob", since=since))
    assert mailboxes.resume(poll("bob"), None, 900).since == 30


def test_a_name_that_never_was_starts_before_its_first_message(mailboxes):
    assert mailboxes.resume(poll("bob"), 55, 900).since == 54
    assert mailboxes.resume(poll("bob"), None, 900).since == 900


def test_a_reader_behind_retention_is_told_of_the_gap(mailboxes):
    mailboxes.add([message(50, "bob"), message(60, "eve")])
    mailboxes.note_removed({("default", "bob"): 50})
    assert mailboxes.gap(poll("bob", since=10)) == (10, 50)
    assert mailboxes.gap(poll("bob", since=50)) is None, "nothing above the cursor was removed"
    assert mailboxes.gap(poll("eve", since=10)) is None, "nothing of eve's was removed"
    assert mailboxes.gap(poll("eve", "bob", since=10)) == (10, 50)
    assert mailboxes.gap(poll(observer=True, since=10)) == (10, 50)
    assert mailboxes.gap(poll("bob", observer=True, since=10)) == (10, 50)
    assert mailboxes.gap(poll("eve", observer=True, since=10)) is None, "nothing it watches was removed"
    assert mailboxes.gap(poll("bob", observer=True, since=10, channel="lab")) is None
    never = mailboxes.resume(poll("bob"), 70, 900)
    assert mailboxes.gap(never), "mail of a name that never read was removed in silence"


def test_the_mark_of_what_was_removed_only_goes_up(mailboxes):
    """A job that is done late is removed after younger ones: who has it must be told of those all the same."""
    polled(mailboxes, poll("bob"), "", 5)
    mailboxes.add([message(50, "bob"), message(60, "bob")])
    for tick in (60, 50):
        mailboxes.note_removed({("default", "bob"): tick})
        assert mailboxes.gap(poll("bob", since=50)) == (50, 60)
    mailboxes.presented(poll("bob", since=60))
    mailboxes.clock = lambda: 1e9  # nobody listens any more
    assert mailboxes.idle(list(mailboxes.boxes), 1061, 500) == [["default", "bob"]], "it is never forgotten"


def test_marks_that_changed_are_given_out_once(mailboxes):
    polled(mailboxes, poll("bob"), "", 5)
    mailboxes.presented(poll("bob", since=10))
    assert {mark[1]: mark[2:] for mark in mailboxes.take_marks()} == {
        "bob": (True, 10, 10, 5),
    }
    assert mailboxes.take_marks() == []


def test_a_poll_looks_only_where_news_are(mailboxes):
    mailboxes.add([message(50, "bob"), message(60, EVERYONE), message(70, "eve")])
    asked = [(own, since) for own in ("bob", "eve") for since in (49, 59, 60, 70)]
    found = {(own, since): news(mailboxes, poll(own, since=since)) for own, since in asked}
    assert {its: narrowed.names for its, narrowed in found.items() if narrowed} == {
        ("bob", 49): ("bob", EVERYONE), ("bob", 59): (EVERYONE,),
        ("eve", 49): ("eve", EVERYONE), ("eve", 59): ("eve", EVERYONE), ("eve", 60): ("eve",),
    }  # fmt: skip
    assert news(mailboxes, poll("bob", channel="lab")) is None
    observer = poll(observer=True, since=69)
    assert news(mailboxes, observer) == observer and news(mailboxes, observer._replace(since=70)) is None


# Deadlines


class Waiting:
    """What Deadlines knows of a connection."""

    def __init__(self):
        self.due, self.slot = math.inf, sys.maxsize


def test_a_deadline_comes_once_and_not_before_its_time(clock):
    deadlines, one = Deadlines(clock), Waiting()
    deadlines.set(one, 10)
    clock.now += 9.95
    assert list(deadlines.late()) == []
    clock.now += 0.15
    assert list(deadlines.late()) == [one] and list(deadlines.late()) == []


def test_a_later_deadline_replaces_an_earlier_one_and_an_earlier_one_a_later(clock):
    deadlines, later, earlier = Deadlines(clock), Waiting(), Waiting()
    deadlines.set(later, 10)
    deadlines.set(later, 30)
    deadlines.set(earlier, 30)
    deadlines.set(earlier, 10)
    clock.now += 10.2
    assert list(deadlines.late()) == [earlier]
    clock.now += 20
    assert list(deadlines.late()) == [later]


def test_a_forgotten_deadline_never_comes(clock):
    deadlines, one = Deadlines(clock), Waiting()
    deadlines.set(one, 10)
    deadlines.forget(one)
    clock.now += 100
    assert list(deadlines.late()) == []
