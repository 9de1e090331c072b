"""Where requests begin and end, said to a real server over its sockets. The cases are in hostile.py."""
import json
import socket

import pytest

from tests.kit import hostile
from tests.kit.hostile import ALICE, HOST, SMUGGLED, WAITING, a_send, head
from tests.kit.processes import PATIENCE, Server, wait_until
from tests.kit.wire import LAST, Answer, answers, heard, named, statuses


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    with Server(tmp_path_factory.mktemp("connection") / "bus.db") as server:
        yield server


@pytest.fixture
def server(running):
    """A server that must come out of the test without a trace of mallory, without a traceback, and in good health."""
    heard = running.log.read_text()
    alice, mallory = signed(running, "alice"), signed(running, "mallory")
    running.stored = lambda: signed(running, "alice") - alice
    yield running
    assert running.log.read_text() == heard, "the server complained on stderr"
    assert signed(running, "mallory") == mallory, "something was smuggled"
    assert json.loads(running.get("/healthz"))["ok"]


def listeners(server):
    return {agent["name"] for agent in json.loads(server.get("/agents"))["agents"] if agent["listens"]}


def signed(server, sender):
    """How many messages of this sender are stored."""
    answer = json.loads(server.get(f"/log?from={sender}&max=1000"))
    assert not answer["more"]
    return len(answer["messages"])


def connect(server):
    peer = socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE)
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return peer


def talk(server, sent, ends=False):
    with connect(server) as peer:
        peer.sendall(sent)
        if ends:
            peer.shutdown(socket.SHUT_WR)
        return heard(peer)


@named(hostile.BROKEN)
def test_a_framing_error_gets_one_answer_and_what_follows_is_never_read(server, case):
    (answer,) = answers(talk(server, case.sent + SMUGGLED))
    assert answer.status == case.status
    assert answer.fields["connection"] == "close" and answer.fields["content-type"] == "application/json"
    assert answer.json()["error"]


@named(hostile.BROKEN)
def test_a_framing_error_behind_a_good_request_leaves_that_one_alone(server, case):
    assert statuses(talk(server, ALICE + case.sent + SMUGGLED)) == [200, case.status]
    assert server.stored() == 1


@named(hostile.WHOLE)
def test_a_whole_request_gets_its_answer_and_the_connection_goes_on(server, case):
    found = answers(talk(server, case.sent + (SMUGGLED if case.closes else LAST)))
    assert tuple(answer.status for answer in found if answer.status != 100) == case.answers + (200,) * (not case.closes)
    assert server.stored() == case.stored
    for answer in found:
        assert answer.status in (100, 200) or answer.json()["error"]


@named(hostile.WHOLE)
def test_pipelined_requests_are_answered_in_order(server, case):
    first = head("GET /first HTTP/1.1", HOST)
    found = statuses(talk(server, first + ALICE + case.sent + (SMUGGLED if case.closes else LAST)))
    assert tuple(found) == (404, 200) + case.answers + (200,) * (not case.closes)
    assert server.stored() == case.stored + 1


@named(hostile.CUT)
def test_who_closes_its_side_still_hears_every_answer_and_nothing_half_is_stored(server, case):
    assert tuple(statuses(talk(server, case.sent, ends=True))) == case.answers
    assert server.stored() == case.stored


def test_what_is_pipelined_behind_a_parked_reader_waits_for_it(server):
    with connect(server) as peer:
        peer.sendall(WAITING.replace(b"carl", b"fred") + head("GET /nothing HTTP/1.1", HOST) + ALICE + LAST)
        wait_until(lambda: "fred" in listeners(server))
        talk(server, a_send("alice", "Connection: close", to="fred"))
        found = answers(heard(peer))
    assert [answer.status for answer in found] == [200, 404, 200, 200]
    assert [message["to"] for message in found[0].json()["messages"]] == ["fred"]
    assert server.stored() == 2


def test_a_client_that_goes_on_sending_too_large_a_body_receives_the_413(server):
    with connect(server) as peer:
        peer.sendall(head("POST /send?from=mallory&to=bob HTTP/1.1", HOST, "Content-Length: 8000000"))
        for _ in range(8):
            peer.sendall(b"a" * 1000000)
        (answer,) = answers(heard(peer))
    assert answer.status == 413 and "262144" in answer.json()["error"]


def test_a_body_is_asked_for_only_after_its_length_was_accepted(server):
    with connect(server) as peer:
        sent = a_send("alice", "Expect: 100-continue")
        ending = sent.index(b"\r\n\r\n") + 4
        peer.sendall(sent[:ending])
        assert answers(peer.recv(65536)) == [Answer(100, {}, b"")]
        peer.sendall(sent[ending:] + LAST)
        assert [answer.status for answer in answers(heard(peer))] == [200, 200]
    assert server.stored() == 1


@pytest.mark.parametrize("path", ["/healthz", "/", "/inbox", "/agents", "/bus_send.py", "/nothing", "/message/1"])
def test_head_is_get_without_the_body(server, path):
    whole = head(f"GET {path} HTTP/1.1", HOST, "Connection: close")
    (get,) = answers(talk(server, whole))
    (bare,) = answers(talk(server, b"HEAD" + whole[3:]), bare=True)
    del get.fields["date"], bare.fields["date"]
    assert (bare.status, bare.fields) == (get.status, get.fields) and get.body


def test_a_body_on_head_is_refused_without_one(server):
    sent = head("HEAD / HTTP/1.1", HOST, f"Content-Length: {len(SMUGGLED)}", body=SMUGGLED)
    (answer,) = answers(talk(server, sent), bare=True)
    assert answer.status == 400 and answer.fields["connection"] == "close"


def test_head_neither_reads_mail_nor_waits_for_it(server):
    talk(server, a_send("alice", "Connection: close", to="dora"))
    for path in ("/recv?to=dora&block=true", "/recv?to=emil&block=true", "/log?block=true&since=now"):
        (answer,) = answers(talk(server, head(f"HEAD {path} HTTP/1.1", HOST, "Connection: close")), bare=True)
        assert answer.status == 200
    assert not {"dora", "emil"} & listeners(server)


@pytest.mark.parametrize("path, allowed", [
    ("/send", "POST, OPTIONS"), ("/recv", "GET, HEAD, OPTIONS"), ("/healthz", "GET, HEAD, OPTIONS"),
    ("/message/1", "GET, HEAD, OPTIONS"),
])  # fmt: skip
def test_options_says_what_a_path_takes_and_so_does_a_refusal(server, path, allowed):
    wrong = "GET" if path == "/send" else "POST"
    sent = head(f"OPTIONS {path} HTTP/1.1", HOST) + head(f"{wrong} {path} HTTP/1.1", HOST) + LAST
    options, refusal, _ = answers(talk(server, sent))
    assert (options.status, options.fields["allow"]) == (204, allowed)
    assert (refusal.status, refusal.fields["allow"]) == (405, allowed)
    assert "content-length" not in options.fields, "RFC 9110, 8.6: not in a 204"
    assert not [field for field in options.fields if field.startswith("access-control")], "no CORS"


def test_readers_that_push_each_other_out_do_not_do_it_all_at_once(server):
    """A name has 8 parked readers. Each that is pushed out has its next poll at hand, which pushes out another."""
    crowd = [connect(server) for _ in range(9)]
    for peer in crowd:
        peer.sendall(WAITING.replace(b"carl", b"gina") * 200)
    talk(server, a_send("alice", "Connection: close", to="gina"))
    for peer in crowd:
        assert peer.recv(65536).startswith(b"HTTP/1.1 200 OK")
        peer.close()
