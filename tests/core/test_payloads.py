"""What may be in a message and in a query. The cases are in hostile.py: refused with 400 and nothing stored, or stored
and read back identical by every reader there is.
"""
import http.client
import json
import pathlib
import shutil
import subprocess
import sys

import pytest

from tests.kit import hostile
from tests.kit.processes import PATIENCE, Server

OLDEST = pathlib.Path.home() / ".pyenv/versions/3.9.18/bin/python"  # the oldest Python a client may run on
READERS = {  # each prints the messages of an answer, a line for each
    "python": [str(OLDEST) if OLDEST.exists() else sys.executable, "-c",
               "import json, sys\nfor message in json.load(sys.stdin)['messages']: print(json.dumps(message))"],
    "jq": ["jq", "-c", ".messages[]"],
}  # fmt: skip


class Talk:
    """One kept-alive connection to a server."""

    def __init__(self, server):
        self.connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)

    def ask(self, method, path, body=None, **headers):
        """The status and the JSON of the answer."""
        self.connection.request(method, path, body, {"Connection": "keep-alive", **headers})
        answer = self.connection.getresponse()
        assert answer.headers["Connection"] == "keep-alive", "a wrong payload is no framing error"
        return answer.status, json.loads(answer.read())

    def send(self, body, path="/send", **headers):
        return self.ask("POST", path, body, **headers)

    def is_refused(self, body, path="/send", **headers):
        """This is answered 400, and moves nothing: `now` is the newest tick there is."""
        before = self.ask("GET", "/healthz")
        status, answer = self.send(body, path, **headers)
        return status == 400 and answer["error"] and self.ask("GET", "/healthz") == before


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """One server for all: what is refused leaves no trace in it."""
    with Server(tmp_path_factory.mktemp("payloads") / "bus.db") as server:
        yield server
        assert server.log.read_text() == "", "the server complained on stderr"


@pytest.fixture(scope="module")
def talk(server):
    return Talk(server)


def named(payloads):
    return pytest.mark.parametrize("payload", payloads, ids=lambda payload: payload.name.replace(" ", "-"))


# ── Refused ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@named(hostile.REFUSED)
def test_what_a_reader_could_choke_on_is_refused_and_not_stored(talk, payload):
    assert talk.is_refused(payload.body)


@pytest.mark.parametrize("text", [b"\0", *hostile.ENCODINGS_THAT_ARE_NOT_UTF_8.values()])
def test_a_raw_body_that_is_no_text_is_refused(talk, text):
    assert talk.is_refused(b"hello " + text, "/send?from=mallory&to=bob")


@pytest.mark.parametrize("query", [
    "to=bob", "from=&to=bob", "from=mal%0A&to=bob", "from=User&to=bob", "from=mallory&from=mallory&to=bob",
    *[f"from=mallory&to={to}" for to in ["", "b%20b", "bob&to=", ",".join(f"b{n}" for n in range(65))]],
    *[f"from=mallory&to=bob&{fields}" for fields in
      ["channel=a/b", "ttl=", "ttl=0", "ttl=-1", "ttl=1e3", "ttl=inf", "ttl=1" + "0" * 400, "key=",
       "key=a%20b", "key=" + "k" * 129, "subject=a&subject=b", "subject=%00", "subject=%FF", "subject=%ED%A0%80",
       "subject=100%", "%zz=1", "&".join(f"a{n}=" for n in range(63))]],
])  # fmt: skip
def test_a_raw_send_with_a_wrong_query_is_refused(talk, query):
    assert talk.is_refused(b"hello", f"/send?{query}")


@pytest.mark.parametrize("key", ["", "a b", "k" * 129, "\xfc"])
def test_a_wrong_idempotency_key_is_refused(talk, key):
    assert talk.is_refused(hostile.mail("mallory"), **{"Idempotency-Key": key})


