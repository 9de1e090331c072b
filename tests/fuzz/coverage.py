"""What parses what strangers send, under atheris: each input that reaches a new branch is kept and mutated further.

Three targets, a process each: the head of a request, the query, and JSON with the message in it. The only exception
that may come out is Refused, and each must agree with a reference here that is slow, obvious and written apart.

    python -m tests.fuzz.coverage head -max_total_time=60      one target alone, with the options of libFuzzer
"""
from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from decimal import ROUND_HALF_UP, Decimal
from types import SimpleNamespace
from urllib.parse import unquote_to_bytes

from tests.fuzz import Findings
from tests.fuzz.raw import EXAMPLES, WORDS, corpus
from tests.kit import hostile
from tests.kit.processes import ROOT

FULL = 600  # s for each target
PATIENCE = 5  # s for one input
NAME_LETTERS = set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._:@-")
TOKEN_LETTERS = set("!#$%&'*+-.^_`|~0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz")
ONCE = ["host", "content-length", "transfer-encoding", "authorization", "idempotency-key", "expect"]


# References: None for what must be refused


def plain_head(data):
    """Method, target, version, fields and length of a head."""
    if data.count(b"\r") != data.count(b"\r\n") or data.count(b"\n") != data.count(b"\r\n"):
        return None
    line, *lines = data.decode("latin-1")[:-4].split("\r\n")
    if len(data) > 16384 or len(line) > 8192 or len(lines) > 64:
        return None
    words = line.split(" ")
    if len(words) != 3 or not words[0] or set(words[0]) - TOKEN_LETTERS or words[2] not in ("HTTP/1.0", "HTTP/1.1"):
        return None
    method, target, version = words
    if not target.startswith("/") or not all("!" <= letter <= "~" and letter != "#" for letter in target):
        return None
    fields = {}
    for each in lines:
        name, colon, value = each.partition(":")
        if not colon or not name or set(name) - TOKEN_LETTERS:
            return None
        if any((letter < " " and letter != "\t") or letter == "\x7f" for letter in value):
            return None
        name, value = name.lower(), value.strip(" \t")
        if name in fields and name in ONCE:
            return None
        fields[name] = f"{fields[name]}, {value}" if name in fields else value
    length = fields.get("content-length", "0")
    wrong = [
        version == "HTTP/1.1" and "host" not in fields,
        "transfer-encoding" in fields,
        not length or any(digit not in "0123456789" for digit in length) or len(length) > 15,
        method in ("GET", "HEAD", "OPTIONS") and length.strip("0"),
        fields.get("expect", "100-continue").lower() != "100-continue",
        "abt_" in target,
    ]
    return None if any(wrong) else (method, target, version, fields, int(length))


def plain_json(data):
    """The value of a JSON text."""
    try:
        text = data.decode("utf-8").lstrip("\ufeff")  # a byte order mark in front is none of the text
        value = json.loads(text, object_pairs_hook=Pairs, parse_constant=float)
        return None if "\0" in text else [plain_value(value, 32)]
    except (ValueError, RecursionError):
        return None


class Pairs(list):
    """The members of an object, with those that are given twice."""


def plain_value(value, depth):
    if isinstance(value, str):
        value.encode("utf-8")
        if "\0" in value:
            raise ValueError
    if isinstance(value, float) and value - value != 0:  # NaN, and what is not finite
        raise ValueError
    if isinstance(value, int) and len(str(abs(value))) > 4300:
        raise ValueError
    if not isinstance(value, list):
        return value
    if not depth:
        raise ValueError
    if not isinstance(value, Pairs):
        return [plain_value(each, depth - 1) for each in value]
    members = {plain_value(name, depth - 1): plain_value(each, depth - 1) for name, each in value}
    if len(members) != len(value):
        raise ValueError
    return members


def plain_query(text):
    """The fields of a query, as pairs."""
    pairs = []
    for part in text.split("&"):
        if re.search("%(?![0-9a-fA-F]{2})", part):
            return None
        name, _, value = part.partition("=")
        try:
            pair = [unquote_to_bytes(each.replace("+", " ")).decode("utf-8") for each in (name, value)]
        except ValueError:
            return None
        if "\0" in pair[0] + pair[1]:
            return None
        if part:
            pairs.append(pair)
    return pairs if text.count("&") < 64 else None


def plain_cursor(text):
    whole, point, part = text.partition(".")
    digits = "0123456789"
    if not 1 <= len(whole) <= 10 or set(whole + part) - set(digits) or (point and not 1 <= len(part) <= 9):
        return None
    return int((Decimal(text) * 10**6).to_integral_value(ROUND_HALF_UP))


# Targets


def refused(bus_server, parse, *arguments):
    """What it parses to, or None."""
    try:
        return parse(*arguments)
    except bus_server.Refused as refusal:
        assert 400 <= refusal.status < 600 and refusal.sentence, refusal
        return None


