"""What people meet in their first hours: hints to paste, ends of programs, faults of their own files and terminals."""
import io
import json
import os
import re
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest

import bus_recv
import bus_send
from tests.clients.test_clients import program, reader, refusing, run
from tests.clients.test_words import on_a_terminal
from tests.kit import forked, peers
from tests.kit.bad_servers import Scripted, answer, mail, message, stored
from tests.kit.naive_server import Naive
from tests.kit.peers import command
from tests.kit.processes import PATIENCE, ROOT, wait_until
from tests.kit.relaying import profile
from tools import bus_join

pytestmark = pytest.mark.usefixtures("home")


@pytest.mark.parametrize("call", [
    "bus_send.py bob hi --timeout 0", "bus_recv.py bob --timeout 0", "tools/agent_bus.py who", "tools/bus_who.py",
    "tools/agent_bus.py inbox bob", "tools/bus_lock.py unlock a", "tools/agent_bus.py unlock a", "tools/bus_work.py -h",
])  # fmt: skip
def test_a_hint_works_when_it_is_pasted_from_any_folder(call, bus, tmp_path):
    run("bus_send.py", "bob", "hi", env={"AGENT_BUS_URL": bus.url, "AGENT_NAME": "ann"})
    script, *arguments = call.split()
    url = bus.url if "lock" in call or "inbox" in call else refusing()
    *_, out, err = run(str(ROOT / script), *arguments, cwd=tmp_path, env={"AGENT_BUS_URL": url, "AGENT_NAME": "ann"})
    hints = re.findall(r"(\S+ )?(\S*\w\.py)\b(?! \[)", re.sub(r"(?m)^\S+\.py .*?:", "", out + err))
    assert hints
    for before, path in hints:
        assert before == "python3 " and os.path.exists(tmp_path / path), (path, out, err)


# ── Ends ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("call", ["bus_recv.py bob", "tools/bus_log.py", "tools/agent_bus.py log --json"])
def test_a_program_ends_when_nobody_reads_it_any_more_though_nothing_comes(call, bus):
    run("bus_send.py", "bob", "hi", env={"AGENT_BUS_URL": bus.url, "AGENT_NAME": "ann"})
    process = program(*call.split(), env={"AGENT_BUS_URL": bus.url})
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(PATIENCE) == 0
    process.stderr.close()


@pytest.mark.parametrize("seconds, done", [("0.1", "1"), ("0", "123")])
def test_no_command_begins_after_the_timeout_and_the_rest_stays_unread(seconds, done, bus, tmp_path):
    """0 s is for all that waits now."""
    env = {"AGENT_BUS_URL": bus.url, "AGENT_NAME": "ann"}
    for number in "123":
        run("bus_send.py", "bob", number, env=env)
    takes = "printf x >>done; sleep 0.1"  # as long as the timeout
    code, _, err = run("bus_recv.py", "bob", "--exec", takes, "--timeout", seconds, env=env, cwd=tmp_path)
    assert code == 0, err
    assert (tmp_path / "done").read_text() == "x" * len(done)
    left = run("bus_recv.py", "bob", "--once", "--timeout", "0", "--json", env=env)[1]
    assert [json.loads(line)["msg"] for line in left.splitlines()] == list("123")[len(done) :]


PROGRAMS = [path for path in sorted((ROOT / "tools").glob("*.py")) if '__name__ == "__main__"' in path.read_text()]


@pytest.mark.parametrize("file", [path.name for path in PROGRAMS])
def test_a_clone_uses_what_lies_beside_it_though_another_version_is_installed(file, tmp_path):
    installed = tmp_path / "site-packages"
    installed.mkdir()
    for name in ("bus_recv", "bus_send", "bus_server", "bus_invite"):
        (installed / f"{name}.py").write_text(f"raise SystemExit('{name} of another version')\n")
    call = f"import runpy, sys; sys.path.append({str(installed)!r}); sys.path[:0] = [{str(ROOT / 'tools')!r}]; "
    call += f"sys.argv = [{file!r}, '--help']; runpy.run_path({str(ROOT / 'tools' / file)!r}, run_name='__main__')"
    command, how = [sys.executable, "-S", "-c", call], {"capture_output": True, "text": True, "timeout": PATIENCE}
    done = subprocess.run(command, cwd=tmp_path, **how)
    assert done.returncode == 0, done


