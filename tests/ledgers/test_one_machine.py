"""deploy/cluster/: its README works, command by command."""
import contextlib
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile

import pytest

from tests.kit import postgres
from tests.kit.processes import PATIENCE, ROOT, free_port

pytestmark = pytest.mark.skipif(bool(postgres.reason_to_skip()), reason=str(postgres.reason_to_skip()))


def test_the_readme_works_line_by_line(tmp_path):
    folder = pathlib.Path(tempfile.mkdtemp(prefix="agent-bus-"))  # where the user of PostgreSQL can reach it
    ports = [str(free_port()), str(free_port())]
    text = (ROOT / "deploy" / "cluster" / "README.md").read_text().partition("### Three nodes")[0]
    for known, its in (("/tmp/bus", str(folder)), ("8081", ports[0]), ("8082", ports[1])):
        text = text.replace(known, its)
    env = {**os.environ, "PORTS": " ".join(ports), "PYTHON": sys.executable, "AGENT_BUS_STATE_DIR": str(tmp_path)}
    env["COLUMNS"] = "20"  # of a narrow terminal: ps makes its lines as short
    first, *further = re.findall(r"^```sh\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    printed, url = [], f"AGENT_BUS_URL=http://127.0.0.1:{ports[0]},http://127.0.0.1:{ports[1]}"
    try:
        for block in (first, *further):
            command = ["bash", "-euc", block]
            done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=3 * PATIENCE)
            assert done.returncode == 0, (block, done.stdout, done.stderr)
            printed.append(done.stdout)
            if block is first:
                assert done.stdout == f"export {url}\n"
                env["AGENT_BUS_URL"] = url.partition("=")[2]
        assert re.findall("^[|] (.*)", printed[2], re.MULTILINE) == ["one", "two"]
        assert printed[3].count("ok    bus") == 2 and "FAIL" not in printed[3]
        assert not folder.exists() and not processes_of(folder)
    finally:
        if folder.exists():
            subprocess.run([ROOT / "deploy/cluster/one_machine.sh", "stop", folder], env=env, capture_output=True)
            shutil.rmtree(folder, ignore_errors=True)
        for pid in processes_of(folder):
            os.kill(pid, signal.SIGKILL)


def processes_of(folder):
    """Those whose command line names a path in this folder."""
    found = []
    for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            if f"{folder}/".encode() in path.read_bytes():
                found.append(int(path.parent.name))
    return found
