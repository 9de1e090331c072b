"""One turn reads, counts and wakes no more than it answers: in this process, counted in rows, bytes and calls.

Found by an attack on 2026-11-29; each test was red on the code that it attacked, or on the first mend of it.

| test | what it counted before |
|---|---|
| what_is_not_wanted_counts_for_its_bytes | all 3 MB in one read, in each of nine ways |
| an_answer_as_text_ends_at_128_kib, what_wakes_a_reader | 800 KB; 2.4 MB at once, as JSON too |
| what_cannot_be_seen_is_hidden_in_runs | one call for each character |
| replies_that_do_not_count_ask_no_token | the rights of 200 tokens, for each reply and each who waits |
| one_question_has_eight_who_wait | 12 |
| a_message_is_offered_to_one_worker | to each that waits |
| a_question_that_is_asked_again | all 400 replies |
| a_page_of_a_thread | all of it; or 404 for the first page |
| a_claim_passes_over_expired_jobs | all of them, 3 MB |
| slices_of_dead_letters | 2 of 5, and no more |
| sixteen_claims | 40 in one list |
| who_gave_the_bus_too_much_work, a_large_answer, a_large_message | 200 each time |
| a_list_of_names_in_a_query | any number |
| one_message_has_eight_who_wait_for_its_fetch | 12 |
| what_is_late_together | all 20 in one turn |
| those_that_are_left | a second list of them is begun for each tenth of a second |
| what_is_known_to_be_fetched_is_not_noted_again | a receipt for each of 40 messages at each look |
| marks_and_receipts_are_saved_in_slices | all 200 in one operation |
| what_a_full_disk_did_not_take | 1 of 41 receipts is left |
| who_reads_again_leaves_the_first_time | the time of the last one |
"""
import contextlib
import json
import sqlite3
import sys
import time

import pytest

import bus_server
from bus_server import ANSWER_BYTES, EVERYONE, PARKED_PER_NAME, PLAIN_BYTES, Gate, Grant, Marks, wall_clock
from tests.kit.clock import Clock
from tests.kit.hostile import HOST, head
from tests.kit.peers import mint
from tests.kit.wire import LATE, Peer, a_bus, answers, come_true

LARGE = 250_000  # bytes of a message
ABOUT = ANSWER_BYTES + LARGE + 1000  # the last message may be as large as one may be


class Guest(Peer):
    """A peer with an address or a token of its own, whose requests are answered one by one."""

    def __init__(self, bus, token=None, address="127.0.0.1"):
        self.token, self.address = token, address
        super().__init__(bus)

    def peer(self):
        return self.address

    def begins(self, method, path, body=b"", *fields):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        fields = [*fields, f"Content-Length: {len(body)}"] if body or method != "GET" else fields
        fields = [*fields, f"Authorization: Bearer {self.token}"] if self.token else fields
        self.says(head(f"{method} {path} HTTP/1.1", HOST, *fields, body=body))
        return self

    def answer(self):
        come_true(lambda: self.heard)
        [answer] = answers(self.heard)
        self.heard = b""
        return answer

    def asks(self, *request):
        answer = self.begins(*request).answer()
        assert answer.status == 200, answer
        return answer

    def sends(self, to, msg="x", **members):
        return self.asks("POST", "/send", {"from": "eve", "to": to, "msg": msg, **members}).json()


@pytest.fixture
def bus(tmp_path):
    with a_bus(time.monotonic, tmp_path / "bus.db") as bus:
        yield bus


@contextlib.contextmanager
def counted(of, name, weigh):
    """What `weigh` says of each call of a method of one object: it gets the arguments and the result."""
    found, really = [], getattr(of, name)

    def call(*arguments):
        result = really(*arguments)
        found.append(weigh(arguments, result))
        return result

    setattr(of, name, call)
    yield found
    delattr(of, name)


@contextlib.contextmanager
def rows_of(of, name):
    """What a generator of one object yields, whoever iterates it."""
    found, really = [], getattr(of, name)

    def call(*arguments):
        for row in really(*arguments):
            found.append(row)
            yield row

    setattr(of, name, call)
    yield found
    delattr(of, name)


