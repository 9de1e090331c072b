"""session.py: which session has which name, whatever ends, comes back, is renamed or gets the number of another.

The register is used here as the programs use it, but with processes that are made up: a life begins and ends at once.
`NAMES_SECONDS=120 python -m pytest tests/integrations/test_names.py -k random` is the long run of the last test, which
sends real messages through a bus and has a log of its own of who should get them.
"""
import collections
import json
import os
import pathlib
import random
import subprocess
import sys
import time

import pytest

import bus_recv
import bus_send
from tests.kit.processes import PATIENCE, ROOT, no_settings, runs, wait_until

sys.path[:0] = [str(ROOT / "integrations" / "claude_code"), str(ROOT / "tools")]
import bus_inbox  # noqa: E402
import notice  # noqa: E402
import processes  # noqa: E402
import session  # noqa: E402

NOWHERE = "http://127.0.0.1:9"  # nobody listens there
SECONDS = float(os.environ.get("NAMES_SECONDS", "3"))
SCRIPT = str(ROOT / "integrations" / "claude_code" / "bus_hook.py")


@pytest.fixture(autouse=True)
def project(tmp_path, monkeypatch):
    no_settings(monkeypatch, "CLAUDE")
    monkeypatch.setenv("AGENT_BUS_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("AGENT_BUS_URL", NOWHERE)


class Lives:
    """Processes that are made up, by number: the birth of each that lives."""

    def __init__(self, monkeypatch):
        self.born, self.space, self.count = {}, "pid:[1]", 0
        monkeypatch.setattr(processes, "birth", lambda number: self.born.get((self.space, number), ""))
        monkeypatch.setattr(processes, "this_kernel", lambda: f"boot {self.space}")

    def begin(self, number):
        self.count += 1
        self.born[self.space, number] = f"{number} {self.count} boot {self.space}"

    def end(self, number):
        del self.born[self.space, number]


@pytest.fixture
def lives(monkeypatch):
    return Lives(monkeypatch)


def name(process, id=None, folder="/x/api", title=None):
    return session.this_session(process, folder, id, title).name


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


def test_a_title_renames_and_a_new_process_keeps_it(lives, monkeypatch):
    lives.begin(1)
    assert name(1, "a") == "api"
    assert session.this_session(1, "/x/api", "a", "the reviewer")[:2] == ("the-reviewer", ("api",))
    lives.end(1)
    lives.begin(2)
    assert session.this_session(2, "/x/api", "a", "the reviewer")[:2] == ("the-reviewer", ("api",))
    lives.begin(3)
    assert name(3, "b", title="planner") == "planner", "a title from the start"
    monkeypatch.setenv("AGENT_NAME", "dell")
    lives.begin(4)
    assert name(4, "c", title="planner") == "dell", "AGENT_NAME is stronger at the start"
    assert name(4, "c", title="boss") == "boss"
    assert name(4) == "boss"


def test_the_old_name_is_read_for_a_day_and_free_then(lives):
    lives.begin(1)
    lives.begin(2)
    name(1, "a")
    assert session.rename(1, "lead") == "api"
    assert session.rename(1, "boss") == "lead"
    assert session.this_session(1, "/x/api", "a").names == ["boss", "lead", "api"]
    assert name(2, "b") == "api-2"
    with session.Register() as names:
        names.names["boss"]["old"] = {"lead": time.time() - 1, "api": time.time() - 1}
    assert session.this_session(1, "/x/api", "a").names == ["boss"]
    lives.begin(3)
    assert name(3, "c") == "api"


@pytest.mark.parametrize("new", ["all", "Root", "no name", "", "api-2", "x" * 65])
def test_a_name_that_is_not_free_or_no_name_is_refused(lives, new):
    lives.begin(1)
    lives.begin(2)
    name(1, "a")
    name(2, "b")
    with pytest.raises(ValueError, match="reserved|is not a name|is another session"):
        session.rename(1, new)
    assert name(1) == "api"


def test_a_rename_goes_on_where_the_old_name_was(bus, lives, monkeypatch):
    """Nothing that waits for either name is passed over, and what was read does not come again."""
    monkeypatch.setenv("AGENT_BUS_URL", bus.url)
    lives.begin(1)
    name(1, "a")

    def send(to, text):
        return bus_send.send(to, text, sender="spark")["id"]

    send("api", "read before")
    assert [each["msg"] for each in bus_recv.receive("api", once=True)] == ["read before"]
    send("boss", "for the new name, from before")
    send("api", "for the old name")
    session.rename(1, "boss")
    me = session.this_session(1, "/x/api", "a")
    assert notice.count(me, 5).unread == 2
    read = [each["msg"] for each in bus_recv.receive(me.names, once=True)]
    assert read == ["for the new name, from before", "for the old name"]
    assert notice.count(me, 5).unread == 0
    send("api", "later")
    assert notice.count(me, 5).unread == 1


def read(me):
    return [each["msg"] for each in bus_recv.receive(me.names, once=True, timeout=0)]


def test_what_was_read_of_an_old_name_does_not_come_to_the_next_session_that_has_it(bus, lives, monkeypatch):
    monkeypatch.setenv("AGENT_BUS_URL", bus.url)
    lives.begin(1)
    name(1, "a")
    session.rename(1, "boss")
    bus_send.send("api", "for the first", sender="spark")
    assert read(session.this_session(1, "/x/api", "a")) == ["for the first"]
    lives.end(1)
    bus_send.send("api", "for whoever comes", sender="spark")
    lives.begin(2)
    assert read(session.this_session(2, "/x/api", "b")) == ["for whoever comes"]
    lives.begin(3)
    name(3, "c")
    lives.end(2)
    session.rename(3, "lead")
    assert session.rename(3, "api") == "lead"
    assert read(session.this_session(3, "/x/api", "c")) == []


def test_what_a_session_has_read_of_its_old_name_stays_read_when_another_one_has_its_new_name(bus, lives, monkeypatch):
    monkeypatch.setenv("AGENT_BUS_URL", bus.url)
    lives.begin(1)
    name(1, "a")
    session.rename(1, "boss")
    bus_send.send("api", "for the first", sender="spark")
    assert read(session.this_session(1, "/x/api", "a")) == ["for the first"]
    lives.end(1)
    lives.begin(2)
    assert name(2, "b", title="boss") == "boss"
    lives.begin(3)
    me = session.this_session(3, "/x/api", "c")
    assert (me.names, read(me)) == (["api"], [])


def test_a_place_that_a_renamed_session_needs_is_not_that_of_the_next_session(bus, lives, monkeypatch):
    """Older mail for its new name makes it begin there; what was read of that name before is read nevertheless."""
    monkeypatch.setenv("AGENT_BUS_URL", bus.url)
    lives.begin(1)
    name(1, "a")
    bus_send.send("boss", "older", sender="spark")
    bus_send.send("api", "read", sender="spark")
    assert read(session.this_session(1, "/x/api", "a")) == ["read"]
    session.rename(1, "boss")
    assert session.rename(1, "api") == "boss"
    lives.end(1)
    lives.begin(2)
    me = session.this_session(2, "/x/api", "b")
    assert (me.names, read(me)) == (["api"], [])


def test_a_session_that_takes_its_old_name_again_gets_nothing_twice(bus, lives, monkeypatch):
    monkeypatch.setenv("AGENT_BUS_URL", bus.url)
    lives.begin(1)
    name(1, "a")
    session.rename(1, "boss")
    bus_send.send("api", "1", sender="spark")
    assert read(session.this_session(1, "/x/api", "a")) == ["1"]
    bus_send.send("boss", "2", sender="spark")
    assert session.rename(1, "api") == "boss"
    assert read(session.this_session(1, "/x/api", "a")) == ["2"]


def test_older_mail_for_the_new_name_brings_no_mail_again_that_was_read(bus, lives, monkeypatch):
    """Nor a broadcast, over two renames; but who asks for a time gets all from then on."""
    monkeypatch.setenv("AGENT_BUS_URL", bus.url)
    lives.begin(1)
    name(1, "a")
    for to in ("lead", "boss", "api", "all"):
        bus_send.send(to, f"for {to}", sender="spark")
    assert read(session.this_session(1, "/x/api", "a")) == ["for api", "for all"]
    session.rename(1, "boss")
    assert session.rename(1, "lead") == "boss"
    me = session.this_session(1, "/x/api", "a")
    assert me.names == ["lead", "boss", "api"]
    assert [each["msg"] for each in bus_inbox.Inbox(me.name).look(0)[0]] == ["for lead"]
    assert read(me) == ["for lead", "for boss"] and read(me) == []
    since = {"once": True, "timeout": 0, "since": "1h"}
    assert len(list(bus_recv.receive(me.names, **since))) == 4


def test_a_rename_without_the_bus_loses_nothing(bus, lives, monkeypatch):
    monkeypatch.setenv("AGENT_BUS_URL", bus.url)
    lives.begin(1)
    name(1, "a")
    for to in ("boss", "api"):
        bus_send.send(to, f"for {to}", sender="spark")
    assert read(session.this_session(1, "/x/api", "a")) == ["for api"]
    monkeypatch.setattr(session.Register, "digest", lambda *_: {})
    session.rename(1, "boss")
    assert read(session.this_session(1, "/x/api", "a")) == ["for boss"]


def test_a_reader_shows_nothing_again_that_came_while_its_session_was_renamed(bus, lives, monkeypatch):
    """It follows at its next poll. Until then it reads as the old name."""
    monkeypatch.setenv("AGENT_BUS_URL", bus.url)
    lives.begin(1)
    name(1, "a")
    mail = bus_recv.SessionReader(["api", "team"]).messages(timeout=PATIENCE)
    for to in ("boss", "api", "team", "all"):
        bus_send.send(to, f"for {to}", sender="spark")
    assert next(mail)["msg"] == "for api"
    session.rename(1, "boss")
    assert [next(mail)["msg"] for _ in range(3)] == ["for team", "for all", "for boss"]
    bus_send.send("api", "later", sender="spark")
    assert next(mail)["msg"] == "later"


def test_a_reader_that_runs_follows_its_session_to_a_new_name(bus, lives, monkeypatch):
    monkeypatch.setenv("AGENT_BUS_URL", bus.url)
    lives.begin(1)
    name(1, "a")
    command = [sys.executable, "-c", "import bus_recv; bus_recv.FOLLOW_SECONDS = 0.2; bus_recv.main()", "api", "team"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    reader = subprocess.Popen([*command, "--json"], env=env, stdout=-1, stderr=-1, text=True)

    def comes(to):
        id = bus_send.send(to, f"for {to}", sender="spark")["id"]
        return json.loads(reader.stdout.readline())["id"] == id

    try:
        assert comes("api")
        session.rename(1, "boss")
        assert comes("boss") and comes("api") and comes("team")
        session.rename(1, "chief")
        assert comes("chief") and comes("boss") and comes("api")
        assert session.this_session(1, "/x/api", "a").names == ["chief", "boss", "api"]
        assert notice.count(session.this_session(1, "/x/api", "a"), 5).reader, "the hooks know that it reads"
    finally:
        reader.terminate()
        _, said = reader.communicate(timeout=PATIENCE)
    assert "reading as boss, api, team from now on" in said


def test_a_reader_that_has_an_old_name_counts_as_a_reader_of_the_session(bus, lives, monkeypatch):
    """It goes on with the new name when its poll ends, so no hook tells of what it will show."""
    monkeypatch.setenv("AGENT_BUS_URL", bus.url)
    lives.begin(1)
    name(1, "a")
    reader = bus_recv.Cursor(json.loads(bus.get("/healthz"))["bus"], "default", "api", print)
    session.rename(1, "boss")
    me = session.this_session(1, "/x/api", "a")
    assert me.names == ["boss", "api"] and notice.count(me, 5).reader
    reader.lock.close()
    assert not notice.count(me, 5).reader


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


# ── At random ────────────────────────────────────────────────────────────────────────────────────────────────────────


class Log:
    """Who had which name, what was sent to it, and who got that: the facts for check(), each with its step."""

    def __init__(self):
        self.step, self.held, self.sent, self.got = 0, {}, {}, collections.defaultdict(list)

    def has(self, process, names):
        """The process reads these names from now on, and no others."""
        for name in {*names, *(name for each, name in self.held if each == process)}:
            spans = self.held.setdefault((process, name), [])
            if name in names and not (spans and spans[-1][1] is None):
                spans.append([self.step, None])
            elif name not in names and spans and spans[-1][1] is None:
                spans[-1][1] = self.step

    def held_at(self, process, name, step):
        return any(begin <= step and (end is None or step < end) for begin, end in self.held.get((process, name), ()))

    def holders(self, name):
        return [each for each, its in self.held if its == name and self.held_at(each, name, self.step)]

    def check(self):
        """A message went to whom it was sent, as long as that had the name; to nobody else afterwards, and once."""
        for id, (name, holder, at) in self.sent.items():
            for process, step in self.got[id]:
                assert self.held_at(process, name, step), f"{process} got mail for {name}, which it was not"
                lost = [end for begin, end in self.held[holder, name] if end is not None and at < end <= step]
                assert process == holder or lost, f"{process} got mail for {name}, which was {holder}"
            assert len(self.got[id]) < 2, f"mail for {name} came more than once: {self.got[id]}"
            assert self.got[id] or not self.holders(name), f"mail for {name} never came"


class Folder:
    """100 conversations in one folder, and the bus that they are on."""

    def __init__(self, dice, lives):
        self.dice, self.lives, self.log = dice, lives, Log()
        self.runs = {f"s{number}": None for number in range(100)}  # by conversation: the process that runs it now
        self.names = {}  # by process: all that it reads, its own name first

    def life(self, process):
        """A process for the log, which has the number of no other one."""
        return self.lives.born["pid:[1]", process]

    def look(self, process, id, title=None):
        me = session.this_session(process, "/x/api", id, title)
        theirs = {name for each, names in self.names.items() if each != process for name in names}
        assert not theirs.intersection(me.names), f"{me.names} are read by two"
        self.names[process] = me.names
        self.log.has(self.life(process), me.names)

    def idle(self):
        return self.dice.choice([id for id, process in self.runs.items() if process is None])

    def start(self, id, process):
        self.runs[id] = self.dice.choice([each for each in range(1000, 1400) if each not in self.names])
        self.lives.begin(self.runs[id])
        self.look(self.runs[id], id)

    def kill(self, id, process):
        self.log.has(self.life(process), [])
        self.lives.end(process)
        del self.names[process]
        self.runs[id] = None

    def clear(self, id, process):
        """The conversation can be resumed later."""
        new = f"{id.partition('.')[0]}.{self.dice.randrange(3)}"
        if self.runs.get(new) is None:
            self.runs.update({id: None, new: process})
            self.look(process, new)

    def resume(self, id, process):
        """Within the session: its process goes on with another conversation."""
        other = self.idle()
        self.runs.update({id: None, other: process})
        self.look(process, other)

    def rename(self, id, process):
        try:
            session.rename(process, f"n{self.dice.randrange(60)}")
        except ValueError as error:
            assert "another session" in str(error)
        self.look(process, id)

    def title(self, id, process):
        self.look(process, id, f"t{self.dice.randrange(60)}")

    def send(self, id, process):
        """Somebody sends a message to one of its names."""
        to = self.dice.choice(self.names[process])
        self.log.sent[bus_send.send(to, "hi", sender="spark")["id"]] = (to, self.life(process), self.log.step)

    def read(self, id, process):
        """As its reader would."""
        for message in bus_recv.receive(self.names[process], once=True, timeout=0):
            self.log.got[message["id"]].append((self.life(process), self.log.step))

    def hook(self, id, process):
        before = self.names[process][0]
        self.look(process, id)
        assert self.names[process][0] == before, "one session has two names"

    def server(self, id, process):
        self.hook(None, process)

    def step(self):
        self.log.step += 1
        id = self.dice.choice(list(self.runs))
        process = self.runs[id]
        often = [self.kill, self.hook, self.server] * 2 + [self.kill, self.read] + [self.send] * 3
        act = self.dice.choice([*often, self.clear, self.resume, self.rename, self.title]) if process else self.start
        act(id, process)
        return act.__name__


def test_at_random_no_two_sessions_ever_have_one_name_and_no_mail_goes_astray(bus, lives, monkeypatch):
    monkeypatch.setenv("AGENT_BUS_URL", bus.url)
    seed, end, steps = random.randrange(10**6), time.monotonic() + SECONDS, collections.Counter()
    print("seed", seed)  # pytest shows it with a failure
    folder = Folder(random.Random(seed), lives)
    while time.monotonic() < end or len(steps) < 10:
        steps[folder.step()] += 1
    for process in folder.names:
        folder.read(None, process)
    folder.log.check()
    print(sum(steps.values()), "steps:", dict(steps), len(folder.log.sent), "messages")
