#!/usr/bin/env python3
"""Does a bus keep the promises of PROTOCOL.md?

A real server, real clients, and one numbered sentence for each promise.

    python3 test_bus.py
        starts bus_server.py on a free port and checks it
    BUS_URL=http://host:8080 python3 test_bus.py
        checks a running server of any make, for the first contract only
    BUS_URL=... BUS_OURS=1 python3 test_bus.py
        checks a running server for all of PROTOCOL.md
    AGENT_BUS_TOKEN=abt_... BUS_URL=... BUS_OURS=1 python3 test_bus.py
        the same on a bus with tokens; the token must be an operator's

The number of a check is the section of PROTOCOL.md that makes the promise, and
a place in that section: the promise marked [9.4] there is check 9.4 here. The
checks run in the order of the protocol.

Some sections are kept by an extension, one file in bus_extensions/ (EXTENSIONS
below lists them). If the bus answers 404 to the endpoint of an extension, its
section is skipped, and the lines before the last one name what was skipped and
why. If this program started the bus itself and the file of the extension is
there, the section is not skipped.

The program needs nothing installed. With pytest, `pytest test_bus.py` collects
the same checks. Every check uses names of its own, so no mail of others is
touched; but some hundred names of the checks stay on the bus until --keep, and
check 9.18 may set its time ahead, by 5 minutes at most: take a bus on which
this is no harm. It takes no arguments. Its last line is ALL TESTS PASS, and its
exit code 0; or the exit code is 1 if a check failed, and 2 if it was given an
argument.
"""

import collections
import concurrent.futures
import contextlib
import decimal
import functools
import hashlib
import http.client
import itertools
import json
import os
import pathlib
import re
import socket
import ssl
import subprocess
import sys
import tempfile
import time
import traceback
import typing
import urllib.parse
import uuid

# Python 3.8 prints this text. Older ones show the line in a SyntaxError, because they do not know `:=`.
if sys.version_info < (3, 9) and (needs := "test_bus.py needs Python 3.9 or later"):  # noqa: UP036
    sys.exit(needs)

HERE = pathlib.Path(__file__).resolve().parent
PATIENCE = 20  # s for a client program to finish; a program that takes longer hangs
QUICK = 10  # s in which an answer comes that nobody holds; no hold that it is compared with is shorter than 20 s


class Extension(typing.NamedTuple):
    """A part of the protocol that a bus may lack, and the request that shows whether this bus has it."""

    name: str
    file: str  # in bus_extensions/, beside bus_server.py
    method: str
    path: str  # a bus with the extension answers anything but 404, if only that it takes another method


SECTIONS = {
    2: "Conventions",
    3: "A message and its life",
    5: "Identity",
    6: "Errors",
    7: "Endpoints",
    8: "Sending",
    9: "Receiving",
    10: "The log",
    11: "Inbox, agents, one message, health",
    12: "Questions, threads, recall",
    13: "Queues",
    14: "Files",
    15: "Metrics",
    17: "Channels",
    18: "People",
    20: "Digest",
    21: "MCP over HTTP",
    22: "History of the log",
    23: "Page",
    24: "Reservations",
    25: "Search",
    26: "Redaction",
    27: "Schedules",
    28: "Notices",
}
EXTENSIONS = {  # by the number of the section that it keeps
    12: Extension("questions", "replies.py", "POST", "/ask"),
    13: Extension("queues", "work.py", "POST", "/claim"),
    14: Extension("files", "files.py", "POST", "/blob/not-a-hash"),
    15: Extension("metrics", "metrics.py", "GET", "/metrics"),
    17: Extension("channels", "channels.py", "GET", "/channels"),
    18: Extension("people", "people.py", "GET", "/whoami"),
    20: Extension("digests", "digest.py", "GET", "/digest"),
    21: Extension("tools by MCP", "mcp.py", "POST", "/mcp"),
    22: Extension("history", "history.py", "GET", "/log?before=now"),
    23: Extension("page", "page.py", "GET", "/ui/"),
    24: Extension("reservations", "locks.py", "GET", "/locks"),
    25: Extension("search", "search.py", "GET", "/search?q=a"),
    26: Extension("redaction", "redact.py", "POST", "/redact"),
    27: Extension("schedules", "later.py", "GET", "/later"),
    28: Extension("notices", "notify.py", "GET", "/notices"),
}
(QUESTIONS, QUEUES, FILES, METRICS, CHANNELS, PEOPLE, DIGEST, MCP, HISTORY, PAGE, LOCKS, SEARCH,
 REDACTION, LATER, NOTICES) = EXTENSIONS.values()  # fmt: skip


class Bus:
    """A bus to check, over http.client: what a client in another language would send."""

    def __init__(self, url, token="", mine=False):
        self.url, self.token = url.rstrip("/"), token
        self.mine = mine  # this program has started it, from the files that are here
        self.absent = {}  # extension: why it is absent; filled when somebody asks
        self.parts = urllib.parse.urlsplit(self.url)
        self.me = self.named_by_token() if token else "tester"

    def named_by_token(self):
        """The name that the token sends as, which is the only one it may give as `from`."""
        status, sent = self.json("POST", f"/send?to={fresh()}", "whose token is this?")
        assert status == 200, sent
        return self.json("GET", f"/message/{sent['id']}")[1]["message"]["from"]

    def lacks(self, extension):
        """Why this bus does not have the extension, in words; "" if it has it."""
        if extension not in self.absent:
            self.absent[extension] = self.reason_without(extension)
        return self.absent[extension]

    def reason_without(self, extension):
        if self.mine and (HERE / "bus_extensions" / extension.file).exists():
            return ""  # the file is there, so a 404 is a fault and not an excuse
        status, _, text = self.ask(extension.method, extension.path, "{}" if extension.method == "POST" else None)
        if status != 404:
            return ""
        try:
            error = str(json.loads(text)["error"])
        except (ValueError, TypeError, LookupError):
            error = ""
        option = re.search(rf"--without [\w,]*\b{extension.file[:-3]}\b", error)
        if option:
            return f"the bus was started {option[0]}"
        if f"bus_extensions/{extension.file}" in error:
            return f"bus_extensions/{extension.file} is not there"
        return f"{extension.path} is answered 404"

    def ask(self, method, path, body=None, **headers):
        """(status, headers, body bytes) of one request on a connection of its own."""
        secure = self.parts.scheme == "https"
        given = {"context": trusted()} if secure else {}
        kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        connection = kind(self.parts.netloc, timeout=90, **given)
        if isinstance(body, str):
            body = body.encode()
        given = {name.replace("_", "-"): value for name, value in headers.items() if value is not None}
        mine = {"User-Agent": "Mozilla/5.0"}
        if self.token and "Authorization" not in headers:
            mine["Authorization"] = f"Bearer {self.token}"
        with contextlib.closing(connection):
            connection.request(method, self.parts.path + path, body, {**mine, **given})
            answer = connection.getresponse()
            return answer.status, answer.headers, answer.read()

    def json(self, method, path, body=None, **headers):
        """(status, JSON) of one request."""
        status, _, text = self.ask(method, path, body, **headers)
        return status, json.loads(text, parse_float=str)

    def get(self, path):
        """The JSON of a GET that must succeed."""
        status, answer = self.json("GET", path)
        assert status == 200, (status, answer)
        return answer

    def post(self, path, **members):
        """The JSON of a POST that must succeed."""
        status, answer = self.json("POST", path, json.dumps(members))
        assert status == 200, (status, answer)
        return answer

    def send(self, to, msg="hello", **members):
        """The answer to a send that must succeed."""
        answer = self.post("/send", **{"from": self.me, "to": to, "msg": msg, **members})
        assert answer["ok"] is True, answer
        return answer

    def message(self, **members):
        """A good message, as it is before it is sent, and with these members."""
        return {"from": self.me, "to": fresh(), "msg": "hello", **members}

    def refused(self, fields, path="/send", **headers):
        """The status of a POST that must be refused in words."""
        body = fields if isinstance(fields, (str, bytes)) else json.dumps(fields)
        status, answer = self.json("POST", path, body, **headers)
        assert status >= 400 and answer["error"], (status, answer)
        return status

    def recv(self, to, since="0", **query):
        """The answer to a poll that must succeed. A gap alone is answered at once: then the poll goes on behind it."""
        answer = self.get("/recv?" + urllib.parse.urlencode({"to": to, "since": since, **query}, doseq=True))
        alone = "gap" in answer and not answer["messages"] and answer["now"] != since
        return self.recv(to, answer["now"], **query) if alone else answer

    def texts(self, to, since="0", **query):
        return [message["msg"] for message in self.recv(to, since, **query)["messages"]]

    def status_of_poll(self, **query):
        return self.json("GET", "/recv?" + urllib.parse.urlencode(query))[0]

    def state(self, ident, query=""):
        return self.get(f"/message/{ident}{query}")["state"]

    def raw(self, *lines, body=b""):
        """The statuses of all that is answered to these lines, up to the end that the bus makes."""
        if self.token:
            lines = [*lines, f"Authorization: Bearer {self.token}"]
        sent = "\r\n".join([*lines, "", ""]).encode("latin-1") + body
        port = self.parts.port or (443 if self.parts.scheme == "https" else 80)
        with socket.create_connection((self.parts.hostname, port), timeout=PATIENCE) as peer:
            if self.parts.scheme == "https":
                peer = trusted().wrap_socket(peer, server_hostname=self.parts.hostname)
            peer.sendall(sent)
            heard = b"".join(iter(lambda: peer.recv(65536), b""))
        return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", heard)]

    def head(self, target="/healthz", *lines):
        """The lines of a head with this target; what it asks for is the last on its connection."""
        return f"GET {self.parts.path}{target} HTTP/1.1", f"Host: {self.parts.netloc}", "Connection: close", *lines

    def run(self, program, *arguments, stdin="", **env):
        """A client program that ends by itself: (exit code, stdout, stderr)."""
        state = tempfile.mkdtemp(prefix="agent-bus-test-")
        mine = {"AGENT_BUS_URL": self.url, "AGENT_BUS_STATE_DIR": state}
        mine["AGENT_BUS_CA"] = os.environ.get("AGENT_BUS_CA", "")
        if self.token:
            mine["AGENT_BUS_TOKEN"] = self.token
        theirs = {name: value for name, value in os.environ.items() if not name.startswith("AGENT_")}
        done = subprocess.run(
            [sys.executable, str(HERE / program), *arguments],
            input=stdin.encode(),
            env={**theirs, **mine, **env},
            capture_output=True,
            timeout=PATIENCE,
        )
        return done.returncode, done.stdout.decode(), done.stderr.decode()


def trusted():
    """The certificates that the clients trust, too."""
    return ssl.create_default_context(cafile=os.environ.get("AGENT_BUS_CA") or None)


@contextlib.contextmanager
def running():
    """The bus named by BUS_URL, or one of our own on a free port with an empty database."""
    if os.environ.get("BUS_URL"):
        yield reached(os.environ["BUS_URL"], os.environ.get("AGENT_BUS_TOKEN", "").strip())
        return
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(HERE / "bus_server.py"), "--port", "0", "--db", os.path.join(folder, "bus.db")]
        server = subprocess.Popen(command, stdout=subprocess.PIPE)
        try:
            first = server.stdout.readline().decode()
            assert first.startswith("listening on "), first
            yield Bus(first.split()[-1], mine=True)
        finally:
            server.terminate()
            code = server.wait(PATIENCE)
            server.stdout.close()
            assert code == 0, f"the server exited with {code} after SIGTERM"


def reached(url, token):
    """The bus at this URL; or one sentence and the end, if no check could pass there."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        sys.exit(f"test_bus: BUS_URL must be like http://host:8080, and is {url!a}")
    try:
        socket.create_connection((parts.hostname, parts.port or {"http": 80}.get(parts.scheme, 443)), 10).close()
    except (OSError, ValueError) as error:  # ValueError: the port is no number
        sys.exit(f"test_bus: no bus at {url} ({getattr(error, 'strerror', None) or error}): does it run there?")
    bus, whose = Bus(url), {}
    bus.token = token
    try:
        bus.ask("GET", "/healthz")
    except ssl.SSLError as error:
        sys.exit(f"test_bus: {url} is not trusted ({error.reason}): set AGENT_BUS_CA to the file of its certificate")
    except (OSError, http.client.HTTPException):  # the checks will tell
        pass
    with contextlib.suppress(OSError, ValueError, http.client.HTTPException):  # the checks will tell
        whose = bus.json("GET", "/whoami")[1]
        whose = whose if isinstance(whose, dict) else {}
        if bus.ask("GET", "/inbox")[0] == 401 or not whose.get("operator", True):
            what = "this token is not one of an operator" if token else "the bus has tokens"
            sys.exit(f"test_bus: {url}: {whose.get('error', what)}: set AGENT_BUS_TOKEN to the token of an operator")
    return Bus(url, token)


def ours(check):
    """Mark a check of something that the first contract did not have."""
    check.ours = True
    return check


def open_only(check):
    """Mark a check that sends under several names, or without a name: a bus with tokens forbids both."""
    check.needs = "a bus without tokens"
    return ours(check)


def closed_only(check):
    """Mark a check of what tokens protect."""
    check.needs = "AGENT_BUS_TOKEN, the token of an operator"
    return ours(check)


def part_of(extension):
    """Mark a check that needs an extension other than the one of its section."""

    def mark(check):
        check.extension = extension
        return check

    return mark


def section_of(check):
    return int(check.__doc__.partition(".")[0])


def extension_of(check):
    """The extension that keeps this promise; None if it is the core's."""
    return getattr(check, "extension", None) or EXTENSIONS.get(section_of(check))


NOT_FIRST = "not in the first contract: BUS_OURS=1 checks it"


def reason_to_skip(check, bus):
    """Why this check cannot be made of this bus, in words; None if it can."""
    if hasattr(check, "ours") and os.environ.get("BUS_URL") and not os.environ.get("BUS_OURS"):
        return NOT_FIRST
    needs = getattr(check, "needs", None)
    if needs and bool(bus.token) is (needs == "a bus without tokens"):
        return f"needs {needs}"
    extension = extension_of(check)
    lacks = bus.lacks(extension) if extension else ""
    return f"needs {extension.name}: {lacks}" if lacks else None


def fresh(name="agent"):
    return f"{name}-{uuid.uuid4().hex[:12]}"


def in_background(action, *arguments, **options):
    pool = concurrent.futures.ThreadPoolExecutor(1)
    future = pool.submit(action, *arguments, **options)
    pool.shutdown(wait=False)
    return future


def soon(fact):
    """Wait until fact() is true."""
    deadline = time.monotonic() + PATIENCE
    while not fact():
        assert time.monotonic() < deadline, f"not true after {PATIENCE} s"
        time.sleep(0.01)


def agent(bus, name, channel="default"):
    """What /agents says of a name: its last poll, its cursor, and whether it is online. {} if it never polled."""
    found = bus.get(f"/agents?name={name}&channel={channel}")["agents"]
    return found[0] if found else {}


def unread(bus, name, channel="default"):
    """What /inbox counts for a name."""
    return bus.get(f"/inbox?name={name}&channel={channel}")["recipients"][channel][name]


def pages(bus, path):
    """The answers to a list that ends early, up to its end."""
    answer = bus.get(path)
    yield answer
    while answer.get("more"):
        answer = bus.get(path + ("&" if "?" in path else "?") + urllib.parse.urlencode({"after": answer["next"]}))
        yield answer


def parked(bus, name, since):
    """The future of the answer to a poll that the bus is holding now.

    That the name is online does not show it: it stays online for seconds after its last poll. The bus has this very
    poll when the time of the last poll is another one than before, and the cursor that the poll presents is taken.
    """
    before = agent(bus, name).get("last_seen")
    answer = in_background(bus.recv, name, block="true", since=since)

    def has_come():
        now = agent(bus, name)
        return now and now["last_seen"] != before and tick(now["cursor"]) >= tick(since)

    soon(has_come)
    assert not answer.done(), "the poll was answered at once, though it found nothing"
    return answer


def tick(ts):
    """The microseconds of a ts."""
    return int(decimal.Decimal(ts) * 1000000)


def took(action, *arguments, **options):
    """(seconds, answer) of a call."""
    began = time.monotonic()
    answer = action(*arguments, **options)
    return time.monotonic() - began, answer


# ── 2. Conventions ───────────────────────────────────────────────────────────────────────────────────────────────────


@ours
def test_names_are_1_to_64_characters_and_not_all_of_them(bus):
    """2.1 every valid name works as receiver, channel and reader, and every invalid name is refused with 400"""
    channel = fresh("channel")
    for name in ("spark", "build@gb10", "architect:swarm-1", "T1", "a" * 64, "0._:@-"):
        bus.send(name, channel=channel)
        assert bus.texts(name, channel=channel) == ["hello"], name
    assert bus.texts("SPARK", channel=channel) == []
    for name in (".spark", "two words", "z\u00fcrich", "", "a" * 65, "spark\n", "-a", "a/b", None, 7):
        assert bus.refused(bus.message(to=name)) == 400, name
        assert not name or bus.refused(bus.message(channel=name)) == 400, name
        assert bus.status_of_poll(to=name) == 400 or isinstance(name, (int, type(None))), name


@open_only
def test_senders_have_names_and_none_that_is_reserved(bus):
    """2.2 an invalid name is refused as a sender (400), and so is a reserved name in any case"""
    for sender in ("all", "system", "operator", "user", "User", "SYSTEM", ".spark", "a" * 65, ""):
        assert bus.refused(bus.message(**{"from": sender})) == 400, sender


def test_a_message_is_for_its_mailbox_only(bus):
    """2.3 a message is seen by its receiver, on its channel, and by nobody else"""
    to, other = fresh(), fresh()
    bus.send(to, "here")
    bus.send(to, "there", channel="lab")
    assert bus.texts(to) == bus.texts(to, channel="default") == ["here"]
    assert bus.texts(to, channel="lab") == ["there"] and bus.texts(other) == []


