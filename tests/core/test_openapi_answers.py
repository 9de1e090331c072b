"""Every answer has the members that docs/openapi.json lists for it, and no others.

`ask_for_everything` and the functions behind it ask for each status of each operation. A new endpoint, status or member
needs a line there, and a test names what has none.
"""
import contextlib
import hashlib
import http.client
import json
import shutil
import threading
import urllib.request
from urllib.parse import urlsplit

import pytest

from bus_server import CLIENTS
from tests.clients.test_clients import refusing
from tests.core.test_openapi import API, described, operations, resolved
from tests.kit.bad_servers import Scripted, answer
from tests.kit.peers import run
from tests.kit.processes import PATIENCE, ROOT, Server, wait_until

SENDERS_OWN = set(API["components"]["schemas"]["Draft"]["properties"])  # a message has those that its sender gave it
KINDS = {"object": dict, "array": list, "string": str, "null": type(None)}
TURNS = 40  # between two names; far more than the others of these requests have
FILE = b"what is in a file"
SHA = hashlib.sha256(FILE).hexdigest()


def differences(value, schema, place, seen):
    """What a value lacks or has too much, in words; `seen` collects (where a member is listed, the member)."""
    if "$ref" in schema:
        place = schema["$ref"].rpartition("/")[2]
    schema = resolved(schema)
    if "oneOf" in schema:
        tried = []
        for number, choice in enumerate(schema["oneOf"]):
            members = set()
            tried.append((list(differences(value, choice, f"{place}, choice {number}", members)), members))
        found, members = min(tried, key=lambda each: len(each[0]))
        seen |= members
        yield from found
    elif schema.get("type") in KINDS and not isinstance(value, KINDS[schema["type"]]):
        yield f"{place} is {value!r}, not of type {schema['type']}"
    elif isinstance(value, list):
        for each in value:
            yield from differences(each, schema["items"], place, seen)
    elif isinstance(value, dict):
        listed, more = schema.get("properties", {}), schema.get("additionalProperties")
        for name in schema.get("required", []):
            if name not in value:
                yield f"{place} has no {name}"
        for name, inner in value.items():
            if name in listed:
                seen.add((place, name))
                yield from differences(inner, listed[name], f"{place}.{name}", seen)
            elif isinstance(more, dict):
                yield from differences(inner, more, f"{place}.*", seen)
            elif not (more and name in SENDERS_OWN):
                yield f"{place}.{name} is not listed"


class Compared:
    """A bus; each of its answers is compared with the document."""

    def __init__(self, bus):
        self.bus = bus
        self.differences = set()
        self.seen = set()  # (where the document lists it, a member)
        self.answered = set()  # (method, path, status), as in the document

    def ask(self, method, target, body=None, **headers):
        """The answer: a value if it is JSON, else bytes."""
        peer = http.client.HTTPConnection("127.0.0.1", self.bus.port, timeout=PATIENCE)
        with contextlib.closing(peer):
            headers = {name.replace("_", "-"): value for name, value in headers.items()}
            peer.request(method, target, json.dumps(body) if isinstance(body, (dict, list)) else body, headers)
            answer = peer.getresponse()
            text = answer.read()
        operation = described(method, urlsplit(target).path)
        status, kind = str(answer.status), answer.headers["Content-Type"].partition(";")[0]
        here = f"{operation['operationId']} {status}"
        listed = status if status in operation["responses"] else f"{status[0]}XX"
        response = resolved(operation["responses"][listed])
        self.answered.add((operation["operationId"], listed))
        for name, header in response.get("headers", {}).items():
            only_then = header["description"].startswith(("if ", "with ")) and "with " + kind != header["description"]
            if name not in answer.headers and not only_then:
                self.differences.add(f"{here} has no header {name}")
        if kind not in response["content"]:
            self.differences.add(f"{here} is {kind}, which is not listed")
        elif kind == "application/json":
            value = json.loads(text)
            self.differences.update(differences(value, response["content"][kind]["schema"], here, self.seen))
            return value
        return text

    def send(self, to, **members):
        return self.ask("POST", "/send", {"from": "ann", "to": to, "msg": "x", **members})

    def claim(self):
        [job] = self.ask("POST", "/claim", {"to": "builds", "wait": 0, "worker": "w1"})["messages"]
        return {"id": job["id"], "lease": job["lease"]}

    def answered_question(self):
        """The id of one that ann asks and dora answers."""
        def answer():
            def questions():
                return [each for each in self.ask("GET", "/recv?to=dora")["messages"] if each["msg"] == "?"]

            [question] = wait_until(questions)
            self.send("ann", **{"from": "dora", "reply_to": question["id"]})

        replier = threading.Thread(target=answer)
        replier.start()
        order = {"from": "ann", "to": "dora", "msg": "?", "key": "question"}
        asked = self.ask("POST", f"/ask?wait={PATIENCE / 2}", order)
        replier.join(PATIENCE)
        assert asked["reply"]
        return asked["id"]


