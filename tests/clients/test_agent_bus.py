"""tools/agent_bus.py, the one command, and the programs that only it uses: who, inbox, ack, install."""

import contextlib
import json
import os
import pty
import re
import resource
import select
import shlex
import shutil
import signal
import subprocess
import sys
import urllib.request

import pytest

import bus_send
from tests.clients.test_clients import home, program, refusing, run  # noqa: F401
from tests.kit.bad_servers import DATE, NOON, Scripted, answer, mail, message, page
from tests.kit.processes import PATIENCE, ROOT, in_time
from tools import agent_bus, bus_install, bus_join, bus_who

SCRIPT = "tools/agent_bus.py"
HOSTILE = "\x1b[31mred\x1b]0;title\x07 \x9b1m\u202eevil\u200b\r over"
RAW = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e\u200b]")
COLOUR = re.compile("\x1b\\[3[1-6]m|\x1b\\[0m")


@pytest.fixture
def agent(bus):
    """Runs a command as bob, against a bus: exit code, stdout, stderr."""

    def command(*arguments, stdin=b"", **env):
        return run(SCRIPT, *arguments, stdin=stdin, env={"AGENT_BUS_URL": bus.url, "AGENT_NAME": "bob", **env})

    command.url, command.bus = bus.url, bus
    return command


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


# ── The command ──────────────────────────────────────────────────────────────────────────────────────────────────────


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
    ("send bob hi --frm x", "unrecognized"), ("later bob hi --after x", "is not a time"),
    ("serve --port x", "invalid int"), ("recv --frm", "--frm"),
    ("send bob hi --field from=x", "'from=x' is no further member"),
    ("log --last=-3", "--last: '-3' is not a number of messages"), ("install", "required"),
    ("lock a --no", "--no"), ("locks a b", "b"), ("inbox a b", "b"), ("ack a b c", "c"), ("install claude x", "x"),
    ("install service --dry-run", "are for an agent program"),
])  # fmt: skip
def test_a_wrong_option_is_said_in_the_last_of_few_lines(arguments, says):
    code, out, err = run(SCRIPT, *arguments.split())
    assert (code, out) == (2, "") and err.count("\n") <= 4 and says in err.splitlines()[-1]
    assert "{look" not in err and "{lock" not in err and "{install" not in err


def test_the_help_of_a_command_is_that_of_its_program():
    assert run(SCRIPT, "help", "log") == run(SCRIPT, "log", "--help")
    assert 'eval "$(agent-bus completion bash)"' in run(SCRIPT, "help", "completion")[1]


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


@pytest.mark.parametrize("words, says", [
    ("install calude", "did you mean claude?"), ("install zed", "only claude,"), ("uninstall zed", "only claude,"),
])  # fmt: skip
def test_an_agent_that_is_not_known_gets_the_one_that_may_be_meant(words, says, home):  # noqa: F811
    code, out, err = run(SCRIPT, *words.split())
    assert (code, out, err.count("\n")) == (2, "", 1) and f"is not known: {says}" in err
    assert ("agent-bus-mcp" in err) == (words == "install zed")


@pytest.mark.parametrize("name, given", [("version", ["x"]), ("completion", ["bash", "x"]), ("help", ["send", "x"]),
                                         ("version", ["--wrong"])])  # fmt: skip
def test_its_own_commands_refuse_what_they_do_not_take_and_have_a_help(name, given):
    code, out, err = run(SCRIPT, name, *given)
    assert (code, out) == (2, "") and f"{name} does not take {given[-1]}: `" in err and err.count("\n") == 1
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
    assert err in (b"", f"bus_recv: listening as bob on {bus.url}\n".encode()) and process.returncode == 130


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
        done = subprocess.run(line, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PATIENCE)
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


# ── Who ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def poll(url, name, channel="default"):
    urllib.request.urlopen(f"{url}/recv?to={name}&channel={channel}").close()


