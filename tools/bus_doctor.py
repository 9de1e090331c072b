#!/usr/bin/env python3
"""Check each hop on the way to an agent-bus; say which one fails, and what to try.

    AGENT_BUS_URL=https://bus.example AGENT_NAME=spark python3 tools/bus_doctor.py

It prints one line for each hop: `ok`, `warn` (it works, with a problem), or `FAIL`. The line below a `warn` or `FAIL`
says what to do. The first `FAIL` ends the check. If AGENT_BUS_URL has several URLs, each is checked, and a last line
names those that fail. Of a bus with several fronts it tells which machine of the ledger leads, whether another one has
what is acknowledged, and how far each front is. The environment and the code are those of the clients, so a client has
the same faults.

Nothing is stored, no mail is read and no cursor moves: the bus must refuse the test send, and the test polls use the
channel `doctor`, where nobody sends, and leave no name behind. The token is never shown. Exit code: 0 no hop failed; 1
a hop failed; 2 usage.
"""
from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import re
import shlex
import socket
import ssl
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, Union
from urllib.parse import urlencode, urlsplit

# Python 3.8 says this sentence; older ones show the line, as a SyntaxError, because they do not know `:=`.
if sys.version_info < (3, 9) and (needs := "bus_doctor.py needs Python 3.9 or later"):  # noqa: UP036
    sys.exit(needs)
HERE = os.path.dirname(os.path.realpath(__file__))
sys.path += [HERE, os.path.dirname(HERE)]  # the clients lie beside this file or one folder up, or are installed
try:
    import bus_recv
    import bus_send
except ModuleNotFoundError as missing:
    print(f"bus_doctor: {missing.name}.py is missing in {HERE}: run curl -fO $AGENT_BUS_URL/{missing.name}.py there",
          file=sys.stderr)  # fmt: skip
    sys.exit(2)

PATIENCE = 10.0  # s for a hop; a slower hop counts as broken
SKEW_SECONDS = 120.0  # clients of the first contract start at their own clock; the bus refuses a cursor 300 s ahead
CATCH_UP = 2.0  # s; a front hears of an entry within 1 s, also if no hint comes
PAGE_BYTES = 1 << 16  # read of an answer; it may be a web page, whose title we want
BODY_BYTES = 1 << 16  # every bus accepts this much, so everything on the way to it must too
CHANNEL = "doctor"
VARIABLES = set(
    "AGENT_NAME AGENT_BUS_URL AGENT_BUS_CHANNEL AGENT_BUS_TOKEN AGENT_BUS_TOKEN_FILE AGENT_BUS_CA AGENT_BUS_PLAIN_HTTP "
    "AGENT_BUS_UA AGENT_BUS_STATE_DIR AGENT_BUS_OUTBOX AGENT_BUS_PROFILE".split()
)
TOKEN = re.compile(r"abt_[0-9a-f]{8}_[A-Za-z0-9_-]{43}")
Finding = Union[str, tuple[str, str]]  # what was found; with an advice it is a warning


class Fault(Exception):
    """A hop failed: what was found, and what to do."""

    def __init__(self, found: str, advice: str) -> None:
        super().__init__(found)
        self.advice = advice


