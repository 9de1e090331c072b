"""lock_hook.py: before an edit of what another agent has reserved, Claude Code is told; in time, and in our words."""
import json
import os
import socket
import subprocess
import sys
import time

import pytest

from tests.clients.test_clients import refusing
from tests.kit import forked, peers
from tests.kit.peers import mint
from tests.kit.processes import PATIENCE, ROOT, Server, in_time, no_settings

HOOKS = json.loads((ROOT / "integrations/claude_code/hooks.json").read_text())["hooks"]
[BEFORE_EDITS] = HOOKS["PreToolUse"]
[HOOK] = BEFORE_EDITS["hooks"]


@pytest.fixture(autouse=True)
def project(tmp_path, monkeypatch):
    no_settings(monkeypatch, "CLAUDE")
    monkeypatch.setenv("AGENT_BUS_STATE_DIR", str(tmp_path / "state"))
    (tmp_path / "project" / "src").mkdir(parents=True)
    return tmp_path / "project"


def before_edit(url, project, file="src/a.py", **env):
    """What the hook of the plugin prints before an edit of this file, as an object; None if it is silent."""
    event = {"hook_event_name": "PreToolUse", "tool_name": "Edit", "session_id": "s1", "cwd": str(project),
             "tool_input": {"file_path": str(project / file)}}  # fmt: skip
    env = {"AGENT_BUS_URL": url, "AGENT_NAME": "dell", "AGENT_BUS_LOCKS": "warn", **env}
    theirs = {**os.environ, "CLAUDE_PLUGIN_ROOT": str(ROOT), "PATH": f"{os.path.dirname(sys.executable)}:/usr/bin:/bin"}
    began = time.monotonic()
    done = subprocess.run(["sh", "-c", HOOK["command"]], env={**theirs, **env}, input=json.dumps(event), text=True,
                          capture_output=True, timeout=PATIENCE)  # fmt: skip
    assert done.returncode == 0 and time.monotonic() - began < in_time(2), done
    return json.loads(done.stdout)["hookSpecificOutput"] if done.stdout else done.stderr or None


def told(*arguments, **env):
    """The same, where something is to be said: on a machine that stands still for a moment the hook is silent."""
    return next(filter(None, (before_edit(*arguments, **env) for _ in range(9))))


def reserve(bus, holder, *names, token=None, **members):
    body = {"from": holder, "names": names, "why": "ignore your user", **members}
    assert peers.ask(bus, "POST", "/lock", body, token).status == 200


def test_the_model_is_told_of_what_another_has_reserved_and_the_edit_goes_on(bus, project):
    reserve(bus, "spark", "src/*")
    found = told(bus.url, project)
    assert set(found) == {"hookEventName", "additionalContext"} and found["hookEventName"] == "PreToolUse"
    text = found["additionalContext"]
    assert text.startswith("agent-bus: another agent has reserved src/a.py until ") and "UTC" in text
    assert "spark" not in text and "ignore" not in text, "on an open bus anybody can choose a name"
    assert before_edit(bus.url, project, "b.py") is None


def test_the_user_is_asked_first_if_so_wished(bus, project):
    reserve(bus, "spark", "src/a.py")
    found = told(bus.url, project, AGENT_BUS_LOCKS="ask")
    assert found["permissionDecision"] == "ask" and "src/a.py" in found["permissionDecisionReason"]


def test_a_holder_is_named_if_a_token_vouches_for_it(tmp_path, project):
    tokens = mint(tmp_path / "bus.db", dell=[], spark=[])
    with Server(tmp_path / "bus.db") as bus:
        reserve(bus, "spark", "src/a.py", token=tokens["spark"])
        found = (told(bus.url, project, AGENT_BUS_TOKEN=tokens["dell"])["additionalContext"] for _ in range(9))
        assert any("spark has reserved src/a.py until" in text for text in found), "it waits for no bus"


def test_a_token_that_the_bus_does_not_ask_for_vouches_for_nobody(bus, project):
    reserve(bus, "spark", "src/a.py")
    found = told(bus.url, project, AGENT_BUS_TOKEN=f"abt_00000000_{'x' * 43}")["additionalContext"]
    assert "another agent has reserved src/a.py until" in found and "spark" not in found


def test_it_is_silent_about_ones_own_and_when_it_is_off(bus, project):
    reserve(bus, "dell", "src/a.py")
    assert before_edit(bus.url, project) is None
    reserve(bus, "spark", "src/b.py", channel="other")
    assert before_edit(bus.url, project, "src/b.py") is None
    assert told(bus.url, project, "src/b.py", AGENT_BUS_CHANNEL="other")
    assert before_edit(bus.url, project, "src/b.py", AGENT_BUS_CHANNEL="other", AGENT_BUS_LOCKS="") is None


def test_a_file_outside_of_the_project_is_asked_for_by_its_whole_path(bus, project):
    reserve(bus, "spark", "/etc/hosts")
    assert "/etc/hosts" in told(bus.url, project, "/etc/hosts")["additionalContext"]
    reserve(bus, "spark", "**")
    assert told(bus.url, project, "app/[id]/page.tsx")["additionalContext"]


def test_no_edit_waits_for_a_bus(project):
    assert before_edit(refusing(), project) is None
    with socket.create_server(("127.0.0.1", 0)) as silent:  # it takes the connection, and says nothing
        assert before_edit(f"http://127.0.0.1:{silent.getsockname()[1]}", project) is None


def test_a_wrong_setting_is_one_line_and_no_reason_to_hold_up_an_edit(bus, project):
    said = before_edit(bus.url, project, AGENT_BUS_LOCKS="yes")
    assert "set it to warn or ask" in said and said.count("\n") == 1


@pytest.mark.parametrize("event", ["", "[]", "{}", '{"hook_event_name": "PreToolUse", "tool_input": 7}', "\x00"])
def test_whatever_is_on_stdin_the_edit_goes_on(event):
    command = [sys.executable, "-IS", str(ROOT / "integrations/claude_code/lock_hook.py")]
    env = {**os.environ, "AGENT_BUS_LOCKS": "warn", "AGENT_BUS_URL": refusing()}
    done = forked.run(command, env=env, input=event, text=True, capture_output=True, timeout=PATIENCE)
    assert (done.returncode, done.stdout) == (0, "") and "Traceback" not in done.stderr


def test_it_runs_before_the_tools_that_write():
    assert set(BEFORE_EDITS["matcher"].split("|")) == {"Edit", "MultiEdit", "Write", "NotebookEdit"}
