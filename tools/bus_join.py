#!/usr/bin/env python3
"""Connect this machine to an agent-bus: fetch its clients, check a token, and write the configuration.

`bus_server.py invite NAME` prints the line that downloads this file and runs it:

    python3 bus_join.py URL NAME [PIN]

PIN identifies the bus: none of the FILES that this program fetches runs before PIN matches. Over https it is the public
key of the bus's certificate, as in curl's --pinnedpubkey (`sha256//...`); without it, the certificate must be valid for
everyone. Over http it is the SHA-256 of the names, lengths and contents of the files in FILES. Only curl compares a
key. The certificate for the clients to trust comes with the files, from the server that curl found to have that key.

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
import contextlib
import getpass
import hashlib
import io
import os
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from typing import TextIO
from urllib.parse import urlsplit

# As CLIENTS of the bus.
NAMES = "recv send work log doctor doctor_way doctor_bus file outbox relay join who inbox later lock search redact"
FILES = (*(f"bus_{name}.py" for name in NAMES.split()), "agent_bus.py")
CERTIFICATE = "bus.pem"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@-]{0,63}")  # as in bus_recv.py
LOOPBACK = re.compile(r"localhost|::1|127(\.[0-9]+){3}")  # as is_here() of bus_recv.py: reached without a proxy
PROFILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")  # it becomes the name of a file
# What a configuration is about. Only the line's own arguments say it here, so that no other bus gets in.
OURS = ["AGENT_BUS_URL", "AGENT_BUS_TOKEN", "AGENT_BUS_TOKEN_FILE", "AGENT_BUS_CA", "AGENT_BUS_PROFILE",
        "AGENT_BUS_PLAIN_HTTP", "AGENT_NAME"]  # fmt: skip
HIDDEN = re.compile(  # as in bus_recv.py
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u2028-\u202e"
    r"\u2060-\u206f\u2800\u3164\ud800-\udfff\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb"
    r"\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]+"
)
TOKEN = re.compile(r"abt_[0-9a-f]{8}_[A-Za-z0-9_-]{43}")
TOKEN_LIKE = re.compile("abt_[0-9a-f]{8}")  # a part of one: it is never printed, and never the name of a file


class Fault(Exception):
    """This machine cannot join. The text is one sentence that says why, and what to do."""


def say(text: str, end: str = "\n", to: "TextIO | None" = None) -> None:
    """Print a line. All that we print goes through here, because a stranger may have written parts of it."""
    shown = (c if c.isprintable() and not HIDDEN.match(c) else c.encode("unicode_escape").decode() for c in text)
    print("".join(shown), end=end, file=to or sys.stdout, flush=True)


def curl(url: str, pin: str) -> list[str]:
    """The command that downloads from the bus at this URL, and from nobody else. The URLs of the files follow."""
    key = ["-k", "--pinnedpubkey", pin] if pin.startswith("sha256//") else []
    direct = ["--noproxy", "*"] if LOOPBACK.fullmatch(urlsplit(url).hostname or "") else []
    return ["curl", "-gfsS", *direct, *key]


def folder(made: "list[str]", variable: str, *default: str) -> str:
    """A folder of ours. What of its path was not there is appended to `made`, the innermost folder first."""
    if not os.environ.get("HOME"):
        os.environ.pop("HOME", "")  # if it is empty, `~` would be the root folder
    base = os.environ.get(variable) or os.path.join("~", *default)
    path = at = os.path.join(os.path.abspath(os.path.expanduser(base)), "agent-bus")
    missing = []
    while not os.path.exists(at):
        missing.append(at)
        at = os.path.dirname(at)
    os.makedirs(path, 0o700, exist_ok=True)
    made[:0] = missing
    return path


def remove_leftovers(place: str) -> None:
    """Remove the folders of earlier calls that were killed: nothing in them has changed for a day."""
    for entry in os.scandir(place):
        if entry.name.startswith("tmp") and entry.is_dir(follow_symlinks=False):
            with contextlib.suppress(OSError):
                is_old = entry.stat().st_mtime < time.time() - 86400
                if is_old and {*os.listdir(entry.path)} <= {*FILES, CERTIFICATE}:
                    shutil.rmtree(entry.path)


def remove_empty(made: "Sequence[str]") -> None:
    """Remove the folders that we have made, because nothing came into them."""
    for path in made:
        with contextlib.suppress(OSError):  # there is something in it
            os.rmdir(path)


def write(path: str, data: bytes) -> None:
    """Replace a file by one that only this user can read, whole or not at all."""
    with open(os.open(f"{path}.new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        os.fchmod(file.fileno(), 0o600)
        file.write(data)
    os.replace(f"{path}.new", path)


def fetch(url: str, pin: str, aside: str) -> None:
    """Download FILES into a folder from the bus that has this pin, and the certificate if the pin is that of a key."""
    if url.startswith("http:") and not pin:
        raise Fault("over http:// use the line that `invite` printed: without its PIN the programs may be anyone's")
    paths = [os.path.join(aside, file) for file in FILES]
    wanted = [word for file, path in zip(FILES, paths) for word in ("-o", path, f"{url}/{file}")]
    if pin.startswith("sha256//"):
        wanted += ["-o", os.path.join(aside, CERTIFICATE), f"{url}/certificate"]
    waiting = threading.Timer(0.5, say, [f"waiting for {url}"], {"to": sys.stderr})
    waiting.daemon = True
    if sys.stderr and sys.stderr.isatty():
        waiting.start()
    done = subprocess.run([*curl(url, pin), "--fail-early", "--max-time", "60", *wanted], stderr=subprocess.PIPE)
    waiting.cancel()
    if done.returncode == 90:  # CURLE_SSL_PINNEDPUBKEYNOTMATCH
        raise other_key(url)
    if done.returncode:
        said = " ".join(done.stderr.decode(errors="replace").split())
        if done.returncode == 60 and not pin.startswith("sha256//"):  # CURLE_PEER_FAILED_VERIFICATION
            raise Fault(f"the certificate of {url} is its own: run the line that `invite` printed, which has its pin")
        raise Fault(f"cannot fetch the clients from {url} ({said}): is the bus running, and the tunnel or VPN up?")
    if url.startswith("http:") and pin != digest(paths):
        raise Fault(f"the programs at {url} are not those of the invitation: ask for a new one; nothing was run")


def digest(paths: Sequence[str]) -> str:
    """The SHA-256 of the name, the length and the content of each file, so that no byte can move to another file."""
    whole = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            data = file.read()
        whole.update(f"{os.path.basename(path)} {len(data)}\n".encode() + data)
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
        say(f"{taken}.")
        say(f"Name a profile to keep both, or {profile} to replace it [{other}]: ", end="")
        line = sys.stdin.readline()
        if not line:  # Ctrl-D
            say("")
            raise Fault("no profile was named, so nothing was configured: run the line again")
        answer = line.strip() or other
        if TOKEN_LIKE.search(answer):
            raise Fault("that was a token, and the question is for the name of a profile: run the line again")
        if answer == profile:
            return profile
        if not PROFILE.fullmatch(answer):
            say(f"{answer!r} is no profile: that is 1 to 64 of A-Z a-z 0-9 . _ - with a letter or digit first")
            continue
        profile = answer


NO_TOKEN = "no token was given, so nothing was configured: run the line again"


def ask_token(name: str, may_keep: bool) -> str:
    """The token, from the terminal without echo, or else from a line of stdin. Empty: the one that is set."""
    keep = " (Enter keeps the one that is set)" if may_keep else ""
    typed = sys.stdin.isatty()
    try:
        given = getpass.getpass(f"token of {name}{keep}: ") if typed else sys.stdin.readline()
    except EOFError:  # Ctrl-D
        say("")
        raise Fault(NO_TOKEN) from None
    except KeyboardInterrupt:
        say("")
        raise
    if not (given or typed or may_keep):  # who has typed Enter may choose a profile that has a token
        raise Fault(NO_TOKEN)
    token = given.strip("\ufeff \t\r\n")
    return checked(token) if token else ""


def checked(token: str) -> str:
    if not TOKEN.fullmatch(token):
        form = "abt_, 8 hex digits, _ and 43 characters"
        raise Fault(f"that is not a token, which is {form}. Run the line again, then paste all of the token")
    return token


def check(mine: dict[str, str]) -> None:
    """Is the token good, and does each hop work, with these settings? Prints what the doctor finds wrong."""
    import bus_doctor

    import bus_recv

    os.environ.update(mine)
    try:
        bus_recv.ask(mine["AGENT_BUS_URL"], "/inbox", 10.0)
    except bus_recv.Refused as refused:
        if refused.status == 401:
            why = str(refused).partition(": ")[0]  # what follows is for who has configured the clients
            cure = "paste the line again, then the whole token, or ask for a new invitation; nothing was configured"
            raise Fault(f"{why}: {cure}") from None
    except (bus_recv.Unreachable, ValueError):
        pass  # the doctor says which hop it is
    with contextlib.suppress(bus_recv.Refused, bus_recv.Unreachable, ValueError):  # Refused: an older bus
        name = bus_recv.ask(mine["AGENT_BUS_URL"], "/whoami", 10.0)[0].get("name")
        if name and name != mine["AGENT_NAME"]:
            said = f"this token is for {name}, and the line is for {mine['AGENT_NAME']}"
            raise Fault(f"{said}: paste the line as `invite` printed it; nothing was configured")
    with contextlib.redirect_stdout(io.StringIO()) as told:
        code = bus_doctor.main(["--hold", "0"])  # its long poll would take 25 s
    for line in told.getvalue().splitlines():
        if not line.startswith("ok"):
            say(line)
    if code:
        raise Fault("the last line above says what to do; nothing was configured")


def join(url: str, name: str, pin: str, profile: str, made: "list[str]") -> None:
    given = {variable: os.environ.pop(variable) for variable in OURS if variable in os.environ}
    place = folder(made, "XDG_DATA_HOME", ".local", "share")
    remove_leftovers(place)
    with tempfile.TemporaryDirectory(dir=place) as aside:
        fetch(url, pin, aside)
        sys.path.insert(0, aside)
        sys.dont_write_bytecode = True
        there = folder(made, "XDG_CONFIG_HOME", ".config")
        first = profile or given.get("AGENT_BUS_PROFILE") or "default"
        token = ask_token(name, is_of(configured(there, first), url, name))  # first, as users paste it behind the line
        profile = profile or choose(there, url, name, first)
        env, trusted = (os.path.join(there, f"{profile}.{kind}") for kind in ("env", "pem"))
        known = configured(there, profile)
        known = known if is_of(known, url, name) else {}
        mine = {key: value for key, value in known.items() if key not in OURS}
        mine.update(AGENT_BUS_URL=url, AGENT_NAME=name)
        if pin.startswith("sha256//"):  # if an authority signed it, Python before 3.13 needs that of the authority
            mine["AGENT_BUS_CA"] = given.get("AGENT_BUS_CA") or os.path.join(aside, CERTIFICATE)
        if given.get("AGENT_BUS_PLAIN_HTTP") and url.startswith("http:"):
            mine["AGENT_BUS_PLAIN_HTTP"] = "1"
        mine["AGENT_BUS_TOKEN"] = token or checked(known.get("AGENT_BUS_TOKEN", ""))
        check(mine)
        if "AGENT_BUS_CA" in mine:
            with open(mine["AGENT_BUS_CA"], "rb") as certificate:
                write(trusted, certificate.read())
            mine["AGENT_BUS_CA"] = trusted
        write(env, "".join(f"{key}={value}\n" for key, value in mine.items()).encode())
        for file in FILES:
            os.chmod(os.path.join(aside, file), 0o600)
            os.replace(os.path.join(aside, file), os.path.join(place, file))
    say(f"you are {name} on {url}")
    if given.get("AGENT_BUS_PROFILE") == profile:
        del given["AGENT_BUS_PROFILE"]
    others = {variable for variable, value in given.items() if value != mine.get(variable)}
    show_next(place, env, profile, mine, sorted(others - {"AGENT_BUS_PLAIN_HTTP", "AGENT_BUS_CA"}))


def show_next(place: str, file: str, profile: str, mine: "dict[str, str]", others: Sequence[str]) -> None:
    """Where everything is, and the first commands."""
    url, name, trusted = mine["AGENT_BUS_URL"], mine["AGENT_NAME"], mine.get("AGENT_BUS_CA", "")
    which = "" if profile == "default" else f"AGENT_BUS_PROFILE={profile} "
    say(f"The configuration is {file}.")
    say("To receive, to send a message to yourself, and to see all commands:")
    for words in (f"bus_recv.py {name}", f"bus_send.py {name} hello", "agent_bus.py help"):
        say(f"    {which}python3 {shlex.quote(place)}/{words}")
    token = f'"Authorization: Bearer $(sed -n \'s/^AGENT_BUS_TOKEN=//p\' {shlex.quote(file)})"'
    server = "bus" if profile == "default" else f"bus-{profile}"
    say("To give Claude Code the tools of the bus, run this line; other agents take the same URL and header:")
    say(f"    claude mcp add --scope user --transport http {server} {url}/mcp --header {token}")
    if trusted:
        say(f"Start Claude Code with NODE_EXTRA_CA_CERTS={shlex.quote(trusted)}, so that it trusts the bus.")
    say("For hooks too (`install`), this machine needs a clone of agent-bus, or `pip install` of one.")
    if others:
        say(f"This shell sets {', '.join(others)}, which wins over that file: unset it first")


def main(argv: "Sequence[str] | None" = None) -> int:
    own = "bus_join.py" if sys.argv[0] == "-c" else None  # the line of the invitation runs us as `python3 -c`
    parser = argparse.ArgumentParser(prog=own, description="Connect this machine to an agent-bus as NAME.")
    parser.add_argument("url", metavar="URL", help="of the bus, like https://bus.lan:8080")
    parser.add_argument("name", metavar="NAME", help="the name that the token is for")
    parser.add_argument("pin", metavar="PIN", nargs="?", default="", help="from the line that `invite` printed")
    parser.add_argument("--profile", default="", metavar="P", help="write P.env, and replace an old one (default.env)")
    options = parser.parse_args(argv)
    if not re.fullmatch(r"https?://[^\s?#@]+", options.url) or not options.url.isprintable():
        parser.error(f"{options.url!a} is not the URL of a bus: write it like https://bus.lan:8080")
    if not NAME.fullmatch(options.name):
        parser.error("a NAME is 1 to 64 of A-Z a-z 0-9 . _ : @ - with a letter or digit first")
    if TOKEN_LIKE.search(f"{options.profile} {os.environ.get('AGENT_BUS_PROFILE')} {options.name}"):
        parser.error("a token stands where a name or a profile belongs: the line asks for the token by itself")
    if not PROFILE.fullmatch(options.profile or os.environ.get("AGENT_BUS_PROFILE") or "default"):
        parser.error("a profile is 1 to 64 of A-Z a-z 0-9 . _ - with a letter or digit first")
    made: list[str] = []
    with contextlib.suppress(ValueError):  # not the main thread
        for number in {signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}:
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
                signal.signal(number, signal.default_int_handler)  # as Ctrl-C: what we have fetched is removed
    try:
        join(options.url.rstrip("/"), options.name, options.pin, options.profile, made)
    except (Fault, OSError, ValueError) as error:  # ValueError: a configuration that was there is malformed
        typed = re.search(r"agent[-_]bus(\.py)? join$", sys.argv[0])
        where = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else ""
        say(f"{typed[0] if typed else 'bus_join'}: {where or error}", to=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        remove_empty(made)
    return 0


if __name__ == "__main__":
    sys.exit(main())
