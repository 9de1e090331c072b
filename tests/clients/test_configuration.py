"""The configuration file: read alike by all programs, below the environment, and never used for another bus."""
import json
import os
import re
import shutil
import socket
import subprocess

import pytest

import bus_recv
import bus_send
from tests.clients.test_clients import run
from tests.kit.bad_servers import NOON, Scripted, answer, mail, message, stored
from tests.kit.processes import PATIENCE, ROOT, wait_until

pytestmark = pytest.mark.usefixtures("home")

TOKEN = "abt_00000000_" + "s" * 43
FILE = answer({"error": "there is no such file", "now": NOON, "bus": "b1"}, status=404)
LISTENER = pytest.mark.skipif(not (shutil.which("curl") and shutil.which("jq")), reason="bus_listener.sh needs them")


def found(*messages):
    return answer({"messages": list(messages), "next": None, "now": NOON, "bus": "b1"})


PROGRAMS = {
    "send": (["bus_send.py", "dell"], stored()),
    "recv": (["bus_recv.py", "dell", "--once"], mail(message(1))),
    "log": (["tools/bus_log.py", "--no-follow"], mail(message(1))),
    "search": (["tools/bus_search.py", "hi"], found(message(1))),
    "redact": (["tools/bus_redact.py", "660ba678a1b40"], answer({"ok": True, "redacted": [], "fetched_by": []})),
    "work": (["tools/bus_work.py", "q", "--exec", "true", "--once", "--timeout", "0"], mail()),
    "file": (["tools/bus_file.py", "get", "0" * 64, "-o", "x"], FILE),
    "outbox": (["tools/bus_outbox.py", "dell"], stored()),
    "doctor": (["tools/bus_doctor.py", "--hold", "0"], answer({"error": "a token is needed"}, status=401)),
    "hook": (["integrations/claude_code/bus_hook.py", "--format", "claude"], mail(message(1))),
}
EVENT = json.dumps({"hook_event_name": "UserPromptSubmit", "session_id": "s1"}).encode()


def whole(server, **more):
    given = {"AGENT_BUS_URL": server.url, "AGENT_NAME": "spark", "AGENT_BUS_TOKEN": TOKEN, **more}
    return "".join(f"{variable}={value}\n" for variable, value in given.items())


def tokens(server):
    return {asked.headers.get("authorization") for asked in server.asked}


def call(program, tmp_path, **env):
    stdin = EVENT if program == "hook" else b"hi"
    return run(*PROGRAMS[program][0], stdin=stdin, cwd=tmp_path, env=env)


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_program_takes_the_bus_and_the_token_from_the_file(program, configure, tmp_path):
    with Scripted(PROGRAMS[program][1]) as server:
        path = configure(whole(server))
        _, out, err = call(program, tmp_path)
        assert f"Bearer {TOKEN}" in tokens(server) and TOKEN not in out + err
        assert program != "doctor" or f"from {path}" in out


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_token_in_the_file_reaches_no_other_bus(program, configure, tmp_path):
    """Case 59: the file has the URL A and a token, the environment has the URL B."""
    with Scripted(PROGRAMS[program][1]) as ours, Scripted(PROGRAMS[program][1]) as other:
        configure(whole(ours, AGENT_BUS_CHANNEL="ops"))
        _, out, _ = call(program, tmp_path, AGENT_BUS_URL=other.url, AGENT_NAME="gb10")
        assert other.asked and not ours.asked and tokens(other) == {None}
        assert not any(b"spark" in asked.body or b"ops" in asked.body or "ops" in asked.target for asked in other.asked)
        said = f"from AGENT_BUS_URL .*; nothing is taken from .*default.env, which is for {ours.url}"
        assert program != "doctor" or re.search(said, out)


def test_nor_does_it_from_a_library_that_has_used_the_file_before(configure):
    with Scripted(stored()) as ours, Scripted(stored()) as other:
        configure(whole(ours))
        bus_send.send("dell", "hi")
        with pytest.raises(ValueError, match="sender is missing"):
            bus_send.send("dell", "hi", url=other.url)
        bus_send.send("dell", "hi", url=other.url, sender="gb10")
        bus_send.send("dell", "hi", url=f"{ours.url}/")
        assert tokens(ours) == {f"Bearer {TOKEN}"} and tokens(other) == {None} and len(ours.asked) == 2


def test_the_certificate_in_the_file_is_for_its_bus_alone(configure, tmp_path):
    configure(f"AGENT_BUS_URL=https://bus.example\nAGENT_BUS_CA={tmp_path}/none\n")
    with pytest.raises(ValueError, match="AGENT_BUS_CA"):
        bus_send.connect("https://bus.example/", 1)
    bus_send.connect("https://other.example", 1)


