"""The core is a whole bus without any extension, with each of them alone, and with all; what is missing is told.

Each bus here runs from a folder of its own, with copies of the files that a user would have copied.
"""

import hashlib
import http.client
import json
import os
import shutil
import sqlite3
import subprocess
import sys

import pytest

import bus_server
import test_bus
from test_bus import EXTENSIONS, SECTIONS
from tests.kit import forked
from tests.kit.checks import CHECKS, HEAVY, make, possible
from tests.kit.processes import PATIENCE, ROOT, Server, copied, wait_until

CARD = ("bus_server.py", "bus_recv.py", "bus_send.py", "bus_listener.sh", "test_bus.py")
ALL = sorted(file.stem for file in (ROOT / "bus_extensions").glob("[a-z]*.py"))
CLOSED = "AGENT_BUS_TOKEN, the token of an operator"
COPY = "which is not beside bus_server.py: copy bus_extensions/ from the same version, or give --without"
# bus_server.py in the folder that is its first argument, which looks five times a second for what is too old
TIDY = "import sys; sys.path.insert(0, sys.argv.pop(1)); import bus_server; bus_server.TIDY_SECONDS = 0.2; "
TIDY += "sys.exit(bus_server.main())"


def copy(folder, extensions, card=("bus_server.py",)):
    """A folder with these files of ours; bus_extensions/ is there only if something is in it."""
    folder.mkdir(exist_ok=True)
    for file in card:
        shutil.copy(ROOT / file, folder)
    shutil.rmtree(folder / "bus_extensions", ignore_errors=True)
    for name in extensions:
        (folder / "bus_extensions").mkdir(exist_ok=True)
        for file in (ROOT / "bus_extensions" / f"{name}.py", *(ROOT / "bus_extensions").glob(f"_{name}*.py")):
            copied(file, folder / "bus_extensions")
        if (ROOT / "bus_extensions" / name).is_dir():  # its files
            shutil.copytree(ROOT / "bus_extensions" / name, folder / "bus_extensions" / name)
    return folder


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "bus"


def server(folder, *options, flags=("-S",)):
    return Server(folder.parent / "bus.db", *options, program=(*flags, str(folder / "bus_server.py")))


def tidying(folder, *options):
    return Server(folder.parent / "bus.db", *options, program=("-S", "-c", TIDY, str(folder)))


def refuses_to_start(folder, *options):
    """What a bus says that does not start, in its last line."""
    command = [sys.executable, "-S", str(folder / "bus_server.py"), "--port", "0"]
    db = () if "--db" in options else ("--db", str(folder.parent / "bus.db"))
    done = forked.run([*command, *db, *options], capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 2 and "Traceback" not in done.stderr and not done.stdout, done
    return done.stderr.splitlines()[-1]


def ask(bus, method, path, body=None):
    peer = http.client.HTTPConnection("127.0.0.1", bus.port, timeout=PATIENCE)
    peer.request(method, path, body if body is None or isinstance(body, bytes) else json.dumps(body))
    answer = peer.getresponse()
    text = answer.read()
    peer.close()
    return answer.status, json.loads(text) if text.startswith(b"{") else text.decode()


def post(bus, path, **members):
    status, answer = ask(bus, "POST", path, members)
    assert status == 200, answer
    return answer


def rows(folder, statement="SELECT * FROM work ORDER BY tick"):
    database = sqlite3.connect(folder.parent / "bus.db")
    found = database.execute(statement).fetchall()
    database.close()
    return found


def mail(bus):
    return [each["msg"] for each in ask(bus, "GET", "/log?max=1000")[1]["messages"]]


# All promises that are left


def reason(extension):
    """Why test_bus.py skips a section; the core names the file of an extension only if it is in ELSEWHERE."""
    if extension.file[:-3] in bus_server.ELSEWHERE:
        return f"bus_extensions/{extension.file} is not there"
    return f"{extension.path} is answered 404"


@pytest.mark.slow("a run of test_bus.py, which waits 6 s")
def test_the_core_alone_keeps_its_promises_and_every_absent_section_is_named(folder):
    command = [sys.executable, str(copy(folder, [], CARD) / "test_bus.py")]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=9 * PATIENCE)
    lines = done.stdout.splitlines()
    assert (done.returncode, lines[-1]) == (0, "ALL TESTS PASS"), done.stdout
    for section, extension in EXTENSIONS.items():
        assert f"{section}. {SECTIONS[section]}: skipped, {reason(extension)}" in lines
    [said] = [line for line in lines if line.startswith("skipped: ") and "checks (needs AGENT_BUS_TOKEN" not in line]
    named = {f"{each.name} ({reason(each)})" for each in EXTENSIONS.values()}
    assert set(said[len("skipped: ") :].split(", ")) == named
    made = [check for check in CHECKS.values() if check.__doc__ in lines]
    assert {test_bus.extension_of(check) for check in made} == {None} and len(made) > 60


