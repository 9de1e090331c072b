"""Questions that wait for their answer; messages that are recalled; senders that wait until they are fetched."""
import contextlib
import http.client
import json
import os
import signal
import socket
import sqlite3
import threading

import pytest

from bus_server import PARKED
from tests.kit.hostile import HOST, head
from tests.kit.processes import PATIENCE, wait_until
from tests.kit.queues import ask, background, mail, parked, post, prune, send, state
from tests.kit.wire import Peer, a_bus, come_true, posted, told

QUESTIONS = int(os.environ.get("QUESTIONS", "100"))


def test_an_answer_is_given_to_the_one_who_asked(bus):
    with background(post, bus, "/ask?wait=20", **{"from": "alice", "to": "bob", "msg": "green?"}) as asking:
        (question,) = wait_until(lambda: ask(bus, "GET", "/recv?to=bob")[1]["messages"])
        told = post(bus, "/send", **{"from": "bob", "to": "alice", "msg": "unrelated"})
        assert told["receiver"]["online"] is True, "who waits for an answer listens"
        reply = send(bus, "alice", "yes", "bob", reply_to=question["id"])
        answer = asking.result()
    assert (answer["id"], answer["reply"]["id"], answer["reply"]["msg"]) == (question["id"], reply, "yes")
    assert mail(bus, "alice") == ["unrelated", "yes"], "and it is in the mailbox"


def test_a_question_without_an_answer_is_told_so_and_asked_again_finds_it(bus):
    question = {"from": "alice", "to": "bob", "msg": "green?", "key": "q1"}
    first = post(bus, "/ask?wait=0", **question)
    assert first["reply"] is None
    send(bus, "alice", "yes", "bob", reply_to=first["id"])
    again = post(bus, "/ask?wait=20", **question)
    assert again["duplicate"] is True and again["reply"]["msg"] == "yes"


def test_an_answer_behind_an_expired_message_is_fetched_by_who_asked(bus):
    """Else the mailbox of who only asks fills up."""
    expired = send(bus, "alice", "late", "bob", ttl=0.001)
    wait_until(lambda: state(bus, expired) == "expired")
    question = {"from": "alice", "to": "bob", "msg": "green?", "key": "q1"}
    reply = send(bus, "alice", "yes", "bob", reply_to=post(bus, "/ask?wait=0", **question)["id"])
    assert post(bus, "/ask?wait=20", **question)["reply"]["id"] == reply
    wait_until(lambda: state(bus, reply) == "fetched")


def test_no_answer_is_missed_however_fast_it_is(bus):
    """Bob answers at once. Each question has an asker of its own: two that go on and on are stopped."""
    over = threading.Event()

    def bob():
        since = "0"
        while not over.is_set():
            answer = ask(bus, "GET", f"/recv?to=bob&wait=1&since={since}")[1]
            since = answer["now"]
            for message in answer["messages"]:
                send(bus, message["from"], message["msg"], "bob", reply_to=message["id"])

    with background(bob):
        try:
            for number in range(QUESTIONS):
                question = {"from": f"alice-{number}", "to": "bob", "msg": str(number)}
                answer = post(bus, "/ask?wait=20", **question)
                assert answer["reply"] and answer["reply"]["msg"] == str(number)
        finally:
            over.set()


@pytest.mark.parametrize("to", ["all", ["bob", "eve"]])
def test_a_question_has_one_receiver(bus, to):
    assert ask(bus, "POST", "/ask", {"from": "alice", "to": to, "msg": "x"})[0] == 400


def test_a_thread_is_what_began_it_and_all_answers_in_order(bus):
    root = send(bus, "bob", "root")
    child = send(bus, "alice", "child", "bob", reply_to=root)
    send(bus, "bob", "other")
    send(bus, "bob", "grandchild", reply_to=child)
    send(bus, "alice", "second child", "bob", reply_to=root)
    for ident in (root, child):
        thread = ask(bus, "GET", f"/thread/{ident}")[1]["messages"]
        assert [message["msg"] for message in thread] == ["root", "child", "grandchild", "second child"]
    assert ask(bus, "GET", "/thread/1")[0] == 404


def test_a_message_can_be_recalled_until_it_is_fetched(bus):
    early, late = send(bus, "bob", "early"), send(bus, "eve", "late")
    assert ask(bus, "POST", "/recall", {"id": early})[0] == 200
    assert mail(bus, "bob") == [] and state(bus, early) == "recalled"
    assert ask(bus, "POST", "/recall", {"id": early})[0] == 200, "a retry is no error"
    assert mail(bus, "eve") == ["late"]
    assert ask(bus, "POST", "/recall", {"id": late})[0] == 409 and state(bus, late) != "recalled"


