"""session.py: which session has which name, whatever ends, comes back or gets the number of another.

The register is used here as the programs use it, but with processes that are made up: a life begins and ends at once.
"""
import os
import pathlib
import resource
import subprocess
import sys
import time

import pytest

import bus_recv
from tests.kit import sessions
from tests.kit.bad_servers import Scripted, answer
from tests.kit.processes import PATIENCE, ROOT, runs, wait_until
from tests.kit.sessions import name

sys.path[:0] = [str(ROOT / "integrations" / "claude_code"), str(ROOT / "tools")]
import notice  # noqa: E402
import processes  # noqa: E402
import session  # noqa: E402

project, lives = sessions.project, sessions.lives  # fixtures

SCRIPT = str(ROOT / "integrations" / "claude_code" / "bus_hook.py")


def register():
    (path,) = pathlib.Path(os.environ["AGENT_BUS_STATE_DIR"]).glob("names/*/default")
    return path


def test_a_session_that_got_the_number_of_an_ended_process_is_another_one(lives):
    """Case 41."""
    lives.begin(1)
    assert name(1, "a", "/x/web") == "web"
    lives.end(1)
    lives.begin(1)  # another program
    lives.begin(2)
    assert name(2, "b", "/x/web") == "web"


def test_a_full_disk_costs_no_session_its_name(lives):
    """The file may not grow, so the title of the fourth session has no room."""
    for process in range(1, 4):
        lives.begin(process)
        name(process, str(process), "/x/web")
    before = register().read_text()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before), limits[1]))
    try:
        with pytest.raises(OSError), session.Register() as names:
            names.names = {"zebra": {**session.EMPTY, "seen": names.now, "title": "t" * 300}, **names.names}
        with pytest.raises(OSError):
            names.file.close()  # as the end of the process does
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert register().read_text() == before
    assert [name(process, str(process), "/x/web") for process in range(1, 4)] == ["web", "web-2", "web-3"]


def test_what_is_resumed_in_another_order_gets_its_own_name_back(lives):
    """Case 42."""
    for process, id in ((1, "a"), (2, "b")):
        lives.begin(process)
        name(process, id)
    lives.end(1)
    lives.end(2)
    lives.begin(3)
    assert name(3, "b") == "api-2"
    lives.begin(4)
    assert name(4, "a") == "api"


def test_a_new_session_takes_no_name_that_a_session_of_today_may_come_back_to(lives):
    for process, id in ((1, "a"), (2, "b")):
        lives.begin(process)
        name(process, id)
    lives.end(2)
    lives.begin(3)
    assert name(3, "c") == "api-3"
    lives.begin(4)
    assert name(4, "b") == "api-2"


def test_a_session_whose_name_was_taken_meanwhile_is_told(lives):
    lives.begin(1)
    name(1, "a")
    lives.end(1)
    lives.begin(2)
    assert name(2, "c") == "api"
    lives.begin(3)
    assert session.this_session(3, "/x/api", "a")[:3] == ("api-2", (), "because api is another session")
    lives.end(3)
    lives.begin(4)
    assert name(4, "a") == "api-2", "it is its name now"


def test_clear_branch_and_fork_keep_the_name_and_its_ids(lives):
    lives.begin(1)
    assert [name(1, id) for id in ("a", "after clear", "after branch")] == ["api"] * 3
    lives.begin(2)
    assert name(2, "a fork") == "api-2"
    lives.end(1)
    lives.end(2)
    lives.begin(3)
    assert name(3, "a fork") == "api-2"
    lives.begin(4)
    assert name(4, "after clear") == "api"


def test_the_old_id_of_the_environment_does_not_move_the_name(lives, monkeypatch):
    """MCP servers and Monitors keep the id of the start, also when the session has become another one."""
    lives.begin(1)
    lives.begin(2)
    assert (name(1, "a"), name(2, "b")) == ("api", "api-2")
    lives.end(2)
    assert name(1, "b") == "api-2", "/resume within a session: now it is the other one"
    monkeypatch.setenv("CLAUDE_CODE_SESSION_ID", "a")
    assert name(1) == "api-2"
    lives.begin(3)
    assert name(3, "a") == "api"
    assert (name(1), name(1, "b")) == ("api-2", "api-2")


def test_a_server_that_asks_before_any_hook_takes_the_id_of_its_environment(lives, monkeypatch):
    lives.begin(1)
    lives.begin(2)
    assert (name(1, "a"), name(2, "b")) == ("api", "api-2")
    lives.end(1)
    lives.end(2)
    lives.begin(3)
    monkeypatch.setenv("CLAUDE_CODE_SESSION_ID", "b")
    assert name(3) == "api-2"
    monkeypatch.delenv("CLAUDE_CODE_SESSION_ID")
    assert name(3, "b") == "api-2"