@pytest.mark.parametrize("seconds", [2.0, 0.0])
def test_the_pause_before_the_next_try_of_a_command_ends_with_the_timeout(seconds, monkeypatch):
    """But it is no shorter than the first one: a fault of a moment is no reason to give a message up."""
    slept = []
    with Scripted(mail(message(1))) as server:
        watched = reader(server.url)
        monkeypatch.setattr(watched.clock, "sleep", slept.append)
        for one in watched.messages(True, seconds):
            bus_recv.run_command("false", 5, watched, one)
    assert len(slept) == 5 and max(slept) <= 2 and min(slept[:4]) >= 1


def test_a_listener_that_cannot_begin_ends_without_an_error_of_bash(bus, tmp_path):
    (tmp_path / "mkfifo").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "mkfifo").chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "AGENT_BUS_URL": bus.url}
    command = [str(ROOT / "bus_listener.sh"), "bob"]
    done = subprocess.run(command, env={**env, "AGENT_BUS_STATE_DIR": str(tmp_path)}, capture_output=True, text=True)
    assert "unbound" not in done.stderr and done.returncode == 1


def test_who_asks_knows_the_id_and_where_the_answer_comes_before_ctrl_c(bus):
    env = {"AGENT_BUS_URL": bus.url, "AGENT_NAME": "ann"}
    shown = on_a_terminal("bus_send.py", "bob", "well?", "--ask", until=b"mail", **env)
    assert re.search("waiting up to 300 s for the answer to [0-9a-f]{13}; it will arrive as mail", shown), shown


# ── A relay ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("mails, code", [((), 3), ((message(1, to="bob"),), 0)])
def test_a_relay_with_once_takes_what_waits_and_does_not_wait_for_more(mails, code, tmp_path):
    (tmp_path / "config" / "agent-bus").mkdir(parents=True)
    with Scripted(mail(*mails), mail()) as here, Scripted(stored(bus="b2"), bus="b2") as there:
        profile(tmp_path, "a", here)
        profile(tmp_path, "b", there)
        ways = ["--bus", "a", "--to-bus", "b", "--once"]
        env = {"XDG_CONFIG_HOME": str(tmp_path / "config")}
        assert run("tools/bus_relay.py", "bob", *ways, env=env)[0] == code
        assert [asked.query["wait"] for asked in here.polls if "wait" in asked.query] == ["0.000"]


def test_a_relay_tells_a_person_what_it_does(tmp_path):
    (tmp_path / "config" / "agent-bus").mkdir(parents=True)
    with Scripted(mail()) as here, Scripted(bus="b2") as there:
        profile(tmp_path, "a", here)
        profile(tmp_path, "b", there)
        said = f"bus_relay: passing the mail for bob, ann on from {here.url} to {there.url}\n"
        ways = ["bob,ann", "--bus", "a", "--to-bus", "b"]
        env = {"XDG_CONFIG_HOME": str(tmp_path / "config")}
        assert on_a_terminal("tools/bus_relay.py", *ways, until=there.url.encode(), **env) == said


# ── What is said ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("data", [b"a\0b", b"\x01" * 50000, "half a pair"])
def test_what_is_no_text_or_too_long_can_be_sent_as_a_file(data, bus):
    env = {"AGENT_BUS_URL": bus.url, "AGENT_NAME": "ann"}
    if isinstance(data, bytes):
        code, _, err = run("bus_send.py", "bob", stdin=data, env=env)
    else:
        with pytest.raises(bus_send.Refused) as refused:
            bus_send.send("bob", "\ud800", url=bus.url, sender="ann")
        code, err = 1, f"{refused.value}\n"
    put = f" (python3 {ROOT}/tools/bus_file.py put PATH --to bob)" if isinstance(data, bytes) else ""
    assert code == 1 and err.endswith(f": send a file{put}\n") and "string" not in err, err


@pytest.mark.parametrize("call", ["bus_send.py bob", "tools/bus_later.py bob --after 1h"])
def test_a_text_counts_for_the_limit_with_its_bytes_in_utf_8(call, bus):
    """Each é was sent as \\u00e9, so 120,000 bytes were called 360,106, and refused."""
    env = {"AGENT_BUS_URL": bus.url, "AGENT_NAME": "ann"}
    code, _, err = run(*call.split(), stdin=("é" * 60000).encode(), env=env)
    assert code == 0, err
    if "later" not in call:
        assert [each["msg"] for each in json.loads(bus.get("/recv?to=bob"))["messages"]] == ["é" * 60000]


