"""MCP over HTTP at POST /mcp: the tools of an agent that has a URL and a token, no more (PROTOCOL.md section 21).

The tools are in the files _NAME_tools.py beside this file. Each is a generator of requests. Call answers them with the
endpoints of this bus, on the connection of the client: where an endpoint waits for a commit or a message, the
connection waits.
"""

from __future__ import annotations

import argparse
import json
import re
import secrets
import time
import weakref
from collections import OrderedDict
from collections.abc import Generator
from functools import partial
from typing import TYPE_CHECKING, Any

from bus_server import (
    HEAD_BYTES,
    HIDDEN,
    VERSION,
    Answer,
    Bus,
    Refused,
    Request,
    Shares,
    encode,
    name,
    ok,
    our_fault,
    parse_json,
    parts_of,
    put_newest,
    refusal,
    say_exception,
    speaker,
    unavailable,
)

if TYPE_CHECKING:
    import _mcp_protocol as protocol
    import _mcp_tools as tools
else:
    tools, protocol = parts_of(__file__, "_mcp_tools", "_mcp_protocol")

TABLES, NOUN, OPERATIONS = None, "", ()

SESSIONS_EACH, SESSIONS = 500, 10000  # of one owner, and in all, some 1 KB each; the oldest is forgotten
DAY = 86400.0  # s: a renamed session reads its old name for so long
FORMER = 8  # old names of a session that it still reads
UNSEEN = re.compile(f"{HIDDEN.pattern}|<")  # `<`: no tag of any kind in the text of another agent
HELD_EACH, HELD = 16 << 20, 64 << 20  # bytes of large calls in hand: of one owner, and of all
NO_REQUEST = (-32700, -32600)  # these errors are answered with status 400


def options(parser: argparse.ArgumentParser) -> None:
    """It has none."""


def start(bus: Bus, options: argparse.Namespace) -> None:
    Mcp(bus)


class Here(tools.Session):
    """The session of a client that asks over HTTP. Its token is its identity."""

    def __init__(self, sessions: Sessions, request: Request, keeps: bool) -> None:
        channel = request.fields.get("x-agent-channel") or "default"
        super().__init__(names_of(request), name(channel, "X-Agent-Channel"))
        self.sessions, self.grant = sessions, request.grant
        self.keeps = keeps  # the client sends its Mcp-Session-Id
        # Its former names; until when it reads them, on the monotonic clock.
        self.old: OrderedDict[str, float] = OrderedDict()

    def harmless(self, text: str) -> str:
        return UNSEEN.sub(lambda found: "\\u003c" if found[0] == "<" else json.dumps(found[0])[1:-1], text)

    def signed(self) -> dict[str, str]:
        """A token signs for itself, also where an operator reads the mail of another name."""
        return {"channel": self.channel} if self.grant.name else super().signed()

    def refresh(self) -> None:
        """The old names end after a day."""
        now = time.monotonic()
        self.old = OrderedDict((own, until) for own, until in self.old.items() if until > now)
        self.names = [*self.names[:1], *self.old]

    def rename(self, name: str) -> Generator[tools.Ask, tools.Answer, str]:
        if self.names[:1] == [name]:
            return f"this session is {name}"
        if self.grant.name and not self.grant.operator:
            why = f"the token of this session is that of {self.grant.name}, and a token has one name"
            raise tools.Failed(0, f"{why}: an operator makes another one with `invite {name}`")
        if not self.keeps:
            raise tools.Failed(0, "this client keeps no session (Mcp-Session-Id): set the header X-Agent-Name")
        try:
            speaker(name, "the name")
        except Refused as refused:
            raise tools.Failed(0, refused.sentence) from None
        found = yield tools.Ask(f"/agents?name={name}&channel={self.channel}&online=true")
        if name not in self.old and (found["agents"] or self.sessions.has(self.channel, name)):
            raise tools.Failed(0, f"{name} is another agent, which listens now: choose another name")
        for own in self.names[:1]:
            put_newest(self.old, own, time.monotonic() + DAY, FORMER)
        self.old.pop(name, None)
        self.names = [name]
        self.refresh()
        rest = f"; for a day it reads what comes for {' and '.join(self.old)}, too" if self.old else ""
        return f"this session is {name} on the agent-bus now{rest}"


