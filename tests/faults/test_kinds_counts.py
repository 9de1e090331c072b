"""What was counted, walked or read once is not counted, walked or read again for each message, list or name.

Each test counts rows, names and calls, with the bus in its own process. Found by an attack on 2026-11-29; each test was
red on the code that it attacked, or on the first mend of it.

| test | what it counted before |
|---|---|
| what_was_fetched_is_taken_off_the_count | 400 rows for each send after a fetch |
| all_names_are_walked_once | once for each draft, or for each channel |
| a_list_looks_at_no_more_names | all of them |
| names_are_forgotten_in_slices | all in one turn |
| the_expired_are_counted_once | 16 mailboxes for each of 40 lists |
| a_retry_reads_what_has_its_channel | the messages of 50 channels |
"""
import random
import threading
import time
from collections import Counter

import pytest

import bus_server
from bus_server import Forget, Remove, wall_clock
from tests.faults.test_kinds_bounds import LARGE, Guest, bytes_read, counted, passed, rows_of
from tests.kit.clock import Clock
from tests.kit.inside import said
from tests.kit.processes import PATIENCE
from tests.kit.wire import a_bus, come_true


@pytest.fixture
def bus(tmp_path):
    with a_bus(time.monotonic, tmp_path / "bus.db") as bus:
        yield bus


# What is counted once


def room_is_checked(bus, by_sender):
    """The messages that nobody has fetched, as a send finds them and as they are counted anew; also by sender."""
    box = bus.mailboxes.box("default", "bob")
    kept = bus.sending.unfetched(box, "default", "bob", by_sender)
    rows = bus.view.sizes("default", "bob", box.reached, box.newest, kept.at)
    anew = Counter(sender for _, sender, _, is_alive in rows if is_alive)
    counts = {sender: count for sender, (count, _) in kept.by_sender.items() if count}
    return (kept.messages, counts), (sum(anew.values()), anew if kept.counts_senders else {})


def test_what_was_fetched_is_taken_off_the_count_of_a_mailbox_and_not_counted_anew(bus):
    eve, bob = Guest(bus), Guest(bus)
    eve.asks("POST", "/send", [{"from": "eve", "to": "bob", "msg": "x"}] * 400)
    eve.sends("bob")
    now = 0
    with rows_of(bus.view, "sizes") as rows:
        for _ in range(20):
            now = bob.asks("GET", f"/recv?to=bob&since={now}&max=1").json()["now"]
            eve.sends("bob")
    assert len(rows) == 20, f"{len(rows)} rows for 20 that were fetched"


def removed(bus, before, kept_for=()):
    """What retention does: the messages below a tick are removed, and it was announced."""
    done = []
    bus.do(Remove(0, before, False, [*kept_for], 0), None, lambda *_: done.append(1))
    come_true(lambda: done)


@pytest.mark.parametrize("seed", range(4))
def test_that_count_is_the_true_one_whatever_happens_to_the_mailbox(bus, seed):
    chance, guest, ticks = random.Random(seed), Guest(bus), []

    def send():
        for _ in range(chance.randrange(4)):
            members = chance.choice([{}, {"ttl": 0.001}])
            sender = chance.choice(["eve", "ann"])
            body = {"from": sender, "to": chance.choice(["bob", ["bob", "carl"]]), "msg": "x", **members}
            ticks.append(int(guest.asks("POST", "/send", body).json()["id"], 16))

    def fetch():
        own = chance.choice(["bob", "dora,bob"])
        since = chance.choice([0, *ticks]) / 1e6
        guest.asks("GET", f"/recv?to={own}&since={since:.6f}&max={chance.choice([1, 2, 9])}")

    def recall():
        guest.begins("POST", "/recall", {"id": f"{chance.choice(ticks):x}"}).answer()

    def remove():
        removed(bus, before=chance.choice(ticks))

    send()
    for _ in range(80):
        chance.choice([send, send, fetch, fetch, recall, recall, remove] if ticks else [send])()
        kept, anew = room_is_checked(bus, by_sender=bool(seed % 2))
        assert kept == anew


