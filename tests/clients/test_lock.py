"""tools/bus_lock.py: agent-bus lock, unlock and locks."""
import json
import os
import shlex
import sys
import threading

import pytest

import bus_recv
from tests.clients.test_agent_bus import on_terminal
from tests.clients.test_clients import refusing
from tests.kit import forked, peers
from tests.kit.peers import mint
from tests.kit.processes import PATIENCE, ROOT, Server, no_settings, wait_until
from tools import bus_lock


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch):
    no_settings(monkeypatch)


def run(url, *arguments, name="dell", **env):
    """(exit code, stdout, stderr) of `agent-bus ...`."""
    command = [sys.executable, str(ROOT / "tools" / "agent_bus.py"), *map(str, arguments)]
    theirs = {**os.environ, "AGENT_BUS_URL": url, **({"AGENT_NAME": name} if name else {}), **env}
    done = forked.run(command, env=theirs, capture_output=True, text=True, timeout=2 * PATIENCE)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout, done.stderr


def test_who_reserves_a_file_below_the_top_of_a_repository_is_told_its_name_for_others(bus, tmp_path, monkeypatch):
    (tmp_path / ".git").mkdir()
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.md").touch()
    for folder, name, told in (
        (".", "docs/a.md", ""),
        ("docs", "a.md", "a.md here is docs/a.md from the top of the repository: to protect this file, reserve "),
        ("docs", str(tmp_path / "docs" / "a.md"), "here is docs/a.md from the top of the repository"),
        ("docs", "docs/a.md", ""), ("docs", "new.md", ""),
    ):  # fmt: skip
        monkeypatch.chdir(tmp_path / folder)
        code, _, said = run(bus.url, "lock", name)
        assert code == 0 and told in said and said.count("\n") == (2 if told else 1), name


def test_names_are_reserved_listed_and_released(bus):
    assert run(bus.url, "locks") == (0, "", "agent_bus.py locks: nothing is reserved\n")
    code, fence, said = run(bus.url, "lock", "src/a.py", "src/db/*", "--ttl", "10m", "--why", "T2")
    assert code == 0 and fence.strip().isdigit() and 'src/a.py "src/db/*": yours for 10m' in said
    code, out, _ = run(bus.url, "locks")
    assert code == 0 and out.startswith("dell, ") and out.endswith(' more: src/a.py "src/db/*": T2\n')
    code, out, _ = run(bus.url, "locks", "src/db/x", "--json")
    assert code == 0 and json.loads(out)["fence"] == int(fence)
    nothing = (0, "", "agent_bus.py locks: there is no such reservation\n")
    assert run(bus.url, "locks", "src/b.py") == run(bus.url, "locks", "--holder", "nano") == nothing
    assert run(bus.url, "locks", "src/b.py", "--json") == (0, "", "")
    code, out, said = run(bus.url, "lock", "src/db/x", name="nano")
    assert (code, out) == (3, "") and "dell holds src/db/* (src/db/x was asked for) until " in said
    assert run(bus.url, "unlock", "src/a.py")[0] == 0
    assert run(bus.url, "lock", "c", name="nano")[0] == 0
    assert run(bus.url, "locks", "c")[1].endswith(" more: c\n")
    code, _, said = run(bus.url, "unlock", "--fence", fence.strip())
    assert code == 0 and "released: 1" in said
    code, _, said = run(bus.url, "unlock", "--fence", fence.strip())
    every = f"agent_bus.py unlock: python3 {ROOT}/tools/bus_lock.py list shows all reservations\n"
    assert code == 3 and said == f"agent_bus.py unlock: nothing is released: this reservation has ended\n{every}"
    code, _, said = run(bus.url, "unlock", "src/*")
    assert code == 3 and "you have reserved nothing by that name, or it has ended" in said
    code, _, said = run(bus.url, "unlock", "d.py", "e.py")
    assert code == 3 and said.endswith(f"or it has ended\nagent_bus.py unlock: reserved by nobody: d.py e.py\n{every}")
    code, _, said = run(bus.url, "unlock", "c")
    assert code == 3 and "\nagent_bus.py unlock: reserved by nano, " in said and said.endswith(f" more: c\n{every}")


def test_a_pattern_finds_who_holds_it_and_what_may_meet_it(bus):
    held = ["x/db/*", "x/db/a.py", "x/web/**", "y/[id]/*.py", "z"]
    for name in held:
        assert run(bus.url, "lock", name, name="h0")[0] == 0
    code, _, said = run(bus.url, "unlock", "x/db/*", name="you")
    assert code == 3 and "reserved by h0, " in said and "nobody" not in said
    for pattern, found in (("x/db/*", [0, 1]), ("x/*/a.py", [0, 1, 2]), ("x/web/b/?", [2]), ("y/*/a*", [3]),
                           ("**", [0, 1, 2, 3, 4]), ("x/db/*.md", [0]), ("z/**", []), ("x/db/b*", [0])):
        rows = run(bus.url, "locks", pattern, "--json")[1].splitlines()
        assert [json.loads(row)["names"] for row in rows] == [[held[number]] for number in found], pattern
    assert run(bus.url, "unlock", "q/*", name="you")[2].count('reserved by nobody: "q/*"') == 1


