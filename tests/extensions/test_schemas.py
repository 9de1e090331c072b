"""Messages that must fit a JSON Schema: PROTOCOL.md section 16."""
import http.client
import json
import os
import subprocess
import sys

import pytest

from bus_extensions.schemas import Schemas
from bus_server import Refused, Unusable
from tests.kit.peers import log_of, run
from tests.kit.processes import PATIENCE, ROOT, Server


def post(bus, path, value):
    peer = http.client.HTTPConnection("127.0.0.1", bus.port, timeout=PATIENCE)
    peer.request("POST", path, json.dumps(value))
    answer = peer.getresponse()
    return answer.status, json.loads(answer.read())


def message(**members):
    return {"from": "alice", "to": "bob", "msg": "x", **members}


def send(bus, **members):
    return post(bus, "/send", message(**members))


WITH_PACKAGES = [str(ROOT / "bus_server.py")]
SCHEMA = {"type": "object", "required": ["build"], "properties": {"build": {"type": "integer", "minimum": 1}}}


@pytest.fixture
def schemas(tmp_path):
    pytest.importorskip("jsonschema")
    folder = tmp_path / "schemas"
    folder.mkdir()
    (folder / "build.done.json").write_text(json.dumps(SCHEMA))
    return folder


def test_a_message_that_does_not_fit_its_type_is_refused_with_the_member_named(schemas, tmp_path):
    with Server(tmp_path / "bus.db", "--schemas", schemas, program=WITH_PACKAGES) as bus:
        assert send(bus, type="build.done", build=7)[0] == send(bus, type="unknown")[0] == send(bus)[0] == 200
        status, answer = send(bus, type="build.done", build=0)
        assert status == 422 and answer["error"].startswith("build does not fit the type build.done: 0 is less")
        assert send(bus, type="build.done")[0] == 422
        assert log_of(bus, "bob") == ["x"] * 3


def test_a_json_body_is_checked_and_not_the_message_around_it(schemas, tmp_path):
    """A schema like {"required": ["topic"]} would else refuse every message whose topic is in its body."""
    (schemas / "note.json").write_text('{"required": ["topic"], "properties": {"topic": {"type": "string"}}}')
    with Server(tmp_path / "bus.db", "--schemas", schemas, program=WITH_PACKAGES) as bus:
        given = {"type": "note", "content_type": "application/json"}
        assert send(bus, **given, msg='{"topic": "x"}')[0] == 200
        assert send(bus, type="note", content_type="Application/JSON; charset=utf-8", msg='{"topic": "x"}')[0] == 200
        for text, error in (
            ('{"subject": "x"}', "msg does not fit the type note: 'topic' is a required property"),
            ('{"topic": 7}', "msg.topic does not fit the type note: 7 is not of type 'string'"),
            ("{topic}", "msg is not JSON: correct it, or send it without content_type application/json"),
            ("[" * 100000, "msg is not JSON: correct it, or send it without content_type application/json"),
        ):
            status, answer = send(bus, **given, topic="x", msg=text)
            assert (status, answer["error"]) == (422, error), text
        assert send(bus, type="note", topic="x", msg="{topic}")[0] == 200  # without it, the message is checked
        assert send(bus, content_type="application/json", msg="{topic}")[0] == 200  # without a type, nothing is


def test_of_a_raw_body_the_query_says_which_of_the_two_is_checked(schemas, tmp_path):
    """With content_type=application/json it is the body, else the members of the query, which are texts."""
    (schemas / "note.json").write_text('{"required": ["topic"], "properties": {"to": {"type": "array"}}}')
    with Server(tmp_path / "bus.db", "--schemas", schemas, program=WITH_PACKAGES) as bus:
        for query, text, status, error in (
            ("content_type=application/json", '{"topic": 1}', 200, None),
            ("content_type=application/json&topic=1", "{}", 422, "msg does not fit the type note: "),
            ("topic=1", "{}", 200, None),
            ("content_type=text/plain", '{"topic": 1}', 422, "the message does not fit the type note: "),
        ):
            peer = http.client.HTTPConnection("127.0.0.1", bus.port, timeout=PATIENCE)
            peer.request("POST", f"/send?from=ann&to=bob&type=note&{query}", text)
            answer = peer.getresponse()
            said = json.loads(answer.read())
            assert answer.status == status and said.get("error", "").startswith(error or ""), (query, said)


STRANGE = {
    "price": {"properties": {"amount": {"multipleOf": 0.01}}},
    "tree": {"properties": {"child": {"$ref": "#"}}},
    "loop": {"$ref": "#"},
    "lost": {"$ref": "#/nowhere"},
}


@pytest.mark.parametrize(
    "of, members",
    [
        ("price", {"amount": 10**400}),
        ("loop", {}),
        ("lost", {}),
        ("price", {"msg": '{"amount": NaN}'}),
        ("price", {"msg": '{"amount": 1e999}'}),
        ("price", {"msg": '{"amount": 0.015, "amount": 1}'}),
        ("price", {"msg": '{"amount": "\\ud800"}'}),
        ("tree", {"msg": '{"child":' * 300 + "{}" + "}" * 300}),
        ("price", {"msg": "\ud800"}),
    ],
)
def test_what_cannot_be_checked_gets_422_in_words(schemas, of, members):
    """Each was a 500 with a traceback in the log, or was stored as JSON that no other parser accepts."""
    for name, schema in STRANGE.items():
        (schemas / f"{name}.json").write_text(json.dumps(schema))
    given = {"content_type": "application/json"} if "msg" in members else {}
    with pytest.raises(Refused) as refused:
        Schemas(str(schemas), strict=False).check([message(type=of, **given, **members)])
    assert refused.value.status == 422
    assert ("msg is not JSON" if given else f"does not fit the type {of}: it cannot be checked") in str(refused.value)


