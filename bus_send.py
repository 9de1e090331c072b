#!/usr/bin/env python3
"""Send one message to an agent-bus: the text on stdin, the receiver on the command line.

    echo "T1 is done" | AGENT_BUS_URL=http://10.0.0.5:8080 AGENT_NAME=spark python3 bus_send.py dell --subject T1

or in a program: `bus_send.send("dell", "T1 is done", sender="spark")`. The receiver is a name, several as `dell,gb10`,
or `all`. Prints the bus's answer, one line of JSON; on stderr the truth when not everyone is there to read it.

Only a 200 with the bus's own JSON means that the message is on its disk, and only its own 4xx means that it never will
be. Everything else (silence, half an answer, a redirect, a proxy's page) means that nobody knows: the same message is
sent again under the same key, and the bus stores a key once.

Standard library only, Python 3.9 and later. It reads stdin and the environment (AGENT_BUS_URL, AGENT_NAME,
AGENT_BUS_CHANNEL, AGENT_BUS_TOKEN or AGENT_BUS_TOKEN_FILE, AGENT_BUS_CA, AGENT_BUS_UA; http_proxy, https_proxy,
no_proxy), talks to that URL, follows it nowhere else, and writes one file, if AGENT_BUS_OUTBOX names one: a copy of
each message that the bus stored, as its reader gets it; `{name}` in that path is the sender.
Exit code: 0 stored, 1 refused by the bus, 2 usage, 75 not known to be stored (try again with the key it names).
"""
from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import random
import re
import socket
import sys
import threading
import time
from urllib.parse import urlsplit

TYPE_CHECKING = False  # as in typing, whose import would be a tenth of the time that a send takes
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

ATTEMPT_SECONDS = 10.0  # for one attempt, and more for a long message:
UPLOAD_RATE = 8192  # bytes of it per second, the slowest that the bus accepts
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # s before the next attempt; doubled each time, less up to half by chance
ANSWER_BYTES = 1 << 20  # read at most; the bus's answer to a send has about 300


class Refused(Exception):
    """The bus said no and would say it again: nothing is stored. `status` is HTTP's; the text says what to do."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


class Unreachable(Exception):
    """No answer that is the bus's own: nobody knows whether the message is stored. `retry_after` is in seconds."""

    def __init__(self, sentence: str, retry_after: float = 0.0) -> None:
        super().__init__(sentence)
        self.retry_after = retry_after


def send(
    to: str | list[str],
    msg: str,
    *,
    url: str | None = None,
    sender: str | None = None,
    channel: str | None = None,
    patience: float = 30.0,
    key: str | None = None,
    **fields: Any,
) -> dict[str, Any]:
    """Have `msg` stored for `to`; returns the bus's answer (`id`, `ts`, `duplicate`, `receiver`: see PROTOCOL.md).

    `url`, `sender` and `channel` default to the environment's, `key` to a random one. `fields` (subject, reply_to,
    type, ttl in seconds ...) go with the message; None leaves one out. The first attempt is always made, and the last
    starts within `patience` seconds. Raises Refused, Unreachable; ValueError if there is no sender or the URL is none.
    """
    url, message = composed(to, msg, url, sender, channel, key, fields)
    body = json.dumps(message).encode()
    end, pause = time.monotonic() + patience, FIRST_PAUSE
    while True:
        try:
            left = max(end - time.monotonic(), 1)  # s; an attempt without any time would be none
            answer = post(url, body, min(left, ATTEMPT_SECONDS + len(body) / UPLOAD_RATE))
            break
        except Unreachable as fault:
            rest = max(pause * random.uniform(0.5, 1), fault.retry_after)
            if time.monotonic() + rest >= end:
                again = f"tools/bus_doctor.py says why; to try again: --key {message['key']}"
                raise Unreachable(f"{url} does not say that it is stored ({fault}); {again}") from fault
        time.sleep(rest)
        pause = min(2 * pause, LONGEST_PAUSE)
    keep_copy(message, answer)
    return answer


