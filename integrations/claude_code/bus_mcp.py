#!/usr/bin/env python3
"""The bus for an agent's MCP client: its tools on stdio. With --channel it also pushes each new message to the agent.

    claude mcp add bus -e AGENT_BUS_URL=http://10.0.0.5:8080 -e AGENT_NAME=spark -- python3 /path/to/bus_mcp.py

The tools are those of bus_extensions/_mcp_tools.py, which the bus itself has at /mcp. Read this file in the order a
request travels: main, Server (a line, its method, the one place that writes), Mine (a session whose cursor is in a
file), Inbox; then Channel, which goes the other way.

Looking takes nothing. Mail is unread until `bus_ack` moves the cursor, which is in the file that bus_recv.py and the
hooks use too. A push has no receipt, so it does not move the cursor: a message that was pushed in vain stays in
bus_inbox, and the next run pushes it again.

Threads: the main thread reads stdin and answers the requests that need no bus. Each tool call has a thread, so a call
that waits delays no other. The channel has a thread. Standard library only; it reads the environment of bus_send.py
and bus_recv.py.
"""
from __future__ import annotations  # needs Python 3.9 or later

import argparse
import contextlib
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from decimal import Decimal
from typing import Any, BinaryIO
from urllib.parse import urlencode

# Python 3.8 prints this text. Older ones show the line in a SyntaxError, because they do not know `:=`.
if sys.version_info < (3, 9) and (needs := "bus_mcp.py needs Python 3.9 or later"):  # noqa: UP036
    sys.exit(needs)
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # not there yet, if another program imports us
import session  # noqa: E402, I001  which makes the next three importable
from processes import its_process  # noqa: E402
from session import Nameless, Self, harmless, quoted, this_session  # noqa: E402

import bus_inbox  # noqa: E402
import bus_recv  # noqa: E402
import bus_send  # noqa: E402
import doing  # noqa: E402
import notice  # noqa: E402
from bus_inbox import label  # noqa: E402

tools, protocol = session.mcp_part("_mcp_tools"), session.mcp_part("_mcp_protocol")

PATIENCE = 10.0  # s in which a send is tried again; later the agent may try, with the same key
LAST_CALLS = 2.0  # s that running calls have after the end of stdin: enough for a send, not for a wait
AHEAD = 20  # messages that are pushed before the first of them is acknowledged: a storm must not fill the context
FIELD = 100  # characters of an attribute of a push
NAMED = ("from", "to", "reply_to", "subject", "type", "priority")  # members that become attributes of a push
PAUSE, LONGEST_PAUSE = 1.0, 16.0  # s between looks at a bus that answers at once, because there is unread mail
PUSHED = "New messages arrive as <channel> events, each once; bus_inbox shows what is still unread."


class Server:
    """Serves one client, from its first line to the end of stdin. All threads may write(); the rest is the main's."""

    def __init__(self, out: BinaryIO, channel: bool) -> None:
        self.out, self.writing = out, threading.Lock()
        self.session = Mine()
        self.channel = Channel(self) if channel else None
        self.waiting: threading.Thread | None = self.channel
        if not channel and os.environ.get("CLAUDE_CODE_SESSION_ID"):
            self.waiting = notice.Waker(myself, complain)  # for the FileChanged hook
        self.calls: list[threading.Thread] = []

    def take(self, line: bytes) -> None:
        """Answer a request. A notification gets no answer, and nor does an answer, as we never ask."""
        number = None
        try:
            message = protocol.parse(line)
            if protocol.is_answer(message):
                return
            number = message.get("id") if isinstance(message, dict) else None
            protocol.check(message)
            if "id" not in message:
                self.note(message["method"])
            elif message["method"] == "tools/call":
                call = threading.Thread(target=self.work, args=(number, *protocol.called(message)), daemon=True)
                self.calls = [*filter(threading.Thread.is_alive, self.calls), call]
                call.start()
            else:
                experimental = {"experimental": {"claude/channel": {}}} if self.channel else {}
                pushed = PUSHED if self.channel else ""
                self.write(id=number, result=protocol.respond(message, bus_send.VERSION, pushed, **experimental))
        except protocol.Wrong as wrong:
            self.write(id=number, error={"code": wrong.code, "message": str(wrong)})

    def note(self, method: str) -> None:
        if method == "notifications/initialized" and self.waiting and not self.waiting.ident:
            self.waiting.start()

    def work(self, number: Any, tool: Any, arguments: dict[str, Any]) -> None:
        """Answer a call, in its own thread."""
        try:
            self.write(id=number, result=self.session.call(tool, arguments))
        except Exception as error:
            self.write(id=number, error={"code": -32603, "message": f"{type(error).__name__}: stderr has the details"})
            raise

    def write(self, **members: Any) -> None:
        line = json.dumps({"jsonrpc": "2.0", **members}).encode() + b"\n"
        with self.writing, contextlib.suppress(OSError):  # a client that is gone has closed our stdin, too
            self.out.write(line)
            self.out.flush()

    def end(self) -> None:
        deadline = time.monotonic() + LAST_CALLS
        for call in self.calls:
            call.join(max(deadline - time.monotonic(), 0))


