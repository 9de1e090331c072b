#!/usr/bin/env python3
"""Connect this machine to an agent-bus: fetch its clients, check a token, and write the configuration.

`bus_server.py invite NAME` prints the line that downloads this file and runs it:

    python3 bus_join.py URL NAME [PIN]

PIN is what the line trusts, and nothing that was fetched runs before it fits. Over https it is the public key of the
bus's certificate, as in curl's --pinnedpubkey (`sha256//...`); without it, the certificate must be valid for everyone.
Over http it is the SHA-256 of the files in FILES, one after the other.

It asks for the token on the terminal, or reads a line of stdin. It writes

    $XDG_DATA_HOME/agent-bus      the files in FILES   (~/.local/share/agent-bus)
    $XDG_CONFIG_HOME/agent-bus    default.env, and the certificate in default.pem   (~/.config/agent-bus)

both for this user only. default.env has the URL, the token, the name, and the path of the certificate. With --profile P
it writes P.env and P.pem. Run it again to update. AGENT_BUS_CA=FILE keeps that file instead of the bus's certificate;
AGENT_BUS_PLAIN_HTTP=1 says that the network itself encrypts.

Standard library only, and curl. Exit code: 0 connected, 1 refused or not reachable; nothing was configured, 2 usage.
"""
import sys

if sys.version_info < (3, 9):  # noqa: UP036
    sys.exit(f"bus_join.py needs Python 3.9 or later, and python3 is {sys.version.split()[0]}: install a newer one")

import argparse
import base64
import contextlib
import getpass
import hashlib
import io
import os
import re
import shlex
import ssl
import subprocess
import tempfile
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

NAMES = "recv send doctor join work log file outbox who inbox"
FILES = (*(f"bus_{name}.py" for name in NAMES.split()), "agent_bus.py")
PROFILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")  # it becomes the name of a file
# What a configuration is about. Only the line's own arguments say it here, so that no other bus gets in.
OURS = ["AGENT_BUS_URL", "AGENT_BUS_TOKEN", "AGENT_BUS_TOKEN_FILE", "AGENT_BUS_CA", "AGENT_BUS_PROFILE",
        "AGENT_BUS_PLAIN_HTTP", "AGENT_NAME"]  # fmt: skip
TOKEN = re.compile(r"abt_[0-9a-f]{8}_[A-Za-z0-9_-]{43}")


class Fault(Exception):
    """This machine cannot join. The text is one sentence that says why, and what to do."""


def curl(pin: str) -> list[str]:
    """The command that downloads from this bus, and from nobody else. The URL follows."""
    key = ["-k", "--pinnedpubkey", pin] if pin.startswith("sha256//") else []
    return ["curl", "-gfsS", *key]


def element(der: bytes, at: int) -> tuple[int, int]:
    """Where the content of the ASN.1 element at this place begins, and where it ends."""
    length, begin = der[at + 1], at + 2
    if length > 127:
        begin += length - 128
        length = int.from_bytes(der[at + 2 : begin], "big")
    return begin, begin + length


def pin_of(certificate: bytes) -> str:
    """The public key of a certificate (DER), as --pinnedpubkey of curl takes it."""
    at = element(certificate, element(certificate, 0)[0])[0]
    at = element(certificate, at)[1] if certificate[at] == 0xA0 else at  # the version, which may be absent
    for _ in "serial number", "algorithm", "issuer", "validity", "subject":
        at = element(certificate, at)[1]
    key = certificate[at : element(certificate, at)[1]]
    return f"sha256//{base64.b64encode(hashlib.sha256(key).digest()).decode()}"


def certificate_of(connection: Any, context: ssl.SSLContext) -> bytes:
    """The certificate (DER) of the other end of bus_recv.connect(). OSError if there is none that the context takes."""
    connection._context = context
    try:
        connection.connect()
        return bytes(connection.sock.getpeercert(True))
    finally:
        connection.close()


