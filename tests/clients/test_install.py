"""`agent-bus install AGENT` and `uninstall`: what is written for each agent program, and that every other byte stays.

The real programs read these files in tests/integrations/test_agents.py.
"""

import errno
import json
import os
import random
import re
import subprocess
import sys

import pytest

from tests.clients.test_clients import refusing
from tests.clients.test_install_claude import shook_hands, tree
from tests.kit.peers import invite
from tests.kit.processes import PATIENCE, ROOT, Server, no_settings
from tools import bus_edit, bus_install

sys.path.append(str(ROOT / "tools"))
import bus_agents
import bus_change
import bus_doctor_way

import bus_recv

AGENTS = sorted(bus_agents.AGENTS)
JSONC_FILES = {
    "nothing": None,
    "an empty text": "",
    "an empty object": "{ }\n",
    "comments": '// mine\n{\n  "a": 1, // one\n  /* two */ "b": [\n    2,\n  ],\n  // the end\n}\n',
    "one line": '{"mcpServers": {"x": {"command": "y"}},   "mcp": {"z": 1.0}, "hooks": {"Stop": []}}',
    "tabs": '{\n\t"hooks": {\n\t\t"Stop": [{"hooks": [{"command": "other"}]}]\n\t},\n\t"mcpServers": {}\n}',
    "Windows": '{\r\n    "\u00e9": {\r\n        "x": "\\u00e9"\r\n    }\r\n}\r\n',
}
TOML_FILES = {
    "nothing": None,
    "an empty text": "",
    "no end of line": '# mine\nmodel = "x"',
    "servers": '[mcp_servers.x]\ncommand = "y" # why\n\n# the end\n',
    "Windows": 'a = [\r\n  1,\r\n]\r\n',
    "a text": 'a = """\n[mcp_servers.bus]\ncommand = "agent-bus-mcp"\n"""\nb = "" # \'\'\'\n',
}
JSON_FILES = {kind: text for kind, text in JSONC_FILES.items() if kind != "comments"}
FILES = {"json": JSON_FILES, "jsonc": JSONC_FILES, "toml": TOML_FILES}
LATER = {  # what somebody changes meanwhile, by format
    **dict.fromkeys(("json", "jsonc"), lambda text: bus_edit.edited(
        "jsonc", text, [(("later",), {"x": [1]}), (("hooks", "Stop", None), {"y": 2})])),
    "toml": lambda text: f'# later\n{text}\n[projects."/x"]\ntrust_level = "trusted"\n',
}


def kinds_of(name):
    """What the files of an agent program may be before: what is in FILES for one of their formats."""
    agent = bus_agents.AGENTS[name]
    return sorted({kind for file in (agent.servers, agent.hooks) if file for kind in FILES[file.form()]})


BEFORE = [(name, kind) for name in AGENTS for kind in kinds_of(name)]


def files_of(name):
    """The paths and formats of an agent program's files, with HOME as it is."""
    agent = bus_agents.AGENTS[name]
    return {file.path(): file.form() for file in (agent.servers, agent.hooks) if file}


@pytest.fixture
def install(house, tmp_path, monkeypatch, capsys):
    """Runs `agent-bus install` or `uninstall` in this process; what it says."""
    no_settings(monkeypatch)
    monkeypatch.setattr(sys, "argv", [str(ROOT / "tools" / "agent_bus.py")])

    def command(*arguments, code=0, **env):
        with monkeypatch.context() as patch:
            for name, value in {"AGENT_BUS_STATE_DIR": str(tmp_path / "state"), **env}.items():
                patch.setenv(name, value)
            try:
                got = bus_install.main(arguments)
            except SystemExit as ended:
                got = ended.code
        said = "".join(capsys.readouterr())
        assert got == code, said
        return said

    return command