@contextlib.contextmanager
def steps_of(database):
    """One for each hundred steps that SQLite takes on this connection."""
    found = []
    database.set_progress_handler(lambda: found.append(1), 100)
    yield found
    database.set_progress_handler(None, 100)


def part_of(bus, path, method="POST"):
    """The extension that has this endpoint."""
    return bus.routes[method, path].call.__self__


def bytes_read(rows):
    """The bytes of the texts that are looked at."""
    return counted(rows, "checked", lambda arguments, _: len(arguments[0][4] or ""))


def passed(bus):
    """Every ttl of a millisecond is over."""
    end = wall_clock() + 2000
    come_true(lambda: bus.view.clock() > end)


# What a read looks at

UNWANTED = {  # who gets a dozen large messages, and what is asked; ROOT is the message that they answer
    "expired": ("bob", "/recv?to=bob&since=0"),
    "expired, of a group": ("team", "/recv?to=bob,team&since=0"),
    "recalled": ("bob", "/recv?to=bob&since=0"),
    "own broadcasts": (EVERYONE, "/recv?to=eve&since=0"),
    "another sender": ("bob", "/log?from=nobody&since=0"),
    "another name": ("bob", "/log?to=nobody&since=0"),
    "another channel": ("bob", "/log?channel=nowhere&since=0"),
    "expired, of a thread": ("bob", "/thread/ROOT"),
    "recalled, of a thread": ("bob", "/thread/ROOT"),
}


@pytest.mark.parametrize("way", UNWANTED)
def test_what_is_not_wanted_counts_for_its_bytes(bus, way):
    """The answer ends, says so, and its reader comes to what it wants all the same. One more is read to know of it."""
    to, path = UNWANTED[way]
    eve, reader = Guest(bus), Guest(bus)
    root = eve.sends("dora")["id"]
    members = {"ttl": 0.001} if "expired" in way else {}
    for _ in range(12):
        one = eve.sends(to, "x" * LARGE, reply_to=root, **members)["id"]
        if "recalled" in way:
            eve.asks("POST", "/recall", {"id": one})
    passed(bus)
    pages, path = [], path.replace("ROOT", root)
    while not pages or pages[-1]["more"]:
        with bytes_read(bus.view) as sizes:
            go_on = pages[-1].get("next", pages[-1]["now"]) if pages else None
            following = path.replace("since=0", f"since={go_on}") if "since" in path else f"{path}?after={go_on}"
            page = reader.asks("GET", following if pages else path).json()
        assert sum(sizes) < ABOUT + LARGE, f"{sum(sizes):,} bytes were read in one turn"
        pages.append({"more": False, **page})
        assert len(pages) < 9
    assert len(pages) > 2
    assert all("msg" not in each for page in pages for each in page["messages"] if each["id"] != root)
    wanted = eve.sends("nobody" if "/log" in path else to, "short", reply_to=root, channel="default")["id"]
    if way not in ("own broadcasts", "another sender", "another channel") and "thread" not in way:
        now = f"since={pages[-1]['now']:.6f}"
        [found] = reader.asks("GET", path.replace("since=0", now)).json()["messages"]
        assert found["id"] == wanted


TEXT = "Accept: text/plain"


def all_of(reader, first, path, fields, limit):
    """The lengths of the answers, each below the limit, from the first one on until nothing is left."""
    sizes, answer = [], first
    while True:
        sizes.append(len(answer.body))
        assert sizes[-1] < limit, f"{sizes[-1]:,} bytes in one answer"
        members = {} if fields else answer.json()
        more = answer.fields.get("bus-more") == "true" or members.get("more")
        if not more:
            return sizes
        now = answer.fields.get("bus-now") or f"{members['now']:.6f}"
        answer = reader.asks("GET", f"{path}&since={now}", b"", *fields)


@pytest.mark.parametrize("path", ["/recv?to=bob", "/log?to=bob"])
def test_an_answer_as_text_ends_at_128_kib_and_says_that_there_is_more(bus, path):
    eve, reader = Guest(bus), Guest(bus)
    for _ in range(20):
        eve.sends("bob", "\u2800" * 7000)  # 42,000 bytes, as the bus has them
    first = reader.asks("GET", f"{path}&since=0", b"", TEXT)
    sizes = all_of(reader, first, path, [TEXT], PLAIN_BYTES + 50_000)
    assert 5 <= len(sizes) <= 7, sizes


