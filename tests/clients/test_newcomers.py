"""What people who are new here met, and now read in words: https, silence, nothing to show, no home, wrong numbers."""
import errno
import io
import json
import os
import pathlib
import pwd
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

import bus_recv
import bus_send
import bus_server
from tests.clients.test_clients import program, refusing, run
from tests.clients.test_words import on_a_terminal
from tests.kit import forked
from tests.kit.bad_servers import HTML, NOON, Scripted, answer, mail, message, page, reset, silence
from tests.kit.processes import PATIENCE, ROOT, Server, wait_until
from tools import bus_join

pytestmark = pytest.mark.usefixtures("home")

TLS_PAGES = {  # what well-known servers answer to plain http on the port of https
    "nginx": "<html><title>400 The plain HTTP request was sent to HTTPS port</title></html>",
    "Go": "Client sent an HTTP request to an HTTPS server.\n",
    "Apache": "<p>You're speaking plain HTTP to an SSL-enabled server port. Instead use the HTTPS scheme.</p>",
}
THEIR_HOME = pwd.getpwuid(os.getuid()).pw_dir


# ── http, where https is spoken ──────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def secure(tmp_path_factory):
    """The URL of a bus that speaks TLS, with http in it."""
    place = tmp_path_factory.mktemp("tls")
    made = f"openssl req -x509 -newkey rsa:2048 -nodes -subj /CN=bus -keyout {place}/key -out {place}/cert"
    subprocess.run(made.split(), capture_output=True, check=True, timeout=PATIENCE)
    with Server(place / "bus.db", "--tls-cert", f"{place}/cert", "--tls-key", f"{place}/key") as bus:
        yield bus.url


@pytest.mark.parametrize("call", [
    "bus_send.py dell hi --timeout 0", "bus_recv.py dell --timeout 0", "tools/bus_who.py",
    f"tools/bus_file.py put {ROOT}/README.md --to dell --timeout 0",
    "tools/bus_outbox.py dell hi --timeout 0", "tools/bus_log.py --no-follow",
])  # fmt: skip
def test_http_to_a_port_of_https_says_what_to_set(call, secure, home):
    code, _, err = run(*call.split(), env={"AGENT_BUS_URL": secure, "AGENT_NAME": "spark"})
    assert f"; if this port speaks https, set AGENT_BUS_URL=https{secure[4:]}" in err, err
    assert code == (0 if "outbox" in call else 75)


@pytest.mark.parametrize("client", [bus_send, bus_recv])
def test_a_connection_that_is_lost_later_is_not_taken_for_https(client, home):
    for lost in (b"", reset):
        with Scripted(lost) as server:
            with pytest.raises(client.Unreachable, match="; if this port speaks https, set AGENT_BUS_URL=https://127"):
                client.exchange(server.url, "/healthz?", None, 5)
            with pytest.raises(client.Unreachable) as held:
                client.exchange(server.url, "/recv?block=true&wait=25.000", None, 5)
            assert "https" not in str(held.value)


@pytest.mark.parametrize("client", [bus_send, bus_recv])
@pytest.mark.parametrize("server", TLS_PAGES)
def test_the_page_of_a_port_of_https_is_known(client, server, home):
    with Scripted(page(400, TLS_PAGES[server]), page(400, HTML)) as port:
        with pytest.raises(client.Unreachable, match="^400: this port speaks https, not http$"):
            client.exchange(port.url, "/recv", None, 5)
        with pytest.raises(client.Unreachable, match="^400: a web page, not a bus$"):
            client.exchange(port.url, "/recv", None, 5)