@pytest.fixture
def before(house):
    """Writes what the files of an agent program are before the install."""

    def write(name, kind):
        for path, form in files_of(name).items():
            text = FILES[form].get(kind, "")
            if text is not None:
                os.makedirs(os.path.dirname(path), exist_ok=True)
                with open(path, "w", newline="") as file:
                    file.write(text)
        return tree(house)

    return write


@pytest.mark.parametrize("name, kind", BEFORE)
def test_uninstall_leaves_every_byte_as_it_was(name, kind, install, house, before):
    was = before(name, kind)
    shown = install("install", name, "--dry-run")
    assert tree(house) == was and "+++ " in shown
    install("install", name)
    written = tree(house)
    assert "already" in install("install", name) and tree(house) == written
    assert written != was and all(os.path.exists(path) for path in files_of(name) if path in shown)
    assert "--- " in install("uninstall", name, "--dry-run") and tree(house) == written
    install("uninstall", name)
    assert tree(house) == was
    assert "nothing is changed" in install("uninstall", name, code=1)


def test_uninstall_removes_the_files_that_wake_a_session_but_those_of_one_that_runs(install, before, tmp_path):
    before("claude", "none")
    state = tmp_path / "state"
    install("install", "claude")
    here = state / "wake" / bus_recv.file_name("http://127.0.0.1:9") / "default"
    here.mkdir(parents=True)
    for file in ("dell.wake", "dell.wake~lock", "nano.wake", "nano.wake~lock", "orin.wake", "wake.log"):
        for folder in (state, here):  # those of an older version, which were for all buses, too
            (folder / file).touch()
    with open(state / "nano.wake~lock", "r+b") as older, open(here / "nano.wake~lock", "r+b") as lock:
        assert bus_recv.try_lock(older, older.name) and bus_recv.try_lock(lock, lock.name)
        install("uninstall", "claude", "--dry-run")
        assert (here / "dell.wake").exists()
        install("uninstall", "claude")
    for folder in (state, here):
        left = sorted(path.name for path in folder.glob("*wake*") if path.is_file())
        assert left == ["nano.wake", "nano.wake~lock", "wake.log"]


@pytest.mark.parametrize("name, kind, remembers", [
    (name, kind, bool((AGENTS.index(name) + kinds_of(name).index(kind)) % 2)) for name, kind in BEFORE
])  # fmt: skip
def test_if_somebody_changed_the_file_only_our_entries_go(name, kind, remembers, install, house, before, tmp_path):
    """Also without what was remembered at the install: with each second kind of file, and each kind with some agent."""
    before(name, kind)
    install("install", name)
    for path, form in files_of(name).items():
        if os.path.exists(path):
            with open(path, newline="") as file:
                text = file.read()
            with open(path, "w", newline="") as file:
                file.write(LATER[form](text))
    install("uninstall", name, **({} if remembers else {"AGENT_BUS_STATE_DIR": str(tmp_path / "another")}))
    for path, form in files_of(name).items():
        if os.path.exists(path):
            with open(path, newline="") as file:
                left = file.read()
            was = FILES[form].get(kind, "")
            assert "bus_" not in left and ("// mine" in left) == ("// mine" in (was or ""))
            if form == "toml":
                assert left.split() == LATER["toml"](was or "").split()
            else:
                expected, found = (bus_edit.parsed(text).value for text in (LATER["jsonc"](was or "{}"), left))
                found.pop("version", 0)  # the hooks of some programs need it, whoever writes the file
                assert found == expected or (not remembers and full(found) == full(expected))


def full(value):
    """Without what is empty: when nothing is remembered, nobody knows whether we made it."""
    if isinstance(value, dict):
        return {key: full(inner) for key, inner in value.items() if inner not in ({}, [])}
    return value


