"""`agent-bus install claude`: what is written for Claude Code, and that what is not ours stays."""
import json
import os
import subprocess

import pytest

from tests.clients.test_agent_bus import SCRIPT, mails
from tests.clients.test_clients import run
from tests.kit.processes import PATIENCE

pytestmark = pytest.mark.usefixtures("home")


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
    assert done.stdout, done.stderr
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


def test_only_without_a_claude_on_the_path_it_says_so(house, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert ".claude/settings.json; there is no `claude` on your PATH yet\n" in install("install", "claude")
    (tmp_path / "bin" / "claude").write_text("#!/bin/sh\n")
    (tmp_path / "bin" / "claude").chmod(0o755)
    assert "PATH" not in install("install", "claude")


OTHERS = {
    "another server": ('{"mcpServers": {"bus": {"command": "city-bus"}}}', "(city-bus): claude mcp remove bus"),
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


@pytest.mark.parametrize("name, file, text, says", [
    ("claude", ".claude.json", '{"mcpServers": {"bus": {"type": "http", "url": "http://u:SECRET@b:1/mcp?key=SECRET"}}}',
     "(http://b:1/mcp): claude mcp remove bus -s user, then install again"),
    ("codex", ".codex/config.toml", '[mcp_servers.bus]\nargs = ["SECRET"]\ncommand = "city-bus"\n',
     "(city-bus): codex mcp remove bus, then install again"),
    ("gemini", ".gemini/settings.json", '{"mcpServers": {"bus": {"httpUrl": "http://b:1"}}}',
     "(http://b:1): remove or rename it there, then install again"),
    ("cursor", ".cursor/mcp.json", '{"mcpServers": {"bus": 5}}', ": remove or rename it there, then install again"),
])  # fmt: skip
def test_of_a_server_that_has_our_name_it_says_what_it_is_and_what_to_do(name, file, text, says, house):
    (house / file).parent.mkdir(exist_ok=True)
    (house / file).write_text(text)
    said = install("install", name, code=1)
    assert f"{house / file} has a server bus already{' ' * (says[0] == '(')}{says}\n" in said and "SECRET" not in said
    assert (house / file).read_text() == text


@pytest.mark.parametrize("command", ["install", "uninstall"])
def test_another_agent_gets_the_ones_that_are_known(command):
    code, out, err = run(SCRIPT, command, "emacs")
    assert (code, out, err.count("\n")) == (2, "", 1) and "claude, codex, " in err