def before_it_is_announced(bus, action):
    """The next list of operations was applied, and this is done before anybody is told."""
    apply, done = bus.state.apply, threading.Event()

    def applied(operations, now):
        bus.state.apply = apply
        result = apply(operations, now)
        bus.loop.tell(lambda: (action(), done.set()))
        assert done.wait(PATIENCE)
        return result

    bus.state.apply = applied


@pytest.mark.parametrize("by_sender", [False, True])
def test_that_count_is_the_true_one_while_what_was_fetched_is_being_removed(bus, by_sender):
    """A turn between the removal and its announcement finds fewer messages than were fetched."""
    guest = Guest(bus)
    ticks = [int(guest.sends("bob")["id"], 16) for _ in range(9)]
    room_is_checked(bus, by_sender)
    guest.asks("GET", "/recv?to=bob&since=0&max=5")
    before_it_is_announced(bus, lambda: room_is_checked(bus, by_sender))
    removed(bus, before=ticks[3])
    kept, anew = room_is_checked(bus, by_sender)
    assert kept == anew and kept[0] == 4


@pytest.mark.parametrize("way", ["expired", "recalled"])
def test_what_can_no_longer_be_delivered_takes_no_room_in_a_mailbox(bus, monkeypatch, way):
    """A worker never sends a cursor: nobody but the senders could free a queue whose jobs had a ttl."""
    monkeypatch.setattr(bus_server, "MAILBOX_MESSAGES", 8)
    monkeypatch.setattr(bus_server, "MUCH_MESSAGES", 6)
    guest, late = Guest(bus), bus_server.RECOUNT_SECONDS + 40
    ids = [guest.sends("queue", **{"from": f"s{number}"}, ttl=30)["id"] for number in range(8)]
    message = {"from": "s9", "to": "queue", "msg": "x"}
    assert guest.begins("POST", "/send", message).answer().status == 429
    if way == "recalled":
        for one in ids[:2]:
            guest.asks("POST", "/recall", {"id": one})
    else:
        bus.view.clock = lambda: wall_clock() + late * 1000000
    assert guest.begins("POST", "/send", message).answer().status == 200


def test_a_full_mailbox_is_counted_again_once_a_minute(bus, monkeypatch):
    monkeypatch.setattr(bus_server, "MUCH_MESSAGES", 6)
    guest = Guest(bus)
    with rows_of(bus.view, "sizes") as rows:
        for _ in range(20):
            guest.sends("bob")
        before = len(rows)
        bus.view.clock = lambda: wall_clock() + 2 * bus_server.RECOUNT_SECONDS * 1000000
        for _ in range(20):
            guest.sends("bob")
    assert before == 7 and len(rows) == 27, "once by sender, when it is nearly full, and once a minute later"


def test_expired_mail_of_a_group_is_looked_at_once(bus, monkeypatch):
    """A reader that joins a group asks with each answer whether older mail of the group was delivered."""
    monkeypatch.setattr(bus.mailboxes, "LOOKED_FOR_HOLE", 10)
    guest = Guest(bus)
    guest.asks("POST", "/send", [{"from": "eve", "to": "team", "msg": "x", "ttl": 0.001}] * 35)
    passed(bus)
    since = guest.sends("me")["ts"]
    looks = []
    with counted(bus.mailboxes, "look", lambda arguments, result: looks.append((arguments[-1], result))):
        for _ in range(6):
            guest.sends("team")
            since = guest.asks("GET", f"/recv?to=me,team&since={since:.6f}").json()["now"]
    begun = [above for above, _ in looks]
    assert len(set(begun[:5])) == 5 and begun[4] == begun[5], "each look goes on where the last one ended"


