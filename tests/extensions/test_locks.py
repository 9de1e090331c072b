"""Reservations: who holds which names, also after a restart, a crash or a step of the clock; tokens; waiting."""
import contextlib
import json
import random
import re
import sqlite3
import threading
import time

import pytest

import bus_server
import test_bus
from bus_server import Now, Refused, State
from tests.core.test_connection import a_bus, come_true
from tests.faults.clock import DAY, HOUR, SteppedServer
from tests.faults.test_kinds_bounds import Guest
from tests.kit import peers
from tests.kit.peers import Peer, command, mint, set_revoked
from tests.kit.processes import PATIENCE, Server, wait_until

locks = bus_server.load_extensions(())["locks"]
its, words, paths = locks.its, locks.words, locks.paths
SECOND = 1000000
BEGIN = 1795000000 * SECOND


def said(bus, path, token=None, **members):
    reply = peers.ask(bus, "POST", path, members, token)
    return reply.status, reply.json


def lock(bus, holder, *names, token=None, **members):
    return said(bus, "/lock", token, **{"from": holder, "names": names, **members})


def reserved(bus, holder, *names, token=None, **members):
    status, answer = lock(bus, holder, *names, token=token, **members)
    assert status == 200, answer
    return answer["fence"]


def listed(bus, query="", token=None):
    return peers.ask(bus, "GET", f"/locks?{query}", token=token).json["locks"]


@contextlib.contextmanager
def waiting(bus, holder, *names, token=None, source=None, **members):
    """A connection on which a request waits for its names."""
    before = [each["waiting"] for each in listed(bus, token=token)]
    with Peer(bus, token, source=source) as peer:
        peer.send("POST", "/lock", {"from": holder, "names": names, "wait": PATIENCE, **members})
        wait_until(lambda: [each["waiting"] for each in listed(bus, token=token)] != before)
        yield peer


# The operations


@pytest.fixture
def state(tmp_path):
    with contextlib.closing(State(str(tmp_path / "bus.db"))) as state:
        state.add_tables("locks", "reservations", its.TABLES)
        yield state


def apply(state, *operations, at=0, wall=None):
    now = BEGIN + int(at * SECOND)
    return state.apply(list(operations), Now(now if wall is None else wall, now)).results


def asks(holder, *names, ttl=60, owner="owner", shared=False, channel="default", token=""):
    return its.Lock(channel, holder, sorted(names), shared, ttl * SECOND, "", token, owner)


def test_a_step_of_the_wall_clock_ends_no_reservation_and_no_fence_goes_back(state):
    [first] = apply(state, asks("ann", "a"))
    for wall in (BEGIN - HOUR * SECOND, BEGIN + DAY * SECOND, BEGIN - DAY * SECOND):
        [[held]] = apply(state, asks("bob", "a"), at=59, wall=wall)
        assert (held.fence, held.until) == (first.fence, BEGIN + 60 * SECOND)
    fences = [first.fence]
    for step in (DAY, -DAY, 0):
        [taken] = apply(state, asks("bob", f"b{step}"), at=59, wall=BEGIN + step * SECOND)
        fences.append(taken.fence)
    assert fences == sorted(set(fences))
    [taken] = apply(state, asks("bob", "a"), at=60)
    assert taken.fence > fences[-1]


def test_a_time_from_a_clock_that_was_ahead_is_at_most_the_longest_ttl(state):
    apply(state, asks("ann", "a"), at=400 * DAY)
    [[held]] = apply(state, asks("bob", "a"))
    assert held.until == BEGIN + its.LONGEST
    assert isinstance(apply(state, asks("bob", "a"), at=its.TTL_MAX)[0], its.Taken)