# ── Silence ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("call", [
    "bus_send.py dell hi", "bus_recv.py dell", "tools/bus_work.py builds --exec true", "tools/bus_log.py",
    f"tools/bus_file.py put {ROOT}/README.md --to dell", f"tools/bus_file.py get {'0' * 64} -o /dev/null/x",
    "tools/bus_outbox.py dell hi", "tools/bus_inbox.py look dell", "tools/bus_inbox.py ack 660ba678a1b40 dell",
    "tools/bus_who.py", "tools/bus_search.py T1", "tools/bus_redact.py 660ba678a1b40", "tools/bus_later.py --list",
    "tools/bus_later.py dell hi --after 1h", "tools/bus_lock.py lock a", "tools/bus_lock.py list",
])  # fmt: skip
def test_every_program_says_what_it_waits_for(call, home, tmp_path, monkeypatch):
    script, *arguments = call.replace("/dev/null/x", str(tmp_path / "x")).split()
    with Scripted(silence, health=silence) as server:
        shown = on_a_terminal(script, *arguments, AGENT_BUS_URL=server.url, AGENT_NAME="spark")
    assert shown == f"{pathlib.Path(script).stem}: waiting for {server.url}\n"


def test_the_outbox_says_at_once_that_there_is_no_bus(home):
    url = refusing()
    shown = on_a_terminal("tools/bus_outbox.py", "dell", "hi", AGENT_BUS_URL=url, AGENT_NAME="spark")
    assert shown.startswith(f"bus_outbox: no bus at {url} (Connection refused); still trying, up to 5 s. ")
    _, _, err = run("tools/bus_outbox.py", "dell", "hi", "--timeout", "1.2",
                    env={"AGENT_BUS_URL": url, "AGENT_NAME": "spark"})  # fmt: skip
    assert err.startswith("bus_outbox: not sent yet, but kept on this disk") and err.count("\n") == 1, "for a program"


def test_the_greeting_comes_before_the_first_message(bus, home):
    for text in ("one", "two"):
        bus_send.send("dell", text, url=bus.url, sender="spark")
    shown = on_a_terminal("bus_recv.py", "dell", until=b"| two", AGENT_BUS_URL=bus.url)
    assert shown.startswith(f"bus_recv: listening as dell on {bus.url}\n") and shown.count("listening as") == 1


# ── Nothing to show ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("call, says", [
    ("tools/bus_log.py --no-follow", "bus_log: there are no such messages"),
    ("tools/bus_log.py --last 3 --no-follow --short", "bus_log: there are no such messages"),
    ("tools/bus_log.py", "bus_log: waiting for messages on {url}, until Ctrl-C"),
    ("tools/bus_work.py builds --exec true", "bus_work: waiting for jobs of builds on {url}, until Ctrl-C"),
    ("tools/bus_later.py --list", "bus_later: no message waits to be sent"),
    ("tools/bus_outbox.py --list", "bus_outbox: no message waits, and none was refused"),
    ("bus_recv.py dell --once --timeout 0", "bus_recv: nothing came for dell"),
    ("tools/bus_inbox.py look dell", "bus_inbox: nothing is unread for dell"),
])  # fmt: skip
def test_a_person_is_told_that_there_is_nothing(call, says, tmp_path, home):
    with Server(tmp_path / "bus.db") as bus:
        env = {"AGENT_BUS_URL": bus.url, "AGENT_NAME": "dell"}
        assert on_a_terminal(*call.split(), **env) == says.format(url=bus.url) + "\n"
        if "inbox" not in call and "until Ctrl-C" not in says:
            assert run(*call.split(), env=env)[1:] == ("", ""), "a program is told nothing"


def test_a_person_is_told_that_a_worker_takes_from_a_mailbox_that_is_read_too(bus, home):
    """With `recv bob` and `work bob` the command ran for what was read long ago, and a part of it was unread again."""
    env = {"AGENT_BUS_URL": bus.url, "AGENT_NAME": "dell"}
    waiting = f"bus_work: waiting for jobs of reader on {bus.url}, until Ctrl-C"
    bus_send.send("reader", "one", url=bus.url, sender="spark")
    assert on_a_terminal("tools/bus_work.py", "reader", "--exec", "true", **env) == f"{waiting}\n"
    assert run("tools/bus_work.py", "reader", "--exec", "false", "--once", env=env)[0] == 1
    assert on_a_terminal("tools/bus_work.py", "reader", "--exec", "true", **env) == f"{waiting}\n", "not by a worker"
    assert run("bus_recv.py", "reader", "--once", env=env)[0] == 0
    told = f"{waiting}; reader is read as mail too, and each of its messages is a job, also if it was read\n"
    assert on_a_terminal("tools/bus_work.py", "reader", "--exec", "true", **env) == told


