"""The words of `bus_server.py invite`: what the command will change, and the line for the other machine.

bus_server.py makes the token and imports this file for agreed() and invitation(). The line downloads bus_join.py, and
runs it only if it is the one that this bus has: see PINNED, OPEN and CHECKED below.
"""
from __future__ import annotations

import base64
import contextlib
import hashlib
import http.client
import os
import re
import shlex
import shutil
import socket
import ssl
import sys
import textwrap
import time
from typing import Any, TextIO
from urllib.parse import urlsplit

HERE = os.path.dirname(os.path.realpath(__file__))
sys.path += [HERE, os.path.dirname(HERE)]  # as in bus_doctor.py
sys.path.sort(key=lambda folder: folder.endswith("-packages"))  # else an older version that is installed wins
import bus_join  # noqa: E402

import bus_recv  # noqa: E402

PATIENCE = 3.0  # s for each question to a bus
SERIAL_NUMBER, ALGORITHM, ISSUER, VALIDITY, SUBJECT = 0x02, 0x30, 0x30, 0x30, 0x30  # tags before the key
PARTIAL_CHAIN: Any = 0x80000  # of OpenSSL: a trusted certificate need not be one that signed itself
# The line, in three kinds. bus_join.py is an argument, so that no file of another user can take its place, and that
# stdin stays the terminal. `$(...) &&` runs nothing if curl fails, and -I imports nothing from the current folder.
#
# PINNED: the bus has a certificate of its own. curl sends nothing to a server that has another key.
# OPEN: the certificate is valid for everyone; curl and bus_join.py check it as usual.
# CHECKED: plain http. The line has the SHA-256 of bus_join.py.
PINNED = """j=$({curl} {url}/bus_join.py) && python3 -Ic "$j" {url} {name} {pin}"""
OPEN = """j=$({curl} {url}/bus_join.py) && python3 -Ic "$j" {url} {name}"""
CHECKED = """j=$({curl} {url}/bus_join.py) && {plain}python3 -Ic '{check}' {own} "$j" {url} {name} {pin}"""
CHECK = (
    "import hashlib as l,sys;a=sys.argv;h=a.pop(1);j=a.pop(1);exec(j) "
    'if l.sha256(j.encode(errors="replace")).hexdigest()==h '
    'else sys.exit("this is not the bus_join.py of the invitation: ask for a new one; nothing was run")'
)


def agreed(name: str, database: str, here: str, closed: bool, yes: bool, url: str = "") -> bool:
    """Say what the command changes. On a terminal, ask if it closes the bus, or if no bus uses the database.

    Without a terminal, and with `yes`, it is done without a question.

    `here` is the URL at which the bus listens; empty if it does not run. With a `url` that no client could use, nothing
    is done.
    """
    if fault := unusable(url, here):
        tell(fault)
        return False
    database = os.path.abspath(database)
    where = f"at {here}" if here else "that does not run now"
    asks = not yes and not (closed and here) and sys.stdin.isatty()
    if not closed:
        alone = "" if asks or yes else " There is no terminal, so you are not asked."
        undo = f"To undo this: stop the bus, delete {database}.tokens, and start the bus."
        tell(f"The first token closes the bus: from now on every agent needs one.{alone} {undo}")
    tell(f"A token of {name} for the bus {where}, whose database is {database}")
    other = "" if here else settings_url()
    other = f" The bus at {other} has another database." if other and said(other, "/healthz") else ""
    if not here and not os.path.exists(database):
        tell(f"The bus makes this database at its first start. If your bus has started, correct --db.{other}")
    elif other:
        tell(f"{other[1:]} If you mean that bus, give its --db.")
    if not closed:
        agents = said(here, "/agents?online=true").get("agents", []) if here else []
        names = sorted({str(agent["name"]) for agent in agents} - {name})
        if names:
            more = f" and {len(names) - 20} more" if len(names) > 20 else ""
            tell(f"These names listen now, and have no token: {', '.join(names[:20])}{more}")
    if not asks:
        return True
    print("Make the token? [y/N] ", end="", file=sys.stderr, flush=True)
    answer = sys.stdin.readline()
    if not answer:  # Ctrl-D
        print(file=sys.stderr)
    return answer.strip().lower() in ("y", "yes")


