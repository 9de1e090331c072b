"""Raw bytes: the hostile cases of the tests, mutated, pipelined over many connections by several processes.

Of each request of a connection but the last the mutations leave the framing alone, so that the bus answers all of them;
the last may be anything. Then the peer closes its side, so nothing may be held: the bus answers what was whole, refuses
what was not, and closes.
"""
from __future__ import annotations

import json
import os
import random
import re
import socket
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor

from tests.fuzz import UNSUPPORTED, Findings, Siege
from tests.kit import hostile
from tests.kit.processes import ROOT

FULL = 1_000_000  # requests
PROCESSES = 2
PIPELINE = 24  # requests on a connection, at most
HANG = 30  # s; a connection that has not ended by then is held although its peer has gone: no deadline here is longer
SHARE = 500  # connections that a process makes before it tells what it saw
KEPT = 20  # messages in each share of the work, which must survive
SHOWN = 1500  # bytes of a connection that went wrong

EXAMPLES = [text.replace("\n", "\r\n").encode() for text in
            re.findall(r"```http\n([A-Z]+ /.*?)\n?```", (ROOT / "PROTOCOL.md").read_text(), re.DOTALL)]
WORDS = [
    b"GET", b"HEAD", b"POST", b"PUT", b"OPTIONS", b"DELETE", b"HTTP/1.0", b"HTTP/1.1", b"HTTP/2.0",
    b"Host: localhost", b"Content-Length: ", b"Transfer-Encoding: chunked", b"Expect: 100-continue",
    b"Connection: close", b"keep-alive", b"Accept: text/plain", b"Idempotency-Key: k", b"Authorization: Bearer abt_",
    b"Origin: http://evil", b"\r\n", b"\r\n\r\n", b"\n", b"\r", b"\0", b" ", b"\t", b":", b"%00", b"%", b"&", b"=",
    b",", b"?", b"#", b"\xff", b"\xc3\xbc", b"/send", b"/recv", b"/log", b"/inbox", b"/agents", b"/message/",
    b"/thread/", b"/ask", b"/claim", b"/ack", b"/nack", b"/extend", b"/recall", b"/metrics", b"/healthz",
    b"/digest", b"/status", b"/mcp", b"/whoami", b"/channels", b"/activity", b"/later", b"/notices",
    b'"after": 0', b'"cron"',
    b"/blob/" + b"a" * 64, b"Content-Range: bytes 0-1/2", b"Range: bytes=0-", b"to=all", b"since=now", b"since=last",
    b"since=0", b"max=1", b"block=true", b"wait=1", b"bus=x", b"from=alice", b"channel=lab", b'"from"', b'"to"',
    b'"msg"', b'"key": "k"', b'"ttl": 1', b'"reply_to"', b'"lease"', b'"id"', b"null", b"true", b"NaN", b"1e999",
    b"[", b"]", b"{", b"}", b'"', b"\\ud800", b"\\u0000", b"-1", b"0", b"9" * 30, b"65536", b"4294967296",
    b"9223372036854775808",
]  # fmt: skip
VALUES = [
    b"null", b"true", b"0", b"-1", b"0.5", b"1e999", b"1e-999", b"9" * 30, b"9" * 5000, b"NaN", b'""', b'"a"', b'"all"',
    b'"a b"', b'"\\u0000"', b'"\\ud800"', b'"' + b"a" * 65 + b'"', b"[]", b"{}", b'["a", "b"]', b'{"a": 1}',
    b"[" * 40 + b"]" * 40,
]  # fmt: skip
VALUE = re.compile(rb'(?<=: )("[^"]*"|[\w.+-]+|\[[^]]*\])')  # of a member
LENGTH = re.compile(rb"(?i)content-length:[^\r\n]*")
HELD = re.compile(rb"(?i)wait|block|ask|claim")  # it may be held until we have gone: nothing is sent behind it
ANSWER = re.compile(rb"HTTP/1\.1 ([1-5]\d\d) [^\r\n]*\r\n((?:[^\r\n]+\r\n)*)\r\n")


def get(target):
    return hostile.head(f"GET {target} HTTP/1.1", hostile.HOST)


def post(body, target="/send"):
    return hostile.head(f"POST {target} HTTP/1.1", hostile.HOST, f"Content-Length: {len(body)}", body=body)


def corpus():
    """Every request that the tests and the document know; nothing that is larger than a few packets."""
    cases = [each.sent for each in (*hostile.BROKEN, *hostile.WHOLE, *hostile.CUT)]
    cases += [post(each.body) for each in (*hostile.REFUSED, *hostile.PASSED)]
    cases += [get(each) for each in (*hostile.REFUSED_QUERIES, *hostile.PASSED_QUERIES)]
    return [each for each in cases + EXAMPLES if len(each) < 4096]


# Mutations: the random numbers, the bytes, a place in them, and all cases


def flipped(rng, data, at, cases):
    return data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]


def inserted(rng, data, at, cases):
    return data[:at] + rng.choice(WORDS) + data[at:]


def shortened(rng, data, at, cases):
    return data[:at] + data[at + rng.randint(1, 8) :]


def repeated(rng, data, at, cases):
    return data[:at] + data[max(0, at - rng.randint(1, 64)) :]


def spliced(rng, data, at, cases):
    other = rng.choice(cases)
    return data[:at] + other[rng.randrange(len(other) + 1) :]


def shuffled(rng, data, at, cases):
    lines = data.split(b"\r\n")
    rng.shuffle(lines)
    return b"\r\n".join(lines)


def renumbered(rng, data, at, cases):
    return re.sub(rb"\d+", lambda number: rng.choice((number[0], b"0", b"1", b"-1", b"9" * 25)), data)