@pytest.mark.parametrize("name", AGENTS)
@pytest.mark.parametrize("text", ["{", '{"a" 1}', "[a\n", b"\xff"])
def test_a_file_that_cannot_be_read_is_left_alone(name, text, install, house):
    path = bus_agents.AGENTS[name].servers.path()
    if path.endswith(".toml") and sys.version_info < (3, 11) and text != b"\xff":
        pytest.skip("this Python reads no TOML")
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as file:
        file.write(text if isinstance(text, bytes) else text.encode())
    was = tree(house)
    for command in ("install", "uninstall"):
        said = install(command, name, code=1)
        assert said.count("\n") == 1 and "correct it first" in said and path in said
    assert tree(house) == was


@pytest.mark.parametrize("text", ['{"a": 1,}', '{"a": [1,]}', '// mine\n{"a": 1}', '{"a": 1} /* mine */\n'])
@pytest.mark.parametrize("file", [".claude.json", ".claude/settings.json", ".codex/hooks.json"])
def test_what_its_program_would_not_read_is_not_taken_for_json(file, text, install, house):
    (house / file).parent.mkdir(exist_ok=True)
    (house / file).write_text(text)
    was, name = tree(house), "codex" if "codex" in file else "claude"
    said = install("install", name, code=1)
    assert f"{house / file} is left as it is, because it is not JSON: correct it first" in said
    assert tree(house) == was


def test_a_byte_order_mark_is_not_in_the_way(install, house):
    (house / ".claude.json").write_text('\ufeff{"a": 1}', encoding="utf-8")
    install("install", "claude")
    assert '"mcpServers"' in (house / ".claude.json").read_text("utf-8")


def test_our_entries_can_be_removed_from_a_file_that_somebody_has_damaged(install, house):
    install("install", "claude")
    (house / ".claude.json").write_text((house / ".claude.json").read_text().rstrip().removesuffix("}") + ',"a": 1,}')
    install("uninstall", "claude")
    assert (house / ".claude.json").read_text().split() == ['{', '"a":', "1,}"]


@pytest.mark.parametrize("command", ["install", "uninstall"])
def test_what_another_program_writes_in_the_same_moment_stays(command, install, house, before, monkeypatch):
    """A session of Claude Code writes ~/.claude.json several times a minute."""
    before("claude", "tabs")
    if command == "uninstall":
        install("install", "claude")
        (house / ".claude.json").write_text((house / ".claude.json").read_text() + "\n")
    sync, meanwhile = os.fsync, '{"numStartups": 4}'

    def write(file):
        sync(file)
        (house / ".claude.json").write_text(meanwhile)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", write)
        assert "another program has just changed" in install(command, "claude", code=1)
    assert (house / ".claude.json").read_text() == meanwhile
    assert not [path for path in house.iterdir() if ".claude.json." in path.name]
    install("install", "claude")
    install("uninstall", "claude")
    assert (house / ".claude.json").read_text() == meanwhile


def test_a_file_beside_it_stays_and_no_link_is_followed(install, house):
    file, beside, mine = house / ".claude.json", house / ".claude.json.new", house / "mine.txt"
    file.write_text("{}")
    mine.write_text("mine")
    beside.symlink_to(mine)
    install("install", "claude")
    assert mine.read_text() == "mine" and beside.is_symlink() and "mcpServers" in file.read_text()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_as_root_a_file_stays_that_of_its_owner(install, house):
    file = house / ".claude.json"
    file.write_text("{}")
    os.chown(file, 12345, 12346)
    install("install", "claude")
    assert (file.stat().st_uid, file.stat().st_gid) == (12345, 12346) and "mcpServers" in file.read_text()


@pytest.mark.parametrize("name", AGENTS)
def test_what_is_installed_again_with_other_options_is_replaced(name, install, house, before):
    was = before(name, "tabs")
    install("install", name, "--name", "alice")
    install("install", name, "--name", "bob", "--url", "http://127.0.0.1:9/")
    text = b"".join(filter(None, tree(house).values()))
    assert b"alice" not in text and b"bob" in text and b"http://127.0.0.1:9" in text
    install("uninstall", name)
    assert tree(house) == was