def anyone() -> ssl.SSLContext:
    """Accepts every certificate; the caller compares its key."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


def folder(variable: str, *default: str) -> str:
    base = os.environ.get(variable) or os.path.join("~", *default)
    path = os.path.join(os.path.abspath(os.path.expanduser(base)), "agent-bus")
    os.makedirs(path, 0o700, exist_ok=True)
    return path


def write(path: str, data: bytes) -> None:
    """Replace a file by one that only this user can read, whole or not at all."""
    with open(os.open(f"{path}.new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        os.fchmod(file.fileno(), 0o600)
        file.write(data)
    os.replace(f"{path}.new", path)


def fetch(url: str, pin: str) -> str:
    """Download FILES from the bus that has this pin; returns their folder. The token was not asked for yet."""
    place = folder("XDG_DATA_HOME", ".local", "share")
    with tempfile.TemporaryDirectory(dir=place) as aside:
        paths = [os.path.join(aside, file) for file in FILES]
        wanted = [word for file, path in zip(FILES, paths) for word in ("-o", path, f"{url}/{file}")]
        done = subprocess.run([*curl(pin), "--fail-early", "--max-time", "60", *wanted], stderr=subprocess.PIPE)
        if done.returncode == 90:  # CURLE_SSL_PINNEDPUBKEYNOTMATCH
            raise other_key(url)
        if done.returncode:
            said = done.stderr.decode(errors="replace").strip()
            raise Fault(f"cannot fetch the clients from {url} ({said}): is the bus running, and the tunnel or VPN up?")
        if url.startswith("http:") and pin != digest(paths):
            raise Fault(f"the programs at {url} are not those of the invitation: ask for a new one; nothing was run")
        for file, path in zip(FILES, paths):
            os.chmod(path, 0o600)
            os.replace(path, os.path.join(place, file))
    return place


def digest(paths: Sequence[str]) -> str:
    """The SHA-256 of these files, one after the other."""
    whole = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            whole.update(file.read())
    return whole.hexdigest()


def other_key(url: str) -> Fault:
    return Fault(
        f"the bus at {url} does not have the key of the invitation, so nothing of it was run and no token was sent: "
        "ask for a new invitation if the bus has a new certificate; else somebody is in between"
    )


def configured(place: str, profile: str) -> dict[str, str]:
    """The configuration of a profile, with its bus; empty if there is none."""
    import bus_recv

    if not os.path.exists(os.path.join(place, f"{profile}.env")):
        return {}
    os.environ["AGENT_BUS_PROFILE"] = profile
    try:
        return {"AGENT_BUS_URL": bus_recv.DEFAULT_URL, **bus_recv.configuration()[1]}
    finally:
        del os.environ["AGENT_BUS_PROFILE"]


def is_of(known: dict[str, str], url: str, name: str) -> bool:
    return (known.get("AGENT_BUS_URL"), known.get("AGENT_NAME")) == (url, name)


def choose(place: str, url: str, name: str, profile: str) -> str:
    """The profile to write. Ask, before the configuration of another bus or name is replaced."""
    host = re.sub("[^A-Za-z0-9._-]", "-", urlsplit(url).hostname or "").strip("-.") or "bus"
    while True:
        known = configured(place, profile)
        if not known or is_of(known, url, name):
            return profile
        other = name if known["AGENT_BUS_URL"] == url and PROFILE.fullmatch(name) else host
        who = known.get("AGENT_NAME", "any name")
        taken = f"{profile}.env is the configuration of {who} on {known['AGENT_BUS_URL']}"
        if not sys.stdin.isatty():
            raise Fault(f"{taken}: give --profile {other} to keep both, or --profile {profile} to replace it")
        print(f"{taken}.\nName a profile to keep both, or {profile} to replace it [{other}]: ", end="", flush=True)
        answer = sys.stdin.readline().strip() or other
        if answer == profile:
            return profile
        profile = answer if PROFILE.fullmatch(answer) else profile


def ask_token(name: str, known: str) -> str:
    """The token, from the terminal without echo, or else from a line of stdin."""
    keep = " (Enter keeps the one that is set)" if known else ""
    given = getpass.getpass(f"token of {name}{keep}: ") if sys.stdin.isatty() else sys.stdin.readline()
    token = given.strip("\ufeff \t\r\n") or known
    if not TOKEN.fullmatch(token):
        raise Fault("that is not a token: a token is abt_, 8 hex digits, _ and 43 characters; paste all of it")
    return token


def keep_certificate(url: str, pin: str, authority: str, path: str) -> None:
    """Write what the clients are to trust, if the bus has the pinned key: its certificate, and no other one.

    If an authority signed it, Python before 3.13 needs the certificate of that authority, from the file `authority`.
    """
    import bus_recv

    try:
        certificate = certificate_of(bus_recv.connect(url, 10.0)[0], anyone())
    except OSError as error:
        raise Fault(f"cannot get the certificate of {url} ({error}): is the bus running?") from None
    if pin_of(certificate) != pin:
        raise other_key(url)
    trusted = ssl.DER_cert_to_PEM_cert(certificate).encode()
    if authority:
        with open(authority, "rb") as file:
            trusted = file.read()
    write(path, trusted)


def check(mine: dict[str, str]) -> None:
    """Is the token good, and does each hop work, with these settings? Prints what the doctor finds wrong."""
    import bus_doctor

    import bus_recv

    os.environ.update(mine)
    try:
        bus_recv.ask(mine["AGENT_BUS_URL"], "/inbox", 10.0)
    except bus_recv.Refused as refused:
        if refused.status == 401:
            raise Fault(f"the bus does not take this token, so nothing was configured: {refused}") from None
    except (bus_recv.Unreachable, ValueError):
        pass  # the doctor says which hop it is
    with contextlib.redirect_stdout(io.StringIO()) as told:
        code = bus_doctor.main(["--hold", "0"])  # its long poll would take 25 s
    for line in told.getvalue().splitlines():
        if not line.startswith("ok"):
            print(line, flush=True)
    if code:
        raise Fault("the last line above says what to do; nothing was configured")


def join(url: str, name: str, pin: str, profile: str) -> None:
    given = {variable: os.environ.pop(variable) for variable in OURS if variable in os.environ}
    place = fetch(url, pin)
    sys.path.insert(0, place)
    sys.dont_write_bytecode = True
    there = folder("XDG_CONFIG_HOME", ".config")
    profile = profile or choose(there, url, name, given.get("AGENT_BUS_PROFILE") or "default")
    file, trusted = (os.path.join(there, f"{profile}.{kind}") for kind in ("env", "pem"))
    known = configured(there, profile)
    known = known if is_of(known, url, name) else {}
    mine = {key: value for key, value in known.items() if key not in OURS}
    mine.update(AGENT_BUS_URL=url, AGENT_NAME=name)
    with tempfile.TemporaryDirectory(dir=there) as aside:
        if pin.startswith("sha256//"):
            mine["AGENT_BUS_CA"] = os.path.join(aside, "bus.pem")
            keep_certificate(url, pin, given.get("AGENT_BUS_CA", ""), mine["AGENT_BUS_CA"])
        if given.get("AGENT_BUS_PLAIN_HTTP") and url.startswith("http:"):
            mine["AGENT_BUS_PLAIN_HTTP"] = "1"
        mine["AGENT_BUS_TOKEN"] = ask_token(name, known.get("AGENT_BUS_TOKEN", ""))
        check(mine)
        if "AGENT_BUS_CA" in mine:
            os.replace(mine["AGENT_BUS_CA"], trusted)
            mine["AGENT_BUS_CA"] = trusted
    write(file, "".join(f"{key}={value}\n" for key, value in mine.items()).encode())
    print(f"you are {name} on {url}")
    if given.get("AGENT_BUS_PROFILE") == profile:
        del given["AGENT_BUS_PROFILE"]
    show_next(place, file, profile, name, sorted({*given} - {"AGENT_BUS_PLAIN_HTTP", "AGENT_BUS_CA"}))


def show_next(place: str, file: str, profile: str, name: str, others: Sequence[str]) -> None:
    """Where everything is, and the first commands."""
    which = "" if profile == "default" else f"AGENT_BUS_PROFILE={profile} "
    print(f"The configuration is {file}. To receive, and to send:")
    print(f"    {which}python3 {shlex.quote(place)}/bus_recv.py {name}")
    print(f"    echo hello | {which}python3 {shlex.quote(place)}/bus_send.py NAME")
    if others:
        print(f"This shell sets {', '.join(others)}, which wins over that file: unset it first")


def main(argv: "Sequence[str] | None" = None) -> int:
    own = None if "agent-bus" in os.path.basename(sys.argv[0]) else "bus_join.py"  # the line runs us as `python3 -c`
    parser = argparse.ArgumentParser(prog=own, description="Connect this machine to an agent-bus as NAME.")
    parser.add_argument("url", metavar="URL", help="of the bus, like https://bus.lan:8080")
    parser.add_argument("name", metavar="NAME", help="the name that the token is for")
    parser.add_argument("pin", metavar="PIN", nargs="?", default="", help="from the line that `invite` printed")
    parser.add_argument("--profile", default="", metavar="P", help="write P.env, even if it is there (default)")
    options = parser.parse_args(argv)
    if not re.fullmatch(r"https?://[^\s?#@]+", options.url):
        parser.error(f"{options.url} is not the URL of a bus: write it like https://bus.lan:8080")
    if options.profile and not PROFILE.fullmatch(options.profile):
        parser.error("a profile is 1 to 64 of A-Z a-z 0-9 . _ - with a letter or digit first")
    try:
        join(options.url.rstrip("/"), options.name, options.pin, options.profile)
    except (Fault, OSError, ValueError) as error:  # ValueError: a configuration that was there is malformed
        print(f"bus_join: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
