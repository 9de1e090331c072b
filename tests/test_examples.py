"""The examples run, and show what they say."""
import json
import os
import re
import runpy
import subprocess
import sys

import pytest

from tests.clients.test_clients import refusing
from tests.kit import forked
from tests.kit.peers import Peer, invite
from tests.kit.processes import PATIENCE, ROOT, wait_until

pytestmark = pytest.mark.usefixtures("home")

SECRET = b"-----BEGIN PRIVATE KEY-----\n"


def start(name, *arguments, **env):
    command = [sys.executable, str(ROOT / "examples" / f"{name}.py"), *map(str, arguments)]
    whole = {"PYTHONUNBUFFERED": ""}  # lines of several processes do not mix
    return forked.Popen(command, env={**os.environ, **whole, **env}, stdout=subprocess.PIPE, text=True)


def run(name, *arguments, **env):
    """Exit code and stdout."""
    process = start(name, *arguments, **env)
    out = process.communicate(timeout=3 * PATIENCE)[0]
    return process.returncode, out


def test_five_agents_handle_an_incident_on_a_bus_that_is_killed_twice(bus):
    process = start("incident", AGENT_BUS_URL=bus.url)
    heard, ends = [], ["triage: watch says", "triage: logs says"]
    for line in process.stdout:
        heard.append(line)
        if ends and line.startswith(ends[0]):
            ends.pop(0)
            bus.kill()
            bus.start()
    assert process.wait(PATIENCE) == 0 and not ends
    assert len(set(heard)) == len(heard) and sum("the cause is known" in line for line in heard) == 4
    (url,) = (line.split()[-1] for line in heard if line.startswith("all that was said: "))
    thread = json.loads(bus.get(url[len(bus.url) :]))["messages"]
    assert [(one["from"], one["type"]) for one in thread[:1] + thread[-5:]] == [
        ("watch", "alarm"), ("triage", "finding"), *[("scribe", "closed")] * 4,
    ]  # fmt: skip
    assert sorted(one["from"] for one in thread if one["type"] == "answer") == ["logs", "metrics"]
    assert len(thread) == 10 and {one["reply_to"] for one in thread[1:]} < {one["id"] for one in thread}


def test_a_queue_of_jobs_is_done_though_a_worker_dies(bus):
    code, out = run("work_queue", AGENT_BUS_URL=bus.url)
    *results, summary = out.splitlines()
    assert (code, summary) == (0, "1 of 2 workers died, 6 of 6 jobs are done")
    assert sorted(results) == [f"{n} squared is {n * n}, on attempt {2 if n == 3 else 1}" for n in range(6)]


def test_three_agents_change_the_same_files_and_lose_nothing(bus):
    assert run("reserve", AGENT_BUS_URL=bus.url) == (0, "36 of 36 names are there\n")
    assert json.loads(bus.get("/locks"))["locks"] == []


def test_a_reminder_is_sent_to_who_has_not_answered(bus):
    code, out = run("reminder", AGENT_BUS_URL=bus.url)
    lines = ["to boss: the report of quick", "to slow: where is the report?", "to boss: the report of slow"]
    assert (code, out.splitlines()) == (0, [*lines, "0 reminders are left"])


def test_a_webhook_is_told_of_an_urgent_message_in_numbers():
    code, out = run("pager")
    assert code == 0 and out.endswith('the webhook got: {"text": "agent-bus: 1 urgent message for lead from gb10"}\n')
    assert out.startswith("page-me: when a message for lead has the priority high") and "SECRET" not in out


def hand_over(bus, directory, to, spoil=lambda source: None):
    """Exit codes of who offers and who accepts, what both said, and what was taken, if anything."""
    source, target = directory / f"for-{to}", directory / f"by-{to}"
    source.write_bytes(SECRET)
    source.chmod(0o600)
    offering = start("handover", "offer", source, to, AGENT_BUS_URL=bus.url, AGENT_NAME="spark")
    wait_until(lambda: to in json.loads(bus.get("/inbox"))["recipients"].get("default", {}))
    spoil(source)
    code, said = run("handover", "accept", target, AGENT_BUS_URL=bus.url, AGENT_NAME=to)
    assert offering.communicate(timeout=PATIENCE)[0] == said
    return offering.returncode, code, said, target