@pytest.mark.parametrize("name", AGENTS)
def test_the_entry_of_the_server_runs_in_every_folder(name, install, house, bus, tmp_path):
    install("install", name, "--url", bus.url, "--name", "alice")
    entry = entry_of(name)
    if isinstance(entry["command"], list):  # as OpenCode wants it
        entry = {"command": entry["command"][0], "args": entry["command"][1:], "env": entry["environment"]}
    assert entry["env"]["AGENT_NAME"] == "alice" and entry["env"]["AGENT_BUS_URL"] == bus.url
    (tmp_path / "project").mkdir()
    assert shook_hands(entry, tmp_path / "project", {"HOME": str(house), "PATH": os.environ["PATH"]}) == "agent-bus"


def entry_of(name):
    servers = bus_agents.AGENTS[name].servers
    with open(servers.path()) as file:
        text = file.read()
    value = json.loads(text) if servers.form() != "toml" else pytest.importorskip("tomllib").loads(text)
    for key in servers.at:
        value = value[key]
    return value


HOOKED = [name for name in AGENTS if bus_agents.AGENTS[name].dress in bus_agents.load_hook().DRESSES]


@pytest.mark.parametrize("name", HOOKED)
def test_the_hook_that_is_written_runs_at_each_event(name, install, house, bus, tmp_path):
    install("install", name, "--url", bus.url, "--name", "alice")
    with open(bus_agents.AGENTS[name].hooks.path()) as file:
        events = json.load(file)["hooks"]
    agent = bus_agents.AGENTS[name]
    assert set(events) == {*bus_agents.load_hook().DRESSES[agent.dress], *agent.wake}
    for event, groups in events.items():
        (command,) = (hook.get("command") or hook["bash"] for group in groups for hook in group.get("hooks", [group]))
        given = json.dumps({"hook_event_name": event, "session_id": "s", "cwd": "/"})
        env = {"HOME": str(house), "PATH": os.environ["PATH"], "AGENT_BUS_STATE_DIR": str(tmp_path / "state")}
        done = subprocess.run(command, shell=True, input=given.encode(), env=env, capture_output=True, timeout=PATIENCE)
        assert done.returncode == 0 and not done.stderr, done.stderr


@pytest.mark.parametrize("name", AGENTS)
def test_by_http_only_a_url_a_name_and_the_name_of_a_variable_are_written(name, install, house):
    was = tree(house)
    env = {"AGENT_BUS_URL": "http://10.0.0.5:1/", "AGENT_BUS_TOKEN": "abt_1"}
    said = install("install", name, "--http", "--name", "alice", **env)
    entry = json.dumps(entry_of(name))
    assert "http://10.0.0.5:1/mcp" in entry and "alice" in entry and "AGENT_BUS_TOKEN" in entry
    assert "environment" in said and b"abt_1" not in b"".join(filter(None, tree(house).values()))
    assert "python" not in entry
    install("uninstall", name)
    assert tree(house) == was


def test_without_a_token_no_token_is_named_and_a_name_is_needed(install, house):
    assert "--name" in install("install", "codex", "--http", code=2)
    install("install", "codex", "--http", "--name", "alice", AGENT_BUS_CHANNEL="swarm")
    assert "TOKEN" not in str(entry_of("codex")) and "X-Agent-Channel" in str(entry_of("codex"))
    assert "--http is for" in install("install", "codex", "--http", "--url", "unix:/x", code=2)


def test_a_dry_run_shows_no_line_that_only_gets_a_comma(install, house):
    path = bus_agents.AGENTS["gemini"].servers.path()
    os.makedirs(os.path.dirname(path))
    with open(path, "w") as file:
        file.write('{\n  "key": "s3cret"\n}\n')
    said = install("install", "gemini", "--dry-run")
    assert "mcpServers" in said and "s3cret" not in said
    assert '+      "args": [' in said and re.search(r'^\+ +"command": ".*",$', said, re.MULTILINE), "it is JSON"