def test_a_message_that_was_read_by_its_id_stays_read_when_one_behind_it_is_pruned(bus):
    kept, gone = send(bus, "bob", "stays"), send(bus, "bob", "goes", ttl=0.001)
    state(bus, kept, **{"as": "bob"})
    with contextlib.closing(sqlite3.connect(bus.db)) as database:  # the receipt is on the disk a little later
        wait_until(lambda: database.execute("SELECT 1 FROM receipts WHERE kind = 2").fetchone())
    assert state(bus, kept) == "fetched"
    wait_until(lambda: state(bus, gone) == "expired")
    assert prune(bus).endswith("\n1 removed\n")
    assert state(bus, kept) == "fetched" and ask(bus, "POST", "/recall", {"from": "alice", "id": kept})[0] == 409


def test_a_message_to_all_can_be_recalled_until_somebody_has_fetched_it(bus):
    early = send(bus, "all", "early")
    assert ask(bus, "POST", "/recall", {"id": early})[0] == 200 and mail(bus, "bob") == []
    late = send(bus, "all", "late")
    assert mail(bus, "bob") == ["late"]
    assert ask(bus, "POST", "/recall", {"id": late})[0] == 409 and state(bus, late) == "fetched"


def test_a_recall_repeated_after_later_mail_was_fetched_is_no_error(bus):
    early = send(bus, "bob", "early")
    assert ask(bus, "POST", "/recall", {"id": early})[0] == 200
    send(bus, "bob", "later")
    assert mail(bus, "bob") == ["later"]
    assert ask(bus, "POST", "/recall", {"id": early})[0] == 200


def test_an_answer_that_was_recalled_is_not_found_by_asking_again(bus):
    question = {"from": "alice", "to": "bob", "msg": "green?", "key": "q1"}
    asked = post(bus, "/ask?wait=0", **question)
    reply = send(bus, "alice", "yes", "bob", reply_to=asked["id"])
    assert ask(bus, "POST", "/recall", {"id": reply})[0] == 200
    assert post(bus, "/ask?wait=0", **question)["reply"] is None


def test_what_is_claimed_and_recalled_at_once_is_one_of_both(bus):
    """The server is stopped meanwhile, so that both are in one batch."""
    ident = send(bus)
    bodies = {"/claim": '{"to": "builds", "wait": 0}', "/recall": json.dumps({"id": ident})}
    with contextlib.ExitStack() as peers:
        peer = {path: http.client.HTTPConnection("127.0.0.1", bus.port, timeout=PATIENCE) for path in bodies}
        for each in peer.values():
            peers.callback(each.close)
            each.request("GET", "/healthz")
            each.getresponse().read()
        bus.process.send_signal(signal.SIGSTOP)
        for path, body in bodies.items():
            peer[path].request("POST", path, body)
        bus.process.send_signal(signal.SIGCONT)
        claimed = json.loads(peer["/claim"].getresponse().read())["messages"]
        recalled = peer["/recall"].getresponse().status
    assert (len(claimed), recalled, state(bus, ident)) in [(1, 409, "fetched"), (0, 200, "recalled")]


def test_one_who_waits_and_reads_in_one_breath_does_not_break_the_others_who_wait(bus):
    first = send(bus, "bob", "1")
    send(bus, "bob", "2")
    watch = f"GET /message/{first}?wait_fetched=20 HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    read = "GET /recv?to=bob HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    with contextlib.ExitStack() as peers:
        for waiting, request in enumerate([watch + read, watch], 1):
            peer = peers.enter_context(socket.create_connection(("127.0.0.1", bus.port), PATIENCE))
            peer.sendall(request.encode())
            wait_until(lambda waiting=waiting: parked(bus) == waiting)
        reader = http.client.HTTPConnection("127.0.0.1", bus.port, timeout=PATIENCE)
        peers.callback(reader.close)
        for path in ("/recv?to=bob&max=1", "/healthz"):
            reader.request("GET", path)
            assert reader.getresponse().read()


def test_who_waits_for_a_message_to_be_fetched_is_told_that_it_was_recalled():
    """When its hold is over, which is as soon as the test says so."""
    with a_bus() as bus:
        sender, watcher = Peer(bus), Peer(bus)
        sender.says(posted("/send", **{"from": "alice", "to": "bob", "msg": "x"}))
        ident = told(sender)[1]["id"]
        watcher.says(head(f"GET /message/{ident}?wait_fetched=20 HTTP/1.1", HOST))
        come_true(lambda: bus.mailboxes.parked)
        sender.says(posted("/recall", id=ident))
        assert told(sender)[0] == 200
        watcher.connection.wait(PARKED, 0)
        come_true(lambda: bus.sweep() or watcher.heard)
        assert told(watcher)[1]["state"] == "recalled"


def test_a_sender_can_wait_until_its_message_was_fetched(bus):
    ident = send(bus, "bob")
    with background(state, bus, ident, wait_fetched=20) as waiting:
        wait_until(lambda: mail(bus, "bob"))
        assert waiting.result() == "fetched"
    assert state(bus, ident, wait_fetched=20) == "fetched"
    assert state(bus, send(bus, "eve"), wait_fetched=0.2) == "queued"