def composed(
    to: str | list[str],
    msg: str,
    url: str | None,
    sender: str | None,
    channel: str | None,
    key: str | None,
    fields: dict[str, Any],
) -> tuple[str, dict[str, Any]]:
    """The URL of the bus, and the message, as the arguments and the environment have them. ValueError: see send()."""
    url = url or os.environ.get("AGENT_BUS_URL") or "http://127.0.0.1:8080"
    sender = sender or os.environ.get("AGENT_NAME") or None
    if not sender and not credentials(url):  # a token has its sender
        raise ValueError("who is it from? Give --from NAME or set AGENT_NAME")
    channel = channel or os.environ.get("AGENT_BUS_CHANNEL") or "default"
    message = {"from": sender, "to": to, "channel": channel, "msg": msg, "key": key or os.urandom(16).hex(), **fields}
    return url, {field: value for field, value in message.items() if value is not None}


def keep_copy(message: dict[str, Any], answer: dict[str, Any]) -> None:
    """Append what is stored to the file that AGENT_BUS_OUTBOX names: a line for each receiver, as that one gets it."""
    path = os.environ.get("AGENT_BUS_OUTBOX")
    if not path:
        return
    path = os.path.expanduser(path.replace("{name}", message.get("from", "-").replace("/", "_")))
    try:
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "wb") as file:
            file.write("".join(copies(message, answer)).encode())  # one write, so that two senders do not mix
    except Exception as error:  # it is stored, whatever goes wrong here
        complain(f"stored, but no copy is in {path}: {getattr(error, 'strerror', None) or error}", 0)


def copies(message: dict[str, Any], answer: dict[str, Any]) -> Iterator[str]:
    names = message["to"] if isinstance(message["to"], list) else [message["to"]]
    given = {field: value for field, value in message.items() if field not in ("to", "key")}
    for name, number in (answer.get("ids") or dict.fromkeys(names, answer.get("id"))).items():
        ts = int(number, 16) / 1e6 if number else answer["ts"]  # an id is the time in us; the first contract has none
        known = {"id": number, "to": name, **given} if number else {"to": name, **given}
        yield f'{{"ts": {ts:.6f}, {json.dumps(known)[1:]}\n'


def post(url: str, message: bytes, seconds: float) -> dict[str, Any]:
    """One attempt: the bus's answer, or Refused, or Unreachable. `seconds` to connect, and again for the rest."""
    agent = os.environ.get("AGENT_BUS_UA") or "Mozilla/5.0"  # because firewalls drop what looks like a script
    headers = {"User-Agent": agent, "Content-Type": "application/json", **credentials(url)}
    connection, prefix = connect(url, seconds)
    try:
        connection.connect()
        with hung_up_after(seconds, connection.sock):
            connection.request("POST", f"{prefix}/send", message, headers)
            response = connection.getresponse()
            body = response.read(ANSWER_BYTES)
        if response.length:
            raise http.client.IncompleteRead(body, response.length)
    except (OSError, ValueError, http.client.HTTPException) as error:  # ValueError: a chunk of negative size
        raise Unreachable(getattr(error, "strerror", None) or str(error) or type(error).__name__) from error
    finally:
        connection.close()
    return judged(response, body)


def connect(url: str, seconds: float) -> tuple[http.client.HTTPConnection, str]:
    """A connection towards `url`, not yet open, and what stands before the path in its request line."""
    if not re.fullmatch(r"https?://[^\s?#]+", url):
        raise ValueError(f"the URL of the bus must be like http://host:8080, and is {url!r}")
    parts = urlsplit(url)
    secure = parts.scheme == "https"
    kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
    host, port = parts.hostname or "", parts.port or (443 if secure else 80)
    trust = {"context": authorities()} if secure else {}
    proxy = proxy_for(parts.scheme, host, port)
    if not proxy:
        return kind(host, port, timeout=seconds, **trust), parts.path.rstrip("/")
    via = urlsplit(proxy if "://" in proxy else f"//{proxy}")
    connection = kind(via.hostname or "", via.port or 80, timeout=seconds, **trust)
    if secure:
        connection.set_tunnel(host, port)
    return connection, parts.path.rstrip("/") if secure else url.rstrip("/")


