"""An endpoint that asks others for its request: `Connection.then`."""
import json

import pytest

import bus_server
from bus_server import Request
from tests.kit.clock import Clock
from tests.kit.hostile import HOST, WAITING, a_send, head
from tests.kit.wire import Peer, a_bus, a_read, answers, come_true, posted, settle, stored, while_the_disk_is_busy


def asking(bus, *steps):
    """POST /several: its answer is the bodies of the answers to `steps`, each asked when the one before is answered."""

    def several(request):
        heads, found = iter(steps), []

        def answered(answer):
            found.append(json.loads(answer.body))
            return go_on()

        def go_on():
            for step in heads:
                inner = Request(request.peer, step.partition(b"\r\n\r\n")[0] + b"\r\n\r\n")
                inner.parse_head()
                inner.body, inner.grant = step.partition(b"\r\n\r\n")[2], request.grant
                inner.endpoint = bus.routes[inner.command, inner.route]
                request.peer.then = answered
                answer = bus.answer(inner)
                if not answer:
                    return None
                request.peer.then = None
                found.append(json.loads(answer.body))
            return bus_server.Answer(200, json.dumps(found).encode())

        return go_on()

    bus.route("POST", "/several", several)
    return head("POST /several HTTP/1.1", HOST, "Content-Length: 0")


STEPS = [posted("/send", **{"from": "ann", "to": "bob", "msg": "1"}), a_read(), WAITING,
         posted("/send", **{"from": "ann", "to": "bob", "msg": "2"}), a_read()]  # fmt: skip


def test_an_endpoint_may_ask_others_that_commit_and_that_wait():
    """WAITING is a poll of carl, which is woken; what is pipelined behind it waits for the whole of it."""
    with a_bus() as bus:
        peer, other = Peer(bus), Peer(bus)
        peer.says(asking(bus, *STEPS) + a_read())
        come_true(lambda: bus.mailboxes.parked)
        assert not peer.heard
        other.says(a_send("alice", to="carl"))
        come_true(lambda: peer.heard)
        settle(bus)
        several, behind = answers(peer.heard)
        sent, read, woken, _, again = several.json()
        assert sent["ok"] and [each["msg"] for each in read["messages"]] == ["1"]
        assert [each["to"] for each in woken["messages"]] == ["carl"]
        assert [each["msg"] for each in again["messages"]] == ["1", "2"] and behind.status == 200
        assert not bus.mailboxes.parked and peer.connection.then is None


@pytest.mark.parametrize("end", ["leaves", "late", "closes"])
def test_an_endpoint_that_waits_in_another_one_ends_as_any_that_waits(end):
    clock = Clock()
    with a_bus(clock) as bus:
        peer = Peer(bus)
        peer.says(asking(bus, *STEPS))
        come_true(lambda: bus.mailboxes.parked)
        if end == "leaves":
            peer.leaves()
        elif end == "closes":
            peer.says(b"")
        else:
            clock.now += 51
            bus.door.sweep()
        come_true(lambda: peer.heard or end == "leaves")
        assert not bus.mailboxes.parked and peer.connection.then is None
        assert stored(bus) == (1 if end == "leaves" else 2)


def test_an_endpoint_that_was_woken_and_waits_for_a_commit_is_no_longer_parked():
    """The peer closes its side during that commit, and hears its answer."""
    with a_bus() as bus:
        peer, other = Peer(bus), Peer(bus)
        peer.says(asking(bus, *STEPS))
        come_true(lambda: bus.mailboxes.parked)
        bus.on_announced.append(lambda visible: bus.on_announced.pop() and while_the_disk_is_busy(bus, leave))

        def leave():
            peer.says(b"")

        other.says(a_send("alice", to="carl"))
        come_true(lambda: peer.heard)
        [several] = answers(peer.heard)
        assert not bus.broken and several.status == 200 and len(several.json()) == len(STEPS)
