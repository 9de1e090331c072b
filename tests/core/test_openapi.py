"""docs/openapi.json says what the server does and what PROTOCOL.md says.

A new endpoint is a new entry of `paths`. What is missing then, or wrong, these tests name.
"""
import http.client
import json
import re
from urllib.parse import parse_qs, urlencode, urlsplit

import pytest

from bus_server import VERSION
from tests.kit import inside
from tests.kit.processes import PATIENCE, ROOT
from tests.test_docs import PAIR, PROTOCOL, sections

API = json.loads((ROOT / "docs" / "openapi.json").read_text())
SERVER = "".join(file.read_text() for file in [ROOT / "bus_server.py", *ROOT.glob("bus_extensions/*.py")])
OF_PROXIES = {"502", "504", "524"}  # in section 6, and no answers of the bus
BESIDES = {  # what a request needs beside the parameter that is tried
    "send": {"to": "dell", "from": "ann"}, "ask": {"to": "dell", "from": "ann", "wait": "0"}, "recv": {"to": "dell"},
    "digest": {"to": "dell"},
    "claim": {"to": "dell", "wait": "0"}, "recall": {"id": "1"}, "search": {"q": "x"}, "redact": {"id": "1"},
    "ack": {"id": "1", "lease": "x"}, "nack": {"id": "1", "lease": "x"}, "extend": {"id": "1", "lease": "x"},
}  # fmt: skip


def resolved(part):
    """What stands where this reference points to."""
    while "$ref" in part:
        found = API
        for step in part["$ref"][2:].split("/"):
            found = found[step]
        part = found
    return part


def everything(part):
    """Every object in the document."""
    if isinstance(part, dict):
        yield part
    for inner in part.values() if isinstance(part, dict) else part if isinstance(part, list) else ():
        yield from everything(inner)


def operations():
    for path, methods in API["paths"].items():
        for method, operation in methods.items():
            yield method.upper(), path, operation


def parameters(operation, place):
    """Its parameters in the query, the path or the head, by name."""
    found = [resolved(each) for each in operation.get("parameters", [])]
    return {each["name"]: each for each in found if each["in"] == place}


WITH_TLS = ("GET", "/certificate")  # a route of a bus with a certificate only


def test_every_route_of_the_server_is_described_and_no_other():
    bus = inside.make(":memory:")
    inside.close(bus)
    assert {(method, path.partition("{")[0]) for method, path, _ in operations()} == {*bus.routes, WITH_TLS}
    assert API["info"]["version"] == VERSION


def test_every_reference_leads_somewhere_and_every_component_is_used():
    used = {each["$ref"] for each in everything(API) if "$ref" in each}
    made = {f"#/components/{kind}/{name}" for kind, named in API["components"].items() for name in named}
    assert used == made - {"#/components/securitySchemes/token"}


def test_every_path_says_what_its_braces_are():
    for _, path, operation in operations():
        assert re.findall(r"{(\w+)}", path) == list(parameters(operation, "path")), path


def test_the_errors_are_those_of_the_protocol():
    promised = set(re.findall(r"\b[4-5]\d\d\b", " ".join(re.findall(r"^\| ([45].*?) \|", sections()[6], re.MULTILINE))))
    blobs = set(re.findall(r"\b[4-5]\d\d\b", sections()[14]))
    told = {status for each in API["components"]["responses"].values() for status in each.get("x-statuses", ())}
    assert told == (promised | blobs) - OF_PROXIES
    for _, path, operation in operations():
        assert {each for each in operation["responses"] if each[0] in "45" and "X" not in each} <= told, path


def test_every_field_that_the_server_reads_is_described():
    read = set(re.findall(r'\b(?:query|members)(?:\(\))?\.(?:one|names|name|number|flag|needed)\("(\w+)"', SERVER))
    assert len(read) > 10
    assert read <= {name for _, _, operation in operations() for name in parameters(operation, "query")}


def column(section):
    """The words in the first column of the tables of a section."""
    rows = re.findall(r"^\| (`.*?) \|", sections()[section], re.MULTILINE)
    return {word for row in rows for word in re.findall(r"`([\w-]+)`", row)}


def test_the_parameters_of_a_poll_are_those_of_the_protocol():
    assert set(parameters(API["paths"]["/recv"]["get"], "query")) == column(9)


def test_the_members_of_a_message_are_those_of_the_protocol():
    schemas = API["components"]["schemas"]
    assert set(schemas["Draft"]["properties"]) | set(schemas["Message"]["properties"]) == column(3)


