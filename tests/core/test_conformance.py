"""test_bus.py finds the faults of other servers: each in a bus that has no other, and none in one that has none."""

import re

import pytest

import bus_send
import test_bus
from tests.faults.network import live_reading
from tests.kit.checks import CHECKS, make, possible
from tests.kit.naive_server import FAULTS, Naive
from tests.kit.peers import command, invite
from tests.kit.processes import Server, run_checks

FOUND_BY = {
    "now is the wall clock": ["9.2", "9.6", "9.8", "9.22"],
    "a time is older than its place": ["9.6"],
    "reading takes away": ["9.1"],
    "the oldest are evicted": ["9.22"],
    "the last one comes again": ["9.1", "9.6"],
    "a cursor ahead is left there": ["9.18"],
    "max is not known": ["9.3"],
    "wait is not known": ["9.14"],
    "there is one channel": ["2.3"],
    "a broadcast comes back": ["3.3"],
    "a retry is stored again": ["8.5"],
    "anything is a name": ["2.1"],
    "any JSON is good": ["2.7"],
    "members may be missing": ["3.1"],
    "any page may send": ["5.7"],
}


def run(url):
    """(exit code, the numbers of the checks that failed, what was printed) of test_bus.py."""
    done = run_checks(url)
    return done.returncode, re.findall(r"^([\d.]+) .*: FAILED$", done.stdout, re.MULTILINE), done.stdout


@pytest.mark.parametrize("fault", sorted(FAULTS))
def test_each_fault_is_found_by_its_check_and_nothing_where_it_is_mended(fault):
    for number in FOUND_BY[fault]:
        with Naive({fault}) as bus, pytest.raises(AssertionError):
            CHECKS[number](test_bus.Bus(bus.url))
        with Naive(set()) as bus:
            CHECKS[number](test_bus.Bus(bus.url))


def test_a_naive_server_fails_and_is_told_why():
    with Naive() as bus:
        code, failed, printed = run(bus.url)
    assert code == 1 and printed.endswith(f"{len(failed)} FAILED\n")
    assert {"2.3", "3.1", "9.1", "9.2", "9.3"} <= set(failed)


def test_a_server_of_the_first_contract_without_faults_passes():
    with Naive(set()) as bus:
        code, failed, printed = run(bus.url)
    assert (code, failed) == (0, []) and "skipped, not in the first contract" in printed


def test_a_bus_with_tokens_that_has_removed_a_broadcast_keeps_its_promises_to_an_operator(tmp_path):
    """There each new name is told of a gap, at once. As people run it, it is the same with BUS_OURS=1."""
    with Server(tmp_path / "bus.db") as bus:
        bus_send.send("all", "hello", url=bus.url, sender="ann")
        command(bus, "prune", "--older", "0", "--pending")
        checked = test_bus.Bus(bus.url, invite(bus, "op", "--operator"))
        assert "gap" in checked.get("/recv?to=op&since=0")
        run = possible(checked)
        make(checked, run)
    open_only = [check for check in CHECKS.values() if getattr(check, "needs", None) == "a bus without tokens"]
    assert checked.me == "op" and CHECKS["5.1"] in run and len(run) == len(CHECKS) - len(open_only)


# The checker of histories


@pytest.mark.parametrize("live, queued", [(0, 150), (100, 0)], ids=["queued", "live"])
def test_the_messages_that_a_wall_clock_loses_are_found_and_none_without_it(live, queued):
    found = live_reading(Naive({"now is the wall clock"}), queued, live, patience=0.3).violations
    assert any(violation.startswith("lost: ") for violation in found)
    assert live_reading(Naive(set()), queued, live).violations == []