@ours
def test_times_are_microseconds_and_a_float_keeps_them(bus):
    """2.4 times have six digits, and a reader that keeps its cursor as a 64-bit float misses and repeats nothing"""
    to = fresh()
    bus.json("POST", "/send", json.dumps([bus.message(to=to, msg=str(number)) for number in range(4)]))
    messages = bus.recv(to)["messages"]
    assert all(re.fullmatch(r"[0-9]{10}\.[0-9]{6}", message["ts"]) for message in messages)
    for place, message in enumerate(messages, 1):
        ts = float(message["ts"])
        for since in (message["ts"], repr(ts), f"{ts:.6f}", f"{ts:.7f}", f"{ts:.17g}"[:20]):
            assert bus.texts(to, since=since) == [str(number) for number in range(place, 4)], since


def test_a_long_message_passes(bus):
    """2.5 a msg of 64 KiB arrives unchanged"""
    to, text = fresh(), "0123456789abcdef" * 4096
    bus.send(to, text)
    assert bus.texts(to) == [text]


@ours
def test_a_body_has_its_limit(bus):
    """2.6 a body of 262144 bytes is stored; with one byte more it is refused with 413, and nothing is stored"""
    to = fresh()
    body = json.dumps(bus.message(to=to)).ljust(262144)
    assert bus.json("POST", "/send", body)[0] == 200
    assert bus.refused(body + " ") == 413
    assert len(bus.texts(to)) == 1


@ours
def test_what_a_reader_could_choke_on_is_refused(bus):
    """2.7 bad UTF-8, NaN, NUL, lone surrogates, repeated members and JSON 33 levels deep are refused and not stored"""
    to = fresh()
    start = json.dumps(bus.message(to=to))[:-1].encode()
    for rest in (
        b'"x": NaN',
        b'"x": -Infinity',
        b'"x": 01',
        b'"x": "\\u0000"',
        b'"\\u0000": 1',
        b'"x": "\x00"',
        b'"x": "\\ud800"',
        b'"x": "\xff"',
        b'"x": 1, "x": 1',
        b'"msg": "again"',
        b'"x": ' + b"[" * 32 + b"]" * 32,
    ):
        assert bus.refused(start + b", " + rest + b"}") == 400, rest
    assert bus.texts(to) == []
    assert bus.json("POST", "/send", start + b', "x": ' + b"[" * 31 + b"]" * 31 + b"}")[0] == 200


@ours
def test_answers_are_ascii(bus):
    """2.8 characters outside ASCII come back escaped, so that they pass through every pipe"""
    to = fresh()
    sent = bus.send(to, "\u00e9 \U0001f41d \u2028", subject="\u4e2d")
    for path in (f"/recv?to={to}", f"/message/{sent['id']}"):
        text = bus.ask("GET", path)[2]
        assert text.isascii() and json.dumps("\u00e9 \U0001f41d \u2028").encode() in text


@ours
def test_a_head_has_its_limits(bus):
    """2.9 a request line of 8192 bytes, a head of 16384 bytes and 64 headers pass; more gets 414, 431 and 431"""
    line = len(bus.head()[0])
    assert bus.raw(*bus.head("/healthz?" + "a" * (8191 - line))) == [200]
    assert bus.raw(*bus.head("/healthz?" + "a" * (8192 - line))) == [414]
    mine = len(f"Authorization: Bearer {bus.token}\r\n") if bus.token else 0
    rest = 16384 - len("\r\n".join([*bus.head("/healthz", "A: "), "", ""])) - mine
    assert bus.raw(*bus.head("/healthz", "A: " + "b" * rest)) == [200]
    assert bus.raw(*bus.head("/healthz", "A: b" + "b" * rest)) == [431]
    more = 64 - len(bus.head()[1:]) - bool(bus.token)
    assert bus.raw(*bus.head("/healthz", *["A: b"] * more)) == [200]
    assert bus.raw(*bus.head("/healthz", *["A: b"] * (more + 1))) == [431]


@ours
def test_every_answer_names_its_bus(bus):
    """2.11 every JSON answer with status 200 has the id of the bus and now, which is a tick"""
    to = fresh()
    sent = bus.send(to)
    identity = sent["bus"]
    for path in (f"/recv?to={to}", "/log?since=now", "/inbox", "/agents", f"/message/{sent['id']}", "/healthz"):
        answer = bus.get(path)
        assert answer["bus"] == identity and tick(answer["now"]) >= tick(sent["now"]), path


@ours
def test_a_byte_order_mark_before_json_is_ignored(bus):
    """2.13 JSON that begins with a byte order mark is read as if it had none"""
    to = fresh()
    assert bus.json("POST", "/send", "\ufeff" + json.dumps(bus.message(to=to)))[0] == 200
    assert bus.texts(to) == ["hello"]


@ours
def test_unknown_members_of_a_query_are_ignored(bus):
    """2.14 a member of a query that the bus does not know changes nothing"""
    to, unknown, start = fresh(), "x-new=1&X=&x-new=2", bus.get("/log?since=now")["now"]
    status, sent = bus.json("POST", f"/send?{unknown}", json.dumps(bus.message(to=to)))
    assert status == 200 and bus.recv(to, **{"x-new": 1})["messages"][0]["id"] == sent["id"]
    assert [one["id"] for one in bus.get(f"/log?to={to}&since={start}&{unknown}")["messages"]] == [sent["id"]]
    assert bus.get(f"/inbox?name={to}&{unknown}")["recipients"] == {"default": {to: 1}}
    assert [one["name"] for one in bus.get(f"/agents?name={to}&{unknown}")["agents"]] == [to]
    assert bus.state(sent["id"], f"?{unknown}") == "fetched" and bus.get(f"/healthz?{unknown}")["ok"] is True


@ours
@open_only
def test_a_reserved_name_is_refused_with_another_one(bus):
    """2.17 the error for a reserved sender has the reason and a name that is free; root and claude may send"""

    def answer(sender):
        return bus.json("POST", "/send", json.dumps(bus.message(**{"from": sender})))

    for sender in ("all", "System", "operator", "USER"):
        status, refused = answer(sender)
        another = re.search(r"reserved, because .* use ([\w-]+) or", refused["error"])[1]
        assert status == 400 and another.startswith(f"{sender.lower()}-") and answer(another)[0] == 200
    assert [answer(sender)[0] for sender in ("root", "claude")] == [200, 200]


@ours
def test_what_the_first_contract_took_is_taken(bus):
    """2.18 block=True, an empty since and an empty or null channel are those of the first contract"""
    to = fresh()
    for channel in ("", None):
        assert bus.post("/send", **bus.message(to=to, channel=channel))["channel"] == "default"
    assert bus.json("POST", f"/send?from={bus.me}&to={to}&channel=", "hello")[1]["channel"] == "default"
    last = bus.recv(to, since="", channel="", block="TRUE")
    assert len(last["messages"]) == 3
    for word, least in (("True", 0.299), ("False", 0)):
        seconds, answer = took(bus.recv, to, since=last["now"], block=word, wait="0.3")
        assert answer["messages"] == [] and seconds >= least, word


# ── 3. A message and its life ────────────────────────────────────────────────────────────────────────────────────────


def test_a_malformed_send_is_refused_and_nothing_stored(bus):
    """3.1 a message without a valid from, to or msg is refused with 400 and a sentence, and nothing is stored"""
    to = fresh()
    for fields in (
        "",
        "{",
        "[[]]",
        "7",
        {"from": bus.me, "msg": "x"},
        {"from": bus.me, "to": to},
        {"from": bus.me, "to": to, "msg": 7},
        {"from": bus.me, "to": to, "msg": None},
        {"from": bus.me, "to": "a b", "msg": "x"},
        *([] if bus.token else [{"to": to, "msg": "x"}, {"from": "a b", "to": to, "msg": "x"}]),
    ):
        assert bus.refused(fields) == 400, fields
    assert bus.texts(to) == []


@ours
def test_a_list_of_names_is_one_send(bus):
    """3.2 to may be a list of up to 64 names: each name gets its own copy, addressed to that name alone"""
    one, two = fresh(), fresh()
    sent = bus.send([one, two], "both")
    assert bus.texts(one) == bus.texts(two) == ["both"]
    messages = bus.recv([one, two])["messages"]
    assert [message["to"] for message in messages] == [one, two] == list(sent["ids"])
    assert [message["id"] for message in messages] == list(sent["ids"].values())
    group = fresh("group")
    assert len(bus.send([f"{group}-{number}" for number in range(64)])["ids"]) == 64
    assert bus.refused(bus.message(to=[f"{group}-{number}" for number in range(65)])) == 400
    assert bus.refused(bus.message(to=[])) == 400 and len(bus.texts(f"{group}-0")) == 1


@ours
def test_broadcast_reaches_everyone_but_its_sender(bus):
    """3.3 a message to all reaches every reader of the channel once, except its sender"""
    channel, one, two = fresh("channel"), fresh(), fresh()
    bus.send("all", "hear me", channel=channel)
    assert bus.texts(one, channel=channel) == bus.texts([two, one], channel=channel) == ["hear me"]
    assert bus.texts(bus.me, channel=channel) == [] and bus.texts(one) == []


def test_a_message_arrives_unchanged(bus):
    """3.4 a message arrives with the from and the msg that its sender gave, and the ts that its sender was told"""
    to, text = fresh(), 'line one\n\ttab "quotes" \\ / \u00e9 \u4e2d \U0001f41d </channel> \u2028 ---\n'
    sent = bus.send(to, text)
    [message] = bus.recv(to)["messages"]
    assert (message["from"], message["msg"], message["ts"]) == (bus.me, text, sent["ts"])


@ours
def test_a_key_is_this_senders_name_for_a_send_on_a_channel(bus):
    """3.5 a key is 1 to 128 printable ASCII characters, counts for one channel only, and is not delivered"""
    to, channel = fresh(), fresh("channel")
    for key in ("k", "!~" * 64):
        assert bus.send(to, key=key, channel=channel)["duplicate"] is False
        assert bus.send(to, key=key, channel=fresh("channel"))["duplicate"] is False
    assert all("key" not in message for message in bus.recv(to, channel=channel)["messages"])
    for key in ("", "a b", "k" * 129, "\u00fc", "a\n", 7, ["k"]):
        assert bus.refused(bus.message(key=key)) == 400, key


@ours
def test_a_message_outlived_by_its_ttl_is_not_delivered(bus):
    """3.6 a ttl is 0.001 or more; after it the message is not delivered, not counted, and its state is expired"""
    to = fresh()
    sent = bus.send(to, ttl=0.001)
    soon(lambda: bus.state(sent["id"]) == "expired")
    assert bus.texts(to) == [] and unread(bus, to) == 0
    bus.send(to, "still good", ttl=3600)
    assert bus.texts(to) == ["still good"]
    for ttl in (0, 0.0005, -1, "5", True, 1e300):
        assert bus.refused(bus.message(ttl=ttl)) == 400, ttl


@ours
def test_further_members_pass_unchanged(bus):
    """3.7 reply_to, the conventional members and unknown members arrive as the sender gave them"""
    to = fresh()
    extra = {"subject": "S", "type": "result", "priority": "urgent?", "content_type": "text/markdown", "reply_to": "65"}
    extra |= {"x-new": [1, {"a": None, "b": [True, 1.5, -7, "\u00e9"]}], "Msg": ""}
    bus.send(to, **extra)
    [message] = bus.recv(to)["messages"]
    assert {member: message[member] for member in extra} == json.loads(json.dumps(extra), parse_float=str)
    assert bus.refused(bus.message(reply_to=7)) == 400


@ours
def test_a_sender_cannot_choose_the_id_and_the_time(bus):
    """3.8 the bus alone gives ts and id: both are the tick, and ticks are unique and increasing"""
    to = fresh()
    sent = [bus.send(to, ts=1, id="1", bus="x") for _ in range(3)]
    assert [message["id"] for message in bus.recv(to)["messages"]] == [answer["id"] for answer in sent]
    ticks = [tick(answer["ts"]) for answer in sent]
    assert ticks == sorted(set(ticks)) == [int(answer["id"], 16) for answer in sent] and ticks[0] > 1e15


@ours
def test_the_cursor_is_the_receipt(bus):
    """3.9 GET /message/<id> and /agents follow a message from queued to fetched to acknowledged"""
    to = fresh()
    sent = bus.send(to)
    states = [bus.state(sent["id"])]
    for since in ("0", sent["ts"]):
        bus.recv(to, since=since)
        states.append(bus.state(sent["id"]))
    assert states == ["queued", "fetched", "acknowledged"]
    known = agent(bus, to)
    assert known["online"] and known["unread"] == 0 and known["cursor"] == sent["ts"] and known["address"]


# ── 5. Identity ──────────────────────────────────────────────────────────────────────────────────────────────────────

STRANGE = "abt_00000000_" + "s" * 43  # the shape of a token


@closed_only
def test_without_a_token_there_is_only_help(bus):
    """5.1 without a valid token, everything but the help, /healthz and the client files is refused with 401"""
    for path in ("/", "/healthz", "/bus_recv.py", "/bus_send.py", "/bus_listener.sh"):
        assert bus.ask("GET", path, Authorization=None)[0] == 200, path
    for given in (None, "", f"Bearer {STRANGE}", f"Bearer {bus.token}x", f"Basic {bus.token}", bus.token):
        for method, path in (("GET", "/recv?to=x"), ("GET", "/inbox"), ("GET", "/log"), ("POST", "/send")):
            status, answer = bus.json(method, path, "{}" if method == "POST" else None, Authorization=given)
            assert status == 401 and answer["error"], (given, path)


@ours
def test_a_token_in_a_url_is_refused(bus):
    """5.2 a token belongs in the Authorization header; in a URL it is refused with 400"""
    for token in (STRANGE, STRANGE.replace("_", "%5F"), STRANGE.replace("a", "%61")):
        assert bus.json("GET", f"/recv?to={fresh()}&token={token}")[0] == 400


@closed_only
def test_a_token_sends_as_its_name_only(bus):
    """5.3 from is the name of the token: filled in if it is absent, refused with 403 if it is another name"""
    to = fresh()
    bus.post("/send", to=to, msg="unsigned")
    assert bus.refused({"from": fresh(), "to": to, "msg": "forged"}) == 403
    assert [(message["from"], message["msg"]) for message in bus.recv(to)["messages"]] == [(bus.me, "unsigned")]


@ours
def test_a_page_of_another_site_stores_and_reads_nothing(bus):
    """5.7 a request from a page of another site is refused with 403, and no answer has CORS headers"""
    to = fresh()
    here = f"{bus.parts.scheme}://{bus.parts.netloc}"
    for headers in (
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": f"{here}.evil.example"},
        {"Sec_Fetch_Site": "cross-site"},
        {"Sec_Fetch_Site": "same-site"},
        {"Origin": here, "Sec_Fetch_Site": "cross-site"},
    ):
        body = json.dumps(bus.message(to=to))
        assert bus.refused(body, Content_Type="text/plain", **headers) == 403, headers
        status, answer, _ = bus.ask("GET", f"/recv?to={to}", **headers)
        assert status == 403 and not any(name.lower().startswith("access-control") for name in answer), headers
    assert bus.texts(to) == []
    assert bus.ask("GET", "/healthz", Origin=here, Sec_Fetch_Site="same-origin")[0] == 200


@open_only
def test_a_name_that_was_rebound_is_refused(bus):
    """5.8 without tokens, a Host that is neither an address nor a name of this bus is refused with 403"""
    line, _, *rest = bus.head("/inbox")
    assert bus.raw(line, "Host: evil.example", *rest) == [403]
    assert bus.raw(line, f"Host: {bus.parts.netloc}", *rest) == [200]


@ours
def test_a_chain_of_replies_ends(bus):
    """5.9 the 33rd message in a chain of replies is refused with 429, a Retry-After and the reason"""
    channel, parent = fresh("channel"), {}
    for _ in range(32):
        parent = {"reply_to": bus.send(fresh(), channel=channel, **parent)["id"]}
    sent = bus.send(fresh(), channel=channel, **parent)
    status, headers, text = bus.ask("POST", "/send", json.dumps(bus.message(channel=channel, reply_to=sent["id"])))
    assert status == 429 and int(headers["Retry-After"]) > 0 and "chain" in json.loads(text)["error"]


@open_only
def test_two_that_answer_each_other_are_stopped(bus):
    """5.10 two names that answer each other are warned from the 30th turn in 10 minutes on, and get 429 after 120"""
    names, warned = [fresh(), fresh()], []
    for number in range(121):
        names.reverse()
        status, answer = bus.json("POST", "/send", json.dumps({"from": names[0], "to": names[1], "msg": "no, you"}))
        assert status == 200
        if "warning" in answer:
            warned.append(number)
    assert warned == list(range(30, 121)), "the 31st message is the 30th change of direction"
    names.reverse()
    assert bus.refused({"from": names[0], "to": names[1], "msg": "no, you"}) == 429
    assert bus.json("POST", "/send", json.dumps({"from": names[0], "to": fresh(), "msg": "he does not stop"}))[0] == 200


# ── 6. Errors ────────────────────────────────────────────────────────────────────────────────────────────────────────


@ours
def test_errors_are_json_with_the_right_status(bus):
    """6.1 the errors 404, 405 (with Allow), 413, 501 and 400 are JSON with a sentence that says what to do"""
    for method, path, body, expected in (
        ("GET", "/nothing", None, 404),
        ("GET", "/message/1", None, 404),
        ("GET", "/send", None, 405),
        ("POST", "/recv", "", 405),
        ("BREW", "/send", None, 501),
        ("POST", "/send", "x" * 300000, 413),
        ("GET", "/recv", None, 400),
    ):
        status, headers, text = bus.ask(method, path, body)
        assert status == expected and json.loads(text)["error"], (method, path, status)
        assert status != 405 or "OPTIONS" in headers["Allow"]