def test_who_shows_each_name_once_and_who_listens_first(agent):
    poll(agent.url, "bob")
    poll(agent.url, "ann", "ops")
    mails(agent.url, "1", "2")
    code, out, err = agent("who")
    assert (code, err) == (0, "")
    head, *rows, last = out.splitlines()
    assert head.split() == ["NAME", "SEEN", "UNREAD", "OLDEST"]
    assert last == "2 of 3 listen; mail to all is not in UNREAD"
    seen = [("bob", "listening", "2", "<1m"), ("ops/ann", "listening", "0"), ("spark", "sent", "<1m", "0")]
    assert sorted(tuple(row.split()) for row in rows) == seen and rows[2].startswith("spark ")
    assert [each["name"] for each in json.loads(agent("who", "--json", "--channel", "ops")[1])] == ["ann"]
    assert "2 of 2" in agent("who", "--online")[1]
    urllib.request.urlopen(f"{agent.url}/claim", b'{"to": "bob", "worker": "w"}').close()
    assert re.search("^bob +listening +2 +<1m +1 +0$", agent("who")[1], re.MULTILINE)


def agents(*rows, **more):
    plain = {"channel": "default", "online": False, "last_seen": NOON - 7200, "unread": 0}
    return answer({"agents": [{**plain, **row} for row in rows], "bus": "b1", **more}, f"Date: {DATE}")


def who(*answers, arguments=()):
    with Scripted(*answers) as server:
        code, out, err = run(SCRIPT, "who", *arguments, env={"AGENT_BUS_URL": server.url})
        assert (code, err) == (0, ""), err
        return out, server.asked


def test_who_shows_what_waits_how_long_and_the_state_of_a_queue():
    rows = (
        {"name": "dell", "online": True, "unread": 3, "oldest": NOON - 600},
        {"name": "builds", "work": {"in_hand": 2, "dead": 4, "workers": 1}, "unread": 9, "oldest": NOON - 30},
        {"name": "ci", "last_seen": None, "unread": None},
        {"name": "sensor", "last_seen": None, "sent": NOON - 300},
        {"name": "rare", "last_seen": NOON - 86400, "sent": NOON - 10800},
        {"name": "reader", "last_seen": NOON - 3600, "sent": NOON - 7200},
    )
    out, _ = who(agents(*rows))
    assert [re.split("  +", row.strip()) for row in out.splitlines()[:-1]] == [
        ["NAME", "SEEN", "UNREAD", "OLDEST", "IN HAND", "DEAD"],
        ["dell", "listening", "3", "10m"],
        ["sensor", "sent 5m", "0"],
        ["reader", "1h", "0"],
        ["builds", "2h", "9", "<1m", "2", "4"],
        ["rare", "sent 3h", "0"],
        ["ci", "never", "-"],
    ]


def test_who_shows_what_an_agent_says_of_itself_in_a_column_of_its_own():
    rows = (
        {"name": "dell", "status": {"text": "tests", "state": "busy", "cwd": "/w", "at": NOON - 180}},
        {"name": "nano", "status": {"cwd": "/work", "branch": "main", "at": NOON}},
        {"name": "eve", "status": {"text": HOSTILE * 9, "at": "soon"}},
        {"name": "ci", "status": "busy"},
        {"name": "gb10"},
    )
    out, _ = who(agents(*rows))
    lines = out.splitlines()
    doing = [re.split("  +", row.strip())[3:] for row in lines[:3]]
    assert doing == [["DOING"], ["busy 3m: tests"], ["<1m: /work main"]]
    assert not RAW.search(out) and len(lines) == 7 and max(map(len, lines)) <= 80 and lines[3].endswith("…")
    assert lines[4].endswith(" 0") and lines[5].endswith(" 0")


def test_who_asks_for_every_page_and_shows_no_control_character():
    out, asked = who(agents({"name": "a"}, more=True, next="default/a"), agents({"name": HOSTILE, "channel": HOSTILE}))
    assert asked[1].query == {"after": "default/a"} and len(out.splitlines()) == 4 and not RAW.search(out)


def test_who_of_300_agents_takes_a_fifth_of_a_second_and_fits_a_terminal(bus):
    for n in range(299):
        poll(bus.url, f"agent-{n}")
    poll(bus.url, "x" * 64, "long-channel")
    env = {"AGENT_BUS_URL": bus.url}
    took = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        shown = on_terminal("who", **env)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        took.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    lines = shown.splitlines()
    assert len(lines) == 302 and lines[-1].startswith("300 of 300 listen;") and max(map(len, lines)) <= 80
    assert f"long-channel/{'x' * 64} " in run(SCRIPT, "who", env=env)[1]  # in a pipe it is whole
    assert min(took) < in_time(0.2)


