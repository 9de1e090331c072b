"""Who is there: PROTOCOL.md section 18, as far as one token and one outside look cannot show it."""

import contextlib
import json
import random
import sqlite3
import time
from unittest import mock

import pytest

from bus_server import GRACE, OPEN, Poll, Query, Refused, draft, truth
from tests.core.test_identity import ask
from tests.kit import inside
from tests.kit.near import Near
from tests.kit.peers import invite, mint, set_revoked
from tests.kit.processes import in_cpu, wait_until

GRANTS = {
    "alice": [],
    "Lead2": [],
    "boss": ["--also", "alice,carl"],
    "sensor": ["--send-only"],
    "admin": ["--operator"],
}
NAMES = 100_000


@pytest.fixture(scope="module")
def closed(tmp_path_factory):
    path = tmp_path_factory.mktemp("closed") / "bus.db"
    tokens = mint(path, **GRANTS)
    with Near(path) as bus:
        bus.tokens = tokens
        yield bus


@contextlib.contextmanager
def with_names(names):
    """A bus with these names, which have polled."""
    bus = inside.make(":memory:")
    for name in names:
        bus.mailboxes.box("default", name).seen = 1
    yield bus
    inside.close(bus)


AGENTS = [f"agent-{number:05}" for number in range(NAMES)]


@pytest.fixture(scope="module")
def many():
    """A bus with very many names, each with an unread message. Nothing changes it."""
    with with_names(AGENTS) as bus:
        for (channel, own), box in bus.mailboxes.boxes.items():
            box.newest = box.n = 7
            bus.state.tail.ticks[channel, own].append(7)
        yield bus


@pytest.fixture
def few():
    with with_names(AGENTS[:9]) as bus:
        yield bus


def people(bus):
    """The People of a bus; others look at polls too."""
    return next(each.__self__ for each in bus.on_polled if type(each.__self__).__name__ == "People")


def finder(bus):
    [member] = bus.unknown
    return member.__self__


def receiver(bus, sender, to):
    status, answer = ask(bus, "POST", "/send", {"to": to, "msg": "x"}, bus.tokens[sender])
    assert status == 200
    return answer["receiver"]


# Whose token it is


@pytest.mark.parametrize("name, reads", [
    ("alice", ["alice"]), ("boss", ["boss", "alice", "carl"]), ("sensor", []), ("admin", ["admin"]),
])  # fmt: skip
def test_whoami_tells_the_rights_of_a_token(closed, name, reads):
    status, found = ask(closed, "GET", "/whoami", token=closed.tokens[name])
    rights = {"name": name, "operator": name == "admin", "send_only": name == "sensor", "reads": reads, "open": False}
    assert status == 200 and {member: found[member] for member in rights} == rights
    assert ask(closed, "GET", "/whoami")[0] == 401


def test_whoami_tells_when_the_token_expires(near):
    before = int(time.time())
    for options, least, most in ((["--expires", "90d"], 90 * 86400, 90 * 86400 + 60), ([], None, None)):
        token = invite(near, "dell", *options)
        wait_until(lambda token=token: ask(near, "GET", "/whoami", token=token)[0] == 200)
        expires = ask(near, "GET", "/whoami", token=token)[1]["expires"]
        assert expires is None if least is None else least <= expires - before <= most


# Similar names


def test_a_list_names_its_unknown_names_and_a_sender_that_may_only_send_learns_no_others(closed):
    told = receiver(closed, "alice", ["Laed2", "Lead2", "x"])
    assert told["unknown"] == {"Laed2": {"similar": ["Lead2"]}, "x": {}}
    assert receiver(closed, "sensor", ["Laed2", "Lead2"])["unknown"] == {"Laed2": {}}
    assert "unknown" not in receiver(closed, "alice", ["Lead2", "boss"])


def test_a_name_with_a_token_is_known_before_it_polls(closed):
    assert receiver(closed, "alice", "Lead2")["known"] is True
    told = receiver(closed, "alice", "Laed2")
    assert told["known"] is False and told["similar"] == ["Lead2"]


def test_a_sender_that_may_only_send_learns_no_names(closed):
    told = receiver(closed, "sensor", "Laed2")
    assert told["known"] is False and "similar" not in told


