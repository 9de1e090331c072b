"""Queues, questions and files: each bound, each right and each promise holds at their doors too.

Found by an attack on 2026-11-29; each test was red on the code that it attacked.

| test | what was seen before |
|---|---|
| a_list_pays_for_the_time_that_it_takes (2026-11-30) | 200; all of them but /digest |
| whatever_is_asked_has_a_rate | /ack, /nack, /extend and GET /blob have none |
| whatever_is_asked_has_a_rate (2026-12-01) | clients, the page, its files and the certificate have none |
| a_file_that_everybody_may_have (2026-12-01) | it is read at each request |
| jobs_that_stay_are_looked_at_in_slices | the message of each is read, all in one operation |
| a_row_that_a_claim_made_goes | the row stays while the bus runs, and only memory forgets the name |
| a_dead_letter_lives_no_longer | it has no end |
| what_a_sender_calls_lease_is_not_in_a_job | `lease` twice, the first one the sender's |
| who_waits_for_a_fetch_hears_of_it | nothing, if it was read by its id or passed by a cursor |
| no_answer_is_longer_than_what_a_client_reads | 64 MiB are read, of which a parser makes 1.8 GB |
| a_piece_that_was_written_in_part_ends_an_upload | 408 after 10 s, and the next request is in the file |
"""
import errno
import itertools
import json
import pathlib
import sys
import time

import pytest

import bus_recv
import bus_send
import bus_server
from bus_server import ANSWER_BYTES, MESSAGE_BYTES, Now
from tests.faults.test_kinds_bounds import Guest, counted
from tests.kit import inside
from tests.kit.hostile import ALICE, HOST, head
from tests.kit.peers import mint
from tests.kit.wire import Peer, a_bus, answers, come_true, stored


@pytest.fixture
def bus(tmp_path):
    with a_bus(time.monotonic, str(tmp_path / "bus.db")) as bus:
        yield bus


# Rates

# A body that each path with POST would accept, if it were not for its rate.
SENT = {"/send": {"from": "eve", "to": "bob", "msg": "x"}, "/ask": {"from": "eve", "to": "bob", "msg": "x"},
        "/status": {"from": "eve", "text": "x"}, "/mcp": {"jsonrpc": "2.0", "id": 1, "method": "ping"},
        "/recall": {"id": "1"}, "/again": {"id": "1"}, "/later": {"cancel": "1"}, "/claim": {"to": "builds", "wait": 0},
        **{path: {"id": "1", "lease": "x"} for path in ("/ack", "/nack", "/extend")},
        "/lock": {"from": "eve", "names": ["a"]}, "/renew": {"from": "eve", "fence": 1},
        "/unlock": {"from": "eve", "names": ["a"]}, "/redact": {"id": "1"}, "/search": {}}  # fmt: skip


def test_whatever_is_asked_has_a_rate(bus):
    """Each endpoint but /healthz: with a budget that is used up, the answer is 429, and no step is planned."""
    for budget in (bus.storms.sends, bus.storms.reads):
        budget.spend = lambda owner, amount: 7
    for method, path in bus.routes:
        if path == "/healthz":  # whoever watches the bus is told, whatever else is asked from there
            continue
        asked = inside.ASKED.get(path, "").replace("ROOT", "1")
        guest = Guest(bus).begins(method, path + asked, SENT[path] if method == "POST" else b"")
        assert guest.answer().status == 429, path
    guest = Guest(bus).begins("GET", "/", b"", "Accept: text/html")
    assert guest.answer().status == 429, "a browser too, which is led to the page"


def test_a_file_that_everybody_may_have_is_read_from_the_disk_once(bus, monkeypatch):
    """And in a turn: on a slow disk each stranger who asked for it held up all others."""
    guest, found, reads = Guest(bus), bus_server.beside, []
    monkeypatch.setattr(bus_server, "beside", lambda file: (reads.append(file), found(file))[1])
    first = [guest.asks("GET", path).body for path in bus_server.CLIENTS]
    assert [guest.asks("GET", path).body for path in bus_server.CLIENTS] == first and len(set(first)) == len(first)
    assert reads == [path[1:] for path in bus_server.CLIENTS]