def test_a_name_that_was_used_while_the_clock_was_ahead_is_free_again_before_that_day(lives, monkeypatch):
    """Of a container that ended; nobody outside can see whether its session lives, but for its last look."""
    real = time.time()
    lives.space = "pid:[2]"
    lives.begin(7)
    monkeypatch.setattr(time, "time", lambda: real + 31 * 86400)
    assert name(7, "a") == "api"
    monkeypatch.setattr(time, "time", lambda: real)
    lives.space = "pid:[1]"
    lives.begin(8)
    assert name(8, "b") == "api"


def test_two_pid_namespaces_share_a_state_directory(lives):
    lives.begin(7)
    assert name(7, "a") == "api"
    lives.space = "pid:[2]"  # its process 7 is another one, and ours cannot be seen from there
    lives.begin(7)
    assert name(7, "b") == "api-2"
    lives.space = "pid:[1]"
    assert name(7, "a") == "api"
    with session.Register() as names:
        names.names["api-2"]["seen"] -= 2 * session.DAY
        assert names.taken("") == {"api"}, "who was not seen for a day has ended"


def test_another_boot_is_over(lives):
    lives.begin(7)
    assert name(7, "a") == "api"
    register().write_text(register().read_text().replace(" boot ", " earlier "))
    lives.begin(8)
    assert name(8, "b") == "api"


def test_the_file_of_an_older_version_is_read(lives):
    lives.begin(1)
    lives.begin(2)
    name(1, "a")
    register().write_text("api 1\napi-2 2\napi-3 3\nodd {\n")
    assert (name(1, "a"), name(2, "b")) == ("api", "api-2")
    lives.begin(3)
    lives.begin(4)
    assert name(4, "c") == "api-4"


def test_agent_name_belongs_to_one_living_session(lives, monkeypatch):
    monkeypatch.setenv("AGENT_NAME", "dell")
    lives.begin(1)
    lives.begin(2)
    assert name(1, "a") == "dell"
    with pytest.raises(ValueError, match="dell is another session .process 1.: this one needs its own AGENT_NAME"):
        name(2, "b")
    lives.end(1)
    assert name(2, "b") == "dell"


def test_a_part_with_agent_name_and_one_without_are_one_session(lives, monkeypatch):
    lives.begin(1)
    assert name(1, "a") == "api"
    monkeypatch.setenv("AGENT_NAME", "dell")
    assert name(1) == "dell"
    monkeypatch.delenv("AGENT_NAME")
    assert session.this_session(1, "/x/api", "a")[:2] == ("dell", ("api",))


def test_a_folder_in_any_script_gives_a_name_that_is_the_same_each_time():
    for folder in ("проект", "项目", "プロジェクト", "مشروع", "🙂", "-", "é", "api-проект", "🙂api"):
        its = [each for each, _ in zip(session.wishes(f"/x/{folder}"), range(2))] if folder not in "-🙂" else ["x"]
        assert all(map(bus_recv.NAME.fullmatch, its)), its
        assert folder in "-🙂" or its[0] == next(session.wishes(f"/x/{folder}"))
    assert next(session.wishes("/x/проект")) != next(session.wishes("/x/проекты"))
    for folder in ("-", "🙂", ""):
        with pytest.raises(session.Nameless, match="gives this session no name: set AGENT_NAME"):
            next(session.wishes(f"/{folder}"))


# ── Real processes ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_zombie_has_ended():
    process = subprocess.Popen(["true"])
    wait_until(lambda: not runs(process.pid))
    assert processes.birth(process.pid) == ""
    process.wait()
    assert processes.birth(process.pid) == ""
    assert processes.birth(os.getpid()) == processes.birth(os.getpid()) != ""


def test_where_there_is_no_proc_ps_tells(monkeypatch):
    real = open
    monkeypatch.setattr("builtins.open", lambda path, *a, **k: real(str(path).replace("/proc/", "/gone/"), *a, **k))
    monkeypatch.setattr(os.path, "exists", lambda path: False)
    born = processes.birth(os.getpid())
    assert born.startswith(f"{os.getpid()} ") and born.endswith(" here") and processes.is_alive(born, False)
    assert processes.parent_of(os.getpid())[0] == os.getppid()
    assert processes.birth(2**22 + 1) == ""


