"""Every command on the pages docs/coming-from/ runs, in a shell of a user who has just come."""
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest

from tests.kit.peers import Peer
from tests.kit.processes import PATIENCE, ROOT, free_port, wait_until

PAGES = sorted((ROOT / "docs" / "coming-from").glob("*.md"))
CELL = re.compile(r"(?<!\\)\|")


def commands(page):
    """What is in backquotes in the last column of the page's table, if it is a command."""
    rows = [CELL.split(line)[1:-1] for line in page.read_text().splitlines() if line.startswith("| ")]
    cells = [row[-1].strip() for row in rows]
    return [cell.strip("`") for cell in cells if re.match(r"`(AGENT_NAME=\S+ )?(agent-bus|curl) ", cell)]


@pytest.fixture
def shell(tmp_path, bus):
    """Runs a line in a home that has nothing but the command agent-bus."""
    tools = tmp_path / "bin"
    tools.mkdir()
    program = tools / "agent-bus"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} {ROOT / "tools" / "agent_bus.py"} "$@"\n')
    program.chmod(0o755)
    (tmp_path / "report.pdf").write_bytes(b"%PDF")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("AGENT_", "XDG_"))}
    env = {**kept, "HOME": str(tmp_path), "PATH": f"{tools}:{kept['PATH']}", "AGENT_BUS_URL": bus.url}
    number = Peer(bus).send("POST", "/send", {"from": "dell", "to": "spark", "msg": "hi"}).answer().json["id"]

    def start(line):
        return subprocess.Popen(
            [shutil.which("bash"), "-c", line], env={**env, "ID": number}, cwd=tmp_path, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip

    return start


def answer_the_question(bus):
    """What the agent does that is asked; it has read its earlier mail."""
    peer = Peer(bus)

    def question():
        found = peer.send("GET", "/log?to=dell&max=1000").answer().json["messages"]
        return next((each["id"] for each in found if each["msg"] == "did they pass?"), None)

    answer = {"from": "dell", "to": "spark", "msg": "yes", "reply_to": wait_until(question)}
    assert peer.send("POST", "/send", answer).answer().status == 200


def serve(line, shell, bus):
    """The bus itself starts, on a port that is free here."""
    port = free_port()
    process = shell(line.replace("8080", str(port)) + " --db new.db")
    try:
        wait_until(lambda: subprocess.run(["curl", "-sf", f"http://127.0.0.1:{port}/healthz"]).returncode == 0)
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.communicate(timeout=PATIENCE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_before_its_first_command_the_page_says_what_to_install_and_to_set(page):
    text = page.read_text()
    before = text.partition("| there |")[0]
    assert "`pip install .`" in before and "python3 tools/agent_bus.py" in before
    assert "$AGENT_BUS_URL" not in text or "`AGENT_BUS_URL` is the URL" in before
    assert "$ID" not in text or "`ID` is the id" in before


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_command_of_the_page_runs(page, bus, shell):
    found = commands(page)
    assert len(found) > 3
    for line in found:
        if "agent-bus serve" in line:
            serve(line, shell, bus)
            continue
        for name in re.findall(r"(?:recv|work|inbox) (\w+)|to=(\w+)&since", line):
            work = {"from": "spark", "to": name[0] or name[1], "msg": "one more"}
            assert Peer(bus).send("POST", "/send", work).answer().status == 200
        process = shell(line)
        if "agent-bus ask" in line:
            answer_the_question(bus)
        out, err = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, (line, out, err)


def test_there_is_a_page_for_each_of_the_five_kinds():
    assert [page.stem for page in PAGES] == ["broker", "first-contract", "folder", "mcp-mail", "tmux"]


def test_the_tools_that_the_page_names_are_those_of_the_mcp_server():
    page = next(page for page in PAGES if page.stem == "mcp-mail").read_text()
    server = "".join(file.read_text() for file in (ROOT / "bus_extensions").glob("_*_tools.py"))
    named = set(re.findall(r"`(bus_\w+)`", page))
    assert len(named) == 8 and all(f'"{name}": Tool(' in server for name in named)