@pytest.mark.parametrize("body, said", [
    (hostile.mail("mallory", ttl="1e300"), "from 0.001 to 1000000000"),
    (hostile.mail("mallory", extra=hostile.nested("[", "]", 33)), "nested more than 32 levels deep"),
    (hostile.mail("mallory", extra=hostile.nested("[", "]", 100000)), "nested more than 32 levels deep"),
    (b"[%s, %s]" % (hostile.mail("mallory"), hostile.mail("mallory", to='"eve"')), "each key only once"),
])  # fmt: skip
def test_a_refusal_says_what_would_pass(talk, body, said):
    assert said in talk.send(body, **{"Idempotency-Key": "k"})[1]["error"]


def test_a_body_of_exactly_the_limit_passes_and_one_byte_more_is_413(server):
    fits = hostile.mail("alice", msg='"%s"')
    fits %= b"a" * (262144 - len(fits) + 2)
    assert len(fits) == 262144 and Talk(server).send(fits)[0] == 200
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)
    connection.request("POST", "/send", b" " + fits.replace(b"alice", b"mallory"))
    assert connection.getresponse().status == 413
    assert Talk(server).ask("GET", "/log?from=mallory")[1]["messages"] == []


def test_json_behind_a_byte_order_mark_is_json(server):
    """Some editors and shells begin a file with one."""
    assert Talk(server).send(b"\xef\xbb\xbf" + hostile.mail("alice"))[0] == 200