PROGRAM = """
import json, os, subprocess, sys
hook = [sys.executable, sys.argv[1], "--name"]
server = f"import sys; sys.path.insert(0, {os.path.dirname(sys.argv[1])!r}); import processes, session; "
server += "print(session.this_session(processes.its_process('mcp'), '/x/api').name)"
env = {name: value for name, value in os.environ.items() if name != "CLAUDE_PID"}
for line in sys.stdin:
    given = {**env, "CLAUDE_CODE_SESSION_ID": "a"} if "id" in line else env
    if "hook" in line:
        command, given = hook, {**given, "CLAUDE_PID": str(os.getpid()), "CLAUDE_PROJECT_DIR": "/x/api"}
    elif "wrapped" in line:
        command = ["sh", "-c", f"nice {sys.executable} -c \\"$0\\"; true", server]
    elif "strange" in line:
        wrapper = "import subprocess, sys; subprocess.call(sys.argv[1:])"
        command = [sys.executable, "-c", wrapper, sys.executable, "-c", server]
    else:
        command = [sys.executable, "-c", server]
    print(subprocess.run(command, env=given, capture_output=True, text=True, check=True).stdout, end="", flush=True)
"""


@pytest.mark.parametrize("order", [["hook", "plain", "wrapped", "id strange"], ["id strange", "wrapped", "hook"]])
def test_a_server_behind_a_shell_has_the_name_of_the_hooks(order):
    """Case 43. Without an id in the environment, only shells and the like are seen through."""
    other = subprocess.Popen([sys.executable, "-c", PROGRAM, SCRIPT], stdin=-1, stdout=-1, text=True)
    ours = subprocess.Popen([sys.executable, "-c", PROGRAM, SCRIPT], stdin=-1, stdout=-1, text=True)
    try:
        for process, expected in ((other, "api\n"), (ours, "api-2\n")):
            for what in order:
                process.stdin.write(f"{what}\n")
                process.stdin.flush()
                assert (what, process.stdout.readline()) == (what, expected)
    finally:
        for process in (other, ours):
            process.communicate(timeout=PATIENCE)


@pytest.mark.parametrize("url", [
    f"{sessions.NOWHERE}/", "http://localhost:9", "http://LocalHost:9/", "http://127.0.0.1:9,http://127.0.0.2:9",
    "http://127.0.0.2:9,http://127.0.0.1:9",
])  # fmt: skip
def test_two_sessions_that_spell_the_url_of_one_bus_in_two_ways_have_two_names(url, lives, monkeypatch):
    """With one name, one would take the mail of the other."""
    lives.begin(1)
    lives.begin(2)
    assert name(1, "a") == "api"
    monkeypatch.setenv("AGENT_BUS_URL", url)
    assert name(2, "b") == "api-2" and len(list(register().parent.parent.iterdir())) == 1


@pytest.mark.parametrize("url", ["http://127.0.0.1:7", "http://127.0.0.2:9", "http://127.0.0.1:9/hive", "unix:/x"])
def test_sessions_on_two_buses_may_have_one_name(url, lives, monkeypatch):
    lives.begin(1)
    lives.begin(2)
    assert name(1, "a") == "api"
    monkeypatch.setenv("AGENT_BUS_URL", url)
    assert name(2, "b") == "api"


def test_the_file_that_an_older_version_named_by_a_spelling_of_the_url_is_read(lives, monkeypatch):
    lives.begin(1)
    name(1, "a")
    session.rename(1, "boss")
    folder = register().parent
    folder.rename(folder.with_name(bus_recv.file_name("http://localhost:9/,http://127.0.0.2:9")))
    lives.begin(2)
    assert name(2, "b") == "api-2"
    assert session.this_session(1, "/x/api", "a").names == ["boss", "api"]


def test_a_reader_of_this_machine_on_another_bus_is_not_the_one_that_listens_here(lives, monkeypatch):
    """It has the same name, and was there a moment ago; here another machine listens as that."""
    listening = [{"name": "api", "channel": "default", "online": True}]
    with Scripted(answer({"ok": True, "agents": listening, "bus": "b1"})) as server:
        bus_recv.Cursor("b2", "default", "api", print)
        with notice.alone("api", "poll"):
            monkeypatch.setenv("AGENT_BUS_URL", server.url)
        lives.begin(1)
        assert name(1, "a") == "api-2"
        assert notice.read_elsewhere(session.Self("api")).startswith("api is read on another machine, too")
        bus_recv.Cursor("b1", "default", "api", print)
        lives.begin(2)
        assert name(2, "b") == "api" and notice.read_elsewhere(session.Self("api")) == ""