def test_who_watches_and_endures_an_outage(monkeypatch, capfd):
    slept = []

    def sleep(seconds):
        slept.append(seconds)
        if len(slept) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(bus_who.time, "sleep", sleep)
    with Scripted(agents({"name": "a"}), page(502, "a proxy"), agents({"name": "b"})) as server:
        monkeypatch.setenv("AGENT_BUS_URL", server.url)
        assert bus_who.main(["--watch"]) == 130
    out, err = capfd.readouterr()
    assert re.findall("^[ab] ", out, re.MULTILINE) == ["a ", "b "] and err.count("trying again") == 1
    assert slept == [bus_who.EVERY_SECONDS] * 3


# ── Inbox and ack ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_inbox_shows_unread_mail_and_takes_none(agent):
    one, two = mails(agent.url, "one", "two")
    for _ in range(2):
        code, out, err = agent("inbox")
        assert code == 0 and re.findall(r"^\| (.*)", out, re.MULTILINE) == ["one", "two"]
        assert "2 unread for bob" in err and err.endswith(f" ack {two} bob\n")
    assert [json.loads(agent.bus.get(f"/message/{id}"))["state"] for id in (one, two)] == ["queued"] * 2
    assert not [each for each in json.loads(agent.bus.get("/agents"))["agents"] if each["online"]]
    assert [json.loads(line)["id"] for line in agent("inbox", "--json")[1].splitlines()] == [one, two]
    assert re.findall(r"^\| (.*)", agent("recv", "bob", "--once")[1], re.MULTILINE) == ["one", "two"]
    code, out, err = agent("inbox")
    assert (code, out) == (3, "") and "nothing is unread for bob" in err


def test_ack_marks_as_read_up_to_an_id_and_the_bus_knows(agent):
    one, two, three = mails(agent.url, "one", "two", "three")
    code, out, err = agent("ack", two)
    assert (code, out) == (0, "") and "1 unread" in err
    states = [json.loads(agent.bus.get(f"/message/{id}"))["state"] for id in (one, two)]
    assert states == ["acknowledged"] * 2
    assert re.findall(r"^\| (.*)", agent("inbox", "bob")[1], re.MULTILINE) == ["three"]
    assert agent("ack", one)[0] == 0
    code, _, err = agent("ack", f"{int(one, 16) - 1:x}")
    assert code == 2 and err == (f"agent_bus.py ack: there is no message {int(one, 16) - 1:x} on this bus: "
                                 "take the id from the inbox\n")  # fmt: skip
    assert agent("ack", "fffffffffffff")[0] == 2 and agent("ack", "fffffffffffff")[2].count("\n") == 1


def test_an_acknowledgement_is_nobodys_listening(agent):
    """Refused or not: a send to the name still says that nobody ever listened as it."""
    (one,) = mails(agent.url, "one", to="zed")
    assert agent("ack", "123", "zed")[0] == 2 and agent("ack", one, "zed")[0] == 0
    told = bus_send.send("zed", "two", url=agent.url, sender="spark")["receiver"]
    assert not told["online"] and not told["known"] and told["last_seen"] is None and told["unread"] == 1
    assert "listening" not in agent("who")[1]


def test_the_mail_of_another_name_or_channel_cannot_be_acknowledged(agent):
    (one,), (two,) = mails(agent.url, "one", to="zed"), mails(agent.url, "two", channel="lab")
    code, _, err = agent("ack", one, "nobody9")
    assert code == 2 and f"{one} is mail for zed, not for nobody9: take the id from the inbox" in err
    agent("ack", "1", "bob")  # bob's cursor is at the end now
    assert f"{two} is mail for bob on the channel lab, not for bob" in agent("ack", two)[2]
    everybody = bus_send.send("all", "hear", url=agent.url, sender="spark")["id"]
    assert agent("ack", everybody, "nobody9")[0] == 0