@ours
def test_a_framing_error_gets_one_answer_and_what_follows_is_never_read(bus):
    """6.2 a framing error gets one 400 and a closed connection, and what follows it is never read as a request"""
    to, host = fresh(), f"Host: {bus.parts.netloc}"
    body = json.dumps(bus.message(to=to)).encode()
    post, length = f"POST {bus.parts.path}/send HTTP/1.1", f"Content-Length: {len(body)}"
    smuggled = "\r\n".join([post, host, length, "", ""]).encode() + body
    for lines in (
        (post, host, length, "Content-Length: 5"),
        (post, host, "Content-Length: +7"),
        (post, host, length, "Transfer-Encoding: chunked"),
        (post, host, "A : b"),
        (post, host, "A: b", " folded"),
        (post, host, "no colon"),
        (post, host, host),
        (post,),
        (post + " ", host),
        (f"GET {bus.parts.path}/healthz HTTP/1.1\n", host),
        (f"GET {bus.parts.path}/healthz HTTP/1.1", host, length),
    ):
        assert bus.raw(*lines, body=smuggled) == [400], lines
    assert bus.texts(to) == []


@ours
def test_what_is_not_supported_is_said(bus):
    """6.3 chunked bodies get 501, unknown expectations 417, other HTTP versions 505; Expect: 100-continue is obeyed"""
    line, host, close = bus.head()
    assert bus.raw(line, host, close, "Transfer-Encoding: chunked") == [501]
    assert bus.raw(line, host, close, "Expect: the best") == [417]
    assert bus.raw(line.replace("HTTP/1.1", "HTTP/2.0"), host, close) == [505]
    body = json.dumps(bus.message()).encode()
    post = f"POST {bus.parts.path}/send HTTP/1.1"
    for expected in ([100, 200], [200]):  # the second is for one that has come already
        if bus.raw(post, host, close, f"Content-Length: {len(body)}", "Expect: 100-continue", body=body) == expected:
            return
    raise AssertionError("100-continue was not met")


# ── 7. Endpoints ─────────────────────────────────────────────────────────────────────────────────────────────────────


@ours
def test_head_and_options(bus):
    """7.1 HEAD is GET without a body, OPTIONS names the allowed methods, and neither of them reads mail"""
    to = fresh()
    bus.send(to)
    status, headers, body = bus.ask("HEAD", "/healthz")
    assert status == 200 and int(headers["Content-Length"]) > 0 and body == b""
    assert bus.ask("HEAD", f"/recv?to={to}&block=true")[0] == 200
    status, headers, _ = bus.ask("OPTIONS", "/send")
    assert status == 204 and headers["Allow"] == "POST, OPTIONS" and not headers["Access-Control-Allow-Origin"]
    assert unread(bus, to) == 1


@ours
def test_no_answer_is_kept_by_a_proxy(bus):
    """7.2 answers carry Cache-Control: no-store and X-Accel-Buffering: no"""
    for path in ("/healthz", f"/recv?to={fresh()}", "/nothing"):
        headers = bus.ask("GET", path)[1]
        assert (headers["Cache-Control"], headers["X-Accel-Buffering"]) == ("no-store", "no"), path


@ours
def test_the_bus_hands_out_its_clients(bus):
    """7.3 GET / shows the URL of this bus, and the three client programs can be downloaded"""
    assert bus.url in bus.ask("GET", "/")[2].decode()
    for client in ("bus_recv.py", "bus_send.py", "bus_listener.sh"):
        assert bus.ask("GET", f"/{client}")[2] == (HERE / client).read_bytes()


@ours
def test_the_clients_talk(bus):
    """7.4 bus_recv.py prints what bus_send.py sends"""
    to = fresh()
    code, out, err = bus.run("bus_send.py", to, "--subject", "T1 done", stdin="4/4 are honeypots\n", AGENT_NAME=bus.me)
    assert code == 0 and json.loads(out)["ok"], err
    assert "queued" in err and to in err
    code, out, err = bus.run("bus_recv.py", to, "--once")
    assert code == 0 and out.endswith('subject="T1 done"\n| 4/4 are honeypots\n---\n'), (out, err)
    assert f"from={bus.me}" in out
    code, out, _ = bus.run("bus_recv.py", fresh(), "--once", "--timeout", "0.2")
    assert code == 3 and out == ""


# ── 8. POST /send ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_send_is_acknowledged_with_time_and_channel(bus):
    """8.1 POST /send is answered with 200, ok, ts and the channel"""
    answer = bus.send(fresh())
    assert float(answer["ts"]) > 0 and answer["channel"] == "default"


def test_a_send_needs_no_content_type(bus):
    """8.2 POST /send works with any Content-Type"""
    to = fresh()
    for kind in ("text/plain", "application/x-www-form-urlencoded", "application/json; charset=utf-8"):
        assert bus.json("POST", "/send", json.dumps(bus.message(to=to, msg=kind)), Content_Type=kind)[0] == 200
    assert len(bus.texts(to)) == 3


@ours
def test_an_array_is_stored_whole_or_not_at_all(bus):
    """8.3 an array of messages is stored whole or not at all, and is answered with one result each, in order"""
    to = fresh()
    good = [bus.message(to=to, msg=str(number)) for number in range(3)]
    status, answer = bus.json("POST", "/send", json.dumps(good))
    assert status == 200 and answer["ok"] is True
    assert [message["id"] for message in bus.recv(to)["messages"]] == [result["id"] for result in answer["results"]]
    for bad in ({"from": bus.me, "to": to}, bus.message(to="a b"), 7):
        assert bus.refused([*good, bad]) == 400
    assert bus.refused([]) == 400
    assert bus.texts(to) == ["0", "1", "2"]


@ours
def test_a_request_stores_so_many_copies_and_no_more(bus):
    """8.4 a request that would store more than 5000 copies is refused, and none is stored"""
    group = fresh("group")
    names = [f"{group}-{number}" for number in range(64)]
    assert bus.refused([bus.message(to=names)] * 79) == 400
    assert bus.texts(names[0]) == []


@ours
def test_a_retry_with_the_same_key_is_stored_once(bus):
    """8.5 a repeated key, also in the head, is answered like the first time; with another message it gets 409"""
    to, key = fresh(), uuid.uuid4().hex
    first, again = bus.send(to, key=key), bus.send(to, key=key)
    assert (first["id"], first["duplicate"], again["id"], again["duplicate"]) == (first["id"], False, first["id"], True)
    assert bus.refused(bus.message(to=to, msg="another", key=key)) == 409
    for message in (bus.message(to=to), bus.message(to=to, key=None)):
        status, answer = bus.json("POST", "/send", json.dumps(message), Idempotency_Key=key)
        assert status == 200 and answer["duplicate"] is True
    assert bus.texts(to) == ["hello"]


@ours
def test_a_key_that_came_twice_at_once_is_stored_once(bus):
    """8.6 of eight sends with one key at the same time, one is stored, and all eight are answered with its id"""
    to, key = fresh(), uuid.uuid4().hex
    sends = [in_background(bus.send, to, key=key) for _ in range(8)]
    answers = [send.result(PATIENCE) for send in sends]
    assert len({answer["id"] for answer in answers}) == 1 and len(bus.texts(to)) == 1
    assert sorted(answer["duplicate"] for answer in answers) == [False] + [True] * 7


@ours
def test_the_sender_is_told_the_truth_about_the_receiver(bus):
    """8.7 the answer to a send says whether the receiver is known and online, its last poll, and how much is unread"""
    to = fresh()
    assert bus.send(to)["receiver"] == {"online": False, "last_seen": None, "unread": 1, "known": False}
    waiting = parked(bus, to, since=bus.recv(to, since="0")["now"])
    there = bus.send(to)["receiver"]
    assert there["online"] is there["known"] is True and there["last_seen"] and there["unread"] == 1
    assert len(waiting.result(PATIENCE)["messages"]) == 1
    known = fresh()
    bus.recv(known)
    assert bus.send([to, known])["receiver"] == {"online": 2, "offline": 0, "unread": 3}
    channel = fresh("channel")
    bus.recv(to, channel=channel)
    assert bus.send("all", channel=channel)["receiver"] == {"online": 1, "offline": 0}


@ours
def test_a_raw_body_is_the_message(bus):
    """8.8 with to in the query, the body is the msg, verbatim, and the query has the other members"""
    to = fresh()
    status, _ = bus.json("POST", f"/send?from={bus.me}&to={to}&subject=x%20y&ttl=60", '{"not": "parsed"}\n\u00e9')
    [message] = bus.recv(to)["messages"]
    assert status == 200 and (message["msg"], message["subject"]) == ('{"not": "parsed"}\n\u00e9', "x y")
    assert bus.refused(b"\xff", f"/send?from={bus.me}&to={to}") == 400
    assert bus.refused("", f"/send?from={bus.me}&to={to}") == 400


@ours
def test_a_form_is_refused(bus):
    """8.9 a multipart form is refused with 400 and a sentence, and nothing is stored"""
    to = fresh()
    body = '--x\r\nContent-Disposition: form-data; name="msg"\r\n\r\nhello\r\n--x--\r\n'  # as curl -F sends it
    for path in ("/send", f"/send?from={bus.me}&to={to}"):
        assert bus.refused(body, path, Content_Type="multipart/form-data; boundary=x") == 400
    assert bus.texts(to) == []


@ours
def test_the_unknown_names_of_a_list_are_told(bus):
    """8.11 the answer to a send to a list names each name of it that never polled and has no token"""
    polled, unknown, other, channel = fresh(), fresh(), fresh(), fresh("channel")
    bus.recv(polled, channel=channel)
    told = bus.send([unknown, polled, other], channel=channel)["receiver"]
    assert sorted(told["unknown"]) == sorted([unknown, other]) and told["offline"] + told["online"] == 3
    assert all(isinstance(each, dict) for each in told["unknown"].values())
    assert "unknown" not in bus.send([polled, "all"], channel=channel)["receiver"]


# ── 9. GET /recv ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_messages_arrive_in_order_above_the_cursor(bus):
    """9.1 messages come oldest first, only those above since, and reading takes nothing away"""
    to = fresh()
    for number in range(5):
        bus.send(to, str(number))
    messages = bus.recv(to)["messages"]
    assert [message["msg"] for message in messages] == ["0", "1", "2", "3", "4"]
    assert bus.texts(to, since=messages[2]["ts"]) == ["3", "4"]
    assert bus.texts(to) == ["0", "1", "2", "3", "4"], "reading took the messages away"


def test_the_cursor_of_a_truncated_answer_is_its_last_message(bus):
    """9.2 when max cuts an answer short, a reader that polls on with its now misses nothing"""
    to = fresh()
    for number in range(7):
        bus.send(to, str(number))
    first = bus.recv(to, max=3)
    assert first["now"] == first["messages"][-1]["ts"], "now passed messages that were not delivered"
    assert bus.texts(to, since=first["now"], max=100) == ["3", "4", "5", "6"]


def test_max_is_clamped(bus):
    """9.3 a max below 1 counts as 1"""
    to = fresh()
    bus.send(to)
    bus.send(to)
    assert len(bus.texts(to, max=0)) == 1


def test_a_parked_poll_is_answered_by_its_message(bus):
    """9.4 block=true holds the poll until a message arrives, and the message is the answer"""
    to = fresh()
    waiting = in_background(bus.recv, to, block="true", since=bus.get("/healthz")["now"])
    bus.send(fresh())
    bus.send(to, "wake up")
    seconds, answer = took(waiting.result, PATIENCE)
    assert [message["msg"] for message in answer["messages"]] == ["wake up"] and seconds < QUICK


def test_a_poll_that_does_not_block_is_answered_at_once(bus):
    """9.5 without block, a poll of an empty mailbox is answered at once with an empty list"""
    for query in ({}, {"block": "false"}):
        seconds, texts = took(bus.texts, fresh(), **query)
        assert texts == [] and seconds < QUICK


def test_a_reader_that_polls_on_with_now_misses_nothing_and_sees_nothing_twice(bus):
    """9.6 while four senders send, a reader that polls on with now gets every message once and in order"""
    to, each, sent, got = fresh(), 50, [], []
    start = bus.recv(to)["now"]

    def speak(number):
        for count in range(each):
            bus.send(to, f"{number}/{count}")
            sent.append(count)

    def has_more():
        return len(sent) > len(got) or all(sender.done() for sender in senders)

    senders = [in_background(speak, number) for number in range(4)]
    since, deadline = start, time.monotonic() + PATIENCE
    while len(got) < 4 * each and time.monotonic() < deadline:
        over = all(sender.done() for sender in senders)
        soon(has_more)  # so it polls once for each message at most: while the senders stand still, more would get 429
        answer = bus.recv(to, since=since)
        got += answer["messages"]
        since = answer["now"]
        if over and not answer["messages"]:
            break
    assert not any(sender.result() for sender in senders)
    assert sorted(message["msg"] for message in got) == sorted(f"{n}/{m}" for n in range(4) for m in range(each))
    assert [message["ts"] for message in got] == sorted(message["ts"] for message in got)


@ours
def test_a_malformed_cursor_is_refused(bus):
    """9.7 since is decimal seconds or a word; anything else gets 400, and milliseconds are named in the error"""
    for since in ("nan", "inf", "1e9", "1_000", "-1", "\u0663", "1.", ".5", "+1", "0x10", "1 ", "Now"):
        assert bus.status_of_poll(to="x", since=since) == 400, since
    status, answer = bus.json("GET", f"/recv?to=x&since={time.time() * 1000:.0f}")
    assert status == 400 and "milliseconds" in answer["error"]


@ours
def test_now_is_a_tick_and_never_the_wall_clock(bus):
    """9.8 now is the newest tick, or since if that is larger; while nothing is sent, it does not move"""
    to = fresh()
    sent = bus.send(to)

    def stands_still():
        one, before = bus.recv(to)["now"], time.time()
        soon(lambda: time.time() > before)  # the wall clock goes on
        return one == bus.recv(to)["now"]

    assert any(stands_still() for _ in range(50)), "now moves while nothing is sent"
    assert tick(bus.recv(to)["now"]) >= tick(sent["ts"])
    later = f"{time.time() + 60:.6f}"
    assert tick(bus.recv(to, since=later)["now"]) >= tick(later)


@ours
def test_since_now(bus):
    """9.9 since=now is answered at once, without messages, with a cursor above everything that is stored"""
    to = fresh()
    bus.send(to, "before")
    seconds, answer = took(bus.recv, to, since="now", block="true")
    assert answer["messages"] == [] and seconds < QUICK
    bus.send(to, "after")
    assert bus.texts(to, since=answer["now"]) == ["after"]


@ours
def test_since_last(bus):
    """9.10 since=last continues at the last cursor of the name, or at its first message if it never had a cursor"""
    to = fresh()
    bus.send(to, "queued")
    first = bus.recv(to, since="last")
    assert [message["msg"] for message in first["messages"]] == ["queued"]
    assert bus.texts(to, since="last") == ["queued"], "since=last moved on, though no cursor was presented"
    bus.recv(to, since=first["now"])
    assert bus.texts(to, since="last") == []
    bus.send(to, "new")
    assert bus.texts(to, since="last") == ["new"]


@ours
def test_since_last_is_remembered_from_its_first_use(bus):
    """9.11 a new name that polls twice with since=last gets a broadcast that was sent between the two polls"""
    channel, to = fresh("channel"), fresh()
    assert bus.texts(to, since="last", channel=channel) == []
    bus.send("all", "hear me", channel=channel)
    assert bus.texts(to, since="last", channel=channel) == bus.texts(to, since="last", channel=channel) == ["hear me"]


@ours
def test_a_reader_has_up_to_16_names(bus):
    """9.12 a reader may poll up to 16 names, as repeated to or with commas, with one cursor for all of them"""
    one, two = fresh(), fresh()
    bus.send(one, "1")
    bus.send(two, "2")
    assert bus.texts([one, two]) == bus.texts(f"{one},{two}") == bus.texts([two, one]) == ["1", "2"]
    group = fresh("group")
    assert bus.texts([f"{group}-{number}" for number in range(16)]) == []
    assert bus.status_of_poll(to=",".join(f"{group}-{number}" for number in range(17))) == 400
    assert bus.status_of_poll(since="0") == 400


@ours
def test_the_first_name_is_the_readers_own(bus):
    """9.13 the first of several names owns the cursor; in the other names, what any reader fetched is not unread"""
    me, group, channel = fresh(), fresh("group"), fresh("channel")
    bus.send([me, group], channel=channel)
    now = bus.recv([me, group], channel=channel)["now"]
    assert (unread(bus, me, channel), unread(bus, group, channel)) == (1, 0)
    bus.recv([me, group], since=now, channel=channel)
    assert unread(bus, me, channel) == 0
    assert bus.texts(group, since="last", channel=channel) == ["hello"], "a group has no cursor"


@ours
def test_a_hold_ends_when_it_said(bus):
    """9.14 an empty poll is held for wait seconds, at most 0.2 s longer; block=false is not held"""

    def ends_in_time(query):
        seconds, texts = took(bus.texts, fresh(), **query)
        assert texts == [] and query["wait"] <= seconds + 0.001 and seconds < query["wait"] + QUICK
        return seconds < query["wait"] + 0.2

    for query in ({"wait": 0.2}, {"wait": 0.4, "block": "true"}):
        assert any(ends_in_time(query) for _ in range(9)), "the best counts: a machine that is busy is late"
    seconds, texts = took(bus.texts, fresh(), wait=20, block="false")
    assert texts == [] and seconds < QUICK
    for wrong in ({"wait": "soon"}, {"block": "maybe"}, {"max": "many"}):
        assert bus.status_of_poll(to="x", **wrong) == 400, wrong


@open_only
def test_an_answer_has_100_messages_or_as_many_as_asked_up_to_1000(bus):
    """9.15 max is 100 by default and 1000 at most; the next poll gets the rest"""
    to = fresh()
    bus.json("POST", "/send", json.dumps([bus.message(to=to, **{"from": fresh()})] * 1002))
    answers = [bus.recv(to, **query) for query in ({}, {"max": 1000}, {"max": 5000})]
    assert [len(answer["messages"]) for answer in answers] == [100, 1000, 1000]
    assert all(answer["more"] is True and answer["now"] == answer["messages"][-1]["ts"] for answer in answers)
    rest = bus.recv(to, since=answers[1]["now"])
    assert len(rest["messages"]) == 2 and rest["more"] is False


