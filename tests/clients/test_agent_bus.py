"""tools/agent_bus.py, the one command: its help, its typos, its end, and what it runs."""

import contextlib
import os
import pty
import re
import select
import signal
import subprocess
import sys
import urllib.request

import pytest

import bus_send
from tests.clients.test_clients import program, refusing, run
from tests.kit import forked
from tests.kit.bad_servers import Scripted, page
from tests.kit.processes import PATIENCE, ROOT
from tools import agent_bus, bus_join

pytestmark = pytest.mark.usefixtures("home")

SCRIPT = "tools/agent_bus.py"
HOSTILE = "\x1b[31mred\x1b]0;title\x07 \x9b1m\u202eevil\u200b\r over"
RAW = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e\u200b]")
COLOUR = re.compile("\x1b\\[3[1-6]m|\x1b\\[0m")


@pytest.fixture
def umask():
    """What the bus changes for its own process, and here for that of the tests."""
    before = os.umask(0o022)
    yield
    os.umask(before)


def mails(url, *texts, to="bob", sender="spark", **fields):
    return [bus_send.send(to, text, url=url, sender=sender, **fields)["id"] for text in texts]


def on_terminal(*arguments, columns=80, **env):
    """What a command prints on a terminal of that width."""
    master, slave = pty.openpty()
    env = {"COLUMNS": str(columns), "LINES": "24", "TERM": "xterm", **env}
    process = program(SCRIPT, *arguments, stdout=slave, stderr=subprocess.PIPE, env=env)
    os.close(slave)
    shown = bytearray()
    while select.select([master], [], [], PATIENCE)[0]:
        try:
            shown += os.read(master, 65536)
        except OSError:  # the other side is closed
            break
    os.close(master)
    assert process.wait(PATIENCE) == 0, process.stderr.read()
    return shown.decode().replace("\r\n", "\n")


@pytest.mark.parametrize("name", [name for name, command in agent_bus.COMMANDS.items() if command.program])
def test_every_command_reaches_its_program(name, capsys, monkeypatch, umask):
    monkeypatch.setattr(sys, "argv", ["agent-bus"])
    try:
        code = agent_bus.main([name, "--help"])
    except SystemExit as end:
        code = end.code
    assert code == 0 and capsys.readouterr().out.startswith(f"usage: agent-bus {name} [-h]")


@pytest.mark.parametrize("arguments", [[], ["help"], ["--help"], ["-h"]])
def test_the_help_names_every_command_and_fits_a_terminal(arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["/usr/local/bin/agent-bus"])
    assert agent_bus.main(arguments) == 0
    out = capsys.readouterr().out
    for name, row in agent_bus.COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(row.purpose)} +{re.escape(row.example)}$", out, re.MULTILINE)
    for other in ("agent-bus-wake", "agent-bus-hook", "agent-bus-mcp", "bus_listener.sh"):
        assert re.search(rf"^  {other} +\w", out, re.MULTILINE), other
    assert {"AGENT_BUS_URL", "AGENT_NAME", "AGENT_BUS_TOKEN"} <= set(re.findall(r"^  (\w+)", out, re.MULTILINE))
    assert max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize("name", agent_bus.COMMANDS)
def test_the_help_of_each_command_says_what_it_is_for_and_fits_a_terminal(name, monkeypatch, capsys, umask):
    monkeypatch.setattr(sys, "argv", ["/usr/local/bin/agent-bus"])
    monkeypatch.setenv("COLUMNS", "80")
    with contextlib.suppress(SystemExit):
        agent_bus.main(["help", name])
    lines = capsys.readouterr().out.splitlines()
    purpose = lines[lines.index("") + 1]
    assert purpose[0].isalpha() and not purpose.endswith(":") and max(map(len, lines)) <= 80, lines


