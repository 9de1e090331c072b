"""GET /channels: PROTOCOL.md section 17, as far as one token and one outside look cannot show it."""

import urllib.parse

import pytest

from tests.core.test_identity import ask, may_read
from tests.kit.peers import invite
from tests.kit.processes import Server, wait_until

GRANTS = {
    "alice": [],
    "bob": [],
    "boss": ["--also", "bob,carl"],
    "sensor": ["--send-only"],
    "admin": ["--operator"],
}
MAIL = [  # channel, name, how many messages
    ("default", "alice", 1),
    ("default", "bob", 2),
    ("builds", "bob", 3),
    ("builds", "carl", 4),
    ("secret", "dora", 5),
]


@pytest.fixture(scope="module")
def closed(tmp_path_factory):
    with Server(tmp_path_factory.mktemp("closed") / "bus.db") as bus:
        bus.tokens = {name: invite(bus, name, *options) for name, options in GRANTS.items()}
        wait_until(lambda: ask(bus, "GET", "/agents")[0] == 401)
        for channel, to, number in MAIL:
            for _ in range(number):
                message = {"to": to, "channel": channel, "msg": "x"}
                assert ask(bus, "POST", "/send", {**message, "from": "admin"}, bus.tokens["admin"])[0] == 200
        broadcast = {"from": "admin", "to": "all", "channel": "news", "msg": "x"}
        assert ask(bus, "POST", "/send", broadcast, bus.tokens["admin"])[0] == 200
        yield bus


def channels(bus, who, **query):
    """The sums of all answers, and how many answers it took."""
    sums, answers, following = {}, 0, {}
    while following is not None:
        path = "/channels?" + urllib.parse.urlencode({**query, **following})
        status, answer = ask(bus, "GET", path, token=bus.tokens[who])
        assert status == 200 and answer.keys() == {"channels", "now", "bus"} | (
            {"more", "next"} if answer.get("more") else set()
        )
        assert sum(each["mailboxes"] for each in answer["channels"].values()) <= query.get("max", 1000)
        for channel, each in answer["channels"].items():
            mine = sums.setdefault(channel, {"mailboxes": 0, "unread": 0})
            assert each.keys() == mine.keys()
            mine.update({member: mine[member] + value for member, value in each.items()})
        answers += 1
        following = {"after": answer["next"]} if answer.get("more") else None
    return sums, answers


@pytest.mark.parametrize("who", GRANTS)
def test_channels_counts_only_the_mailboxes_that_a_token_may_read(closed, who):
    expected = {}
    for channel, name, number in MAIL:
        if may_read(who, name):
            each = expected.setdefault(channel, {"mailboxes": 0, "unread": 0})
            each["mailboxes"] += 1
            each["unread"] += number
    assert channels(closed, who) == (expected, 1)


@pytest.mark.parametrize("limit, answers", [(1, 5), (2, 3), (5, 1)])
def test_the_parts_of_a_channel_add_up(closed, limit, answers):
    assert channels(closed, "admin", max=limit) == (channels(closed, "admin")[0], answers)


def test_the_sums_of_channels_are_those_of_the_inbox_also_after_a_restart(tmp_path):
    """The second start counts what the first one knew."""
    with Server(tmp_path / "bus.db") as bus:
        bus.tokens = {"anyone": None}
        for channel, to, number in MAIL:
            for _ in range(number):
                ask(bus, "POST", "/send", {"from": "admin", "to": to, "channel": channel, "msg": "x"})
        last = ask(bus, "GET", "/log?max=1000&to=carl")[1]["messages"][-2]["ts"]
        ask(bus, "GET", f"/recv?to=carl&channel=builds&since={last:.6f}")
        for _ in range(2):
            found = channels(bus, "anyone")[0]
            assert found["builds"] == {"mailboxes": 2, "unread": 4}
            inbox = ask(bus, "GET", "/inbox")[1]["recipients"]
            assert found == {
                channel: {"mailboxes": len(names), "unread": sum(names.values())} for channel, names in inbox.items()
            }
            assert bus.stop() == 0
            bus.start()