def revalued(rng, data, at, cases):
    """Another value for a member of a JSON object."""
    found = VALUE.search(data, at) or VALUE.search(data)
    return data[: found.start()] + rng.choice(VALUES) + data[found.end() :] if found else data


MUTATIONS = [flipped, inserted, shortened, repeated, spliced, shuffled, renumbered, revalued]


def mutated(rng, data, cases):
    for _ in range(rng.randint(1, 4)):
        data = rng.choice(MUTATIONS)(rng, data, rng.randrange(len(data) + 1), cases)
    return data


def framed(rng, cases):
    """A request whose target and body are mutated and whose framing holds."""
    head, _, body = rng.choice(cases).partition(b"\r\n\r\n")
    line, _, fields = head.partition(b"\r\n")
    method, _, target = line.rpartition(b" ")[0].partition(b" ")
    if body and rng.randrange(4):
        body = mutated(rng, body, cases)
    else:
        path, _, query = target.partition(b"?")
        target = path + b"?" + mutated(rng, query, cases) if rng.randrange(4) else mutated(rng, target, cases)
        target = re.sub(rb'[^!"$-~]', b"", target)
    if method not in (b"POST", b"PUT") or not target.startswith(b"/"):
        return get((b"/" + target.lstrip(b"/"))[:6000].decode())
    fields = LENGTH.sub(b"", fields).replace(b"\r\n\r\n", b"\r\n").strip(b"\r\n")
    return b"%s %s HTTP/1.1\r\n%s\r\nContent-Length: %d\r\n\r\n%s" % (method, target[:6000], fields, len(body), body)


def conversation(rng, cases):
    """The bytes of one connection."""
    requests = []
    for _ in range(rng.randrange(PIPELINE)):
        requests.append(framed(rng, cases))
        if HELD.search(requests[-1]):
            return b"".join(requests)
    kind = rng.randrange(8)
    if kind == 0:
        return b"".join([*requests, rng.randbytes(rng.randrange(400))])
    last = rng.choice(cases) if kind == 1 else mutated(rng, rng.choice(cases), cases)
    if HELD.search(last):  # what the splice has put behind it counts too
        last = last[: HELD.search(last).end() + 200]
    return b"".join([*requests, last])


def converse(port, sent, pieces):
    """All that comes back until the bus closes. TimeoutError if it does not."""
    with socket.create_connection(("127.0.0.1", port), timeout=HANG) as peer:
        came = []
        try:
            for piece in pieces:
                peer.sendall(piece)
            peer.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # it has refused what came before, and closed
        try:
            while came[-1:] != [b""]:
                came.append(peer.recv(65536))
        except ConnectionError:
            pass  # we were still sending to it
        return b"".join(came)


def statuses(came):
    """The status of each answer. ValueError if it is no sequence of answers, or a refusal says nothing."""
    found, at = [], 0
    while at < len(came):
        head = ANSWER.match(came, at)
        if not head:
            raise ValueError(f"no answer: {came[at:at + 200]!r}")
        status, at = int(head[1]), head.end()
        length = re.search(rb"Content-Length: (\d+)\r\n", head[2])
        size = int(length[1]) if length else 0
        if came[at : at + 9] != b"HTTP/1.1 ":  # else it was an answer to HEAD
            body, at = came[at : at + size], at + size
            refusals = {"error"}, {"error", "held", "now", "bus"}, {"jsonrpc", "id", "error"}
            if status >= 400 and body and json.loads(body).keys() not in refusals:
                raise ValueError(f"no error in {body!r}")
        if status >= 200:
            found.append(status)
    return found


def share(port, seed, connections):
    """What came back on so many connections: how often each status, and what was wrong."""
    rng, cases = random.Random(seed), corpus()
    seen, wrong = Counter(), []
    for _ in range(connections):
        sent = conversation(rng, cases)
        cut = rng.randrange(len(sent) + 1) if rng.randrange(4) == 0 else len(sent)
        try:
            came = converse(port, sent, [sent[:cut], sent[cut:]])
            found = statuses(came)
        except TimeoutError:
            wrong.append(f"no end within {HANG} s after {sent[:SHOWN]!r}")
            continue
        except (OSError, ValueError) as error:
            wrong.append(f"{error!r} after {sent[:SHOWN]!r}")
            continue
        seen.update(found)
        for status in found:
            if status >= 500 and status not in UNSUPPORTED:
                wrong.append(f"{status} after {sent[:SHOWN]!r}")
    return seen, wrong


def run(folder, requests=FULL, seed=None, **settings):
    """Until the bus has answered so many requests, or something is wrong. `settings` are those of its Server."""
    seed = int.from_bytes(os.urandom(4), "big") if seed is None else seed
    seen, connections, violations, began = Counter(), 0, [], time.monotonic()
    with Siege(folder, **settings) as siege, ProcessPoolExecutor(PROCESSES) as pool:
        warm = False
        while sum(seen.values()) < requests and not violations:
            left = requests - sum(seen.values())
            size = min(SHARE, left // PROCESSES // (PIPELINE // 2) + 1)
            shares = [pool.submit(share, siege.server.port, f"{seed}:{connections}:{number}", size)
                      for number in range(PROCESSES)]
            for number in range(KEPT):
                siege.keep(f"{connections}:{number}")
            for each in shares:
                counts, wrong = each.result()
                seen += counts
                violations += wrong
            connections += size * PROCESSES
            if not warm and sum(seen.values()) >= requests / 10:
                warm = True
                siege.begin()
        common, wrong = siege.end()
    by_status = " ".join(f"{status}:{count}" for status, count in sorted(seen.items()))
    took = time.monotonic() - began
    figures = {"answers": sum(seen.values()), "connections": connections, "by status": by_status,
               "seconds": round(took), "seed": seed}
    return Findings({**figures, **common}, violations + wrong)
