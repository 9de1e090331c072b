"""The files of the clients: small, equal where they share; each finds the other programs or says how to get them."""
import ast
import os
import re
import shutil
import signal
import sys

import pytest

from tests.clients.test_clients import program
from tests.kit import forked
from tests.kit.bad_servers import NOON, Scripted, answer, mail, message
from tests.kit.processes import PATIENCE, ROOT, has_taken_its_signals, wait_until

pytestmark = pytest.mark.usefixtures("home")

LIMITS = {"bus_recv.py": 818, "bus_send.py": 507}  # lines of code
TOOLS = [f"bus_{tool}" for tool in "work log doctor file outbox relay who inbox search redact later lock".split()]
PARTS = ["bus_doctor_bus", "bus_doctor_way"]
INSTALLS = ["bus_install", "bus_agents", "bus_change", "bus_service"]
OTHERS = ["bus_join", "bus_invite", "agent_bus", *PARTS, *INSTALLS]
BLOCK = re.compile(r"^# -- shared by [^\n]*: begin [^\n]*\n(.*?)^# -- shared by [^\n]*: end --$", re.M | re.S)
JOB = message(1, attempt=1, lease=f"{1:032x}", lease_until=NOON + 60)
DONE = answer({"ok": True, "now": NOON, "bus": "b1"})
CALLS = {  # what bus_recv.py is called with, and how that ends if another program does it
    "bus_work": (["builds", "--claim", "--exec", "exit 7", "--once", "--json"], "bus_work: the command ended with 7"),
    "bus_log": (["--log", "--no-follow", "--to", "dell", "--once"], " from=spark id=1 to=dell"),
}  # fmt: skip


def docstrings(tree):
    """The lines of each docstring."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            yield from range(node.body[0].lineno, node.body[0].end_lineno + 1)


def code_lines(text):
    """How many lines are neither blank, nor only a comment, nor of a docstring."""
    prose = set(docstrings(ast.parse(text)))
    lines = enumerate(map(str.strip, text.split("\n")), 1)
    return len([line for number, line in lines if line and not line.startswith("#") and number not in prose])


def test_what_counts_as_code():
    assert code_lines('"""A\n\nB"""\n\n# c\nx = 1  # d\n\ndef f():\n    """E"""\n    return """\nF"""\n') == 4


@pytest.mark.parametrize("name", LIMITS)
def test_a_client_can_be_read_in_five_minutes(name):
    text = (ROOT / name).read_text()
    assert code_lines(text) <= LIMITS[name]
    assert "fmt: skip" not in text and "fmt: off" not in text and "; " not in re.sub(r'"[^"\n]*"|#.*', "", code(text))


def code(text):
    prose = set(docstrings(ast.parse(text)))
    return "\n".join(line for number, line in enumerate(text.split("\n"), 1) if number not in prose)


@pytest.mark.parametrize("path", [*LIMITS, *(f"tools/{tool}.py" for tool in (*TOOLS, *OTHERS))])
def test_no_function_is_longer_than_40_lines_and_no_class_than_300(path):
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        limit = {ast.FunctionDef: 40, ast.ClassDef: 300}.get(type(node))
        assert not limit or node.end_lineno - node.lineno < limit, node.name


def test_what_both_clients_need_is_the_same_in_both():
    ours, its = (BLOCK.findall((ROOT / name).read_text()) for name in LIMITS)
    assert len(ours) == len(its) == 1 and ours == its and code_lines(ours[0]) > 100


@pytest.fixture(params=["beside", "in tools/", "installed"])
def place(request, tmp_path):
    """A folder with bus_recv.py, and where the other programs lie."""
    tools = tmp_path / "bin" / {"beside": "", "in tools/": "tools", "installed": "agent_bus_tools"}[request.param]
    tools.mkdir(parents=True)
    for client in LIMITS:
        shutil.copy(ROOT / client, tmp_path / "bin")
    for tool in (*TOOLS, *PARTS, "bus_join"):
        shutil.copy(ROOT / "tools" / f"{tool}.py", tools)
    return tools


def isolated(script, *arguments, **env):
    """Exit code, stdout, stderr, without site packages and with nothing on the path."""
    command = [sys.executable, "-I", "-S", str(script), *arguments]
    done = forked.run(command, env={**os.environ, **env}, capture_output=True, text=True, timeout=PATIENCE)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("tool", CALLS)
def test_claim_and_log_run_the_program_that_does_it(tool, place, tmp_path):
    arguments, sign = CALLS[tool]
    link = tmp_path / "recv"
    link.symlink_to(tmp_path / "bin" / "bus_recv.py")
    for script in (tmp_path / "bin" / "bus_recv.py", link, place / f"{tool}.py"):
        with Scripted(mail(JOB), DONE) as server:
            code, out, err = isolated(script, *arguments, AGENT_BUS_URL=server.url)
            assert code == (tool == "bus_work") and sign in out + err  # its command fails


@pytest.mark.parametrize("tool", CALLS)
def test_without_that_program_one_sentence_says_how_to_get_it(tool, tmp_path):
    shutil.copy(ROOT / "bus_recv.py", tmp_path)
    with Scripted(mail(JOB)) as server:
        code, out, err = isolated(tmp_path / "bus_recv.py", *CALLS[tool][0], AGENT_BUS_URL=server.url)
        assert (code, out, server.asked) == (2, "", [])
    assert err == f"bus_recv: {tool}.py is missing in {tmp_path}: run curl -fO $AGENT_BUS_URL/{tool}.py there\n"


@pytest.mark.parametrize("tool", TOOLS)
def test_a_program_that_was_fetched_alone_says_what_it_needs(tool, tmp_path):
    shutil.copy(ROOT / "tools" / f"{tool}.py", tmp_path)
    code, out, err = isolated(tmp_path / f"{tool}.py", "--help")
    assert (code, out) == (2, "")
    assert err == f"{tool}: bus_recv.py is missing in {tmp_path}: run curl -fO $AGENT_BUS_URL/bus_recv.py there\n"


@pytest.mark.parametrize("tool", [*TOOLS, "bus_join"])
def test_every_program_runs_isolated_from_wherever_it_lies(tool, place):
    code, out, err = isolated(place / f"{tool}.py", "--help")
    assert code == 0 and "usage:" in out and err == ""


@pytest.mark.parametrize("signals, code, seconds, told", [
    ([signal.SIGTERM, signal.SIGTERM], 0, 60, "/nack"), ([signal.SIGINT], 130, 60, "/nack"),
    ([signal.SIGTERM], 0, 1, "/ack"),  # the first one lets the command end
])  # fmt: skip
def test_signals_reach_a_worker_that_bus_recv_runs(signals, code, seconds, told, tmp_path, interruptible):
    with Scripted(mail(JOB), DONE) as server:
        command = f"touch {tmp_path}/begun; exec sleep {seconds}"
        env = {"AGENT_BUS_URL": server.url}
        process = program("bus_recv.py", "builds", "--claim", "--exec", command, env=env)
        wait_until((tmp_path / "begun").exists)
        for number in signals:  # two signals that come together may be one
            wait_until(lambda: has_taken_its_signals(process.pid))
            process.send_signal(number)
        assert process.wait(PATIENCE) == code
        wait_until(lambda: [asked for asked in server.asked if asked.target == told])
        process.communicate()


def test_bus_recv_names_what_it_does_not_know():
    code, _, err = isolated(ROOT / "bus_recv.py", "dell", "--no-follow")
    assert code == 2 and "--no-follow" in err