NAMES = [f"n{number}" for number in range(16)]


def test_the_expired_are_counted_once_for_many_lists_and_not_again(bus):
    guest = Guest(bus)
    guest.asks("POST", "/send", [{"from": "eve", "to": NAMES, "msg": "x", "ttl": 30}] * 20)
    bus.view.clock = lambda: wall_clock() + 40 * 1000000
    lists = [NAMES[number % 16 :] + NAMES[: number % 16] for number in range(40)]
    drafts = [{"from": f"s{number // 16}", "to": some, "msg": "x"} for number, some in enumerate(lists)]
    with counted(bus.view, "count_expired", lambda _, count: count[0]) as counts:
        results = guest.asks("POST", "/send", drafts).json()["results"]
        assert {each["receiver"]["unread"] for each in results} == {16 * 40}
        assert len(counts) <= 16 and sum(counts) == 16 * 20, f"{sum(counts):,} were counted in {len(counts)} mailboxes"
        counts.clear()
        guest.asks("POST", "/send", drafts)
        for path in ("/inbox", "/agents", "/channels", "/metrics"):
            guest.asks("GET", path)
    assert sum(counts) == 0, "they were counted again"


@pytest.mark.parametrize("seed", range(4))
def test_unread_is_what_a_count_of_all_messages_says_whatever_happens_to_them(bus, seed):
    """Also when the clock steps back, and what was expired can be read again."""
    chance, guest, ticks = random.Random(seed), Guest(bus), []
    clock = Clock(0)  # s ahead
    bus.view.clock = lambda: wall_clock() + clock() * 1000000

    def send():
        members = {"ttl": chance.choice([0.001, 30, 60, 90])} if chance.random() < 0.7 else {}
        ticks.append(int(guest.sends(chance.choice(["bob", ["bob", "carl"]]), **members)["id"], 16))

    def read():
        since = chance.choice([0, *ticks]) / 1e6
        guest.asks("GET", f"/recv?to=bob&since={since:.6f}&max={chance.choice([1, 2, 9])}")

    def recall():
        guest.begins("POST", "/recall", {"id": f"{chance.choice(ticks):x}"}).answer()

    send()
    for _ in range(80):
        what = chance.choice([send, send, send, read, recall, "remove", "the clock"])
        if what == "the clock":
            clock.now = chance.choice([0, 40, 70, 100])
        elif what == "remove":
            removed(bus, before=chance.choice(ticks))
        else:
            what()
        running, now = bus.view.clock, bus.view.clock()
        bus.view.clock = lambda now=now: now  # between these two counts no ttl ends
        box = bus.mailboxes.box("default", "bob")
        alive = "SELECT count(*) FROM messages JOIN mailboxes ON mailbox = id WHERE name = 'bob' AND tick > ?"
        [count] = bus.view.ask(f"{alive} AND ifnull(expires > ?, 1)", box.mark(), now)
        assert bus_server.unread(bus, "default", "bob", box) == count
        bus.view.clock = running


def unread_of(bus, own):
    return Guest(bus).asks("GET", f"/inbox?name={own}").json()["recipients"]["default"][own]


def test_a_list_counts_so_many_expired_and_the_next_one_counts_on(bus, monkeypatch):
    """What was not counted is told as unread."""
    guest = Guest(bus)
    guest.asks("POST", "/send", [{"from": "eve", "to": "bob", "msg": "x", "ttl": 30}] * 50)
    bus.view.clock = lambda: wall_clock() + 40 * 1000000
    monkeypatch.setattr(bus_server, "COUNTED_EXPIRED", 20)
    with counted(bus.view, "count_expired", lambda _, count: count[0]) as counts:
        assert unread_of(bus, "bob") == 30
    assert sum(counts) == 20
    assert unread_of(bus, "bob") == 10
    assert unread_of(bus, "bob") == 0


