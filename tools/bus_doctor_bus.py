"""The bus at the end of the way: what answers there, what it says of itself, and what it lets us do.

Part of bus_doctor.py, which imports it. A hop returns what it found, or raises a Fault that says what to do.
"""
from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import shlex
import shutil
import sys
import time
from typing import Any
from urllib.parse import urlencode, urlsplit

from bus_doctor_way import MEND, Fault, Finding, Skipped, Way

import bus_recv
import bus_send

SKEW_SECONDS = 120.0  # clients of the first contract start at their own clock; the bus refuses a cursor 300 s ahead
BODY_BYTES = 1 << 16  # every bus accepts this much, so everything on the way to it must too
ROOM_BYTES = 16 << 20  # RESERVE_BYTES of bus_server.py: with less, a send gets 507
CHANNEL = "doctor"
TOKEN = re.compile(r"abt_[0-9a-f]{8}_[A-Za-z0-9_-]{43}")

FIRST = "bus_send.py, bus_recv.py and bus_listener.sh work with it; for receipts, tokens and the rest run bus_server.py"
NO_ROOM = "where the bus runs: make room on the disk of its database, or remove old messages, as with {}"
BETWEEN = "something on the way treats this request differently from the earlier ones: look into its log"
LOGIN = "exempt the bus from that login (the bus has tokens), or avoid it with a tunnel"
ROOM = "its disk has {:.1f} MiB free, and below {} MiB the bus may refuse messages (507): make room, or prune"
NO_BUS = "is the bus running, and does the proxy in front of it lead there? Or is this an error of the http_proxy here?"
STRANGER = "is that another web server, a login page or a firewall? A firewall may let another AGENT_BUS_UA pass"
PAGES = {401: LOGIN, 407: LOGIN}  # by the status of another server's page
REFUSALS = {  # by the status of the bus's own answer to /healthz
    403: "start the bus with --allow-host and that name, or make a token for each agent",
    404: "AGENT_BUS_URL must end before the path of an endpoint, as in http://host:8080",
    503: "its log says more; a front without its ledger: does a machine of the ledger lead (docs/cluster.md)?",
}
POSTS = {
    400: "set AGENT_NAME to another name",
    403: "set AGENT_NAME to the name of the token",
    413: "start the bus with a larger --max-body",
}