def test_the_line_that_the_inbox_prints_marks_its_mail_as_read(agent):
    mails(agent.url, "one", to="zed")
    mails(agent.url, "two", to="zed", channel="lab")
    for more in ([], ["--channel", "lab"]):
        line = agent("inbox", "zed", *more)[2].strip().split("python3 tools/agent_bus.py ")[1]
        assert agent(*line.split())[0] == 0 and agent("inbox", "zed", *more)[0] == 3


def test_a_home_that_cannot_be_written_is_said_in_the_sentence_of_all_programs(agent, tmp_path):
    (tmp_path / "file").touch()
    (one,) = mails(agent.url, "one")
    env = {"HOME": str(tmp_path / "file"), "XDG_STATE_HOME": "", "AGENT_BUS_STATE_DIR": ""}
    code, _, err = agent("ack", one, **env)
    assert code == 2 and "cannot write " in err and "set AGENT_BUS_STATE_DIR to another place" in err


def test_ack_takes_an_id_that_is_not_among_the_oldest_hundred(agent):
    ids = mails(agent.url, *(str(number) for number in range(115)))
    (other,) = mails(agent.url, "x", to="carl")
    assert agent("ack", other)[0] == 2
    code, _, err = agent("ack", ids[110])
    assert code == 0 and "4 unread" in err


def test_the_inbox_needs_a_name(agent):
    code, _, err = agent("inbox", AGENT_NAME="")
    assert code == 2 and "AGENT_NAME" in err and "{look" not in err and err.startswith("usage: agent_bus.py inbox [-h]")


def test_an_inbox_of_hostile_mail_shows_no_control_character(agent):
    mails(agent.url, HOSTILE, subject=HOSTILE)
    for arguments in (["inbox"], ["inbox", "--json"]):
        assert not RAW.search(agent(*arguments)[1])


# ── Log ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_log_short_is_one_line_a_message(agent):
    (one,) = mails(agent.url, "first line\nsecond\n", subject="T1")
    mails(agent.url, HOSTILE, to="ann")
    code, out, err = agent("log", "--short", "--no-follow")
    assert (code, err) == (0, "") and not RAW.search(out)
    first, second = out.splitlines()
    assert re.fullmatch(rf"\d\d-\d\d \d\d:\d\d:\d\dZ {one} spark > bob: \[T1\] first line second", first)
    assert " spark > ann: \\x1b[31mred" in second


def test_log_last_is_the_end_of_the_log(agent):
    ids = mails(agent.url, *map(str, range(150)))

    def shown(*arguments):
        out = agent("log", "--json", "--no-follow", *arguments)[1]
        return [json.loads(line)["id"] for line in out.splitlines()]

    assert shown("--last", "20") == ids[-20:] and shown("--last", "149") == ids[1:]
    assert shown("--last", "500") == ids and shown("--last", "0") == []
    (other,) = mails(agent.url, "x", to="ann")
    assert shown("--last", "1", "--to", "bob") == ids[-1:] and shown("--last", "1") == [other]
    assert agent("log", "--last", "2", "--since", "1h")[0] == 2


def test_log_last_then_follows(agent):
    mails(agent.url, "1", "2", "3")
    process = program(SCRIPT, "log", "--last", "2", "--short", env={"AGENT_BUS_URL": agent.url})
    assert [process.stdout.readline()[-2:] for _ in range(2)] == [b"2\n", b"3\n"]
    mails(agent.url, "4")
    assert process.stdout.readline()[-2:] == b"4\n"
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=PATIENCE) == (b"", b"")


def test_log_since_an_id_begins_with_that_message(agent):
    one, two, three = mails(agent.url, "1", "2", "3")
    out = agent("log", "--json", "--no-follow", "--since", two)[1]
    assert [json.loads(line)["id"] for line in out.splitlines()] == [two, three]
    assert one in agent("log", "--no-follow", "--since", "1h")[1]


@pytest.mark.parametrize("since", ["1795203598000", "660ba678a1b4", "660ba678a1b40f", "yesterday"])
def test_log_since_what_is_no_id_is_refused(since):
    """The first are milliseconds: as an id they would be of 1983."""
    code, out, err = run(SCRIPT, "log", "--since", since)
    assert (code, out) == (2, "") and "the id of a message" in err