def unusable(url: str, here: str) -> str:
    """What is wrong with the URL that the operator gave, if the bus that runs here can never be reached by it."""
    if url.startswith("http:") and here.startswith("https:"):
        return f"The bus speaks https, and {url} does not: give --url https://..."
    fault = pin_for(url, here)[1] if url.startswith("https:") and here.startswith("https:") else ""
    return " ".join(fault.split()) if fault.startswith(UNFIT.partition("{")[0]) else ""


def tell(line: str) -> None:
    print(wrapped(bus_recv.visible(line), sys.stderr), file=sys.stderr, flush=True)


def wrapped(text: str, out: TextIO | None) -> str:
    """For a terminal: not wider than that. A paragraph that begins with a blank is for copying, and stays as it is."""
    if not (out and out.isatty()):
        return text
    wrap = textwrap.TextWrapper(shutil.get_terminal_size().columns, break_long_words=False, break_on_hyphens=False)
    paragraphs = text.split("\n\n")
    return "\n\n".join(each if each[:1] == " " else wrap.fill(" ".join(each.split())) for each in paragraphs)


def settings_url() -> str:
    """The bus that the clients of this user talk to."""
    try:
        return bus_recv.settings()["AGENT_BUS_URL"]
    except ValueError:  # the configuration is malformed, which is not our matter
        return bus_recv.DEFAULT_URL


def said(url: str, path: str) -> dict[str, Any]:
    """What a bus on this machine answers to a stranger, for a hint; an empty dict if it does not answer."""
    try:
        connection, prefix, headers = bus_recv.connect(url, PATIENCE)
        if url.startswith("https:"):
            connection._context = anyone()
        with contextlib.closing(connection):
            connection.request("GET", prefix + path, headers=headers)
            response = connection.getresponse()
            return bus_recv.judged(response, response.read(bus_recv.ANSWER_BYTES))
    except (OSError, ValueError, http.client.HTTPException, bus_recv.Refused, bus_recv.Unreachable):
        return {}


def invitation(name: str, token: str, here: str, url: str) -> str:
    """What to run on the other machine, and what to paste there. `url` is the bus as that machine sees it, if given."""
    named = "" if url else chosen(here)
    url = (url or reachable(here)).rstrip("/")
    line, remark = line_for(name, here, url)
    steps = behind_tunnel(url, RUN.format(name=name, line=line)) if line else ""
    texts = [TOKEN.format(name=name, token=token), steps, remark, named]
    return wrapped("\n".join(filter(None, texts)).rstrip(), sys.stdout)


def page_link(until: int | None, name: str, token: str, here: str, url: str) -> str:
    """A link for the browser of a person. The token is in the fragment, which a browser sends to nobody."""
    works = f"until {time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime(until))}" if until else "until you revoke it"
    named = "" if url else chosen(here)
    url = (url or reachable(here)).rstrip("/")
    if not url.startswith("http"):
        return f"{TOKEN.format(name=name, token=token)}\n{NO_PAGE}".rstrip()
    is_open = url.startswith("http:") and not bus_recv.is_here(urlsplit(url).hostname)
    page = behind_tunnel(url, PAGE.format(name=name, url=url, token=token, works=works))
    return wrapped("\n".join(filter(None, [page, PLAIN_PAGE.format(url=url) * is_open, named])).rstrip(), sys.stdout)


def behind_tunnel(url: str, text: str) -> str:
    """What to do on another machine; before it, the tunnel that it needs if the bus is for its own machine only."""
    parts = urlsplit(url)
    port = parts.port or {"http": 80}.get(parts.scheme, 443)
    return TUNNEL.format(url=url, port=port, then=text) if bus_recv.is_here(parts.hostname) else text


def reachable(here: str) -> str:
    """The URL of the running bus for others. For every address it has a name of the certificate, or of the host."""
    if not re.search(r"//(0\.0\.0\.0|\[::\]):", here):
        return here
    host = socket.gethostname()
    names = names_of(here) if here.startswith("https:") else []
    host = host if host in names or not names else names[0]
    return re.sub("//.*:", f"//{f'[{host}]' if ':' in host else host}:", here)


def chosen(here: str) -> str:
    """Why reachable() has chosen this host; an empty text if it had no choice."""
    url = reachable(here)
    why = "its certificate is for that name" if url.startswith("https:") else "that is the name of this machine"
    host = urlsplit(url).hostname
    return "" if url == here else NAMED.format(url=url, why=why, host=host, scheme=urlsplit(url).scheme)


