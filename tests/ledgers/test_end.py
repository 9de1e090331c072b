"""A front that is told to end does end, whatever its ledger does, and begins nothing of its own meanwhile."""
import fcntl
import threading

import pytest

import ledgers.front
from bus_server import Marks, Tokens
from tests.kit.ledger import ask, common_look, invited, put, request, settle
from tests.kit.processes import PATIENCE, ROOT, Server

# Its ledger takes the first entry, and does not come back from any other append: not at the deadline, not ever.
STUCK = f"""
import sys, threading
sys.path.insert(0, {str(ROOT)!r})
import bus_server, ledgers.front, ledgers.start
from tests.kit.ledger import Fake, Log

class Stuck(Fake):
    def append(self, *arguments):
        if self.log.entries:
            threading.Event().wait()
        return super().append(*arguments)

ledgers.start.connect = lambda *_: Stuck(Log())
ledgers.front.END = 1.0
sys.exit(bus_server.main())
"""


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    """The end of a front would be that of this process."""
    monkeypatch.setattr(ledgers.front, "END", 900.0)


def comes_back(call, mend):
    """Did this call come back, in a thread? If not, `mend()` lets it come back."""
    thread = threading.Thread(target=call)
    thread.start()
    thread.join(PATIENCE)
    came = not thread.is_alive()
    mend()
    thread.join()
    return came


def test_a_front_that_drains_begins_nothing_of_its_own(fronts, log, monkeypatch):
    a, b = fronts("a"), fronts("b")
    [tick] = put(b)
    settle(a, b)
    request(b, "POST", "/recall", {"id": f"{tick:x}"})
    settle(b)
    ask(a, "POST", "/send", {"from": "ann", "to": "builds", "msg": "job"})
    [job] = ask(a, "POST", "/claim", {"to": "builds", "worker": "w", "wait": 0, "lease": 5})[1]["messages"]
    assert ask(a, "POST", "/extend", {"id": job["id"], "lease": job["lease"], "seconds": 5})[0] == 200
    assert a.ledger.detours["recall"].__self__.held
    invited(a)
    before, threads = len(log.entries), []
    monkeypatch.setattr(a.loop, "in_thread", lambda *_: threads.append(1))
    a.drain()
    for _, _, action in [*a.loop.timers]:
        action()
    a.tidy()
    common_look(a)
    a.ledger.fronts.beat()
    kinds = {step.operation.kind for step in a.ledger.next}
    assert kinds <= {"marks"} and not a.ledger.due and not threads and len(log.entries) == before


def test_a_drain_ends_though_reads_are_answered_and_appends_are_not(fronts, monkeypatch):
    """As with a PostgreSQL that has lost its standbys; and something here begins anew whenever it was refused."""
    for name, value in (("PAUSE", 0.001), ("GIVE_UP", 0.02), ("DRAIN_SECONDS", 0.0), ("MARKS", 0.5)):
        monkeypatch.setattr(ledgers.front, name, value)
    a = fronts()
    a.state.ledger.faults = ["lost"] * 1000000

    def again(marks):
        a.do(Marks([], [], {}), None, lambda *_: None, again)

    again(None)
    assert comes_back(a.end, a.state.ledger.faults.clear)


def test_a_drain_does_not_wait_for_as_long_as_a_send_would(fronts, monkeypatch):
    for name, value in (("PAUSE", 0.001), ("GIVE_UP", 900.0), ("DRAIN_SECONDS", 0.0), ("MARKS", 0.3)):
        monkeypatch.setattr(ledgers.front, name, value)
    a, refused = fronts(), []
    a.state.ledger.faults = ["lost"] * 1000000
    a.do(Marks([], [], {}), None, lambda *_: None, refused.append)
    assert comes_back(a.end, a.state.ledger.faults.clear) and len(refused) == 1


def test_a_drain_waits_for_what_the_ledger_takes_in_time(fronts, monkeypatch):
    """Also for the marks, which are written when the time of the requests is over."""
    monkeypatch.setattr(ledgers.front, "DRAIN_SECONDS", 0.0)
    a = fronts()
    a.state.ledger.slow, told = 0.2, []
    a.do(Marks([], [], {}), None, lambda *_: told.append(1))
    a.end()
    assert told == [1] and a.ledger.idle()


def test_a_front_ends_though_its_ledger_never_comes_back(tmp_path):
    with Server(tmp_path / "a.db", "--ledger", "postgresql:", program=["-c", STUCK]) as bus:
        assert bus.stop() == 1
    assert "in append" in bus.log.read_text(), "it says where it waited"


def test_no_turn_waits_for_a_command_that_has_locked_the_tokens(fronts):
    """It may have been stopped with Ctrl-Z. SIGTERM, too, is for a turn."""
    a, b = fronts("a"), fronts("b")
    invited(a)
    common_look(a)
    settle(a)
    with open(f"{b.state.path}.tokens.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert comes_back(lambda: settle(b), lambda: fcntl.flock(lock, fcntl.LOCK_UN))
        assert not Tokens.rows(b.gate.tokens), "its file"
    common_look(b)
    assert [row["name"] for row in Tokens.rows(b.gate.tokens)] == ["ann"], "the next look writes them"
