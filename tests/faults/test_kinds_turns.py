"""A number that an outsider chooses is no loop of one turn: in this process, counted in looks, rows and steps.

Left by two attackers' hours of 2026-11-29; each test was red on the code of that day.

| test | what it counted before |
|---|---|
| a_list_counts_so_many_moved_marks | all 20 in one answer |
| a_send_counts_so_many_moved_marks | all 16 in one announcement |
| who_has_read_all_is_counted_from_memory | a look at the disk for each send |
| what_was_read_and_expired_is_passed_once | 300 rows for each send, and for each recall |
| revoked_connections_are_closed_in_turns, a_drain_goes_in_turns | all 20 in one turn |
| names_are_forgotten_one_slice_after_the_other | the next one is planned 20 ms later |
| to_forget_some_names_walks_the_others_seldom | 12,000 names for 40 |
| readers_are_told_of_many_messages_in_turns | 1,000 in one turn |
| an_operator_looks_at_what_it_gets | 5,000 rows for one message |
| what_waits_for_a_commit_has_no_headers | 15 KiB for each |
| what_takes_long_comes_in_turns (2026-11-30) | all twelve before the others |
"""
import contextlib
import time

import pytest

import bus_server
from bus_server import PARKED, Forget, Page, Poll, ok
from tests.faults.test_kinds_bounds import Guest, counted, steps_of
from tests.faults.test_kinds_counts import NAMES, listened
from tests.kit.clock import Clock
from tests.kit.peers import mint, set_revoked
from tests.kit.wire import a_bus, come_true


@pytest.fixture
def bus(tmp_path):
    with a_bus(time.monotonic, tmp_path / "bus.db") as bus:
        yield bus


# What a list of names and a send count


def with_moved_marks(bus, names):
    """Each of the names has read the first of its two messages."""
    guest = Guest(bus)
    first = f"{guest.sends(names)['ts']:.6f}"
    guest.sends(names)
    for own in names:
        guest.asks("GET", f"/recv?to={own}&since={first}&max=1")
    return guest


def looks_at_marks(bus):
    return counted(bus.view, "count_up_to", lambda arguments, _: arguments[1])


@pytest.mark.parametrize("path", ["/inbox", "/agents", "/channels", "/metrics"])
def test_a_list_counts_so_many_moved_marks_and_the_next_page_goes_on(bus, monkeypatch, path):
    monkeypatch.setattr(bus_server, "LOOKS", bus_server.LOOKS_EACH + 5)
    guest, after, unread, pages = with_moved_marks(bus, NAMES), "", 0, 0
    while after is not None:
        with looks_at_marks(bus) as looks:
            answer = guest.asks("GET", f"{path}?after={after}")
        assert len(looks) <= 6, f"{len(looks)} names were counted for one answer"
        pages += 1
        if path == "/metrics":
            after = answer.fields.get("bus-next")
            lines = [line for line in answer.body.decode().splitlines() if line.startswith("agent_bus_unread{")]
            unread += sum(int(line.rpartition(" ")[2]) for line in lines)
            continue
        after = answer.json().get("next")
        found = answer.json()
        unread += sum(each.get("unread", 0) for each in found.get("agents", []))
        unread += sum(found.get("recipients", {}).get("default", {}).values())
        unread += found.get("channels", {}).get("default", {}).get("unread", 0)
    assert pages in (3, 6) and unread == len(NAMES), "two looks for a name if the list also tells its oldest message"


def test_a_send_counts_so_many_moved_marks_and_the_others_count_as_unread(bus, monkeypatch):
    """The next send counts on."""
    monkeypatch.setattr(bus_server, "LOOKS", 6)
    guest, unread = with_moved_marks(bus, NAMES), []
    for sends in range(2, 6):
        with looks_at_marks(bus) as looks:
            unread.append(guest.sends(NAMES)["receiver"]["unread"] - sends * len(NAMES))
        assert len(looks) <= 6, f"{len(looks)} names were counted for one send"
    assert unread == [10, 4, 0, 0]