def test_a_sensitive_file_changes_hands_and_never_touches_the_bus(bus, tmp_path):
    *ends, _, target = hand_over(bus, tmp_path, "dell")
    assert ends == [0, 0] and target.read_bytes() == SECRET and target.stat().st_mode & 0o777 == 0o600
    log = bus.get("/log")
    assert b"for-dell" in log and b"PRIVATE KEY" not in log


def another(source):
    source.write_bytes(SECRET.lower())


def open_to_all(source):
    source.chmod(0o644)


def elsewhere(source):
    source.rename(source.with_name("other"))
    source.symlink_to(source.with_name("other"))


@pytest.mark.parametrize("spoil, reason", [
    (another, "hash"), (open_to_all, "mode 600"), (elsewhere, "symbolic links"), (os.unlink, "No such file"),
])  # fmt: skip
def test_a_file_that_is_not_what_was_offered_is_not_taken(spoil, reason, bus, tmp_path):
    *ends, said, target = hand_over(bus, tmp_path, "dell", spoil)
    assert ends == [1, 1] and said.startswith("not taken: ") and reason in said and not target.exists()


def test_two_hosts_talk():
    code, out = run("two_hosts")
    if code == 77:
        pytest.skip(out.strip())
    assert code == 0 and "from=spark" in out and out.endswith("| Is T1 done?\n---\nIt is, on the other host.\n")


def test_a_secret_that_was_sent_is_found_and_redacted(bus):
    code, out = run("leaked_secret", AGENT_BUS_URL=bus.url)
    assert code == 0 and re.sub("[0-9a-f]{12,16}", "ID", out).splitlines() == [
        "bob reads: log in with (the password)",
        "ops: the message to bob is redacted; it was fetched",
        "ops: the message to carl is redacted; it was queued",
        "carl reads: (an operator has redacted this message: ID)",
        "ann reads: change the password, because of bob",
    ]
    assert b"swordfish" not in bus.get("/log")


@pytest.mark.parametrize(
    "name", ["incident", "work_queue", "handover", "two_hosts", "reserve", "leaked_secret", "reminder", "pager"]
)
def test_an_example_says_how_it_is_used(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", [*sys.path])
    for option, code, words in (("--help", 0, "show this help"), ("--wrong", 2, f"{name}.py: error: ")):
        monkeypatch.setattr(sys, "argv", [str(ROOT / "examples" / f"{name}.py"), option])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(sys.argv[0], run_name="__main__")
        assert (ended.value.code or 0) == code and words in "".join(capsys.readouterr())


@pytest.mark.parametrize(
    "call",
    [("incident",), ("work_queue",), ("reserve",), ("reminder",), ("handover", "accept", "x"), ("leaked_secret",)],
)
def test_an_example_without_a_bus_is_one_sentence(call):
    env = {**os.environ, "AGENT_BUS_URL": refusing(), "AGENT_NAME": "spark"}
    command = [sys.executable, ROOT / "examples" / f"{call[0]}.py", *call[1:]]
    done = forked.run(command, env=env, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 1 and done.stderr.startswith(f"{call[0]}: no bus at http://") and done.stdout == ""
    assert done.stderr.count("\n") == 1


def test_a_closed_bus_refuses_an_example_in_words(bus):
    invite(bus, "ops")
    wait_until(lambda: Peer(bus).send("GET", "/inbox").answer().status == 401)
    for name in ("incident", "work_queue", "reserve", "reminder"):
        done = forked.run([sys.executable, ROOT / "examples" / f"{name}.py"], capture_output=True, text=True,
                              timeout=PATIENCE, env={**os.environ, "AGENT_BUS_URL": bus.url})  # fmt: skip
        assert done.returncode == 1 and "token" in done.stderr and done.stderr.count("\n") == 1


def test_handover_asks_for_a_name():
    done = forked.run([sys.executable, ROOT / "examples" / "handover.py", "accept", "x"], capture_output=True,
                          text=True, timeout=PATIENCE)  # fmt: skip
    assert done.returncode == 2 and "AGENT_NAME is missing" in done.stderr


def test_every_example_is_tested_and_says_what_it_shows():
    ours = (ROOT / "tests" / "test_examples.py").read_text()
    for example in (ROOT / "examples").glob("*.py"):
        assert f'"{example.stem}"' in ours and "What it shows:" in example.read_text(), example