def authorities() -> Any:
    """Whom TLS trusts: the system's authorities, or those in the file that AGENT_BUS_CA names."""
    import ssl  # http.client has it, where there is one

    try:
        return ssl.create_default_context(cafile=os.environ.get("AGENT_BUS_CA") or None)
    except OSError as error:
        raise ValueError(f"AGENT_BUS_CA names no file of certificates: {error.strerror or error}") from None


def credentials(url: str) -> dict[str, str]:
    """The header that says who we are, by AGENT_BUS_TOKEN or the file AGENT_BUS_TOKEN_FILE; none without them.

    ValueError if others may read that file, or a network could: AGENT_BUS_PLAIN_HTTP=1 says that something guards it.
    """
    token, path = os.environ.get("AGENT_BUS_TOKEN", ""), os.environ.get("AGENT_BUS_TOKEN_FILE")
    if path and not token:
        try:
            with open(path, encoding="ascii") as file:
                if os.name == "posix" and os.fstat(file.fileno()).st_mode & 0o077:
                    raise ValueError(f"the token in {path} can be read by others: chmod 600 {path}")
                token = file.read(256)
        except OSError as error:
            raise ValueError(f"the token in {path} cannot be read: {error.strerror}") from None
    token = token.strip()
    if not token:
        return {}
    if not re.fullmatch("[!-~]+", token):
        raise ValueError("AGENT_BUS_TOKEN is no token: it has blanks or other characters in it")
    parts = urlsplit(url)
    if parts.scheme == "http" and not is_here(parts.hostname or "") and not os.environ.get("AGENT_BUS_PLAIN_HTTP"):
        advice = "use https, or in a tunnel or a VPN set AGENT_BUS_PLAIN_HTTP=1"
        raise ValueError(f"the token would cross the network to {url} in the clear: {advice}")
    return {"Authorization": f"Bearer {token}"}


def is_here(host: str) -> bool:
    return bool(re.fullmatch(r"localhost|::1|127(\.[0-9]+){3}", host))


def proxy_for(scheme: str, host: str, port: int) -> str | None:
    """The proxy that the environment names for this host; for this machine itself there is none."""
    if is_here(host) or f"{scheme}_proxy" not in map(str.lower, os.environ):
        return None
    from urllib.request import getproxies, proxy_bypass  # slow to import, and seldom needed

    return None if proxy_bypass(f"{host}:{port}") else getproxies().get(scheme)


@contextlib.contextmanager
def hung_up_after(seconds: float, sock: socket.socket) -> Iterator[None]:
    """Ends an exchange from outside. A socket's own timeout is per read, so an answer that drips would never end."""

    def hang_up() -> None:
        with contextlib.suppress(OSError):
            socket.socket.shutdown(sock, socket.SHUT_RDWR)  # of the TCP under TLS: an SSLSocket is not for two threads

    timer = threading.Timer(seconds * 1.1, hang_up)  # a little after the socket's own timeout, whose error says more
    try:
        timer.start()
        yield
    finally:
        timer.cancel()


def judged(response: http.client.HTTPResponse, body: bytes) -> dict[str, Any]:
    """The bus's answer, or what anything else in its place means: Refused, Unreachable."""
    said: Any = None
    with contextlib.suppress(ValueError, RecursionError):
        said = json.loads(body.decode(), parse_constant=str)
    answer: dict[str, Any] = said if isinstance(said, dict) else {}
    if response.status == 200 and answer.get("ok") is True and isinstance(answer.get("ts"), (int, float)):
        return answer
    error = answer.get("error")
    if 400 <= response.status < 500 and response.status not in (408, 425, 429) and isinstance(error, str):
        raise Refused(response.status, error)
    wait = response.headers.get("Retry-After", "")
    raise Unreachable(f"{response.status}: {error or 'no JSON of a bus'}", float(wait) if wait.isdecimal() else 0.0)


