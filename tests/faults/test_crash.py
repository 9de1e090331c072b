import http.client

from tests import new_client
from tests.faults.crash import early, storm
from tests.faults.history import observed, tick
from tests.processes import Server, wait_until


def test_nothing_acknowledged_is_lost_when_the_server_is_killed(tmp_path):
    assert storm(tmp_path, 30).violations == []


def test_a_bus_that_acknowledges_before_it_commits_is_found_out(tmp_path_factory):
    assert early(tmp_path_factory.mktemp("stopped"), end=Server.stop).violations == []
    found = early(tmp_path_factory.mktemp("killed")).violations
    assert any(": lost: " in violation for violation in found)


def test_a_retry_of_a_send_whose_answer_the_crash_took_is_stored_once(bus):
    connection = http.client.HTTPConnection("127.0.0.1", bus.port)
    connection.request("POST", "/send", new_client.keyed("ann", "bob", "did you get this?"))
    stored = wait_until(lambda: observed(bus.url))
    bus.kill()
    bus.start()
    ts = new_client.send(bus.url, "ann", "bob", "did you get this?")
    assert [each.tick for each in stored] == [tick(ts)]
    assert observed(bus.url) == stored