def test_the_environment_is_above_the_file(configure, tmp_path, monkeypatch):
    with Scripted(stored()) as server:
        configure(whole(server, AGENT_BUS_CHANNEL="ops"))
        monkeypatch.setenv("AGENT_BUS_URL", f"{server.url}/")
        bus_send.send("dell", "one")
        monkeypatch.setenv("AGENT_NAME", "gb10")
        monkeypatch.setenv("AGENT_BUS_CHANNEL", "")  # as good as none
        (tmp_path / "token").write_text("abt_other")
        (tmp_path / "token").chmod(0o600)
        monkeypatch.setenv("AGENT_BUS_TOKEN_FILE", str(tmp_path / "token"))
        bus_send.send("dell", "two")
        one, two = server.asked
    assert one.json["from"] == "spark" and one.json["channel"] == "ops"
    assert one.headers["authorization"] == f"Bearer {TOKEN}"
    assert two.json["from"] == "gb10" and two.json["channel"] == "ops"
    assert two.headers["authorization"] == "Bearer abt_other"


@pytest.mark.parametrize("client", [bus_send, bus_recv])
def test_a_file_without_a_url_is_for_the_usual_one(client, configure, monkeypatch):
    configure(f"AGENT_BUS_TOKEN={TOKEN}\n")
    assert client.credentials(client.DEFAULT_URL) == {"Authorization": f"Bearer {TOKEN}"}
    assert client.credentials("https://bus.example") == {}


@pytest.mark.parametrize("client", [bus_send, bus_recv])
def test_lines_are_read_as_systemd_and_docker_read_them(client, configure, monkeypatch, tmp_path):
    lines = ["\ufeff# the bus of the house", "", "  ", "\t; of systemd", "AGENT_BUS_URL=https://bus.example/a=b#c\r",
             "AGENT_NAME=first", "AGENT_NAME=spark", "AGENT_BUS_CHANNEL=", "OTHER=1", "AGENT_BUS_UA=it's $HOME",
             f"AGENT_BUS_TOKEN=$(touch {tmp_path}/ran)"]  # fmt: skip
    configure("\n".join(lines))
    assert client.settings() == {
        "AGENT_BUS_URL": "https://bus.example/a=b#c", "AGENT_NAME": "spark", "OTHER": "1",
        "AGENT_BUS_UA": "it's $HOME", "AGENT_BUS_TOKEN": f"$(touch {tmp_path}/ran)",
        "AGENT_BUS_STATE_DIR": os.environ["AGENT_BUS_STATE_DIR"],
    }  # fmt: skip
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("line", [
    'AGENT_BUS_TOKEN="quoted"', "AGENT_BUS_TOKEN='quoted'", "export AGENT_BUS_TOKEN=x", "AGENT_BUS_TOKEN", "a b=c",
    "AGENT_BUS_TOKEN = x", "AGENT_BUS_TOKEN=x\\", "AGENT_BUS_TOKEN= x", "1=x", "=x",
])  # fmt: skip
def test_a_line_that_they_read_differently_is_refused_in_words_and_not_shown(line, configure):
    path = configure(f"AGENT_NAME=spark\n{line}\n")
    said = f"line 2 of {path}: write KEY=VALUE, without quotes, \\ or export\n"
    assert run("bus_send.py", "dell", stdin=b"hi") == (2, "", f"bus_send: {said}")
    assert run("bus_recv.py", "dell") == (2, "", f"bus_recv: {said}")


@pytest.mark.skipif(os.name != "posix", reason="file modes")
@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o620])
def test_a_file_that_others_may_read_or_write_is_refused(mode, configure):
    with Scripted(stored()) as server:
        path = configure(whole(server), mode=mode)
        code, out, err = run("bus_send.py", "dell", stdin=b"hi")
        assert (code, out, server.asked) == (2, "", []) and err.count("\n") == 1 and f"chmod 600 {path}" in err
        code, out, _ = run("tools/bus_doctor.py")
        assert code == 1 and "FAIL  url" in out and f"chmod 600 {path}" in out


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can make a file of another user")
def test_a_file_of_another_user_is_refused(configure):
    path = configure("AGENT_NAME=spark\n")
    os.chown(path, 4711, -1)
    code, _, err = run("bus_send.py", "dell", stdin=b"hi")
    assert code == 2 and "must be yours" in err


@pytest.mark.parametrize("program", ["bus_send.py", "bus_recv.py", "tools/bus_who.py", "tools/bus_doctor.py"])
def test_a_file_that_may_be_there_is_not_passed_over(program, tmp_path):
    """Only that there is none leads to the usual bus; not a folder that cannot be entered, as this link to itself."""
    folder = tmp_path / "config" / "agent-bus"
    folder.parent.mkdir()
    folder.symlink_to(folder)
    words = ["dell"] if program.startswith("bus_") else []
    code, out, err = run(program, *words, env={"XDG_CONFIG_HOME": folder.parent})
    assert code == (1 if "doctor" in program else 2)  # what the doctor finds is its result
    assert f"{folder / 'default.env'} cannot be read: Too many levels of symbolic links" in f"{out}{err}"