def test_a_file_that_is_not_there_is_404_until_it_is(bus, monkeypatch, tmp_path):
    guest, file = Guest(bus), tmp_path / "bus_recv.py"
    monkeypatch.setattr(bus_server, "beside", lambda _: file)
    assert guest.begins("GET", "/bus_recv.py").answer().status == 404
    file.write_text("the program")
    assert guest.asks("GET", "/bus_recv.py").body == b"the program"
    file.unlink()
    assert guest.asks("GET", "/bus_recv.py").body == b"the program"


@pytest.mark.parametrize("path", ["/locks", "/later", "/digest?to=bob", "/metrics"])
def test_a_list_pays_for_the_time_that_it_takes(bus, path, monkeypatch):
    """A thousand reservations took five times as long as their bytes counted."""
    bus.storms = bus_server.Storms(time.monotonic, rate=50)
    guest = Guest(bus)
    monkeypatch.setattr(time, "thread_time", itertools.count(step=2).__next__)  # s
    guest.asks("GET", path)
    assert guest.begins("GET", path).answer().status == 429
    assert bus.ledger.idle()


# Queues


def one_of(pairs):
    """A JSON object, each of whose members is there once."""
    assert len(dict(pairs)) == len(pairs), f"a member is there twice: {pairs}"
    return dict(pairs)


def claims(guest, to="builds", **members):
    answer = guest.asks("POST", "/claim", {"to": to, "wait": 0, **members})
    return json.loads(answer.body, object_pairs_hook=one_of)["messages"]


def test_what_a_sender_calls_lease_is_not_in_a_job(bus):
    """Which of two members a worker's parser takes is open: the sender could choose the lease that it settles with."""
    guest = Guest(bus)
    forged = {"attempt": 1000, "lease": "forged", "lease_until": 0}
    guest.sends("builds", 'the "lease" of', **forged, inner={"lease": 1}, size=10)
    [job] = claims(guest)
    assert job["attempt"] == 1 and len(job["lease"]) == 16 and job["lease_until"] > 1e9
    assert (job["msg"], job["inner"], job["size"]) == ('the "lease" of', {"lease": 1}, 10), "all else is unchanged"
    [message] = guest.asks("GET", "/recv?to=builds").json()["messages"]
    assert {member: message[member] for member in forged} == forged, "for a reader they have no meaning"
    guest.asks("POST", "/ack", {"id": job["id"], "lease": job["lease"]})


def test_a_row_that_a_claim_made_goes_when_nobody_asks_any_more(bus):
    """Each part of the bus knows the queue for as long as the others do: memory, the writer and the table."""
    guest, keep = Guest(bus), 3600
    bus.retention.keep = keep
    bus.retention.clock_is_trusted = lambda: True
    for number in range(50):
        assert claims(guest, to=f"q{number}") == []
    guest.sends("builds", "a job")
    for box in bus.mailboxes.boxes.values():
        box.until = 0.0  # its hold was over long ago
    for seconds, known in ((bus.mailboxes.LOOKED_SECONDS + 1, 51), (2 * keep, 1)):
        later(bus, seconds)
        bus.retention.forget_names()
        come_true(bus.ledger.idle)
        table = bus.view.database.execute("SELECT channel, name FROM mailboxes").fetchall()
        for who_knows in (bus.mailboxes.boxes, bus.state.counts, table):
            assert len({own for _, own in who_knows} - {"eve"}) == known  # she is no queue


def later(bus, seconds):
    """From now on both clocks of the bus are ahead by so much."""
    now, wall = bus.clock.now, bus.view.clock
    ahead = int(seconds * 1e6)
    bus.clock.now = lambda: Now(*(each + ahead for each in now()))
    bus.view.clock = lambda: wall() + ahead


def letters(guest, to="builds.dead"):
    return [message["msg"] for message in guest.asks("GET", f"/recv?to={to}&max=1000").json()["messages"]]


def fail(bus, guest, how):
    """The one job in the queue fails for the last time, 40 s after it was handed out."""
    [job] = claims(guest, lease=30)
    later(bus, 40)
    if how == "nack":
        return guest.asks("POST", "/nack", {"id": job["id"], "lease": job["lease"]})
    if how == "claim":
        return claims(guest)
    bus.do(sys.modules["bus_extensions.work"].Bury(1), None, lambda *_: None)
    return come_true(bus.ledger.idle)