def test_the_members_of_work_are_those_of_the_protocol():
    promised, path = {}, None
    for cell, members in re.findall(r"^\| (`/\w+`)? ?\| (`.*?) \|", sections()[13], re.MULTILINE):
        path = cell.strip("`") or path  # a row without one belongs to the row above
        promised.setdefault(path, set()).update(re.findall(r"`(\w+)`", members))
    assert len(promised) == 5
    for path, members in promised.items():
        assert set(parameters(API["paths"][path]["post"], "query")) == members, path


def ask(bus, method, path, query, body=None):
    peer = http.client.HTTPConnection("127.0.0.1", bus.port, timeout=PATIENCE)
    peer.request(method, f"{path}?{urlencode(query)}", body)
    answer = peer.getresponse()
    status, text = answer.status, answer.read()
    peer.close()
    return status, text


def wrong(schema):
    """A value that this schema does not allow, or None if it allows every string."""
    schema = resolved(schema)
    if schema.get("type") == "array":
        return wrong(schema["items"])
    return None if schema.get("type") == "string" and "pattern" not in schema else "z\u00fcrich"


def test_a_value_outside_of_its_schema_is_refused(bus):
    tried = 0
    sent = json.loads(ask(bus, "POST", "/send", BESIDES["send"], b"x")[1])
    for method, path, operation in operations():
        besides = BESIDES.get(operation["operationId"], {})
        body = b"x" if operation["operationId"] in ("send", "ask") else None
        for name, parameter in parameters(operation, "query").items():
            value = wrong(parameter["schema"])
            if value:
                status, text = ask(bus, method, path.format(id=sent["id"]), {**besides, name: value}, body)
                assert status == 400, (path, name, text)
                tried += 1
        for name in parameters(operation, "path"):
            assert ask(bus, method, path.format(**{name: "z"}), {})[0] in (400, 404), path
    assert tried > 30


# With jsonschema: the examples of PROTOCOL.md, which another test compares with what the bus says


@pytest.fixture
def check():
    """Is this value as a schema says? `closed`: with no members but those of the schema, so that it forgets none."""
    jsonschema = pytest.importorskip("jsonschema")

    def check(value, schema, closed=False):
        whole = json.loads(json.dumps({**API, **schema}))
        for each in everything(whole["components"]["schemas"]) if closed else ():
            if "properties" in each:
                each.setdefault("additionalProperties", False)
        jsonschema.Draft202012Validator.check_schema(whole)
        found = next(jsonschema.Draft202012Validator(whole).iter_errors(value), None)
        assert not found, found

    return check


def described(method, path):
    for each, template, operation in operations():
        if each == method and re.fullmatch(re.sub(r"{\w+}", "[^/]+", template), path):
            return operation
    raise AssertionError(f"{method} {path} is not described")


@pytest.mark.parametrize("request_text, answer_text", PAIR.findall(PROTOCOL))
def test_an_example_of_the_protocol_is_as_described(check, request_text, answer_text):
    head, _, body = request_text.partition("\n\n")
    method, target, *_ = head.split()
    operation = described(method, urlsplit(target).path)
    status = re.match(r"HTTP/1\.1 (\d+)", answer_text)[1]
    fields = parameters(operation, "query")
    for name, values in parse_qs(urlsplit(target).query).items():
        schema = resolved(fields[name]["schema"])
        if status == "200" and schema.get("type") in (None, "string"):
            check(values[0], schema)
    if body.strip():
        check(json.loads(body), operation["requestBody"]["content"]["application/json"]["schema"])
    responses = operation["responses"]
    response = resolved(responses.get(status) or responses[f"{status[0]}XX"])
    answer_head, _, answer = answer_text.partition("\n\n")
    kind = "text/plain" if "text/plain" in answer_head else "application/json"
    check(answer if kind == "text/plain" else json.loads(answer), response["content"][kind]["schema"], closed=True)


@pytest.mark.parametrize("schema, value", [
    ("Name", "two words"), ("Id", "XYZ"), ("Draft", {"from": "a", "to": "b"}),
    ("Draft", {"from": "a", "to": [], "msg": ""}), ("Error", {"error": ""}), ("Delivery", {"messages": []}),
    ("Done", {"ok": True, "now": 1, "bus": "0" * 16, "new": 1}),
])  # fmt: skip
def test_what_is_wrong_is_not_as_described(check, schema, value):
    with pytest.raises(AssertionError):
        check(value, {"$ref": f"#/components/schemas/{schema}"}, closed=True)
