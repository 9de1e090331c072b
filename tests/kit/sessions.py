"""Sessions without processes: lives that a test begins and ends at once, and their names on the bus."""
import sys

import pytest

import bus_recv
from tests.kit.processes import ROOT, no_settings

sys.path[:0] = [str(ROOT / "integrations" / "claude_code"), str(ROOT / "tools")]
import processes  # noqa: E402
import session  # noqa: E402

NOWHERE = "http://127.0.0.1:9"  # nobody listens there


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


def read(me):
    return [each["msg"] for each in bus_recv.receive(me.names, once=True, timeout=0)]