def test_the_first_list_after_a_start_counts_what_is_expired(tmp_path):
    """Before any commit was announced."""
    with a_bus(time.monotonic, tmp_path / "bus.db") as bus:
        Guest(bus).sends("bob", ttl=0.001)
        passed(bus)
    with a_bus(time.monotonic, tmp_path / "bus.db") as bus:
        assert unread_of(bus, "bob") == 0


def test_what_is_unread_of_names_that_never_read_needs_no_look_at_the_disk(bus):
    with counted(bus.view, "count_up_to", lambda arguments, _: arguments[1]) as looks:
        for _ in range(3):
            receiver = Guest(bus).sends(NAMES)["receiver"]
    assert receiver["unread"] == 3 * len(NAMES) and not looks


def test_the_senders_of_a_mailbox_are_counted_when_it_is_nearly_full_and_only_those_that_are_left(bus):
    """Each may have a name of its own, and there may be a hundred thousand mailboxes."""
    guest, box = Guest(bus), bus.mailboxes.box("default", "bob")
    guest.asks("POST", "/send", [{"from": f"s{number}", "to": "bob", "msg": "x"} for number in range(40)])
    guest.sends("bob")
    assert box.pending.messages == 41 and not box.pending.by_sender
    bus.sending.unfetched(box, "default", "bob", by_sender=True)
    guest.asks("GET", "/recv?to=bob&since=0&max=40")
    assert list(bus.sending.unfetched(box, "default", "bob", by_sender=True).by_sender) == ["eve"]


def test_a_mailbox_that_was_read_to_its_end_is_not_counted_down(bus):
    """With 400 readers that had each fetched everything, the next send to each took 150 ms."""
    guest = Guest(bus)
    guest.asks("POST", "/send", [{"from": "eve", "to": "bob", "msg": "x"}] * 50)
    guest.sends("bob")
    guest.asks("GET", "/recv?to=bob&since=0")
    with rows_of(bus.view, "sizes") as rows:
        for _ in range(3):
            guest.sends("bob")
    assert bus.mailboxes.box("default", "bob").pending.messages == 3 and len(rows) == 1


def rows_of_a_turn(bus, action):
    """The most rows of mailboxes that one turn counts, in `action` and until nothing is left to be counted."""
    with rows_of(bus.view, "sizes") as rows, counted(bus.loop, "take_turn", lambda *_: len(rows)) as turns:
        result = action()
        come_true(lambda: not bus.sending.uncounted)
    return max(after - before for before, after in zip([0, *turns], [*turns, len(rows)])), result


@pytest.mark.parametrize("after", ["a start", "a minute", "fetches"])
def test_a_send_to_many_full_mailboxes_counts_so_many_rows_in_a_turn(bus, monkeypatch, after):
    """And is refused until all are counted: no more is stored than a mailbox may have."""
    for limit, value in {"MAILBOX_MESSAGES": 40, "MUCH_MESSAGES": 30}.items():
        monkeypatch.setattr(bus_server, limit, value)
    guest = Guest(bus)
    for number in range(38):
        guest.asks("POST", "/send", {"from": f"s{number}", "to": NAMES, "msg": "x"})
    counted = 60 if after == "a minute" else 50
    monkeypatch.setattr(bus.sending, "COUNTED", counted)
    if after == "a start":
        for own in NAMES:
            bus.mailboxes.box("default", own).pending = None
    elif after == "a minute":
        bus.view.clock = lambda: wall_clock() + 2 * bus_server.RECOUNT_SECONDS * 1000000
    else:
        for own in NAMES:
            guest.asks("GET", f"/recv?to={own}&since=0&max=9")
    statuses = []
    for number in range(40):
        message = {"from": f"t{number}", "to": NAMES, "msg": "x"}
        most, answer = rows_of_a_turn(bus, lambda message=message: guest.begins("POST", "/send", message).answer())
        assert most <= counted + 6, f"{most} rows in a turn: those of the send, and of one action"
        statuses.append(answer.status)
        if answer.status == 429:
            break
    assert statuses.count(200) == (11 if after == "fetches" else 2)
    assert 503 in statuses[:3] if after != "a minute" else 503 not in statuses, "what was counted is good until then"
    assert answer.status == 429 and "is full" in answer.json()["error"]