@pytest.mark.parametrize("call", ["bus_later {} --after 1h", "bus_outbox {}"])
@pytest.mark.parametrize("wrong", ["a+b", "dell,a+b", "dell --channel a+b", "dell --from a+b"])
def test_wrong_names_are_said_before_somebody_types_a_text(call, wrong, home):
    tool, *arguments = call.format(wrong).split()
    shown = on_a_terminal(f"tools/{tool}.py", *arguments, AGENT_BUS_URL=refusing(), AGENT_NAME="spark")
    assert shown.startswith(f"{tool}: 'a+b' is not a name: give 1 to 64") and "type the message" not in shown


def test_the_help_of_a_worker_says_how_a_job_is_made():
    said = " ".join(run("tools/bus_work.py", "-h")[1].split())
    assert f"python3 {ROOT}/bus_send.py NAME TEXT puts a job into it" in said


def test_a_log_that_has_messages_does_not_say_that_it_waits(bus, home):
    bus_send.send("dell", "one", url=bus.url, sender="spark")
    shown = on_a_terminal("tools/bus_log.py", "--last", "1", "--no-follow", until=b"\0", AGENT_BUS_URL=bus.url)
    assert "| one" in shown and "no such messages" not in shown and "waiting" not in shown


def test_a_look_needs_no_place_and_leaves_nothing(bus, home, tmp_path):
    for state in (tmp_path / "none", pathlib.Path("/dev/null/none")):
        env = {"AGENT_BUS_URL": bus.url, "AGENT_NAME": "looker", "AGENT_BUS_STATE_DIR": str(state)}
        assert run("tools/bus_inbox.py", "look", env=env) == (3, "", "bus_inbox: nothing is unread for looker\n")
        assert not state.exists()
    bus_send.send("looker", "one", url=bus.url, sender="spark")
    code, out, _ = run("tools/bus_inbox.py", "look", env=env)
    assert code == 0 and "| one" in out
    [sent] = json.loads(bus.get("/log?to=looker"))["messages"]
    code, out, err = run("tools/bus_inbox.py", "ack", sent["id"], env=env)
    assert code == 2 and "set AGENT_BUS_STATE_DIR to another place" in err, "this needs a place for the cursor"


def test_a_look_goes_on_behind_what_was_for_others(home):
    """Pages without a message of ours; the cursor in the file stays, and is not where each page begins."""
    cursor = home / "cursors" / "b1" / "default" / "dell"
    cursor.parent.mkdir(parents=True)
    cursor.write_text(f"{NOON}.000001\n")
    first, then = mail(more=True, now=f"{NOON}.100000"), mail(message(200000))
    with Scripted(first, then) as server:
        code, out, _ = run("tools/bus_inbox.py", "look", "dell", env={"AGENT_BUS_URL": server.url})
    assert code == 0 and "| hi" in out and cursor.read_text() == f"{NOON}.000001\n"
    assert [asked.query["since"] for asked in server.polls] == [f"{NOON}.000001", f"{NOON}.100000"]


# ── A home that is empty ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("expression", [
    "__import__('bus_recv').state_directory()", "__import__('bus_recv').configuration()[0]",
    "__import__('bus_send').configuration()[0]", "__import__('bus_server').default_path()",
])  # fmt: skip
def test_an_empty_home_is_as_none(expression):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); print({expression})"
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("AGENT_", "XDG_", "HOME"))}
    paths = [subprocess.check_output([sys.executable, "-c", code], env={**kept, **env}, text=True, timeout=PATIENCE)
             for env in ({}, {"HOME": ""})]  # fmt: skip
    assert paths[0] == paths[1] and paths[0].startswith(f"{THEIR_HOME}/")