def queued(answer: dict[str, Any], to: str | list[str]) -> str:
    """The truth about a message that is stored while not everyone is there to read it; empty if everyone is."""
    receiver = answer["receiver"]
    online = receiver["online"]
    unread = f", {receiver['unread']} unread" if "unread" in receiver else ""
    if isinstance(online, bool):
        seen = receiver["last_seen"]
        who = f"{to} was last seen {span(answer['ts'] - seen)} ago" if seen else f"nobody has listened as {to} yet"
        return "" if online else f"queued: {who}{unread}"
    everyone = online + receiver["offline"]
    who = f"{online} of {everyone} are listening" if online else "nobody is listening"
    return "" if online and online == everyone else f"queued: {who}{unread}"


def span(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds // size:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


def command_line(purpose: str) -> argparse.ArgumentParser:
    """A parser of what there is to say about a message. What it finds, but for `to`, are arguments of send()."""
    parser = argparse.ArgumentParser(description=purpose)
    parser.add_argument("to", metavar="TO", nargs="?", type=receivers, help="a name, names as a,b,c, or all")
    parser.add_argument("--from", dest="sender", metavar="NAME", help="default: $AGENT_NAME")
    parser.add_argument("--subject", help="what it is about, in one line")
    parser.add_argument("--reply-to", metavar="ID", help="the id of the message that this one answers")
    parser.add_argument("--type", help="task, result, question ... as you agree among yourselves")
    parser.add_argument("--priority", help="low, normal or high")
    parser.add_argument("--ttl", type=float, metavar="S", help="not worth delivering after S seconds")
    parser.add_argument("--key", help="the bus stores one message per sender and key; default: a random one")
    parser.add_argument("--channel", help="default: $AGENT_BUS_CHANNEL, or 'default'")
    return parser


def receivers(text: str) -> str | list[str]:
    return text.split(",") if "," in text else text


def read_message() -> str:
    """What stands on stdin. ValueError if that is no message."""
    try:
        msg = sys.stdin.buffer.read().decode() if sys.stdin else ""
    except UnicodeDecodeError as error:
        raise ValueError(f"the message on stdin is not UTF-8 at byte {error.start}") from None
    if not msg.strip():
        raise ValueError("the message on stdin is empty")
    return msg


def main(argv: list[str] | None = None) -> int:
    parser = command_line("Send stdin, as it is, as one message to an agent-bus.")
    parser.add_argument("--timeout", type=float, default=30.0, metavar="S", help="keep trying for S seconds (30)")
    options = vars(parser.parse_args(argv))
    to, patience = options.pop("to"), options.pop("timeout")
    if not to:
        parser.error("to whom? Give TO")
    try:
        answer = send(to, read_message(), patience=patience, **options)
    except ValueError as error:
        return complain(str(error), 2)
    except Refused as refused:
        return complain(str(refused), 1)
    except Unreachable as fault:
        return complain(str(fault), 75)
    except KeyboardInterrupt:
        return 130
    report(answer, to)
    return 0


def report(answer: dict[str, Any], to: str | list[str]) -> None:
    """The answer on stdout, and on stderr whether somebody is there to read the message."""
    try:
        print(json.dumps(answer), flush=True)
    except OSError:  # nobody reads it, and the message is stored all the same; leaving would try to write it once more
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    with contextlib.suppress(KeyError, TypeError):  # a bus of the old contract says nothing about its receivers
        truth = queued(answer, to)
        if truth:
            print(truth, file=sys.stderr)


def complain(sentence: str, code: int) -> int:
    """One line on stderr, whatever the bus may have put into it."""
    print("bus_send:", "".join(c if c.isprintable() else " " for c in sentence), file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