@pytest.mark.parametrize("wrong, meant", [
    ("Laed2", "Lead2"), ("lead2", "Lead2"), ("LEAD2", "Lead2"), ("Lead", "Lead2"), ("Lead25", "Lead2"),
    ("ead2", "Lead2"), ("Lxxd2", "Lead2"), ("architcet", "architect"), ("rchitec", "architect"),
    ("build_gb10", "build@gb10"), ("AL", "al"),
])  # fmt: skip
def test_names_within_two_letters_or_of_another_case_are_similar(wrong, meant):
    bus = inside.make(":memory:")
    for name in ("Lead2", "architect", "build@gb10", "somebody-else", "al"):
        bus.mailboxes.box("default", name).seen = 1
    bus.mailboxes.box("default", f"{wrong}x")  # nobody has polled it
    bus.mailboxes.box("other", f"{wrong}y").seen = 1
    assert finder(bus).to("default", wrong) == [meant]
    assert finder(bus).to("default", f"xyz{wrong}") == []
    inside.close(bus)


def test_of_one_or_two_letters_no_other_is_similar():
    """Else all such names are: each differs from each by two letters at most."""
    bus = inside.make(":memory:")
    for name in ("a", "q", "al", "bob"):
        bus.mailboxes.box("default", name).seen = 1
    assert [finder(bus).to("default", wrong) for wrong in ("b", "ab", "qq")] == [[], [], []]
    inside.close(bus)


def test_at_most_three_names_are_similar_and_the_nearest_come_first():
    bus = inside.make(":memory:")
    for name in ("worker-21", "worker-22", "worker-1", "Worker-2", "worker"):
        bus.mailboxes.box("default", name).seen = 1
    assert finder(bus).to("default", "worker-2") == ["Worker-2", "worker-1", "worker-21"]
    inside.close(bus)


@pytest.mark.parametrize("wrong, meant", [
    ("agnet-00017", "agent-00017"), ("gent-00017", "agent-00017"), ("AGENT-00017", "agent-00017"),
    ("agent-00017x", "agent-00017"), ("agent-99999x", "agent-99999"),
])  # fmt: skip
def test_among_many_names_one_wrong_letter_finds_the_name(many, wrong, meant):
    assert meant in finder(many).to("default", wrong)