def test_an_empty_home_is_as_none_to_a_join(monkeypatch):
    made = []
    monkeypatch.setenv("HOME", "")
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    monkeypatch.setattr(bus_join.os, "makedirs", lambda *_, **__: None)
    assert bus_join.folder(made, "XDG_DATA_HOME", ".local", "share") == f"{THEIR_HOME}/.local/share/agent-bus"


def test_an_empty_home_is_as_none_to_the_listener(tmp_path):
    env = {"PATH": os.environ["PATH"], "HOME": "", "AGENT_NAME": "lis", "AGENT_BUS_PROFILE": "there-is-none"}
    done = subprocess.run([ROOT / "bus_listener.sh"], env=env, capture_output=True, text=True, timeout=PATIENCE)
    file = f"{THEIR_HOME}/.config/agent-bus/there-is-none.env"
    assert (done.returncode, done.stderr) == (2, f"bus_listener: {file} cannot be read\n")


# ── Numbers and help ─────────────────────────────────────────────────────────────────────────────────────────────────

NUMBERS = {
    "bus_recv.py dell --tries": "1 or more", "tools/bus_search.py T1 --max": "1 or more",
    "tools/bus_lock.py unlock --fence": "1 or more", "tools/bus_log.py --last": "1 or more",
    "integrations/wake/bus_wake.py dell codex s --budget": "1 or more", "bus_server.py --port": "0 to 65535",
    "bus_server.py --max-body": "1024 to 9999999", "bus_server.py --rate": "0 or more",
    "bus_server.py --turns": "0 or more", "bus_server.py --max-attempts": "1 or more",
}  # fmt: skip


@pytest.mark.parametrize("call", NUMBERS)
@pytest.mark.parametrize("wrong", ["x", "-1", "", "nan"])
def test_what_is_no_number_is_refused_in_words(call, wrong):
    *call, option = call.split()
    code, _, err = run(*call, f"{option}={wrong}", env={"AGENT_BUS_URL": refusing(), "AGENT_NAME": "me"})
    bounds = NUMBERS[" ".join([*call, option])]
    says = rf"{option}: give a (whole )?number (of|from) {bounds}.*, not {re.escape(repr(wrong))}"
    assert code == 2 and re.search(says, err) and "invalid" not in err, err


def programs():
    yield from ("bus_recv.py", "bus_send.py", "bus_server.py", "test_bus.py", "integrations/wake/bus_wake.py")
    yield from (f"bus_server.py {command}" for command in "invite tokens revoke prune backup restore move".split())
    for path in sorted(ROOT.glob("tools/*.py")):
        text = path.read_text()
        if "ArgumentParser(" in text and "def main(" in text and path.stem != "agent_bus":  # its path is in its help
            yield f"tools/{path.name}"
            yield from (f"tools/{path.name} {word}" for word in COMMANDS.get(path.stem, "").split())


COMMANDS = {"bus_file": "put get", "bus_inbox": "look ack", "bus_lock": "lock unlock list",
            "bus_install": "install uninstall"}  # fmt: skip


@pytest.mark.parametrize("call", [*programs()])
@pytest.mark.parametrize("columns", [80, 100])
def test_no_line_of_a_help_is_wider_than_the_terminal(call, columns):
    code, out, _ = run(*call.split(), "--help", env={"COLUMNS": str(columns)})
    assert code == 0 and max(map(len, out.splitlines())) <= columns, max(out.splitlines(), key=len)


# ── Ctrl-C ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_doctor_leaves_no_name_behind_however_it_ends(tmp_path, home):
    with Server(tmp_path / "bus.db") as bus:
        env = {"AGENT_BUS_URL": bus.url, "AGENT_NAME": "spark"}
        doctor = program("tools/bus_doctor.py", env=env)
        wait_until(lambda: re.search(r"parked 1\b", bus.get("/metrics").decode()))
        doctor.send_signal(signal.SIGINT)
        assert doctor.wait(PATIENCE) == 130
        doctor.communicate()
        assert json.loads(bus.get("/agents"))["agents"] == []