def test_of_a_file_that_cannot_be_written_no_temporary_name_is_told(install, house, monkeypatch):
    def refused(prefix, dir):
        raise PermissionError(errno.EACCES, "Permission denied", os.path.join(dir, f"{prefix}x"))

    monkeypatch.setattr(bus_change.tempfile, "mkstemp", refused)
    assert f"{bus_agents.AGENTS['gemini'].servers.path()}: Permission denied\n" in install("install", "gemini", code=2)


def test_codex_hands_on_each_variable_that_a_client_reads(install, house):
    install("install", "codex", "--url", "http://10.0.0.5:1")
    entry = entry_of("codex")
    assert {*entry["env_vars"], *entry["env"]} == bus_doctor_way.VARIABLES


def test_what_codex_writes_after_our_table_stays(install, house):
    """Codex writes the file itself, for example when a folder is trusted, and may put tables anywhere."""
    install("install", "codex")
    path = bus_agents.AGENTS["codex"].servers.path()
    about_ours, theirs = '\n[mcp_servers.bus.tools.bus_send]\nmode = "x"\n', '\n# mine\n[projects."/x"]\nlevel = "y"\n'
    with open(path, "a") as file:
        file.write(about_ours + theirs)
    install("uninstall", "codex")
    with open(path) as file:
        assert file.read().strip() == theirs.strip()


@pytest.mark.parametrize("name", HOOKED)
def test_the_hooks_of_others_stay_also_in_one_group_with_ours(name, install, house):
    install("install", name)
    path = bus_agents.AGENTS[name].hooks.path()
    with open(path) as file:
        settings = json.load(file)
    for groups in settings["hooks"].values():
        groups[0].get("hooks", groups).append({"type": "command", "command": "bus_hook.py --wait"})
    with open(path, "w") as file:
        json.dump(settings, file)
    install("uninstall", name)
    with open(path) as file:
        left = json.load(file)["hooks"]
    assert set(left) == set(settings["hooks"])
    assert json.dumps(left).count("bus_hook.py --wait") == len(left) and "--format" not in json.dumps(left)


@pytest.mark.parametrize(
    "text, left",
    [
        ('{ // c\n "bus": 1, "d": 2}', '{ // c\n "d": 2}'),
        ('{"a": 1, // c\n "bus": 1}', '{"a": 1 // c\n }'),
        ('{"a": 1, // c\n "bus": 1\n}', '{"a": 1 // c\n}'),
        ('{"bus": 1, "d": 2}', '{ "d": 2}'),
        ('{"a": 1, "bus": 1 /* c */, "d": 2}', '{"a": 1, "d": 2}'),
        ('{"a": [1], "bus": 1,}', '{"a": [1],}'),
        ('{"bus": 1,}', "{}"),
        ('{"bus": 1 // c\n}', "{ // c\n}"),
    ],
)
def test_an_entry_that_somebody_has_moved_goes_alone(text, left):
    assert bus_edit.without("json", text, lambda path, of: path == ("bus",), None) == left


def test_random_texts_come_back_after_an_edit():
    """JSON of any shape, with comments, commas and white space anywhere."""
    dice = random.Random(18)

    def blank():
        return dice.choice(["", "", " ", "\n", "\n  ", " // c }\n", "/* ] */", "\t"])

    def text(depth):
        kind = dice.randrange(5 if depth else 3)
        if kind < 3:
            return ["1", '"a\\"}//"', "null"][kind]
        keys = [f'"k{dice.randrange(10**6)}"{blank()}:{blank()}' if kind == 3 else "" for _ in range(dice.randrange(4))]
        inside = ",".join(f"{blank()}{key}{text(depth - 1)}{blank()}" for key in keys)
        inside += blank() if not keys else "," + blank() if dice.random() < 0.3 else ""
        return f"{'[{'[kind == 3]}{inside}{']}'[kind == 3]}"

    tried = 0
    while tried < 400:
        before = f"{blank()}{text(4)}{blank()}"
        if not isinstance(bus_edit.parsed(before).value, dict):
            continue
        tried += 1
        added = [(("bus", "x"), {"command": "y"}), (("hooks", "Stop", None), {"z": 1})]
        after = bus_edit.edited("jsonc", before, added)
        value = bus_edit.parsed(after).value
        assert value == {**bus_edit.parsed(before).value, "bus": {"x": {"command": "y"}}, "hooks": {"Stop": [{"z": 1}]}}
        left = bus_edit.without("jsonc", after, lambda path, of: path in (("bus", "x"), ("hooks", "Stop", 0)), before)
        assert "".join(left.split()) == "".join(before.split()), (before, after, left)