@pytest.mark.parametrize("alike", ["agents", "digits", "long"])
def test_the_look_for_a_similar_name_takes_under_a_millisecond_of_the_loop(many, alike):
    """With many names, whatever they are like: it looks at a bounded number of them."""
    rng = random.Random(17)
    letters, length = {"agents": ("", 0), "digits": ("0123456789", 12), "long": ("ab", 64)}[alike]
    made = ["".join(rng.choices(letters, k=length)) for _ in range(NAMES // 5)] if letters else []
    unknown = "".join(rng.choices(letters, k=length)) if letters else "agnet-00017"

    def millisecond():
        """As long as the machine takes for what took one where this was measured: some have half of its speed."""
        start, total = time.thread_time(), 0
        for number in range(32_000):
            total += number
        return time.thread_time() - start

    with with_names(made) if made else contextlib.nullcontext(many) as bus:

        def took():
            start = time.thread_time()
            finder(bus).to("default", unknown)
            return time.thread_time() - start

        assert min(took() / millisecond() for _ in range(20)) < in_cpu(1)


def to(name):
    return draft({"from": "ann", "to": name, "msg": "x"}, None)


def member(bus, name):
    return finder(bus).member(to(name), name)


def test_of_many_unknown_names_at_once_only_some_are_looked_for(many):
    """An array may have thousands, and all of them are answered in one turn."""
    start = time.thread_time()
    told = [member(many, f"agnet-{number:05}") for number in range(2000)]
    taken = time.thread_time() - start
    assert told[0] and not told[-1] and taken < in_cpu(0.2)


def test_many_sends_to_one_unknown_name_are_one_look(few, monkeypatch):
    looks, now = [], [0.0]
    monkeypatch.setattr(finder(few), "to", lambda channel, own: looks.append(own) or ["x"])
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    assert {member(few, "agent-x") for _ in range(100)} == {', "similar": ["x"]'} and len(looks) == 1
    now[0] += finder(few).FRESH
    assert member(few, "agent-x") and len(looks) == 2


def test_a_known_name_costs_no_look(few, monkeypatch):
    monkeypatch.setattr(finder(few), "to", None)
    assert '"known": true' in truth(few, to("agent-00001"))


# Who is there


def listed(bus, query="", token=None):
    return {each["name"]: each for each in ask(bus, "GET", f"/agents?{query}", token=token)[1]["agents"]}


def test_a_name_that_only_sent_is_listed_and_what_it_has_is_shown_to_who_may_read_it(closed):
    for sender in ("sensor", "alice"):
        message = {"to": "carl", "channel": "lab", "msg": "x"}
        assert ask(closed, "POST", "/send", message, closed.tokens[sender])[0] == 200
    for who, reads in {"admin": {"alice", "sensor"}, "boss": {"alice"}, "alice": {"alice"}, "sensor": set()}.items():
        found = listed(closed, "channel=lab", closed.tokens[who])
        with_mail = {"carl"} if who in ("admin", "boss") else set()  # who may read its mail
        assert set(found) == {"sensor", "alice"} | with_mail
        reads = reads | found.keys() & {"carl"}
        assert all({"unread", "oldest", "readers"} <= found[name].keys() for name in reads), who
        assert not any({"unread", "oldest", "readers"} & found[name].keys() for name in found.keys() - reads), who
    assert listed(closed, "channel=lab&online=true", closed.tokens["admin"]) == {}


def test_who_sent_is_known_after_a_restart_and_while_its_mail_is_kept(bus):
    sent = ask(bus, "POST", "/send", {"from": "timer", "to": "bob", "msg": "x"})[1]
    before = listed(bus)
    assert before["timer"]["sent"] == sent["ts"] and before["timer"]["listens"] is False
    assert bus.stop() == 0
    bus.start()
    assert listed(bus) == before
    assert ask(bus, "GET", "/inbox")[1]["recipients"] == {"default": {"bob": 1}}


@pytest.mark.parametrize("keep, days, stays", [(30, 29, True), (30, 31, False), (0, 1000, True)])
def test_a_name_that_only_sent_is_forgotten_when_its_mail_is(keep, days, stays):
    day, now = 86400 * 1000000, [0]
    mailboxes = inside.mailboxes(lambda: now[0] / 1e6, lambda: now[0])
    mailboxes.box("default", "timer").sent = 1
    mailboxes.box("default", "looked-at")
    now[0] = days * day
    mailboxes.idle(list(mailboxes.boxes), now[0], keep * day)
    assert list(mailboxes.boxes) == ([("default", "timer")] if stays else [])


def test_a_damaged_sender_is_passed_over_at_the_start(bus):
    for sender in ("timer", "clock"):
        ask(bus, "POST", "/send", {"from": sender, "to": "bob", "msg": "x"})
    assert bus.stop() == 0
    with contextlib.closing(sqlite3.connect(bus.db)) as database:
        database.execute("UPDATE messages SET sender = 'not a name' WHERE sender = 'timer'")
        database.commit()
    bus.start()
    assert set(listed(bus)) == {"clock", "bob"}


@pytest.mark.parametrize("query", ["reader=a%20b", "since=9999999999"])
def test_a_poll_that_is_refused_is_no_presence(near, query):
    ask(near, "POST", "/send", {"from": "ann", "to": "bob", "msg": "x"})
    assert ask(near, "GET", f"/recv?to=bob&{query}")[0] == 400
    assert not listed(near)["bob"]["listens"] and not listed(near)["bob"]["online"]


def test_of_many_names_that_only_send_the_quietest_are_forgotten(monkeypatch):
    bus = inside.make(":memory:")
    here = people(bus)
    monkeypatch.setattr(here, "SENDERS", 3)
    bus.mailboxes.box("default", "reader").firm = True
    for tick, sender in enumerate(["ann", "reader", "bob", "carl", "ann", "dora", "eve"], 1):
        here.sent(("default", sender), tick)
    assert {own: box.sent for (_, own), box in bus.mailboxes.boxes.items() if box.sent} == {
        "reader": 2,
        "ann": 5,
        "dora": 6,
        "eve": 7,
    }
    bus.mailboxes.idle(list(bus.mailboxes.boxes), bus.view.clock(), 0)
    assert {own for _, own in bus.mailboxes.boxes} == {"reader", "ann", "dora", "eve"}
    inside.close(bus)


def test_readers_are_counted_while_they_listen_and_no_more_than_16():
    bus = inside.make(":memory:")
    here = people(bus)
    now, poll = [0.0], Poll("bob", ("bob",), "default", None, 0, 1, 5.0, False)
    bus.mailboxes.clock = lambda: now[0]

    class Polls:
        def __init__(self, reader):
            self.query = lambda: Query(f"reader={reader}")

    def readers():
        box = bus.mailboxes.box("default", "bob")
        return json.loads(f'{{"name": "bob"{here.members(OPEN, "default", "bob", box)}}}')["readers"]

    for number in range(40):
        here.polled(Polls(f"r{number}"), poll)
    assert readers() == here.READERS
    now[0] = 5.0 + GRACE
    here.polled(Polls("late"), poll)
    assert readers() == 1 and here.readers
    now[0] += 5.0 + GRACE
    here.forget()
    assert readers() == 0 and not here.readers
    inside.close(bus)


# What an agent says of itself


def say(bus, token=None, **members):
    return ask(bus, "POST", "/status", members, token)[0]


def test_a_token_says_only_what_its_own_name_does_and_all_that_read_see_it(closed):
    assert say(closed, closed.tokens["alice"], text="tests", channel="said") == 200
    assert say(closed, closed.tokens["alice"], **{"from": "boss", "text": "x"}) == 403
    assert say(closed, text="x") == 401
    for who in GRANTS:
        found = listed(closed, "channel=said", closed.tokens[who])
        assert found["alice"].get("status", {}).get("text") == (None if who == "sensor" else "tests"), who


@pytest.fixture
def statuses():
    """Those of a bus inside the test, whose clock is [0.0]."""
    bus = inside.make(":memory:")
    people = bus.routes["GET", "/agents"].call.__self__
    now = [0.0]
    bus.mailboxes.clock = lambda: now[0]
    yield people.statuses, now
    inside.close(bus)


class Says:
    """A request that says a status."""

    def __init__(self, own, owner="x", **members):
        self.body = json.dumps({"from": own, **members}).encode()
        self.grant, self.owner = OPEN, lambda: owner


def test_the_statuses_of_an_owner_have_a_limit(statuses):
    """A refused one leaves what was said before; what is over makes room."""
    said, now = statuses
    said.held.most_each = 10_000
    long = {"text": "y" * 500, "ttl": 60}
    with pytest.raises(Refused) as refused:
        for number in range(100):
            said.say(Says(f"a{number}", **long))
    assert refused.value.status == 429 and 5 < len(said.known) == number
    said.say(Says("a0", **long))
    said.say(Says("b0", "another owner", **long))
    said.say(Says("b0", "x"))
    said.say(Says(f"a{number - 1}"))
    said.say(Says(f"a{number}", **long))
    now[0] = 61.0
    said.forget()
    assert not said.known and not said.boxes and not said.held.all


def test_what_a_revoked_token_said_is_no_longer_shown(tmp_path):
    tokens = mint(tmp_path / "bus.db", bob=[], boss=["--operator"])
    bob, boss = tokens["bob"], tokens["boss"]
    with Near(tmp_path / "bus.db") as bus:
        assert ask(bus, "POST", "/status", {"text": "push to main", "ttl": 86400}, bob)[0] == 200
        assert "push to main" in json.dumps(ask(bus, "GET", "/agents", token=boss)[1])
        set_revoked(bus, "bob")
        wait_until(lambda: ask(bus, "GET", "/whoami", token=bob)[0] == 401)
        assert "push to main" not in json.dumps(ask(bus, "GET", "/agents", token=boss)[1])


def test_a_revoked_token_keeps_no_room_for_what_it_said(statuses):
    said, _ = statuses
    said.say(Says("bob", "abt_00000001", text="x"))
    said.say(Says("ann", "abt_00000002", text="x"))
    with mock.patch.object(said.bus.gate, "holds", lambda token: token == "abt_00000002"):
        said.forget()
    assert [own for _, own in said.known] == ["ann"] and len(said.boxes) == 1


def test_a_name_that_only_says_its_status_stays_listed_until_that_is_over(statuses):
    said, now = statuses
    boxes = said.bus.mailboxes
    said.say(Says("quiet", state="idle", ttl=60))
    boxes.drop([("default", "quiet")])
    said.forget()
    assert said.boxes == {boxes.boxes["default", "quiet"]}
    agents = said.bus.routes["GET", "/agents"].call
    assert json.loads(agents(inside.Asks()).body)["agents"][0]["status"]["state"] == "idle"
    now[0] = 60.0
    assert "status" not in json.loads(agents(inside.Asks()).body)["agents"][0]


def test_a_page_of_agents_ends_at_about_a_mebibyte_of_what_they_say(statuses):
    said, _ = statuses
    said.held.most_each = said.held.most = 1 << 30
    for number in range(1000):
        said.say(Says(f"a{number:03}", text="\U0001f600" * 500))
    call, found, query = said.bus.routes["GET", "/agents"].call, [], ""
    while query is not None:
        body = call(inside.Asks(query)).body
        assert len(body) < 1.1 * (1 << 20)
        answer = json.loads(body)
        found += [each["name"] for each in answer["agents"]]
        query = f"after={answer['next']}" if answer.get("more") else None
    assert found == [f"a{number:03}" for number in range(1000)]


@pytest.mark.parametrize("query", ["", "after=default/agent-050000", "online=true", "online=false"])
def test_a_page_of_agents_takes_under_50_ms_of_the_loop(many, query):
    call = many.routes["GET", "/agents"].call

    def took():
        start = time.thread_time()
        answer = json.loads(call(inside.Asks(query)).body)
        assert len(answer["agents"]) == (0 if query == "online=true" else 201), "a look for each, for `oldest`"
        return time.thread_time() - start

    assert min(took() for _ in range(3)) < in_cpu(0.05)