class Bus(Way):
    """The way to one bus, and the bus itself."""

    health: dict[str, Any]  # the answer of the bus to /healthz
    front: dict[str, Any]  # the same with our token, which tells more
    first: bool  # it is a bus of the first contract

    def answer(self) -> Finding:
        """Does anything answer there? Is it the bus, or something in its place?"""
        try:
            response, page = self.fetch("/healthz")
        except (OSError, ValueError, http.client.HTTPException) as error:
            self.check_scheme()
            advice = "is that the right port? Does the log of the bus or of a proxy say more?"
            raise Fault(f"no answer: {bus_recv.worded(error)}", advice) from None
        self.health, self.skew, status = said(page), time.time() - bus_recv.clock_of(response.headers), response.status
        if status == 200 and self.health:
            return "200, and JSON"
        if status == 400:  # some servers answer plain http on an https port with this
            self.check_scheme()
        if 300 <= status < 400:
            place = response.headers.get("Location", "").partition("/healthz")[0]
            advice = f"the clients follow no redirect: set AGENT_BUS_URL={place}"
            raise Fault(f"{status}: a redirect to {place}", advice)
        if isinstance(self.health.get("error"), str):
            raise Fault(f"{status}: {self.health['error']}", REFUSALS.get(status, BETWEEN))
        advice = PAGES.get(status, NO_BUS if status >= 500 else STRANGER)
        raise Fault(f"{status} and {title(page)}, from {response.headers.get('Server', 'an unknown server')}", advice)

    def kind(self) -> Finding:
        if self.health.get("ok") is not True or not bus_recv.DECIMAL.fullmatch(str(self.health.get("now"))):
            raise Fault("this server is not an agent-bus", "is that the right host and port?")
        self.first = "bus" not in self.health and self.fetch("/inbox")[0].status != 401
        if self.first:
            return "a bus of the first contract: it can send, receive and list (/send, /recv, /inbox)", FIRST
        if "bus" not in self.health:
            return "an agent-bus, which is closed: it tells more to those who have a token"
        return f"an agent-bus, {self.health['bus']}"

    def clock(self) -> Finding:
        if abs(self.skew) < SKEW_SECONDS:
            return f"ours is within {abs(self.skew) + 1:.0f} s of the bus's clock"  # the Date has whole seconds
        found = f"ours is {abs(self.skew):.0f} s {'ahead of' if self.skew > 0 else 'behind'} the bus's clock"
        return found, "set it (NTP): old clients begin to read at their own clock, and certificates depend on it"

    def token(self) -> Finding:
        """Does the bus need a token, and is a valid one set?"""
        try:
            header = bus_recv.credentials(self.url)
        except ValueError as error:
            raise Fault(str(error), MEND) from None
        response, page = self.fetch("/inbox")
        if response.status == 200:
            return "the bus needs none" + (", and the one that is set has no effect" if header else "")
        if response.status != 401 or "error" not in said(page):
            raise Fault(f"{response.status}: {said(page).get('error') or title(page)}", BETWEEN)
        text = header.get("Authorization", "").partition(" ")[2]
        if not text:
            invite = bus_recv.called("python3 bus_server.py invite", "invite")
            advice = f"where the bus runs: {invite} NAME; here: set AGENT_BUS_TOKEN to the token it prints"
            raise Fault("the bus needs one, and none is set", advice)
        if not TOKEN.fullmatch(text):
            advice = "a token is abt_, 8 hex digits, _ and 43 characters, 56 in all: paste all of it, without quotes"
            raise Fault(f"the text that is set is not a token ({len(text)} characters)", advice)
        try:
            bus_recv.ask(self.url, "/inbox", self.PATIENCE)
        except bus_recv.Refused as refused:
            tokens = bus_recv.called("python3 bus_server.py tokens", "tokens")
            advice = f"where the bus runs, {tokens} lists its tokens, and invite makes one"
            why = "it has expired" if "expired" in str(refused) else "it is wrong, cut off, revoked or another bus's"
            path, file = bus_recv.configuration()
            place = path if text == file.get("AGENT_BUS_TOKEN") else "the environment, or AGENT_BUS_TOKEN_FILE"
            raise Fault(f"the bus does not accept {text[:12]} (from {place}): {why}", advice) from None
        return f"{text[:12]} is valid"

    def ledger(self) -> Finding:
        """A front: which machine of its ledger leads, and is what it takes on another one too? Else nothing."""
        if self.first or "ledger" not in self.look():
            return ""
        entry, fronts = self.front["position"], self.front["fronts"]
        leads, waits_for = self.front["ledger"]["leads"], self.front["ledger"]["waits_for"]
        found = f"{leads} leads; this front is at entry {entry}, of {fronts} that live"
        if waits_for:
            return f"{found}; a message is stored when it is on {leads} and on {waits_for}"
        return f"{found}; a message is on {leads} alone", "it is lost with that machine: docs/cluster.md has safer ones"

    def look(self) -> dict[str, Any]:
        """What this server says of itself to those who have a token."""
        self.front, _ = bus_recv.ask(self.url, "/healthz", self.PATIENCE)
        return self.front

    def send(self) -> Finding:
        """POST a message of a size that every bus accepts. It has no receiver, so the bus must refuse it."""
        if not self.name:
            return "skipped: AGENT_NAME is not set", "set it to the name that the others send to"
        if self.first:
            raise Skipped("a bus of the first contract would store the test message")
        if not bus_recv.NAME.fullmatch(self.name):
            advice = "a name is 1 to 64 of A-Z a-z 0-9 . _ : @ - with a letter or digit first"
            raise Fault(f"AGENT_NAME is {self.name!r}, which is not a name", advice)
        message = {"from": self.name, "to": "", "msg": "x" * BODY_BYTES, "channel": CHANNEL}
        try:
            bus_send.post(self.url, message, self.PATIENCE)
        except bus_send.Unreachable as fault:
            if not str(fault).startswith("507: "):
                raise
            advice = NO_ROOM.format(bus_recv.called("python3 bus_server.py prune --older 7d", "prune --older 7d"))
            raise Fault(f"disk: {str(fault)[5:]}", advice) from None
        except bus_send.Refused as refused:
            if refused.status == 400 and not str(refused).startswith("from"):
                return f"as {self.name}: {BODY_BYTES >> 10} KiB arrive"
            raise Fault(f"{refused.status}: {refused}", POSTS.get(refused.status, BETWEEN)) from None
        raise Fault("a message without a receiver was stored", "this server breaks PROTOCOL.md: use another one")

    def recv(self) -> Finding:
        """May we read our mail? The poll is for a channel without mail."""
        if not self.name:
            raise Skipped("AGENT_NAME is not set")
        query = {"to": self.name, "channel": CHANNEL, "since": self.health["now"], "peek": "true"}
        try:
            bus_recv.ask(self.url, f"/recv?{urlencode(query)}", self.PATIENCE)
        except bus_recv.Refused as refused:
            self.hold = 0
            return f"{refused.status}: {refused}", "if the token was made with --send-only, this is right"
        return f"as {self.name}: allowed"

    def long_poll(self) -> Finding:
        """Does a request without an answer stay open for as long as the bus may hold it?"""
        if not self.name or not self.hold:
            raise Skipped("--hold is 0" if self.name else "AGENT_NAME is not set")
        if self.first:
            raise Skipped("a bus of the first contract holds a poll for as long as it likes")
        if sys.stderr and sys.stderr.isatty():
            print(f"      (a long poll takes {self.hold:g} s; --hold 0 leaves it out)", file=sys.stderr)
        began = time.monotonic()
        query = {"channel": CHANNEL, "since": self.health["now"], "block": "true", "wait": f"{self.hold:g}"}
        try:  # a reader of the log is nobody, so no name is left behind
            bus_recv.ask(self.url, f"/log?{urlencode(query)}", self.hold + self.PATIENCE)
        except bus_recv.Refused as refused:
            raise Skipped(str(refused)) from None
        except bus_recv.Unreachable as fault:
            held = time.monotonic() - began
            advice = f"set the timeout of each proxy to 75 s (docs/deploy.md); until then, wait={held * 0.8:.0f} works"
            raise Fault(f"cut after {held:.1f} s: {fault}", advice) from None
        held = time.monotonic() - began
        if held < self.hold - 1:
            return f"answered after {held:.1f} s of {self.hold:g}", "no poll is held so long, or the bus is stopping"
        return f"open for {held:.0f} s"

    def database(self) -> Finding:
        """Where is the database of this bus, for people with sqlite3? The lock file beside it has the bus's URL."""
        if not (self.direct and bus_recv.is_here(self.target)):
            return "on the machine of the bus, which printed its path when it started"
        state = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
        path = os.path.join(state, "agent-bus", "bus.db")
        with contextlib.suppress(OSError, ValueError), open(f"{path}.lock") as lock:
            if urlsplit(lock.readline().strip()).port == self.port:
                found = f"{path}; to look inside: sqlite3 {shlex.quote(path)} 'select * from readable'"
                free = shutil.disk_usage(path).free
                return found if free >= ROOM_BYTES else (found, ROOM.format(free / (1 << 20), ROOM_BYTES >> 20))
        return "not at the usual place; the bus printed its path when it started"


def said(page: bytes) -> dict[str, Any]:
    """The JSON object in this page; an empty one if there is none."""
    try:
        value = json.loads(page, parse_float=str)
    except (ValueError, RecursionError):
        value = None
    return value if isinstance(value, dict) else {}


def title(page: bytes) -> str:
    found = re.search(rb"<title>([^<]{1,80})", page, re.IGNORECASE)
    return f"a page '{found[1].decode('latin-1').strip()}'" if found else "a page" if page else "an empty page"