class Way:
    """The way from here to one bus. A hop returns what it found, or raises; it sets attributes for later hops."""

    host: str  # with `port`, the first machine we talk to: that of the bus, or a proxy
    port: int
    direct: bool  # that machine is the bus, not a proxy
    health: dict[str, Any]  # the answer of the bus to /healthz
    front: dict[str, Any]  # the same with our token, which tells more
    first: bool  # it is a bus of the first contract

    name: str  # AGENT_NAME, or an empty text

    def __init__(self, url: str, hold: float) -> None:
        self.url, self.hold = url, hold

    def spelling(self) -> Finding:
        try:
            self.name = bus_recv.settings().get("AGENT_NAME", "")
            connection, *_ = bus_recv.connect(self.url, PATIENCE)
        except ValueError as error:
            raise Fault(str(error), MEND) from None
        parts = urlsplit(self.url)
        self.scheme, self.target = parts.scheme, parts.hostname or ""
        self.host, self.port = connection.host, connection.port
        if not self.target and self.scheme != "unix":
            raise Fault(f"{self.url} names no host", "write it like http://host:8080")
        self.direct = self.scheme == "unix" or not bus_recv.proxy_for(self.scheme, self.target, parts.port or self.port)
        path, file = bus_recv.configuration()
        if strange := sorted(name for name in file if name.startswith("AGENT") and name not in VARIABLES):
            return f"{self.url}, {origin(self.url)}", f"{path} sets {', '.join(strange)}, which nothing reads: a typo?"
        return f"{self.url}, {origin(self.url)}"

    def proxy(self) -> Finding:
        if self.scheme == "unix":
            return "none: a Unix socket is on this machine"
        variable = next((name for name in os.environ if name.lower() == f"{self.scheme}_proxy"), None)
        if not variable:
            return "none"
        if not self.direct:
            return f"{variable} leads through {self.host} port {self.port}"
        if bus_recv.is_here(self.target):
            return f"{variable} is set, and not used: the bus is on this machine"
        return f"{variable} is set, and not used: {self.target} is in no_proxy"

    def dns(self) -> Finding:
        if self.scheme == "unix":
            return "not needed: a Unix socket"
        try:
            found = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
        except OSError as error:
            advice = "is the name spelled right? If it is a name in a VPN or tailnet, is that up on this machine?"
            raise Fault(f"no address for {self.host}: {error.strerror}", advice) from None
        addresses = ", ".join(dict.fromkeys(str(address[0]) for *_, address in found))
        return f"{self.host} is {addresses}" if addresses != self.host else "not needed: the URL has an address"

    def tcp(self) -> Finding:
        where, began = f"{self.host} port {self.port}" if self.target else urlsplit(self.url).path, time.monotonic()
        try:
            with contextlib.closing(bus_recv.connect(self.url, PATIENCE)[0]) as connection:
                local = self.scheme == "unix"
                connection.connect() if local else bus_recv.dial((self.host, self.port), PATIENCE).close()
        except FileNotFoundError:
            raise Fault(f"there is no {where}", "is the server running with --listen unix: and this path?") from None
        except PermissionError:
            raise Fault(f"{where} is not open to this user", "the socket is for the user who runs the bus") from None
        except ConnectionRefusedError:
            advice = "is the server or the tunnel running? Without --host the bus listens on its own 127.0.0.1 only"
            raise Fault(f"{where} refuses: nothing listens there", advice) from None
        except socket.timeout:
            advice = "is a firewall in between, is the host down, is the address right? Try ping, and check the VPN"
            raise Fault(f"{where} does not answer within {PATIENCE:.0f} s", advice) from None
        except OSError as error:
            raise Fault(f"{where}: {bus_recv.worded(error)}", "is the network, the VPN or the tunnel up?") from None
        return f"{where} accepts, after {(time.monotonic() - began) * 1000:.0f} ms"

    def tls(self) -> Finding:
        if self.scheme == "unix":
            return "none: a Unix socket"
        plain = "AGENT_BUS_PLAIN_HTTP" in bus_recv.settings(self.url)
        if self.scheme == "http" and (bus_recv.is_here(self.target) or plain):
            return "none: plain http"
        if self.scheme == "http":
            return "none: plain http across a network", "use https; in a tunnel or a VPN set AGENT_BUS_PLAIN_HTTP=1"
        connection, *_ = bus_recv.connect(self.url, PATIENCE)
        with contextlib.closing(connection):
            try:
                connection.connect()
            except ssl.SSLCertVerificationError as error:
                advice = CERTIFICATE.get(error.verify_code, "ask the operator of the bus for a valid certificate")
                raise Fault(f"the certificate is not valid: {error.verify_message.rstrip('.')}", advice) from None
            except OSError as error:
                self.check_scheme()
                advice = "is that the right port? Is a proxy in between?"
                raise Fault(f"no TLS: {bus_recv.worded(error)}", advice) from None
            return "the certificate is valid"

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

    def bus(self) -> Finding:
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
            invite = bus_recv.called("bus_server.py invite", "invite")
            advice = f"where the bus runs: {invite} NAME; here: set AGENT_BUS_TOKEN to the token it prints"
            raise Fault("the bus needs one, and none is set", advice)
        if not TOKEN.fullmatch(text):
            advice = "a token is abt_, 8 hex digits, _ and 43 characters, 56 in all: paste all of it, without quotes"
            raise Fault(f"the text that is set is not a token ({len(text)} characters)", advice)
        try:
            bus_recv.ask(self.url, "/inbox", PATIENCE)
        except bus_recv.Refused as refused:
            tokens = bus_recv.called("bus_server.py tokens", "tokens")
            advice = f"where the bus runs, {tokens} lists its tokens, and invite makes one"
            why = "it was revoked, or is another bus's" if "expired" not in str(refused) else "it has expired"
            raise Fault(f"the bus does not know {text[:12]}: {why}", advice) from None
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
        self.front, _ = bus_recv.ask(self.url, "/healthz", PATIENCE)
        return self.front

    def send(self) -> Finding:
        """POST a message of a size that every bus accepts. It has no receiver, so the bus must refuse it."""
        if not self.name:
            return "skipped: AGENT_NAME is not set", "set it to the name that the others send to"
        if self.first:
            return "skipped: a bus of the first contract would store the test message"
        if not bus_recv.NAME.fullmatch(self.name):
            advice = "a name is 1 to 64 of A-Z a-z 0-9 . _ : @ - with a letter or digit first"
            raise Fault(f"AGENT_NAME is {self.name!r}, which is not a name", advice)
        message = {"from": self.name, "to": "", "msg": "x" * BODY_BYTES, "channel": CHANNEL}
        try:
            bus_send.post(self.url, message, PATIENCE)
        except bus_send.Refused as refused:
            if refused.status == 400 and not str(refused).startswith("from"):
                return f"as {self.name}: {BODY_BYTES >> 10} KiB arrive"
            raise Fault(f"{refused.status}: {refused}", POSTS.get(refused.status, BETWEEN)) from None
        raise Fault("a message without a receiver was stored", "this server breaks PROTOCOL.md: use another one")

    def recv(self) -> Finding:
        """May we read our mail? The poll is for a channel without mail."""
        if not self.name:
            return "skipped"
        query = {"to": self.name, "channel": CHANNEL, "since": self.health["now"], "peek": "true"}
        try:
            bus_recv.ask(self.url, f"/recv?{urlencode(query)}", PATIENCE)
        except bus_recv.Refused as refused:
            self.hold = 0
            return f"{refused.status}: {refused}", "if the token was made with --send-only, this is right"
        return f"as {self.name}: allowed"

    def long_poll(self) -> Finding:
        """Does a request without an answer stay open for as long as the bus may hold it?"""
        if not self.name or not self.hold:
            return "skipped"
        if self.first:
            return "skipped: a bus of the first contract holds a poll for as long as it likes"
        if sys.stderr and sys.stderr.isatty():
            print(f"      (a long poll takes {self.hold:g} s; --hold 0 leaves it out)", file=sys.stderr)
        began = time.monotonic()
        query = {"channel": CHANNEL, "since": self.health["now"], "block": "true", "wait": f"{self.hold:g}"}
        try:  # a reader of the log is nobody, so no name is left behind
            bus_recv.ask(self.url, f"/log?{urlencode(query)}", self.hold + PATIENCE)
        except bus_recv.Refused as refused:
            return f"skipped: {refused}"
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
                return f"{path}; to look inside: sqlite3 {shlex.quote(path)} 'select * from readable'"
        return "not at the usual place; the bus printed its path when it started"

    def fetch(self, path: str) -> tuple[http.client.HTTPResponse, bytes]:
        """The answer to a request without a token, from the bus or not; bus_recv.ask takes only the bus's."""
        connection, prefix, headers = bus_recv.connect(self.url, PATIENCE)
        with contextlib.closing(connection):
            connection.connect()
            with bus_recv.hung_up_after(PATIENCE, connection.sock):
                connection.request("GET", prefix + path, headers=headers)
                response = connection.getresponse()
                page = response.read(PAGE_BYTES)
        if response.length and len(page) < PAGE_BYTES:
            raise http.client.IncompleteRead(page, response.length)
        return response, page

    def check_scheme(self) -> None:
        """Fault, if the port speaks http and the URL says https, or the reverse."""
        speaks = {"https": self.speaks_http, "http": self.speaks_tls}.get(self.scheme)
        if self.direct and speaks and speaks():
            other = {"https": "http", "http": "https"}[self.scheme]
            raise Fault(f"that port speaks {other}", f"set AGENT_BUS_URL={other}{self.url[len(self.scheme):]}")

    def speaks_http(self) -> bool:
        with contextlib.suppress(OSError), bus_recv.dial((self.host, self.port), PATIENCE) as sock:
            sock.sendall(b"GET / HTTP/1.0\r\n\r\n")
            return sock.recv(5) == b"HTTP/"
        return False

    def speaks_tls(self) -> bool:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # we send nothing, so anyone may be there
        try:
            with bus_recv.dial((self.host, self.port), PATIENCE) as sock, context.wrap_socket(sock):
                return True
        except OSError:
            return False


