"""A backlog under a Monitor: its urgent messages and one line, whatever its size, and nothing is lost or taken."""
import json
import os
import select
import sys

import pytest

import bus_recv
from tests.clients.test_clients import Clock, cursors
from tests.clients.test_monitor import watch
from tests.extensions.test_mcp import Client, store
from tests.kit.bad_servers import HTML, Scripted, answer, mail, message, page
from tests.kit.monitor import Monitor, messages
from tests.kit.processes import PATIENCE, ROOT, Server, wait_until

sys.path.append(str(ROOT / "tools"))
import bus_inbox  # noqa: E402

pytestmark = pytest.mark.usefixtures("home")


class Read:
    """A reader as under a Monitor, whose time costs nothing. `more()` takes one answer: the texts that are shown."""

    def __init__(self, url, names=("alice",)):
        self.reader = bus_recv.SessionReader(list(names), url, wait=0.02)
        self.reader.clock, self.reader.leaves = Clock(), True
        self.answers = self.reader.answers(False, None)

    def more(self):
        found = next(self.answers)["messages"]
        for each in found:
            self.reader.cursor.pass_over(each)
        return [str(each) if isinstance(each, bus_recv.Notice) else each["msg"] for each in found]

    def end(self):
        self.answers.close()
        self.reader.close()
        self.reader.cursor.lock.close()


def unread(bus):
    return json.loads(bus.get("/inbox"))["recipients"].get("default", {}).get("alice", 0)


def state(bus, id):
    return json.loads(bus.get(f"/message/{id}"))["state"]


def texts(start, number):
    return [f"message {n}" for n in range(start, start + number)]


@pytest.mark.slow("a Monitor and a thousand messages")
def test_a_backlog_of_a_thousand_is_one_line_beside_its_urgent_messages_until_it_is_read(bus, tmp_path):
    ids, urgent = [], []
    for number in (300, 300, 397):
        ids += store(bus, "alice", *texts(len(ids), number))
        urgent += store(bus, "alice", f"fire {len(urgent)}", priority="high")
        ids += urgent[-1:]
    process = watch(bus, tmp_path)

    def shown(end):
        """What it writes, up to a line that begins so."""
        text = bytearray()

        def complete():
            if select.select([process.stdout], [], [], 0.1)[0]:
                text.extend(os.read(process.stdout.fileno(), 65536))
            return text.endswith(b"\n") and text.decode().split("\n")[-2].startswith(end)

        wait_until(complete)
        return text.decode()

    def seen(text):
        monitor = Monitor()
        monitor.write(text, 0)
        monitor.flush()
        return [id for _, id, _ in messages(monitor.events)]

    try:
        first = shown("-- agent-bus: ")
        others = first.replace("".join(map(block, urgent_of(bus, urgent))), "")
        assert seen(first) == urgent and others.startswith("-- agent-bus: 1000 messages wait for alice (3 urgent, ")
        assert len(others) <= 600 and "bus_inbox shows them" in others
        wait_until(lambda: json.loads(bus.get("/agents?name=alice&online=true"))["agents"])
        ids += store(bus, "alice", "newer")
        assert seen(shown("---")) == ids[1000:], "what is new is shown at once"
        client = Client(bus, "alice")
        client.tool("bus_inbox")
        assert client.tool("bus_ack", id=urgent[-1]).endswith("older ones are still unread") and unread(bus) == 1001
        page = client.mail()
        found = [each["id"] for each in page]
        while page:
            page = client.mail(ack=found[-1])
            found += [each["id"] for each in page]
        assert [id for id in dict.fromkeys(found) if id in ids] == ids and len(found) == len(ids)
        store(bus, "alice", "at last")
        assert len(seen(shown("---"))) == 1
        wait_until(lambda: unread(bus) == 0)
    finally:
        process.kill()
        process.wait(PATIENCE)
        process.stdout.close()


def urgent_of(bus, ids):
    return [json.loads(bus.get(f"/message/{id}"))["message"] for id in ids]


def block(message):
    return bus_recv.block(message, "alice", float(message["ts"]))


def test_what_is_no_backlog_is_shown_and_taken_as_ever(bus, home):
    store(bus, "alice", *texts(0, bus_recv.BACKLOG))
    reader = Read(bus.url)
    assert reader.more() == texts(0, bus_recv.BACKLOG)
    store(bus, "alice", *texts(20, 30))
    assert reader.more() == texts(20, 30), "it came while the reader listened"
    reader.more()
    assert unread(bus) == 0
    reader.end()