def test_a_message_is_the_same_in_ascii_and_in_utf_8(bus):
    """An older client may have sent it first, and what is tried again is stored once."""
    message = {"from": "ann", "to": "bob", "msg": "é \u2028 \x7f \U0001f600", "key": "k", "ü": ["ß"]}
    first = json.loads(peers.ask(bus, "POST", "/send", message).body)
    again = bus_send.post(bus.url, message, PATIENCE)
    assert again["duplicate"] is True and again["id"] == first["id"]
    halves = bus_send.post(bus.url, {**message, "msg": message["msg"][:-1] + "\ud83d\ude00"}, PATIENCE)
    assert halves["duplicate"] is True, "two halves are one character, as they were"
    with Naive() as old:
        bus_send.post(old.url, message, PATIENCE)
        [kept] = old.mailboxes["default", "bob"]
        assert kept["msg"] == message["msg"], "a bus of the first contract reads UTF-8, too"


@pytest.mark.parametrize("call", ["bus_send.py bob hi", "bus_recv.py bob", "tools/bus_who.py", "tools/bus_doctor.py"])
@pytest.mark.parametrize("path", ["/ui", "/ui/", "/behind/ui/"])
def test_the_address_of_the_page_is_not_taken_for_that_of_the_bus(call, path):
    script, *arguments = call.split()
    env = {"AGENT_BUS_URL": f"http://127.0.0.1:1{path}", "AGENT_NAME": "ann"}
    _, out, err = run(script, *arguments, env=env)
    assert f"{env['AGENT_BUS_URL']!r} is not the URL of a bus: write it like http://host:8080" in out + err


def test_an_empty_sender_is_not_the_usual_one(bus):
    env = {"AGENT_BUS_URL": bus.url, "AGENT_NAME": "ann"}
    code, _, err = run("bus_send.py", "bob", "hi", "--from", "", env=env)
    assert code == 2 and "the sender is missing" in err


def test_a_link_to_the_page_of_another_bus(tmp_path):
    (tmp_path / "config" / "agent-bus").mkdir(parents=True)
    profile(tmp_path, "ops", SimpleNamespace(url="http://127.0.0.1:7"))
    for call in (["open", "--bus", "ops"], ["--bus", "ops", "open"], ["open", "--bus=ops"]):
        code, out, _ = run("tools/agent_bus.py", *call, env={"XDG_CONFIG_HOME": str(tmp_path / "config")})
        assert (code, out) == (75, "http://127.0.0.1:7/ui/\n")


def test_who_says_what_a_dash_means():
    shows = {"channel": "default", "online": False, "last_seen": None, "unread": None}
    for unread, told in ((None, True), (0, False)):
        with Scripted(answer({"agents": [{**shows, "name": "bob", "unread": unread}], "bus": "b1"})) as server:
            last = run("tools/bus_who.py", env={"AGENT_BUS_URL": server.url})[1].splitlines()[-1]
        assert last.endswith("; - means that the bus does not tell you") is told


def test_a_name_that_is_too_long_does_not_look_like_one_that_is_not(bus):
    for name, shown in (("a" * 65, "a" * 64 + "'…"), ("a b", "a b'")):
        with pytest.raises(bus_send.Refused) as refused:
            bus_send.send(name, "hi", url=bus.url, sender="ann")
        assert str(refused.value).endswith(shown)


def test_the_help_says_what_an_option_does_here():
    said = " ".join(run("tools/agent_bus.py", "ask", "-h")[1].split())
    assert "wait for the reply for S seconds (300)" in said
    assert run("tools/agent_bus.py", "backup", "-h")[1].startswith(f"usage: python3 {ROOT}/tools/agent_bus.py backup ")


def test_a_flush_tells_a_person_how_many_it_has_sent(bus, tmp_path):
    env = {"AGENT_NAME": "ann", "AGENT_BUS_URL": bus.url}
    assert on_a_terminal("tools/bus_outbox.py", "--flush", **env) == "bus_outbox: sent of the waiting messages: 0\n"


