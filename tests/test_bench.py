"""The bench is not easily fooled: same bytes, whole answers, what is stored is counted, who is absent is named."""
import contextlib
import http.server
import itertools
import json
import os
import pathlib
import shutil
import sys
import threading
import time
import xml.etree.ElementTree

import pytest

import bus_send
from bench import crowd, machine, report, staged_server, stored, wires
from bench.figures import Claim, Figure, Result, Run, interleaved, quantile
from bench.load import Count, Line, Reader, works, wrk
from bench.peers import AgentBus, ManyNames, Peer, QueueBus
from bench.session import Row, Session, Settings
from bus_server import State
from tests.kit.processes import wait_until

HTTP = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nbody"
XREAD = b"*1\r\n*2\r\n$4\r\ndell\r\n*1\r\n*2\r\n$3\r\n1-0\r\n*2\r\n$1\r\nm\r\n$2\r\nhi\r\n"
MSG = b'PING\r\nMSG _INBOX.1 1 9\r\n{"seq":1}\r\n'


@pytest.fixture
def session(tmp_path):
    return Session(Settings(tmp_path))


@pytest.mark.parametrize("to", ["dell", "reader-12345", "all"])
def test_everybody_sends_the_same_84_bytes_of_json(to):
    body = wires.message(to)
    assert len(body) == 84 and json.loads(body)["to"] == to
    everyone = (wires.Http(1), wires.Nchan(1), wires.Redis(), wires.Nats(), wires.Mqtt(), wires.Beanstalk())
    assert all(body in wire.send(to) for wire in everyone)


