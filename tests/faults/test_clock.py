import pytest

from tests.faults.clock import CRASH, clock_steps, retention
from tests.faults.crash import crash
from tests.faults.history import Conversation
from tests.kit import old_client
from tests.kit.processes import Server


@pytest.mark.slow("600 sends that wait for the disk, and 4 crashes")
@pytest.mark.parametrize("skew", [0, 120, -120], ids=["right", "ahead", "behind"])
def test_an_old_client_loses_nothing_when_the_clock_steps_and_the_server_is_killed(tmp_path, skew):
    assert clock_steps(tmp_path, 600, [CRASH, -3600, CRASH, +300, CRASH], skew).violations == []


def test_a_bus_whose_ticks_are_the_clock_as_it_is_is_found_out(tmp_path):
    found = clock_steps(tmp_path, 400, [-3600], fault="raw clock", patience=0.3).violations
    assert any(violation.startswith("lost") for violation in found)


def test_an_old_client_gets_what_was_queued_before_it_came(tmp_path):
    """More than three answers of its 100."""
    with Server(tmp_path / "bus.db") as bus, Conversation(old_client, bus.url, "bob") as talk:
        for number in range(8):
            talk.speak(f"sender-{number}", [f"message {count}" for count in range(40)])
        talk.wait_for_senders()
        crash(bus)
        talk.listen(since=0)
        assert talk.finish() == []
        assert all(each.tick for each in talk.sent)


def test_a_reader_is_told_of_all_that_retention_removed_before_it_came(tmp_path):
    assert retention(tmp_path, 3).violations == []


def test_a_bus_that_does_not_tell_of_a_gap_is_found_out(tmp_path):
    found = retention(tmp_path, 2, faults="tidy,silent").violations
    assert any(violation.startswith("gap not announced") for violation in found)
