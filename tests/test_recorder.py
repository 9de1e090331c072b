"""tests/kit/recorder.py: two recordings of one server are equal, and a difference between two servers is seen."""

import re

import pytest

import test_bus
from tests.kit.recorder import Conversation, Recording, compare, main, record

ROOT = test_bus.HERE
CHECKS = '''
def test_sends(bus):
    """8.1 a send with a key, and its retry"""
    to, key = fresh(), uuid.uuid4().hex
    assert bus.send(to, key=key)["id"] == bus.send(to, key=key)["id"]
    bus.refused({})
    assert bus.ask("HEAD", "/healthz")[2] == b""


def test_parks(bus):
    """9.4 a parked poll, and what /agents and /inbox say meanwhile"""
    to = fresh()
    waiting = in_background(bus.recv, to, block="true", since=bus.recv(to)["now"])
    soon(lambda: bus.get("/agents")["agents"])
    bus.send(to)
    bus.get("/inbox")
    assert [message["msg"] for message in waiting.result(PATIENCE)["messages"]] == ["hello"]


@open_only
def test_claims(bus):
    """13.1 a job"""
    queue = fresh("queue")
    bus.send(queue)
    [job] = bus.post("/claim", to=queue, wait=0)["messages"]
    bus.post("/ack", id=job["id"], lease=job["lease"])
    bus.ask("GET", "/metrics")
'''


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """Two recordings of one server by a small suite."""
    folder = tmp_path_factory.mktemp("recorder")
    suite = folder / "suite.py"
    helpers = (ROOT / "test_bus.py").read_text().partition("# ── 2. ")[0]
    suite.write_text(helpers + CHECKS)
    for name in ("one", "two"):
        assert record(str(ROOT / "bus_server.py"), str(suite), str(folder / name)) == 0
    return folder / "one", folder / "two"


def test_two_recordings_of_one_server_are_equal(recordings, capsys):
    assert compare(*recordings) == 0
    assert capsys.readouterr().out == "0 of 6 checks differ\n"


def test_a_recording_has_every_exchange_in_order_and_nothing_random(recordings):
    text = recordings[0].read_text()
    starts = re.findall(r"^> ([A-Z]+ [^ ?]+)|^(==.*)|^< HTTP/1.1 (\d+)", text, re.MULTILINE)
    said = ["".join(each) for each in starts]
    assert said[:9] == [
        "== open: 8.1 passed", "POST /send", "200", "POST /send", "200", "POST /send", "400", "HEAD /healthz", "200",
    ]  # fmt: skip
    assert "== with tokens: 13.1 skipped: needs a bus without tokens" in said
    assert '"lease": "LEASE", "lease_until": TIME' in text and '"error": SENTENCE' in text
    assert 'agent_bus_commits_total N' in text
    assert not re.search(r"\d{10}\.\d{6}|abt_|127\.0\.0\.1:\d", text)


@pytest.mark.parametrize(
    "was, became",
    [
        ('"more": false', '"more": true'),
        ('"duplicate": true, "receiver"', '"receiver"'),
        ('"ts": TICK1, "channel"', '"channel", "ts": TICK1'),
        ("HTTP/1.1 400 Bad Request", "HTTP/1.1 422 Unprocessable Entity"),
        ('{"error": SENTENCE}', "SENTENCE"),
        ('{"error": SENTENCE}', '{"error": SENTENCE, "code": 7}'),
        ("Cache-Control: no-store\n", ""),
        ('"id": "ID1"', '"id": "ID2"'),
        ("agent_bus_commits_total N", "agent_bus_commits N"),
        ("== open: 13.1 passed", "== open: 13.1 FAILED"),
    ],
)
def test_any_other_difference_is_found(recordings, tmp_path, capsys, monkeypatch, was, became):
    text = recordings[0].read_text()
    assert was in text
    (tmp_path / "other").write_text(text.replace(was, became, 1))
    monkeypatch.setattr("sys.argv", ["recorder", "--compare", str(recordings[0]), str(tmp_path / "other")])
    assert main() == 1
    assert "1 of 6 checks differ" in capsys.readouterr().out


def exchange(answer, body, target="/send"):
    """The lines of one answer."""
    said = Conversation()
    said.asked += f"GET {target} HTTP/1.1\r\nHost: 127.0.0.1:8080\r\n\r\n".encode()
    said.answered += f"HTTP/1.1 {answer}\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()
    return list(Recording(["mine"], 8080).lines(said))


@pytest.mark.parametrize(
    "one, other, same",
    [
        ('{"error": "no \\"such\\" name"}', '{"error": "there is none"}', True),
        ('{"error": "a", "hint": "b"}', '{"error": "a"}', False),
        ('{"ts": 1795203596.123456, "id": "660ba68a57d40"}', '{"ts": 1795203597.000001, "id": "660ba68b2dd41"}', True),
        ('{"ts": 1795203596.123456, "id": "660ba68a57d40"}', '{"ts": 1795203596.123456, "id": "660ba68b2dd41"}', False),
        ('{"ts": 1795203596.123456}', '{"ts": 1795203596.123}', False),
        ('{"last_seen": null}', '{"last_seen": 1795203596.123456}', False),
        ('{"lease": "9c1f0d7755aa3b10"}', '{"lease": "longer-9c1f0d7755aa3b10"}', True),
        ('{"lease": "9c1f0d7755aa3b10"}', '{"lease": null}', False),
        ('{"bus": "5f0c8d0a7be31e42"}', '{"bus": "0000000000000000"}', True),
        ('{"unread": 1}', '{"unread": 2}', False),
        ('{"a": 1}', '{"a":1}', False),
    ],
)
def test_only_what_differs_from_run_to_run_is_replaced(one, other, same):
    assert (exchange("200 OK", one) == exchange("200 OK", other)) is same


def test_only_the_names_of_a_check_are_kept_of_an_answer_about_everybody():
    body = '{"recipients": {"default": {"mine-1": 2, "another": 1}, "lab": {"another": 1}}, "now": 1795203596.123456}'
    assert exchange("200 OK", body, "/inbox")[-1] == '< {"recipients": {"default": {"mine-1": 2}}, "now": TICK1}'