def test_options_of_an_agent_are_not_for_the_service(install):
    for option in (["--http"], ["--url", "x"], ["--name", "x"]):
        assert "agent program" in install("install", "service", *option, code=2)
    assert "unrecognized arguments: --port" in install("install", "claude", "--port", "1", code=2)


@pytest.mark.parametrize("name", AGENTS)
@pytest.mark.parametrize("how", [[], ["--http", "--name", "alice"]])
def test_a_url_that_is_none_is_refused_and_nothing_is_written(name, how, install, house):
    was = tree(house)
    assert "'foo' is not the URL of a bus" in install("install", name, *how, "--url", "foo", code=2)
    assert "'foo' is not the URL of a bus" in install("install", name, *how, code=2, AGENT_BUS_URL="foo")
    assert tree(house) == was


def test_it_says_which_bus_and_name_a_session_will_have_and_whether_the_bus_answers(install, house, bus):
    said = install("install", "claude", "--url", bus.url, "--name", "alice")
    assert f"the bus is {bus.url}: it answers. The name of a session there is alice\n" in said
    said = install("install", "claude", "--url", bus.url, AGENT_NAME="zoe")
    assert "there is zoe if AGENT_NAME is set where it starts; to have it written, give --name zoe\n" in said
    said = install("install", "claude", AGENT_BUS_URL=refusing())
    assert ": it does not answer now (Connection refused). The name of a session there is the title of" in said


def test_with_http_it_says_what_is_still_to_do_and_nothing_of_a_hook(install, bus):
    codex = install("install", "codex", "--http", "--name", "a", "--url", bus.url)
    assert "Codex has no hook of ours" in codex and "runs a hook" not in codex
    assert "type /permissions in a session" in install("install", "gemini", "--http", "--name", "a", "--url", bus.url)


def test_it_says_that_the_token_which_is_set_has_another_name(install, tmp_path):
    with Server(tmp_path / "bus.db") as closed:
        token = invite(closed, "alice")
        said = [install("install", "claude", "--url", closed.url, "--name", name, AGENT_BUS_TOKEN=token)
                for name in ("dell", "alice")]  # fmt: skip
    assert "it answers, but the token that is set here sends as alice only. The" in said[0] and "only" not in said[1]


@pytest.mark.parametrize("name", AGENTS)
def test_a_line_of_its_own_says_that_sessions_get_no_mail_without_a_token_that_the_bus_takes(name, install, tmp_path):
    with Server(tmp_path / "bus.db") as closed:
        token = invite(closed, "alice")
        said = {set_here: install("install", name, "--url", closed.url, AGENT_BUS_TOKEN=set_here)
                for set_here in ("", f"{token[:-4]}AAAA", token)}  # fmt: skip
    none, wrong, right = said.values()
    assert "\nsessions get no mail until this machine has a token: on the machine of the bus, run " in none
    assert "\nsessions get no mail: the bus does not accept the token that is set here, which is wrong, cut" in wrong
    assert "no mail" not in right
    for each in (none, wrong):
        assert f"the bus is {closed.url}: it answers. The name" in each and "curl" not in each
        assert "invite NAME, and paste the line that it prints here\n" in each