@contextlib.contextmanager
def statements_of(database):
    found = []
    database.set_trace_callback(found.append)
    yield found
    database.set_trace_callback(None)


def pages_of(guest, path):
    """The answers of a list, one after the other."""
    after = ""
    while after is not None:
        answer = guest.asks("GET", f"{path}{'&' if '?' in path else '?'}after={after}")
        yield answer
        after = answer.fields.get("bus-next") if path == "/metrics" else answer.json().get("next")


@pytest.mark.parametrize("path", ["/agents", "/metrics"])
def test_a_list_takes_so_many_looks_at_the_disk_and_the_next_page_goes_on(bus, monkeypatch, path):
    """Each name has unread mail, some of it expired: to tell the oldest, and how many there are, takes several."""
    monkeypatch.setattr(bus_server, "LOOKS", bus_server.LOOKS_EACH + 5)
    guest, told = Guest(bus), 0
    for own in NAMES:
        guest.asks("GET", f"/recv?to={own}&since=0")
    guest.sends(NAMES, ttl=30)
    guest.sends(NAMES)
    bus.view.clock = lambda: bus_server.wall_clock() + 40 * 1000000
    with statements_of(bus.view.database) as statements:
        for answer in pages_of(guest, path):
            assert len(statements) < 25, f"{len(statements)} statements for one answer"
            statements.clear()
            told += answer.body.count(b'"unread": 1' if path == "/agents" else b"agent_bus_unread{")
    assert told == len(NAMES) + (path == "/metrics"), "eve sends"


@pytest.mark.parametrize("way", ["a list", "a send"])
def test_what_was_read_is_passed_in_so_many_rows_and_the_next_answer_goes_on(bus, monkeypatch, way):
    monkeypatch.setattr(bus_server, "LOOKS", 12 if way == "a send" else bus_server.LOOKS_EACH + 12)
    guest, names = Guest(bus), NAMES[:6]
    sent = guest.asks("POST", "/send", [{"from": "eve", "to": names, "msg": "x", "ttl": 30}] * 200).json()["results"]
    for _ in range(3):
        guest.sends(names)  # it counts what has expired, for each name
    for own in names:
        guest.asks("GET", f"/recv?to={own}&since={sent[149]['ts']:.6f}&max=1")
    bus.view.clock = lambda: bus_server.wall_clock() + 40 * 1000000
    answers, unread = pages_of(guest, "/inbox"), {}
    with counted(bus.view, "count_gone", lambda _, passed: passed[1]) as rows:
        for _ in range(6):
            if way == "a list":
                unread.update(next(answers).json()["recipients"]["default"])
            else:
                guest.sends(names)
            assert sum(rows) <= 300, f"{sum(rows)} rows for one answer"
            rows.clear()
            if len(unread) == len(names):
                break
    if way == "a send":
        monkeypatch.undo()
        with counted(bus.view, "count_gone", lambda _, passed: passed[1]) as rows:
            unread = guest.asks("GET", "/inbox").json()["recipients"]["default"]
        assert not rows, "each send went on"
    assert len(unread) == len(names) and set(unread.values()) == {3 if way == "a list" else 9}


@pytest.fixture
def walked(monkeypatch):
    """The names that lists look at, of which they walk 6."""
    monkeypatch.setattr(Page, "WALKED", 6)
    walked, keys = [], Page.keys
    monkeypatch.setattr(Page, "keys", lambda page: (walked.append(key) or key for key in keys(page)))
    return walked


def test_a_list_walks_so_many_names_and_the_next_page_goes_on(bus, walked):
    guest = Guest(bus)
    for own in NAMES:
        guest.asks("GET", f"/recv?to={own}&since=now&channel={own[:2]}")
    guest.asks("GET", "/recv?to=zoe&since=now")
    for path, found in {"/agents?online=false": 0, "/agents?channel=zz": 0, "/agents?online=true": 17}.items():
        told = 0
        walked.clear()
        for answer in pages_of(guest, path):
            assert len(walked) <= 7, f"{len(walked)} names were walked for one answer"
            walked.clear()
            told += len(answer.json()["agents"])
        assert told == found
    assert len(guest.asks("GET", "/agents?channel=n1&name=n10").json()["agents"]) == 1
    assert len(walked) == 1, "this name is looked up"
    pages = pages_of(guest, "/inbox?name=n3&name=n12")
    assert [channel for page in pages for channel in page.json()["recipients"]] == ["n1", "n3"]