@pytest.mark.parametrize("fields", [[], [TEXT]], ids=["json", "text"])
@pytest.mark.parametrize("path", ["/recv?to=bob,n1,n2,n3,n4,n5,n6,n7,n8,n9", "/log?channel=default"])
def test_what_wakes_a_reader_ends_at_the_same_bytes(bus, path, fields):
    """One request, to ten names that one reader reads, is 2.4 MB."""
    eve, reader = Guest(bus), Guest(bus)
    since = f"{eve.sends('zoe')['ts']:.6f}"
    names = ["bob", *(f"n{number}" for number in range(1, 10))]
    reader.begins("GET", f"{path}&since={since}&wait=60&max=1000", b"", *fields)
    eve.asks("POST", "/send", [{"from": "eve", "to": names, "msg": "x" * 12_000}] * 20)
    limit = PLAIN_BYTES + 13_000 if fields else ABOUT
    sizes = all_of(reader, reader.answer(), f"{path}&max=1000", fields, limit + 10_000)
    assert sum(sizes) > 200 * 12_000, "some were passed over"


def test_no_python_code_runs_for_each_hidden_character():
    """A text of 256 KiB, every second character hidden, took 0.1 s."""
    calls = []
    sys.setprofile(lambda frame, event, what: calls.append(event) if event == "call" else None)
    try:
        text = bus_server.shown("\x01a\u2800" * 5000)
    finally:
        sys.setprofile(None)
    assert text == "\\x01a\\u2800" * 5000 and len(calls) < 20


def test_what_cannot_be_seen_is_hidden_in_runs():
    """A function is called for each run and not for each character."""
    calls = []
    text = bus_server.HIDDEN.sub(lambda match: calls.append(1) or "", f"a{chr(1) * 5000}b{chr(0x2800) * 5000}")
    assert text == "ab" and len(calls) == 2
    assert bus_server.shown("\x01\u2800" * 50) == bus_server.shown("\x01\u2800") * 50


# Who is woken


@pytest.fixture
def crowded(tmp_path):
    """A closed bus with 200 tokens beside those of ann and bob, whose tokens it has."""
    path = tmp_path / "bus.db"
    tokens = mint(path, ann=[], bob=[], **{f"agent{number}": [] for number in range(200)})
    with a_bus(time.monotonic, path) as bus:
        bus.tokens = tokens
        yield bus


def asked(bus, count):
    """So many connections of ann that wait for the reply to one question; and its id."""
    guests = [Guest(bus, bus.tokens["ann"]) for _ in range(count)]
    question = {"to": "bob", "msg": "T1?", "key": "k"}
    for guest in guests:
        guest.begins("POST", "/ask?wait=60", question)
    come_true(lambda: bus.sweep() or all(guest.heard for guest in guests[:-PARKED_PER_NAME]))
    come_true(lambda: len(bus.mailboxes.parked) == min(count, PARKED_PER_NAME))
    return guests, Guest(bus, bus.tokens["ann"]).asks("POST", "/send", question).json()["id"]


def test_replies_that_do_not_count_ask_no_token_for_its_rights(crowded, monkeypatch):
    """Own ones, and those of others: then only the tokens of their sender are asked."""
    _, one = asked(crowded, 4)
    reads, every = [], []
    monkeypatch.setattr(Grant, "reads", lambda grant, own, really=Grant.reads: reads.append(1) or really(grant, own))
    monkeypatch.setattr(Gate, "readers", lambda gate, own, really=Gate.readers: every.append(1) or really(gate, own))
    for name in ("ann", "agent7"):
        some = [{"to": f"agent{number}", "msg": "no", "reply_to": one} for number in range(50)]
        some += [{"to": "ann", "msg": "no", "reply_to": one}] * 50
        Guest(crowded, crowded.tokens[name]).asks("POST", "/send", some)
    assert not every and len(reads) <= 1000, f"{len(reads)} rights were looked at"
    assert len(crowded.mailboxes.parked) == 4, "none of them is an answer"