def test_a_backlog_is_neither_taken_nor_passed_until_somebody_has_read_it(bus, home):
    ids = store(bus, "alice", *texts(0, 21))
    urgent = store(bus, "alice", *texts(21, 5), priority="high")
    for _ in range(2):  # the second one begins as a watch that was armed again
        reader = Read(bus.url)
        *early, line = reader.more()
        assert early == texts(21, 3)
        assert line.startswith("26 messages wait for alice (5 urgent, the first 3 are above).")
        assert reader.more() == []
        states = ["queued"] * len(ids) + ["fetched"] * 3 + ["queued"] * 2
        assert [state(bus, id) for id in (*ids, *urgent)] == states and unread(bus) == 26
        assert json.loads(bus.get("/agents?name=alice"))["agents"][0]["online"]
        reader.end()
        assert set(cursors(home).values()) == {"last"}
        assert not json.loads(bus.get("/agents?name=alice"))["agents"][0]["online"]
    reader = Read(bus.url)
    reader.more()
    newer = store(bus, "alice", "newer")
    assert reader.more() == ["newer"] and unread(bus) == 27
    box = bus_inbox.Inbox("alice", peeks=True)
    box.url = bus.url
    box.look(0)
    box.acknowledge(ids[-1])
    assert reader.more() == [] and unread(bus) == 27, "its urgent ones wait"
    box.acknowledge(urgent[-1])
    box.acks = True
    box.look(0)
    store(bus, "alice", "last")
    wait_until(lambda: "last" in reader.more())
    reader.more()
    assert unread(bus) == 0 and state(bus, newer[0]) == "acknowledged"
    at = float(next(at for name, at in cursors(home).items() if name.endswith("/default/alice")))
    assert at > int(newer[0], 16) / 1e6
    reader.end()


def test_after_an_outage_what_waits_may_be_a_backlog(bus, home):
    reader = Read(bus.url)
    reader.more()
    for number in (20, 21):

        def back(seconds, number=number):
            reader.reader.clock.during = lambda seconds: None
            bus.start()
            store(bus, "alice", *texts(0, number))

        bus.kill()
        reader.reader.clock.during = back
        found = reader.more() or reader.more()
        assert found == texts(0, 20) if number == 20 else found[0].startswith("21 messages wait for alice (0 urgent).")
    reader.end()


@pytest.mark.parametrize("options, names", [(["--without", "digest"], ["alice"]), ([], ["alice", "reviewers"])])
def test_where_nothing_could_show_the_rest_all_is_shown(options, names, tmp_path, home):
    with Server(tmp_path / "other.db", *options) as bus:
        store(bus, "alice", *texts(0, 30))
        reader = Read(bus.url, names)
        assert reader.more() == texts(0, 30)
        reader.end()


DIGEST = {"unread": 30, "urgent": 1, "first_urgent": [], "more": False, "now": 1.5, "bus": "b1"}


@pytest.mark.parametrize("told", [
    page(404, HTML), page(403, HTML), page(200, HTML), answer({"error": "no"}, status=404), answer({"bus": "b1"}), b"",
    answer({**DIGEST, "unread": "many"}), answer({**DIGEST, "first_urgent": [7]}),
    answer({**DIGEST, "first_urgent": 7}),
])  # fmt: skip
def test_a_digest_that_is_none_keeps_nobody_from_its_mail(told, home):
    with Scripted(told, mail(message(1))) as server:
        assert Read(server.url).more() == ["hi"]


@pytest.mark.parametrize("waiting", [mail(more=True), answer({"bus": "b1", "messages": 7}), answer({"bus": "b1"})])
def test_a_backlog_waits_as_long_as_the_bus_does_not_say_that_it_is_read(waiting, home):
    looks = mail(), waiting, mail(), mail(), waiting, mail(message(1)), mail(), mail(), mail()
    with Scripted(answer(DIGEST), *looks) as server:
        reader = Read(server.url, ["dell"])
        assert reader.more()[0].startswith("30 messages wait for dell") and reader.more() == []
        assert reader.more() == ["hi"]
        reader.more()
    asked = [("peek" in poll.query, poll.query["since"]) for poll in server.polls]
    look = [(False, "now"), (True, "last")]
    assert asked[:6] == [*look, (True, "1.5"), *look, (True, "1795203596.900000")]
    assert "peek" not in server.polls[-1].query, "an answer without messages: all is read"