def test_who_reads_one_name_is_told_of_it_at_once_however_many_there_are(tmp_path, walked):
    path = tmp_path / "bus.db"
    tokens = mint(path, ann=["--operator"], zoe=[])
    with a_bus(time.monotonic, path) as bus:
        Guest(bus, tokens["ann"]).asks("POST", "/send", {"to": [*NAMES, "zoe"], "msg": "x"})
        for path in ("/inbox", "/channels"):
            answer = Guest(bus, tokens["zoe"]).asks("GET", path).json()
            assert "more" not in answer and '"default": {' in str(answer).replace("'", '"')
    assert len(walked) == 2


def test_who_has_read_all_is_counted_from_memory(bus):
    guest, now = Guest(bus), 0
    with looks_at_marks(bus) as looks:
        for _ in range(3):
            assert guest.sends("bob")["receiver"]["unread"] == 1
            for _ in range(2):  # the second time it says that it has what it got
                now = guest.asks("GET", f"/recv?to=bob&since={now}").json()["now"]
    assert not looks


@pytest.mark.parametrize("way", ["read", "recalled"])
def test_what_was_read_and_expired_is_passed_once(bus, way):
    """It stays until retention removes it: no later count begins below the mark."""
    guest = Guest(bus)
    guest.asks("POST", "/send", [{"from": "eve", "to": "bob", "msg": "x", "ttl": 30}] * 900)
    now = guest.asks("GET", "/recv?to=bob&since=0&max=1000").json()["now"]
    bus.view.clock = lambda: bus_server.wall_clock() + 40 * 1000000
    guest.sends("bob")
    unread_of = {}
    with steps_of(bus.view.database) as steps:
        for _ in range(10):
            one = guest.sends("bob", ttl=3600)
            if way == "recalled":
                guest.asks("POST", "/recall", {"id": one["id"]})
            else:
                now = guest.asks("GET", f"/recv?to=bob&since={now}&max=1").json()["now"]
            unread_of = guest.asks("GET", "/inbox").json()["recipients"]["default"]
    assert len(steps) < 150, f"{len(steps)} hundred steps of SQLite"
    assert unread_of["bob"] == (901 if way == "recalled" else 2) - (900 if way == "recalled" else 0)


# All connections, all names


def parked(bus, tokens):
    guests = [Guest(bus, token).begins("GET", f"/recv?to={own}&since=0&wait=60") for own, token in tokens.items()]
    assert len(bus.mailboxes.parked) == len(tokens)
    return guests


def most_in_a_turn(bus, still, begin):
    """The largest number by which `still()` goes down in `begin()` and in one turn after it, until it is 0."""
    bus.loop.BUDGET = -1  # one action in each turn
    with counted(bus.loop, "take_turn", lambda arguments, result: still()) as turns:
        before = still()
        begin()
        first = still()
        come_true(lambda: not still())
    return max(one - other for one, other in zip([before, first, *turns], [first, *turns]))


@pytest.fixture
def closed(tmp_path):
    path = tmp_path / "bus.db"
    tokens = mint(path, **{f"agent{number}": [] for number in range(20)}, eve=[])
    with a_bus(time.monotonic, path) as bus:
        bus.eve = Guest(bus, tokens.pop("eve"))
        bus.tokens = tokens
        yield bus


def test_revoked_connections_are_closed_in_turns_and_are_told_nothing_meanwhile(closed):
    guests = parked(closed, closed.tokens)
    closed.eve.sends("nobody")
    eve = closed.gate.tokens.valid.copy()
    closed.gate.tokens.valid = {each: eve[each] for each in eve if eve[each].grant.name == "eve"}

    def revoked():
        closed.door.evict()
        closed.eve.begins("POST", "/send", {"to": "all", "msg": "secret"})

    most = most_in_a_turn(closed, lambda: len(closed.mailboxes.parked), revoked)
    assert most <= 3, f"{most} in one turn"
    assert [guest.answer().status for guest in guests] == [401] * 20