@pytest.mark.parametrize("alive_first", [0, 5])
def test_a_mailbox_is_full_also_behind_any_number_of_expired_messages(bus, monkeypatch, alive_first):
    monkeypatch.setattr(bus_server, "MAILBOX_MESSAGES", 8)
    monkeypatch.setattr(bus_server, "MUCH_MESSAGES", 6)
    monkeypatch.setattr(bus.sending, "COUNTED", 10)
    guest = Guest(bus)
    for number in range(alive_first):
        guest.sends("bob", **{"from": f"s{number}"})
    guest.asks("POST", "/send", [{"from": "eve", "to": "bob", "msg": "x", "ttl": 0.001}] * 35)
    passed(bus)
    statuses = []
    for number in range(3):
        bus.mailboxes.box("default", "bob").pending = None  # as after a start
        for other in range(8):
            message = {"from": f"r{number}{other}", "to": "bob", "msg": "x"}
            statuses.append(guest.begins("POST", "/send", message).answer().status)
            come_true(lambda: not bus.sending.uncounted)
    assert statuses.count(200) == 8 - alive_first and set(statuses[-2:]) == {429}


def test_a_count_that_fails_is_not_tried_for_ever(bus, monkeypatch, capfd):
    guest, view = Guest(bus), bus.view
    guest.sends("bob")
    bus.mailboxes.box("default", "bob").pending = None  # as after a start
    monkeypatch.setattr(bus.loop, "RETRY", 0.001)
    bus.sending.uncounted[bus.mailboxes.box("default", "bob")] = "default", "bob"
    with monkeypatch.context() as broken:
        broken.setattr(view, "sizes", lambda *_: 1 / 0)
        bus.sending.plan()
        come_true(lambda: not bus.sending.uncounted)
    calls = []
    monkeypatch.setattr(bus.sending, "plan", lambda: calls.append(1))
    come_true(lambda: calls)
    assert said(capfd).count("Error") == 1


def test_a_mailbox_with_more_than_may_be_in_it_is_counted_whole(bus):
    """Three lists of 5,000 came in at once. Else what is fetched would be taken off a count that has not all of it."""
    guests = [Guest(bus) for _ in range(3)]
    for guest in guests:
        guest.begins("POST", "/send", [{"from": "eve", "to": "bob", "msg": "x"}] * 5000)
    assert [guest.answer().status for guest in guests] == [200] * 3
    box = bus.mailboxes.box("default", "bob")
    box.pending = None  # as after a start
    bus.sending.rows = 20_000
    assert bus.sending.unfetched(box, "default", "bob").messages == 15_000
    guests[0].asks("GET", "/recv?to=bob&since=0&max=1000")
    assert bus.sending.unfetched(box, "default", "bob").messages == 14_000


class Walked(dict):
    """Mailboxes; counts how many were looked at one after the other."""

    looked = 0

    def items(self):
        for each in super().items():
            self.looked += 1
            yield each


def listened(bus, names, channels=("default",)):
    guest = Guest(bus)
    for channel in channels:
        for own in names:
            guest.asks("GET", f"/recv?to={own}&since=now&channel={channel}")
    bus.mailboxes.boxes = Walked(bus.mailboxes.boxes)
    return guest


OTHERS = [f"other-{number}" for number in range(300)]
CHANNELS = ["default", "unread", "all", *(f"c{number}" for number in range(27))]
BROADCASTS = {
    "one to all": [{"from": "ann", "to": "all"}],
    "to all from many": [{"from": f"s{number}", "to": "all"} for number in range(30)],
    "to lists with all": [{"from": "ann", "to": ["all", own]} for own in NAMES],
    "on many channels": [{"from": "ann", "to": "all", "channel": each} for each in CHANNELS],
    "on many channels, and lists": [
        {"from": "ann", "to": to, "channel": each} for each in CHANNELS for to in ("all", ["n1", "n2"])
    ],
}