def test_one_question_has_eight_who_wait_for_its_reply(crowded):
    """Who waits longest is told that there is none, and the others get it."""
    guests, one = asked(crowded, PARKED_PER_NAME + 4)
    assert [guest.answer().json()["reply"] for guest in guests[:4]] == [None] * 4
    Guest(crowded, crowded.tokens["bob"]).asks("POST", "/send", {"to": "ann", "msg": "yes", "reply_to": one})
    assert [guest.answer().json()["reply"]["msg"] for guest in guests[4:]] == ["yes"] * PARKED_PER_NAME


def test_one_message_has_eight_who_wait_for_its_fetch(bus):
    """Who waits longest is told that nobody has it yet. Those who wait for another message are not counted."""
    one, other = [Guest(bus).sends("bob")["id"] for _ in range(2)]
    guests = [Guest(bus).begins("GET", f"/message/{one}?wait_fetched=60") for _ in range(PARKED_PER_NAME + 4)]
    guests.append(Guest(bus).begins("GET", f"/message/{other}?wait_fetched=60"))
    come_true(lambda: bus.sweep() or all(guest.heard for guest in guests[:4]))
    assert [guest.answer().json()["state"] for guest in guests[:4]] == ["queued"] * 4
    Guest(bus).asks("GET", "/recv?to=bob&since=0")
    assert [guest.answer().json()["state"] for guest in guests[4:]] == ["fetched"] * (PARKED_PER_NAME + 1)
    assert not bus.mailboxes.parked and not bus.mailboxes.waiting


def test_a_message_is_offered_to_one_worker_of_many(bus, monkeypatch):
    """30 wait, and a list of 30 messages wakes each: 30 are offered, not 900."""
    workers = [Guest(bus).begins("POST", "/claim", {"to": "queue", "wait": 60, "worker": f"w{n}"}) for n in range(30)]
    reader = Guest(bus).begins("GET", f"/recv?to=queue&since={Guest(bus).sends('zoe')['ts']:.6f}&wait=60")
    come_true(lambda: len(bus.mailboxes.parked) == 31)
    offered = []
    kind = type(next(iter(bus.mailboxes.parked.values())))
    monkeypatch.setattr(kind, "wants", lambda worker, message: offered.append(1) or True)
    Guest(bus).asks("POST", "/send", [{"from": "eve", "to": "queue", "msg": "x"}] * 30)
    claimed = [len(worker.answer().json()["messages"]) for worker in workers]
    assert claimed == [1] * 30 and len(reader.answer().json()["messages"]) == 30
    assert len(offered) <= 60, f"{len(offered)} offers"


# What an extension looks at


@pytest.mark.parametrize(("who", "to"), [("ann", "bob"), ("bob", "agent1"), ("agent1", "ann")])
def test_a_question_that_is_asked_again_looks_at_few_of_the_replies_that_do_not_count(crowded, who, to):
    """Own ones, ones that the asker may not read, and ones from who may not read the question: 400 of each."""
    part_of(crowded, "/ask").LOOKED = 20
    question = {"to": "bob", "msg": "T1?", "key": "k"}
    asker = Guest(crowded, crowded.tokens["ann"])
    one = asker.asks("POST", "/ask?wait=0", question).json()["id"]
    reply = {"to": to, "msg": "no", "reply_to": one}
    Guest(crowded, crowded.tokens[who]).asks("POST", "/send", [reply] * 400)
    with steps_of(crowded.view.database) as steps, bytes_read(crowded.view) as texts:
        assert asker.asks("POST", "/ask?wait=0", question).json()["reply"] is None
    assert len(steps) < 30 and len(texts) <= 1, f"{len(steps)}00 steps, {len(texts)} texts"


def test_a_page_of_a_thread_looks_at_few_of_the_replies_that_are_for_others(crowded):
    """A page without a message says how to go on, and is no 404: the last one has what is for the reader."""
    part_of(crowded, "/thread/", "GET").LOOKED = 20
    bob, ann = (Guest(crowded, crowded.tokens[own]) for own in ("bob", "ann"))
    root = bob.asks("POST", "/send", {"to": "agent1", "msg": "x"}).json()["id"]
    bob.asks("POST", "/send", [{"to": "agent1", "msg": "x", "reply_to": root}] * 90)
    bob.asks("POST", "/send", {"to": "ann", "msg": "hers", "reply_to": root})
    pages, path = [], f"/thread/{root}"
    while not pages or pages[-1].get("more"):
        pages.append(ann.asks("GET", path if not pages else f"{path}?after={pages[-1]['next']}").json())
    assert [len(page["messages"]) for page in pages] == [0] * 4 + [1]
    assert pages[-1]["messages"][0]["msg"] == "hers"