def test_log_has_colours_on_a_terminal_only_and_not_against_the_wish_of_its_user(agent):
    mails(agent.url, HOSTILE, HOSTILE * 20)
    for form in ([], ["--short"]):
        arguments = ["log", "--no-follow", *form]
        shown = on_terminal(*arguments, AGENT_BUS_URL=agent.url)
        assert len(COLOUR.findall(shown)) == 4 and not RAW.search(COLOUR.sub("", shown))
        for env in ({"NO_COLOR": "1"}, {"TERM": "dumb"}):
            assert not RAW.search(on_terminal(*arguments, AGENT_BUS_URL=agent.url, **env))
        assert not RAW.search(agent(*arguments)[1])
    lines = COLOUR.sub("", shown).splitlines()
    assert len(lines) == 2 and max(map(len, lines)) == 80


def test_a_log_of_what_is_no_message_goes_on(home):  # noqa: F811
    with Scripted(mail('"text"', "7", message(1, "good"))) as server:
        env = {"AGENT_BUS_URL": server.url}
        code, out, err = run(SCRIPT, "log", "--short", "--no-follow", env=env)
    assert code == 0 and out.count("not a message") == 2 and "spark > dell: good" in out


# ── Completion ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def scripts():
    return {shell: run(SCRIPT, "completion", shell)[1] for shell in agent_bus.SHELLS}


def test_bash_completes_commands_and_their_options(scripts):
    def completed(*words):
        line = f"COMP_WORDS=({shlex.join(words)}); COMP_CWORD={len(words) - 1}; _agent_bus; echo ${{COMPREPLY[@]}}"
        done = subprocess.run(["bash", "-c", f"{scripts['bash']}\n{line}"], capture_output=True, text=True)
        assert not done.stderr
        return done.stdout.split()

    assert completed("agent-bus", "re") == ["recv", "relay", "revoke", "redact", "restore"]
    assert completed("agent-bus", "send", "--sub") == ["--subject"]
    assert "--keep" in completed("agent-bus", "serve", "--") and "--to" in completed("agent-bus", "file", "put", "--")
    assert completed("agent-bus", "install", "cl") == ["claude"]
    assert completed("agent-bus", "completion", "z") == ["zsh"]


def test_files_are_completed_only_for_commands_that_take_them(scripts):
    def asks(command):
        line = f"compopt() {{ echo \"$@\"; }}; COMP_WORDS=(agent-bus {command} x); COMP_CWORD=2; _agent_bus"
        done = subprocess.run(["bash", "-c", f"{scripts['bash']}\n{line}"], capture_output=True, text=True)
        return done.stdout

    assert asks("file") == "-o default\n" and asks("send") == asks("who") == ""
    assert "-o default -F" not in scripts["bash"]
    assert "not __fish_seen_subcommand_from file " in scripts["fish"].splitlines()[0]


def test_zsh_completes_commands_and_their_options(scripts):
    if not shutil.which("zsh"):
        pytest.skip("needs zsh")
    stubs = 'compdef() { }; _files() { }; compadd() { shift; print -l -- "$@" }; _describe() { print -l -- ${(P)2} }\n'

    def completed(*words):
        line = f"words=({shlex.join(words)}); CURRENT={len(words)}; _agent_bus"
        done = subprocess.run(["zsh", "-fc", f"{stubs}{scripts['zsh']}\n{line}"], capture_output=True, text=True)
        assert not done.stderr
        return done.stdout.splitlines()

    first = completed("agent-bus", "")
    assert "send:send a message" in first and len(first) == len(agent_bus.COMMANDS)
    assert "--subject" in completed("agent-bus", "send", "") and "claude" in completed("agent-bus", "install", "")


def test_fish_has_a_line_for_every_command_and_option(scripts):
    lines = scripts["fish"].splitlines()
    assert all(line.startswith("complete -c agent-bus -n ") for line in lines)
    assert [name for name in agent_bus.COMMANDS if not any(f"-f -a {name} " in line for line in lines)] == []
    assert "complete -c agent-bus -n '__fish_seen_subcommand_from send' -l subject" in lines
    if shutil.which("fish"):
        text = f"{scripts['fish']}\ncomplete -C 'agent-bus rec'"
        assert "recv" in subprocess.run(["fish", "-c", text], capture_output=True, text=True, check=True).stdout