@pytest.mark.parametrize("which", BROADCASTS)
def test_all_names_are_walked_once_for_all_broadcasts_of_a_list(bus, which):
    """And each sender is told how many listen beside itself. `unread` and `all` are channels as others are."""
    guest = listened(bus, [*OTHERS, "ann"])
    drafts = [{**each, "msg": "x"} for each in BROADCASTS[which]]
    results = guest.asks("POST", "/send", drafts).json()["results"]
    looked, boxes = bus.mailboxes.boxes.looked, len(bus.mailboxes.boxes)
    assert looked <= boxes, f"{looked} of {boxes}"
    for one, result in zip(drafts, results):
        if "all" not in one["to"]:
            assert result["receiver"]["offline"] == 2 and result["receiver"]["unread"] >= 2
        else:
            others = 0 if one.get("channel", "default") != "default" else 300 + (one["from"] != "ann")
            told = {member: result["receiver"][member] for member in ("online", "offline")}
            assert told == {"online": others, "offline": 0}


@pytest.mark.parametrize("path", ["/inbox", "/agents", "/channels", "/metrics"])
def test_a_list_looks_at_no_more_names_than_it_shows(bus, path):
    guest = listened(bus, OTHERS)
    with rows_of(bus.mailboxes, "keys") as keys:
        guest.asks("GET", f"{path}?max=1")
        guest.asks("GET", f"{path}?max=1&after=default/other-250")
    assert len(keys) + bus.mailboxes.boxes.looked < 10, f"{len(keys)} names"


def test_names_are_forgotten_in_slices(bus, monkeypatch):
    """Each slice in a turn of its own; all are looked at."""
    listened(bus, OTHERS)
    boxes = len(bus.mailboxes.boxes)
    bus.view.clock = lambda: wall_clock() + 700 * 1000000
    bus.mailboxes.clock = lambda: time.monotonic() + 700
    monkeypatch.setattr(bus.retention, "NAMES", 50)
    with counted(bus.mailboxes, "idle", lambda arguments, _: len(arguments[0])) as slices:
        bus.retention.forget_names()
        assert len(slices) == 1
        come_true(lambda: not bus.mailboxes.boxes)
    assert max(slices) == 50 and sum(slices) == boxes
    assert not [*bus.mailboxes.keys(("", ""))]


def test_a_retry_reads_what_has_its_channel(bus):
    """The same key on 50 channels: aside, where all commits wait for it."""
    guest = Guest(bus)
    drafts = [{"from": "eve", "to": "bob", "msg": "x" * 50, "channel": f"c{each}", "key": "k"} for each in range(50)]
    first = [guest.asks("POST", "/send", each).json() for each in drafts]
    for _ in range(2):  # the second time from what is kept of messages that were removed
        with bytes_read(bus.state) as sizes:
            again = guest.asks("POST", "/send", drafts[7]).json()
        assert again["duplicate"] and again["id"] == first[7]["id"]
        assert len(sizes) <= 1, f"{len(sizes)} messages were read"
        removed(bus, before=int(first[-1]["id"], 16) + 1)
    assert guest.asks("POST", "/send", {**drafts[7], "channel": "new"}).json()["duplicate"] is False


def test_a_retry_with_another_text_is_refused_without_a_look_at_the_first_one(bus):
    """It may be large; of a text as long as this one, somebody may have written the members in another order."""
    guest = Guest(bus)
    guest.sends("bob", "x" * LARGE, key="k")
    for text, looks in (("y", 0), ("y" * LARGE, 1)):
        with bytes_read(bus.state) as sizes:
            body = {"from": "eve", "to": "bob", "msg": text, "key": "k"}
            assert guest.begins("POST", "/send", body).answer().status == 409
        assert len(sizes) == looks


