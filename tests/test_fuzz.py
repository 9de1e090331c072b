"""The quick versions of python -m tests.fuzz; see there."""
import pytest

from tests.faults import faulty
from tests.fuzz import raw


def test_mutated_requests_on_raw_sockets_leave_the_bus_whole(tmp_path):
    assert raw.run(tmp_path, 20_000, seed=1).violations == []


def test_a_bus_that_has_not_thought_of_nan_is_found_out(tmp_path):
    found = raw.run(tmp_path, 20_000, seed=1, **faulty("stumbling")).violations
    assert any(violation.startswith("500 ") for violation in found)
    assert any("KeyError" in violation for violation in found)


@pytest.mark.parametrize("came", [b"HTTP/1.1 200 OK\r\n", b"x", b"HTTP/1.1 400 No\r\nContent-Length: 2\r\n\r\n{}"])
def test_what_is_no_sequence_of_answers_is_found_out(came):
    with pytest.raises(ValueError):
        raw.statuses(came)