def test_another_shell_gets_the_ones_that_are_known():
    code, out, err = run(SCRIPT, "completion", "tcsh")
    assert (code, out) == (2, "") and "bash, zsh, fish" in err


# ── Install ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def house(tmp_path, monkeypatch):
    """An empty HOME, and a systemctl that writes down what it was asked."""
    place = tmp_path / "house"
    place.mkdir()
    (tmp_path / "bin").mkdir()
    for manager in ("systemctl", "launchctl"):
        (place.parent / "bin" / manager).write_text(f'#!/bin/sh\necho {manager} "$@" >> {tmp_path / "asked"}\n')
        (place.parent / "bin" / manager).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("HOME", str(place))
    for variable in ("XDG_CONFIG_HOME", "XDG_STATE_HOME", "CLAUDE_CONFIG_DIR", "CODEX_HOME", "COPILOT_HOME"):
        monkeypatch.delenv(variable, raising=False)
    return place


def asked(house):
    """What the manager of services was asked."""
    return (house.parent / "asked").read_text().splitlines()


def tree(folder):
    assert folder.exists()
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def install(*arguments, code=0, **env):
    got, out, err = run(SCRIPT, *arguments, env=env)
    assert got == code, err
    return out + err


CLAUDES = {
    "nothing": None,
    "as claude writes it": '{\n  "numStartups": 3,\n  "name": "zo\u00eb"\n}',
    "by hand": '{"mcpServers": {"x": {"command": "y"}},   "a": 1.0}\n',
    "empty": "",
}


@pytest.mark.parametrize("before", CLAUDES)
def test_install_claude_adds_a_server_and_uninstall_leaves_every_byte_as_it_was(before, house):
    file, before = house / ".claude.json", CLAUDES[before]
    if before is not None:
        file.write_text(before)
        file.chmod(0o640)
    was = tree(house)
    said = install("install", "claude")
    settings = json.loads(file.read_text())
    assert str(file) in said and settings["mcpServers"]["bus"]["type"] == "stdio"
    assert {**json.loads(before or "{}"), "mcpServers": settings["mcpServers"]} == settings
    assert oct(file.stat().st_mode & 0o777) == ("0o640" if before is not None else "0o600")
    install("install", "claude")  # again changes nothing
    assert json.loads(file.read_text()) == settings
    install("uninstall", "claude")
    assert tree(house) == was
    assert "nothing is changed" in install("uninstall", "claude", code=1)


def test_what_claude_wrote_meanwhile_stays(house):
    file = house / ".claude.json"
    file.write_text('{\n  "numStartups": 3\n}')
    install("install", "claude")
    changed = json.loads(file.read_text())
    changed["numStartups"] = 4
    file.write_text(json.dumps(changed, indent=2))
    install("uninstall", "claude")
    assert file.read_text() == '{\n  "numStartups": 4\n}'


def test_the_server_that_claude_is_told_of_runs_in_every_folder(house, bus, tmp_path):
    install("install", "claude", AGENT_BUS_URL=bus.url, AGENT_BUS_TOKEN="abt_0", AGENT_NAME="alice")
    entry = json.loads((house / ".claude.json").read_text())["mcpServers"]["bus"]
    assert entry["env"] == {"AGENT_BUS_URL": bus.url, "AGENT_BUS_STATE_DIR": str(tmp_path / "state")}
    (tmp_path / "project").mkdir()
    assert shook_hands(entry, tmp_path / "project", {"HOME": str(house), "PATH": os.environ["PATH"]}) == "agent-bus"


def shook_hands(entry, folder, env):
    """The name by which the MCP server of this entry answers, in that folder."""
    hello = {"protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": {"name": "t", "version": "1"}}
    line = json.dumps({"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": hello})
    done = subprocess.run([entry["command"], *entry["args"]], cwd=folder, env={**env, **entry["env"]}, text=True,
                          input=f"{line}\n", capture_output=True, timeout=PATIENCE)  # fmt: skip
    return json.loads(done.stdout)["result"]["serverInfo"]["name"]