class Sessions:
    """The sessions of all clients, by owner and Mcp-Session-Id. In memory: a client that is not known begins again."""

    def __init__(self) -> None:
        self.of: dict[str, OrderedDict[str, Here]] = {}

    def begin(self, owner: str, session: Here) -> str:
        """Its id."""
        number = secrets.token_hex(16)
        put_newest(self.of.setdefault(owner, OrderedDict()), number, session, SESSIONS_EACH)
        if sum(map(len, self.of.values())) > SESSIONS:
            most = max(self.of, key=lambda each: len(self.of[each]))
            self.forget(most, next(iter(self.of[most])))
        return number

    def forget(self, owner: str, number: str) -> None:
        del self.of[owner][number]
        if not self.of[owner]:
            del self.of[owner]

    def find(self, owner: str, number: str) -> Here:
        """The session of this id; 404 if there is none, and then a client begins a new one."""
        mine = self.of.get(owner, OrderedDict())
        if number not in mine:
            raise Refused(404, "the bus does not know this Mcp-Session-Id, perhaps since it was restarted: initialize")
        mine.move_to_end(number)
        mine[number].refresh()
        return mine[number]

    def end(self, owner: str, number: str) -> None:
        self.find(owner, number)
        self.forget(owner, number)

    def has(self, channel: str, own: str) -> bool:
        everyone = (each for mine in self.of.values() for each in mine.values())
        return any((each.channel, each.names[:1]) == (channel, [own]) for each in everyone)


class Mcp:
    """The endpoint. Owned by the loop."""

    def __init__(self, bus: Bus) -> None:
        self.bus, self.sessions = bus, Sessions()
        self.held = Shares(HELD, HELD_EACH)
        bus.route("POST", "/mcp", self.post, "tools for an agent, by MCP over HTTP")
        bus.route("DELETE", "/mcp", self.delete, "end a session of such an agent")

    def post(self, request: Request) -> Answer | None:
        """One message of JSON-RPC. A notification, or an answer to what was never asked, gets 202."""
        self.bus.storms.read(request.owner())
        number = None
        try:
            try:
                message = parse_json(request.body)
            except Refused as refused:
                raise protocol.Wrong(-32700, refused.sentence) from None
            if protocol.is_answer(message):
                return Answer(202, b"", "text/plain")
            number = message.get("id") if isinstance(message, dict) else None
            protocol.check(message)
            if "id" not in message:
                return Answer(202, b"", "text/plain")
            return self.answer(request, message)
        except protocol.Wrong as wrong:
            error = {"code": wrong.code, "message": str(wrong)}
            return rpc(number, error=error)._replace(status=400 if wrong.code in NO_REQUEST else 200)

    def delete(self, request: Request) -> Answer:
        """The client will not use its session any more."""
        self.bus.storms.read(request.owner())
        given = request.fields.get("mcp-session-id")
        if not given:
            raise Refused(400, "the header Mcp-Session-Id is missing: it says which session ends")
        self.sessions.end(request.owner(), given)
        return ok(self.bus, '"ok": true')

    def answer(self, request: Request, message: dict[str, Any]) -> Answer | None:
        given = request.fields.get("mcp-session-id")
        if message["method"] == "initialize":
            session = Here(self.sessions, request, keeps=True)
            result = protocol.respond(message, VERSION)
            return rpc(message["id"], result=result)._replace(
                headers=(("Mcp-Session-Id", self.sessions.begin(request.owner(), session)),)
            )
        known = self.sessions.find(request.owner(), given) if given else None
        if message["method"] != "tools/call":
            return rpc(message["id"], result=protocol.respond(message, VERSION))
        tool, arguments = protocol.called(message)
        session = known or Here(self.sessions, request, keeps=False)
        session.grant = request.grant
        call = Call(self.bus, request, message["id"], session, tool)
        if len(request.body) > HEAD_BYTES:  # the arguments stay until the tool has its text
            self.hold(call, len(request.body))
        return call.begin(arguments)

    def hold(self, call: Call, size: int) -> None:
        if self.held.is_full(call.owner, size):
            raise unavailable("too many large calls of yours wait for an answer: wait for these first", 5)
        self.held.add(call.owner, size)
        # In a turn: the collector may find the call in any thread.
        weakref.finalize(call, self.bus.loop.tell, partial(self.held.add, call.owner, -size)).atexit = False


