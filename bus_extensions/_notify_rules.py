"""The rules of notices: their file, the forms of webhooks, and the request to one. For notify.py beside this file.

The URLs and tokens in the file are secrets: no sentence here has them.
"""

from __future__ import annotations

import os
import re
import socket
import ssl
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple
from urllib.parse import SplitResult, urlsplit

from bus_server import EVERYONE, Refused, Unusable, encode, name, parse_json

RULES = 100  # in a file
TIMEOUT = 5.0  # s for a request
MEMBERS = ("rule", "when", "to", "channel", "minutes", "template", "url", "token", "chat_id")
URL = re.compile(r"https?://[A-Za-z0-9.:\[\]-]+(/[!-~]*)?")  # without the name of a user
STATUS = re.compile(rb"HTTP/1\.[01] ([1-5][0-9][0-9])[ \r\n]")
LINE = 256  # bytes in which the status must be


class Rule(NamedTuple):
    """One rule of the file."""

    rule: str  # its name
    when: str
    to: str | None  # None: anybody
    channel: str
    minutes: float
    template: str
    url: SplitResult
    token: str
    chat_id: str

    def says(self) -> str:
        """What it waits for and to which host it tells that, in words."""
        when = WHEN[self.when].format(to=self.to or "anybody", minutes=self.minutes)
        return f"{self.rule}: when {when}, on the channel {self.channel}: to {self.url.netloc}, as for {self.template}"


WHEN = {
    "unread": "mail for {to} is unread for {minutes:g} minutes",
    "dead": "the queue {to} has dead letters",
    "silent": "{to} has not listened for {minutes:g} minutes",
    "urgent": "a message for {to} has the priority high",
}
# What each kind of webhook takes: the type of the body, and the body.
TEMPLATES: dict[str, Callable[[Rule, str], tuple[str, str]]] = {
    "ntfy": lambda rule, text: ("text/plain", f"agent-bus: {text}"),
    "slack": lambda rule, text: ("application/json", encode({"text": f"agent-bus: {text}"})),
    "mattermost": lambda rule, text: ("application/json", encode({"username": "agent-bus", "text": text})),
    "telegram": lambda rule, text: (
        "application/json",
        encode({"chat_id": rule.chat_id, "text": f"agent-bus: {text}"}),
    ),
}


def read(path: str) -> list[Rule]:
    """The rules in a file; Unusable, with a sentence, if it cannot be used."""
    try:
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_mode & 0o077:
                raise Unusable(f"{path} has secrets, and other users may read or write it: chmod 600 {path}")
            found = parse_json(file.read())
        known = isinstance(found, dict) and set(found) == {"hosts", "rules"}
        if not known or not all(isinstance(each, list) for each in found.values()) or len(found["rules"]) > RULES:
            raise Refused(400, f'it must be {{"hosts": [...], "rules": [...]}}, with at most {RULES} rules')
        hosts = {str(host).lower() for host in found["hosts"]}
        rules = [rule_of(each, hosts) for each in found["rules"]]
        for rule, times in Counter(each.rule for each in rules).items():
            if times > 1:
                raise Refused(400, f"{times} rules have the name {rule}")
        return rules
    except OSError as error:
        raise Unusable(f"cannot read the rules in {path}: {error.strerror}") from None
    except Refused as refused:
        raise Unusable(f"cannot use the rules in {path}: {refused.sentence}") from None


def rule_of(given: Any, hosts: set[str]) -> Rule:
    if not isinstance(given, dict) or set(given) - set(MEMBERS):
        raise Refused(400, f"a rule is an object with members of {', '.join(MEMBERS)}")
    called = name(given.get("rule"), "rule")
    try:
        return checked(called, given, hosts)
    except Refused as refused:
        raise Refused(400, f"rule {called}: {refused.sentence}") from None


