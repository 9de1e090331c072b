#!/usr/bin/env python3
"""Send one message to an agent-bus: the text on stdin, the receiver on the command line.

    echo "T1 is done" | AGENT_BUS_URL=http://10.0.0.5:8080 AGENT_NAME=spark python3 bus_send.py dell --subject T1
    echo "Is T1 done?" | python3 bus_send.py dell --ask          # waits for the answer, and prints it
    echo "It is." | python3 bus_send.py --reply-to 660ba678a1b40       # to whoever sent that

or in a program: `bus_send.send("dell", "T1 is done", sender="spark")`, `bus_send.ask("dell", "Is T1 done?")["reply"]`.
The receiver is a name, several as `dell,gb10`, or `all`. Prints the bus's answer, one line of JSON (of a question, what
was answered); on stderr the truth when not everyone is there to read it.

Only a 200 with the bus's own JSON means that the message is on its disk, and only its own 4xx means that it never will
be. Everything else (silence, half an answer, a redirect, a proxy's page) means that nobody knows: the same message is
sent again under the same key, and the bus stores a key once.

Standard library only, Python 3.9 and later. It reads stdin and the environment (AGENT_BUS_URL, AGENT_NAME,
AGENT_BUS_CHANNEL, AGENT_BUS_TOKEN or AGENT_BUS_TOKEN_FILE, AGENT_BUS_CA, AGENT_BUS_UA; http_proxy, https_proxy,
no_proxy), talks to that URL, follows it nowhere else, and writes one file, if AGENT_BUS_OUTBOX names one: a copy of
each message that the bus stored, as its reader gets it; `{name}` in that path is the sender.
Exit code: 0 stored, 1 refused by the bus, 2 usage, 3 stored but not answered in time, 75 not known to be stored (try
again with the key it names).
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
from urllib.parse import quote, urlsplit

TYPE_CHECKING = False  # as in typing, whose import would be a tenth of the time that a send takes
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

DEFAULT_URL = "http://127.0.0.1:8080"
ATTEMPT_SECONDS = 10.0  # for one attempt, and more for a long message:
UPLOAD_RATE = 8192  # bytes of it per second, the slowest that the bus accepts
HOLD_SECONDS = 25.0  # a question may be held; under the 30 s after which common proxies cut a quiet request
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # s before the next attempt; doubled each time, less up to half by chance
ANSWER_BYTES = 16 << 20  # read at most; the answer to a send has about 300, and a message at most a few MiB
HIDDEN = re.compile(  # what acts on a terminal, or on a reader, without being seen: controls, bidi, zero width, tags
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff"
    r"\U000e0000-\U000e007f\U000e0100-\U000e01ef]"
)


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
    seconds = ATTEMPT_SECONDS + len(body) / UPLOAD_RATE
    try:
        answer = persist(lambda left: post(url, body, min(left, seconds)), patience)
    except Unreachable as fault:
        raise unknown(url, message, fault) from fault
    keep_copy(message, answer)
    return answer


def ask(
    to: str,
    msg: str,
    *,
    url: str | None = None,
    sender: str | None = None,
    channel: str | None = None,
    timeout: float = 300.0,
    key: str | None = None,
    **fields: Any,
) -> dict[str, Any]:
    """send() to one name, and wait for what answers it: `reply` in the bus's answer, a message, or None in `timeout` s.

    The same question is asked again and again, each time for as long as a request may be held. An answer is found
    whenever it came, and is in the sender's mailbox too.
    """
    url, message = composed(to, msg, url, sender, channel, key, fields)
    body = json.dumps(message).encode()
    answer: dict[str, Any] = {}
    end, hold = time.monotonic() + timeout, HOLD_SECONDS

    def attempt(_: float) -> dict[str, Any]:
        nonlocal hold
        began = time.monotonic()
        wait = min(hold, max(end - began, 0))
        try:
            return post(url, body, wait + ATTEMPT_SECONDS + len(body) / UPLOAD_RATE, f"/ask?wait={wait:.3f}")
        except Unreachable:
            if time.monotonic() - began >= 1:  # it was held, perhaps for longer than something on the way allows
                hold = max(hold / 2, 1)
            raise

    while True:
        began = time.monotonic()
        try:
            found = persist(attempt, end - began)
        except Unreachable as fault:
            if answer:  # it is stored, and not answered
                return answer
            raise unknown(url, message, fault) from fault
        if not answer:
            keep_copy(message, found)
        answer, now = found, time.monotonic()
        if now >= end or isinstance(answer.get("reply"), dict):
            return answer
        hold = min(hold * 1.1, HOLD_SECONDS)
        time.sleep(min(max(began + 1 - now, 0), end - now))  # a bus that does not hold is not run down


def sender_of(number: str, url: str, patience: float) -> tuple[str, str]:
    """Who sent the message with this id, and on which channel. Raises as send() does."""
    path = f"/message/{quote(number, safe='')}"
    answer = persist(lambda left: exchange(url, "GET", path, None, min(left, ATTEMPT_SECONDS)), patience)
    try:
        return answer["message"]["from"], answer["message"]["channel"]
    except (KeyError, TypeError):
        raise Unreachable(f"{url} does not say who sent {number}") from None


def persist(attempt: Callable[[float], dict[str, Any]], patience: float) -> dict[str, Any]:
    """What `attempt(seconds left)` returns, once it does: the first is always made, the last starts in time."""
    end, pause = time.monotonic() + patience, FIRST_PAUSE
    while True:
        try:
            return attempt(max(end - time.monotonic(), 1))  # s; an attempt without any time would be none
        except Unreachable as fault:
            rest = max(pause * random.uniform(0.5, 1), fault.retry_after)
            if time.monotonic() + rest >= end:
                raise
        time.sleep(rest)
        pause = min(2 * pause, LONGEST_PAUSE)


def unknown(url: str, message: dict[str, Any], fault: Unreachable) -> Unreachable:
    again = f"tools/bus_doctor.py says why; to try again: --key {message['key']}"
    return Unreachable(f"{url} does not say that it is stored ({fault}); {again}")


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
    url = url or os.environ.get("AGENT_BUS_URL") or DEFAULT_URL
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


def post(url: str, message: bytes, seconds: float, path: str = "/send") -> dict[str, Any]:
    """One attempt: what the bus says about the message that it stored, or Refused, or Unreachable."""
    answer = exchange(url, "POST", path, message, seconds)
    if answer.get("ok") is True and isinstance(answer.get("ts"), (int, float)):
        return answer
    raise Unreachable("200: no JSON of a bus")


def exchange(url: str, method: str, path: str, body: bytes | None, seconds: float) -> dict[str, Any]:
    """A request, and the JSON of the bus; Refused; Unreachable for anything else. `seconds` for all, once connected."""
    agent = os.environ.get("AGENT_BUS_UA") or "Mozilla/5.0"  # because firewalls drop what looks like a script
    headers = {"User-Agent": agent, **({"Content-Type": "application/json"} if body else {}), **credentials(url)}
    connection, prefix = connect(url, min(seconds, ATTEMPT_SECONDS))
    try:
        connection.connect()
        connection.sock.settimeout(seconds)
        with hung_up_after(seconds, connection.sock):
            connection.request(method, prefix + path, body, headers)
            response = connection.getresponse()
            content = response.read(ANSWER_BYTES)
        if response.length:
            raise http.client.IncompleteRead(content, response.length)
    except (OSError, ValueError, http.client.HTTPException) as error:  # ValueError: a chunk of negative size
        raise Unreachable(getattr(error, "strerror", None) or str(error) or type(error).__name__) from error
    finally:
        connection.close()
    return judged(response, content)


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
    """The JSON object of a 200, or what anything else in its place means: Refused, Unreachable."""
    said: Any = None
    with contextlib.suppress(ValueError, RecursionError):
        said = json.loads(body.decode(), parse_constant=str)
    answer: dict[str, Any] = said if isinstance(said, dict) else {}
    if response.status == 200 and answer:
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
    parser.add_argument("--ask", action="store_true", help="wait for the answer, and print it")
    parser.add_argument("--timeout", type=float, metavar="S", help="keep trying for S seconds (30; with --ask: 300)")
    options = vars(parser.parse_args(argv))
    to, question, seconds = options.pop("to"), options.pop("ask"), options.pop("timeout")
    seconds = seconds if seconds is not None else 300.0 if question else 30.0
    if not to and not options["reply_to"]:
        parser.error("to whom? Give TO, or --reply-to ID")
    try:
        msg = read_message()
        if not to:
            url = os.environ.get("AGENT_BUS_URL") or DEFAULT_URL
            to, channel = sender_of(options["reply_to"], url, seconds)
            options["channel"] = options["channel"] or channel
        if question:
            return show_reply(ask(to, msg, timeout=seconds, **options), to)
        report(send(to, msg, patience=seconds, **options), to)
    except ValueError as error:
        return complain(str(error), 2)
    except Refused as refused:
        return complain(str(refused), 1)
    except Unreachable as fault:
        return complain(str(fault), 75)
    except KeyboardInterrupt:
        return 130
    return 0


def show_reply(answer: dict[str, Any], to: str) -> int:
    r"""What was answered on stdout, with all that cannot be seen written out (\x1b), and who did on stderr."""
    reply = answer.get("reply")
    if not isinstance(reply, dict) or not isinstance(reply.get("msg"), str):
        tell(answer, to)
        return complain(f"no answer to {answer.get('id')} yet: when there is one, it comes as mail", 3)
    complain(f"{reply.get('id')} from {reply.get('from')}", 0)
    text = re.sub("\r\n?", "\n", reply["msg"]).removesuffix("\n")
    emit(HIDDEN.sub(lambda found: found[0].encode("unicode_escape").decode(), text) + "\n")
    return 0


def report(answer: dict[str, Any], to: str | list[str]) -> None:
    """The bus's answer to a send, as one line of JSON."""
    emit(json.dumps(answer) + "\n")
    tell(answer, to)


def emit(text: str) -> None:
    """To stdout, in UTF-8 whatever the locale. It may be closed: the message is stored all the same."""
    if sys.stdout:
        try:
            sys.stdout.buffer.write(text.encode())
            sys.stdout.buffer.flush()
        except OSError:  # and leaving would try to write it once more
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def tell(answer: dict[str, Any], to: str | list[str]) -> None:
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