EXPIRED_JOBS = {"many": (40, "x"), "large": (12, "x" * LARGE)}


@pytest.mark.parametrize("which", EXPIRED_JOBS)
def test_a_claim_passes_over_expired_jobs_in_slices_and_comes_to_the_one_behind_them(bus, monkeypatch, which):
    """A slice ends by messages and by bytes: it is read aside, where all commits wait for it."""
    count, text = EXPIRED_JOBS[which]
    monkeypatch.setattr(sys.modules["_work_state"], "MAX_MESSAGES", 10)
    guest = Guest(bus)
    for _ in range(count):
        guest.sends("queue", text, ttl=0.001)
    passed(bus)
    guest.sends("queue", "alive")
    with bytes_read(bus.state) as sizes, counted(bus.state, "apply", lambda *_: (len(sizes), sum(sizes))) as slices:
        [job] = guest.asks("POST", "/claim", {"to": "queue", "wait": 60}).json()["messages"]
    assert job["msg"] == "alive"
    messages, size = (max(now - before for before, now in zip((0, *each), each)) for each in zip(*slices))
    assert messages <= 10 and size < ABOUT, f"{messages} messages, {size:,} bytes in one slice"


def test_slices_of_dead_letters_follow_each_other_until_none_is_left(tmp_path, monkeypatch):
    with a_bus(time.monotonic, tmp_path / "bus.db", "--max-attempts", "1") as bus:
        monkeypatch.setattr(sys.modules["bus_extensions.work"].Bury, "SLICE", 2)
        guest = Guest(bus)
        guest.asks("POST", "/send", [{"from": "eve", "to": "queue", "msg": "x"}] * 5)
        guest.asks("POST", "/claim", {"to": "queue", "max": 5, "wait": 0})
        bus.state.writing.execute("UPDATE work SET due = 0")  # their leases are over
        part_of(bus, "/claim").bury()
        come_true(lambda: bus.ledger.idle() and not bus.loop.actions)
        assert bus.mailboxes.box("default", "queue.dead").n == 5


def test_sixteen_claims_are_in_one_list_and_the_others_follow(bus):
    """Their results are in memory together; 40 of them could be 40 MiB."""
    with counted(bus.state, "apply", lambda arguments, _: sum(each.is_large for each in arguments[0])) as lists:
        workers = [Guest(bus).begins("POST", "/claim", {"to": "queue", "wait": 0}) for _ in range(40)]
        assert [worker.answer().status for worker in workers] == [200] * 40
    assert [count for count in lists if count] == [16, 16, 8]


# What takes much work


def busy(bus, monkeypatch, burst):
    """From now on the work of each owner is counted, with so many bytes at once and no time that passes."""
    monkeypatch.setattr(bus_server.Storms, "WORK_BURST", burst)
    bus.storms = bus_server.Storms(Clock(), rate=50)


def status_of(bus, *request):
    return Guest(bus).begins(*request).answer().status


def test_who_gave_the_bus_too_much_work_waits_with_large_bodies_lists_and_claims(bus, monkeypatch):
    """A small send and a reader with a budget of its own go on."""
    busy(bus, monkeypatch, 100_000)
    bus.storms.worked("127.0.0.1", "", 200_000)
    for small in (("POST", "/send", {"from": "eve", "to": "bob", "msg": "x"}), ("GET", "/recv?to=bob&since=0")):
        assert status_of(bus, *small) == 200
    for large in (
        ("POST", "/send", {"from": "eve", "to": "bob", "msg": "x" * 20_000}),
        ("GET", "/inbox"),
        ("POST", "/claim", {"to": "queue", "wait": 0}),
    ):
        assert status_of(bus, *large) == 429, large[:2]


