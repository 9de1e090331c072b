"""bus_listener.sh as a process: one at a time, its files, its end, its settings, and the tools that it needs."""
import json
import os
import pathlib
import re
import shutil
import stat
import subprocess
import threading
import time

import pytest

from tests.kit import listening
from tests.kit.listening import NO_MAIL, SCRIPT, TICK, answer, mail, message, path_with, send
from tests.kit.processes import PATIENCE, free_port, in_time, wait_until
from tests.kit.queues import parked

listen, scripted = listening.listen, listening.scripted  # fixtures


def test_a_second_listener_is_refused_while_the_first_lives_and_a_pid_in_a_file_refuses_nobody(scripted, listen):
    server = scripted(NO_MAIL)
    first = listen(server.url).start()
    wait_until(lambda: first.file("heartbeat").exists())
    assert int(first.file("pid").read_text()) == first.process.pid
    second = listen(server.url).start()
    assert second.process.wait(PATIENCE) == 2
    assert ["another listener" in line for line in second.said()] == [True]
    assert int(first.file("pid").read_text()) == first.process.pid
    first.kill()
    first.file("pid").write_text(f"{os.getpid()}\n")  # the pid of a dead listener is someone else's now
    third = listen(server.url).start()
    wait_until(lambda: first.file("pid").read_text() == f"{third.process.pid}\n")
    assert third.process.poll() is None


def test_a_curl_that_a_kill_left_behind_holds_no_lock_and_spoils_no_answer(scripted, listen):
    late, left = threading.Event(), threading.Event()

    def orphaned(request):
        late.wait(PATIENCE)
        request.wfile.write(mail(message(TICK, msg="x" * 5000)))
        request.rfile.read(1)
        left.set()

    def meanwhile(request):
        late.set()
        left.wait(PATIENCE)
        request.wfile.write(NO_MAIL)

    server = scripted(orphaned, meanwhile, NO_MAIL)
    listener = listen(server.url).start()
    server.polled(1)
    listener.kill(group=False)
    listener.start()
    server.polled(4)
    assert listener.said() == []


@pytest.mark.parametrize("suffix", ["log", "jsonl", "pid", "heartbeat"])
def test_a_symbolic_link_is_not_followed(listen, tmp_path, suffix):
    listener = listen("http://127.0.0.1:1")
    listener.file(suffix).parent.mkdir()
    listener.file(suffix).symlink_to(tmp_path / "target")
    assert listener.start().process.wait(PATIENCE) == 2
    assert not (tmp_path / "target").exists()
    assert ["symbolic link" in line for line in listener.said()] == [True]


def test_files_and_directory_are_for_their_user_only(scripted, listen):
    server = scripted(mail(message(TICK)), NO_MAIL)
    listener = listen(server.url)
    directory = listener.file("log").parent
    directory.mkdir(mode=0o755)
    listener.start()
    wait_until(lambda: listener.file("heartbeat").exists())
    modes = {stat.S_IMODE(path.stat().st_mode) for path in directory.iterdir()}
    assert (stat.S_IMODE(directory.stat().st_mode), modes) == (0o700, {0o600})


@pytest.mark.parametrize("env", [{"BLOCK": "1"}, {"INTERVAL": "60"}, {}], ids=["parked", "resting", "backing off"])
def test_SIGTERM_ends_it_at_once_and_takes_its_curl_along(scripted, listen, env):
    gone = threading.Event()

    def park(request):
        if request.rfile.read(1) == b"":
            gone.set()

    server = scripted(park if "BLOCK" in env else NO_MAIL if env else b"")
    listener = listen(server.url, **env).start()
    server.polled(1)
    wait_until(lambda: env == {"BLOCK": "1"} or listener.file("heartbeat").exists() or listener.said())
    began = time.monotonic()
    assert listener.stop() == 0
    assert time.monotonic() - began < in_time(1)
    assert not listener.file("pid").exists() and not listener.file("jsonl.answer").exists()
    assert "BLOCK" not in env or gone.wait(PATIENCE)


# A curl that takes a while to end, as on a busy machine. It has its poll until then.
SLOW_CURL = """#!/bin/bash
trap 'sleep 0.3; kill $!; exit 143' TERM
{curl} "$@" & wait $!
"""


def test_its_last_request_says_that_it_leaves_and_what_it_has_written(bus, listen, tmp_path):
    curl = tmp_path / "bin" / "curl"
    curl.parent.mkdir()
    curl.write_text(SLOW_CURL.format(curl=shutil.which("curl")))
    curl.chmod(0o755)
    listener = listen(bus.url, BLOCK="1", PATH=f"{curl.parent}:{os.environ['PATH']}").start()
    send(bus.url, "one")
    wait_until(listener.file("heartbeat").exists)
    listener.has_logged("one")
    wait_until(lambda: parked(bus))
    assert listener.stop() == 0
    [spark] = [agent for agent in json.loads(bus.get("/agents"))["agents"] if agent["name"] == "spark"]
    assert (spark["online"], spark["unread"]) == (False, 0)


def test_to_a_server_of_the_old_contract_it_says_nothing_at_its_end(scripted, listen):
    server = scripted(answer({"messages": [], "now": 1.5}))
    listener = listen(server.url, INTERVAL="60").start()
    wait_until(listener.file("heartbeat").exists)
    assert listener.stop() == 0 and len(server.polls) == 1