def test_the_help_names_commands_that_this_user_has(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tools/agent_bus.py"])
    assert agent_bus.main(["help", "open"]) == 0
    assert "    python3 tools/agent_bus.py invite YOURNAME" in capsys.readouterr().out


@pytest.mark.parametrize("arguments, says", [
    ("send bob hi --frm x", "send: did you mean --from?"), ("send bob hi --frmo --to x", "send: did you mean --from?"),
    ("serve --portt=9", "--portt=9: did you mean --port"), ("tokens --dbb x", "--dbb: did you mean --db?"),
    ("recv bob --onec", "recv: did you mean --once?"), ("file put x --chanel c --to b", "did you mean --channel?"),
    ("send bob hi --zzzzz x", "unrecognized"), ("send bob --zzzzz 9 -- --frm", "unrecognized"),
    ("later bob hi --after x", "is not a time"),
    ("send bob -v", "send: a text that begins with - stands behind --"),
    ("ask bob -v", "ask: a text that begins with - stands behind --"),
    ("serve --port x", "give a whole number from 0 to 65535, not 'x'"), ("recv --frm", "--frm"),
    ("file", "file: error: say what to do: put PATH --to NAME, or get SHA256"),
    ("send bob hi --field from=x", "'from=x' as a --field: give it as the argument or the option"),
    ("log --last=-3", "--last: give a whole number of 1 or more, not '-3'"), ("install", "required"),
    ("lock a --no", "--no"), ("locks a b", "b"), ("inbox a b", "b"), ("ack a b c", "c"), ("install claude x", "x"),
    ("install service --http", "are for an agent program"),
])  # fmt: skip
def test_a_wrong_option_is_said_in_the_last_of_few_lines(arguments, says):
    code, out, err = run(SCRIPT, *arguments.split())
    assert (code, out) == (2, "") and err.count("\n") <= 4 and says in err.splitlines()[-1]
    assert "{look" not in err and "{lock" not in err and "{install" not in err


def test_the_help_of_a_command_is_that_of_its_program():
    assert run(SCRIPT, "help", "log") == run(SCRIPT, "log", "--help")
    assert run(SCRIPT, "help", "completion")[1].split("\n")[0].endswith("agent_bus.py completion {bash,zsh,fish}")
    assert run(SCRIPT, "help", "version")[1].split("\n")[0].endswith("agent_bus.py version")
    assert 'eval "$(agent-bus completion bash)"' in run(SCRIPT, "help", "completion")[1]


@pytest.mark.parametrize("line", ["tokens --db /nowhere/bus.db", "join http://127.0.0.1:1 ann", "open", "completion x"])
@pytest.mark.parametrize("url", ["what", "http://127.0.0.1:1", "unix:/nowhere"])
def test_an_error_begins_with_what_the_user_has_typed(line, url):
    assert run(SCRIPT, *line.split(), env={"AGENT_BUS_URL": url})[2].startswith(f"agent_bus.py {line.split()[0]}: ")
    assert run(SCRIPT, "opne")[2].startswith("agent_bus.py: there is no command 'opne'")


@pytest.mark.parametrize("columns", [40, 60, 80, 100])
def test_the_help_of_ask_is_for_a_question_and_not_that_of_send(columns):
    env = {"COLUMNS": str(columns)}
    code, out, err = run(SCRIPT, "help", "ask", env=env)
    assert (code, err) == (0, "") and run(SCRIPT, "ask", "-h", env=env) == (0, out, "")
    send = run(SCRIPT, "help", "send", env=env)[1]
    assert "Send a question, wait for the reply, print its text. Exit code 3: no reply yet.\n" in out
    assert re.search(r"^For example: .*agent_bus.py ask bob 'Is T1 done\?'$", out, re.MULTILINE)
    options = [set(re.findall(r"^  (--[a-z-]+)", text, re.MULTILINE)) for text in (send, out)]
    assert options[0] - options[1] == {"--ask", "--json"} and options[1] < options[0]
    assert not re.search(r"a,b,c", out) and re.search(r"^  TO +who is asked$", out, re.MULTILINE)
    assert not re.search(r"--ask|\[--json\]", out) and max(map(len, out.splitlines())) <= max(columns, 80)
    assert " ".join(out.split()).endswith("S seconds (300)")


def test_join_without_the_pin_of_the_invitation_says_what_is_missing_and_fetches_nothing():
    with Scripted(page(200, "not this")) as server:
        code, out, err = run(SCRIPT, "join", server.url, "dell")
        assert (code, out) == (1, "") and "use the line that `invite` printed" in err and err.count("\n") == 1
        assert server.asked == []
    assert run(SCRIPT, "join", "--help")[1].startswith("usage: agent_bus.py join ")


@pytest.mark.parametrize("typo, meant", [("sned", "send"), ("recieve", "recv"), ("logs", "log"), ("instal", "install")])
def test_a_typo_gets_the_command_that_may_be_meant(typo, meant):
    code, out, err = run(SCRIPT, typo)
    assert (code, out) == (2, "") and f"did you mean {meant}" in err and err.count("\n") == 1


@pytest.mark.parametrize("word, meant", [
    ("read", "inbox or recv"), ("service", "install service"), ("status", "who"), ("agents", "who"), ("list", "who"),
    ("start", "serve"), ("reply", "send --reply-to"), ("upload", "file put"), ("watch", "recv or log"),
])  # fmt: skip
def test_a_word_of_another_tool_gets_the_command_that_is_meant(word, meant):
    """`read` was taken for relay or redact."""
    code, out, err = run(SCRIPT, word)
    assert (code, out) == (2, "") and err == f"agent_bus.py: there is no command '{word}': did you mean {meant}?\n"


def test_each_word_of_another_tool_stands_for_commands_that_exist():
    assert not agent_bus.ELSEWHERE.keys() & agent_bus.COMMANDS.keys()
    for meant in agent_bus.ELSEWHERE.values():
        assert {each.split()[0] for each in meant.split(" or ")} <= agent_bus.COMMANDS.keys(), meant


@pytest.mark.parametrize("words, says", [
    ("install calude", "did you mean claude?"), ("install zed", "only claude,"), ("uninstall zed", "only claude,"),
])  # fmt: skip
def test_an_agent_that_is_not_known_gets_the_one_that_may_be_meant(words, says, home):
    code, out, err = run(SCRIPT, *words.split())
    assert (code, out, err.count("\n")) == (2, "", 1) and f"is not known: {says}" in err
    assert ("agent-bus-mcp" in err) == (words == "install zed")


@pytest.mark.parametrize("name, given", [("version", ["x"]), ("completion", ["bash", "x"]), ("help", ["send", "x"]),
                                         ("version", ["--wrong"])])  # fmt: skip
def test_its_own_commands_refuse_what_they_do_not_take_and_have_a_help(name, given):
    code, out, err = run(SCRIPT, name, *given)
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert err.startswith(f"agent_bus.py {name}: {given[-1]} is one word too many: `")
    code, out, err = run(SCRIPT, name, "--help")
    assert (code, err) == (0, "") and out.startswith("usage: ") and agent_bus.COMMANDS[name].purpose in out


def test_a_word_that_is_like_no_command_gets_the_list():
    code, out, err = run(SCRIPT, "xyzzy")
    assert (code, out) == (2, "") and "agent_bus.py help` lists them" in err


def test_the_exit_code_is_that_of_the_program(agent):
    assert agent("recv", "bob", "--once", "--timeout", "0")[0] == 3
    assert agent("recv", "no such name")[0] == 2
    assert agent("who", AGENT_BUS_URL=refusing())[0] == 75


def test_version_says_where_it_is():
    import bus_server

    for asked in ("version", "--version"):
        code, out, err = run(SCRIPT, asked)
        assert (code, err) == (0, "") and bus_server.VERSION in out and str(ROOT / "tools") in out


@pytest.mark.parametrize("line", ["help", "help send", "version", "who", "log --no-follow", "tokens"])
def test_a_closed_pipe_ends_it_quietly(line, bus, tmp_path):
    mails(bus.url, "one")
    urllib.request.urlopen(f"{bus.url}/recv?to=bob").close()
    reading, writing = os.pipe()
    os.close(reading)
    db = ["--db", str(tmp_path / "bus.db")] if line == "tokens" else []
    process = program(SCRIPT, *line.split(), *db, stdout=writing, env={"AGENT_BUS_URL": bus.url})
    os.close(writing)
    assert (process.communicate(timeout=PATIENCE)[1], process.returncode) == (b"", 0)


@pytest.mark.parametrize("line", ["bus_server.py invite x --yes", "bus_server.py tokens", "tools/bus_doctor.py"])
def test_a_closed_pipe_ends_a_program_quietly(line, tmp_path):
    reading, writing = os.pipe()
    os.close(reading)
    script, *arguments = line.split()
    (tmp_path / "bus.db").touch()
    db = ["--db", str(tmp_path / "bus.db")] if arguments else []
    process = program(script, *arguments, *db, stdout=writing)
    os.close(writing)
    err = process.communicate(timeout=PATIENCE)[1]
    assert b"Traceback" not in err and b"Broken" not in err and process.returncode == 0


def test_ctrl_c_ends_the_checks_quietly(interruptible):
    process = program("test_bus.py", start_new_session=True)
    assert process.stdout.readline().startswith(b"checking http")
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the bus of the checks gets it, too
    err = process.communicate(timeout=PATIENCE)[1]
    assert (err, process.returncode) == (b"", 130)


@pytest.mark.parametrize("arguments", [["who", "--watch"], ["log"], ["recv", "bob"]])
def test_ctrl_c_ends_it_quietly(arguments, bus, interruptible):
    mails(bus.url, "one")
    urllib.request.urlopen(f"{bus.url}/recv?to=bob").close()
    process = program(SCRIPT, *arguments, env={"AGENT_BUS_URL": bus.url})
    assert process.stdout.readline()
    process.send_signal(signal.SIGINT)
    err = process.communicate(timeout=PATIENCE)[1]
    assert err in (b"", f"agent_bus.py recv: listening as bob on {bus.url}\n".encode()) and process.returncode == 130


def test_ctrl_c_while_a_program_is_loaded_ends_it_quietly(monkeypatch, capsys):
    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setitem(agent_bus.OWN, "version", interrupted)
    assert agent_bus.main(["version"]) == 130 and capsys.readouterr() == ("", "")


def test_on_a_machine_that_has_joined_it_has_the_commands_of_the_clients(bus, tmp_path):
    place = tmp_path / "joined"
    place.mkdir()
    for file in bus_join.FILES:
        (place / file).write_bytes(bus.get(f"/{file}"))
    mails(bus.url, "one")

    def command(*arguments):
        env = {**os.environ, "AGENT_BUS_URL": bus.url, "AGENT_NAME": "bob"}
        line = [sys.executable, "-I", "-S", str(place / "agent_bus.py"), *arguments]
        done = forked.run(line, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PATIENCE)
        return done.returncode, done.stdout, done.stderr

    assert "| one" in command("inbox")[1] and "spark" in command("who")[1]
    assert "spark > bob: one" in command("log", "--short", "--no-follow")[1]
    assert str(place) in command("version")[1] and "--subject" in command("completion", "bash")[1]
    rows = agent_bus.COMMANDS.items()
    there = {name for name, row in rows if not row.program or f"{row.program}.py" in bus_join.FILES}
    listed = re.findall(r"^  ([a-z]+) ", command("help")[1], re.MULTILINE)
    assert set(listed) == there and not {"invite", "serve", "backup"} & set(listed) and {"lock", "redact"} < set(listed)
    assert not {"invite", "serve"} & set(re.findall(r"\w+", command("completion", "bash")[1]))
    code, out, err = command("invite", "dell")
    assert (code, out, err.count("\n")) == (2, "", 1) and f"needs bus_server.py, which is not in {place}" in err
    assert err.endswith(": run it on the machine of the bus\n") and "in a clone" in command("serve")[2]


def test_serve_is_the_bus(tmp_path):
    process = program(SCRIPT, "serve", "--port", "0", "--db", str(tmp_path / "bus.db"))
    try:
        assert process.stdout.readline().startswith(b"listening on http://127.0.0.1:")
        assert process.stdout.readline() == f"messages are in {tmp_path / 'bus.db'}\n".encode()
        assert b"work" in process.stdout.readline()
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 0


def test_a_message_and_its_answer(agent):
    asking = program(SCRIPT, "ask", "bob", "ready?", env={"AGENT_BUS_URL": agent.url, "AGENT_NAME": "spark"})
    code, out, _ = agent("recv", "bob", "--once")
    number = re.search(r"id=([0-9a-f]+)", out)[1]
    assert code == 0 and "| ready?" in out
    assert agent("send", "spark", "yes", "indeed", "--reply-to", number)[0] == 0
    assert asking.communicate(timeout=PATIENCE)[0] == b"yes indeed\n"


def test_an_option_that_resembles_none_gets_no_proposal():
    code, _, err = run(SCRIPT, "outbox", "bob", "hi", "--drop")
    assert code == 2 and "did you mean" not in err