def myself() -> Self:
    """The session whose client started us."""
    return this_session(its_process("mcp"), os.environ.get("CLAUDE_PROJECT_DIR"))


class Mine(tools.Session):
    """The session whose client started us. Its cursor is in a file. What it was shown holds for all calls.

    Its methods ask the bus themselves; as generators they only fit into the tools.
    """

    def __init__(self) -> None:
        super().__init__([], "default")
        self.of_call = threading.local()  # the Inbox of a call, which has a thread of its own

    @property
    def box(self) -> Inbox:
        if not hasattr(self.of_call, "box"):
            self.of_call.box = Inbox(peeks=True)
        return self.of_call.box

    @property
    def place(self) -> Inbox:
        """The same, with its cursor for the bus that answers."""
        if self.box.bus is None:
            health = self.box.ask("/healthz")
            if health.get("ok") is not True:
                raise bus_recv.Unreachable()
            self.box.take_up(health)
        return self.box

    def call(self, tool: Any, arguments: dict[str, Any]) -> dict[str, Any]:
        """The result of a tool. The model reads a failure, and can correct its call."""
        failed = True
        try:
            given = tool.checked(arguments)
            self.names, self.channel, self.where = self.box.names, self.box.channel, f"the bus at {self.box.url}"
            text, failed = self.answered(tool.function(self, **given)), False
        except bus_recv.Unreachable as fault:
            text = bus_recv.no_bus(self.box.url, fault)
        except (tools.Failed, Nameless, bus_recv.Refused, bus_send.Refused, bus_send.Unreachable, ValueError,
                OSError) as error:  # fmt: skip
            text = str(error)
        return protocol.result(harmless(text), failed)

    def answered(self, steps: Any) -> str:
        """The text of a tool, whose requests are asked one after the other."""
        try:
            ask = next(steps)
            while True:
                try:
                    answer = self.box.ask(*ask)
                except bus_recv.Refused as refused:
                    ask = steps.throw(tools.Failed(refused.status, str(refused)))
                else:
                    ask = steps.send(answer)
        except StopIteration as done:
            return done.value

    def harmless(self, text: str) -> str:
        return harmless(text)

    def clock(self) -> float:
        return self.box.bus_time

    def look(self) -> Iterator[Any]:
        mail, more = self.box.look(0)
        yield from ()
        return tools.Page(mail, more, self.box.notes)

    def wait(self, seconds: float) -> Iterator[Any]:
        self.place.poll_on({"since": self.box.cursor.at, "max": 1, "block": "true", "wait": f"{seconds:.3f}"}, seconds)
        yield from ()

    def took(self, messages: list[dict[str, Any]]) -> Iterator[Any]:
        """A bus of the first contract knows no look that takes nothing."""
        if self.place.bus != bus_recv.OLD_CONTRACT:
            here = {"since": self.box.cursor.at, "max": len(messages)}
            self.box.poll_on(here if messages else {"since": "now"})
        yield from ()

    def present(self, tick: int) -> Iterator[Any]:
        self.place.cursor.move(tools.ts_of(tick))
        Channel.again.set()
        self.box.poll_on({"since": self.box.cursor.at, "max": 1, "ack": "true"})  # which fetches nothing
        yield from ()

    def find(self, id: str) -> Iterator[Any]:
        """Among the unread messages first: a bus of the first contract has no other way to it."""
        page = yield from self.look()
        found = next((each for each in page.messages if label(each) == id), None)
        return found or (yield from super().find(id))

    def digest(self, since: str = "last") -> Iterator[Any]:
        """From the cursor in the file: a reader of this machine may be ahead of what the bus knows."""
        return (yield from super().digest(self.place.cursor.at if since == "last" else since))

    def send(self, order: dict[str, Any], wait: float | None = None) -> Iterator[Any]:
        yield from ()
        given = {"sender": self.me(), **order}
        to, msg = given.pop("to"), given.pop("msg")
        if wait is None:
            return bus_send.send(to, msg, patience=PATIENCE, **given)
        answer = bus_send.ask(to, msg, timeout=wait, **given)
        notice.await_reply(self.me(), str(answer.get("id")))
        return answer

    def say(self, said: dict[str, str]) -> Iterator[Any]:
        yield from super().say(said)
        doing.keep_said(self.me(), said)  # the hooks are processes of their own

    def rename(self, name: str) -> Iterator[Any]:
        yield from ()
        process = its_process("mcp")
        if process is None:
            raise tools.Failed(0, "this session cannot be told from others here: set AGENT_NAME")
        old = session.rename(process, name)
        return f"this session is {name} on the agent-bus now; for a day it reads what comes for {old}, too"


