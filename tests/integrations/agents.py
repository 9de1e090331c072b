"""`make agents`: the newest of each agent program from npm, tried, and docs/agents.md written.

    python -m tests.integrations.agents [NAME ...]     # only these

The programs come into ~/.cache/agent-bus-agents. It ends with 0 also if a program fails a test: then the table says
so, and what has changed in that program is work to do.
"""

import datetime
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree

from tests.integrations.test_agents import PROGRAMS, bus_agents
from tests.kit.processes import ROOT

FOLDER = pathlib.Path.home() / ".cache" / "agent-bus-agents"
FILE = ROOT / "docs" / "agents.md"
MARK = "<!-- make agents writes what follows -->\n"
TESTS = {
    "test_it_accepts_what_install_writes[{}]": "accepts it",
    "test_a_call_of_a_tool_comes_back[{}-stdio]": "tool call, stdio",
    "test_a_call_of_a_tool_comes_back[{}-http]": "tool call, HTTP",
    "test_its_hook_brings_a_notice[{}-stdio]": "notice by hook",
    "test_the_real_{}_is_woken_in_its_session": "woken",
    "test_uninstall_leaves_its_files_as_they_were[{}]": "uninstall",
}


def version(name):
    """The version of an installed program, or None."""
    binary = FOLDER / "node_modules" / ".bin" / name
    if not binary.exists():
        return None
    said = subprocess.run([binary, "--version"], capture_output=True, text=True, stdin=subprocess.DEVNULL).stdout
    found = re.search(r"\d+\.\d+\.[\w.-]*\w", said)
    return found[0] if found else "?"


def results():
    """How each test ended, by name: yes, no, or - for one that was skipped; and the same of those of whole sessions."""
    with tempfile.TemporaryDirectory() as folder:
        report = pathlib.Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-p", "no:xdist", f"--junitxml={report}"]
        files = "agents", "wake", "end_to_end", "end_to_end_terminal"
        tests = [f"tests/integrations/test_{file}.py" for file in files]
        env = {**os.environ, "AGENT_BUS_AGENTS": str(FOLDER), "CLAUDE_BINARY": str(FOLDER / "node_modules/.bin/claude")}
        subprocess.run([*command, *tests, "-k", "test_agents or real or end_to_end"], cwd=ROOT, env=env)
        cases = list(xml.etree.ElementTree.parse(report).iter("testcase"))
    whole = [ended(case) for case in cases if "end_to_end" in case.get("classname")]
    return {case.get("name"): ended(case) for case in cases}, whole


def ended(case):
    tags = {child.tag for child in case}
    return "no" if tags & {"failure", "error"} else "-" if "skipped" in tags else "yes"


def table(found):
    head = ["program", "version", *TESTS.values()]
    rows = [head, ["---"] * len(head)]
    for name in filter(version, PROGRAMS):
        row = [found.get(test.format(name), "-") for test in TESTS]
        rows.append([bus_agents.AGENTS[name].title, version(name), *row])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def main(names):
    for name in names or PROGRAMS:
        package = f"{PROGRAMS[name].package}@latest"
        subprocess.run(["npm", "install", "--prefix", str(FOLDER), "--silent", "--no-fund", "--no-audit", package])
    written, _, _ = FILE.read_text().partition(MARK)
    today = datetime.datetime.now(datetime.timezone.utc).date()
    found, whole = results()
    sessions = f"Of the {len(whole)} tests of whole sessions with this Claude Code, {whole.count('yes')} passed."
    FILE.write_text(f"{written}{MARK}\nTried on {today}:\n\n{table(found)}\n{sessions}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