def names_of(request: Request) -> list[str]:
    """Who a client is: by its token or, where that says nothing or may read everything, by X-Agent-Name."""
    grant, asked = request.grant, request.fields.get("x-agent-name", "")
    if not asked:
        return [grant.name] if grant.name else []
    asked = speaker(asked, "X-Agent-Name")
    if grant.name and asked != grant.name and not grant.operator:
        raise Refused(403, f"this token is that of {grant.name}: leave X-Agent-Name out, or give that name")
    return [asked]


def rpc(number: Any, **members: Any) -> Answer:
    return Answer(200, encode({"jsonrpc": "2.0", "id": number, **members}).encode() + b"\n")


class Call:
    """One call of a tool, on the connection of its request. Its steps are requests to the endpoints of this bus."""

    def __init__(self, bus: Bus, request: Request, number: Any, session: Here, tool: tools.Tool) -> None:
        self.bus, self.peer, self.number = bus, request.peer, number
        self.grant, self.owner = request.grant, request.owner()
        self.session, self.tool = session, tool
        self.delivers: tuple[Any, int] | None = None  # what the last of the answers delivers

    def begin(self, arguments: dict[str, Any]) -> Answer | None:
        try:
            self.steps = self.tool.function(self.session, **self.tool.checked(arguments))
        except tools.Failed as failed:
            return self.end(str(failed), failed=True)
        return self.go_on(None)

    def go_on(self, answer: Answer | None) -> Answer | None:
        """Take steps until one waits, or until the tool has its text."""
        while True:
            try:
                self.bus.check_token(self.peer.token or "")
                ask = self.step(answer)
            except Refused as refused:  # the token was revoked meanwhile
                return refusal(refused)
            except StopIteration as done:
                return self.end(done.value, failed=False)
            except tools.Failed as failed:
                return self.end(str(failed), failed=True)
            except Exception as error:
                say_exception(error)
                return rpc(self.number, error={"code": -32603, "message": "the log of the bus says why"})
            self.peer.then = self.go_on
            answer = self.asked(ask)
            if not answer:
                return None
            self.peer.then = None

    def step(self, answer: Answer | None) -> tools.Ask:
        """Give the tool an answer of the bus; its next request."""
        if not answer:
            return next(self.steps)
        self.delivers = answer.delivers or self.delivers
        if len(answer.body) > HEAD_BYTES:
            self.bus.storms.worked(self.owner, "", len(answer.body))
        value = json.loads(answer.body, parse_float=str)
        if answer.status != 200:
            return self.steps.throw(tools.Failed(answer.status, value["error"]))
        return self.steps.send(value)

    def asked(self, ask: tools.Ask) -> Answer | None:
        """The answer of an endpoint to a request of the tool; None if it comes later."""
        method = "GET" if ask.order is None else "POST"
        inner = Request(self.peer, f"{method} {ask.path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        try:
            inner.parse_head()
            inner.grant, inner.endpoint = self.grant, self.bus.routes.get((method, inner.route))
            inner.body = b"" if ask.order is None else encode(ask.order).encode()
            return self.bus.answer(inner)
        except Refused as refused:
            return refusal(refused)
        except Exception as error:
            say_exception(error)
            return refusal(our_fault())

    def end(self, text: str, failed: bool) -> Answer:
        answer = rpc(self.number, result=protocol.result(self.session.harmless(text), failed))
        return answer._replace(delivers=self.delivers)