# What to do

FIRST = "bus_send.py, bus_recv.py and bus_listener.sh work with it; for receipts, tokens and the rest run bus_server.py"
MEND = "correct that: the clients end with the same line"
BETWEEN = "something on the way treats this request differently from the earlier ones: look into its log"
LOGIN = "exempt the bus from that login (the bus has tokens), or avoid it with a tunnel"
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
SIGNED = "set AGENT_BUS_CA to the certificate of the authority that signed it: the operator of the bus has that file"
NAMED = "use a name that is in the certificate, or get a certificate with this name"
CERTIFICATE = {  # X509_V_ERR_* of OpenSSL
    9: "set the clock of this machine: the certificate is not valid before a later time",
    10: "renew the certificate (and check the clock of this machine)",
    18: SIGNED, 19: SIGNED, 20: SIGNED, 21: SIGNED,
    62: NAMED, 64: NAMED,
}  # fmt: skip

HOPS: dict[str, Callable[[Way], Finding]] = {
    "url": Way.spelling, "proxy": Way.proxy, "dns": Way.dns, "tcp": Way.tcp, "tls": Way.tls, "http": Way.answer,
    "bus": Way.bus, "clock": Way.clock, "token": Way.token, "ledger": Way.ledger,
    "send": Way.send, "recv": Way.recv, "hold": Way.long_poll, "file": Way.database,
}  # fmt: skip
FAULTS = (bus_recv.Refused, bus_recv.Unreachable, bus_send.Unreachable, OSError, ValueError, http.client.HTTPException)


