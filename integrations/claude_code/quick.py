"""A request to the bus by a program that a turn waits for, and that has no time to import http.client."""
from __future__ import annotations  # needs Python 3.9 or later

import contextlib
import json
import re
import socket
import time
from decimal import Decimal
from typing import Any, NamedTuple

import bus_recv

QUICK_SECONDS = 0.2  # a bus that answers so fast is asked again for a smaller matter


def get(url: str, path: str, seconds: float, status: dict[str, Any] | None = None) -> dict[str, Any]:
    """GET `path`: the bus's JSON, within so many seconds in all. Raises as bus_recv.exchange().

    A turn waits for each hook, and http.client takes 40 ms to import. So a plain GET is made here, and what takes more
    (TLS, a proxy) is left to exchange().

    A `status` is for POST /status; its answer does not matter. It goes out together with the GET, so it takes no round
    trip of its own. exchange() cannot do that: there, only a bus that has answered at once is told the status.
    Each URL of the bus gets its part of the time: one that is silent must not take all of it.
    """
    part, login = seconds / len(bus_recv.urls_of(url)), bus_recv.credentials(url)
    return dict(bus_recv.first_answer(url, seconds, lambda one, *_: get_at(one, path, part, status, login)))


def get_at(
    url: str, path: str, seconds: float, status: dict[str, Any] | None, login: dict[str, str]
) -> dict[str, Any]:
    """get() with one URL of the bus; `login` is of credentials()."""
    parts, began = bus_recv.parts_of(url), time.monotonic()
    host, port = parts.hostname or "", parts.port or 80
    if parts.scheme == "https" or (parts.scheme == "http" and bus_recv.proxy_for("http", host, port)):
        answer: dict[str, Any] = bus_recv.exchange(url, path, None, seconds, Decimal)[0]
        if status and time.monotonic() - began < QUICK_SECONDS:
            with contextlib.suppress(bus_recv.Refused, bus_recv.Unreachable):
                bus_recv.exchange(url, "/status", json.dumps(status).encode(), QUICK_SECONDS)
        return answer
    whole, fault = bytearray(), ""
    try:
        with bus_recv.dial((host, port), seconds) if host else socket.socket(socket.AF_UNIX) as sock:
            if not host:
                sock.connect(parts.path)
            sock.sendall(requests(url, path, status, login))
            while len(whole) < bus_recv.ANSWER_BYTES:
                sock.settimeout(max(began + seconds - time.monotonic(), 0.001))
                part = sock.recv(1 << 16)
                if not part:
                    break
                whole += part
    except OSError as error:
        fault = bus_recv.worded(error, "" if whole or bus_recv.HELD.search(path) else url)
    first = head_and_body(bytes(whole))
    if not first:
        raise bus_recv.Unreachable(*filter(None, [fault]))
    return bus_recv.judged(*first, Decimal)


def requests(url: str, path: str, status: dict[str, Any] | None, login: dict[str, str]) -> bytes:
    """The GET and, behind it, the POST of a status. HTTP/1.0: the bus closes the connection after the last answer."""
    parts, body = bus_recv.parts_of(url), json.dumps(status) if status else ""
    prefix = parts.path.rstrip("/") if parts.scheme == "http" else ""
    agent = bus_recv.settings(url).get("AGENT_BUS_UA", "Mozilla/5.0")
    headers = {"Host": parts.netloc or "localhost", "User-Agent": agent, **login}
    lines = [f"GET {prefix}{path} HTTP/1.0", *(f"{name}: {value}" for name, value in headers.items())]
    if status:
        further = [f"POST {prefix}/status HTTP/1.0", *lines[1:], f"Content-Length: {len(body)}"]
        lines += ["Connection: keep-alive", "", *further]
    return "\r\n".join([*lines, "", body]).encode()


class Head(NamedTuple):
    """Of an answer, what bus_recv.judged() looks at."""

    status: int
    headers: dict[str, str]


def head_and_body(answer: bytes) -> tuple[Any, bytes] | None:
    """The parts of an answer of HTTP, behind which another one may follow. None, if it is none, or was cut."""
    head, _, body = answer.partition(b"\r\n\r\n")
    status = re.match(r"HTTP/1\.[01] ([0-9]{3})\b", head.decode("latin-1"))
    lines = (line.partition(":") for line in head.decode("latin-1").split("\r\n")[1:])
    headers = {name.strip().title(): value.strip() for name, _, value in lines}
    length = headers.get("Content-Length", "")
    if not status or not re.fullmatch("[0-9]{1,9}", length) or len(body) < int(length):
        return None
    return Head(int(status[1]), headers), body[: int(length)]