@pytest.mark.parametrize("how", ["nack", "claim", "bury"])
def test_a_dead_letter_lives_no_longer_than_its_message(tmp_path, how):
    with a_bus(time.monotonic, str(tmp_path / "bus.db"), "--max-attempts", "1") as bus:
        guest = Guest(bus)
        number = guest.sends("builds", "a secret", ttl=35)["id"]
        fail(bus, guest, how)
        assert letters(guest) == [], "it expired before it failed"
        assert guest.asks("GET", f"/message/{number}").json()["state"] != "dead"
        number = guest.sends("builds", "another", ttl=60)["id"]
        fail(bus, guest, how)
        assert letters(guest) == ["another"]
        assert guest.asks("GET", f"/message/{number}").json()["state"] == "dead"
        later(bus, 21)
        assert letters(guest) == [], "60 s in all, also as a dead letter"
        guest.sends("builds", "for good")
        fail(bus, guest, how)
        assert letters(guest) == ["for good"]


def test_jobs_that_stay_are_looked_at_in_slices_and_not_read(tmp_path, monkeypatch):
    """Whoever has claims of dead letters run out, or of what failed less often, gets no long look at each of them."""
    with a_bus(time.monotonic, str(tmp_path / "bus.db"), "--max-attempts", "2") as bus:
        guest = Guest(bus)
        for queue, number in (("a.dead", 120), ("b", 120), ("z", 30)):  # in the order of their mailboxes
            guest.asks("POST", "/send", [{"from": "eve", "to": queue, "msg": f"{each}"} for each in range(number)])
            for _ in range(1 if queue == "b" else 2):
                assert sum(len(claims(guest, to=queue, max=100, lease=1)) for _ in range(2)) == number
                later(bus, 2)
        bury, slices = sys.modules["bus_extensions.work"].Bury, []

        def note(operation, state, now, really=bury.apply):
            slices.append(really(operation, state, now))
            return slices[-1]

        monkeypatch.setattr(bury, "LOOKED", 50, raising=False)
        monkeypatch.setattr(bury, "apply", note)
        with counted(bus.state, "message", lambda arguments, _: arguments[0]) as read:
            bus.tidy()
            come_true(lambda: slices and not slices[-1])
        assert len(read) == 30, "a job that stays is not read"
        assert len(slices) == 270 // 50 + 1
        assert sorted(letters(guest, "z.dead"), key=int) == [str(each) for each in range(30)]


# Questions


WAYS = {  # how dell fetches the first of two messages, or both
    "an answer": ("GET", "/recv?to=dell&since=0", 2),
    "a cursor behind them": ("GET", "/recv?to=dell&since={behind}", 2),
    "a claim": ("POST", "/claim?to=dell&wait=0", 1),
    "its id": ("GET", "/message/{id}", 1),
    "its thread": ("GET", "/thread/{id}", 1),
}


@pytest.mark.parametrize("way", WAYS)
def test_who_waits_for_a_fetch_hears_of_it_whichever_way_it_was_fetched(tmp_path, way):
    of = mint(tmp_path / "bus.db", spark=[], dell=[])
    with a_bus(time.monotonic, str(tmp_path / "bus.db")) as bus:
        spark, dell = Guest(bus, of["spark"]), Guest(bus, of["dell"])
        sent = [spark.asks("POST", "/send", {"to": "dell", "msg": "x"}).json() for _ in range(2)]
        waiting = [Guest(bus, of["spark"]).begins("GET", f"/message/{each['id']}?wait_fetched=50") for each in sent]
        come_true(lambda: len(bus.mailboxes.parked) == 2)
        method, path, fetched = WAYS[way]
        dell.asks(method, path.format(id=sent[0]["id"], behind=f"{sent[1]['ts']:.6f}"))
        for guest in waiting[:fetched]:
            assert guest.answer().json()["state"] in ("fetched", "acknowledged")
        assert len(bus.mailboxes.parked) == 2 - fetched, "the other one was not fetched"