def checked(called: str, given: dict[str, Any], hosts: set[str]) -> Rule:
    when, template = (one_of(given, member, known) for member, known in (("when", WHEN), ("template", TEMPLATES)))
    to = None if when == "urgent" and "to" not in given else name(given.get("to"), "to")
    if to == EVERYONE or len(f"{to}.dead") > 64:
        raise Refused(400, "to must be the name of one agent or queue, of at most 59 characters")
    minutes = given.get("minutes", 10)
    if isinstance(minutes, bool) or not isinstance(minutes, (int, float)) or not 0 <= minutes <= 525600:
        raise Refused(400, "minutes must be a number from 0 to 525600")
    url = given.get("url")
    parts = urlsplit(url) if isinstance(url, str) and URL.fullmatch(url) else None
    if not parts or not is_port(parts):
        raise Refused(400, "url must be http:// or https:// with a host, without the name of a user")
    if parts.netloc.lower() not in hosts:
        raise Refused(400, f"{parts.netloc} is not in hosts: list there each host to which the bus may send")
    token, chat_id = (str(given.get(member, "")) for member in ("token", "chat_id"))
    if not re.fullmatch("[!-~]*", token + chat_id) or (template == "telegram" and not chat_id):
        raise Refused(400, "token and chat_id must be ASCII without a blank, and telegram needs a chat_id")
    return Rule(
        called, when, to, name(given.get("channel", "default"), "channel"), minutes, template, parts, token, chat_id
    )


def one_of(given: dict[str, Any], member: str, known: dict[str, Any]) -> str:
    value = given.get(member)
    if not isinstance(value, str) or value not in known:
        raise Refused(400, f"{member} must be one of {', '.join(known)}")
    return value


def is_port(parts: SplitResult) -> bool:
    try:
        return parts.port != 0 and bool(parts.hostname)
    except ValueError:  # it is no number, or above 65535
        return False


# The request


class Failed(Exception):
    """A webhook did not take a notice. The text says why."""


def post(rule: Rule, text: str) -> None:
    """Send a notice, in a thread. Failed, after TIMEOUT for each address of the host, and for the answer.

    It connects to the address that it has just resolved, follows no redirect, uses no proxy, and reads nothing of the
    answer but its status.
    """
    parts, (kind, body) = rule.url, TEMPLATES[rule.template](rule, text)
    lines = [f"POST {parts.path or '/'}{'?' + parts.query if parts.query else ''} HTTP/1.1", f"Host: {parts.netloc}"]
    lines += [f"Content-Type: {kind}", f"Content-Length: {len(body)}", "Connection: close", "User-Agent: agent-bus"]
    lines += [f"Authorization: Bearer {rule.token}"] if rule.token else []
    try:
        with connected(parts) as peer:
            peer.sendall("\r\n".join([*lines, "", body]).encode())
            status = status_of(peer)
    except (OSError, UnicodeError) as error:  # UnicodeError: no host can have this name
        why = getattr(error, "reason", "") or getattr(error, "strerror", "") or "no answer in time"
        raise Failed(f"{parts.netloc}: {why}") from None
    if not 200 <= status < 300:
        hint = ", and no redirect is followed" if 300 <= status < 400 else ""
        raise Failed(f"{parts.netloc} answered {status}{hint}" if status else f"{parts.netloc} does not speak HTTP")


def connected(parts: SplitResult) -> socket.socket:
    port = parts.port or (443 if parts.scheme == "https" else 80)
    peer = socket.create_connection((str(parts.hostname), port), TIMEOUT)
    if parts.scheme == "https":
        return ssl.create_default_context().wrap_socket(peer, server_hostname=parts.hostname)
    return peer


def status_of(peer: socket.socket) -> int:
    """The status of an answer, or 0. A peer that sends a byte now and then is not waited for longer."""
    deadline, head = time.monotonic() + TIMEOUT, b""
    while len(head) < LINE and not STATUS.match(head):
        peer.settimeout(max(deadline - time.monotonic(), 0.001))
        piece = peer.recv(LINE)
        if not piece:
            break
        head += piece
    match = STATUS.match(head)
    return int(match[1]) if match else 0
