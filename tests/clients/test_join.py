"""From `invite` to a configured machine: one line and one token, and nothing from anybody in between."""
import importlib.util
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import time

import pytest

import bus_recv
import bus_server
from tests.clients.test_clients import refusing
from tests.kit import joining
from tests.kit.joining import (
    CLIENTS,
    CONFIG,
    NOBODYS,
    OTHER,
    TOKEN,
    configuration,
    invited,
    join,
    other_bus,
    pasted,
    secure,
    shells,
    tls,
)
from tests.kit.peers import command, set_expires
from tests.kit.processes import PATIENCE, ROOT, Server, in_time
from tests.kit.terminal import PROMPT, Terminal, Watch, machine
from tools import agent_bus, bus_join

bus = joining.bus  # a fixture

pytestmark = joining.needs_curl


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
        assert took < in_time(10) and looks > 3 and watch.seen == []
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


@pytest.mark.parametrize("kind", ["plain", "a certificate"])
def test_a_bus_on_this_machine_is_joined_without_the_proxy_of_the_environment(kind, tmp_path, authority):
    """As the clients reach it: it may be the end of a tunnel. curl would ask the proxy, which here is none."""
    certified = tls(authority.self_signed("IP:127.0.0.1")) if kind != "plain" else []
    bus = Server(tmp_path / "bus.db", *certified)
    with secure(bus) if certified else bus:
        line, token, _ = invited(bus, "dell")
        env = {"HOME": str(tmp_path / "home"), "PATH": os.environ["PATH"]}
        env.update({proxy: refusing() for proxy in ("http_proxy", "https_proxy", "ALL_PROXY")})
        done = subprocess.run(["bash", "-c", line], env=env, input=token, text=True, capture_output=True,
                              timeout=PATIENCE)  # fmt: skip
        assert done.returncode == 0 and f"you are dell on {bus.url}" in done.stdout, done.stderr


@pytest.mark.parametrize("host, direct", [
    *((host, True) for host in ("localhost", "127.0.0.1", "127.8.9.10", "::1")),
    *((host, False) for host in ("10.0.0.5", "127.example", "localhost.example", "::2")),
])  # fmt: skip
def test_another_machine_is_joined_as_the_environment_says(host, direct):
    assert bus_recv.is_here(host) is direct
    assert ("--noproxy" in bus_join.curl(f"http://{f'[{host}]' if ':' in host else host}:8080", "")) is direct


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


def test_the_last_lines_connect_claude_code_without_a_clone(bus, tmp_path):
    """A shell runs the line, with a claude that prints what it is called with."""
    pin, token, _ = invited(bus, "dell")
    code, out, _ = join(bus, "dell", token, tmp_path / "home", pin=pin)
    line = re.search("^    (claude mcp add .*)$", out, re.M)[1]
    done = subprocess.run(f'claude() {{ printf "%s|" "$@"; }}\n{line}', shell=True, capture_output=True, text=True)
    told = f"mcp|add|--scope|user|--transport|http|bus|{bus.url}/mcp|--header|Authorization: Bearer {token}|"
    assert code == 0 and done.stdout == told
    assert f"NODE_EXTRA_CA_CERTS={tmp_path / 'home'}" in out


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


def test_the_configuration_of_another_bus_is_not_replaced(bus, tmp_path):
    home = tmp_path / "home"
    other_bus(home)
    line, token, _ = invited(bus, "dell")
    code, out, err = join(bus, "dell", token, home, pin=line)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "default.env is the configuration of nano on https://other.lan:8080: give --profile 127.0.0.1" in err
    assert (home / CONFIG / "default.env").read_text() == OTHER
    code, out, _ = join(bus, "dell", token, home, "--profile", "work", pin=line)
    assert code == 0 and "AGENT_BUS_PROFILE=work python3" in out and "--transport http bus-work http" in out
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


def test_a_folder_that_cannot_be_made_is_named_without_the_number_of_the_error(tmp_path):
    (tmp_path / "home").touch()
    command = [sys.executable, str(ROOT / "tools" / "bus_join.py"), "http://127.0.0.1:1", "dell", "x"]
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path / "home")}
    done = subprocess.run(command, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PATIENCE)
    assert (done.returncode, done.stderr) == (1, f"bus_join: {tmp_path}/home/.local: Not a directory\n")