def test_who_waits_for_a_broadcast_hears_of_its_first_fetch(bus):
    spark, dell = Guest(bus), Guest(bus)
    number = spark.sends("all")["id"]
    spark.begins("GET", f"/message/{number}?wait_fetched=50")
    come_true(lambda: bus.mailboxes.parked)
    dell.asks("GET", "/recv?to=dell&since=0")
    assert spark.answer().json()["state"] == "fetched"


# What a client reads


def test_no_answer_is_longer_than_what_a_client_reads(tmp_path):
    """A parser makes 30 times as much of an answer: so 16 MiB are read, and not 64. No message is too long for that."""
    assert bus_recv.ANSWER_BYTES == bus_send.ANSWER_BYTES <= 16 << 20
    with a_bus(time.monotonic, str(tmp_path / "bus.db"), "--max-body", "9999999") as bus:
        guest, path = Guest(bus), "/send?from=eve&to=bob"
        for _ in range(16):
            guest.sends("bob", "x" * 65_400)  # a little less than 1 MiB: an answer has one more
        longest = MESSAGE_BYTES // 6 - 20  # of each character \\u0001 is made
        assert guest.begins("POST", path, b"\x01" * (longest + 30)).answer().status == 413
        guest.asks("POST", path, b"\x01" * longest)
        answer = guest.asks("GET", "/recv?to=bob&since=0&max=1000")
        assert MESSAGE_BYTES + ANSWER_BYTES - 5000 < len(answer.body) < bus_recv.ANSWER_BYTES
        assert len(answer.json()["messages"]) == 17


def test_no_answer_as_text_is_longer_than_what_a_client_reads(tmp_path):
    """Each line of a message begins with `| ` there, so lines without a text grow most."""
    with a_bus(time.monotonic, str(tmp_path / "bus.db"), "--max-body", "9999999") as bus:
        guest, path = Guest(bus), "/send?from=eve&to=bob"
        longest = MESSAGE_BYTES // 2 - 60  # of each newline \\n is made
        assert guest.begins("POST", path, b"\n" * (longest + 60)).answer().status == 413
        guest.asks("POST", path, b"\n" * longest)
        answer = guest.asks("GET", "/recv?to=bob&since=0", b"", "Accept: text/plain")
        assert longest * 3 < len(answer.body) < bus_recv.ANSWER_BYTES


# Files


class FullOnce:
    """A file on a disk that has room for so many bytes: one write is cut short, and then others have made room."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, data):
        if self.room == 0:
            self.room = -1
            raise OSError(errno.ENOSPC, "No space left on device")
        written = self.file.write(data[: self.room] if self.room > 0 else data)
        self.room -= written if self.room > 0 else 0
        return written

    def close(self):
        self.file.close()


@pytest.mark.parametrize("room", [50_000, len(inside.FILE) - 10])
def test_a_piece_that_was_written_in_part_ends_an_upload(bus, room):
    """It is 507, not a part with a hole, or one that waits for more: then the next request would be the rest of it."""
    upload = head(f"PUT {inside.FILE_PATH} HTTP/1.1", HOST, f"Content-Length: {len(inside.FILE)}")
    peer = Peer(bus)
    peer.says(upload)
    sink = peer.connection.request.sink
    sink.stream = FullOnce(sink.stream, room)
    for start in range(0, len(inside.FILE), 16384):
        peer.says(inside.FILE[start : start + 16384])
    peer.says(ALICE)
    come_true(lambda: peer.heard)
    [refused] = answers(peer.heard)
    assert refused.status == 507 and refused.fields["upload-offset"] == str(room)
    assert stored(bus) == 0, "what follows a broken body is no request"
    part = pathlib.Path(f"{bus.state.path}.blobs{inside.FILE_PATH[5:]}.part")
    assert part.read_bytes() == inside.FILE[:room]
    again = Peer(bus)
    span = f"Content-Range: bytes {room}-{len(inside.FILE) - 1}/{len(inside.FILE)}"
    again.says(head(f"PUT {inside.FILE_PATH} HTTP/1.1", HOST, f"Content-Length: {len(inside.FILE) - room}", span))
    again.says(inside.FILE[room:])
    come_true(lambda: again.heard)
    assert [answer.status for answer in answers(again.heard)] == [201]
