"""The quick versions of python -m tests.fuzz; see there."""
import subprocess
import sys
import types

import pytest

import bus_server
from tests.faults import faulty
from tests.fuzz import NEEDS, coverage, python_for, raw
from tests.kit.processes import ROOT


@pytest.mark.slow("4,000 requests")
def test_mutated_requests_on_raw_sockets_leave_the_bus_whole(tmp_path):
    assert raw.run(tmp_path, 4_000, seed=1).violations == []


@pytest.mark.slow("up to 4,000 requests")
def test_a_bus_that_has_not_thought_of_nan_is_found_out(tmp_path):
    found = raw.run(tmp_path, 4_000, seed=1, **faulty("stumbling")).violations
    assert any(violation.startswith("500 ") for violation in found)
    assert any("KeyError" in violation for violation in found)


@pytest.mark.parametrize("came", [b"HTTP/1.1 200 OK\r\n", b"x", b"HTTP/1.1 400 No\r\nContent-Length: 2\r\n\r\n{}"])
def test_bytes_that_are_not_a_sequence_of_answers_are_found_out(came):
    with pytest.raises(ValueError):
        raw.statuses(came)


@pytest.mark.parametrize("mode, seconds", [("schema", "2"), ("coverage", "1")])
def test_a_few_seconds_of_fuzzing_find_nothing(mode, seconds):
    if not python_for(mode):
        pytest.skip(f"{NEEDS[mode]} is not here: make fuzz installs it")
    command = [sys.executable, "-m", "tests.fuzz", mode, "--seconds", seconds]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip().endswith("; 0 violations"), done.stdout + done.stderr


# What the coverage-guided targets compare, without atheris


def differences(target, server=bus_server):
    """The cases of the tests on which the server and the reference do not agree."""
    found = []
    for seed in coverage.seeds(target):
        try:
            coverage.TARGETS[target](server, seed)
        except AssertionError:
            found.append(seed)
    return found


@pytest.mark.parametrize("target", coverage.TARGETS)
def test_the_reference_agrees_with_the_server_on_every_case_of_the_tests(target):
    assert differences(target) == []


def naive_json(data):
    try:
        return coverage.json.loads(data)
    except (ValueError, RecursionError):
        raise bus_server.Refused(400, "no JSON") from None


class NaiveHead(bus_server.Head):
    def check_framing(self):
        self.length = 0


@pytest.mark.parametrize("target, fault", [
    ("message", {"parse_json": naive_json}),
    ("message", {"draft": lambda fields, key: bus_server.draft({**fields, "msg": "x"}, key)}),
    ("head", {"Head": NaiveHead}),
    ("query", {"cursor": lambda text: round(float(text) * 1000000)}),
    ("query", {"Query": lambda text: bus_server.Query(text.replace("%", ""))}),
])  # fmt: skip
def test_a_server_that_disagrees_with_the_reference_is_found_out(target, fault):
    class Faulty(types.SimpleNamespace):
        def __getattr__(self, name):
            return getattr(bus_server, name)

    found = False
    try:
        found = bool(differences(target, Faulty(**fault)))
    except (ValueError, TypeError, KeyError):  # an error of its own, which is none that may come out
        found = True
    assert found