def ask_for_everything(compared):
    ask = compared.ask
    for path in ("/healthz", "/metrics", "/whoami", "/activity?name=ann", "/", "/certificate", *sorted(CLIENTS)):
        ask("GET", path)
        ask("GET", path, Host="evil.example")
    first = ask_for_sends(compared)
    question = ask_for_questions(compared)
    ask_for_reads(compared, first, question)
    ask_for_turns(compared)
    ask_for_recalls(compared, first)
    ask_for_work(compared)
    ask_for_locks(compared)
    ask_for_schedules(compared)
    ask_for_files(ask)
    ask_for_words(compared)
    assert run("prune", "--older", "0", "--pending", "--db", compared.bus.db)[0] == 0
    assert ask("GET", f"/recv?to=dell&since={int(first, 16) / 1e6 - 1:.6f}")["gap"]
    assert compared.send(["dell", "dell2"])["receiver"]["unknown"]["dell2"]["similar"] == ["dell"]


def ask_for_sends(compared):
    """The id of the first."""
    send = compared.send
    every = {"subject": "s", "type": "t", "priority": "high", "content_type": "text/plain", "ttl": 60, "key": "k"}
    first = send("dell", **every)["id"]
    send("dell", **every)
    send("dell", **{**every, "msg": "another text of the same key"})
    send(["dell", "nano"], reply_to=first)
    send("all")
    compared.ask("POST", "/send", [{"from": "ann", "to": to, "msg": "x"} for to in (["dell", "nano"], "eve")])
    send("not a name")
    return first


def ask_for_questions(compared):
    """The id of one that was answered."""
    ask, question = compared.ask, compared.answered_question()
    ask("POST", "/ask", {"from": "ann", "to": "dora", "msg": "another text", "key": "question"})
    for to in ("dell", ["dell", "nano"]):
        ask("POST", "/ask?wait=0", {"from": "ann", "to": to, "msg": "?"})
    ask("POST", "/ask", {})
    return question


def begun(bus):
    """The id of a session of MCP."""
    body = json.dumps({"jsonrpc": "2.0", "id": 1, "method": "initialize"}).encode()
    with urllib.request.urlopen(f"{bus.url}/mcp", body, PATIENCE) as answer:
        return answer.headers["Mcp-Session-Id"]


def ask_for_reads(compared, first, question):
    ask = compared.ask
    for where in ("/recv?to=dell", "/log?x=y"):
        now = ask("GET", where)["now"]
        ask("GET", where, Accept="text/plain")
        ask("GET", f"{where}&since={now}")
        ask("GET", f"{where}&max=x")
    ask("POST", "/status", {"from": "ann", "text": "x", "state": "busy", "cwd": "/", "branch": "main"})
    ask("POST", "/status", {"from": "ann", "state": "asleep"})
    call = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {"name": "bus_inbox"}}
    for body in (call, {"jsonrpc": "2.0", "id": 1, "method": "x"}, {"jsonrpc": "2.0", "method": "x"}, []):
        ask("POST", "/mcp", body, X_Agent_Name="dell")
    ask("POST", "/mcp", call, X_Agent_Name="not a name")
    ask("POST", "/mcp", call, Mcp_Session_Id="7")
    ask("POST", "/mcp", call, Host="evil.example")
    for ident in (begun(compared.bus), "7", ""):
        ask("DELETE", "/mcp", Mcp_Session_Id=ident)
    for query in ("before=now&max=1", "before=1", "before=last"):
        ask("GET", f"/log?{query}")
    for path in ("/ui/index.html", "/ui/app.js", "/ui/style.css", "/ui/icon.svg"):
        ask("GET", path)
    ask("GET", "/ui/none.js")
    ask("GET", "/ui/app.js", Host="evil.example")
    ask("GET", "/", Accept="text/html")
    for path in ("/inbox", "/agents", "/channels"):
        ask("GET", path)
        ask("GET", f"{path}?max=1")
        ask("GET", path, Host="evil.example")
    for path in ("/message", "/thread"):
        for ident in (first, question, "1", "x"):
            ask("GET", f"{path}/{ident}")
        ask("GET", f"{path}/{first}", Host="evil.example")
    ask("GET", f"/thread/{question}?max=1")
    for query in ("to=dell&since=0", "to=nobody", ""):
        ask("GET", f"/digest?{query}")
    compared.send("delll")  # like one that has polled