def line_for(name: str, here: str, url: str) -> tuple[str, str]:
    """The line for the other machine, and what the operator must know; empty texts if there is no such thing."""
    values = {"url": shlex.quote(url), "name": name, "check": CHECK, "plain": ""}
    parts, remark = urlsplit(url), ""
    if parts.scheme == "https":
        pin, fault = pin_for(url, here)
        return (PINNED if pin else OPEN).format(curl=shlex.join(bus_join.curl(url, pin)), pin=pin, **values), fault
    if parts.scheme != "http":
        return "", f"The bus listens at {url}, which no other machine reaches: see docs/deploy.md.\n" if url else NO_BUS
    if not bus_recv.is_here(parts.hostname):
        values["plain"], remark = "AGENT_BUS_PLAIN_HTTP=1 ", PLAIN.format(url=url)
    try:
        pin = bus_join.digest([beside(file) for file in bus_join.FILES])
    except OSError as error:
        return "", f"There is no line to run: {error.filename} is missing. Copy it from the same version.\n"
    with open(beside("bus_join.py"), "rb") as file:
        own = hashlib.sha256(file.read().rstrip(b"\n")).hexdigest()  # as $(...) has it
    return CHECKED.format(curl=shlex.join(bus_join.curl(url, "")), own=own, pin=pin, **values), remark


def beside(file: str) -> str:
    """Where the bus has a file that it serves."""
    places = [os.path.join(folder, file) for folder in (HERE, os.path.dirname(HERE))]
    return next(filter(os.path.exists, places), places[0])


# TLS


def pin_for(url: str, here: str) -> tuple[str, str]:
    """The pin of the bus at this https URL, empty if its certificate is valid for everyone; and what is wrong with it.

    A pin is taken from the bus itself, on this machine, where nobody is in between.
    """
    try:
        connection: Any = bus_recv.connect(url, PATIENCE)[0]
        connection._context = ssl.create_default_context()
        with contextlib.closing(connection):
            connection.connect()
        return "", ""
    except (OSError, ValueError) as error:
        why = (getattr(error, "verify_message", "") or getattr(error, "strerror", "") or str(error)).rstrip(".")
    if not here.startswith("https:"):
        return "", UNCHECKED.format(url=url, why=why)
    try:
        certificate, _ = handshake(here, anyone())
        pin, context = pin_of(certificate), trusting(certificate)
        handshake(here, context, urlsplit(url).hostname)
        context.verify_flags &= ~PARTIAL_CHAIN
        handshake(here, context, urlsplit(url).hostname)
        return pin, ""
    except ssl.SSLCertVerificationError as error:
        if not context.verify_flags & PARTIAL_CHAIN:
            return pin, AUTHORITY.format(url=url)
        why = error.verify_message.rstrip(".")
        return pin, UNFIT.format(url=url, why=why, names=", ".join(names_of(here)))
    except (OSError, ValueError) as error:
        return "", UNCHECKED.format(url=url, why=error)


def pin_of(certificate: bytes) -> str:
    """The public key of a certificate of our own bus, as --pinnedpubkey of curl takes it. ValueError if it is not DER.

    The parser is strict, so that it finds the key that OpenSSL finds. Nothing of a stranger comes here.
    """
    at, whole = element(certificate, 0, len(certificate), 0x30)
    at, end = element(certificate, at, whole, 0x30)
    if certificate[at : at + 1] == b"\xa0":  # the version, which may be absent
        at = element(certificate, at, end, 0xA0)[1]
    for tag in SERIAL_NUMBER, ALGORITHM, ISSUER, VALIDITY, SUBJECT:
        at = element(certificate, at, end, tag)[1]
    key = certificate[at : element(certificate, at, end, 0x30)[1]]
    return f"sha256//{base64.b64encode(hashlib.sha256(key).digest()).decode()}"


def element(der: bytes, at: int, limit: int, tag: int) -> tuple[int, int]:
    """Where the content of the element with this tag begins, and where it ends. ValueError if this is not DER."""
    head = der[at : min(at + 6, limit)]
    size = max(head[1] - 0x80, 0) if len(head) > 1 else 0  # how many bytes the length has, beyond the first
    length = int.from_bytes(head[2 : 2 + size] if size else head[1:2], "big")
    begin = at + 2 + size
    least = 0x80 if size == 1 else 1 << 8 * (size - 1) if size else 0
    if head[:1] != bytes([tag]) or head[1:2] == b"\x80" or size > 4 or length < least or begin + length > limit:
        raise ValueError(f"its certificate is not DER at byte {at}")
    return begin, begin + length


