import http.client

import pytest

from tests.faults import faulty
from tests.faults.crash import SHORT, crowd, early, reader_storm, standstill, storm
from tests.faults.history import observed, tick
from tests.kit import new_client
from tests.kit.processes import wait_until


@pytest.mark.slow("5 crashes, as many as find what is lost below, and sends between them that wait for the disk")
def test_nothing_acknowledged_is_lost_when_the_server_is_killed(tmp_path):
    assert storm(tmp_path, 5, life=SHORT).violations == []


@pytest.mark.slow("5 crashes: fewer may lose nothing by chance; and 2 restarts")
def test_a_bus_that_acknowledges_before_it_commits_is_found_out(tmp_path_factory):
    def stop(bus):
        bus.stop()
        bus.start()

    assert early(tmp_path_factory.mktemp("stopped"), 2, stop, SHORT).violations == []
    found = early(tmp_path_factory.mktemp("killed"), life=SHORT).violations
    assert any(": lost: " in violation for violation in found)


def test_nothing_of_full_batches_is_lost_when_the_server_is_killed(tmp_path):
    assert crowd(tmp_path, 3).violations == []


def test_a_bus_that_acknowledges_full_batches_before_it_commits_is_found_out(tmp_path):
    assert any("lost: " in violation for violation in crowd(tmp_path, 3, **faulty("early")).violations)


def test_nothing_is_lost_while_the_server_stands_still(tmp_path):
    assert standstill(tmp_path, 1.5).violations == []


def test_a_reader_that_is_killed_loses_nothing_and_repeats_a_batch_at_most(tmp_path):
    assert reader_storm(tmp_path, 6).violations == []


def test_a_reader_that_saves_its_cursor_first_is_found_out(tmp_path):
    found = reader_storm(tmp_path, 8, script="tests/faults/hasty_reader.py").violations
    assert any(violation.startswith("lost") for violation in found)


def test_a_retry_of_a_send_whose_answer_the_crash_took_is_stored_once(bus):
    connection = http.client.HTTPConnection("127.0.0.1", bus.port)
    connection.request("POST", "/send", new_client.keyed("ann", "bob", "did you get this?"))
    stored = wait_until(lambda: observed(bus.url))
    bus.kill()
    bus.start()
    ts = new_client.send(bus.url, "ann", "bob", "did you get this?")
    assert [each.tick for each in stored] == [tick(ts)]
    assert observed(bus.url) == stored