def ask_for_turns(compared):
    ask, send = compared.ask, compared.send
    for _ in range(TURNS // 8 + 1):  # each is two turns, and a quarter of all is warned of
        send("flo")
        send("ann", **{"from": "flo"})
    ask("POST", "/send", [{"from": "ann", "to": "flo", "msg": "x"}])
    send("ann", **{"from": "flo"})
    ask("POST", "/ask?wait=0", {"from": "ann", "to": "flo", "msg": "?"})


def ask_for_recalls(compared, first):
    recalled = compared.send("nano")["id"]
    for ident in (recalled, recalled, first, "1", ""):
        compared.ask("POST", "/recall", {"id": ident})
    compared.ask("GET", f"/message/{recalled}")


def ask_for_words(compared):
    """Searches, and a redaction."""
    ask, secret = compared.ask, compared.send("dell", msg="a secret word")["id"]
    for query in ("q=secret", "q=x&max=1", ""):
        ask("GET", f"/search?{query}")
    ask("GET", f"/recv?to=dell&since={int(secret, 16) / 1e6 - 0.001:.6f}")
    for ident in (secret, "1", ""):
        ask("POST", "/redact", {"id": ident})
    ask("GET", f"/message/{secret}")
    ask("GET", f"/log?since={int(secret, 16) / 1e6 - 0.001:.6f}")
    ask("POST", "/search")
    ask("POST", "/search", Host="evil.example")


def ask_for_work(compared):
    ask = compared.ask
    for way, more in (("ack", {}), ("nack", {"delay": 0, "reason": "no"}), ("extend", {"seconds": 60})):
        jobs = [compared.send("builds")["id"], compared.claim()]
        ask("GET", f"/message/{jobs[0]}")
        ask("POST", f"/{way}", {**jobs[1], **more})
        ask("GET", f"/message/{jobs[0]}")
        ask("POST", f"/{way}", {**jobs[1], "lease": "another's"})
        ask("POST", f"/{way}", {})
        if way == "nack":
            ask("POST", "/ack", compared.claim())
    job = [compared.send("builds"), compared.claim()][1]
    for _ in range(4):
        ask("POST", "/nack", job)
        job = compared.claim()
    ask("POST", "/nack", job)
    letter = json.loads(compared.bus.get("/log?to=builds.dead"))["messages"][-1]
    for body in ({"id": letter["id"]}, {"id": letter["id"]}, {"id": "1"}, {}):
        ask("POST", "/again", body)
    ask("POST", "/claim", {"to": "builds", "wait": 0})
    ask("GET", "/agents")  # with a queue
    ask("POST", "/claim", {})


def ask_for_locks(compared):
    def lock(holder, **more):
        return compared.ask("POST", "/lock", {"from": holder, "names": ["src/*.py"], "why": "T1", **more})

    ask, fence = compared.ask, lock("ann")["fence"]
    lock("bob")
    lock("bob", names=["src/b.py", "docs"], wait=1)
    lock("bob", names=[])
    lock("bob", names=["docs"])
    waiting = threading.Thread(target=lock, args=("bob",), kwargs={"wait": PATIENCE})
    waiting.start()
    wait_until(lambda: ask("GET", "/locks?max=1")["locks"][0]["waiting"])
    for body in ({"fence": fence}, {"fence": 1}, {}):
        ask("POST", "/renew", {"from": "ann", **body})
    ask("GET", "/locks")
    ask("GET", "/locks?max=x")
    ask("POST", "/unlock", {"from": "ann", "fence": fence})
    ask("POST", "/unlock", {"from": "ann"})
    waiting.join(PATIENCE)


def ask_for_schedules(compared):
    ask, message = compared.ask, {"from": "ann", "to": "dell", "msg": "x", "subject": "s"}
    order = {"cron": "0 0 29 2 *", "message": message, "key": "schedule"}
    ids = [ask("POST", "/later", {"after": after, "message": message})["id"] for after in (900, 800)]
    for body in (order, order, {**order, "cron": "0 0 1 1 *"}, {}, {"cancel": ids[0]}, {"cancel": ids[0]}):
        ask("POST", "/later", body)
    ask("POST", "/later", {"after": 900, "message": {**message, "to": ["dell", "nano"]}})
    ask("GET", "/later")
    ask("GET", "/later?max=1")
    ask("GET", "/later", Host="evil.example")


APART = "loaded('notify', lambda module: setattr(module, 'APART', 0))"  # a notice is tried again at once


def ask_for_notices(compared, folder):
    """It needs a bus with rules: one of its two webhooks does not take notices."""
    with Scripted(answer({})) as webhook:
        url, nowhere = webhook.url, refusing()
        rules = [{"rule": each.rpartition(":")[2], "when": "urgent", "template": "ntfy", "url": each}
                 for each in (url, nowhere)]  # fmt: skip
        rules.append({"rule": "silent", "when": "silent", "to": "dell", "template": "ntfy", "url": url})
        file = folder / "rules.json"
        file.write_text(json.dumps({"hosts": [each.partition("//")[2] for each in (url, nowhere)], "rules": rules}))
        file.chmod(0o600)
        program = (str(ROOT / "tests/kit/raising_server.py"),)
        settings = {"program": program, "env": {"PATCH": APART, "FAULT_PORT": "0"}}
        with Server(folder / "told.db", "--notify", str(file), **settings) as compared.bus:
            compared.send("dell", priority="high")
            wait_until(lambda: compared.ask("GET", "/notices")["dead"])
            wait_until(lambda: compared.ask("GET", "/notices")["rules"][0]["last"])
            compared.ask("GET", "/notices", Host="evil.example")


def ask_for_files(ask):
    half = len(FILE) // 2
    ask("GET", f"/blob/{SHA}")
    for begin, end in ((0, half), (0, half), (half, len(FILE))):
        ask("PUT", f"/blob/{SHA}", FILE[begin:end], Content_Range=f"bytes {begin}-{end - 1}/{len(FILE)}")
    ask("PUT", f"/blob/{SHA}", FILE)
    ask("PUT", f"/blob/{'0' * 64}", FILE)
    ask("PUT", f"/blob/{'0' * 64}", b"x", Content_Range="bytes 7-7/9")
    ask("PUT", "/blob/x", b"x")
    ask("PUT", f"/blob/{SHA}", b"x", Content_Range="x")
    ask("GET", f"/blob/{SHA}", Host="evil.example")
    ask("GET", f"/blob/{SHA}")
    ask("GET", f"/blob/{SHA}", Range="bytes=3-")
    ask("GET", f"/blob/{SHA}", Range=f"bytes={len(FILE)}-")
    ask("GET", "/blob/x")


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """Three buses that were asked for everything: the last has no clients beside its file."""
    folder = tmp_path_factory.mktemp("compared")
    with Server(folder / "bus.db", "--turns", str(TURNS)) as bus:
        compared = Compared(bus)
        ask_for_everything(compared)
    ask_for_notices(compared, folder)
    shutil.copy(ROOT / "bus_server.py", folder)
    with Server(folder / "alone.db", program=("-S", str(folder / "bus_server.py"))) as compared.bus:
        for path in ("/certificate", *sorted(CLIENTS)):
            compared.ask("GET", path)
    return compared


def test_every_answer_has_the_members_that_the_document_lists_and_no_others(compared):
    assert compared.differences == set()


def test_every_status_that_the_document_lists_was_answered(compared):
    listed = {(operation["operationId"], status) for _, _, operation in operations()
              for status in operation["responses"] if status != "5XX"}  # a defect, or a machine that fails
    assert listed - compared.answered == {("certificate", "200")}  # test_transport.py has a bus that speaks TLS


def listed_members(schema, place, done):
    """Those of a schema and of all in it, as `differences` names them."""
    if "$ref" in schema:
        place = schema["$ref"].rpartition("/")[2]
        if place in done:
            return
        done.add(place)
    schema = resolved(schema)
    for number, choice in enumerate(schema.get("oneOf", [])):
        yield from listed_members(choice, f"{place}, choice {number}", done)
    for name, inner in schema.get("properties", {}).items():
        yield place, name
        yield from listed_members(inner, f"{place}.{name}", done)
    for inner in (schema.get("items"), schema.get("additionalProperties")):
        if isinstance(inner, dict):
            yield from listed_members(inner, place, done)


def test_every_member_that_the_document_lists_was_in_an_answer(compared):
    listed, done = set(), set()
    for _, _, operation in operations():
        for status, response in operation["responses"].items():
            for kind, content in resolved(response)["content"].items():
                if kind == "application/json" and status != "5XX":
                    listed |= set(listed_members(content["schema"], f"{operation['operationId']} {status}", done))
    of_fronts = {("Health", name) for name in ("position", "fronts", "ledger")}  # ledgers/test_heartbeat.py has them
    of_fronts |= {("Health.ledger", name) for name in ("leads", "waits_for")}
    assert len(listed) > 60 and listed - compared.seen == of_fronts