def test_ctrl_c_ends_the_listener_with_130(bus, tmp_path):
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "AGENT_BUS_URL": bus.url, "AGENT_NAME": "lis"}
    process = subprocess.Popen([ROOT / "bus_listener.sh"], env=env, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline().startswith("writing the mail of lis to ")
    process.send_signal(signal.SIGINT)
    assert process.wait(PATIENCE) == 130
    process.stdout.close()


@pytest.mark.parametrize("blocks", ["0", "1"])
def test_the_listener_says_that_it_writes_when_the_bus_has_answered(blocks, tmp_path):
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "AGENT_BUS_URL": refusing(), "AGENT_NAME": "lis",
           "BLOCK": blocks}  # fmt: skip
    command = [ROOT / "bus_listener.sh"]
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert "trying again" in process.stderr.readline()
    process.terminate()
    assert process.communicate(timeout=PATIENCE)[0] == "" and process.returncode == 0
    with Server(tmp_path / "bus.db") as bus:
        began = time.monotonic()
        env["AGENT_BUS_URL"] = bus.url
        process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline().startswith("writing the mail of lis to ")
        assert time.monotonic() - began < PATIENCE, "its first poll is not held"
        process.terminate()
        process.communicate(timeout=PATIENCE)


# ── What the bus answers ─────────────────────────────────────────────────────────────────────────────────────────────


def listener(**env):
    """What bus_listener.sh says in the end."""
    script = [ROOT / "bus_listener.sh"]
    done = subprocess.run(script, env=env, stderr=subprocess.PIPE, text=True, timeout=PATIENCE)
    return done.returncode, done.stderr


def test_the_listener_tells_a_refusal_whole(tmp_path):
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    invite = [sys.executable, str(ROOT / "bus_server.py"), "invite", "ops", "--yes", "--db", str(tmp_path / "bus.db")]
    forked.run(invite, env=env, capture_output=True, check=True, timeout=PATIENCE)
    with Server(tmp_path / "bus.db") as bus:
        code, said = listener(**env, AGENT_BUS_URL=bus.url, AGENT_NAME="lis")
    assert code == 1 and said.endswith("to one made on the machine of the bus by python3 bus_server.py invite NAME\n")


def test_the_url_of_the_page_is_no_url_of_the_bus(bus, tmp_path):  # noqa: F811
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "AGENT_NAME": "lis"}
    code, said = listener(**env, AGENT_BUS_URL=f"{bus.url}/ui/")
    assert code == 1 and "in AGENT_BUS_URL leave /ui out" in said


@pytest.mark.parametrize("call", ["bus_send.py b hi --timeout 0", "bus_recv.py b --timeout 0", "tools/bus_who.py"])
@pytest.mark.parametrize("status, why", [(507, "the disk is full"), (429, "wait"), (503, "wait")])
def test_a_bus_that_cannot_do_it_now_is_not_said_to_be_missing(call, status, why, home):
    with Scripted(answer({"error": why}, status=status), answer({"error": why}, status=status)) as server:
        code, _, err = run(*call.split(), env={"AGENT_BUS_URL": server.url, "AGENT_NAME": "spark"})
    assert code == 75 and f": not now: the bus at {server.url} ({status}: {why}). python3 {ROOT}/tools/" in err, err
    assert "running there" not in err


def test_the_first_reader_of_a_newcomer_says_what_to_start(home):
    process = program("bus_recv.py", "bob", env={"AGENT_BUS_URL": (url := refusing())})
    said = process.stderr.readline().decode()
    process.kill()
    process.communicate(timeout=PATIENCE)
    assert said.startswith(f"bus_recv: no bus at {url} (Connection refused); trying again. Is bus_server running")


def test_the_listener_says_that_its_name_is_missing(tmp_path):
    said = listener(PATH=os.environ["PATH"], HOME=str(tmp_path))
    assert said == (2, "bus_listener: the name is missing: give NAME, or set AGENT_NAME\n")


