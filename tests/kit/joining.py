"""A bus with a certificate, an invitation to it, and a machine that joins: what the tests of join and invite share."""
import contextlib
import os
import pathlib
import re
import shutil
import ssl
import subprocess
import sys

import pytest

from tests.kit import forked
from tests.kit.authority import Certificate
from tests.kit.peers import command
from tests.kit.processes import PATIENCE, ROOT, Server
from tests.kit.terminal import PROMPT, Terminal, machine

needs_curl = pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")
TOKEN = re.compile(r"abt_[0-9a-f]{8}_[\w-]{43}")
CLIENTS = pathlib.Path(".local/share/agent-bus")
CONFIG = pathlib.Path(".config/agent-bus")
JOIN = (ROOT / "tools" / "bus_join.py").read_text()
forked.WARM[JOIN] = None
NOBODYS = "abt_00000000_" + "s" * 43


def shells(*rows):
    """Each row begins with a shell."""
    return [pytest.param(*row, marks=pytest.mark.skipif(not shutil.which(row[0]), reason=row[0])) for row in rows]


def tls(certificate):
    return ["--tls-cert", certificate.file, "--tls-key", certificate.key]


def secure(bus):
    bus.url = bus.url.replace("http:", "https:")
    return bus


@pytest.fixture
def bus(tmp_path, authority):
    """With a certificate that it signed itself."""
    with secure(Server(tmp_path / "bus.db", *tls(authority.self_signed("IP:127.0.0.1")))) as bus:
        yield bus


def invited(bus, name, *options):
    """(the line, the token, all that was said)"""
    text = command(bus, "invite", name, *options)
    line = re.search(r"^    (j=\$.*)$", text, re.M)
    return line and line[1], TOKEN.search(text)[0], text


def join(bus, name, token, home, *options, pin=None, program=sys.executable, **more):
    """bus_join.py as the line runs it, without a terminal; (exit code, stdout, stderr)."""
    line, _, _ = invited(bus, name) if pin is None else (pin, "", "")
    arguments = [bus.url, name, line.split()[-1], *options]
    env = {"HOME": str(home), "PATH": os.environ["PATH"], **more}
    done = forked.run([program, "-I", "-c", JOIN, *arguments], env=env, input=f"{token}\n", text=True,
                          capture_output=True, timeout=PATIENCE)  # fmt: skip
    assert "Traceback" not in done.stderr and (not token or token not in done.stdout + done.stderr)
    return done.returncode, done.stdout, done.stderr


def configuration(home, profile="default"):
    with contextlib.suppress(FileNotFoundError):
        return dict(line.split("=", 1) for line in (home / CONFIG / f"{profile}.env").read_text().splitlines())


def pasted(line, tmp_path, shell="bash", path=None):
    """What a terminal shows until the next prompt, or until a token is asked for."""
    with Terminal(shell, tmp_path / "home", path or machine(tmp_path / "bin", "curl")) as terminal:
        terminal.type(line)
        return terminal.wait_for(PROMPT, "token of ")


def der(tag, *contents):
    content = b"".join(contents)
    size = b"" if len(content) < 128 else len(content).to_bytes(2, "big")
    return bytes([tag, 0x80 + len(size) if size else len(content)]) + size + content


def two_keys(bus, place):
    """A certificate with a key of ours. A parser that takes an indefinite length for 0 finds the key of `bus` in it."""

    def openssl(*arguments, **more):
        return subprocess.run(["openssl", *arguments], check=True, capture_output=True, cwd=place, **more).stdout

    openssl("ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", "our.key")
    ours = openssl("pkey", "-in", "our.key", "-pubout", "-outform", "DER")
    text = openssl("x509", "-in", bus.file, "-noout", "-pubkey")
    theirs = openssl("pkey", "-pubin", "-outform", "DER", input=text)
    algorithm = bytes.fromhex("3080 06082a8648ce3d040302 3080 0500") + theirs + bytes(4)  # 30 80: ends with two zeros
    name = der(0x30, der(0x31, der(0x30, bytes.fromhex("0603550403"), der(0x0C, b"bus"))))
    validity = der(0x30, der(0x17, b"250101000000Z"), der(0x17, b"490101000000Z"))
    host = der(0x30, bytes.fromhex("0603551d11"), der(4, der(0x30, der(0x87, bytes([127, 0, 0, 1])))))
    authority = der(0x30, bytes.fromhex("0603551d13 0101ff 0405 30030101ff"))
    number, signature = bytes.fromhex("a003020102 0201 11"), bytes.fromhex("0309 00 3006 020101 020101")
    extensions = der(0xA3, der(0x30, host, authority))
    what = der(0x30, number, algorithm, name, validity, name, ours, extensions)
    (place / "our.pem").write_text(ssl.DER_cert_to_PEM_cert(der(0x30, what, algorithm, signature)))
    return Certificate(str(place / "our.pem"), str(place / "our.key"))


OTHER = "AGENT_BUS_URL=https://other.lan:8080\nAGENT_NAME=nano\nAGENT_BUS_TOKEN=theirs\n"


def other_bus(home):
    (home / CONFIG).mkdir(parents=True)
    (home / CONFIG / "default.env").write_text(OTHER)
    (home / CONFIG / "default.env").chmod(0o600)
