"""Messages that are taken back while somebody reads them, or is about to."""
import contextlib
import sqlite3

import pytest

from bus_server import OPERATIONS, Now, Put, draft
from tests.kit.hostile import ALICE, HOST, head
from tests.kit.wire import Peer, a_bus, a_read, answers, come_true, posted, statuses, told, while_the_disk_is_busy


def a_recall(ident):
    return head(f"POST /recall?id={ident} HTTP/1.1", HOST)


@contextlib.contextmanager
def two_messages():
    """A bus, its sender, and the ids of what that has sent to bob."""
    with a_bus() as bus:
        sender = Peer(bus)
        sender.says(ALICE + ALICE)
        come_true(lambda: len(statuses(sender.heard)) == 2)
        idents = [answer.json()["id"] for answer in answers(sender.heard)]
        sender.heard = b""
        yield bus, sender, idents


def state(peer, ident):
    peer.says(head(f"GET /message/{ident} HTTP/1.1", HOST))
    return (told(peer))[1]["state"]


@pytest.mark.parametrize("which", [0, 1], ids=["the-next", "one-behind"])
def test_what_is_being_recalled_nobody_gets_and_nobody_passes(which):
    """The reader asks while the recall is on its way to the disk."""
    with two_messages() as (bus, sender, idents):
        reader = Peer(bus)
        sender.says(a_recall(idents[which]))
        reader.says(a_read())
        _, first = told(reader)
        assert [message["id"] for message in first["messages"]] == idents[:which] and first["more"]
        assert int(first["now"] * 1e6 + 0.5) < int(idents[which], 16), "it was passed"
        assert (told(sender))[0] == 200 and state(sender, idents[which]) == "recalled"
        reader.says(a_read(f"{first['now']:.6f}"))
        _, rest = told(reader)
        assert [message["id"] for message in rest["messages"]] == idents[which + 1:] and not rest["more"]


def test_what_could_not_be_recalled_stays_to_be_read(monkeypatch):
    def full(recall, state, now):
        raise sqlite3.OperationalError("database or disk is full")

    with two_messages() as (bus, sender, idents):
        monkeypatch.setattr(OPERATIONS["recall"], "apply", full)
        reader = Peer(bus)
        sender.says(a_recall(idents[1]))
        reader.says(a_read())
        _, first = told(reader)
        assert (told(sender))[0] == 507 and state(sender, idents[1]) == "queued"
        reader.says(a_read(f"{first['now']:.6f}"))
        assert [message["id"] for message in (told(reader))[1]["messages"]] == idents[1:]


def test_what_is_on_its_way_to_a_reader_is_not_recalled():
    with two_messages() as (bus, sender, idents):
        reader = Peer(bus)
        reader.reads = False
        reader.says(a_read())
        sender.says(a_recall(idents[0]))
        assert (told(sender))[0] == 409 and state(sender, idents[0]) == "queued"
        reader.reads_on()
        assert [message["id"] for message in (told(reader))[1]["messages"]] == idents
        assert state(sender, idents[0]) == "fetched"


def test_an_answer_that_is_being_recalled_is_not_handed_to_who_asks():
    """The recall comes while the question, asked again, is on its way to the disk."""
    question = posted("/ask?wait=0", **{"from": "bob", "to": "alice", "msg": "T1?", "key": "k"})
    with a_bus() as bus:
        asker, sender = Peer(bus), Peer(bus)
        asker.says(question)
        _, asked = told(asker)
        sender.says(posted("/send", **{"from": "alice", "to": "bob", "msg": "yes", "reply_to": asked["id"]}))
        _, reply = told(sender)
        while_the_disk_is_busy(bus, lambda: sender.says(a_recall(reply["id"])))
        asker.says(question)
        assert told(asker)[1]["reply"] is None
        assert told(sender)[0] == 200 and state(sender, reply["id"]) == "recalled"


def test_an_answer_on_its_way_to_who_asked_is_not_recalled():
    with a_bus() as bus:
        asker, sender = Peer(bus), Peer(bus)
        asker.says(posted("/ask?wait=9", **{"from": "bob", "to": "alice", "msg": "T1?"}))
        come_true(lambda: bus.mailboxes.parked)
        [question] = bus.mailboxes.parked.values()
        asker.reads = False
        reply = {"from": "alice", "to": "bob", "msg": "yes", "reply_to": f"{question.tick:x}"}
        sender.says(posted("/send", **reply))
        ident = (told(sender))[1]["id"]
        sender.says(a_recall(ident))
        assert (told(sender))[0] == 409 and state(sender, ident) == "queued"
        asker.reads_on()
        assert (told(asker))[1]["reply"]["id"] == ident and state(sender, ident) == "fetched"


def test_what_is_not_announced_yet_cannot_be_asked_about_nor_recalled():
    """Its sender has no answer yet: who knows its id has guessed it."""
    with two_messages() as (bus, sender, _):
        wall = bus.view.clock()
        applied = bus.state.apply([Put([draft({"from": "alice", "to": "new", "msg": "x"}, None)])], Now(wall, wall))
        for request in (a_recall(f"{applied.last:x}"), head(f"GET /message/{applied.last:x} HTTP/1.1", HOST)):
            sender.says(request)
            assert (told(sender))[0] == 404
