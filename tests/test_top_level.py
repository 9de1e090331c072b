"""A stranger opens the repository: at its top level lies what it is made of, and nothing that was left there."""
import shutil
import subprocess

import pytest

from tests.kit.processes import ROOT

FILES = {"bus_server.py", "bus_recv.py", "bus_send.py", "bus_listener.sh", "test_bus.py", "pyproject.toml", "Makefile"}
WORDS = {"README.md", "PROTOCOL.md", "CHANGELOG.md", "SECURITY.md", "LICENSE"}
FOLDERS = {"bench", "bus_extensions", "deploy", "docs", "examples", "integrations", "ledgers", "tests", "tools"}
HIDDEN = {".ci", ".claude-plugin", ".gitignore"}


@pytest.mark.skipif(not (shutil.which("git") and (ROOT / ".git").exists()), reason="not a clone")
def test_nothing_else_is_committed_at_the_top_level():
    command = ["git", "-c", "safe.directory=*", "ls-files", "-z"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert {path.partition("/")[0] for path in listed.split("\0") if path} == FILES | WORDS | FOLDERS | HIDDEN