@pytest.mark.parametrize("name", ALL)
def test_an_extension_alone_keeps_its_promises_and_the_core_keeps_its_own(folder, monkeypatch, name):
    """Of those of the core each is made beside one of the extensions, and with ALONE=1 beside each.

    Without extensions all are made by the test above, and with all extensions by test_bus.py as pytest collects it.
    """
    monkeypatch.setattr(test_bus, "HERE", copy(folder, [name], CARD))
    with server(folder) as bus:
        checked = test_bus.Bus(bus.url, mine=True)
        for extension in EXTENSIONS.values():
            assert checked.lacks(extension) == ("" if extension.file[:-3] == name else reason(extension))
        made = possible(checked)
        ours = [None, *(each for each in EXTENSIONS.values() if each.file[:-3] == name)]
        open_ones = [check for check in CHECKS.values() if getattr(check, "needs", "") != CLOSED]
        assert made == [check for check in open_ones if test_bus.extension_of(check) in ours]
        light = possible(checked, HEAVY)
        of_core = [check for check in light if test_bus.extension_of(check) is None]
        its_share = of_core if "ALONE" in os.environ else of_core[ALL.index(name) :: len(ALL)]
        make(checked, [check for check in light if check not in of_core or check in its_share])
        assert bus.stop() == 0


def test_bus_server_py_alone_in_an_empty_folder_is_a_bus(folder):
    with server(copy(folder, [])) as bus:
        sent = post(bus, "/send", **{"from": "alice", "to": "bob", "msg": "hello"})
        assert [each["id"] for each in ask(bus, "GET", "/recv?to=bob&since=0")[1]["messages"]] == [sent["id"]]
        status, answer = ask(bus, "GET", "/bus_recv.py")
        assert status == 404 and answer["error"].startswith("bus_recv.py is not beside bus_server.py on this host")
        assert "/claim" not in ask(bus, "GET", "/")[1]
        assert bus.process.stdout.readline().startswith(b"messages are in ")
        said = b"extensions: none, because bus_extensions/ is not beside bus_server.py\n"
        assert bus.process.stdout.readline() == said
        assert bus.stop() == 0
    assert {file.name for file in folder.iterdir()} == {"bus_server.py"}
    assert not bus.log.read_text()


def test_all_run_with_the_standard_library_alone(folder):
    """-I: no environment and no current folder; -S: no installed package."""
    with server(copy(folder, ALL), flags=("-I", "-S")) as bus:
        assert [bus.process.stdout.readline() for _ in range(2)][1].decode() == f"extensions: {', '.join(ALL)}\n"
        assert post(bus, "/claim", to="builds", wait=0)["messages"] == []
        assert ask(bus, "GET", "/metrics")[0] == 200
        assert ask(bus, "GET", f"/blob/{'0' * 64}")[0] == 404
        assert ask(bus, "GET", "/thread/1")[0] == 404


# The words