def test_a_poll_whose_token_was_revoked_ends_so_also_when_its_hold_is_over(closed):
    """Its turn to be closed is still to come, and a message came."""
    [guest, *_] = parked(closed, closed.tokens)
    closed.receiving.catch_up = lambda: None  # no turn comes for who waits
    closed.eve.asks("POST", "/send", {"to": "agent0", "msg": "secret"})
    closed.gate.tokens.valid = {}
    guest.connection.wait(PARKED, 0)
    come_true(lambda: closed.sweep() or guest.heard)
    assert guest.answer().status == 401


@pytest.mark.parametrize("revoked", ["before it is woken", "when it asks"])
def test_a_job_for_a_worker_whose_token_was_revoked_is_for_the_next_one(tmp_path, revoked):
    tokens = mint(tmp_path / "bus.db", one=["--also", "queue"], other=["--also", "queue"], eve=[])
    with a_bus(time.monotonic, tmp_path / "bus.db") as bus:
        one, other, eve = (Guest(bus, token) for token in tokens.values())
        bus.door.evict = lambda: None  # no turn comes for it
        for parked, worker in enumerate((one, other), 1):
            worker.begins("POST", "/claim", {"to": "queue", "wait": 60})
            come_true(lambda parked=parked: len(bus.mailboxes.parked) == parked)
        [kind] = {type(each) for each in bus.mailboxes.parked.values()}
        found = bus.waits[kind].found

        def revoke():
            bus.gate.tokens.valid = {id: each for id, each in bus.gate.tokens.valid.items() if each.grant.name != "one"}

        def asks(*woken):
            revoke()
            return found(*woken)

        if revoked == "when it asks":
            bus.waits[kind] = bus.waits[kind]._replace(found=asks)
        else:
            revoke()
        eve.sends("queue")
        come_true(lambda: bus.sweep() or other.heard)
        assert len(other.answer().json()["messages"]) == 1


def test_a_drain_goes_in_turns_and_answers_all(closed):
    guests = parked(closed, closed.tokens)
    most = most_in_a_turn(closed, lambda: len(closed.mailboxes.parked), closed.drain)
    assert most <= 2, f"{most} in one turn"
    assert [guest.answer().status for guest in guests] == [200] * 20


def test_names_are_forgotten_one_slice_after_the_other(bus, monkeypatch):
    """The next one follows the commit: however long that takes, no transaction has two."""
    guest, since = Guest(bus), f"{Guest(bus).sends('nobody')['ts']:.6f}"
    for number in range(50):
        guest.asks("GET", f"/recv?to=n{number}&since={since}")
    bus.save_marks()
    come_true(bus.ledger.idle)
    bus.view.clock = lambda: bus_server.wall_clock() + 700 * 1000000
    bus.mailboxes.clock = lambda: time.monotonic() + 700
    bus.retention.keep, bus.retention.clock_is_trusted = 1, lambda: True
    monkeypatch.setattr(bus.retention, "NAMES", 10)
    names = lambda arguments, _: sum(len(each.names) for each in arguments[0] if type(each) is Forget)  # noqa: E731
    with counted(bus.state, "apply", names) as slices:
        timers = len(bus.loop.timers)
        bus.retention.forget_names()
        assert len(bus.loop.timers) == timers, "the next slice is planned before the commit of this one"
        come_true(lambda: len(bus.mailboxes.boxes) == 1)
    assert max(slices) == 10 and sum(slices) == 50
    assert bus.view.ask("SELECT count(*) FROM mailboxes") == (1,)


class Names(list):
    """Counts how many are walked."""

    walked = 0

    def __iter__(self):
        for each in super().__iter__():
            type(self).walked += 1
            yield each