def test_a_body_pays_for_the_time_that_it_takes_if_that_is_more_than_its_bytes_say(bus, monkeypatch):
    """JSON of 100,000 small parts takes as long as megabytes of text; here every look at the clock takes 0.1 s."""
    busy(bus, monkeypatch, bus_server.Storms.WORK)
    begun = iter(range(1000))
    monkeypatch.setattr(bus_server.time, "thread_time", lambda: next(begun) / 10)
    body = {"from": "eve", "to": "bob", "msg": "x" * 20_000}
    assert [status_of(bus, "POST", "/send", body) for _ in range(2)] == [200, 429]
    assert status_of(bus, "POST", "/send", {**body, "msg": "x"}) == 200, "a small one pays nothing"


def test_an_answer_as_text_pays_more_because_hidden_characters_are_escaped(bus, monkeypatch):
    Guest(bus).sends("bob", "x" * 30_000)
    busy(bus, monkeypatch, 100_000)
    text = "GET", "/recv?to=bob&since=0", b"", "Accept: text/plain"
    assert [status_of(bus, *text) for _ in range(2)] == [200, 429]


def names_paid(bus):
    return bus_server.Storms.NAMES_BURST - bus.storms.names.left.get("127.0.0.1", (bus_server.Storms.NAMES_BURST, 0))[0]


def test_each_sender_of_an_array_pays_for_its_own_messages(bus):
    bus.storms = bus_server.Storms(Clock(), rate=50)
    for first in ("ann", "carl"):
        array = [{"from": first, "to": "bob", "msg": "x"}, *[{"from": "flood", "to": "bob", "msg": "x"}] * 600]
        assert status_of(bus, "POST", "/send", array) == (200 if first == "ann" else 429)
    assert [bus.storms.sends.left[name][0] for name in ("ann", "flood")] == [999, 400]


def test_each_new_sender_and_each_new_receiver_is_one_new_name(bus):
    """On each channel, for its first message there makes a mailbox for its sender; but not once for each way."""
    bus.storms = bus_server.Storms(Clock(), rate=50)
    array = [{"from": f"s{number}", "to": "bob", "msg": "x"} for number in range(10)]
    paid = []
    for messages in (array, array, [{**each, "channel": "other"} for each in array]):
        assert status_of(bus, "POST", "/send", messages) == 200
        paid.append(names_paid(bus))
    assert paid == [11, 11, 22]


def test_a_poll_is_one_read_of_its_owner_and_its_name(bus, monkeypatch):
    """Several agents are on one machine, and several machines may read one name."""
    monkeypatch.setattr(bus_server.Storms, "READS_BURST", 3)
    bus.storms = bus_server.Storms(Clock(), rate=50)
    one, other = Guest(bus), Guest(bus, address="127.0.0.2")
    polls = [*[(one, "bob")] * 4, (one, "carl"), (other, "bob")]
    statuses = [guest.begins("GET", f"/recv?to={own}&since=0").answer().status for guest, own in polls]
    assert statuses == [200, 200, 200, 429, 200, 200]


def test_a_large_answer_is_charged_to_its_reader_and_not_to_others_of_its_owner(bus, monkeypatch):
    Guest(bus).asks("POST", "/send", [{"from": "eve", "to": "bob", "msg": "x" * 30_000}] * 5)
    busy(bus, monkeypatch, 100_000)
    assert [status_of(bus, "GET", f"/recv?to={own}&since=0") for own in ("bob", "bob", "carl")] == [200, 429, 200]


def test_a_large_message_that_is_asked_for_by_its_id_is_charged_also_if_its_text_is_not_shown(bus, monkeypatch):
    one = Guest(bus).sends("bob", "x" * LARGE, ttl=0.001)["id"]
    passed(bus)
    busy(bus, monkeypatch, 2 * LARGE - 1)
    assert [status_of(bus, "GET", f"/message/{one}") for _ in range(3)] == [200, 200, 429]


def test_a_list_of_names_in_a_query_has_a_limit(bus):
    """Each mailbox is compared with each of them."""
    names = ",".join(f"n{number}" for number in range(64))
    assert status_of(bus, "GET", f"/inbox?name={names}") == 200
    assert status_of(bus, "GET", f"/inbox?name={names},another") == 400


# Who is late


@pytest.fixture
def late():
    """A bus with 20 readers whose holds are over, and no time for more than one of them in a turn."""
    with a_bus(clock := Clock()) as bus:
        bus.readers = [Guest(bus).begins("GET", f"/recv?to=n{number}&wait=10") for number in range(20)]
        bus.loop.BUDGET = 0
        clock.now += 10 + LATE
        yield bus