def test_a_404_names_the_file_that_is_missing(folder):
    with server(copy(folder, ["metrics"])) as bus:
        for extension, brings in bus_server.ELSEWHERE.items():
            for route in brings:
                if extension != "metrics" and route.startswith("/"):
                    status, answer = ask(bus, "GET", route + ("1" if route.endswith("/") else ""))
                    missing = f"{route} needs bus_extensions/{extension}.py, which is not beside bus_server.py"
                    assert status == 404 and answer["error"] == f"{missing}: copy it from the same version"
        assert ask(bus, "GET", "/nothing")[1]["error"].startswith("there is nothing at /nothing: ")


def test_what_was_left_out_says_so(folder):
    with server(copy(folder, ALL), "--without", "work,files") as bus:
        said = "/claim is off: this bus was started --without work"
        assert ask(bus, "POST", "/claim", {"to": "builds"}) == (404, {"error": said})
        assert ask(bus, "GET", "/blob/1")[1]["error"] == "/blob/ is off: this bus was started --without files"
        others = [name for name in ALL if name not in ("work", "files")]
        assert [bus.process.stdout.readline() for _ in range(2)][1].decode() == f"extensions: {', '.join(others)}\n"
        assert "/claim" not in ask(bus, "GET", "/")[1] and "/ask" in ask(bus, "GET", "/")[1]


def test_without_may_be_given_twice(folder):
    with server(copy(folder, ALL), "--without", "work", "--without", "files") as bus:
        assert [ask(bus, "GET", path)[0] for path in ("/claim", "/blob/1")] == [404, 404]


EACH = """
import argparse, json, sys
sys.path.insert(0, sys.argv[1])
import bus_server
options = bus_server.command_line(["--db", ":memory:"])
for name, module in options.extensions.items():
    bus = bus_server.make_bus(options, bus_server.State(":memory:"))
    core, parser = dict(bus.routes), argparse.ArgumentParser(add_help=False)
    module.options(parser)
    if module.TABLES:
        bus.state.add_tables(name, module.NOUN, module.TABLES)
    module.start(bus, options)
    routes = {path for (_, path), route in bus.routes.items() if core.get((_, path)) is not route}
    print(json.dumps([name, sorted(routes | set(parser._option_string_actions))]))
"""


