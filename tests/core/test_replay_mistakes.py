"""The control of test_replay.py: it finds each of these planted mistakes."""
import contextlib
import secrets
import time
from unittest import mock

import pytest

import bus_server
from bus_server import Put, Refused, Remove, State
from tests.core.test_replay import SECOND, SEEDS, Connection, replay, work


def before(patch, owner, method, do):
    """Something happens before each call of a method."""
    really = getattr(owner, method)

    def doing(self, *arguments):
        do(self, *arguments)
        return really(self, *arguments)

    patch.setattr(owner, method, doing)


def after(patch, owner, method, do):
    really = getattr(owner, method)

    def doing(self, *arguments):
        result = really(self, *arguments)
        do(self, *arguments)
        return result

    patch.setattr(owner, method, doing)


def rewrites(patch, old, new):
    """Statements are not as they are written. If none has `old` any more, nothing is found: renew the mistake."""
    patch.setattr(Connection, "rewrite", staticmethod(lambda statement: statement.replace(old, new)))


def a_clock_in_apply(patch):
    really = State.place
    patch.setattr(State, "place", lambda state, one, wall: really(state, one, bus_server.wall_clock()))


def the_clock_of_the_view_in_apply(patch):
    for part in (work.its, work.letters):
        patch.setattr(part, "is_expired", lambda its, now: bool(its.expires) and its.expires <= time.time_ns())
    really = State.place
    patch.setattr(State, "place", lambda state, one, wall: really(state, one, min(wall, state.view.clock())))


def an_option_of_the_process(patch):
    before(patch, Remove, "apply", lambda removal, *_: setattr(removal, "slice", bus_server.REMOVE_SLICE))


def an_option_of_the_extension(patch):
    before(patch, work.Claim, "apply", lambda claim, *_: setattr(claim, "lease_us", int(work.words.LEASE) * SECOND))


def the_room_on_the_disk_in_apply(patch):
    before(patch, Put, "apply", lambda put, state, _: setattr(put, "room", put.room and state.view.has_room()))


def jobs_without_an_order(patch):
    rewrites(patch, " ORDER BY due, tick", "")


def removals_without_an_order(patch):
    rewrites(patch, " ORDER BY tick LIMIT", " LIMIT")


def a_random_lease(patch):
    before(patch, work.Claim, "apply", lambda claim, *_: setattr(claim, "lease", secrets.randbits(64)))


def a_count_from_the_newest_message(patch):
    """How many messages a mailbox ever had: after a restart, retention has emptied it."""
    patch.setattr(bus_server, "NEWEST", bus_server.NEWEST.replace("gone, newest", "0 AS gone, newest"))


def a_slot_that_is_not_read(patch):
    really = Put.from_fields
    patch.setattr(Put, "from_fields", classmethod(lambda cls, fields: really({**fields, "room": True})))


def a_slot_that_is_not_written(patch):
    patch.setattr(Remove, "__slots__", tuple(slot for slot in Remove.__slots__ if slot != "slice"))


def members_that_are_lost_in_bytes(patch):
    really = Put.from_fields

    def forgetful(cls, fields):
        made = really(fields)
        made.drafts = [one._replace(ttl=None) for one in made.drafts]
        return made

    patch.setattr(Put, "from_fields", classmethod(forgetful))


def ticks_from_the_wall_alone(patch):
    before(patch, State, "place", lambda state, one, wall: setattr(state, "last", min(state.last, wall - 1)))


def no_savepoint(patch):
    rewrites(patch, "ROLLBACK TO operation", "SELECT 1")


def what_is_refused_is_announced(patch):
    """The rows are undone, what was noted in memory is not."""
    really = State.apply_one

    def noted(state, operation, now):
        result = really(state, operation, now)
        if isinstance(result, Refused) and operation.kind == "broken":
            state.visible.append(bus_server.Message(state.last, "default", "ann", "x", "", 1, None))
        return result

    patch.setattr(State, "apply_one", noted)


def a_count_that_is_forgotten(patch):
    def forget(state):
        for place, (number, _) in list(state.counts.items())[:1]:
            state.counts[place] = number, 0

    after(patch, State, "reload", forget)


def a_list_that_is_remembered_when_it_failed(patch):
    really = State.reload

    def half(state):
        with mock.patch.object(State, "forget_list") if hasattr(state, "visible") else contextlib.nullcontext():
            really(state)

    patch.setattr(State, "reload", half)


def a_tick_that_is_remembered_when_its_list_failed(patch):
    really = State.reload

    def keeps(state):
        last = getattr(state, "last", 0)
        really(state)
        state.last = max(state.last, last)

    patch.setattr(State, "reload", keeps)


def a_tick_that_is_not_written_down(patch):
    """After Raise or Remove `last` is above the newest message, and only the table `bus` knows."""
    rewrites(patch, "UPDATE bus SET last = ?", "UPDATE bus SET last = last + 0 * ?")


def keys_that_only_the_process_knows(patch):
    def known(state, operations):
        state.__dict__.setdefault("remembered", {})
        return state.remembered

    patch.setattr(State, "sent_with_keys", known)


MISTAKES = [
    a_clock_in_apply,
    the_clock_of_the_view_in_apply,
    an_option_of_the_process,
    an_option_of_the_extension,
    the_room_on_the_disk_in_apply,
    jobs_without_an_order,
    removals_without_an_order,
    a_random_lease,
    a_count_from_the_newest_message,
    a_slot_that_is_not_read,
    a_slot_that_is_not_written,
    members_that_are_lost_in_bytes,
    ticks_from_the_wall_alone,
    no_savepoint,
    what_is_refused_is_announced,
    a_count_that_is_forgotten,
    a_list_that_is_remembered_when_it_failed,
    a_tick_that_is_remembered_when_its_list_failed,
    a_tick_that_is_not_written_down,
    keys_that_only_the_process_knows,
]


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
def test_a_planted_mistake_is_found(mistake, tmp_path, monkeypatch):
    mistake(monkeypatch)
    found = None
    for seed in range(SEEDS):
        (tmp_path / str(seed)).mkdir()
        try:
            replay(tmp_path / str(seed), seed)
        except Exception as error:  # a Difference, or the mistake made apply() itself fail
            found = error
            break
    assert found, f"{SEEDS} seeds do not find it"
