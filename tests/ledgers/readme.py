"""deploy/cluster/README.md, "On three machines", command by command on three machines that are networks of this one.

What is installed already is not installed again, and the copy of the secret is made as a person would.
"""
import contextlib
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

from tests.faults import Result, unless
from tests.kit.nodes import NAMES, PATRONI, Networks, Node, family
from tests.kit.processes import PATIENCE, ROOT, comes_true, wait_until

README = ROOT / "deploy" / "cluster" / "README.md"
LOOK = 0.5  # s


def blocks():
    """(the sentence before it, the commands) for each block of the part, without that which installs."""
    text = README.read_text().partition("\n## On three machines\n")[2].partition("\n## ")[0]
    return re.findall(r"^(?:On|The) ([^\n]*(?:\n[^`\n]+)*)\n\n```sh\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)[1:]


class Machines:
    def __init__(self):
        self.networks = Networks()
        self.folder = Path(tempfile.mkdtemp(prefix="agent-bus-machines-"))
        self.folder.chmod(0o711)

    def place(self, name):
        """What is /srv/ledger on this machine."""
        return self.folder / name

    def run(self, name, commands):
        its = commands.replace("/srv/ledger", str(self.place(name))).replace("/opt/agent-bus", str(ROOT))
        for number, each in enumerate(("10.0.0.1", "10.0.0.2", "10.0.0.3"), 2):
            its = its.replace(each, f"{self.networks.net}.{number}")
        its = its.replace("/opt/patroni/bin", os.path.dirname(PATRONI))
        env = {**{name: value for name, value in os.environ.items() if not name.startswith("AGENT_")},
               "PATRONI": PATRONI, "AGENT_BUS_STATE_DIR": str(self.folder)}  # fmt: skip
        with tempfile.TemporaryFile() as said:  # a pipe would end with the last process that was started
            command = [*self.networks.inside(name), "bash", "-euc", its]
            done = subprocess.run(command, env=env, stdin=subprocess.DEVNULL, stdout=said, stderr=said, timeout=120)
            said.seek(0)
            printed = said.read().decode()
        assert done.returncode == 0, (name, its, printed)
        return printed

    def leader(self):
        for name in NAMES:
            found = re.search(r"^\| (m\d) .*\| Leader ", self.run(name, LIST), re.MULTILINE)
            if found:
                return found[1]
        return None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for name in NAMES:
            Node(self, name, "").kill()
            with contextlib.suppress(OSError, ValueError):
                for pid in family(int((self.place(name) / "front.pid").read_text()), "bus_server.py"):
                    os.kill(pid, signal.SIGKILL)
        self.networks.close()
        shutil.rmtree(self.folder, ignore_errors=True)


LIST = "/opt/patroni/bin/patronictl -c /srv/ledger/patroni.yml list"


def by_its_own_text(place, size):
    """From the secret to the second message, and how long it took."""
    began, printed = time.monotonic(), ""
    with Machines() as machines:
        for sentence, commands in blocks():
            where = re.match(r"(m\d|any machine|the machine that leads)", sentence)
            name = where[1] if where and where[1] in NAMES else "m1"
            if "secret" in commands and "write" not in commands:
                machines.run(name, commands)
                for other in ("m2", "m3"):
                    machines.place(other).mkdir()
                    shutil.copy(machines.place("m1") / "secret", machines.place(other) / "secret")
                continue
            if sentence.startswith("the machine that leads"):
                name = machines.leader()
            if commands.strip() == LIST:
                wait_until(lambda: machines.run("m1", LIST).count("Quorum Standby") == 2, 90)
            printed = machines.run(name, commands)
            if "front.pid" in commands and "bus_server.py" in commands:
                log = machines.place(name) / "front.log"
                assert comes_true(lambda: "listening on" in log.read_text(), PATIENCE), log.read_text()  # noqa: B023
    took = time.monotonic() - began
    got = re.findall("^[|] (.*)", printed, re.MULTILINE)
    return Result(f"{took:.0f} s from the secret to the second message", unless(got == ["one", "two"], printed))