def test_a_job_that_is_removed_after_younger_ones_takes_no_gap_away(bus):
    """Who is behind both is told of both, before and after the second removal."""
    guest = Guest(bus)
    older, newer = [guest.sends("queue")["ts"] for _ in range(2)]
    jobs = guest.asks("POST", "/claim", {"to": "queue", "max": 2, "wait": 0}).json()["messages"]
    for job in reversed(jobs):
        guest.asks("POST", "/ack", {"id": job["id"], "lease": job["lease"]})
        removed(bus, before=1 << 52, kept_for=["work"])
        answer = guest.asks("GET", f"/recv?to=queue&since={older:.6f}").json()
        assert answer["messages"] == [] and answer["gap"] == {"from": older, "to": newer}


def forgotten(bus, own):
    """What housekeeping does with a name that has no mail and that nobody polls."""
    bus.do(Forget([["default", own]]), None, bus.retention.forgotten)
    come_true(bus.ledger.idle)


def test_who_reads_a_name_along_that_was_forgotten_is_told_of_a_gap_also_after_a_restart(tmp_path):
    """The mark of what was removed has gone with its row."""
    path = tmp_path / "bus.db"
    with a_bus(time.monotonic, path) as bus:
        guest = Guest(bus)
        behind = guest.sends("bob")["ts"]
        lost = guest.sends("team")["ts"]
        guest.asks("GET", f"/recv?to=bob&since={behind:.6f}")
        removed(bus, before=1 << 52)
        forgotten(bus, "team")
        [gap] = [guest.asks("GET", f"/recv?to=bob,team&since={behind:.6f}").json().get("gap")]
        assert gap == {"from": behind, "to": lost}
    with a_bus(time.monotonic, path) as bus:
        guest = Guest(bus)
        assert guest.asks("GET", f"/recv?to=bob,team&since={behind:.6f}").json().get("gap") == gap
        assert "gap" not in guest.asks("GET", f"/recv?to=bob&since={behind:.6f}").json(), "its own row is there"


@pytest.mark.parametrize("when", ["in the same list", "while that is applied"])
def test_a_name_that_is_polled_while_it_is_being_forgotten_stays_and_has_a_row_again(bus, when):
    guest = Guest(bus)
    cursor = f"{guest.sends('bob')['ts']:.6f}"
    guest.asks("GET", f"/recv?to=bob&since={cursor}")
    removed(bus, before=1 << 52)
    bus.mailboxes.clock = lambda: time.monotonic() + 3600
    if when == "in the same list":
        guest.asks("GET", f"/recv?to=bob&since={cursor}")
        bus.save_marks()
    else:
        before_it_is_announced(bus, lambda: guest.begins("GET", f"/recv?to=bob&since={cursor}"))
    forgotten(bus, "bob")
    assert ("default", "bob") in bus.mailboxes.boxes
    bus.save_marks()
    come_true(bus.ledger.idle)
    rows = bus.view.database.execute("SELECT name, read FROM mailboxes").fetchall()
    assert ("bob", round(float(cursor) * 1e6)) in rows


def test_no_name_is_forgotten_while_the_clock_is_not_trusted(bus):
    """It jumped by two hours: an hour later it is believed."""
    Guest(bus).asks("GET", "/recv?to=bob&since=0")
    bus.mailboxes.clock = lambda: time.monotonic() + 3600
    bus.retention.forget_names()
    for hours, is_there in ((2, True), (2.9, True), (3.1, False)):
        bus.view.clock = lambda hours=hours: wall_clock() + int(hours * 3600 * 1000000)
        bus.retention.forget_names()
        assert (("default", "bob") in bus.mailboxes.boxes) == is_there, hours
