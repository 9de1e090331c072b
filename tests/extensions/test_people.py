"""Who is there: PROTOCOL.md section 18, as far as one token and one outside look cannot show it."""

import random
import time

import pytest

from bus_server import draft, truth
from tests.core.test_identity import ask
from tests.kit import inside
from tests.kit.peers import invite
from tests.kit.processes import Server, in_time, wait_until

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
    with Server(tmp_path_factory.mktemp("closed") / "bus.db") as bus:
        bus.tokens = {name: invite(bus, name, *options) for name, options in GRANTS.items()}
        wait_until(lambda: ask(bus, "GET", "/agents")[0] == 401)
        yield bus


@pytest.fixture
def many():
    """A bus with so many names that have polled."""
    bus = inside.make(":memory:")
    for number in range(NAMES):
        bus.mailboxes.box("default", f"agent-{number:05}").seen = 1
    list(bus.mailboxes.keys(("", "")))
    yield bus
    inside.close(bus)


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


# Similar names


def test_a_name_with_a_token_is_known_before_it_polls(closed):
    assert receiver(closed, "alice", "Lead2")["known"] is True
    told = receiver(closed, "alice", "Laed2")
    assert told["known"] is False and told["similar"] == ["Lead2"]


def test_a_sender_that_may_only_send_learns_no_names(closed):
    assert receiver(closed, "sensor", "Laed2") == {"online": False, "last_seen": None, "unread": 2, "known": False}


@pytest.mark.parametrize("wrong, meant", [
    ("Laed2", "Lead2"), ("lead2", "Lead2"), ("LEAD2", "Lead2"), ("Lead", "Lead2"), ("Lead25", "Lead2"),
    ("ead2", "Lead2"), ("Lxxd2", "Lead2"), ("architcet", "architect"), ("rchitec", "architect"),
    ("build_gb10", "build@gb10"),
])  # fmt: skip
def test_names_within_two_letters_or_of_another_case_are_similar(wrong, meant):
    bus = inside.make(":memory:")
    for name in ("Lead2", "architect", "build@gb10", "somebody-else"):
        bus.mailboxes.box("default", name).seen = 1
    bus.mailboxes.box("default", f"{wrong}x")  # nobody has polled it
    bus.mailboxes.box("other", f"{wrong}y").seen = 1
    assert finder(bus).to("default", wrong) == [meant]
    assert finder(bus).to("default", f"xyz{wrong}") == []
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
    made = ["".join(rng.choices(letters, k=length)) for _ in range(NAMES)] if letters else []
    for name in made:
        many.mailboxes.box("default", name).seen = 1
    list(many.mailboxes.keys(("", "")))
    unknown = "".join(rng.choices(letters, k=length)) if letters else "agnet-00017"

    def took():
        start = time.thread_time()
        finder(many).to("default", unknown)
        return time.thread_time() - start

    assert min(took() for _ in range(20)) < in_time(0.001)


def to(name):
    return draft({"from": "ann", "to": name, "msg": "x"}, None)


def test_of_many_unknown_names_at_once_only_some_are_looked_for(many):
    """An array may have thousands, and all of them are answered in one turn."""
    start = time.thread_time()
    told = [finder(many).member(to(f"agnet-{number:05}")) for number in range(2000)]
    taken = time.thread_time() - start
    assert told[0] and not told[-1] and taken < in_time(0.2)


def test_a_known_name_costs_no_look(many, monkeypatch):
    monkeypatch.setattr(finder(many), "to", None)
    assert '"known": true' in truth(many, to("agent-00001"))