def test_every_endpoint_and_option_of_an_extension_is_in_the_table_of_what_is_elsewhere(folder):
    """Else its 404 would not name the file, and its option would be unrecognized."""
    command = [sys.executable, "-S", "-c", EACH, str(copy(folder, ALL))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    brings = {name: set(found) for name, found in map(json.loads, done.stdout.splitlines())}
    brings["replies"].remove("/message/")  # the core has these two as well
    brings["people"].remove("/agents")
    brings["history"].remove("/log")
    brings["page"].remove("/")
    listed = {name: found for name, found in brings.items() if name in bus_server.ELSEWHERE}  # ours; others need not be
    assert listed == {name: set(elsewhere) for name, elsewhere in bus_server.ELSEWHERE.items()}, done.stderr


@pytest.mark.parametrize("option", [("--files", "1g"), ("--files=1g",)], ids=" ".join)
def test_an_option_of_a_missing_extension_says_which_file(folder, option):
    said = refuses_to_start(copy(folder, ["work"]), *option)
    needs = "--files needs bus_extensions/files.py, which is not beside bus_server.py: copy it from the same version"
    assert said == f"python3 bus_server.py: error: {needs}"
    said = refuses_to_start(copy(folder, ALL), *option, "--without", "files")
    assert said == "python3 bus_server.py: error: --files is off: this bus was started --without files"


def test_nothing_can_be_left_out_that_there_is_not(folder):
    said = refuses_to_start(copy(folder, ALL), "--without", "work,pages")
    assert said.startswith("python3 bus_server.py: error: --without pages: there is no such extension, only ")
    assert all(name in said for name in bus_server.ELSEWHERE)


def test_an_extension_that_cannot_be_loaded_is_one_sentence(folder):
    copy(folder, ["metrics"])
    with (folder / "bus_extensions" / "metrics.py").open("a") as file:
        file.write("\ndef half(:\n")
    command = [sys.executable, "-S", str(folder / "bus_server.py"), "--port", "0", "--db", ":memory:"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done
    assert done.stderr.startswith(f"bus_server: cannot load the extension {folder}/bus_extensions/metrics.py: ")
    assert "invalid syntax" in done.stderr
    with server(folder, "--without", "metrics") as bus:  # what is left out is not even read
        assert ask(bus, "GET", "/healthz")[0] == 200


# What an absent extension has in the database


@pytest.fixture
def jobs(folder):
    """A bus was stopped that has 12 jobs: one with a worker, 11 that nobody has had; two more are done."""
    with server(copy(folder, ["work"])) as bus:
        for number in range(14):
            post(bus, "/send", **{"from": "alice", "to": "builds", "msg": f"job {number}"})
        post(bus, "/send", **{"from": "alice", "to": "bob", "msg": "mail"})
        claimed = post(bus, "/claim", to="builds", max=3, lease=1)["messages"]
        for job in claimed[:2]:
            post(bus, "/ack", id=job["id"], lease=job["lease"])
        assert bus.stop() == 0
    return folder


def test_a_start_without_the_extension_that_has_jobs_ends_with_one_sentence(jobs):
    before = rows(jobs)
    said = refuses_to_start(copy(jobs, ["metrics"]))
    assert said == f"bus_server: {jobs.parent}/bus.db has 12 jobs of work.py, {COPY} work"
    assert rows(jobs) == before and len(before) == 3


def test_jobs_stay_with_without_are_spared_by_keep_and_can_be_claimed_after_a_start_with_work_py(jobs):
    """Done jobs are not spared, and their rows go with their messages."""
    [undone] = rows(jobs, "SELECT * FROM work WHERE due IS NOT NULL")
    waiting = [f"job {number}" for number in range(2, 14)]
    with tidying(copy(jobs, []), "--without", "work", "--keep", "1s") as bus:
        wait_until(lambda: "mail" not in mail(bus))
        wait_until(lambda: mail(bus) == waiting)
        assert post(bus, "/send", **{"from": "alice", "to": "builds", "msg": "late"})["ok"]
        assert bus.stop() == 0
    assert rows(jobs) == [undone]
    with server(copy(jobs, ["work"])) as bus:
        claimed = post(bus, "/claim", to="builds", max=100, wait=2)["messages"]
        assert {each["msg"]: each["attempt"] for each in claimed} == {
            "job 2": 2,
            **dict.fromkeys([*waiting[1:], "late"], 1),
        }


def test_jobs_that_are_all_done_keep_no_bus_from_its_start(jobs):
    with server(jobs) as bus:
        done = 0
        while done < 12:
            for job in post(bus, "/claim", to="builds", max=100, wait=2)["messages"]:
                post(bus, "/ack", id=job["id"], lease=job["lease"])
                done += 1
        assert bus.stop() == 0
    with server(copy(jobs, [])) as bus:
        assert ask(bus, "GET", "/healthz")[0] == 200


def test_files_of_an_absent_extension_are_told_and_stay(folder):
    data = b"a file"
    digest = hashlib.sha256(data).hexdigest()
    with server(copy(folder, ["files"])) as bus:
        assert ask(bus, "PUT", f"/blob/{digest}", data)[0] == 201
        assert bus.stop() == 0
    said = refuses_to_start(copy(folder, ["work"]))
    assert said.startswith(f"bus_server: {folder.parent}/bus.db has 1 file") and said.endswith(
        f"of files.py, {COPY} files"
    )
    with tidying(copy(folder, []), "--without", "files", "--keep", "1s") as bus:
        post(bus, "/send", **{"from": "alice", "to": "bob", "msg": "mail"})
        wait_until(lambda: not mail(bus))
    assert (folder.parent / "bus.db.blobs" / digest).read_bytes() == data
    with server(copy(folder, ["files"])) as bus:
        assert ask(bus, "GET", f"/blob/{digest}") == (200, data.decode())