@ours
def test_an_answer_ends_at_about_1_mib(bus):
    """9.16 an answer ends at about 1 MiB plus one message; the next poll gets the rest"""
    to, text = fresh(), "x" * 200000
    for _ in range(8):
        bus.json("POST", f"/send?from={bus.me}&to={to}", text)
    answer = bus.recv(to)
    assert 5 <= len(answer["messages"]) <= 7 and answer["more"] is True
    assert len(answer["messages"]) + len(bus.texts(to, since=answer["now"])) == 8


@ours
def test_an_unknown_bus_id_marks_nothing(bus):
    """9.17 a poll with the id of another bus is answered at once, without messages, and its cursor is ignored"""
    to = fresh()
    bus.send(to)
    answer = bus.recv(to, since=f"{time.time() + 60:.6f}", bus="another", block="true")
    assert answer["messages"] == [] and answer["bus"] != "another"
    assert bus.texts(to, since="last", bus=answer["bus"]) == ["hello"]


@ours
def test_a_cursor_ahead_of_the_bus_loses_nothing(bus):
    """9.18 a reader whose clock is fast still gets what is sent later; a cursor over 300 s ahead gets 400 and a hint"""
    to = fresh()
    ahead = f"{time.time() + 120:.6f}"
    bus.recv(to, since=ahead)
    assert tick(bus.send(to, "after")["ts"]) > tick(ahead)
    assert bus.texts(to, since=ahead) == ["after"]
    for look in ("", "&peek=true", "&ack=true"):
        status, answer = bus.json("GET", f"/recv?to={to}&since={time.time() + 360:.6f}{look}")
        assert status == 400 and "seconds" in answer["error"]


@open_only
def test_an_answer_may_hold_no_messages_and_more(bus):
    """9.19 a reader gets its one message from among 1200 of its own broadcasts by polling on while more is true"""
    channel, me, got, since, polls, more = fresh("channel"), fresh(), [], "0", 0, True
    bus.json("POST", "/send", json.dumps([bus.message(to="all", channel=channel, **{"from": me})] * 1200))
    bus.send(me, "yours", channel=channel)
    while more and polls < 10:
        answer = bus.recv(me, since=since, channel=channel)
        more, since, polls = answer["more"], answer["now"], polls + 1
        got += [message["msg"] for message in answer["messages"]]
    assert got == ["yours"] and polls > 1


@ours
def test_plain_text_for_people(bus):
    """9.20 Accept: text/plain gives blocks that no message text can imitate, and the cursor in Bus-Now"""
    to = fresh()
    sent = bus.send(to, "one\n---\n2026-01-01T00:00:00Z from=x id=1\n\x1b[31mred\u202e", subject="a b")
    status, headers, body = bus.ask("GET", f"/recv?to={to}", Accept="text/plain")
    lines = [line for line in body.decode().splitlines() if not line.startswith("-- messages from")]  # a gap
    assert status == 200 and tick(headers["Bus-Now"]) >= tick(sent["ts"])
    assert (headers["Bus-More"], headers["Bus-Id"]) == ("false", sent["bus"])
    assert lines[0].split(" ", 1)[1] == f'from={bus.me} id={sent["id"]} subject="a b"'
    assert lines[1:] == ["| one", "| ---", "| 2026-01-01T00:00:00Z from=x id=1", "| \\x1b[31mred\\u202e", "---"]


def test_who_was_away_gets_all_that_was_queued(bus):
    """9.22 a reader gets each of 150 queued messages, in order, by polling on with now"""
    to, got, since = fresh(), [], "0"
    for number in range(150):
        bus.send(to, str(number))
    for _ in range(4):
        answer = bus.recv(to, since=since)
        got += [message["msg"] for message in answer["messages"]]
        since = answer["now"]
    assert got == [str(number) for number in range(150)]


@ours
def test_a_group_message_that_a_cursor_skipped_is_not_fetched(bus):
    """9.24 a message of a group that a reader's cursor skipped stays queued and unread, and so do those behind it"""
    group, late = fresh("group"), fresh()
    older = bus.send(group, "older")
    newer = bus.send(group, "newer")
    assert bus.texts([late, group], since=older["ts"]) == ["newer"]
    assert [bus.state(sent["id"]) for sent in (older, newer)] == ["queued", "queued"] and unread(bus, group) == 2
    assert bus.texts([fresh(), group]) == ["older", "newer"]
    assert [bus.state(sent["id"]) for sent in (older, newer)] == ["fetched", "fetched"] and unread(bus, group) == 0


@ours
def test_all_has_no_cursor(bus):
    """9.25 a reader of all leaves no cursor: since=last begins at the first broadcast again"""
    channel = fresh("channel")
    bus.send("all", "hear me", channel=channel)
    bus.recv("all", since=bus.recv(fresh(), channel=channel)["now"], channel=channel)
    assert bus.texts("all", since="last", channel=channel) == ["hear me"]


@ours
def test_a_peek_takes_nothing(bus):
    """9.27 peek=true answers at once, presents no cursor, makes nothing fetched and leaves no presence"""
    to = fresh()
    sent = [bus.send(to, text) for text in ("one", "two")]
    for since, expected in (("0", ["one", "two"]), ("last", ["one", "two"]), (sent[0]["ts"], ["two"]), ("now", [])):
        seconds, answer = took(bus.recv, to, since=since, peek="true", block="true")
        assert [each["msg"] for each in answer["messages"]] == expected and seconds < QUICK, since
    assert bus.state(sent[0]["id"]) == "queued"
    assert bus.send(to)["receiver"] == {"online": False, "last_seen": None, "unread": 3, "known": False}
    bus.recv(to, since=sent[0]["ts"], peek="false")
    assert [bus.state(each["id"]) for each in sent] == ["acknowledged", "fetched"]


@ours
def test_an_acknowledgement_is_not_presence(bus):
    """9.28 ack=true presents since, takes nothing and leaves no presence; since=now and last acknowledge nothing"""
    to = fresh()
    sent = [bus.send(to, text) for text in ("one", "two", "three")]
    for since in ("now", "last"):
        bus.recv(to, since=since, ack="true")
        assert bus.state(sent[0]["id"]) == "queued", since
    seconds, answer = took(bus.recv, to, since=sent[1]["ts"], ack="true", block="true")
    assert [each["msg"] for each in answer["messages"]] == ["three"] and seconds < QUICK
    assert [bus.state(each["id"]) for each in sent] == ["acknowledged", "acknowledged", "queued"]
    assert bus.send(to)["receiver"] == {"online": False, "last_seen": None, "unread": 2, "known": False}


@ours
def test_a_reader_that_leaves_is_not_listening(bus):
    """9.29 leave=true ends the presence of a name, unless another poll of it waits; it takes nothing"""
    to = fresh()
    first = bus.send(to, "one")
    bus.recv(to)
    answer = bus.recv(to, since=first["ts"], ack="true", leave="true", block="true")
    assert not answer["messages"] and bus.state(first["id"]) == "acknowledged"
    told = bus.send(to, "two")
    assert not told["receiver"]["online"] and told["receiver"]["last_seen"] and told["receiver"]["unread"] == 1
    assert len(bus.recv(to, since=first["ts"], leave="true")["messages"]) == 1 and bus.state(told["id"]) == "queued"
    waiting = parked(bus, to, since=told["ts"])
    bus.recv(to, leave="true")
    assert bus.send(to, "three")["receiver"]["online"] and waiting.result(PATIENCE)["messages"]


# ── 10. GET /log ─────────────────────────────────────────────────────────────────────────────────────────────────────


@ours
def test_an_observer_sees_all_and_moves_nothing(bus):
    """10.1 GET /log shows every message, moves no cursor, and does not count as a reader"""
    to, other = fresh(), fresh()
    start = bus.get("/log?since=now")["now"]
    bus.send(to, "seen")
    bus.send(other, "seen too", channel="lab")

    def log(query):
        return [message["msg"] for message in bus.get(f"/log?since={start}&{query}")["messages"]]

    assert log(f"to={to}") == log(f"from={bus.me}&to={to}") == log(f"to={to}&channel=default") == ["seen"]
    assert log(f"to={to}&channel=lab") == log(f"from={fresh()}") == []
    assert log(f"to={to},{other}") == log(f"to={to}&to={other}") == ["seen", "seen too"]
    assert bus.send(to)["receiver"] == {"online": False, "last_seen": None, "unread": 2, "known": False}


@ours
def test_an_observer_waits_as_a_reader_does(bus):
    """10.2 since, block, wait and max work in /log as they do in /recv, but since=last is refused"""
    to = fresh()
    now = bus.get("/log?since=now")
    assert now["messages"] == []
    waiting = in_background(bus.get, f"/log?to={to}&since={now['now']}&block=true&max=1")
    later = bus.send(to, "later")
    assert [message["id"] for message in waiting.result(PATIENCE)["messages"]] == [later["id"]]
    assert took(bus.get, f"/log?to={fresh()}&since={later['ts']}&wait=0.3")[0] >= 0.299
    assert bus.json("GET", "/log?since=last")[0] == 400


# ── 11. GET /inbox, /agents, /message/<id>, /healthz ─────────────────────────────────────────────────────────────────


def test_the_inbox_counts_what_waits(bus):
    """11.1 GET /inbox has the number of unread messages by channel and name"""
    to, channel = fresh(), fresh("channel")
    for _ in range(3):
        bus.send(to, channel=channel)
    counts = [answer["recipients"].get(channel, {}) for answer in pages(bus, "/inbox")]
    assert {to: 3} in counts


@ours
def test_unread_is_what_lies_above_the_cursor(bus):
    """11.2 read messages, expired messages and broadcasts are not unread, and asking changes nothing"""
    to, channel = fresh(), fresh("channel")
    first = bus.send(to, channel=channel)
    expired = bus.send(to, channel=channel, ttl=0.001)
    bus.send(to, channel=channel)
    bus.send("all", channel=channel)
    soon(lambda: bus.state(expired["id"]) == "expired")
    counts = [unread(bus, to, channel) for _ in range(2)]
    bus.recv(to, channel=channel, since=first["ts"])
    assert counts == [2, 2] and bus.get(f"/inbox?channel={channel}")["recipients"] == {channel: {to: 1}}


@ours
def test_agents_are_those_who_ever_listened(bus):
    """11.3 GET /agents has every reader of a channel: online since when, last poll, unread count and cursor"""
    to, other, channel = fresh(), fresh(), fresh("channel")
    bus.send([to, other], channel=channel)

    def known():
        found = bus.get(f"/agents?channel={channel}")["agents"]
        return [each for each in found if each.get("listens", True)]  # section 18 adds senders

    assert known() == []
    sent = bus.recv(to, channel=channel)["messages"][0]
    bus.recv(to, channel=channel, since=sent["ts"])
    [agent] = known()
    assert (agent["name"], agent["online"], agent["unread"], agent["cursor"]) == (to, True, 0, sent["ts"])
    assert tick(agent["since"]) <= tick(agent["last_seen"]) and agent["address"]


@ours
def test_a_message_can_be_looked_at(bus):
    """11.4 GET /message/<id> has the message, who fetched it and when; asking changes nothing"""
    to = fresh()
    sent = bus.send(to, subject="S")
    answer = bus.get(f"/message/{sent['id']}")
    assert answer["state"] == bus.state(sent["id"]) == "queued"
    assert bus.recv(to)["messages"] == [answer["message"]]
    fetched = bus.get(f"/message/{sent['id']}")
    assert (fetched["state"], fetched["by"]) == ("fetched", to) and tick(fetched["at"])
    alone = bus.send(to)["id"]
    assert bus.get(f"/message/{alone}?as={to}")["state"] == "queued"
    assert bus.get(f"/message/{alone}").get("by") == (None if bus.token else to) and unread(bus, to) == 2
    for ident in ("1", "xyz", "", "..", "0" * 14, sent["id"].upper() + "/"):
        assert bus.json("GET", f"/message/{ident}")[0] == 404, ident


@ours
@part_of(QUESTIONS)
def test_a_sender_can_wait_until_its_message_was_fetched(bus):
    """11.5 wait_fetched holds the answer until the message is fetched, but no longer than it says"""
    to = fresh()
    sent = bus.send(to)
    seconds, state = took(bus.state, sent["id"], "?wait_fetched=0.3")
    assert state == "queued" and 0.299 <= seconds < QUICK
    waiting = in_background(bus.state, sent["id"], "?wait_fetched=20")
    bus.recv(to)
    assert waiting.result(PATIENCE) == "fetched"


def test_a_bus_says_that_it_is_there(bus):
    """11.6 GET /healthz is answered with 200, ok and now"""
    answer = bus.get("/healthz")
    assert answer["ok"] is True and float(answer["now"]) >= 0


@ours
def test_lists_end_early_and_say_how_to_go_on(bus):
    """11.7 /agents and /inbox end after max names with more and next, go on from after, and take filters"""
    channel, names = fresh("channel"), sorted(fresh() for _ in range(3))
    bus.send(names, channel=channel)
    for name in names[:2]:
        bus.recv(name, channel=channel)
    answers = [*pages(bus, f"/agents?channel={channel}&max=1")]
    assert all(len(answer["agents"]) <= 1 for answer in answers)  # section 18 adds senders
    listen = [one["name"] for answer in answers for one in answer["agents"] if one.get("listens", True)]
    assert listen == names[:2]
    answers = [*pages(bus, f"/inbox?channel={channel}&max=2")]
    assert [sorted(answer["recipients"][channel]) for answer in answers] == [names[:2], names[2:]]
    assert "more" not in answers[-1] and "next" not in answers[-1]
    listed = bus.get(f"/inbox?channel={channel}&name={names[0]},{names[2]}")["recipients"]
    assert listed == bus.get(f"/inbox?name={names[0]}&name={names[2]}")["recipients"]
    assert listed == {channel: {names[0]: 1, names[2]: 1}}
    online = {word: bus.get(f"/agents?channel={channel}&online={word}")["agents"] for word in ("true", "false")}
    assert [one["name"] for one in online["true"]] == names[:2]
    assert not [one for one in online["false"] if one.get("listens", True)]
    for wrong in ("max=many", "online=maybe", "name=a%20b", "channel=a%20b"):
        assert bus.json("GET", f"/agents?{wrong}")[0] == 400, wrong


@closed_only
def test_a_stranger_learns_nothing_from_healthz(bus):
    """11.8 on a bus with tokens, /healthz without a token has ok and now in whole seconds, and nothing else"""
    mine = bus.get("/healthz")
    status, answer = bus.json("GET", "/healthz", Authorization=None)
    assert status == 200 and sorted(answer) == ["now", "ok"] and answer["ok"] is True
    assert tick(answer["now"]) % 1000000 == 0 and tick(answer["now"]) >= tick(mine["now"]) // 1000000 * 1000000


@ours
def test_an_expired_message_has_no_text(bus):
    """11.9 GET /message/<id> of an expired message has its names and its state, but not its text"""
    to = fresh()
    sent = bus.send(to, "secret", ttl=0.001, subject="S")
    soon(lambda: bus.state(sent["id"]) == "expired")
    message = bus.get(f"/message/{sent['id']}")["message"]
    assert message == {"ts": sent["ts"], "id": sent["id"], "to": to, "from": bus.me, "channel": "default"}


# ── 12. POST /ask, GET /thread/<id>, POST /recall ────────────────────────────────────────────────────────────────────


@open_only
def test_a_question_is_answered_by_its_answer(bus):
    """12.1 POST /ask is held until another name sends a reply to the question; the reply is in the mailbox too"""
    to, channel = fresh(), fresh("channel")
    asking = in_background(bus.post, "/ask?wait=20", **bus.message(to=to, channel=channel))
    [question] = bus.recv(to, channel=channel, block="true")["messages"]
    bus.send(bus.me, "not yet", channel=channel, reply_to=question["id"])
    bus.send(bus.me, "unrelated", channel=channel, **{"from": to})
    reply = bus.send(bus.me, "yes", channel=channel, reply_to=question["id"], **{"from": to})
    answer = asking.result(PATIENCE)
    assert (answer["ok"], answer["id"], answer["duplicate"]) == (True, question["id"], False)
    assert (answer["reply"]["id"], answer["reply"]["msg"]) == (reply["id"], "yes")
    assert bus.texts(bus.me, channel=channel) == ["not yet", "unrelated", "yes"]


@open_only
def test_a_question_that_is_asked_again_finds_its_answer(bus):
    """12.2 without a reply, reply is null after wait seconds; asking again with the same key finds a later reply"""
    question = bus.message(key=uuid.uuid4().hex, channel=fresh("channel"))
    seconds, first = took(bus.post, "/ask?wait=0.3", **question)
    assert first["reply"] is None and 0.299 <= seconds < QUICK
    bus.send(bus.me, "yes", channel=question["channel"], reply_to=first["id"], **{"from": question["to"]})
    seconds, again = took(bus.post, "/ask?wait=20", **question)
    assert (again["id"], again["duplicate"], again["reply"]["msg"]) == (first["id"], True, "yes") and seconds < QUICK


@ours
def test_a_question_has_one_receiver(bus):
    """12.3 a question is one message to one name"""
    for wrong in (bus.message(to="all"), bus.message(to=[fresh(), fresh()]), [bus.message()]):
        assert bus.refused(wrong, "/ask") == 400


@ours
def test_a_thread_is_a_whole_conversation(bus):
    """12.4 GET /thread/<id> has the first message, its replies, and the replies to those, oldest first"""
    channel = fresh("channel")
    root = bus.send(fresh(), "root", channel=channel)["id"]
    child = bus.send(fresh(), "child", channel=channel, reply_to=root)["id"]
    bus.send(fresh(), "other", channel=channel)
    bus.send(fresh(), "grandchild", channel=channel, reply_to=child)
    bus.send(fresh(), "second child", channel=channel, reply_to=root)
    for ident in (root, child):
        thread = bus.get(f"/thread/{ident}")["messages"]
        assert [message["msg"] for message in thread] == ["root", "child", "grandchild", "second child"]
    assert bus.json("GET", "/thread/1")[0] == 404