@pytest.mark.parametrize("client", [bus_send, bus_recv])
def test_a_folder_that_may_not_be_entered_is_said_with_what_to_do(client, monkeypatch):
    def refused(path, **_):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr("builtins.open", refused)
    said = "/shut/default.env cannot be read: Permission denied; it must be yours, in folders that you may enter"
    with pytest.raises(ValueError, match=said):
        client.private("/shut/default.env", must=False)


@pytest.mark.parametrize("program, profile", [
    ("bus_send.py", "default"), ("bus_recv.py", "work"), ("tools/bus_who.py", "default"),
])  # fmt: skip
def test_a_token_that_the_bus_refuses_is_named_by_its_file(program, profile, configure, tmp_path):
    with Scripted(answer({"error": "the bus does not know this token"}, status=401)) as server:
        path = configure(whole(server), profile)
        words = ["dell"] if program.startswith("bus_") else []
        code, _, err = run(program, *words, "--bus", profile, stdin=b"hi")
        assert code == 1 and err.endswith(f": the bus does not know this token; the token is that of {path}\n"), err
        assert "token is that of" not in run(program, *words, stdin=b"hi", env={
            "AGENT_BUS_PROFILE": profile, "AGENT_BUS_TOKEN": "abt_00000000_other"})[2]  # fmt: skip
        configure(f"AGENT_BUS_URL={server.url}\nAGENT_NAME=spark\n", profile)
        assert "token is that of" not in run(program, *words, "--bus", profile, stdin=b"hi")[2]


@LISTENER
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody who may not enter a folder")
def test_the_listener_does_not_pass_over_a_folder_that_it_may_not_enter(tmp_path):
    folder = tmp_path / "agent-bus"
    folder.mkdir(mode=0o700)
    for above in tmp_path.parents[:3]:
        above.chmod(0o711)
    tmp_path.chmod(0o711)
    shutil.copy(ROOT / "bus_listener.sh", tmp_path)
    env = {"PATH": os.environ["PATH"], "AGENT_NAME": "dell", "XDG_CONFIG_HOME": str(tmp_path), "HOME": str(tmp_path)}
    listener = ["bash", "bus_listener.sh"]
    done = subprocess.run(listener, cwd=tmp_path, env=env, user=65534, capture_output=True, text=True, timeout=PATIENCE)
    assert (done.returncode, done.stderr) == (2, f"bus_listener: {folder / 'default.env'} cannot be read\n")


def test_a_profile_is_chosen_by_the_environment_or_on_the_command_line(configure, tmp_path):
    with Scripted(stored()) as default, Scripted(stored()) as work:
        configure(whole(default))
        configure(whole(work), "work")
        assert run("bus_send.py", "dell", stdin=b"hi", env={"AGENT_BUS_PROFILE": "work"})[0] == 0
        assert run("bus_send.py", "dell", "--bus", "work", stdin=b"hi")[0] == 0
        assert run("tools/bus_outbox.py", "dell", "--bus=work", stdin=b"hi", env={"AGENT_BUS_PROFILE": "none"})[0] == 0
        assert len(work.asked) == 3 and tokens(work) == {f"Bearer {TOKEN}"} and not default.asked
    code, _, err = run("bus_send.py", "dell", "--bus", "nowhere", stdin=b"hi")
    assert code == 2 and err.endswith("nowhere.env cannot be read: No such file or directory\n")


@pytest.mark.parametrize("program", ["bus_send.py", "bus_recv.py"])
@pytest.mark.parametrize("variable", ["AGENT_BUS_URL", "AGENT_BUS_TOKEN", "AGENT_BUS_TOKEN_FILE", "AGENT_BUS_CA"])
def test_the_bus_of_a_profile_gets_nothing_of_another_bus(variable, program, configure):
    with Scripted(stored()) as work:
        configure(whole(work), "work")
        code, _, err = run(program, "dell", "--bus", "work", stdin=b"hi", env={variable: "other"})
        assert code == 2 and err.endswith(f"unset {variable}\n") and not work.asked


@pytest.mark.parametrize("program", [one for one in PROGRAMS if one != "hook"])
def test_every_program_takes_a_profile(program, configure, tmp_path):
    with Scripted(PROGRAMS[program][1]) as server:
        configure(whole(server), "work")
        command, _ = PROGRAMS[program]
        run(*command, "--bus", "work", stdin=b"hi", cwd=tmp_path)
        assert f"Bearer {TOKEN}" in tokens(server)


def test_what_a_reader_runs_has_the_same_bus(configure):
    with Scripted(mail(message(1))) as server:
        configure(whole(server), "work")
        code, out, _ = run("bus_recv.py", "dell", "--once", "--bus", "work", "--exec", "echo $AGENT_BUS_PROFILE")
        assert (code, out) == (0, "work\n")