def test_a_full_disk_is_told_where_the_bus_runs_once_in_ten_minutes(monkeypatch):
    said, room = [], SimpleNamespace(has_room=lambda: False)
    monkeypatch.setattr(bus_server, "say", said.append)
    ledger = bus_server.Ledger(SimpleNamespace(loop=None, state=SimpleNamespace(view=room)))
    put = bus_server.Put([])
    for _ in range(3):
        ledger.note_room([put])
    assert not put.room and said == [f"bus_server: {bus_server.no_room().sentence}"] and "under 16 MiB free" in said[0]
    ledger.told -= 601
    room.has_room = lambda: True
    ledger.note_room([again := bus_server.Put([])])
    assert again.room and len(said) == 1
    room.has_room = lambda: False
    ledger.note_room([])
    assert len(said) == 2


@pytest.mark.parametrize("call, code, says", [
    ("integrations/claude_code/bus_hook.py --foo", 1, "bus_hook: one of the arguments"),
    ("integrations/wake/bus_wake.py alice claude s --folder /nowhere", 2, "bus_wake: /nowhere: No such file"),
    ("tools/agent_bus.py ack bob", 2, "agent_bus.py ack: error: whose mail? Give NAME after the ID or set AGENT_NAME"),
    ("bus_server.py --db /dev/null/bus.db", 2, "--db gives another place"),
])  # fmt: skip
def test_a_mistake_of_a_newcomer_is_named_by_its_program(call, code, says, home):
    found, out, err = run(*call.split(), env={"AGENT_BUS_URL": refusing()})
    assert (found, out) == (code, "") and says in err.splitlines()[-1]


def test_a_join_without_a_token_says_so_and_leaves_the_prompts_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    with pytest.raises(bus_join.Fault, match="no token was given"):
        bus_join.ask_token("dell", may_keep=False)
    assert bus_join.ask_token("dell", may_keep=True) == ""

    def interrupted(prompt):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(bus_join.getpass, "getpass", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bus_join.ask_token("dell", may_keep=False)
    assert capsys.readouterr().out == "\n"


def test_the_list_of_endpoints_has_a_blank_behind_each_method(bus):
    endpoints = re.findall(r"^([A-Z]{3,6})( */\S*) ", bus.get("/").decode(), re.MULTILINE)
    assert ("DELETE", " /mcp") in endpoints and all(path[0] == " " for _, path in endpoints)


@pytest.mark.parametrize("call", [["backup", "x.copy"], ["restore", "x.copy"]])
def test_a_command_that_may_not_write_there_says_so_in_a_sentence(call, tmp_path, monkeypatch, capsys):
    """A folder of somebody else, which may not even be looked into; root may, so it is made up."""
    with Server(tmp_path / "bus.db"):
        run("bus_server.py", "backup", str(tmp_path / "x.copy"), "--db", str(tmp_path / "bus.db"))

    def refused(path, **_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "umask", lambda mask: 0)  # of this process, which goes on
    monkeypatch.setattr(pathlib.Path, "unlink", refused)
    call = [call[0], "new.copy" if call[0] == "backup" else call[1]]
    assert bus_server.main([*call, "--db", "bus.db"]) == 2
    said = capsys.readouterr().err
    assert re.fullmatch(r"bus_server: Permission denied: '\S+\.new'\n", said), said


def test_a_redaction_that_no_bus_has_heard_of_is_known_not_to_be_done(home):  # noqa: F811
    code, _, err = run("tools/bus_redact.py", "660ba678a1b40", env={"AGENT_BUS_URL": refusing()})
    assert code == 75 and "; nothing is redacted: repeat it." in err
    with Scripted(reset) as server:
        code, _, err = run("tools/bus_redact.py", "660ba678a1b40", env={"AGENT_BUS_URL": server.url})
        assert code == 75 and "; it is not known whether the message is redacted: repeat it." in err