def test_a_form_is_refused_with_what_to_do_instead(server):
    """curl -F: its framing would be delivered as the text."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)
    body = b'--x\r\nContent-Disposition: form-data; name="msg"\r\n\r\nhello\r\n--x--\r\n'
    connection.request("POST", "/send?from=w&to=x", body, {"Content-Type": "multipart/form-data; boundary=x"})
    answer = connection.getresponse()
    assert answer.status == 400 and b"--data-binary" in answer.read()


def test_a_python_without_a_limit_for_integers_refuses_long_ones_too(tmp_path):
    with Server(tmp_path / "bus.db", env={"PYTHONINTMAXSTRDIGITS": "0"}) as unlimited:
        assert Talk(unlimited).send(hostile.mail("mallory", extra="1" * 4301))[0] == 400
        assert Talk(unlimited).send(hostile.mail("alice", extra="-" + "1" * 4300))[0] == 200


# ── Passed ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def sent(talk):
    """Every good payload, stored: the id of each by its name."""
    ids = {}
    for payload in hostile.PASSED:
        status, answer = talk.send(payload.body)
        assert status == 200, (payload.name, answer)
        ids[payload.name] = answer["id"]
    return ids


@pytest.fixture(scope="module")
def read(server, sent):
    """Every stored message, by its id, as each reader there is gives it back."""
    wire = server.get("/log?from=alice&max=1000")
    assert wire.isascii() and b'"more": false' in wire
    messages = {}
    for reader, command in READERS.items():
        if shutil.which(command[0]):
            printed = subprocess.run(command, input=wire, stdout=subprocess.PIPE, check=True, timeout=PATIENCE).stdout
            lines = [json.loads(line) for line in printed.decode().rstrip("\n").split("\n")]
            messages[reader] = {message["id"]: message for message in lines}
    return messages


def as_delivered(payload):
    """What a reader must see of it, but for `ts` and `id`."""
    given = json.loads(payload.body)
    given.pop("key", None)
    return {"channel": "default", **given}


def as_read(message):
    return {member: value for member, value in message.items() if member not in ("ts", "id")}


@named(hostile.PASSED)
def test_what_is_stored_comes_back_identical_through_python(sent, read, payload):
    delivered = as_read(read["python"][sent[payload.name]])
    assert delivered == as_delivered(payload)
    assert json.dumps(delivered, sort_keys=True) == json.dumps(as_delivered(payload), sort_keys=True), "1 is not 1.0"


@pytest.mark.skipif(not shutil.which("jq"), reason="jq is not installed")
@named([payload for payload in hostile.PASSED if payload.jq])
def test_what_is_stored_comes_back_identical_through_jq(sent, read, payload):
    assert as_read(read["jq"][sent[payload.name]]) == as_delivered(payload)


RAW = {
    "text": b"hello", "JSON": b'{"to": "eve"}', "lines": b"a\nb\r\nc\rd\n\n", "blanks": b" \t ", "one byte": b"\n",
    "quotes": b"\"\\'`$(x)", "emoji": "\U0001f600".encode(), "control characters": bytes(range(1, 128)),
    "escapes": b"\\u0000 \\ud800 %00 %zz +", "a byte order mark": b"\xef\xbb\xbfhello", "64 KiB": b"a" * 65536,
    "256 KiB": b"a" * 262144, "a form": b"a=b&to=eve", "an end of a block": b"---\n| from=eve",
}  # fmt: skip


@pytest.mark.parametrize("text", RAW.values(), ids=RAW)
def test_a_raw_body_is_stored_verbatim(talk, text):
    status, answer = talk.send(text, "/send?from=raw&to=bob&subject=a%20%26%20b%C3%A9&msg=no")
    assert status == 200
    message = talk.ask("GET", f"/message/{answer['id']}")[1]["message"]
    assert message["msg"].encode() == text and message["subject"] == "a & b\xe9"


@pytest.mark.parametrize("kind", [
    "application/json", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x",
    "application/octet-stream", "text/html; charset=utf-16", "", "nonsense",
])  # fmt: skip
def test_the_content_type_does_not_matter(talk, kind):
    status, answer = talk.send(hostile.mail("alice"), **{"Content-Type": kind})
    assert status == 200 and answer["ok"]


def test_an_array_comes_back_in_its_order(server, talk):
    batch = [payload.body for payload in hostile.PASSED if b'"key"' not in payload.body and len(payload.body) < 1000
             and "32 deep" not in payload.name]  # in an array that is 33
    status, answer = talk.send(b"[" + b", ".join(batch).replace(b'"alice"', b'"lists"') + b"]")
    assert status == 200
    stored, since, more = [], "0", True
    while more:  # an answer also ends after many messages that were not asked for
        answer_part = json.loads(server.get(f"/log?from=lists&max=1000&since={since}"), parse_float=str)
        stored += answer_part["messages"]
        since, more = answer_part["now"], answer_part.get("more")
    assert [message["id"] for message in stored] == [result["id"] for result in answer["results"]]
    assert [json.dumps(message["msg"]) for message in stored] == [json.dumps(json.loads(body)["msg"]) for body in batch]


def test_a_sender_cannot_choose_the_id_and_the_time(talk):
    status, answer = talk.send(hostile.mail("alice", id='"1"', ts="1"))
    message = talk.ask("GET", f"/message/{answer['id']}")[1]["message"]
    assert status == 200 and (message["id"], message["ts"]) == (answer["id"], answer["ts"]) != ("1", 1)


# ── Queries ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def short(target):
    return target if len(target) < 60 else f"{target[:50]}...{len(target)}"


@pytest.mark.parametrize("target", hostile.REFUSED_QUERIES, ids=short)
def test_a_malformed_query_is_refused(talk, target):
    status, answer = talk.ask("GET", target)
    assert status == 400 and answer["error"]


@pytest.mark.parametrize("target", hostile.PASSED_QUERIES, ids=short)
def test_a_query_at_the_edge_of_what_is_allowed_passes(talk, target):
    status, answer = talk.ask("GET", target)
    assert status == 200 and isinstance(answer["messages"], list)


def test_a_cursor_in_milliseconds_is_told_so(talk):
    assert "milliseconds" in talk.ask("GET", "/recv?to=bob&since=1795203598000")[1]["error"]
    assert "seconds" in talk.ask("GET", "/recv?to=bob&since=9999999999")[1]["error"]