@ours
def test_a_message_can_be_recalled_until_it_is_fetched(bus):
    """12.5 POST /recall takes back a message that nobody has fetched, and may be repeated; a fetched one gets 409"""
    early, late = fresh(), fresh()
    taken, kept = bus.send(early)["id"], bus.send(late)["id"]
    assert bus.post("/recall", id=taken)["ok"] is bus.post("/recall", id=taken)["ok"] is True
    assert bus.texts(early) == [] and bus.state(taken) == "recalled"
    assert unread(bus, early) == 0
    assert bus.texts(late) == ["hello"] and bus.refused({"id": kept}, "/recall") == 409
    assert bus.refused({"id": "1"}, "/recall") == 404


@open_only
def test_who_only_asks_has_fetched_the_answers(bus):
    """12.8 a reply that is the next message of its mailbox counts as fetched once /ask has delivered it"""
    me = fresh()
    for older, state in (([], "fetched"), (["older"], "queued")):
        question = bus.message(key=uuid.uuid4().hex, **{"from": me})
        asked = bus.post("/ask?wait=0", **question)["id"]
        for text in older:
            bus.send(me, text)
        reply = bus.send(me, "yes", reply_to=asked, **{"from": question["to"]})["id"]
        assert bus.state(reply) == "queued"
        assert bus.post("/ask?wait=0", **question)["reply"]["id"] == reply
        assert bus.state(reply) == state
    assert bus.texts(me) == ["yes", "older", "yes"]


@ours
def test_a_recalled_message_has_no_text(bus):
    """12.9 /message and /thread show that a recalled message was there, without its text"""
    to = fresh()
    sent = bus.send(to, "secret", subject="S")
    bus.send(to, "a reply", reply_to=sent["id"])
    bus.post("/recall", id=sent["id"])
    shown = {"ts": sent["ts"], "id": sent["id"], "to": to, "from": bus.me, "channel": "default"}
    assert bus.get(f"/message/{sent['id']}")["message"] == shown
    first, reply = bus.get(f"/thread/{sent['id']}")["messages"]
    assert first == shown and reply["msg"] == "a reply"


@ours
def test_a_thread_ends_early_and_says_how_to_go_on(bus):
    """12.10 a thread ends after max messages, or at about 1 MiB, with more and next, and goes on from after"""
    root = bus.send(fresh(), "0")["id"]
    for number in range(1, 3):
        bus.send(fresh(), str(number), reply_to=root)
    answers = [*pages(bus, f"/thread/{root}?max=2")]
    assert [[one["msg"] for one in answer["messages"]] for answer in answers] == [["0", "1"], ["2"]]
    for _ in range(8):
        bus.json("POST", f"/send?from={bus.me}&to={fresh()}&reply_to={root}", "x" * 200000)
    answers = [*pages(bus, f"/thread/{root}")]
    assert len(answers) == 2 and sum(len(answer["messages"]) for answer in answers) == 11


# ── 13. POST /claim, /ack, /nack, /extend ────────────────────────────────────────────────────────────────────────────


def claim(bus, queue, **members):
    return bus.post("/claim", to=queue, **{"wait": 0, **members})["messages"]


def settle(bus, verb, job, **members):
    return bus.json("POST", f"/{verb}", json.dumps({"id": job["id"], "lease": job["lease"], **members}))[0]


@ours
def test_each_message_goes_to_one_worker(bus):
    """13.1 a job goes to one worker, with an attempt and a lease; reading a queue takes no job away"""
    queue = fresh("queue")
    for number in range(3):
        bus.send(queue, str(number))
    assert len(bus.texts(queue)) == 3
    first, rest = claim(bus, queue), claim(bus, queue, max=100, worker="other", lease=120)
    assert [job["msg"] for job in first + rest] == ["0", "1", "2"] and claim(bus, queue) == []
    assert first[0]["lease"] not in [job["lease"] for job in rest], "two claims have one lease"
    assert all(job["lease"] and job["attempt"] == 1 for job in first + rest)
    assert 59.9e6 < tick(rest[0]["lease_until"]) - tick(first[0]["lease_until"]) < 70e6, "a lease lasts 60 s by default"


@ours
def test_a_claim_waits_for_work(bus):
    """13.2 a claim is held until there is a job, but no longer than wait; its members may be in the query"""
    queue = fresh("queue")
    seconds, jobs = took(claim, bus, queue, wait=0.3)
    assert jobs == [] and 0.299 <= seconds < QUICK
    waiting = in_background(bus.json, "POST", f"/claim?to={queue}&wait=20", "")
    bus.send(queue, "work")
    assert [job["msg"] for job in waiting.result(PATIENCE)[1]["messages"]] == ["work"]


@ours
def test_what_is_done_is_acknowledged_and_that_may_be_repeated(bus):
    """13.3 an acknowledged job is done: it may be acknowledged again, but not given back or extended"""
    queue = fresh("queue")
    bus.send(queue)
    [job] = claim(bus, queue, worker="dell")
    assert bus.state(job["id"]) == "fetched"
    assert [settle(bus, verb, job) for verb in ("ack", "ack", "nack", "extend")] == [200, 200, 409, 409]
    answer = bus.get(f"/message/{job['id']}")
    by = f"{bus.me}/dell" if bus.token else "dell"
    assert (answer["state"], answer["attempt"], answer["by"]) == ("acknowledged", 1, by) and claim(bus, queue) == []


@ours
def test_a_lease_that_ran_out_is_another_workers(bus):
    """13.4 when a lease runs out, another worker gets the job and the first gets 409; an extended lease lasts longer"""
    lost, kept = fresh("queue"), fresh("queue")
    for queue in (lost, kept):
        bus.send(queue)
    [gone], [mine] = claim(bus, lost, lease=1), claim(bus, kept, lease=1)
    assert settle(bus, "extend", mine, seconds=60) == 200
    [again] = claim(bus, lost, wait=20)
    assert (again["id"], gone["attempt"], again["attempt"]) == (gone["id"], 1, 2)
    assert [settle(bus, verb, gone) for verb in ("ack", "nack", "extend")] == [409, 409, 409]
    assert claim(bus, kept) == [] and settle(bus, "ack", mine) == settle(bus, "ack", again) == 200


@ours
def test_what_is_given_back_comes_again(bus):
    """13.5 a job that is given back can be claimed again at once, or after delay seconds; counts=false is no attempt"""
    queue = fresh("queue")
    bus.send(queue)
    [job] = claim(bus, queue)
    assert settle(bus, "nack", job) == 200 and settle(bus, "ack", job) == 409
    [job] = claim(bus, queue)
    began = time.monotonic()
    assert settle(bus, "nack", job, delay=0.5) == 200
    [job] = claim(bus, queue, wait=20)
    assert job["attempt"] == 3 and time.monotonic() - began >= 0.499
    assert settle(bus, "nack", job, counts=False) == 200 and settle(bus, "ack", job) == 409
    [job] = claim(bus, queue)
    assert job["attempt"] == 3


@ours
def test_what_failed_too_often_is_a_dead_letter(bus):
    """13.6 after 5 attempts a job goes to NAME.dead, unchanged, with dead_of, attempts and reason"""
    queue = fresh("queue")
    sent = bus.send(queue, "bad", subject="S")
    for _ in range(5):
        [job] = claim(bus, queue)
        settle(bus, "nack", job, reason="it does not compile")
    [letter] = bus.recv(f"{queue}.dead")["messages"]
    assert (letter["from"], letter["msg"], letter["subject"]) == (bus.me, "bad", "S")
    assert (letter["dead_of"], letter["attempts"], letter["reason"]) == (sent["id"], 5, "it does not compile")
    assert claim(bus, queue) == [] and bus.state(sent["id"]) == "dead"
    assert [job["msg"] for job in claim(bus, f"{queue}.dead")] == ["bad"]


@ours
def test_a_wrong_claim_is_refused(bus):
    """13.7 a queue is a name of at most 59 characters other than all; malformed requests about jobs get 400"""
    for path, members in (
        ("/claim", {}),
        ("/claim", {"to": "all"}),
        ("/claim", {"to": "x" * 60}),
        ("/claim", {"to": "x", "lease": "soon"}),
        ("/ack", {"id": "1"}),
        ("/ack", {"lease": "1"}),
        ("/nack", {"id": "1", "lease": "1", "delay": "x"}),
        ("/extend", {"id": "xyz", "lease": "1"}),
    ):
        assert bus.refused(members, path) == 400, (path, members)
    assert claim(bus, ("x" * 43) + fresh("")[:16]) == []


@ours
def test_a_claim_ends_at_about_1_mib(bus):
    """13.8 a claim ends at about 1 MiB plus one job, whatever its max; the next claim gets the rest"""
    queue, text = fresh("queue"), "x" * 200000
    for _ in range(8):
        bus.json("POST", f"/send?from={bus.me}&to={queue}", text)
    first, rest = claim(bus, queue, max=100), claim(bus, queue, max=100)
    assert 5 <= len(first) <= 7 and len({job["id"] for job in first + rest}) == 8


@ours
def test_a_queue_says_how_it_is_worked_on(bus):
    """13.9 /agents has the work of a queue: jobs in hand, dead letters, and workers; what came back is unread again"""
    queue = fresh("queue")
    for _ in range(2):
        bus.send(queue)
    job, _ = jobs = claim(bus, queue, max=2, worker="w1")
    assert agent(bus, queue)["work"] == {"in_hand": 2, "dead": 0, "workers": 1}
    settle(bus, "ack", job)
    there = agent(bus, queue)
    assert there["work"] == {"in_hand": 1, "dead": 0, "workers": 1} and there["unread"] == 0
    [job] = [each for each in jobs if each["id"] != job["id"]]
    settle(bus, "nack", job, delay=0.5)
    there = agent(bus, queue)
    assert there["work"] == {"in_hand": 0, "dead": 0, "workers": 0} and there["unread"] == 1
    claim(bus, queue, wait=20, worker="w1")
    assert agent(bus, queue)["unread"] == 0
    waiting = in_background(claim, bus, queue, wait=PATIENCE, worker="w2")
    soon(lambda: agent(bus, queue)["work"]["workers"] == 2)
    bus.send(queue)
    assert len(waiting.result(PATIENCE)) == 1 and agent(bus, queue)["work"]["in_hand"] == 2
    reader = fresh()
    bus.recv(reader)
    assert "work" not in agent(bus, reader)


# ── 14. /blob/<sha256> ───────────────────────────────────────────────────────────────────────────────────────────────