def origin(url: str) -> str:
    """Where the URL of the bus comes from, and whether the configuration file is used."""
    path, file = bus_recv.configuration()
    its = file.get("AGENT_BUS_URL") or bus_recv.DEFAULT_URL
    given, there = os.environ.get("AGENT_BUS_URL"), os.path.exists(path)
    source = "from AGENT_BUS_URL in the environment" if given else f"from {path}"
    if not there:
        return source if given else f"because AGENT_BUS_URL is not set, and there is no {path}"
    if not bus_recv.is_within(bus_recv.settings()["AGENT_BUS_URL"], its):
        return f"{source}; nothing is taken from {path}, which is for {its}"
    return source


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


def printable(text: str) -> str:
    """One line, without the secrets that a URL or a stranger's answer may hold."""
    for secret, shown in ((r"abt_[0-9a-f]{8}_[\w-]+", "abt_..."), (r"//[^/@\s]*@", "//...@")):
        text = re.sub(secret, shown, text)
    return bus_recv.visible("".join(c if c.isprintable() else " " for c in text))


def examine(way: Way) -> bool:
    """Print a line for each hop, and below a fault or a warning what to do. True if no hop failed."""
    for hop, look in HOPS.items():
        verdict, advice = "ok", ""
        try:
            with patience_for(hop):
                found = look(way)
            if isinstance(found, tuple):
                verdict, (found, advice) = "warn", found
        except Fault as fault:
            verdict, found, advice = "FAIL", str(fault), fault.advice
        except FAULTS as error:  # although the hops before it went well
            verdict, found, advice = "FAIL", bus_recv.worded(error), BETWEEN
        if found:
            tell(verdict, hop, found, advice)
        if verdict == "FAIL":
            return False
    return True