@contextlib.contextmanager
def listening():
    """A server that keeps the body of each request: its port, and the bodies."""
    bodies = []

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

        def log_message(self, *_):
            """Quiet."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port, bodies
        server.shutdown()


@pytest.mark.skipif(not shutil.which("wrk"), reason="wrk is not installed")
def test_wrk_sends_its_requests_in_turn_with_another_key_each_time():
    """A request of a wrong length would make the next one unreadable."""
    wire, start = wires.Http(1), time.time()
    turn = {"plain": "", "timed": wires.TIMED_KEY, "random": wires.RANDOM_KEY}
    requests = [wire.post("/send", wires.message(to, key=key)) for to, key in turn.items()]
    with listening() as (port, bodies):
        wrk(port, requests, 1, 1)
    messages = [json.loads(body) for body in bodies]
    keys = {name: [each.pop("key", "") for each in messages if each["to"] == name] for name in turn}
    first = list(turn).index(messages[0]["to"])
    in_turn = itertools.islice(itertools.cycle(turn), first, None)
    assert all(each == json.loads(wires.message(to)) for each, to in zip(messages, in_turn))
    assert set(keys["plain"]) == {""}
    made = keys["timed"] + keys["random"]
    assert len(made) == len(set(made)) and {*map(len, made)} == {len(bus_send.new_key())}
    assert keys["timed"] == sorted(keys["timed"]) and keys["random"] != sorted(keys["random"])
    assert all(start - 1 < int(key[:14], 16) / 1000000 < time.time() for key in keys["timed"])


@pytest.mark.parametrize(
    "wire, answer",
    [
        (wires.Http(1), HTTP),
        (wires.Redis(), b"$15\r\n1795203596123-0\r\n"),
        (wires.Redis(), XREAD),
        (wires.Redis(), b":12\r\n"),
        (wires.Nats(), MSG),
        (wires.Mqtt(), b"\x40\x02\x00\x01"),
        (wires.Beanstalk(), b"INSERTED 1\r\n"),
        (wires.Beanstalk(), b"RESERVED 1 4\r\n\r\n\r\n\r\n"),
        (wires.Beanstalk(), b"DELETED\r\n"),
    ],
)
def test_an_answer_counts_once_it_is_whole(wire, answer):
    assert not any(wire.end(answer[:part]) for part in range(len(answer)))
    assert wire.end(answer) == wire.end(answer + answer) == len(answer)


@pytest.mark.parametrize(
    "wire, answer",
    [
        (wires.Http(1), b"HTTP/1.1 429 Too Many Requests\r\nContent-Length: 0\r\n\r\n"),
        (wires.Redis(), b"-OOM command not allowed\r\n"),
        (wires.Nats(), b'MSG _INBOX.1 1 12\r\n{"error":{}}\r\n'),
        (wires.Mqtt(), b"\x20\x02\x00\x05"),
        (wires.Beanstalk(), b"TIMED_OUT\r\n"),
        (wires.Beanstalk(), b"NOT_FOUND\r\n"),
    ],
)
def test_a_refusal_is_no_answer(wire, answer):
    with pytest.raises(wires.Refused):
        wire.end(answer)


@pytest.mark.parametrize(
    "wire, job, its",
    [
        (wires.Http(1), b'{"messages": [{"ts": 1.5, "id": "6a", "msg": "hi", "attempt": 1, "lease": "9c"}]}',
         b'{"id": "6a", "lease": "9c"}'),
        (wires.Beanstalk(), b"RESERVED 12 2\r\nhi\r\n", b"delete 12\r\n"),
    ],
)
def test_a_worker_acknowledges_the_job_that_it_got(wire, job, its):
    assert wire.acknowledge(job).endswith(its)


def test_an_empty_queue_makes_the_row_of_claims_void():
    with pytest.raises(wires.Refused):
        wires.Http(1).acknowledge(b'{"messages": [], "now": 1.5}')


def test_workers_do_all_the_jobs_of_a_queue_once(session, tmp_path):
    bus = QueueBus(tmp_path)
    with session.running([bus]):
        bus.deliver(["jobs"] * 6)
        found = session.observed(bus, lambda: works(bus.port, bus.wire, "jobs", 2, 3))
        assert found.value > 0 and bus.stored(0) == 6
        with pytest.raises(wires.Refused, match="no job"):
            works(bus.port, bus.wire, "jobs", 1, 1)


class Forgetful(Peer):
    """It stores 9 of 10 messages."""

    name, program = "forgetful", "no-such-program"

    def pids(self):
        return [os.getpid()]

    def stored(self, mark):
        return 9


def test_a_server_that_acknowledges_more_than_it_stores_is_caught(session, tmp_path):
    peer = Forgetful(tmp_path)
    assert session.observed(peer, lambda: Count(9, 1, 0)).value == 9
    with pytest.raises(wires.Refused, match="acknowledged 10 messages and has 9"):
        session.observed(peer, lambda: Count(10, 1, 0))


@pytest.mark.skipif(not pathlib.Path("/proc/self/io").exists(), reason="this kernel does not count what is written")
def test_the_bytes_that_a_server_writes_to_disk_are_counted(session, tmp_path):
    if machine.filesystem(tmp_path) == "tmpfs":
        pytest.skip("a tmpfs is no disk")
    size = 100 * machine.PAGE

    def writes():
        (tmp_path / "file").write_bytes(bytes(size))
        return Count(9, 1, 0)

    found = session.observed(Forgetful(tmp_path), writes).beside["bytes/message"]
    assert size / 9 <= found < 2 * size / 9


def test_a_server_that_does_not_show_what_it_writes_has_no_such_figure(session, tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "written_bytes", lambda pids: None)
    assert "bytes/message" not in session.observed(Forgetful(tmp_path), lambda: Count(9, 1, 0)).beside
    monkeypatch.undo()
    assert machine.written_bytes([0]) is None  # no process has this number


def test_who_is_absent_is_skipped_by_name(session):
    assert session.peers(Forgetful) == []
    assert session.notes == ["forgetful was skipped: no-such-program is not installed."]


def test_a_generator_that_took_all_of_a_cpu_is_named_as_the_limit():
    busy = Figure("fast", "messages/s", [5.0], {"generator CPU": [0.97]})
    calm = Figure("slow", "messages/s", [5.0], {"generator CPU": [0.3]})
    text = report.lines(Result([busy, calm], [], []))
    assert "| fast | ≥ 5.00 messages/s |" in text and "| slow | 5.00 messages/s |" in text
    assert "may have been the limit" in text


@pytest.mark.parametrize(
    "rounds, at_least, verdict",
    [([9, 1, 9], True, "goal met"), ([9, 3, 3], True, "first bar met"), ([9, 1, 1], True, "missed"),
     ([9, 1, 1], False, "goal met"), ([9, 9, 1], False, "missed")],
)
def test_the_median_of_the_rounds_is_held_against_the_bars(rounds, at_least, verdict):
    first, goal = (2, 5) if at_least else (5, 2)
    assert Claim("ours", "x", rounds, first, goal, at_least).verdict == verdict


def test_contenders_take_turns_and_each_begins_once():
    asked = []

    def run(name):
        asked.append(name)
        return Run(1, {"beside": 2})

    found = interleaved({name: lambda name=name: run(name) for name in "abc"}, 3, "")
    assert "".join(asked) == "abc" "bca" "cab"
    assert found["b"].rounds == [1, 1, 1] and found["b"].beside == {"beside": [2, 2, 2]}


def test_a_quantile_is_one_of_the_values():
    assert [quantile(range(1, 101), share) for share in (0.5, 0.99, 1)] == [50, 99, 100]
    assert quantile([7], 0.99) == 7


def test_a_made_database_is_one_of_the_bus_and_its_ticks_are_known(tmp_path, monkeypatch):
    monkeypatch.setattr(stored, "AT_ONCE", 50)
    names = ["dell", "nano", "spark"]
    count = stored.AT_ONCE + 5  # two transactions
    here = stored.database(tmp_path, tmp_path / "copy", count, names)
    with contextlib.closing(State(str(here.path))) as state:
        ticks = [row[0] for row in state.view.database.execute("SELECT tick FROM messages ORDER BY tick")]
        some = (0, 1, stored.AT_ONCE - 1, stored.AT_ONCE, count - 1)
        receivers = [state.message(here.tick(number)).to for number in some]  # None if a checksum were wrong
    assert [here.tick(number) for number in range(count)] == ticks
    assert receivers == [here.name(number) for number in some]


def test_a_made_database_may_have_a_key_for_each_message(tmp_path):
    here = stored.database(tmp_path, tmp_path / "copy", 5, ["dell"], stored.timed_key)
    with contextlib.closing(State(str(here.path))) as state:
        keys = [row[0] for row in state.view.database.execute("SELECT key FROM messages ORDER BY tick")]
    assert [int(key[:14], 16) for key in keys] == [here.tick(number) for number in range(5)]
    assert {*map(len, keys)} == {len(bus_send.new_key())} == {len(stored.random_key(0))}


def test_only_what_stands_between_the_marks_is_written(tmp_path, monkeypatch):
    page = tmp_path / "performance.md"
    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    monkeypatch.setattr(report, "DOCUMENT", page)
    report.write("new")
    report.write("newer")
    assert page.read_text() == f"before\n{report.BEGIN}\n\nnewer\n\n{report.END}\nafter\n"
    assert report.BEGIN in (report.machine.ROOT / "docs" / "performance.md").read_text()


MOMENT = {"date": "2026-11-28 16:25 UTC", "commit": "49a1a76", "others": "0%"}
MEASURED = Result([Figure("fast", "messages/s", [5.0], {})], [], [])
ONE_ROW, OTHER_ROW = "tokens_cost_next_to_nothing", "batches_of_a_hundred_are_cheap"


@pytest.fixture
def page(tmp_path, monkeypatch):
    """A document of our own, with the result of one row in it, and no rounds yet."""
    rows = {name: Row(None, "1 s", "2 s") for name in (ONE_ROW, OTHER_ROW)}
    page = tmp_path / "performance.md"
    page.write_text(f"{report.BEGIN}\n\n## {report.sentence(ONE_ROW)}\n\nold\n\n{report.END}\n")
    for name, value in (("ROWS", rows), ("DOCUMENT", page), ("DATA", tmp_path / ".bench" / "rounds.json"),
                        ("draw", lambda found: page.with_suffix(".svg").write_text(" ".join(found)))):
        monkeypatch.setattr(report, name, value)
    return page


def test_the_table_and_the_picture_are_rebuilt_from_all_rounds_that_were_kept(page, tmp_path):
    for name in (ONE_ROW, OTHER_ROW):
        report.save(name, MEASURED, MOMENT, Settings(tmp_path / "run"))
        assert page.with_suffix(".svg").read_text().split()[-1] == name
    assert "old" not in page.read_text()
    assert page.read_text().count("| fast | 5.00 messages/s |") == 2


def test_a_row_measured_alone_on_a_new_clone_erases_no_other_row(page, tmp_path, capsys):
    before = page.read_text()
    report.save(OTHER_ROW, MEASURED, MOMENT, Settings(tmp_path / "run"))
    assert page.read_text() == before and not page.with_suffix(".svg").exists()
    assert report.sentence(ONE_ROW) in capsys.readouterr().err
    assert json.loads(report.DATA.read_text())["rows"].keys() == {OTHER_ROW}


def test_the_picture_of_the_document_is_whole():
    """One that was committed half written lost two of its three plots, and nobody noticed."""
    assert len(xml.etree.ElementTree.parse(report.PLOT).findall(".//*[@id]")) > 100


def test_the_rounds_stay_out_of_git():
    ignored = (report.machine.ROOT / ".gitignore").read_text().split()
    assert f"{report.DATA.relative_to(report.machine.ROOT).parent}/" in ignored


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc, which only Linux has")
def test_a_crowd_is_parked_and_knows_when_its_last_answer_came(bus):
    """With the bus itself as the peer."""

    class Running(Peer):
        name, wire = "agent-bus", wires.Http(1)

        def pids(self):
            return [bus.process.pid]

        def cursor(self):
            return "0"

    peer = Running(None)
    peer.port = bus.port
    with crowd.parked(peer, ["dell"] * 3) as readers:
        before = crowd.time.time_ns()
        peer.ask(peer.wire.send("all"))
        assert before < readers.last_arrival() < crowd.time.time_ns()


def test_every_stage_of_the_profile_is_a_function_of_the_server():
    assert all(staged_server.find(path) for path, _ in staged_server.STAGES if path not in ("BEGIN", "COMMIT"))


def test_names_that_are_read_along_do_not_fill(bus):
    """Each name has a poll of its own: a cursor speaks for the first name of a poll only."""
    wire, names = wires.Http(bus.port), AgentBus.listeners
    with Reader(bus.port, wire, names), Line(wire, bus.port) as line:
        for name in names:
            line.exchange(wire.send(name))
        wait_until(lambda: json.loads(bus.get("/inbox"))["recipients"]["default"] == dict.fromkeys(names, 0))


@pytest.mark.skipif(not shutil.which("wrk"), reason="wrk is not installed")
def test_many_names_get_their_messages_in_turn(session, tmp_path):
    to = [f"name-{number}" for number in range(40)]
    bus = ManyNames(tmp_path, names=to, what="40 names", key=wires.TIMED_KEY)
    with session.running([bus]):
        assert bus.stored(0) == 2 * len(to)  # each name is there before what is measured
        bus.sends(4, 1)
        counts = "SELECT max(n) - min(n) FROM (SELECT count(*) AS n FROM messages GROUP BY mailbox)"
        assert bus.query(counts) <= 4 and bus.query("SELECT count(*) FROM mailboxes") == len(to)
        plain = bus.query("SELECT count(*) - count(DISTINCT key) FROM messages")  # at one moment: some may still come
        assert plain == 2 * len(to) < bus.stored(0)