def test_a_strict_bus_refuses_types_it_does_not_know(schemas, tmp_path):
    with Server(tmp_path / "bus.db", "--schemas", schemas, "--strict", program=WITH_PACKAGES) as bus:
        assert [send(bus, type="build.done", build=7)[0], send(bus, type="unknown")[0], send(bus)[0]] == [200, 422, 422]


def test_schemas_that_cannot_be_used_are_one_clear_line(schemas, tmp_path):
    (schemas / "bad.json").write_text('{"type": 7}')
    assert "bad.json is not a JSON Schema" in run("--port", 0, "--db", tmp_path / "a.db", "--schemas", schemas)[2]
    (tmp_path / "empty").mkdir()
    assert "no TYPE.json" in run("--port", 0, "--db", tmp_path / "b.db", "--schemas", tmp_path / "empty")[2]


@pytest.mark.parametrize("ref", ["http://192.0.2.1/x.json", "other.json", "https://json-schema.org.example/x#/a"])
def test_a_schema_at_another_place_is_not_fetched(ref, schemas):
    """The fetch had no end, and held up the whole bus."""
    (schemas / "far.json").write_text(json.dumps({"properties": {"a": {"anyOf": [{"$ref": ref}]}}}))
    with pytest.raises(Unusable, match="far.json is not a JSON Schema: the .ref .* is not in this file: put what it"):
        Schemas(str(schemas), strict=False)


@pytest.mark.parametrize("ref", ["http://x.example/y#/definitions/a", "y#/definitions/a", "#/definitions/a"])
@pytest.mark.parametrize("own", [{"$id": "http://x.example/y#"}, {"$id": "http://x.example/y"}])
def test_a_schema_may_name_itself_with_a_fragment_or_a_relative_reference(own, ref, schemas):
    kind = "http://json-schema.org/draft-07/schema#"
    near = {"$schema": kind, **own, "definitions": {"a": {"type": "integer"}}, "properties": {"a": {"$ref": ref}}}
    (schemas / "near.json").write_text(json.dumps(near))
    checks = Schemas(str(schemas), strict=False)
    checks.check([message(type="near", a=1)])
    with pytest.raises(Refused, match="does not fit the type near"):
        checks.check([message(type="near", a="x")])


def test_a_schema_may_refer_to_itself_and_to_json_schema(schemas):
    parts = {"$defs": {"part": {"$id": "urn:part", "type": "integer"}}}
    refs = {"a": "urn:part", "b": "#/$defs/part", "c": "https://json-schema.org/draft/2020-12/schema"}
    near = {**parts, "properties": {name: {"$ref": ref} for name, ref in refs.items()}}
    (schemas / "near.json").write_text(json.dumps(near))
    checks = Schemas(str(schemas), strict=False)
    checks.check([message(type="near", a=1, b=2, c={"type": "string"})])
    for wrong in ({"a": "x"}, {"b": "x"}, {"c": {"type": 7}}):
        with pytest.raises(Refused, match="does not fit the type near"):
            checks.check([message(type="near", **wrong)])


def test_without_the_package_schemas_are_one_clear_line(tmp_path):
    code = "import sys; sys.modules['jsonschema'] = None; import bus_server; sys.exit(bus_server.main(sys.argv[1:]))"
    done = subprocess.run([sys.executable, "-c", code, "--port", "0", "--db", str(tmp_path / "c.db"), "--schemas", "."],
                          capture_output=True, text=True, timeout=PATIENCE, cwd=ROOT, env=dict(os.environ))  # fmt: skip
    assert done.returncode == 2 and "pip install 'agent-bus[schemas]'" in done.stderr and done.stderr.count("\n") == 1


def test_one_message_that_does_not_fit_refuses_its_whole_array_and_a_question_is_a_message_too(schemas, tmp_path):
    good, bad = message(type="build.done", build=1), message(type="build.done", build="1")
    with Server(tmp_path / "bus.db", "--schemas", schemas, program=WITH_PACKAGES) as bus:
        status, answer = post(bus, "/send", [good, bad])
        assert status == 422 and answer["error"].startswith("build does not fit the type build.done: ")
        assert post(bus, "/ask?wait=0", bad)[0] == 422 and log_of(bus, "bob") == []
        assert post(bus, "/send", [good, good])[0] == post(bus, "/ask?wait=0", good)[0] == 200
        # the text of a body as it is has a type from the query, and is checked too
        assert post(bus, "/send?from=alice&to=bob&type=build.done", "as it is")[0] == 422


def test_the_errors_of_a_schema_are_short_though_the_message_is_long(schemas, tmp_path):
    with Server(tmp_path / "bus.db", "--schemas", schemas, program=WITH_PACKAGES) as bus:
        status, answer = send(bus, type="build.done", build="x" * 10000)
        assert status == 422 and len(answer["error"]) < 300


def test_a_request_that_would_take_long_to_check_is_refused_in_words(schemas):
    """The messages of a request count together, and those without a schema do not. What is refused was not checked."""
    checks = Schemas(str(schemas), strict=False)
    large = message(type="build.done", build=1, list=[{"a": [1, 2]}] * 50)
    checks.check([large] * 4 + [message(list=[1] * 10_000)])
    checks.types["build.done"] = None.__class__  # it would raise
    for messages in ([large] * 5, [message(type="build.done", list=[[[1] * 350]] * 3)]):
        with pytest.raises(Refused) as refused:
            checks.check(messages)
        assert refused.value.status == 413 and "1000 JSON values" in refused.value.sentence


def test_strict_goes_with_schemas(tmp_path):
    code, _, said = run("--port", 0, "--db", tmp_path / "a.db", "--strict")
    assert (code, said) == (2, "bus_server: --strict needs --schemas\n")