def test_on_a_terminal_the_sentence_has_the_command_that_releases(bus, monkeypatch, capsys):
    assert on_terminal("lock", "a", AGENT_BUS_URL=bus.url, AGENT_NAME="dell") == ""
    for name, value in (("AGENT_BUS_URL", bus.url), ("AGENT_NAME", "dell")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    unlock = f"python3 {ROOT}/tools/bus_lock.py unlock"
    for given, releases in ((["a"], "a"), (["a b", "src/*", "--channel", "ops"], "--channel ops 'a b' 'src/*'")):
        assert bus_lock.main(["lock", *given]) == 0
        out, said = capsys.readouterr()
        assert out == "" and said.endswith(f"; {unlock} {releases} releases it before\n")
        assert bus_lock.main(["unlock", *shlex.split(releases)]) == 0
        assert "released: " in capsys.readouterr().err


def test_a_ttl_that_the_bus_does_not_give_is_said(bus):
    most, least = ", the most that a bus gives\n", ", the least that a bus gives\n"
    assert run(bus.url, "lock", "a", "--ttl", "999d")[2].endswith(most)
    assert run(bus.url, "lock", "a", "--ttl", "0")[2].endswith(least)
    assert "that a bus gives" not in run(bus.url, "lock", "a", "--ttl", "12h")[2] + run(bus.url, "lock", "b")[2]


def test_a_person_is_told_what_it_waits_for(bus, monkeypatch):
    """It was silent for as long as --wait says."""
    fence, said = peers.ask(bus, "POST", "/lock", {"from": "nano", "names": ["a"]}).json["fence"], []

    def tell(line):
        said.append(line)
        peers.ask(bus, "POST", "/unlock", {"from": "nano", "fence": fence})

    monkeypatch.setattr(bus_recv, "PEOPLE", [tell])
    for _ in range(2):  # the second time it has the name at once, and there is nothing to say
        assert bus_lock.lock(bus.url, {"from": "dell", "names": ["a"]}, 60)[0]["fence"] > fence
        assert len(said) == 1 and said[0].startswith("waiting for 1m at most: nano holds a until ")


def test_it_waits_for_who_holds_the_names(bus):
    reply = peers.ask(bus, "POST", "/lock", {"from": "nano", "names": ["a"]})
    answers = []
    waiting = threading.Thread(target=lambda: answers.append(run(bus.url, "lock", "a", "--wait", PATIENCE)))
    waiting.start()
    [row] = wait_until(lambda: [each for each in json.loads(bus.get("/locks"))["locks"] if each["waiting"]])
    assert row["waiting"] == ["dell"] and "; dell waits" in run(bus.url, "locks")[1]
    peers.ask(bus, "POST", "/unlock", {"from": "nano", "fence": reply.json["fence"]})
    waiting.join(2 * PATIENCE)
    assert answers[0][0] == 0 and int(answers[0][1]) > reply.json["fence"]


def test_shared_names_and_channels(bus):
    for name in ("dell", "nano"):
        assert run(bus.url, "lock", "a", "--shared", name=name)[0] == 0
    assert run(bus.url, "lock", "a", "--channel", "other", name="cleo")[0] == 0
    assert "dell (shared)" in run(bus.url, "locks", "a")[1]
    assert run(bus.url, "locks")[1].count("\n") == 3 and "cleo on other, " in run(bus.url, "locks")[1]
    assert run(bus.url, "locks", AGENT_BUS_CHANNEL="other")[1].count("\n") == 1


def test_with_a_token_it_needs_no_name(tmp_path):
    token = mint(tmp_path / "bus.db", dell=[])["dell"]
    with Server(tmp_path / "bus.db") as bus:
        assert run(bus.url, "lock", "a", name="", AGENT_BUS_TOKEN=token)[0] == 0
        assert run(bus.url, "locks", AGENT_BUS_TOKEN=token)[1].startswith("dell, ")
        assert run(bus.url, "locks")[0] == 1


@pytest.mark.parametrize("arguments, words", [
    (("lock",), "required: PATH"), (("unlock",), "give paths, or --fence N"),
    (("unlock", "a", "--fence", "1"), "give paths, or"), (("lock", "a", "--ttl", "soon"), "--ttl"),
    (("unlock", "--fence", "x"), "--fence"),
])  # fmt: skip
def test_a_wrong_command_line_is_said(arguments, words):
    code, out, said = run(refusing(), *arguments)
    assert (code, out) == (2, "") and words in said


def test_what_the_bus_refuses_and_a_missing_bus_are_one_sentence(bus):
    code, _, said = run(bus.url, "lock", "a//b")
    assert code == 1 and "without //" in said and said.count("\n") == 1
    code, _, said = run(bus.url, "lock", "a", name="")
    assert code == 2 and "Set AGENT_NAME" in said
    code, _, said = run(refusing(), "lock", "a")
    assert code == 75 and "no bus at" in said and said.count("\n") == 1