def patience_for(hop: str) -> contextlib.ExitStack:
    """A person at a terminal is told if a hop takes longer than a moment. The hop `hold` says so itself."""
    if hop == "hold" or not (sys.stdout and sys.stdout.isatty()):
        return contextlib.ExitStack()
    return bus_recv.later(bus_recv.SILENCE_SECONDS, lambda: print(f"      (waiting for {hop})", flush=True))


def compare(fronts: list[Way]) -> None:
    """How far is each of these fronts of one bus? Within CATCH_UP each must come as far as one of them was before."""
    newest, end = max(way.front["position"] for way in fronts), time.monotonic() + CATCH_UP
    while (behind := [way for way in fronts if way.look()["position"] < newest]) and time.monotonic() < end:
        time.sleep(0.1)
    for way in behind:
        found = f"{way.url} is at entry {way.front['position']}; another was at {newest} {CATCH_UP:.0f} s before"
        tell("warn", "fronts", found, "its readers get messages late: is its machine busy, or its network slow?")
    if not behind:
        tell("ok", "fronts", f"each has come to entry {newest}", "")
    leaders = {way.front["ledger"]["leads"] for way in fronts}
    if len(leaders) > 1:
        found = f"they are told of different leaders: {', '.join(sorted(leaders))}"
        tell("warn", "fronts", found, "run this again: if it stays so, a front does not reach the one that leads")
    live = max(way.front["fronts"] for way in fronts)
    if live > len(fronts):
        found = f"{live} live, and {len(fronts)} were asked"
        tell("warn", "fronts", found, "add the URLs of the others to AGENT_BUS_URL, or the clients never find them")


def examine_all(hold: float) -> bool:
    """examine() for each URL of the bus. True if no hop failed, and all URLs are of one bus."""
    urls = [""]
    with contextlib.suppress(ValueError):  # the hop `url` tells it
        urls = bus_recv.settings()["AGENT_BUS_URL"].split(",")
    ways = [Way(url, hold) for url in urls]
    failed = [way.url for way in ways if not examine(way)]
    fronts = [way for way in ways if way.url not in failed and "ledger" in getattr(way, "front", {})]
    if fronts and urls[1:]:
        compare(fronts)
    buses = {way.health.get("bus") for way in ways if way.url not in failed}
    if len(buses) > 1:
        tell("FAIL", "urls", f"they are of {len(buses)} buses", "AGENT_BUS_URL may have several URLs only of one bus")
    elif failed and urls[1:]:
        works = [url for url in urls if url not in failed]
        advice = f"until that is mended, the clients use {', '.join(works)}" if works else "the clients reach no bus"
        tell("FAIL", "urls", f"{len(failed)} of {len(urls)} fail: {', '.join(failed)}", advice)
    return not failed and len(buses) == 1


def tell(verdict: str, hop: str, found: str, advice: str) -> None:
    print(printable(f"{verdict:5} {hop:6} {found}"), flush=True)
    if advice:
        print(printable(f"{'':12} -> {advice}"), flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Find the hop that fails on the way to an agent-bus.")
    hold = "length of the test poll, 0 to 60 s (25)"
    parser.add_argument("--hold", type=bus_recv.duration, default=25.0, metavar="S", help=hold)
    parser.add_argument("--bus", type=bus_recv.profile, metavar="PROFILE", help="the bus in PROFILE.env")
    options = parser.parse_args(argv)
    if not 0 <= options.hold <= 60:
        parser.error("--hold must be 0 to 60 seconds")
    try:
        return 0 if examine_all(options.hold) else 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # nobody reads us any more
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # else Python would try again at exit, and complain
        return 0


if __name__ == "__main__":
    sys.exit(main())
