"""The way from here to the server of an agent-bus, hop by hop: its URL, a proxy, its address, its port, TLS.

Part of bus_doctor.py, which imports it. A hop returns what it found, or raises a Fault that says what to do.
"""
from __future__ import annotations

import contextlib
import difflib
import http.client
import os
import socket
import ssl
import time
from typing import Union
from urllib.parse import urlsplit

import bus_recv

PAGE_BYTES = 1 << 16  # read of an answer; it may be a web page, whose title we want
VARIABLES = set(
    "AGENT_NAME AGENT_BUS_URL AGENT_BUS_CHANNEL AGENT_BUS_TOKEN AGENT_BUS_TOKEN_FILE AGENT_BUS_CA AGENT_BUS_PLAIN_HTTP "
    "AGENT_BUS_UA AGENT_BUS_STATE_DIR AGENT_BUS_OUTBOX AGENT_BUS_PROFILE".split()
)
Finding = Union[str, tuple[str, str]]  # what was found; with an advice it is a warning

MEND = "correct that: the clients end with the same line"
SIGNED = "set AGENT_BUS_CA to the certificate of the authority that signed it: the operator of the bus has that file"
NAMED = "use a name that is in the certificate, or get a certificate with this name"
CERTIFICATE = {  # X509_V_ERR_* of OpenSSL
    9: "set the clock of this machine: the certificate is not valid before a later time",
    10: "renew the certificate (and check the clock of this machine)",
    18: SIGNED, 19: SIGNED, 20: SIGNED, 21: SIGNED,
    62: NAMED, 64: NAMED,
}  # fmt: skip


class Fault(Exception):
    """A hop failed: what was found, and what to do."""

    def __init__(self, found: str, advice: str) -> None:
        super().__init__(found)
        self.advice = advice


class Skipped(Exception):
    """A hop was not looked at: why not."""


class Way:
    """The way from here to one server. A hop sets attributes for later hops."""

    PATIENCE = 10.0  # s for a hop; a slower hop counts as broken

    host: str  # with `port`, the first machine we talk to: that of the bus, or a proxy
    port: int
    direct: bool  # that machine is the bus, not a proxy
    name: str  # AGENT_NAME, or an empty text

    def __init__(self, url: str, hold: float) -> None:
        self.url, self.hold = url, hold

    def spelling(self) -> Finding:
        try:
            self.name = bus_recv.settings().get("AGENT_NAME", "")
            connection, *_ = bus_recv.connect(self.url, self.PATIENCE)
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
            similar = [each for name in strange for each in difflib.get_close_matches(name, VARIABLES, 1)]
            meant = f"did you mean {', '.join(similar)}?" if similar else "a typo?"
            return f"{self.url}, {origin(self.url)}", f"{path} sets {', '.join(strange)}, which nothing reads: {meant}"
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
            with contextlib.closing(bus_recv.connect(self.url, self.PATIENCE)[0]) as connection:
                local = self.scheme == "unix"
                connection.connect() if local else bus_recv.dial((self.host, self.port), self.PATIENCE).close()
        except FileNotFoundError:
            raise Fault(f"there is no {where}", "is the server running with --listen unix: and this path?") from None
        except PermissionError:
            raise Fault(f"{where} is not open to this user", "the socket is for the user who runs the bus") from None
        except ConnectionRefusedError:
            advice = "is the server or the tunnel running? Without --host the bus listens on its own 127.0.0.1 only"
            raise Fault(f"{where} refuses: nothing listens there", self.around_proxy() or advice) from None
        except socket.timeout:
            advice = "is a firewall in between, is the host down, is the address right? Try ping, and check the VPN"
            found = f"{where} does not answer within {self.PATIENCE:.0f} s"
            raise Fault(found, self.around_proxy() or advice) from None
        except OSError as error:
            advice = self.around_proxy() or "is the network, the VPN or the tunnel up?"
            raise Fault(f"{where}: {bus_recv.worded(error)}", advice) from None
        return f"{where} accepts, after {(time.monotonic() - began) * 1000:.0f} ms"

    def around_proxy(self) -> str:
        """What to do if we cannot reach the proxy of the environment; empty without one."""
        return "" if self.direct else f"that is the proxy; to reach the bus without it, set no_proxy={self.target}"

    def tls(self) -> Finding:
        if self.scheme == "unix":
            return "none: a Unix socket"
        plain = "AGENT_BUS_PLAIN_HTTP" in bus_recv.settings(self.url)
        if self.scheme == "http" and (bus_recv.is_here(self.target) or plain):
            return "none: plain http"
        if self.scheme == "http":
            return "none: plain http across a network", "use https; in a tunnel or a VPN set AGENT_BUS_PLAIN_HTTP=1"
        connection, *_ = bus_recv.connect(self.url, self.PATIENCE)
        with contextlib.closing(connection):
            try:
                connection.connect()
            except ssl.SSLCertVerificationError as error:
                advice = CERTIFICATE.get(error.verify_code, "ask the operator of the bus for a valid certificate")
                if advice is SIGNED and (file := bus_recv.settings().get("AGENT_BUS_CA")):
                    advice = f"{file} is not of the authority that signed it: {SIGNED}"
                    advice = bus_recv.ANEW if bus_recv.is_joined() else advice
                raise Fault(f"the certificate is not valid: {error.verify_message.rstrip('.')}", advice) from None
            except OSError as error:
                self.check_scheme()
                advice = "is that the right port? Is a proxy in between?"
                raise Fault(f"no TLS: {bus_recv.worded(error)}", advice) from None
            return "the certificate is valid"

    def fetch(self, path: str) -> tuple[http.client.HTTPResponse, bytes]:
        """The answer to a request without a token, from the bus or not; bus_recv.ask takes only the bus's."""
        connection, prefix, headers = bus_recv.connect(self.url, self.PATIENCE)
        with contextlib.closing(connection):
            connection.connect()
            with bus_recv.hung_up_after(self.PATIENCE, connection.sock):
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
        with contextlib.suppress(OSError), bus_recv.dial((self.host, self.port), self.PATIENCE) as sock:
            sock.sendall(b"GET / HTTP/1.0\r\n\r\n")
            return sock.recv(5) == b"HTTP/"
        return False

    def speaks_tls(self) -> bool:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # we send nothing, so anyone may be there
        try:
            with bus_recv.dial((self.host, self.port), self.PATIENCE) as sock, context.wrap_socket(sock):
                return True
        except OSError:
            return False


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