def answered(bus):
    return sum(bool(reader.heard) for reader in bus.readers)


def test_what_is_late_together_is_answered_over_many_turns(late):
    late.sweep()
    assert answered(late) == 1
    served = []
    while late.mailboxes.parked:
        before = answered(late)
        late.loop.take_turn()
        served.append(answered(late) - before)
    assert max(served) == 1 and answered(late) == 20


def test_those_that_are_left_are_one_action_however_often_it_is_time_to_look(late):
    for _ in range(5):
        late.sweep()
    assert list(late.loop.actions).count(late.door.sweep) == 1


# What was read


@pytest.fixture
def read(tmp_path):
    """A closed bus with a conversation of 41 messages to bob, and bob. Its root is in `root`."""
    path = tmp_path / "bus.db"
    tokens = mint(path, ann=[], bob=[])
    with a_bus(time.monotonic, path) as bus:
        ann = Guest(bus, tokens["ann"])
        bus.root = ann.asks("POST", "/send", {"to": "bob", "msg": "x"}).json()["id"]
        ann.asks("POST", "/send", [{"to": "bob", "msg": "x", "reply_to": bus.root}] * 40)
        yield bus, Guest(bus, tokens["bob"])


def receipts(bus):
    """How many each operation that saves marks has; all are saved when this returns."""
    sizes, apply = [], bus.state.apply

    def look(operations, now):
        sizes.extend(len(each.receipts) for each in operations if isinstance(each, Marks))
        return apply(operations, now)

    bus.state.apply = look
    bus.save_marks()
    come_true(lambda: bus.ledger.idle() and not bus.saving)
    bus.state.apply = apply
    return sizes


def test_what_is_known_to_be_fetched_is_not_noted_again(read):
    bus, bob = read
    assert len(bob.asks("GET", "/recv?to=bob&since=0").json()["messages"]) == 41
    assert len(receipts(bus)) == 1
    for path in (f"/thread/{bus.root}", f"/message/{bus.root}"):
        bob.asks("GET", path)
        assert not bus.mailboxes.receipts


def test_marks_and_receipts_are_saved_in_slices(read):
    """Also when the bus ends. What somebody sends meanwhile comes between two of them."""
    bus, bob = read
    bus.mailboxes.SLICE = 9
    bob.asks("GET", f"/thread/{bus.root}")
    assert receipts(bus) == [9, 9, 9, 9, 5]
    assert bus.state.writing.execute("SELECT count(*) FROM receipts").fetchone() == (41,)
    bus.mailboxes.changed.update(("default", f"n{number}") for number in range(200))
    for number in range(200):
        bus.mailboxes.box("default", f"n{number}").firm = True
    for guest in list(bus.door.connections):
        guest.connection_lost()  # else the bus waits for them, ten seconds
    bus.end()
    assert bus.state.writing.execute("SELECT count(*) FROM mailboxes WHERE name GLOB 'n*'").fetchone() == (200,)


def test_what_a_full_disk_did_not_take_of_the_receipts_is_saved_later(read, monkeypatch):
    bus, bob = read
    bus.mailboxes.SLICE = 9
    bob.asks("GET", f"/thread/{bus.root}")
    tried = []

    def full(operations, now):
        tried.append(operations)
        raise sqlite3.OperationalError("database or disk is full")

    with monkeypatch.context() as patched:
        patched.setattr(bus.state, "apply", full)
        patched.setattr(bus_server, "MARKS_SECONDS", 0.01)
        bus.save_marks()
        come_true(lambda: len(tried) > 1)
        assert len(bus.mailboxes.receipts) == 41
    come_true(lambda: bus.ledger.idle() and not bus.saving)
    assert bus.state.writing.execute("SELECT count(*) FROM receipts").fetchone() == (41,)


def test_who_reads_again_leaves_the_first_time(read):
    bus, bob = read
    told = []
    for _ in range(2):
        bob.asks("GET", f"/thread/{bus.root}")
        receipts(bus)
        told.append(bob.asks("GET", f"/message/{bus.root}").json()["at"])
    assert told[0] == told[1]