def test_a_bus_on_loopback_is_polled_without_the_proxy_and_with_the_chosen_agent(scripted, listen):
    server = scripted(NO_MAIL)
    proxy = f"http://127.0.0.1:{free_port()}"
    listen(server.url + "/", http_proxy=proxy, all_proxy=proxy, no_proxy="example.org").start()
    assert server.polled(1)[0]["agent"] == "Mozilla/5.0"
    listen(server.url, home="other", AGENT_BUS_UA="listener of dell", BLOCK="1").start()
    wait_until(lambda: [poll["agent"] for poll in server.polls].count("listener of dell") > 1)
    first, second = [poll for poll in server.polls if poll["agent"] == "listener of dell"][:2]
    assert (first["block"], first["max"], first["since"]) == ("false", "50", "last"), "it says that it is connected"
    assert (second["block"], second["wait"], second["max"]) == ("true", "25", "50")


WRONG = {
    "no name": {"AGENT_NAME": ""},
    "a name with a newline": {"AGENT_NAME": "spark\n"},
    "a name that climbs": {"AGENT_NAME": "../spark"},
    "a long name": {"AGENT_NAME": "s" * 65},
    "a channel that is no name": {"AGENT_BUS_CHANNEL": "a b"},
    "another scheme": {"AGENT_BUS_URL": "file:///etc/passwd"},
    "an interval in words": {"INTERVAL": "soon"},
    "a directory that is a file": {"AGENT_BUS_STATE_DIR": "/dev/null"},
    "a LOG in no directory": {"LOG": "/nonexistent/spark.log"},
}


@pytest.mark.parametrize("env", WRONG.values(), ids=WRONG)
def test_a_wrong_configuration_is_one_sentence_and_exit_2(listen, env):
    listener = listen("http://127.0.0.1:1", **env).start()
    assert listener.process.wait(PATIENCE) == 2
    assert len(listener.said()) == 1 and listener.said()[0].startswith("bus_listener: ")


@pytest.mark.parametrize("arguments", [["spark", "x"], ["--url", "http://127.0.0.1:1"], [""], ["-x"]])
def test_what_is_not_one_name_is_refused_in_words(arguments, tmp_path):
    env = {"PATH": os.environ["PATH"], "AGENT_NAME": "spark", "HOME": str(tmp_path)}
    done = subprocess.run([SCRIPT, *arguments], env=env, capture_output=True, text=True, timeout=PATIENCE)
    said = "is not understood: it takes one NAME and no options, only variables; see --help\n"
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.endswith(said)
    assert done.stderr.count("\n") == 1 and "\x1b" not in done.stderr and not list(tmp_path.iterdir())


def test_it_takes_the_name_as_every_other_program_does(bus, tmp_path):
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "AGENT_BUS_URL": bus.url, "AGENT_NAME": "other"}
    with subprocess.Popen([SCRIPT, "lis"], env=env, stdout=subprocess.PIPE, text=True) as process:
        line = process.stdout.readline()
        process.terminate()
    folder = tmp_path / ".local/state/agent-bus/listener"
    assert line == f"writing the mail of lis to {folder}/lis.log and {folder}/lis.jsonl\n"


@pytest.mark.parametrize("option", ["-h", "--help"])
def test_its_help_names_its_variables(option, tmp_path):
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    done = subprocess.run([SCRIPT, option], env=env, capture_output=True, text=True, timeout=PATIENCE)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("usage: AGENT_BUS_URL=")
    text = pathlib.Path(SCRIPT).read_text()
    variables = set(re.findall(r"\$\{([A-Z_]+):-", text)) - {"HOME", "XDG_CONFIG_HOME", "XDG_STATE_HOME", "NO_PROXY"}
    assert [name for name in variables if not re.search(rf"\b{name}\b", done.stdout)] == []


def test_without_a_place_for_its_files_it_says_what_to_set(listen):
    listener = listen("http://127.0.0.1:1", AGENT_BUS_STATE_DIR="/dev/null").start()
    assert listener.process.wait(PATIENCE) == 2
    assert listener.said() == ["bus_listener: cannot write to /dev/null/listener: set AGENT_BUS_STATE_DIR"]


def test_without_flock_as_on_macOS_perl_takes_the_lock(scripted, listen, tmp_path):
    if not shutil.which("perl"):
        pytest.skip("perl is not installed")
    tools = "env bash cat curl jq perl chmod dd grep mkdir mkfifo rm sleep tail touch wc"
    server, path = scripted(NO_MAIL), path_with(tmp_path, tools)
    first = listen(server.url, PATH=path).start()
    wait_until(lambda: first.file("heartbeat").exists())
    second = listen(server.url, PATH=path).start()
    assert second.process.wait(PATIENCE) == 2
    first.kill()
    third = listen(server.url, PATH=path).start()
    wait_until(lambda: first.file("pid").read_text() == f"{third.process.pid}\n")
    assert ["another listener" in line for line in first.said()] == [True]


@pytest.mark.parametrize("missing", ["curl", "jq"])
def test_a_missing_tool_is_named(listen, tmp_path, missing):
    path = path_with(tmp_path, {"curl": "env bash jq", "jq": "env bash curl"}[missing])
    listener = listen("http://127.0.0.1:1", PATH=path).start()
    assert listener.process.wait(PATIENCE) == 2
    assert listener.said() == [f"bus_listener: {missing} is not installed"]