def anyone() -> ssl.SSLContext:
    """Accepts every certificate: for a bus on this machine."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


def handshake(here: str, context: ssl.SSLContext, host: str | None = None) -> tuple[bytes, Any]:
    """The certificate of the bus on this machine: DER, and as a dict if the context verified it, for `host`."""
    parts = urlsplit(here)
    plain = bus_recv.dial((parts.hostname or "", parts.port or 443), PATIENCE)
    with contextlib.closing(plain), context.wrap_socket(plain, server_hostname=host or parts.hostname) as tls:
        return tls.getpeercert(True) or b"", tls.getpeercert()


def trusting(certificate: bytes) -> ssl.SSLContext:
    """Trusts this certificate (DER) alone, whoever signed it."""
    context = ssl.create_default_context(cadata=certificate)
    context.verify_flags |= PARTIAL_CHAIN
    return context


def names_of(here: str) -> list[str]:
    """The host names and addresses in the certificate of the bus on this machine."""
    try:
        context = trusting(handshake(here, anyone())[0])
        context.check_hostname = False
        return [value for _, value in handshake(here, context)[1].get("subjectAltName", ())]
    except OSError:
        return []


TOKEN = """\
The token of {name}, shown this once (the bus keeps only its hash):

    {token}
"""
RUN = """\
On the machine of {name}, which may be this one, paste this line into bash or zsh. It needs curl and Python 3.9 or
later, and asks for the token.

    {line}
"""
PAGE = """\
The page of the bus, for {name}, shown this once. Whoever has this link may do what the token may: send it as a secret.
A browser keeps links in its history. This one works {works}.

    {url}/ui/#token={token}
"""
NO_PAGE = """\
No bus with this database listens on a port, so there is no link: start the bus and make another token, or give --url.
"""
PLAIN_PAGE = """\
{url} is not encrypted: whoever is on the way reads the token and the mail. Use this link only where the network itself
encrypts (VPN, tailnet); elsewhere, give the bus a certificate with --tls-cert (docs/deploy.md), and invite again.
"""
TUNNEL = """\
{url} works on the machine of the bus only. On another machine do 1. and 2., on this one 2. alone.

1. In a terminal there, leave this command running (HOST is the machine of the bus); then {url} works there too:

    ssh -N -L {port}:127.0.0.1:{port} HOST

2. {then}
Instead of 1., let the bus listen for others, with --host and --tls-cert (docs/deploy.md), and invite again.
"""
PLAIN = """\
{url} is not encrypted: whoever is on the way reads the token and the mail. Use this line only where the network itself
encrypts (VPN, tailnet); elsewhere, give the bus a certificate with --tls-cert (docs/deploy.md), and invite again.
"""
NO_BUS = """\
The token is good as soon as the bus runs. No bus runs with this database now, so there is no line to run. To get one
now, invite again with --url and the URL that the bus will have; if it will have a certificate of its own (--tls-cert),
invite again when it runs. The line sets the URL, the token and the certificate, on another machine and on this one. Or
set them yourself: AGENT_BUS_URL, AGENT_BUS_TOKEN to this token and, for a certificate of its own, AGENT_BUS_CA to the
file of the certificate.
"""
NAMED = """\
The bus listens at every address of this machine; {url} is given because {why}. The other machine must know
where {host} is; if it does not (DNS, hosts file), invite again with --url {scheme}://ADDRESS:PORT.
"""
UNCHECKED = """\
The certificate at {url} cannot be checked from here ({why}). The line works if that certificate is valid for everyone.
"""
AUTHORITY = """\
The certificate of {url} was signed by an authority that other machines may not know, and Python before 3.13 needs the
certificate of that authority. Copy its file to the other machine, and run `export AGENT_BUS_CA=FILE` before the line.
"""
UNFIT = """\
The clients will refuse the certificate of {url}: {why}. It is for: {names}. Give --url with one of these names, or make
a certificate as in docs/deploy.md.
"""