class Inbox(bus_inbox.Inbox):
    """The mail of the session whose client started us."""

    def __init__(self, peeks: bool = False) -> None:
        own = myself()
        super().__init__(own.name, peeks=peeks)
        self.names = own.names  # after a rename, the old name too
        self.notes: list[str] = []
        self.announce = lambda line: self.notes.append(f"-- agent-bus: {line}")
        self.warn = complain
        self.bus_time = time.time()  # until the bus tells

    def ask(self, path: str, order: dict[str, Any] | None = None) -> dict[str, Any]:
        seconds = bus_recv.GRACE_SECONDS + (order or {}).get("wait", 0)
        answer, self.bus_time = bus_recv.ask(self.url, path, seconds, order)
        return answer

    def poll_on(self, query: dict[str, Any], hold: float = 0) -> None:
        """Poll and pass over the answer: its messages are shown by the next look, or were shown."""
        query = {"to": ",".join(self.names), "channel": self.channel, "bus": self.bus, **query}
        with contextlib.suppress(OSError), notice.alone(self.names[0], "poll"):
            pass  # the next session finds its file, and does not take us for another program that reads its mail
        bus_recv.ask(self.url, f"/recv?{urlencode(query)}", hold + bus_recv.GRACE_SECONDS)


class Channel(threading.Thread):
    """Pushes each message once. It remembers how far it has pushed; the cursor is the agent's.

    While there is unread mail, the bus answers at once. So the channel polls less and less often, until a message
    arrives or is acknowledged. It pushes at most AHEAD unread messages.
    """

    again = threading.Event()  # set by bus_ack: look at once

    def __init__(self, server: Server) -> None:
        super().__init__(daemon=True)
        self.server = server
        self.pushed: dict[str | None, Decimal] = {}  # by bus: the ts up to which all was pushed
        self.told = ""  # the last push that was not a message

    def run(self) -> None:
        try:
            box = Inbox()
            box.announce = self.tell
            self.follow(box)
        except (Nameless, bus_recv.Refused, ValueError, OSError) as error:
            complain(str(error))
            why = notice.reason(error) if isinstance(error, bus_recv.Refused) else error
            self.tell(f"{why}; nothing more is pushed until this MCP server is started again")

    def follow(self, box: Inbox) -> None:
        pause = PAUSE
        while True:
            began = time.monotonic()
            try:
                mail, _ = box.look(tools.HOLD)
            except bus_recv.Unreachable as fault:
                box.endure(fault, time.monotonic() - began, math.inf)
                continue
            fresh = [one for one in mail[:AHEAD] if Decimal(one["ts"]) > self.pushed.get(box.bus, 0)]
            for message in fresh:
                self.push(tools.shown(self.server.session, message), attributes(message))
                self.pushed[box.bus] = Decimal(message["ts"])
                self.server.session.has_shown(tools.tick_of_ts(message["ts"]), box.names)
            if fresh and len(mail) >= AHEAD:
                self.tell(f"{AHEAD} are unread; later messages are pushed after bus_ack of {label(mail[AHEAD - 1])}")
            pause = PAUSE if fresh or not mail else min(2 * pause, LONGEST_PAUSE)
            if self.again.wait(max(began + pause - time.monotonic(), 0)):
                self.again.clear()
                pause = PAUSE

    def tell(self, line: str) -> None:
        if line != self.told:  # each poll reports a gap until the cursor is past it
            self.push(harmless(f"-- agent-bus: {line}"), {})
        self.told = line

    def push(self, content: str, meta: dict[str, str]) -> None:
        self.server.write(method="notifications/claude/channel", params={"content": content, "meta": meta})


def attributes(message: dict[str, Any]) -> dict[str, str]:
    """Short, each in one line and without a quote: Claude Code writes them as those of its <channel> tag."""
    known = {"msg_id": label(message), **{field: message[field] for field in NAMED if field in message}}
    cut = {key: quoted(str(value)[:FIELD])[1:-1] for key, value in known.items()}
    return {key: value.replace('\\"', "\\u0022") for key, value in cut.items()}


def complain(line: str) -> None:
    bus_recv.complain(line, "bus_mcp")


def main() -> None:
    parser = argparse.ArgumentParser(description="Tools for an agent-bus: an MCP server on stdin and stdout.")
    parser.add_argument("--channel", action="store_true", help="also push new messages, as a channel of Claude Code")
    options = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: os._exit(0))
    server = Server(sys.stdout.buffer, options.channel)
    sys.stdout = sys.stderr  # stdout is for the protocol only
    if sys.stdin.isatty():
        complain("this is for an MCP client, which starts it and speaks JSON with it; Ctrl-C ends it")
    for line in sys.stdin.buffer:
        server.take(line)
    server.end()
    os._exit(0)  # sys.exit would be fatal if a thread that ends with us holds stdout


if __name__ == "__main__":
    main()