def test_a_file_is_found_from_every_folder(house, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert "work.env" in install("install", "claude", code=2, AGENT_BUS_PROFILE="work")
    (house / ".config" / "agent-bus").mkdir(parents=True)
    (house / ".config" / "agent-bus" / "work.env").touch(0o600)
    install("install", "claude", AGENT_BUS_CA="bus.pem", AGENT_BUS_PROFILE="work")
    entry = json.loads((house / ".claude.json").read_text())["mcpServers"]["bus"]
    assert entry["env"]["AGENT_BUS_CA"] == str(tmp_path / "bus.pem") and entry["env"]["AGENT_BUS_PROFILE"] == "work"


def test_the_bus_of_a_profile(bus, tmp_path):
    (tmp_path / "agent-bus").mkdir()
    (tmp_path / "agent-bus" / "work.env").write_text(f"AGENT_BUS_URL={bus.url}\nAGENT_NAME=bob\n")
    (tmp_path / "agent-bus" / "work.env").chmod(0o600)
    env = {"XDG_CONFIG_HOME": str(tmp_path)}
    mails(bus.url, "one")
    for line in ("--bus work inbox", "--bus=work inbox", "inbox --bus work"):
        assert "| one" in run(SCRIPT, *line.split(), env=env)[1]
    for line in ("--bus work who", "who --bus work", "--bus work log --no-follow"):
        assert "spark" in run(SCRIPT, *line.split(), env=env)[1]
    assert run(SCRIPT, "--bus", "home", "who", env=env)[0] == 2
    code, out, err = run(SCRIPT, "--bus", "work", "who", env={**env, "AGENT_BUS_URL": "http://127.0.0.1:9"})
    assert (code, out) == (2, "") and "AGENT_BUS_URL" in err
    assert run(SCRIPT, "--bus", env=env)[0] == 2


def test_a_token_is_never_written_for_claude(house):
    said = install("install", "claude", AGENT_BUS_TOKEN="abt_secret")
    assert "AGENT_BUS_TOKEN_FILE" in said and b"abt_secret" not in b"".join(filter(None, tree(house).values()))


OTHERS = {
    "another server": ('{"mcpServers": {"bus": {"command": "city-bus"}}}', "agent-bus"),
    "no JSON": ("{", "correct it first"),
    "a list": ("[]", "correct it first"),
    "servers of another kind": ('{"mcpServers": []}', "another kind"),
}


@pytest.mark.parametrize("content", OTHERS)
def test_what_is_not_ours_stays_as_it_is(content, house):
    text, says = OTHERS[content]
    (house / ".claude.json").write_text(text)
    was = tree(house)
    assert says in install("install", "claude", code=1)
    assert says in (said := install("uninstall", "claude", code=1)) or "nothing is changed" in said
    assert tree(house) == was


@pytest.mark.parametrize("command", ["install", "uninstall"])
def test_another_agent_gets_the_ones_that_are_known(command):
    code, out, err = run(SCRIPT, command, "emacs")
    assert (code, out, err.count("\n")) == (2, "", 1) and "claude, codex, " in err


def test_install_service_starts_the_bus_and_uninstall_leaves_every_byte_as_it_was(house, tmp_path):
    was = tree(house)
    database = tmp_path / "a $strange% \"name\"" / "bus.db"
    install("install", "service", "--port", "0", "--db", str(database))
    unit = house / ".config" / "systemd" / "user" / "agent-bus.service"
    assert asked(house) == ["systemctl --user daemon-reload", "systemctl --user enable --now agent-bus"]
    if shutil.which("systemd-analyze"):
        done = subprocess.run(["systemd-analyze", "--user", "verify", str(unit)], capture_output=True, text=True)
        assert "agent-bus.service" not in done.stderr, done.stderr
    (line,) = re.findall("^ExecStart=(.*)$", unit.read_text(), re.MULTILINE)
    assert "a $$strange%% " in line  # as systemd wants them
    command = shlex.split(line.replace("%%", "%").replace("$$", "$"))
    assert command[2:] == ["serve", "--port", "0", "--db", str(database)]
    process = subprocess.Popen(command, cwd="/", stdout=subprocess.PIPE)
    assert process.stdout.readline().startswith(b"listening on ")
    process.terminate()
    assert process.wait(PATIENCE) == 0
    process.stdout.close()
    install("uninstall", "service")
    assert asked(house)[2:] == ["systemctl --user disable --now agent-bus", "systemctl --user daemon-reload"]
    assert tree(house) == was
    assert "nothing is changed" in install("uninstall", "service", code=1)


def test_install_service_says_what_it_wrote_and_how_to_start_stop_and_watch_it(house):
    unit = f"{house}/.config/systemd/user/agent-bus.service"
    said = install("install", "service").splitlines()
    assert said[0] == f"wrote {unit}: with it, the bus starts when you log in"
    for command in ("status", "stop", "start"):
        assert any(f"systemctl --user {command} agent-bus" in line for line in said[1:])
    assert "its log: journalctl --user -u agent-bus -f" in said
    assert said[-1] == "to take it away: python3 tools/agent_bus.py uninstall service"
    assert install("uninstall", "service").startswith(f"removed {unit}, and stopped the bus")


def test_a_service_has_the_database_of_now(house, tmp_path):
    install("install", "service", XDG_STATE_HOME=str(tmp_path / "elsewhere"))
    unit = (house / ".config" / "systemd" / "user" / "agent-bus.service").read_text()
    assert f"Environment=XDG_STATE_HOME={tmp_path}/elsewhere\n" in unit


def test_a_service_runs_in_another_folder_so_its_paths_are_absolute(house):
    given = "--db data/bus.db --tls-cert=cert.pem --tls-k key.pem --listen unix:run/bus --allow-host data/bus.db"
    given += " --notify rules.json --files 1g --files-dir=files"
    install("install", "service", *given.split(), XDG_STATE_HOME="state$HOME %h")
    unit = (house / ".config" / "systemd" / "user" / "agent-bus.service").read_text()
    here, (line,) = os.getcwd(), re.findall("^ExecStart=(.*)$", unit, re.MULTILINE)
    of_tls = f"--tls-cert={here}/cert.pem --tls-k {here}/key.pem"
    others = f"--notify {here}/rules.json --files 1g --files-dir={here}/files"
    assert line.endswith(
        f" serve --db {here}/data/bus.db {of_tls} --listen unix:{here}/run/bus --allow-host data/bus.db {others}"
    )
    assert f'Environment="XDG_STATE_HOME={here}/state$HOME %%h"\n' in unit  # $ has no meaning there


def test_a_service_with_a_wrong_option_is_not_written(house):
    was = tree(house)
    assert "--prot" in install("install", "service", "--prot", "1", code=2)
    assert tree(house) == was


def test_a_unit_of_somebody_else_stays(house):
    unit = house / ".config" / "systemd" / "user" / "agent-bus.service"
    unit.parent.mkdir(parents=True)
    unit.write_text("[Service]\n")
    for command in ("install", "uninstall"):
        assert "not written by agent-bus" in install(command, "service", code=1)
    assert unit.read_text() == "[Service]\n"


def test_without_systemd_the_user_gets_the_line_to_run(house):
    said = "echo 'Created symlink' >&2\necho 'Failed to connect to bus' >&2\nexit 1\n"
    (house.parent / "bin" / "systemctl").write_text(f"#!/bin/sh\n{said}")
    line = "run it yourself: systemctl --user enable --now agent-bus (Failed to connect to bus)"
    said = install("install", "service", code=1)
    assert line in said and "the bus does not run yet" in said and "the bus runs now" not in said
    was = tree(house)
    install("uninstall", "service")
    assert was and not tree(house)


def test_on_macos_launchd_gets_the_file(house, monkeypatch, capsys):
    """Only what we write and ask: nobody has tried it with launchd."""
    import plistlib

    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(sys, "argv", ["tools/agent_bus.py install"])
    was = tree(house)
    assert bus_install.main(["install", "service", "--port", "9000"]) == 0
    file = house / "Library" / "LaunchAgents" / "agent-bus.plist"
    job = plistlib.loads(file.read_bytes())
    assert job["ProgramArguments"][1:] == [str(ROOT / "tools" / "agent_bus.py"), "serve", "--port", "9000"]
    assert bus_install.main(["uninstall", "service"]) == 0
    assert asked(house) == [f"launchctl load -w {file}", f"launchctl unload -w {file}"] and tree(house) == was