def file_of(size):
    """(its path on the bus, what is in it): a file that no bus has yet."""
    data = uuid.uuid4().bytes * (size // 16)
    return f"/blob/{hashlib.sha256(data).hexdigest()}", data


@ours
def test_a_dead_letter_can_be_put_back(bus):
    """13.10 /again puts a dead letter back into its queue as a new job, once; other messages get 400"""
    queue = fresh("queue")
    sent = bus.send(queue, "bad", subject="S")
    for _ in range(5):
        settle(bus, "nack", claim(bus, queue)[0])
    [letter] = bus.recv(f"{queue}.dead")["messages"]
    again = bus.json("POST", "/again", json.dumps({"id": letter["id"]}))
    assert again[0] == 200 and again[1]["id"] not in (letter["id"], sent["id"])
    [job] = claim(bus, queue)
    assert (job["id"], job["msg"], job["subject"], job["from"]) == (again[1]["id"], "bad", "S", bus.me)
    assert job["attempt"] == 1 and not {"dead_of", "attempts", "reason"} & set(job)
    assert claim(bus, f"{queue}.dead") == [] and bus.refused({"id": letter["id"]}, "/again") == 409
    assert bus.refused({"id": sent["id"]}, "/again") == 400 and bus.refused({"id": "1"}, "/again") == 404


@ours
def test_a_file_is_called_by_its_hash(bus):
    """14.1 PUT of a whole file gets 201, and 200 the next time; HEAD has its length, and GET the same bytes"""
    path, data = file_of(160000)
    assert bus.ask("HEAD", path)[0] == bus.json("GET", path)[0] == 404
    assert [bus.ask("PUT", path, data)[0] for _ in range(2)] == [201, 200]
    status, headers, _ = bus.ask("HEAD", path)
    assert (status, headers["Content-Length"]) == (200, "160000")
    assert bus.ask("GET", path)[2] == data
    for name in ("abc", "G" * 64, "A" * 64, "a" * 63):
        assert bus.json("GET", f"/blob/{name}")[0] == bus.json("PUT", f"/blob/{name}", "x")[0] == 404, name


@ours
def test_a_file_that_is_not_its_hash_is_not_kept(bus):
    """14.2 a file that does not match its hash gets 422 and is not kept"""
    path, _ = file_of(1600)
    assert bus.json("PUT", path, b"another file")[0] == 422
    status, headers, _ = bus.ask("HEAD", path)
    assert (status, headers["Upload-Offset"]) == (404, "0")


@ours
def test_a_file_may_come_in_parts(bus):
    """14.3 Content-Range continues an upload at its Upload-Offset, with 202 until the file is whole"""
    path, data = file_of(1600)
    status, headers, _ = bus.ask("PUT", path, data[:400], Content_Range="bytes 0-399/1600")
    assert (status, headers["Upload-Offset"]) == (202, "400")
    status, headers, _ = bus.ask("PUT", path, data[500:], Content_Range="bytes 500-1599/1600")
    assert (status, headers["Upload-Offset"]) == (409, "400") and bus.ask("GET", path)[0] == 404
    assert bus.ask("HEAD", path)[1]["Upload-Offset"] == "400"
    for wrong in ("bytes 400-1599/1599", "bytes 400-1600/1700", "400-1599/1600", "bytes 1599-400/1600"):
        assert bus.json("PUT", path, data[400:], Content_Range=wrong)[0] == 400, wrong
    assert bus.ask("PUT", path, data[400:], Content_Range="bytes 400-1599/1600")[0] == 201
    assert bus.ask("GET", path)[2] == data


@ours
def test_a_file_can_be_had_from_any_place(bus):
    """14.4 Range: bytes=START- gets 206 and the rest of the file, or 416 beyond its end"""
    path, data = file_of(1600)
    bus.ask("PUT", path, data)
    status, headers, rest = bus.ask("GET", path, Range="bytes=1000-")
    assert (status, headers["Content-Range"], rest) == (206, "bytes 1000-1599/1600", data[1000:])
    assert bus.json("GET", path, Range="bytes=1601-")[0] == 416


@ours
def test_a_file_larger_than_all_room_is_refused(bus):
    """14.5 a file larger than the room for all files gets 413"""
    path, data = file_of(1600)
    huge = f"bytes 0-1599/{10**15 - 1}"
    assert bus.json("PUT", path, data, Content_Range=huge)[0] == 413
    assert bus.ask("HEAD", path)[1]["Upload-Offset"] == "0"


# ── 15. GET /metrics ─────────────────────────────────────────────────────────────────────────────────────────────────


@ours
def test_the_metrics_are_figures_for_prometheus(bus):
    """15.1 GET /metrics has every promised figure with its labels, and the figures follow what happens"""
    to, channel = fresh(), fresh("channel")

    def figures():
        status, headers, text = bus.ask("GET", f"/metrics?channel={channel}")
        assert status == 200 and headers["Content-Type"].startswith("text/plain; version=0.0.4")
        lines = [line.rpartition(" ") for line in text.decode().splitlines() if not line.startswith("#")]
        return {name: float(value) for name, _, value in lines}

    bus.refused({})
    before = figures()
    bus.send(to, channel=channel)
    bus.refused({})
    after = figures()
    assert all(name.startswith("agent_bus_") for name in after)
    for name in ("sends_total", "messages_total", 'refused_total{status="400"}', "commits_total"):
        assert after[f"agent_bus_{name}"] > before[f"agent_bus_{name}"], name
    others = {"delivered_total", "commit_seconds_total", "commit_seconds_max", "connections", "parked"}
    others |= set() if bus.lacks(FILES) else {"files_bytes"}
    assert {f"agent_bus_{name}" for name in others} <= set(after)
    labels = f'{{channel="{channel}",name="{to}"}}'
    assert (after[f"agent_bus_unread{labels}"], after.get(f"agent_bus_undone_jobs{labels}", 0)) == (1, 0)
    assert 0 <= after[f"agent_bus_oldest_unread_seconds{labels}"] < PATIENCE
    if not bus.lacks(QUEUES):
        bus.post("/claim", to=to, channel=channel)
        assert figures()[f"agent_bus_undone_jobs{labels}"] == 1


@ours
def test_the_metrics_of_many_names_come_in_pages(bus):
    """15.2 /metrics ends after max names; the header Bus-Next is the after that goes on"""
    channel, names = fresh("channel"), sorted(fresh() for _ in range(3))
    bus.send(names, channel=channel)
    found, following = [], {}
    while not found or following:
        query = urllib.parse.urlencode({"channel": channel, "max": 2, **following})
        _, headers, text = bus.ask("GET", f"/metrics?{query}")
        found.append(re.findall(r'^agent_bus_unread{.*name="(.*)"} 1$', text.decode(), re.MULTILINE))
        following = {"after": headers["Bus-Next"]} if headers["Bus-Next"] else {}
    assert found == [names[:2], names[2:]]


# ── 17. GET /channels ────────────────────────────────────────────────────────────────────────────────────────────────


@ours
def test_the_channels_have_sums_of_the_inbox(bus):
    """17.1 GET /channels has the number of mailboxes and of unread messages of each channel, without broadcasts"""
    names, channel, other = [fresh(), fresh()], fresh("channel"), fresh("channel")
    first = bus.send(names, channel=channel)
    bus.send(names[0], channel=channel)
    bus.send("all", channel=channel)
    bus.send("all", channel=other)
    found = [answer["channels"] for answer in pages(bus, f"/channels?name={','.join(names)}")]
    assert found == [{channel: {"mailboxes": 2, "unread": 3}}]
    bus.recv(names[0], channel=channel, since=first["ts"])
    assert bus.get(f"/channels?channel={channel}")["channels"] == {channel: {"mailboxes": 2, "unread": 2}}
    assert bus.get(f"/channels?channel={other}")["channels"] == {}


@ours
def test_the_channels_of_many_names_come_in_pages(bus):
    """17.2 /channels ends after max names with more and next; a channel that goes on has its rest in the next answer"""
    channels, names = sorted(fresh("channel") for _ in range(2)), sorted(fresh() for _ in range(3))
    for channel in channels:
        bus.send(names, channel=channel)
    answers = [*pages(bus, f"/channels?name={','.join(names)}&max=2")]
    two, one = ({"mailboxes": number, "unread": number} for number in (2, 1))
    first, second = channels
    assert [answer["channels"] for answer in answers] == [{first: two}, {first: one, second: one}, {second: two}]
    assert "more" not in answers[-1] and "next" not in answers[-1]
    for wrong in ("max=many", "name=a%20b", "channel=a%20b"):
        assert bus.json("GET", f"/channels?{wrong}")[0] == 400, wrong


# ── 18. People ───────────────────────────────────────────────────────────────────────────────────────────────────────


@ours
def test_whose_token_it_is(bus):
    """18.1 GET /whoami has the name, the rights, the address and the end of the token of whoever asks"""
    found = bus.get("/whoami")
    assert found["open"] is not bool(bus.token) and found["name"] == (bus.me if bus.token else None)
    assert found["operator"] is True and found["send_only"] is False and isinstance(found["reads"], list)
    assert found["expires"] is None or found["expires"] > time.time()
    assert found["address"] and found["version"]


@ours
def test_a_name_that_nobody_knows_has_similar_names(bus):
    """18.2 the answer to a send to a name that is not known has similar names of its channel that are known"""
    channel, known, found = fresh("channel"), fresh("Lead"), []

    def has_similar(name):  # not at once, if so many sends to unknown names came before that looks have no time left
        found.append(bus.send(name, channel=channel)["receiver"])
        return "similar" in found[-1]

    for name in (known, fresh()):
        bus.recv(name, channel=channel)
    swapped = known.replace("Lead", "Laed")
    for name in (swapped, known.lower(), known + "s"):
        soon(functools.partial(has_similar, name))
        assert found[-1]["similar"] == [known], name
    assert "similar" not in bus.send(fresh("Laed"), channel=channel)["receiver"]
    assert "similar" not in bus.send(known, channel=channel)["receiver"]


@ours
def test_a_name_that_only_sends_is_listed(bus):
    """18.3 /agents lists a name that never polled, if it sent something or has mail"""
    channel, to = fresh("channel"), fresh()
    sent = bus.send(to, channel=channel)
    found = {each["name"]: each for each in bus.get(f"/agents?channel={channel}")["agents"]}
    assert found.keys() == {bus.me, to} and found[to]["unread"] == 1 and found[to]["sent"] is None
    assert found[bus.me]["sent"] == sent["ts"]
    for each in found.values():
        assert not each["listens"] and not each["online"] and each["since"] is each["last_seen"] is None


@ours
def test_a_name_says_what_it_sent_and_what_it_has_not_read(bus):
    """18.4 /agents has listens, the last message that a name sent, and its oldest unread message"""
    to = fresh()
    first, second = bus.send(to, "first"), bus.send(to, "second")
    bus.recv(to)
    found = agent(bus, to)
    assert (found["listens"], found["oldest"], found["sent"]) == (True, first["ts"], None)
    bus.recv(to, since=first["ts"])
    assert agent(bus, to)["oldest"] == second["ts"]
    bus.recv(to, since=second["ts"])
    assert agent(bus, to)["oldest"] is None
    assert tick(agent(bus, bus.me)["sent"]) >= tick(second["ts"])  # another check may send under the same name
    expired = bus.send(to, ttl=0.01)
    soon(lambda: bus.state(expired["id"]) == "expired")
    assert agent(bus, to)["oldest"] is None


@ours
def test_two_programs_that_read_one_name_are_seen(bus):
    """18.5 /agents has the number of readers: the different values of reader= in the polls of a name"""
    to = fresh()
    bus.recv(to)
    assert agent(bus, to)["readers"] == 0
    for reader, expected in (("one", 1), ("one", 1), ("two", 2)):
        bus.recv(to, reader=reader)
        assert agent(bus, to)["readers"] == expected
    assert bus.status_of_poll(to=to, reader="a b") == 400


@ours
def test_a_name_of_a_list_that_nobody_knows_has_similar_names(bus):
    """18.6 the answer to a send to a list has the similar names of each of its names that is not known"""
    channel, known, unknown = fresh("channel"), fresh("Lead"), fresh()
    bus.recv(known, channel=channel)
    told = {known + "s": {"similar": [known]}, unknown: {}}  # at once, if looks have time left: see 18.2
    soon(lambda: bus.send([known, known + "s", unknown], channel=channel)["receiver"]["unknown"] == told)


@ours
def test_an_agent_says_what_it_is_doing(bus):
    """18.7 POST /status is shown in /agents, until it is replaced, empty or over; it is not presence"""
    channel = fresh("channel")

    def say(**members):
        assert bus.post("/status", **{"from": bus.me, "channel": channel, **members})["ok"] is True
        return agent(bus, bus.me, channel)

    said = {"text": "T2 \u2028", "state": "waiting", "cwd": "/work", "branch": "main"}
    before = decimal.Decimal(say(**said)["status"]["at"])
    found = say(**said)
    assert decimal.Decimal(found["status"].pop("at")) >= before > 0
    assert (found["status"], found["online"], found["listens"]) == (said, False, False)
    assert say(state="idle")["status"].keys() == {"state", "at"}
    assert say(text="x" * 500)["status"]["text"] == "x" * 500
    assert "status" not in say()
    say(text="brief", ttl=1)
    soon(lambda: "status" not in agent(bus, bus.me, channel))
    for wrong in ({"text": "x" * 501}, {"state": "asleep"}, {"cwd": 7}, {"ttl": "x"}, {"channel": "a b"}):
        assert bus.refused({"from": bus.me, "text": "x", **wrong}, "/status") == 400, wrong
    for wrong in ({"from": "all", "text": "x"}, {"from": ["x"], "text": "x"}, [], "x"):
        assert bus.refused(json.dumps(wrong), "/status") in (400, 403), wrong


# ── 20. Digest ───────────────────────────────────────────────────────────────────────────────────────────────────────


def place(sent, sender):
    """What a digest says of one message, by the answer to its send."""
    return {"id": sent["id"], "ts": sent["ts"], "from": sender}


@ours
def test_a_digest_has_numbers_and_ids_and_takes_nothing(bus):
    """20.1 GET /digest counts unread messages by sender, conversation and priority, tells no text, and takes nothing"""
    to, secret = fresh(), "nobody may see this"
    nothing = bus.get(f"/digest?to={to}")
    assert (nothing["unread"], nothing["senders"], nothing["oldest"], nothing["more"]) == (0, {}, None, False)
    assert not agent(bus, to)
    first = bus.send(to, secret, subject=secret)
    urgent = bus.send(to, f'"priority": "high" {secret}', priority="high")
    last = bus.send(to, '"priority": "high"', reply_to=first["id"], type=secret, priority=None)
    for _ in range(2):
        found = bus.get(f"/digest?to={to}")
        assert (found["unread"], found["urgent"], found["more"]) == (3, 1, False)
        assert found["senders"] == {bus.me: {"unread": 3, "urgent": 1}}
        assert found["priorities"] == {"high": 1, "normal": 2, "low": 0, "other": 0}
        threads = [(each["id"], each["unread"], each["answers"]) for each in found["threads"]]
        assert threads == [(first["id"], 2, 0), (urgent["id"], 1, 0)], "nobody answers itself"
        assert (found["oldest"], found["newest"]) == (place(first, bus.me), place(last, bus.me))
        assert found["first_urgent"] == [place(urgent, bus.me)]
        assert secret not in json.dumps(found)
    assert bus.state(first["id"]) == "queued" and unread(bus, to) == 3 and not agent(bus, to).get("online")
    bus.recv(to, since=urgent["ts"])
    found = bus.get(f"/digest?to={to}")
    assert found["unread"] == 1 and found["oldest"] == found["newest"] == place(last, bus.me)
    for wrong in ("", "to=a%20b", f"to={to}&since=x", f"to={to}&channel=a%20b"):
        assert bus.json("GET", f"/digest?{wrong}")[0] == 400, wrong


@ours
def test_a_digest_counts_each_name_from_its_cursor_and_broadcasts_from_the_first(bus):
    """20.2 a digest of several names counts each from its own cursor, and broadcasts from that of the first name"""
    mine, group, channel = fresh(), fresh("group"), fresh("channel")
    before = bus.send("all", channel=channel)
    read = [bus.send(name, channel=channel) for name in (mine, group)]
    bus.recv(mine, since=read[0]["ts"], channel=channel)
    sent = [bus.send(name, channel=channel) for name in (group, "all", mine)]
    gone = bus.send(mine, channel=channel, ttl=0.01)
    soon(lambda: bus.state(gone["id"]) == "expired")

    def counted(query):
        return bus.get(f"/digest?to={query}&channel={channel}")["unread"]

    assert [counted(query) for query in (mine, group, f"{mine},{group}")] == [2, 3, 4]
    assert [counted(f"{mine},{group}&since={each['ts']}") for each in (before, *sent)] == [5, 2, 1, 0]
    assert counted(f"{mine}&since=0") == 4 and counted(f"{mine}&since=now") == 0
    assert counted(fresh()) == 0
    bus.recv(bus.me, since=before["ts"], channel=channel)
    assert counted(f"{bus.me}&since=0") == 0


@ours
def test_a_digest_that_waits_is_answered_when_something_is_unread_and_takes_nothing(bus):
    """20.5 a digest with wait is held until something is unread; its names listen meanwhile, and nothing is fetched"""
    mine, group = fresh(), fresh("group")
    assert took(bus.get, f"/digest?to={mine}&wait=0.3")[0] >= 0.299
    sent, since = [], "last"
    for to in (mine, group):
        waiting = in_background(bus.get, f"/digest?to={mine},{group}&since={since}&wait=20")
        soon(lambda: agent(bus, group).get("online"))
        sent.append(bus.send(to))
        since, found = sent[-1]["ts"], waiting.result(PATIENCE)
        assert (found["unread"], found["newest"]) == (1, place(sent[-1], bus.me))
    assert [bus.state(each["id"]) for each in sent] == ["queued"] * 2 and unread(bus, mine) == 1
    assert bus.get(f"/digest?to={mine}&wait=20")["unread"] == 1


# ── 21. MCP over HTTP ────────────────────────────────────────────────────────────────────────────────────────────────


class McpClient:
    """A client that calls the tools of a bus as one name. On a bus with tokens the token must be an operator's."""

    def __init__(self, bus, name, session=True, **headers):
        self.bus, self.headers = bus, {"X_Agent_Name": name, **headers}
        if session:
            _, headers, _ = bus.ask("POST", "/mcp", json.dumps(request("initialize")), **self.headers)
            self.headers["Mcp_Session_Id"] = headers["Mcp-Session-Id"]

    def ask(self, method, **params):
        status, answer = self.bus.json("POST", "/mcp", json.dumps(request(method, **params)), **self.headers)
        assert status == 200 and (answer["jsonrpc"], answer["id"]) == ("2.0", 7), (status, answer)
        return answer

    def tool(self, tool, failed=False, **arguments):
        """The text of a tool that must succeed, or fail."""
        result = self.ask("tools/call", name=tool, arguments=arguments)["result"]
        [content] = result["content"]
        assert content["type"] == "text" and result["isError"] is failed, result
        return content["text"]

    def mail(self, **arguments):
        """The messages that bus_inbox shows."""
        return [json.loads(line) for line in self.tool("bus_inbox", **arguments).split("\n") if line[:1] == "{"]


def request(method, **params):
    return {"jsonrpc": "2.0", "id": 7, "method": method, "params": params}


@ours
def test_the_bus_is_an_mcp_server(bus):
    """21.1 POST /mcp takes one message of JSON-RPC and answers JSON; versions are echoed; GET is 405"""
    for asked, given in (("2025-06-18", "2025-06-18"), ("2024-11-05", "2024-11-05"), ("2099-01-01", "2025-11-25")):
        status, answer = bus.json("POST", "/mcp", json.dumps(request("initialize", protocolVersion=asked)))
        assert status == 200 and answer["result"]["protocolVersion"] == given
        assert "tools" in answer["result"]["capabilities"] and answer["result"]["serverInfo"]["name"]
    assert bus.json("POST", "/mcp", json.dumps(request("ping")))[1]["result"] == {}
    for members in ({"method": "notifications/initialized"}, {"id": 1, "result": {}}):
        status, _, body = bus.ask("POST", "/mcp", json.dumps({"jsonrpc": "2.0", **members}))
        assert (status, body) == (202, b"")
    assert bus.json("GET", "/mcp")[0] == 405


@ours
def test_what_is_no_request_or_no_tool_is_an_error_with_its_number(bus):
    """21.2 errors have the numbers of JSON-RPC, and the status 400 for what is no request; a tool fails with isError"""
    for body, code in (("{", -32700), ("[]", -32600), (json.dumps([request("ping")]), -32600), ('{"id": 1}', -32600)):
        status, answer = bus.json("POST", "/mcp", body)
        assert (status, answer["error"]["code"]) == (400, code), body
    client = McpClient(bus, fresh())
    assert client.ask("server/discover")["error"]["code"] == -32601
    for params in ({"name": "bus_nuke"}, {}, {"name": "bus_send", "arguments": []}):
        assert client.ask("tools/call", **params)["error"]["code"] == -32602
    assert "msg is required" in client.tool("bus_send", failed=True, to="bob")
    assert "name" in client.tool("bus_send", failed=True, to="no name", msg="x")


@ours
def test_a_session_that_the_bus_does_not_know_begins_again(bus):
    """21.5 the answer to initialize has an Mcp-Session-Id; another one gets 404; without one the tools work too"""
    name = fresh()
    client = McpClient(bus, name)
    assert client.ask("tools/list")["result"]["tools"] and name in client.tool("bus_whoami")
    assert name in McpClient(bus, name, session=False).tool("bus_whoami")
    for method in ("tools/list", "tools/call", "ping"):
        body = json.dumps(request(method, name="bus_whoami"))
        assert bus.refused(body, "/mcp", Mcp_Session_Id=client.headers["Mcp_Session_Id"][::-1]) == 404


@ours
def test_the_tools_of_an_agent(bus):
    """21.6 the tools of tools/list work, each with what it says that it takes; one that waits ends within 25 s"""
    alice, bob = fresh("alice"), fresh("bob")
    client, other = McpClient(bus, alice), McpClient(bus, bob)
    tools = {tool["name"]: tool for tool in client.ask("tools/list")["result"]["tools"]}
    known = "send inbox ack agents whoami ask reply thread claim done fail status rename hook"
    assert {f"bus_{tool}" for tool in known.split()} <= set(tools)
    for tool in tools.values():
        assert tool["description"] and set(tool["inputSchema"]["required"]) <= set(tool["inputSchema"]["properties"])
        assert tool["_meta"] == {"anthropic/alwaysLoad": True}
    sent = re.search(r"id ([0-9a-f]{13})", client.tool("bus_send", to=bob, msg="T1?", subject="T1"))[1]
    [message] = other.mail()
    assert (message["id"], message["msg"], message["subject"]) == (sent, "T1?", "T1")
    assert bus.state(sent) == "fetched"
    waiting = in_background(client.tool, "bus_inbox", wait=QUICK * 4)
    soon(lambda: agent(bus, alice).get("online"))
    other.tool("bus_send", to=alice, msg="here")
    assert '"here"' in waiting.result(PATIENCE)
    replied = re.search(r"id ([0-9a-f]{13})", other.tool("bus_reply", id=sent, msg="yes"))[1]
    assert bus.get(f"/message/{replied}")["message"]["reply_to"] == sent
    if not bus.lacks(QUESTIONS):
        assert [line[:1] for line in client.tool("bus_thread", id=sent).split("\n")][1:] == ["{", "{"]
    if not bus.lacks(QUESTIONS) and not bus.token:  # with one token, all that these two send has one sender
        assert "no reply yet" in client.tool("bus_ask", to=bob, msg="?", wait=0)
        asking = in_background(client.tool, "bus_ask", to=bob, msg="T2?", wait=QUICK * 4)
        soon(lambda: len(other.mail()) == 3)
        other.tool("bus_reply", id=other.mail()[-1]["id"], msg="T2 done")
        assert '"T2 done"' in asking.result(PATIENCE)
    if not bus.lacks(PEOPLE):
        client.tool("bus_status", text="T3", state="busy")
        assert agent(bus, bus.me if bus.token else alice)["status"]["text"] == "T3"
    if not bus.lacks(LOCKS):
        assert "fence" in client.tool("bus_lock", names=f"{alice}/a\n{alice}/*", why="T4")
        assert '"T4"' in client.tool("bus_locks", path=f"{alice}/b")
        assert client.tool("bus_unlock", names=f"{alice}/a\n{alice}/*") == "released: 2"
    assert alice in client.tool("bus_agents")


@ours
def test_mail_is_unread_until_a_call_says_that_it_is_done(bus):
    """21.7 bus_inbox shows mail oldest first and takes nothing; bus_ack, and ack in bus_inbox, move the cursor"""
    to = fresh()
    client = McpClient(bus, to)
    assert client.tool("bus_inbox").startswith("0 unread")
    sent = [bus.send(to, f"{number}")["id"] for number in range(4)]
    for _ in range(2):
        assert [each["id"] for each in client.mail()] == sent
    assert unread(bus, to) == 4 and [bus.state(each) for each in sent] == ["fetched"] * 4
    assert f"{sent[0]} is read" in client.tool("bus_ack", id=sent[0]) and unread(bus, to) == 3
    assert [each["id"] for each in client.mail(ack=sent[1])] == sent[2:] and bus.state(sent[1]) == "acknowledged"
    assert "is read" in client.tool("bus_ack", id=sent[0]) and unread(bus, to) == 2
    assert "not the id" in client.tool("bus_ack", failed=True, id=bus.send(fresh())["id"])
    long = bus.send(to, "y" * 20000)["id"]
    client.tool("bus_ack", id=sent[3])
    text, found = client.tool("bus_inbox"), ""
    assert len(text) < 9000 and long in text
    while len(found) < 20000:
        found += json.loads(client.tool("bus_inbox", id=long, offset=len(found)).split("\n")[0])["msg"]
    assert found == "y" * 20000


@ours
def test_an_agent_may_have_a_channel(bus):
    """21.12 X-Agent-Channel names the channel of a session, or of a single call; else it is default"""
    name, channel = fresh(), fresh("channel")
    here, there = McpClient(bus, name), McpClient(bus, name, X_Agent_Channel=channel)
    once = McpClient(bus, name, session=False, X_Agent_Channel=channel)
    bus.send(name, "here")
    sent = bus.send(name, "there", channel=channel)["id"]
    assert [each["msg"] for each in here.mail()] == ["here"] and f"on channel {channel} " in there.tool("bus_whoami")
    assert [each["msg"] for each in there.mail()] == [each["msg"] for each in once.mail()] == ["there"]
    assert "not the id" in here.tool("bus_ack", failed=True, id=sent)
    there.tool("bus_ack", id=sent)
    assert there.mail() == [] and len(here.mail()) == 1
    there.tool("bus_send", to=name, msg="again")
    assert [each["msg"] for each in once.mail()] == ["again"]
    assert bus.refused(request("initialize"), "/mcp", X_Agent_Channel="no name") == 400


@ours
def test_a_client_ends_its_session(bus):
    """21.13 DELETE /mcp ends the session of its Mcp-Session-Id; 404 if there is none, 400 without that header"""
    client = McpClient(bus, fresh())
    ident = client.headers["Mcp_Session_Id"]
    assert bus.json("DELETE", "/mcp", Mcp_Session_Id=ident)[0] == 200
    assert bus.json("DELETE", "/mcp", Mcp_Session_Id=ident)[0] == 404
    assert bus.refused(request("tools/list"), "/mcp", Mcp_Session_Id=ident) == 404
    assert bus.json("DELETE", "/mcp")[0] == 400


def back(bus, **query):
    """The texts of all pages of the log backwards, and how many pages there were."""
    found, pages, before = [], 0, "now"
    while before is not None:
        answer = bus.get(f"/log?{urllib.parse.urlencode({'before': before, **query})}")
        found += [message["msg"] for message in answer["messages"]]
        before, pages = answer["next"], pages + 1
    return found, pages


@ours
def test_the_log_can_be_read_backwards(bus):
    """22.1 /log?before=now has the newest messages first, and next leads to the older ones until it is null"""
    channel, to = fresh("channel"), fresh()
    sent = [bus.send(to, str(number), channel=channel) for number in range(7)]
    answer = bus.get(f"/log?before=now&channel={channel}&max=3")
    assert [message["msg"] for message in answer["messages"]] == ["6", "5", "4"]
    assert tick(answer["next"]) <= tick(sent[4]["ts"])
    assert back(bus, channel=channel, max=3)[0] == [str(number) for number in reversed(range(7))]
    below = bus.get(f"/log?before={sent[2]['ts']}&channel={channel}")
    assert [message["msg"] for message in below["messages"]] == ["1", "0"] and below["bus"] == answer["bus"]


@ours
def test_the_log_backwards_has_filters(bus):
    """22.2 with before, /log also has the filters with=A,B (either way) and thread=ID beside to, from and channel"""
    channel, to, third = fresh("channel"), fresh(), fresh()
    first = bus.send(to, "to", channel=channel)
    bus.send(third, "third", channel=channel)
    bus.send(to, "again", channel=channel, reply_to=first["id"])
    assert back(bus, channel=channel, **{"with": f"{to},{bus.me}"})[0] == ["again", "to"]
    assert back(bus, channel=channel, to=third)[0] == ["third"]
    assert back(bus, thread=first["id"], **{"from": bus.me})[0] == ["again", "to"]


@ours
def test_a_wrong_place_in_the_log_is_refused(bus):
    """22.3 before=last, a before that is no time, a thread that is no id, and with= that is not two names get 400"""
    for query in ("before=last", "before=soon", "before=now&thread=zz", "before=now&with=alice", "before=now&max=x"):
        assert bus.json("GET", f"/log?{query}")[0] == 400, query


@ours
def test_the_log_backwards_ends_at_about_1_mib(bus):
    """22.4 an answer ends at about 1 MiB, and next leads on"""
    channel, to = fresh("channel"), fresh()
    for _ in range(8):
        bus.json("POST", f"/send?from={bus.me}&to={to}&channel={channel}", "x" * 200000)
    found, pages = back(bus, channel=channel)
    assert len(found) == 8 and pages > 1


@ours
def test_the_page_has_a_strict_policy(bus):
    """23.1 /ui/ is the page; each of its files has a policy by which only scripts of this bus run; others are 404"""
    status, headers, body = bus.ask("GET", "/ui/")
    assert status == 200 and headers["Content-Type"].startswith("text/html") and b"<!doctype html>" in body
    policy = headers["Content-Security-Policy"].split("; ")
    assert {"default-src 'none'", "script-src 'self'", "frame-ancestors 'none'"} < set(policy)
    assert not re.search("unsafe|http:|https:|data:", headers["Content-Security-Policy"])
    assert headers["X-Content-Type-Options"] == "nosniff" and headers["X-Frame-Options"] == "DENY"
    assert bus.ask("GET", "/ui/no-such-file")[0] == 404


@ours
def test_a_browser_is_led_to_the_page(bus):
    """23.2 GET / with Accept: text/html leads to ui/, a relative path; without it, it is the help"""
    status, headers, _ = bus.ask("GET", "/", Accept="text/html,*/*;q=0.8")
    assert (status, headers["Location"]) == (302, "ui/")
    assert bus.ask("GET", "/")[0] == 200


@ours
def test_a_link_on_another_site_may_lead_to_the_page(bus):
    """23.3 a click on a link of another site opens / and /ui/; a frame, a script or a form of such a page gets 403"""
    link = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
    assert [bus.ask("GET", path, **link)[0] for path in ("/", "/ui/")] == [200, 200]
    assert bus.ask("GET", "/log", **link)[0] == 403
    for more in ({"Sec-Fetch-Dest": "iframe"}, {"Sec-Fetch-Mode": "cors"}, {"Origin": "http://evil.example"}):
        assert bus.ask("GET", "/ui/", **{**link, **more})[0] == 403, more


@ours
def test_the_last_minutes_are_told_in_figures(bus):
    """23.4 /activity has the last minutes, the oldest first, with what was stored and refused; the last still runs"""
    before = bus.get("/activity")["minutes"]
    assert 1 <= len(before) <= 60 and [each["ts"] for each in before] == sorted(each["ts"] for each in before)
    bus.send(fresh(), "one")
    assert bus.refused(bus.message(to="")) == 400
    after = [each for each in bus.get("/activity")["minutes"] if each["ts"] >= before[-1]["ts"]]
    assert sum(each["messages"] for each in after) > before[-1]["messages"]
    assert sum(each["refused"] for each in after) > before[-1]["refused"]


@ours
def test_presence_is_told_by_minutes(bus):
    """23.5 /activity?name= has a digit for each minute since the start, 1 if the name listened; else 0"""
    here, gone = fresh(), fresh()
    bus.recv(here)
    found = bus.get(f"/activity?name={here},{gone}")
    assert found["presence"][here][-1] == "1" and set(found["presence"][gone]) == {"0"}
    assert len(found["presence"][here]) <= len(found["minutes"])


# ── 24. Reservations ─────────────────────────────────────────────────────────────────────────────────────────────────


def lock(bus, holder, *names, **members):
    """(status, JSON) of a request to reserve names."""
    return bus.json("POST", "/lock", json.dumps({"from": holder, "names": names, **members}))


def reserved(bus, holder, *names, **members):
    """The fence of a reservation that must succeed."""
    status, answer = lock(bus, holder, *names, **members)
    assert status == 200, answer
    return answer["fence"]


def holders(bus, path):
    """Who holds this path, by /locks."""
    found = bus.get("/locks?" + urllib.parse.urlencode({"name": path}))["locks"]
    return [each["holder"] for each in found]


@open_only
def test_all_names_are_reserved_or_none(bus):
    """24.1 /lock reserves all names or none; a 409 says who holds what until when, and why"""
    ann, bob, folder = fresh("ann"), fresh("bob"), fresh("dir")
    status, got = lock(bus, ann, f"{folder}/a", f"{folder}/b", why="T1")
    assert status == 200
    for names in ([f"{folder}/b", f"{folder}/c"], [f"{folder}/*"]):
        status, answer = lock(bus, bob, *names)
        [held] = answer["held"]
        assert status == 409 and ann in answer["error"] and held["wanted"] == names[0]
        assert (held["holder"], held["fence"]) == (ann, got["fence"])
        assert abs(tick(held["until"]) - tick(got["until"])) < 1e6
        assert (held["why"], held["shared"]) == ("T1", False) and held["name"] in (f"{folder}/a", f"{folder}/b")
    assert holders(bus, f"{folder}/c") == [] and holders(bus, f"{folder}/a") == [ann]
    reserved(bus, bob, f"{folder}/c")


@open_only
def test_names_overlap_as_in_a_shell(bus):
    """24.2 names with * ? [a-z] and ** overlap if there is a path that both stand for"""
    ann, bob = fresh("ann"), fresh("bob")
    for name, overlap, apart in (
        ("a/*", ("a/b", "a/.b", "*/b", "a/?", "**"), ("a", "a/b/c", "b/*", "*", "/a/b")),
        ("a/**", ("a/b", "a/b/c", "*/b", "**/c", "a/*/c"), ("a", "b/**", "b/a", "?")),
        ("a/**/b", ("a/b", "a/x/y/b", "a/*", "*/b"), ("a/xb", "a/b/c", "**/c")),
        ("a/b?[0-9].py", ("a/bx7.py", "a/*7*", "a/b??.py"), ("a/b7.py", "a/bx.py", "a/b?[!0-9].py")),
        ("a/[id]/x", ("a/i/x", "a/[id]/x", "a/?/x"), ("a/id/x", "a/[!id]/x")),
    ):
        channel = fresh("channel")
        fence = reserved(bus, ann, name, channel=channel)
        assert [each for each in overlap if lock(bus, bob, each, channel=channel)[0] != 409] == [], name
        for each in apart:
            assert lock(bus, bob, each, channel=channel)[0] == 200, (name, each)
        bus.post("/unlock", **{"from": ann, "fence": fence})


@open_only
def test_a_reservation_ends_with_its_ttl_and_its_fence_is_stale(bus):
    """24.3 a reservation ends with its ttl unless it is renewed; a new one has a higher fence; a stale one gets 409"""
    ann, bob, lost, kept = fresh("ann"), fresh("bob"), fresh("lost"), fresh("kept")
    stale, other = reserved(bus, ann, lost, ttl=1), reserved(bus, ann, fresh())
    assert other > stale and bus.refused({"from": bob, "fence": other}, "/renew") == 409
    before = lock(bus, ann, fresh(), ttl=1)[1]["until"]
    for _ in range(9):  # a machine that stands still may need more than a second between the two
        fence = reserved(bus, ann, kept, ttl=1)
        status, answer = bus.json("POST", "/renew", json.dumps({"from": ann, "fence": fence, "ttl": 60}))
        if status == 200:
            break
    assert status == 200 and answer["fence"] == fence and 58e6 < tick(answer["until"]) - tick(before) < 90e6
    newer = reserved(bus, bob, lost, wait=20)
    assert newer > fence and bus.refused({"from": ann, "fence": stale}, "/renew") == 409
    assert lock(bus, bob, kept)[0] == 409
    until = [tick(lock(bus, ann, fresh(), **more)[1]["until"]) for more in ({}, {"ttl": 10**9})]
    assert 42000e6 < until[1] - until[0] < 43000e6, "600 s by default, and 12 hours at most"


@open_only
def test_a_reservation_is_released_by_its_fence_or_by_names(bus):
    """24.4 /unlock releases a fence or some names; what has ended is 0 names, and another holder's fence is 403"""
    ann, bob, names = fresh("ann"), fresh("bob"), [fresh("a"), fresh("b"), fresh("c")]
    fence = reserved(bus, ann, *names)
    assert bus.refused({"from": bob, "fence": fence}, "/unlock") == 403
    assert bus.post("/unlock", **{"from": bob, "names": names})["released"] == 0
    assert bus.post("/unlock", **{"from": ann, "names": names[:1]})["released"] == 1
    assert [holders(bus, name) for name in names] == [[], [ann], [ann]]
    assert [bus.post("/unlock", **{"from": ann, "fence": fence})["released"] for _ in range(2)] == [2, 0]
    reserved(bus, bob, *names)


@open_only
def test_shared_reservations_overlap_each_other_only(bus):
    """24.5 shared reservations overlap each other, and no other one; a holder is never in its own way"""
    ann, bob, name = fresh("ann"), fresh("bob"), fresh("name")
    for holder in (ann, bob):
        reserved(bus, holder, name, shared=True)
    assert lock(bus, ann, name)[0] == lock(bus, fresh(), f"{name[:-1]}?")[0] == 409
    bus.post("/unlock", **{"from": bob, "names": [name]})
    reserved(bus, ann, name)
    assert lock(bus, bob, name, shared=True)[0] == 409


@ours
def test_reservations_are_listed(bus):
    """24.6 /locks lists reservations by fence, in pages, of a channel, of a holder, or those that cover one path"""
    folder, channel = fresh("dir"), fresh("channel")
    fences = [reserved(bus, bus.me, f"{folder}/{name}", channel=channel) for name in ("a", "b*", "**")]
    found = [each for page in pages(bus, f"/locks?max=2&channel={channel}") for each in page["locks"]]
    assert [each["fence"] for each in found] == fences == sorted(fences)
    first = found[0]
    assert first["names"] == [f"{folder}/a"] and (first["holder"], first["channel"]) == (bus.me, channel)
    assert tick(first["since"]) == first["fence"] and first["waiting"] == []

    def covering(path):
        query = urllib.parse.urlencode({"channel": channel, "name": f"{folder}/{path}"})
        return [fences.index(each["fence"]) for each in bus.get(f"/locks?{query}")["locks"]]

    assert [covering(path) for path in ("a", "b", "bb", "c/d", "[x]")] == [[0, 2], [1, 2], [1, 2], [2], [2]]
    assert bus.get(f"/locks?channel={channel}&holder={fresh()}")["locks"] == []
    for fence in fences:
        assert bus.post("/unlock", **{"from": bus.me, "fence": fence})["released"] == 1
    assert bus.get(f"/locks?channel={channel}")["locks"] == []


@open_only
def test_a_request_waits_for_its_names(bus):
    """24.7 with wait, a request is answered when its names are free, or with 409 when the time is over"""
    ann, bob, name = fresh("ann"), fresh("bob"), fresh("name")
    fence = reserved(bus, ann, name)
    seconds, (status, answer) = took(lock, bus, bob, name, wait=0.3)
    assert status == 409 and 0.299 <= seconds < QUICK and answer["held"][0]["fence"] == fence
    waiting = in_background(lock, bus, bob, name, wait=PATIENCE)
    soon(lambda: bus.get(f"/locks?name={name}")["locks"][0]["waiting"] == [bob])
    bus.post("/unlock", **{"from": ann, "names": [name]})
    status, answer = waiting.result(PATIENCE)
    assert status == 200 and answer["fence"] > fence and holders(bus, name) == [bob]


@open_only
def test_a_holder_is_told_who_waits(bus):
    """24.8 the holder gets one message from who waits, and sees the name in waiting"""
    ann, bob, name = fresh("ann"), fresh("bob"), fresh("name")
    fence = reserved(bus, ann, name)
    lock(bus, bob, name)
    for _ in range(2):
        lock(bus, bob, name, wait=0.1)
    waiting = in_background(lock, bus, bob, name, wait=PATIENCE)
    soon(lambda: bus.get(f"/locks?name={name}")["locks"][0]["waiting"])
    assert bus.post("/renew", **{"from": ann, "fence": fence})["waiting"] == [bob]
    soon(lambda: bus.texts(ann))
    [told] = bus.recv(ann)["messages"]
    assert (told["from"], told["type"], told["fence"]) == (bob, "lock-wanted", fence) and name in told["msg"]
    bus.post("/unlock", **{"from": ann, "fence": fence})
    assert waiting.result(PATIENCE)[0] == 200 and bus.state(told["id"]) != "expired"


@ours
def test_a_wrong_reservation_is_refused(bus):
    """24.9 names are paths of 1 to 255 visible characters without //, . and ..; malformed requests get 400"""
    for name in ("", "a//b", "./a", "a/../b", "a/", "/", "a\\b", "a\nb", "x" * 256, "*a" * 9, 7, None, ["a"]):
        assert bus.refused({"from": bus.me, "names": [name]}, "/lock") == 400, name
    for wrong in (
        {"names": []}, {"names": {}}, {"names": None}, {"names": [f"n{n}" for n in range(65)]},
        {"names": [f"{n}*" for n in range(9)]}, {"shared": "yes"}, {"why": "x" * 201}, {"why": 1},
        {"ttl": "soon"}, {"wait": "x"}, {"from": "all"}, {"from": "a b"}, {"channel": "a b"},
    ):  # fmt: skip
        assert bus.refused({"from": bus.me, "names": ["a"], **wrong}, "/lock") in (400, 403), wrong
    for body in ({}, {"fence": "1"}, {"fence": 0}, {"fence": True}, {"fence": 1 << 53}, {"fence": 1, "names": ["a"]}):
        assert bus.refused({"from": bus.me, **body}, "/unlock") == 400, body
    assert bus.refused({"from": bus.me}, "/renew") == bus.refused("[]", "/lock") == bus.refused("x", "/lock") == 400
    for query in ("name=a//b", "name=*", "after=x", "max=x", "holder=a%20b"):
        assert bus.json("GET", f"/locks?{query}")[0] == 400, query
    fence = reserved(bus, bus.me, f"{fresh()}/{'x' * 200} and a blank")
    assert bus.post("/unlock", **{"from": bus.me, "fence": fence})["released"] == 1
    name = fresh()
    fence = bus.post("/lock", **{"from": bus.me, "names": name})["fence"]
    assert bus.post("/unlock", **{"from": bus.me, "names": name, "channel": ""})["released"] == 1 and fence


@ours
def test_one_owner_cannot_reserve_everything(bus):
    """24.10 an owner has at most 1024 reserved names, and 32 with wildcards; more get 429"""
    folder, fences = fresh("dir"), []
    try:
        for most, size, end in ((32, 4, "/*"), (1024, 64, "")):
            names = [f"{folder}/{n}{end}" for n in range(most + size)]
            for start in range(0, len(names), size):
                status, answer = lock(bus, bus.me, *names[start : start + size])
                if status != 200:
                    break
                fences.append(answer["fence"])
            assert status == 429 and str(most) in answer["error"], answer
    finally:
        for fence in fences:
            bus.post("/unlock", **{"from": bus.me, "fence": fence})


@ours
def test_a_retry_keeps_its_reservation(bus):
    """24.11 who asks again for the same names in the same way keeps the fence; other names are another reservation"""
    one, other = fresh(), fresh()
    first = lock(bus, bus.me, one, other, ttl=100)[1]
    status, again = lock(bus, bus.me, other, one, ttl=500)
    fence = first["fence"]
    assert (status, again["fence"]) == (200, fence) and holders(bus, one) == [bus.me]
    assert 390e6 < tick(again["until"]) - tick(first["until"]) < 500e6
    further = [reserved(bus, bus.me, one), reserved(bus, bus.me, one, other, shared=True)]
    assert fence < further[0] < further[1]
    for each in (fence, *further):
        bus.post("/unlock", **{"from": bus.me, "fence": each})


def found(bus, words, **query):
    """The ids of all messages that a search finds, in all its pages."""
    ids, before = [], "now"
    while before is not None:
        answer = bus.get(f"/search?{urllib.parse.urlencode({'q': words, **query, 'before': before})}")
        ids += [message["id"] for message in answer["messages"]]
        before = answer["next"]
    return ids


def word():
    """A word that no other message has."""
    return f"w{uuid.uuid4().hex}"


@ours
def test_a_search_finds_words_and_phrases(bus):
    """25.1 /search finds all words and "phrases" of msg and subject, in any case, newest first; nothing is syntax"""
    mine, to = word(), fresh()
    texts = (f"{mine} the Disk is full", f"the disk of {mine.upper()}: caf\u00e9_foo.bar", f"is {mine} full or empty")
    first, second, third = (bus.send(to, text)["id"] for text in texts)
    titled = bus.send(to, "x", subject=f"{mine} in a subject")["id"]
    assert found(bus, mine) == [titled, third, second, first]
    assert found(bus, f"full {mine}") == [third, first] and found(bus, f'{mine} "disk is full"') == [first]
    assert found(bus, f'{mine} "foo bar"') == found(bus, f"{mine} cafe_foo") == [second]
    assert found(bus, f"{mine} OR empty") == [third] and found(bus, f"NOT {mine}") == []
    assert found(bus, f"{mine[:9]}*") == [] and found(bus, f"{mine} * - ( NEAR") == []
    assert found(bus, f'{mine} * -disk (full"') == [first] and found(bus, word()) == []


@ours
def test_a_search_leaves_no_trace(bus):
    """25.2 a search moves no mark, makes nothing fetched, and does not count as presence"""
    mine, to = word(), fresh()
    sent = bus.send(to, mine)["id"]
    assert found(bus, mine, to=to) == [sent]
    assert bus.state(sent) == "queued" and unread(bus, to) == 1


@ours
def test_a_text_that_is_gone_is_not_found(bus):
    """25.3 a message that was recalled, or has expired, is not found"""
    mine, to = word(), fresh()
    stays = bus.send(to, mine)["id"]
    bus.send(to, mine, ttl=0.001)
    if not bus.lacks(QUESTIONS):
        bus.post("/recall", id=bus.send(to, mine)["id"])
    deadline = time.monotonic() + 5
    while found(bus, mine) != [stays]:  # until the ttl has passed
        assert time.monotonic() < deadline


@ours
def test_a_search_has_filters(bus):
    """25.4 the filters are from, to, channel, thread, since and before"""
    mine, to, other, channel = word(), fresh(), fresh(), fresh("channel")
    first = bus.send(to, mine)
    second = bus.send(other, mine, reply_to=first["id"])
    third = bus.send(other, mine, channel=channel)
    assert found(bus, mine, **{"from": bus.me}) == [third["id"], second["id"], first["id"]]
    assert found(bus, mine, **{"from": other}) == [] and found(bus, mine, to=f"{to},{fresh()}") == [first["id"]]
    assert found(bus, mine, channel=channel) == [third["id"]]
    assert found(bus, mine, thread=first["id"]) == [second["id"], first["id"]]
    assert found(bus, mine, since=second["ts"]) == [third["id"]] and found(bus, mine, since="now") == []
    below = bus.get(f"/search?q={mine}&before={second['ts']}")
    assert [message["id"] for message in below["messages"]] == [first["id"]]


@ours
def test_a_wrong_search_is_refused(bus):
    """25.5 a q without a word, of over 200 characters or over 20 words, and a wrong value of a filter get 400"""
    filters = ("thread=x", "since=last", "before=x", "max=x", "from=two+words", "q=b")
    for query in ("", "q=", "q=%2B*", f"q={'a' * 201}", f"q={'a+' * 21}", *(f"q=a&{each}" for each in filters)):
        status, answer = bus.json("GET", f"/search?{query}")
        assert status == 400 and answer["error"], (query, status, answer)


@ours
def test_a_search_comes_in_pages(bus):
    """25.6 an answer ends after max messages and at about 1 MiB; next is the before of the next, and in the end null"""
    mine, to = word(), fresh()
    sent = [bus.send(to, f"{mine} {'x' * 200000}")["id"] for _ in range(8)]
    answer = bus.get(f"/search?q={mine}&max=3")
    assert [message["id"] for message in answer["messages"]] == sent[:-4:-1] and answer["next"] is not None
    assert 3 < len(bus.get(f"/search?q={mine}")["messages"]) < 8
    assert found(bus, mine) == found(bus, mine, max=3) == sent[::-1]


@ours
def test_a_search_finds_what_was_sent_before_it(bus):
    """25.7 indexed is the time up to which the index has all messages; a message is found as soon as it is stored"""
    mine = word()
    for number in range(3):
        sent = bus.send(fresh(), f"{mine} {number}")
        answer = bus.get(f"/search?q={mine}")
        assert len(answer["messages"]) == number + 1
        assert tick(sent["ts"]) <= tick(answer["indexed"]) <= tick(answer["now"])


@ours
def test_a_redacted_text_is_gone_at_every_door(bus):
    """26.1 after /redact no endpoint has the text: the message has redacted, and of its members only the names"""
    mine, to = word(), fresh()
    first, since = (answer := bus.send(to, "x"))["id"], answer["ts"]
    more = {"subject": mine, "type": mine, "password": mine, "reply_to": first, "ttl": 1000}
    sent = bus.send(to, f"the password is {mine}", **more)
    assert bus.post("/redact", id=sent["id"])["redacted"] == [{"id": sent["id"], "to": to, "state": "queued"}]
    message = bus.recv(to)["messages"][1]
    assert set(message) == {"ts", "id", "to", "from", "channel", "msg", "redacted", "reply_to"}
    assert message["redacted"] is True and message["reply_to"] == first and message["from"] == bus.me
    doors = [f"/message/{sent['id']}", f"/log?to={to}&since={since}", f"/recv?to={to}&since=0"]
    doors += [] if bus.lacks(QUESTIONS) else [f"/thread/{first}"]
    for door in doors:
        text = bus.ask("GET", door)[2].decode()
        assert mine not in text and sent["id"] in text and '"redacted": true' in text, door
    assert bus.lacks(SEARCH) or found(bus, mine) == []


@ours
def test_all_messages_of_a_send_are_redacted(bus):
    """26.3 if the send had several receivers, the messages of all of them are redacted, and no other message"""
    mine, names = word(), [fresh(), fresh(), fresh()]
    before, copies, after = bus.send(names[0], mine + "."), bus.send(names, mine), bus.send(names[0], mine + ".")
    answer = bus.post("/redact", id=copies["id"])
    assert {each["to"]: each["id"] for each in answer["redacted"]} == copies["ids"]
    for name in names:
        assert "redacted" in bus.recv(name)["messages"][1 if name == names[0] else 0]
    for other in (before, after):
        assert bus.get(f"/message/{other['id']}")["message"]["msg"] == mine + "."


@ours
def test_a_redaction_may_be_repeated(bus):
    """26.4 the second /redact of a message has the same answer; an id of no message gets 404, and no id 400"""
    both = [bus.message(to=[fresh(), fresh()], msg=msg) for msg in ("one", "two")]  # their ticks follow each other
    sent, other = (result["id"] for result in bus.json("POST", "/send", json.dumps(both))[1]["results"])
    first, _, second = (bus.post("/redact", id=each) for each in (sent, other, sent))
    assert first["redacted"] == second["redacted"] and first["ok"] is second["ok"] is True
    assert {each["to"] for each in second["redacted"]} == {*both[0]["to"]}
    assert bus.refused({"id": "1"}, "/redact") == 404
    assert [bus.refused(body, "/redact") for body in ({}, {"id": "x"}, "x")] == [400, 400, 400]


@ours
def test_a_redaction_says_where_the_text_may_be(bus):
    """26.5 fetched_by has the names that fetched the message, and warning says where else its text may be"""
    to = fresh()
    sent = bus.send(to)["id"]
    assert bus.recv(to)["messages"]
    answer = bus.post("/redact", id=sent)
    assert answer["fetched_by"] == [to] and answer["redacted"][0]["state"] == "fetched"
    assert "backups" in answer["warning"] and "outboxes" in answer["warning"]


@ours
def test_a_retry_of_a_redacted_send_is_refused(bus):
    """26.7 a retry of the send with its key gets 409: the text is not stored again"""
    mine, to, key = word(), fresh(), fresh("key")
    bus.post("/redact", id=bus.send(to, mine, key=key)["id"])
    assert bus.refused(bus.message(to=to, msg=mine, key=key)) == 409
    assert len(bus.recv(to)["messages"]) == 1


# ── 27. Schedules ────────────────────────────────────────────────────────────────────────────────────────────────────


def scheduled(bus):
    """All schedules that the list has, by id."""
    found, query = {}, ""
    while query is not None:
        answer = bus.get(f"/later{query}")
        found.update({each["id"]: each for each in answer["schedules"]})
        query = f"?after={answer['next']}" if answer.get("more") else None
    return found


@ours
def test_a_message_is_sent_later(bus):
    """27.1 POST /later answers an id and a time; then the message is a send with a ts of then, and the id as its key"""
    message = bus.message(msg="in half a second")
    given = bus.post("/later", after=0.5, message=message)
    assert given["ok"] is True and given["duplicate"] is False and given["id"] in scheduled(bus)
    assert bus.texts(message["to"]) == []
    [sent] = bus.recv(message["to"], block="true", wait=QUICK)["messages"]
    assert sent["msg"] == message["msg"] and decimal.Decimal(sent["ts"]) >= decimal.Decimal(given["at"])
    again = bus.send(**{**message, "key": given["id"]})
    assert again["duplicate"] is True and again["id"] == sent["id"]


@ours
def test_a_time_that_is_past_is_due_at_once(bus):
    """27.2 at is seconds since 1970; a time that is past is due at once"""
    message = bus.message()
    assert bus.post("/later", at=1795203596.5, message=message)["at"] == "1795203596.500000"
    assert len(bus.recv(message["to"], block="true", wait=QUICK)["messages"]) == 1


@ours
def test_a_cron_line_repeats_a_message(bus):
    """27.3 a schedule with a cron line is due at the next minute that the line names, in UTC, and stays in the list"""
    given = bus.post("/later", cron="0 0 29 2 *", message=bus.message())
    when = time.gmtime(float(given["at"]))
    assert (when.tm_mon, when.tm_mday, when.tm_hour, when.tm_min, when.tm_sec) == (2, 29, 0, 0, 0)
    assert scheduled(bus)[given["id"]]["cron"] == "0 0 29 2 *"
    bus.post("/later", cancel=given["id"])


@ours
def test_a_wrong_schedule_is_refused(bus):
    """27.4 a message that /send would not take, no time or two, and a time or a cron line that is none get 400"""
    good = bus.message()
    for order in (
        [],
        {"after": 1},
        {"message": good},
        {"after": 1, "at": 1, "message": good},
        {"after": 1, "message": {**good, "to": "a b"}},
        {"after": 1, "message": [good]},
        {"after": 1, "message": {**good, "key": "k"}},
        {"after": -1, "message": good},
        {"after": "soon", "message": good},
        {"at": 1795203596000, "message": good},
        *({"cron": line, "message": good} for line in ("* * * *", "60 * * * *", "*/0 * * * *", "0 0 30 2 *", "x")),
    ):
        assert bus.refused(order, "/later") == 400, order


@ours
def test_a_retry_with_a_key_is_one_schedule(bus):
    """27.5 the same sender, channel and key is the same schedule; with another message it gets 409"""
    message, key = bus.message(), fresh("key")
    first = bus.post("/later", after=900, key=key, message=message)
    for order in ({"after": 1800, "message": message}, {"after": 1800, "message": message, "key": None}):
        again = bus.json("POST", "/later", json.dumps(order), Idempotency_Key=key)[1]
        assert (again["id"], again["at"], again["duplicate"]) == (first["id"], first["at"], True)
    assert bus.refused({"after": 900, "key": key, "message": {**message, "msg": "another"}}, "/later") == 409
    bus.post("/later", cancel=first["id"])


@ours
def test_schedules_are_listed(bus):
    """27.6 GET /later lists schedules in the order in which they were given, in pages, with all that they are"""
    messages = [bus.message(msg=str(number)) for number in range(3)]
    ids = [bus.post("/later", after=900 - number, message=each)["id"] for number, each in enumerate(messages)]
    found = scheduled(bus)
    assert [each for each in found if each in ids] == ids
    page = bus.get(f"/later?max=1&from={bus.me}")
    assert len(page["schedules"]) == 1 and page["more"] is True and page["next"]
    one = found[ids[1]]
    assert set(one) == {"id", "state", "at", "cron", "due", "tries", "reason", "message"} and one["at"] == one["due"]
    assert (one["state"], one["cron"], one["tries"], one["reason"]) == ("waiting", None, 0, None)
    assert {member: one["message"][member] for member in messages[1]} == messages[1]
    for ident in ids:
        bus.post("/later", cancel=ident)


@ours
def test_a_schedule_is_taken_back(bus):
    """27.7 POST /later with cancel takes a schedule back: its message is not sent; an unknown one gets 404"""
    message = bus.message()
    given = bus.post("/later", after=1, message=message)
    behind = bus.post("/later", after=1, message={**message, "msg": "due behind it"})
    assert bus.post("/later", cancel=given["id"])["ok"] is True and given["id"] not in scheduled(bus)
    [sent] = bus.recv(message["to"], block="true", wait=20)["messages"]
    assert sent["msg"] == "due behind it" and behind["at"] >= given["at"]
    for ident in (given["id"], "no-such-id", 7):
        assert bus.refused({"cancel": ident}, "/later") == 404


# ── 28. Notices ──────────────────────────────────────────────────────────────────────────────────────────────────────


@ours
def test_notices_are_listed(bus):
    """28.1 GET /notices has the rules, and the notices that could not be sent"""
    answer = bus.get("/notices")
    assert isinstance(answer["rules"], list) and isinstance(answer["dead"], list)
    for rule in answer["rules"]:
        assert {"rule", "when", "to", "channel", "waiting", "sent", "failed", "last"} == set(rule)


# ── Running ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def main(arguments):
    if {"-h", "--help"}.intersection(arguments):
        print(__doc__, end="")
        return 0
    if arguments:
        print(f"test_bus: unknown: {' '.join(arguments)}: it takes no arguments, set BUS_URL (--help)", file=sys.stderr)
        return 2
    checks = [check for name, check in globals().items() if name.startswith("test_")]
    failed, others = 0, collections.Counter()  # others: how many are skipped for a reason that is no absent extension
    with running() as bus:
        print(f"checking {bus.url}", flush=True)
        for section, of_section in itertools.groupby(checks, section_of):
            reasons = {check: reason_to_skip(check, bus) for check in of_section}
            absent = bus.absent.get(EXTENSIONS.get(section))
            print(f"{section}. {SECTIONS[section]}" + (f": skipped, {absent}" if absent else ""))
            for check, reason in reasons.items():
                if reason and not bus.absent.get(extension_of(check)):
                    others[reason] += 1
                if not reason:
                    failed += not passes(check, bus)
                elif not absent:
                    print(f"{check.__doc__}: skipped, {reason}")
        print_skipped(bus, others)
    print(f"{failed} FAILED" if failed else "ALL TESTS PASS")
    return 1 if failed else 0


def passes(check, bus):
    """Make the check and print its sentence; False, and a traceback, if it fails."""
    try:
        check(bus)
        print(check.__doc__)
        return True
    except Exception:
        print(f"{check.__doc__}: FAILED\n{traceback.format_exc()}")
        return False


def print_skipped(bus, others):
    """Name what was not checked, so that nobody takes a skipped check for a kept promise."""
    absent = [f"{extension.name} ({why})" for extension, why in bus.absent.items() if why]
    if absent:
        print(f"skipped: {', '.join(absent)}")
    for reason, count in others.items():
        print(f"skipped: {count} checks ({reason})")


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)

if "pytest" in sys.modules:
    import pytest

    @pytest.fixture(scope="module")
    def the_bus():
        with running() as bus:
            yield bus

    @pytest.fixture(name="bus")
    def the_bus_for(request, the_bus):
        reason = reason_to_skip(request.function, the_bus)
        if reason:
            pytest.skip(reason)
        return the_bus