# ── join ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def joining(bus, tmp_path):
    """Begins to join, waits until the token is asked for: the process, and its folder of what was fetched."""
    home, processes = tmp_path / "machine", []
    home.mkdir()
    line = command(bus, "invite", "ann")
    pin = re.search(r" ann ([0-9a-f]{64})", line)[1]

    def begin():
        env = {"HOME": str(home), "PATH": os.environ["PATH"]}
        script = [sys.executable, str(ROOT / "tools" / "bus_join.py"), bus.url, "ann", pin]
        process = forked.Popen(script, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        processes.append(process)
        (aside,) = wait_until(lambda: [*home.glob(".local/share/agent-bus/tmp*/agent_bus.py")])
        return process, aside.parent

    yield begin
    for process in processes:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM, signal.SIGINT])
def test_a_join_that_is_ended_leaves_nothing_behind(number, joining, interruptible):
    process, aside = joining()
    process.send_signal(number)
    assert process.wait(PATIENCE) == 130 and not aside.exists()


def test_what_a_join_that_was_killed_has_left_goes_with_the_next(tmp_path):
    ours, theirs, new = tmp_path / "tmpours", tmp_path / "tmptheirs", tmp_path / "tmpnew"
    for folder, file in ((ours, "bus_recv.py"), (theirs, "diary"), (new, "bus_recv.py")):
        folder.mkdir()
        (folder / file).touch()
    for folder in (ours, theirs):
        os.utime(folder, (0, 0))
    bus_join.remove_leftovers(str(tmp_path))
    assert sorted(tmp_path.iterdir()) == [new, theirs]


def test_a_profile_that_is_none_is_refused_with_the_reason(monkeypatch, capsys):
    there = {"default": {"AGENT_BUS_URL": "http://other:1", "AGENT_NAME": "bob"}}
    monkeypatch.setattr(bus_join, "configured", lambda place, profile: there.get(profile, {}))
    typed = io.StringIO("a b/c\nlab\n")
    typed.isatty = lambda: True
    monkeypatch.setattr(sys, "stdin", typed)
    assert bus_join.choose("", "http://here:1", "ann", "default") == "lab"
    assert "'a b/c' is no profile: that is 1 to 64 of A-Z" in capsys.readouterr().out


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
@pytest.mark.parametrize("call", [
    "bus_send.py bob hello", "tools/agent_bus.py send bob hello", "tools/bus_later.py bob hello --after 1h",
])  # fmt: skip
def test_what_is_stored_is_no_error_where_nobody_can_be_told(call, stream, bus, home):
    """A caller that repeats what has failed would send it twice."""
    script, *arguments = call.split()
    env = {**os.environ, "AGENT_BUS_URL": bus.url, "AGENT_NAME": "ann"}
    with open("/dev/full", "wb") as full:
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, stream: full}
        line = [sys.executable, str(ROOT / script), *arguments]
        done = forked.run(line, **streams, env=env, text=True, timeout=PATIENCE)
    assert done.returncode == 0 and "Traceback" not in str(done.stderr)


@pytest.mark.parametrize("call", [
    "bus_recv.py bob --once", "tools/agent_bus.py who", "tools/agent_bus.py log --no-follow",
    "tools/agent_bus.py inbox bob", "tools/bus_search.py hello", "tools/agent_bus.py help",
    "tools/agent_bus.py completion zsh", "tools/agent_bus.py version", "tools/agent_bus.py open",
])  # fmt: skip
def test_output_that_cannot_be_written_is_called_that(call, bus, home):
    """Not only `No space left on device`, which sounds like the disk of the bus."""
    bus_send.send("bob", "hello", url=bus.url, sender="ann")
    script, *arguments = call.split()
    env = {**os.environ, "AGENT_BUS_URL": bus.url, "AGENT_NAME": "ann"}
    with open("/dev/full", "wb") as full:
        line = [sys.executable, str(ROOT / script), *arguments]
        done = forked.run(line, stdout=full, stderr=subprocess.PIPE, env=env, text=True, timeout=PATIENCE)
    assert done.returncode != 0 and done.stderr.endswith("cannot write the output: No space left on device\n")
    assert "Errno" not in done.stderr and "Traceback" not in done.stderr