@pytest.mark.parametrize("damage", [
    "UPDATE locks SET until = 'x'", "UPDATE locks SET until = x'00ff'", "UPDATE locks SET until = until + (1 << 60)",
    "UPDATE locks SET holder = x'00ff'", "UPDATE locks SET why = 7, token = 7",
    "UPDATE lock_names SET name = x'ff' WHERE wild",
    "UPDATE lock_names SET wild = 'x'", "UPDATE lock_names SET fence = fence + 1", "UPDATE locks SET shared = 'x'",
])  # fmt: skip
def test_a_row_that_is_damaged_stops_nothing_and_ends(state, damage):
    apply(state, asks("ann", "a", "b*"))
    state.writing.execute(damage)
    steady = BEGIN + SECOND
    for row in words.listed(state.writing, steady, 0, 9, {}, None):
        assert json.dumps([row.holder, row.names, row.until // 1])
    words.fences_over(state.writing, "default", paths.Wanted(["a"]))
    [result, other] = apply(state, asks("bob", "a", "b*"), asks("bob", "other"), at=1)
    assert isinstance(other, its.Taken) and not isinstance(result, Refused)
    apply(state, its.Lapse([]), at=its.TTL_MAX + 1)
    assert isinstance(apply(state, asks("bob", "a", "b*"), at=its.TTL_MAX + 1)[0], its.Taken)


def test_all_together_have_a_budget_of_names(state):
    for number in range(8):
        names = [f"{number}/{name}" for name in range(1024)]
        assert isinstance(apply(state, asks("ann", *names, owner=f"owner {number}"))[0], its.Taken)
    [refused] = apply(state, asks("ann", "one more", owner="another"))
    assert refused.status == 429 and "8192 names" in refused.sentence and "all agents" in refused.sentence
    apply(state, its.Unlock("default", "ann", 0, ["7/1"]))
    assert isinstance(apply(state, asks("ann", "one more", owner="another"))[0], its.Taken)


def test_all_together_have_a_budget_of_names_with_wildcards(state):
    for number in range(8):
        names = [f"{number}/{name}/*" for name in range(32)]
        assert isinstance(apply(state, asks("ann", *names, owner=f"owner {number}"))[0], its.Taken)
    [refused, plain] = apply(state, asks("ann", "more/*", owner="another"), asks("ann", "plain", owner="another"))
    assert refused.status == 429 and "256 of them" in refused.sentence and isinstance(plain, its.Taken)


def hostile(tags):
    """Names that fit at both ends, and differ behind 225 characters: each pair of them takes long to compare."""
    body = "".join(chr(0x4E00 + each) for each in range(225))
    return [f"[!/][!/]{body}{tag}{each}*[!/]*[!/]*" for tag in tags for each in range(8)]


def refusing(state, *names):
    request = asks("bob", *names)
    [refused] = apply(state, request)
    assert refused.status == 413 and "before their first" in refused.sentence
    assert request.cost > paths.Wanted.MOST, "it is paid"


def test_a_request_compares_so_many_characters_and_no_more(state):
    apply(state, asks("ann", *(f"{number:04}{'a' * 196}" for number in range(1000))))
    refusing(state, *(f"*{letter * 50}*a" for letter in "bcdefghi"))
    with_beginning = asks("bob", *(f"0{letter}*" for letter in "bcdefghi"))
    assert isinstance(apply(state, with_beginning)[0], its.Taken), "what cannot overlap is not compared"
    assert with_beginning.cost == 0


def test_names_that_are_too_many_to_compare_are_not_read(state):
    """To read 8,192 names took 25 ms, before any comparison."""
    for number in range(6):
        apply(state, asks("ann", *(f"{number}/{name}" for name in range(1024)), owner=f"owner {number}"))
    refusing(state, "*b")
    assert isinstance(apply(state, asks("bob", "x*"))[0], its.Taken)


def test_the_cost_of_a_comparison_counts_classes_and_both_meanings(state, monkeypatch):
    """One request walked through two meanings of each of 8 x 224 names, which took 385 ms of the commit."""
    for number in range(7):
        asking = asks("ann", *hostile("abcd"), owner=f"owner {number}", shared=True)
        assert isinstance(apply(state, asking)[0], its.Taken)
    steps = []
    really = paths.Pattern.flood
    monkeypatch.setattr(paths.Pattern, "flood", lambda *arguments: steps.append(1) or really(*arguments))
    refusing(state, *hostile("q"))
    assert len(steps) < paths.Wanted.MOST


def test_a_path_is_compared_with_so_many_characters_and_no_more(state):
    apply(state, *(asks("ann", *hostile("abcd"), owner=f"owner {number}", shared=True) for number in range(7)))
    path = paths.Wanted([f"xx{hostile('q')[0][10:-11]}"])
    with pytest.raises(Refused, match="too many wildcards"):
        words.fences_over(state.writing, "default", path)
    assert words.fences_over(state.writing, "default", paths.Wanted(["src/a.py"])) == []


def test_names_are_not_kept_in_memory(state):
    """A cache of 4,096 names that others asked for took 170 MiB."""
    assert [each for each in vars(paths).values() if hasattr(each, "cache_info")] == []


def test_a_reservation_without_a_name_is_gone(state):
    [taken] = apply(state, asks("ann", "a", "b"))
    [(fences, released)] = apply(state, its.Unlock("default", "ann", 0, ["a"]))
    assert (fences, released) == ([taken.fence], 1)
    apply(state, its.Unlock("default", "ann", 0, ["b"]))
    assert state.ask("SELECT (SELECT count(*) FROM locks), (SELECT count(*) FROM lock_names)") == (0, 0)


def test_channels_keep_their_names_apart(state):
    first, second = apply(state, asks("ann", "a"), asks("bob", "a", channel="other"))
    assert second.fence > first.fence
    assert apply(state, its.Unlock("other", "ann", 0, ["a"])) == [([], 0)]


# A restart, a crash, a copy


@pytest.mark.parametrize("ends", ["stop", "kill"])
def test_a_reservation_outlives_the_bus(bus, ends):
    fence = reserved(bus, "ann", "src/a.py", "src/db/*", why="T1")
    before = listed(bus)
    getattr(bus, ends)()
    bus.start()
    [after] = listed(bus)
    assert abs(after["until"] - before[0]["until"]) < 5, "the clock of the leases begins at the wall clock"
    assert {**after, "until": 0} == {**before[0], "until": 0}
    status, answer = lock(bus, "bob", "src/db/x")
    assert status == 409 and answer["held"][0]["fence"] == fence
    assert reserved(bus, "bob", "src/b.py") > fence
    assert said(bus, "/renew", **{"from": "ann", "fence": fence})[0] == 200


def test_a_copy_of_the_bus_goes_on_with_higher_fences(bus, tmp_path):
    """The copy is older than a reservation of the bus: whoever holds that one is stale, and can be told apart."""
    command(bus, "backup", str(tmp_path / "copy.db"))
    lost = reserved(bus, "ann", "a")
    bus.stop()
    command(bus, "restore", str(tmp_path / "copy.db"))
    bus.start()
    assert reserved(bus, "bob", "a") > lost


def test_without_the_file_a_bus_with_reservations_does_not_start(bus):
    reserved(bus, "ann", "a")
    bus.stop()
    with contextlib.closing(sqlite3.connect(bus.db)) as database:
        kept = database.execute("SELECT count(*), min(tick) < 0 FROM locks_kept").fetchone()
        database.execute("UPDATE locks SET until = until - 700000000")
        assert kept == (1, 1) and database.execute("SELECT count(*) FROM locks_kept").fetchone() == (0,)


def test_the_clock_of_the_bus_steps_and_a_reservation_stays(tmp_path):
    with SteppedServer(tmp_path / "bus.db") as bus:
        fence = reserved(bus, "ann", "a", ttl=600)
        for error in (-HOUR, DAY):
            bus.step(error)
            status, answer = lock(bus, "bob", "a")
            [held] = answer["held"]
            assert (status, held["fence"]) == (409, fence)
            assert abs(held["until"] - time.time() - error - 600) < PATIENCE, "the time on the wire is that of the bus"


NAMES = ["src/a", "src/b", "src/*"]


def contend(bus, holder, over, log):
    """Take names, note it, and give them back, again and again: also while the bus is killed."""
    chance = random.Random(holder)
    while not over.is_set():
        names = chance.sample(NAMES, chance.choice((1, 1, 2)))
        with contextlib.suppress(OSError, peers.Closed, ValueError):
            status, answer = lock(bus, holder, *names, wait=1, ttl=5)
            if status == 200:
                log.append(("took", holder, names, answer["fence"]))
                log.append(("left", holder, names, answer["fence"]))
                said(bus, "/unlock", **{"from": holder, "fence": answer["fence"]})


def clashes(log):
    """Who took a name while another one held it, by the order in which it was noted."""
    held, found = {}, []
    for word, holder, names, fence in log:
        if word == "left":
            held.pop(holder, None)
            continue
        for other, its_names in held.items():
            if other != holder and ("src/*" in {*names, *its_names} or {*names} & {*its_names}):
                found.append((holder, other, fence))
        held[holder] = names
    return found


def contest(bus, deaths, crash):
    log, over = [], threading.Event()
    holders = [threading.Thread(target=contend, args=(bus, f"holder-{n}", over, log)) for n in range(4)]
    for holder in holders:
        holder.start()
    for death in range(1, deaths + 1):
        wait_until(lambda: len(log) >= death * 40, 3 * PATIENCE)  # noqa: B023
        crash(bus)
    over.set()
    for holder in holders:
        holder.join(3 * PATIENCE)
    return log


def killed(bus):
    bus.kill()
    bus.start()


def test_no_two_hold_a_name_at_once_though_the_bus_is_killed(bus):
    log = contest(bus, 4, killed)
    assert clashes(log) == []
    for name in NAMES:
        took = [(holder, fence) for word, holder, names, fence in log if word == "took" and name in names]
        changes = [  # a later holder has a higher fence
            (one, other) for one, other in zip(took, took[1:]) if one[0] != other[0]
        ]
        assert len(changes) > 5 and all(one[1] < other[1] for one, other in changes)


def test_a_bus_that_forgets_reservations_is_found_out():
    log = [("took", "ann", ["src/a"], 1), ("took", "bob", ["src/*"], 2), ("left", "ann", ["src/a"], 1)]
    assert clashes(log) == [("bob", "ann", 2)]


# Tokens


@pytest.fixture
def closed(tmp_path):
    tokens = mint(tmp_path / "bus.db", ann=[], bob=[], eve=["--send-only"], boss=["--operator"])
    with Server(tmp_path / "bus.db") as bus:
        bus.tokens = tokens
        yield bus


def test_a_token_reserves_as_its_name_and_only_an_operator_releases_for_others(closed):
    ann, bob, eve, boss = (closed.tokens[name] for name in ("ann", "bob", "eve", "boss"))
    status, answer = said(closed, "/lock", ann, names=["a"])
    assert status == 200 and [each["holder"] for each in listed(closed, token=bob)] == ["ann"]
    assert said(closed, "/lock", bob, **{"from": "ann"}, names=["b"])[0] == 403
    for path in ("/unlock", "/renew"):
        assert said(closed, path, bob, **{"from": "ann"}, fence=answer["fence"])[0] == 403
    assert said(closed, "/unlock", bob, fence=answer["fence"])[0] == 403
    assert said(closed, "/renew", bob, fence=answer["fence"])[0] == 409
    for path, members in (("/lock", {"names": ["b"]}), ("/renew", {"fence": 1}), ("/unlock", {"fence": 1})):
        status, refused = said(closed, path, eve, **members)
        assert status == 403 and "it needs an invitation without --send-only" in refused["error"]
    assert peers.ask(closed, "GET", "/locks", token=eve).status == 403
    assert said(closed, "/unlock", boss, names=["a"])[1]["released"] == 0, "names are those of the holder"
    assert said(closed, "/unlock", boss, fence=answer["fence"])[1]["released"] == 1


def test_what_a_revoked_token_holds_is_free_as_soon_as_it_is_wanted(closed):
    ann, bob = closed.tokens["ann"], closed.tokens["bob"]
    said(closed, "/lock", ann, names=["a", "b*"])
    assert lock(closed, "bob", "a", token=bob)[0] == 409
    with waiting(closed, "bob", "bb", token=bob) as peer:
        set_revoked(closed, "ann")
        wait_until(lambda: listed(closed, token=bob) == [])
        assert lock(closed, "bob", "a", token=bob)[0] == 200
        assert peer.answer().status == 200, "who waited for it is woken"


def test_a_token_that_is_revoked_while_it_waits_gets_401_and_nothing_else(closed):
    ann, bob = closed.tokens["ann"], closed.tokens["bob"]
    fence = said(closed, "/lock", ann, names=["a"])[1]["fence"]
    with waiting(closed, "bob", "a", token=bob) as peer:
        set_revoked(closed, "bob")
        assert peer.answer().status == 401
        assert said(closed, "/unlock", ann, fence=fence)[0] == 200
        assert listed(closed, token=ann) == []


def test_a_token_has_its_own_budget(closed):
    ann, bob = closed.tokens["ann"], closed.tokens["bob"]
    for start in range(0, 1024, 64):
        assert said(closed, "/lock", ann, names=[f"{n}" for n in range(start, start + 64)])[0] == 200
    status, refused = said(closed, "/lock", ann, names=["one more"])
    assert status == 429 and refused["error"].startswith("ann would reserve more than 1024")
    assert said(closed, "/lock", bob, names=["one more"])[0] == 200


# Waiting


def test_those_who_wait_are_served_in_the_order_in_which_they_came(bus):
    fence = reserved(bus, "ann", "a")
    with waiting(bus, "bob", "a") as bob, waiting(bus, "cleo", "a") as cleo:
        said(bus, "/unlock", **{"from": "ann", "fence": fence})
        first = bob.answer()
        wait_until(lambda: listed(bus)[0]["waiting"] == ["cleo"])
        said(bus, "/unlock", **{"from": "bob", "fence": first.json["fence"]})
        assert cleo.answer().status == 200 and first.status == 200


def test_who_waits_for_a_part_is_woken_when_that_is_released(bus):
    reserved(bus, "ann", "a", "b")
    with waiting(bus, "bob", "a") as peer:
        said(bus, "/unlock", **{"from": "ann", "names": ["a"]})
        assert peer.answer().status == 200
    assert [each["names"] for each in listed(bus)] == [["b"], ["a"]]


def test_who_waits_is_woken_when_the_reservation_ends_also_if_it_was_made_shorter(bus):
    fence = reserved(bus, "ann", "a", ttl=600)
    with waiting(bus, "bob", "a") as peer:
        assert said(bus, "/renew", **{"from": "ann", "fence": fence, "ttl": 1})[1]["waiting"] == ["bob"]
        assert peer.answer().json["fence"] > fence


def test_a_renewal_sets_when_those_who_wait_ask_again(tmp_path):
    with a_bus(time.monotonic, tmp_path / "bus.db") as bus:
        ann, bob = Guest(bus), Guest(bus)
        fence = ann.asks("POST", "/lock", {"from": "ann", "names": ["a"], "ttl": 600}).json()["fence"]
        bob.begins("POST", "/lock", {"from": "bob", "names": ["a"], "wait": 50})
        come_true(lambda: bus.mailboxes.parked)
        [parked] = bus.mailboxes.parked
        for ttl, least, most in ((2, 0, 2), (30, 20, 30), (600, 40, 50)):
            ann.asks("POST", "/renew", {"from": "ann", "fence": fence, "ttl": ttl})
            assert least <= parked.due - time.monotonic() <= most, "when it ends, or its own time is over"


def commits(bus):
    """How many there were, with the one of the message that tells ann of bob: it comes when he waits already."""
    wait_until(lambda: json.loads(bus.get("/inbox"))["recipients"].get("default", {}).get("ann"))
    return peers.metric(bus, "commits_total")


def test_a_renewal_lets_nobody_compare_again(bus):
    """Two tokens stopped all commits: one waited, and the other renewed its reservation in a loop."""
    fence = reserved(bus, "ann", "a", ttl=600)
    with waiting(bus, "bob", "a"):
        before = commits(bus)
        for _ in range(20):
            assert said(bus, "/renew", **{"from": "ann", "fence": fence, "ttl": 600})[0] == 200
        assert peers.metric(bus, "commits_total") == before + 20


def test_who_waits_is_not_woken_when_another_name_of_the_reservation_is_released(bus):
    reserved(bus, "ann", "a", *(f"other {number}" for number in range(20)))
    with waiting(bus, "bob", "a"):
        before = commits(bus)
        for number in range(20):
            said(bus, "/unlock", **{"from": "ann", "names": [f"other {number}"]})
        assert peers.metric(bus, "commits_total") == before + 20


def test_one_request_is_compared_in_each_commit(tmp_path):
    with a_bus(time.monotonic, tmp_path / "bus.db") as bus:
        lists, really = [], bus.ledger.apply
        bus.ledger.apply = lambda operations: lists.append([each.kind for each in operations]) or really(operations)
        guests = [Guest(bus) for _ in range(9)]
        guests[0].asks("POST", "/lock", {"from": "ann", "names": ["a"]})
        for number, guest in enumerate(guests[1:]):
            guest.begins("POST", "/lock", {"from": f"bob{number}", "names": ["a"], "wait": 20})
        come_true(lambda: len(bus.mailboxes.parked) == 8)
        guests[0].asks("POST", "/unlock", {"from": "ann", "names": ["a"]})
        come_true(lambda: len(bus.mailboxes.parked) == 7 and bus.ledger.idle())
        assert max(kinds.count("lock") for kinds in lists) == 1 and sum(map(len, lists)) >= 18


def test_each_try_is_paid_and_who_cannot_pay_is_told_so(tmp_path):
    with a_bus(time.monotonic, tmp_path / "bus.db") as bus:
        bus.storms = storms = bus_server.Storms(time.monotonic, 50)
        ann, bob = Guest(bus), Guest(bus, address="127.0.0.2")
        fence = ann.asks("POST", "/lock", {"from": "ann", "names": ["a"]}).json()["fence"]
        bob.begins("POST", "/lock", {"from": "bob", "names": ["a", "b*"], "wait": 20})
        come_true(lambda: bus.mailboxes.parked)
        assert storms.WORK_BURST - storms.work.left["127.0.0.2/"][0] >= words.WORK
        storms.worked("127.0.0.2", "", 2 * storms.WORK_BURST)
        ann.asks("POST", "/unlock", {"from": "ann", "fence": fence})
        assert bob.answer().status == 429
        assert ann.asks("GET", "/locks").json()["locks"] == []


def test_who_hung_up_while_it_waited_gets_nothing(bus):
    fence = reserved(bus, "ann", "a")
    with waiting(bus, "bob", "a"):
        pass
    wait_until(lambda: listed(bus)[0]["waiting"] == [])
    said(bus, "/unlock", **{"from": "ann", "fence": fence})
    assert listed(bus) == []


def test_who_hangs_up_as_the_names_become_free_keeps_none(tmp_path):
    with a_bus(time.monotonic, tmp_path / "bus.db") as bus:
        ann, bob = Guest(bus), Guest(bus)
        fence = ann.asks("POST", "/lock", {"from": "ann", "names": ["a"]}).json()["fence"]
        bob.begins("POST", "/lock", {"from": "bob", "names": ["a"], "wait": 20})
        come_true(lambda: bus.mailboxes.parked)
        ann.begins("POST", "/unlock", {"from": "ann", "fence": fence})
        bob.says(b"")
        assert ann.answer().json()["released"] == 1
        come_true(lambda: not bus.mailboxes.parked and bus.ledger.idle())
        assert ann.asks("GET", "/locks").json()["locks"] == []


def test_a_ninth_request_of_one_name_is_answered_at_once(bus):
    reserved(bus, "ann", "a")
    with contextlib.ExitStack() as stack:
        for number in range(8):
            peer = stack.enter_context(Peer(bus))
            peer.send("POST", "/lock", {"from": "bob", "names": ["a"], "wait": PATIENCE})
            wait_until(lambda: peers.metric(bus, "parked") == number + 1)  # noqa: B023
        began = time.monotonic()
        assert lock(bus, "bob", "a", wait=PATIENCE)[0] == 409 and time.monotonic() - began < PATIENCE / 2
        assert listed(bus)[0]["waiting"] == ["bob"]


def test_a_bus_that_ends_answers_those_who_wait(bus):
    reserved(bus, "ann", "a")
    with waiting(bus, "bob", "a") as peer:
        bus.process.terminate()
        assert peer.answer().status == 409
        assert bus.reap() == 0


def test_a_holder_is_told_once_of_each_who_waits_and_the_message_ends_with_the_reservation(bus):
    fence = reserved(bus, "ann", "src/*", ttl=600)
    for holder in ("bob", "bob", "cleo"):
        assert lock(bus, holder, "src/a", wait=0.5)[0] == 409  # s; longer than a commit takes
    wait_until(lambda: len(json.loads(bus.get("/recv?to=ann"))["messages"]) > 1)
    told = json.loads(bus.get("/recv?to=ann"))["messages"]
    assert [(each["from"], each["type"], each["fence"]) for each in told] == [
        (who, "lock-wanted", fence) for who in ("bob", "cleo")
    ]
    assert told[0]["subject"] == "bob waits for src/a" and 500 < told[0]["ttl"] <= 600
    words = f"You hold src/*, with fence {fence}. Release it when you are done: bob waits."
    assert told[0]["msg"] == words


def test_a_holder_whose_mailbox_is_full_costs_nobody_a_place(tmp_path):
    with a_bus(time.monotonic, tmp_path / "bus.db") as bus:
        bus.sending.check = lambda request, drafts: (_ for _ in ()).throw(Refused(429, "full"))
        ann, bob = Guest(bus), Guest(bus)
        fence = ann.asks("POST", "/lock", {"from": "ann", "names": ["a"]}).json()["fence"]
        bob.begins("POST", "/lock", {"from": "bob", "names": ["a"], "wait": 20})
        come_true(lambda: bus.mailboxes.parked)
        assert ann.asks("POST", "/unlock", {"from": "ann", "fence": fence}).json()["released"] == 1
        assert bob.answer().status == 200


def test_a_bus_with_this_file_does_nothing_more_for_a_send(tmp_path, monkeypatch):
    """Its cost when it is not used: nothing is registered where messages pass."""
    passed = ("checks", "states", "about", "unknown", "on_polled", "on_announced", "on_lost", "on_tidy")
    with a_bus(time.monotonic, tmp_path / "a.db") as bus:
        registered = {seam: len(getattr(bus, seam)) for seam in passed}
        fetched, steps = len(bus.mailboxes.on_fetched), []
        bus.do = lambda *step: steps.append(step)
        bus.tidy()
        assert [step for step in steps if step[0].kind == "lapse"] == [], "an empty table needs no operation"
    others = {name: module for name, module in bus_server.load_extensions(()).items() if name != "locks"}
    monkeypatch.setattr(bus_server, "load_extensions", lambda without: others)
    with a_bus(time.monotonic, tmp_path / "b.db") as bus:
        registered["on_tidy"] -= 1
        assert {seam: len(getattr(bus, seam)) for seam in passed} == registered
        assert len(bus.mailboxes.on_fetched) == fetched


def test_the_tools_of_an_agent_say_who_holds_what_and_until_when(bus):
    ann, bob = (test_bus.McpClient(test_bus.Bus(bus.url), name) for name in ("ann", "bob"))
    said = ann.tool("bus_lock", names="src/a.py\n  src/db/*\n", why="<b>T2</b>", ttl=60)
    fence = int(re.fullmatch(r"yours until \d\d:\d\d:\d\dZ, fence (\d+)\. When you are done: bus_unlock\.", said)[1])
    told = bob.tool("bus_lock", failed=True, names="src/db/x", wait=0.1)
    assert "ann holds src/db/* (src/db/x was asked for) until " in told
    row = json.loads(bob.tool("bus_locks", path="src/db/x"))
    assert (row["fence"], row["names"], row["holder"]) == (fence, ["src/a.py", "src/db/*"], "ann")
    assert "<" not in bob.tool("bus_locks", holder="ann")
    assert bob.tool("bus_locks", path="b") == "nobody has reserved that"
    for wrong in ({}, {"names": "a", "fence": 1}):
        assert "give names, or fence" in ann.tool("bus_unlock", failed=True, **wrong)
    assert "only ann or an operator" in bob.tool("bus_unlock", failed=True, fence=fence)
    assert ann.tool("bus_unlock", fence=fence) == "released: 2"
    nothing = "nothing is released: you have reserved nothing by that name, or it has ended"
    assert ann.tool("bus_unlock", names="src/a.py") == nothing
    assert bob.tool("bus_locks") == "nobody has reserved anything"
    assert "without //" in ann.tool("bus_lock", failed=True, names="a//b")


def test_a_list_is_of_a_page_and_passes_what_is_revoked(tmp_path):
    with a_bus(time.monotonic, tmp_path / "bus.db") as bus:
        guest = Guest(bus)
        fences = [guest.asks("POST", "/lock", {"from": "ann", "names": [f"{n}"]}).json()["fence"] for n in range(5)]
        holds = bus.gate.holds
        bus.state.writing.execute("UPDATE locks SET token = 'gone' WHERE fence IN (?, ?)", (fences[0], fences[3]))
        bus.gate.holds = lambda token: token != "gone" and holds(token)
        found, after = [], "0"
        while after:
            answer = guest.asks("GET", f"/locks?max=1&after={after}").json()
            found += [each["fence"] for each in answer["locks"]]
            after = answer.get("next")
        assert found == [fences[1], fences[2], fences[4]]