def test_to_forget_some_names_walks_the_others_seldom(bus):
    names = [f"n{number:03}" for number in range(300)]
    guest = listened(bus, names)
    assert len([*bus.mailboxes.keys(("", ""))]) == len(bus.mailboxes.boxes)
    bus.mailboxes.ordered = Names(bus.mailboxes.ordered)
    for number in range(40):
        bus.mailboxes.drop([("default", names[number])])
    assert Names.walked == 0
    guest.asks("GET", f"/recv?to={names[7]}&since=now")  # one of them is back, and one is new
    guest.asks("GET", "/recv?to=n2&since=now")
    left = sorted(["all", "n2", names[7], *names[40:]])
    assert [own for _, own in bus.mailboxes.keys(("", ""))] == left
    bus.mailboxes.drop([("default", own) for own in names[40:250]])
    assert [own for _, own in bus.mailboxes.keys(("", ""))] == sorted({*left} - {*names[40:250]})


# Who waits for a message


def readers(bus, count):
    since = f"{bus.last / 1000000:.6f}"
    return [Guest(bus).begins("GET", f"/recv?to=reader{n}&since={since}&wait=60&max=1000") for n in range(count)]


def told(guest):
    return [each["msg"] for each in guest.answer().json()["messages"]]


def test_readers_are_told_of_many_messages_in_turns_and_miss_none(bus, monkeypatch):
    """Those for whom a turn has no time also get what comes meanwhile."""
    guests, asked, wants = readers(bus, 20), [], Poll.wants
    monkeypatch.setattr(Poll, "wants", lambda poll, message: asked.append(1) or wants(poll, message))
    bus.loop.BUDGET = -1  # one in each turn
    first, second = Guest(bus), Guest(bus)
    with counted(bus.loop, "take_turn", lambda arguments, result: len(asked)) as turns:
        with monkeypatch.context() as paused:
            paused.setattr(bus.receiving, "catch_up", lambda: None)  # until both are stored
            first.begins("POST", "/send", [{"from": "eve", "to": "all", "msg": str(n)} for n in range(50)])
            come_true(lambda: first.heard)
            second.begins("POST", "/send", {"from": "eve", "to": "reader19", "msg": "50"})
            come_true(lambda: second.heard)
        bus.loop.soon(bus.receiving.catch_up)
        come_true(lambda: not bus.mailboxes.parked)
    most = max(after - before for before, after in zip([0, *turns], turns))
    assert most <= 2 * 51, f"{most} messages were matched in one turn"
    assert [told(guest) for guest in guests] == [[*map(str, range(50))]] * 19 + [[*map(str, range(51))]]


def behind(bus):
    """A reader that is not told yet of a message; and the message."""
    [guest] = readers(bus, 1)
    bus.receiving.catch_up = lambda: None  # its turn does not come
    return guest, Guest(bus).sends("reader0", "x")["id"]


def test_what_a_reader_is_about_to_be_told_is_not_recalled(bus):
    guest, one = behind(bus)
    assert guest.connection in bus.mailboxes.behind
    assert Guest(bus).begins("POST", "/recall", {"id": one}).answer().status == 409


@pytest.mark.parametrize("end", ["its hold is over", "it sends no more"])
def test_a_reader_whose_hold_ends_before_its_turn_gets_what_came(bus, end):
    guest, _ = behind(bus)
    if end == "it sends no more":
        guest.says(b"")
    else:
        guest.connection.wait(PARKED, 0)
        come_true(lambda: bus.sweep() or guest.heard)
    assert told(guest) == ["x"] and not bus.mailboxes.behind


def test_an_operator_looks_at_what_it_gets(bus):
    """To find where a page of others ends, 5,000 rows are passed."""
    guest = Guest(bus)
    guest.asks("POST", "/send", [{"from": "eve", "to": "bob", "msg": "x"}] * 5000)
    with steps_of(bus.view.database) as steps:
        guest.asks("GET", "/log?since=0&max=1")
    assert len(steps) < 10, f"{len(steps)} hundred steps of SQLite"