def head(bus_server, data):
    end = data.find(b"\r\n\r\n") + 4
    if end < 4:
        refused(bus_server, bus_server.early_check, data)
        return
    data = data[:end]
    parsed, expected = refused(bus_server, bus_server.Head, data), plain_head(data)
    assert bool(parsed) == bool(expected), (parsed and vars(parsed), expected)
    if parsed:
        assert (parsed.command, parsed.path, parsed.version, parsed.fields, parsed.length) == expected
        for cut in range(0, len(data), 1 + len(data) // 16):
            bus_server.early_check(data[:cut])  # what comes in pieces is not refused before it is whole


def query(bus_server, data):
    text = data.decode("latin-1")
    expected = plain_cursor(text)
    assert text in ("now", "last") or refused(bus_server, bus_server.cursor, text) == expected, text
    parsed, pairs = refused(bus_server, bus_server.Query, text), plain_query(text)
    assert bool(parsed) == (pairs is not None), (text, pairs)
    for name in parsed.fields if parsed else ():
        assert parsed.fields[name] == [value for each, value in pairs if each == name], (text, pairs)
        names = refused(bus_server, parsed.names, name)
        if names is not None:
            assert all(each and len(each) <= 64 and not set(each) - NAME_LETTERS for each in names)
        number = refused(bus_server, parsed.number, name, 0, -5, 5)
        assert number is None or -5 <= number <= 5
        refused(bus_server, parsed.flag, name)
    if parsed:
        from bus_extensions import work  # not above: bus_server is to be imported first by main()

        receiving = SimpleNamespace(look=lambda request, poll: poll, check=lambda poll: None)
        bus = SimpleNamespace(receiving=receiving, storms=bus_server.Storms(time.monotonic, rate=0))
        request = SimpleNamespace(
            grant=bus_server.OPEN, query=lambda: parsed, plain=lambda: False, owner=lambda: "127.0.0.1")
        refused(bus_server, bus_server.recv_poll, request)
        refused(bus_server, bus_server.log, bus, request)
        refused(bus_server, work.words.worker_of, parsed, bus_server.OPEN)


def message(bus_server, data):
    try:
        value = [bus_server.parse_json(data)]
    except bus_server.Refused as refusal:
        assert refusal.status == 400
        value = None
    expected = plain_json(data)
    assert value == expected, (value, expected)
    for fields in value or ():
        draft = refused(bus_server, bus_server.draft, fields, None)
        if draft:
            delivered = json.loads(f"{{{draft.text}}}")
            kept = {member: fields[member] for member in fields if member not in ("to", "key", "ts", "id")}
            assert delivered == {"channel": "default", **kept}
            assert draft.text.isascii() and all(len(name) <= 64 and not set(name) - NAME_LETTERS for name in draft.to)


TARGETS = {"head": head, "query": query, "message": message}


def seeds(name):
    if name == "head":
        return corpus()
    if name == "query":
        queries = [*hostile.REFUSED_QUERIES, *hostile.PASSED_QUERIES]
        return [each.partition("?")[2].encode() for each in queries] + [b"1795203596.123456", b"1.000000001"]
    bodies = [each.partition(b"\r\n\r\n")[2] for each in EXAMPLES]
    bodies.append(b"\xef\xbb\xbf" + hostile.mail("alice"))
    return [each.body for each in (*hostile.REFUSED, *hostile.PASSED) if len(each.body) < 4096] + bodies


def run(folder, seconds=FULL):
    """All targets at once."""
    with open(folder / "words", "wb") as words:
        words.writelines(b'"%s"\n' % b"".join(b"\\x%02x" % letter for letter in word) for word in WORDS)
    begun = []
    for name in TARGETS:
        place = folder / name
        place.mkdir()
        for number, seed in enumerate(seeds(name)):
            (place / f"{number}").write_bytes(seed)
        options = [f"-max_total_time={seconds}", f"-timeout={PATIENCE}", f"-dict={folder / 'words'}", "-max_len=20000",
                   f"-artifact_prefix={place}.", "-print_final_stats=1", str(place)]
        begun.append(subprocess.Popen([sys.executable, "-m", "tests.fuzz.coverage", name, *options], cwd=ROOT,
                                      env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
                                      stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"))
    figures, violations = {"seconds": seconds}, []
    for name, process in zip(TARGETS, begun):
        said = process.communicate()[0]
        done = re.findall(r"^#(\d+)\s+\w+\s+cov: (\d+)", said, re.MULTILINE)
        figures[name] = "{} runs to {} branches".format(*done[-1]) if done else "nothing"
        if process.returncode or not done:
            violations.append(f"{name}: exit code {process.returncode}: {said[-3000:]}")
    return Findings(figures, violations)


def main():
    import atheris

    with atheris.instrument_imports(include=["bus_server", "bus_extensions"]):
        import bus_extensions.work  # noqa: F401
        import bus_server

    target = TARGETS[sys.argv[1]]
    atheris.Setup([sys.argv[0], *sys.argv[2:]], lambda data: target(bus_server, data))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