# ── bus_listener.sh ──────────────────────────────────────────────────────────────────────────────────────────────────


def listen(tmp_path, **env):
    """A listener in bash, and where it writes."""
    log = tmp_path / "home" / "listener"
    ours = {"AGENT_BUS_STATE_DIR": str(tmp_path / "home"), "BLOCK": "1", **env}
    return subprocess.Popen([ROOT / "bus_listener.sh"], env={**os.environ, **ours}, stderr=subprocess.PIPE,
                            stdout=subprocess.DEVNULL), log  # fmt: skip


def ended(listener):
    listener.terminate()
    return listener.communicate(timeout=PATIENCE)[1].decode()


@LISTENER
def test_the_listener_reads_the_same_file(configure, tmp_path):
    with Scripted(mail(message(1))) as server:
        text = whole(server, AGENT_NAME="x", AGENT_BUS_CHANNEL="ops", AGENT_BUS_UA="x/1").replace("\n", "\r\n")
        configure(f"\ufeff# ours\r\n\n{text}AGENT_NAME=spark", "work")
        listener, log = listen(tmp_path, AGENT_BUS_PROFILE="work", AGENT_BUS_CHANNEL="lab", AGENT_BUS_UA="")
        wait_until(lambda: (log / "spark%2Flab.jsonl").exists() and (log / "spark%2Flab.jsonl").read_text())
        ended(listener)
        assert tokens(server) == {f"Bearer {TOKEN}"} and server.polls[0].headers["user-agent"] == "x/1"


@LISTENER
def test_the_listener_gives_its_token_to_no_other_bus(configure, tmp_path):
    with Scripted(mail(message(1))) as ours, Scripted(mail(message(1))) as other:
        configure(whole(ours))
        listener, _ = listen(tmp_path, AGENT_BUS_URL=other.url, AGENT_NAME="gb10")
        wait_until(lambda: len(other.polls) > 1)
        ended(listener)
        assert not ours.asked and tokens(other) == {None} and {poll.query["to"][0] for poll in other.polls} == {"gb10"}


@LISTENER
@pytest.mark.parametrize("text, mode, words", [
    ("AGENT_NAME=spark\n", 0o644, "chmod 600"), ("AGENT_NAME=a\nAGENT_BUS_TOKEN='x'", 0o600, "line 2 of"),
    ("export AGENT_NAME=spark\n", 0o600, "line 1 of"), ("AGENT_BUS_TOKEN=a\\\n", 0o600, "without quotes"),
])  # fmt: skip
def test_the_listener_refuses_the_same_files(text, mode, words, configure, tmp_path):
    configure(text, mode=mode)
    listener, _ = listen(tmp_path)
    assert words in listener.communicate(timeout=PATIENCE)[1].decode() and listener.returncode == 2


# ── Unix sockets ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_program_speaks_over_a_unix_socket(program, home, tmp_path):
    with Scripted(PROGRAMS[program][1], path=tmp_path / "bus@home.sock") as server:
        env = {"AGENT_BUS_URL": server.url, "AGENT_NAME": "spark", "AGENT_BUS_TOKEN": TOKEN}
        _, out, err = call(program, tmp_path, http_proxy="http://127.0.0.1:9", **env)
        assert f"Bearer {TOKEN}" in tokens(server), out + err
        assert {asked.headers["host"] for asked in server.asked} == {"localhost"}
        assert program != "doctor" or "FAIL" not in re.sub("FAIL  token.*", "", out)


@LISTENER
def test_the_listener_speaks_over_a_unix_socket(home, tmp_path):
    with Scripted(mail(message(1)), path=tmp_path / "s") as server:
        listener, log = listen(tmp_path, AGENT_BUS_URL=server.url, AGENT_NAME="spark", AGENT_BUS_TOKEN=TOKEN)
        wait_until(lambda: (log / "spark.jsonl").exists() and (log / "spark.jsonl").read_text())
        ended(listener)
        assert tokens(server) == {f"Bearer {TOKEN}"}


def test_the_doctor_says_what_is_wrong_with_a_unix_socket(home, tmp_path):
    env = {"AGENT_BUS_URL": f"unix:{tmp_path}/none", "AGENT_NAME": "spark"}
    code, out, _ = run("tools/bus_doctor.py", env=env)
    assert code == 1 and f"FAIL  tcp    there is no {tmp_path}/none" in out and "--listen unix:" in out
    with socket.socket(socket.AF_UNIX) as nobody:
        nobody.bind(str(tmp_path / "none"))  # and nobody listens there
        code, out, _ = run("tools/bus_doctor.py", env=env)
        assert code == 1 and "FAIL  tcp" in out and "refuses" in out