# What waits for a commit


def test_what_waits_for_a_commit_has_no_headers(bus):
    fields = [f"X-{number}: {'x' * 500}" for number in range(25)]
    guest = Guest(bus).begins("POST", f"/send?from=eve&to=bob&x={'x' * 1500}", b"hello", *fields)
    request = guest.connection.request
    parsed = map(str, vars(request.parsed).values())
    kept = [request.head, request.body, *request.fields.values(), *parsed]
    assert sum(map(len, kept)) < 2048 and request.line().startswith("POST /send?from=eve&to=bob&x=xxx")
    assert guest.answer().status == 200


# One token with many connections


PADDING = [f"X-{number}: {'x' * 1000}" for number in range(12)]


class Stepped:
    """Stands for the module time, with a monotonic clock that the test moves."""

    def __init__(self, clock):
        self.monotonic = clock

    def __getattr__(self, name):
        return getattr(time, name)


@pytest.fixture(params=[[], PADDING], ids=["small", "with large heads"])
def slow(tmp_path, request, monkeypatch):
    """A closed bus with an endpoint that takes 5 ms, and twelve connections of mallory that ask for it at once.

    Nothing else takes any time.
    """
    clock = Clock(time.monotonic())
    tokens = mint(tmp_path / "bus.db", ann=[], mallory=[], trudy=[])
    with a_bus(time.monotonic, tmp_path / "bus.db") as bus:
        bus.of, bus.db, bus.asked = tokens, tmp_path / "bus.db", []

        def takes_long(request):
            bus.asked.append(request.grant.name)
            clock.now += 0.005
            return ok(bus, '"slow": true')

        bus.route("GET", "/slow", takes_long)
        monkeypatch.setattr(bus_server, "time", Stepped(clock))
        bus.many = [Guest(bus, tokens["mallory"]) for _ in range(12)]
        for guest in bus.many:
            guest.begins("GET", "/slow", b"", *request.param)
        yield bus


def test_what_takes_long_comes_in_turns_however_many_connections_ask_for_it(slow):
    """40 connections that each asked for 1,000 messages or reservations held up others for 0.6 to 1.4 s."""
    assert slow.asked == ["mallory"], "the others wait for the end of a turn"
    ann, trudy = (Guest(slow, slow.of[own]) for own in ("ann", "trudy"))
    for _ in range(2):
        trudy.begins("GET", "/slow")
        assert ann.asks("GET", "/agents")
        slow.loop.take_turn()
        come_true(lambda: trudy.heard)
        trudy.heard = b""
    assert len(slow.asked) < 8 and slow.asked.count("trudy") == 2, "tokens take turns, too"
    for guest in slow.many:
        assert guest.answer().status == 200
    come_true(lambda: not slow.door.put_off)
    assert not slow.door.waiting.all and not slow.door.waiting.of
    slow.door.slow[next(iter(slow.door.slow))] = 0.0
    assert Guest(slow, slow.of["mallory"]).begins("GET", "/healthz").heard, "a while later it waits for nobody"


@pytest.mark.parametrize("slow", [PADDING], ids=["large heads"], indirect=True)
def test_large_requests_that_wait_for_their_turn_have_a_budget(slow):
    """Who has most gives up its oldest; one that has gone counts no more."""
    assert [slow.door.waiting.all > 11 * 12_000, len(slow.door.waiting.of)] == [True, 11]
    slow.many[1].leaves()
    slow.door.waiting.most = 50_000
    Guest(slow, slow.of["mallory"]).begins("GET", "/slow", b"", *PADDING)
    found = [guest.answer().status for guest in (slow.many[0], *slow.many[2:])]
    assert found[2:] == [408] * 6 + [200] * 3, "the third one may have its turn before"
    assert len(slow.asked) <= 6


def test_what_waits_for_its_turn_is_judged_again(slow):
    set_revoked(slow, "mallory")
    slow.gate.tokens.refresh()
    assert [guest.answer().status for guest in slow.many] == [200] + [401] * 11 and slow.asked == ["mallory"]
