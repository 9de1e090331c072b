"""What one owner holds is a share of what there is, and counted: bodies, descriptors, bytes for the disk, files.

Found by an attack on 2026-11-29; each test was red on the code that it attacked, or on the first mend of it.

| test | seen red |
|---|---|
| an_owner_that_has_most_gives_up_its_own_bodies | the oldest of all goes, which is the innocent's |
| descriptors_are_taken_from_who_has_most | the innocent is not let in; its reader is hung up on by the first mend |
| pairs_of_names_have_a_budget | over 1 KB for each of 30,000 |
| an_owner_that_has_most_gives_up_what_it_began | 240 KB of heads stay, and any number of them |
| what_is_pipelined_behind_a_commit | the same |
| a_head_does_not_wait | it is parked, with its head |
| what_is_parked_holds_no_body_and_no_text | 250 KB for each; /claim and /ask until the second mend |
| what_waits_for_the_disk_has_a_budget | all 30 are taken |
| a_send_larger_than_a_share | 503 for ever, since the first mend |
| each_further_copy_of_a_send | all are stored; each is 50 MB at most, and all others wait for seconds |
| what_waits_for_a_commit_holds_no_body | 250 KB for each, until the second mend |
| files_have_a_rate, as_many_files_as_blocks | all are stored |
| in_a_room_for_files, uploads_at_once, tiny_files | all are stored: one token fills the room |
"""
import contextlib
import gc
import hashlib
import json
import math
import pathlib
import re
import resource
import sqlite3
import time
import tracemalloc

import pytest

from bus_server import Budget, Refused, Shares, Storms
from tests.faults import linux, skipped_without
from tests.faults.test_kinds_bounds import LARGE, Guest
from tests.kit.clock import Clock
from tests.kit.hostile import HOST, head
from tests.kit.peers import Peer, ask, mint, stored
from tests.kit.processes import ROOT, Server, wait_until
from tests.kit.wire import a_bus, come_true, settle, statuses, while_the_disk_is_busy

KINDS_OF_BUS = ["open", "closed"]


def owners(bus_path, kind, *names):
    """What makes a Guest another owner: a token on a closed bus, an address on an open one."""
    if kind == "closed":
        return [{"token": token} for token in mint(bus_path, **{own: [] for own in names}).values()]
    return [{"address": f"127.0.0.{number}"} for number, _ in enumerate(names, 2)]


def names_itself(kind, own):
    return {"from": own} if kind == "open" else {}


@pytest.fixture(params=KINDS_OF_BUS)
def two(tmp_path, request):
    """A bus, and what makes a guest of it mal or ann."""
    path = tmp_path / "bus.db"
    mal, ann = owners(path, request.param, "mal", "ann")
    with a_bus(time.monotonic, path) as bus:
        bus.door.LONG = math.inf  # s; on a slow machine their requests would take turns, and be unanswered until then
        bus.kind = request.param
        yield bus, mal, ann


def test_something_alone_exceeds_no_limit():
    """However large it is: else it would be refused for ever."""
    shares = Shares(10, 5)
    assert not shares.is_full("ann", 20)
    shares.add("ann", 3)
    assert not shares.is_full("bob", 7) and shares.is_full("ann", 3) and shares.is_full("bob", 8)
    shares.add("ann", -3)
    assert not shares.is_full("ann", 20) and not shares.held


# Bodies that do not arrive


def announces(guest, size=200_000):
    """A request whose body has yet to come."""
    fields = [f"Authorization: Bearer {guest.token}"] if guest.token else []
    guest.says(head("POST /send?from=ann&to=bob HTTP/1.1" if not guest.token else "POST /send?to=bob HTTP/1.1",
                    HOST, f"Content-Length: {size}", *fields))  # fmt: skip
    return guest


def test_an_owner_that_has_most_gives_up_its_own_bodies(two):
    """The oldest of them, which is told so; the one that is older and slow is stored."""
    bus, mal, ann = two
    bus.door.arriving.most = 1_000_000
    innocent = announces(Guest(bus, **ann))
    crowd = [announces(Guest(bus, **mal)) for _ in range(20)]
    settle(bus)
    assert [statuses(guest.heard) for guest in crowd] == [[408]] * 16 + [[]] * 4
    assert bus.door.arriving.all == 5 * 200_000 == sum(bus.door.arriving.held.values())
    innocent.says(b"x" * 200_000)
    assert innocent.answer().status == 200
    for guest in crowd:
        guest.leaves()
    assert not bus.door.arriving.all and not bus.door.arriving.held and not bus.door.arriving.of


# Heads that do not arrive, and what is pipelined

SEND = "POST", "/send", {"from": "mal", "to": "bob", "msg": "x"}
EARLY = {  # what comes before 12 KB of a head, and what its connection has heard once it is given up
    "nothing": ((), [408]),
    "an answer": (("GET", "/recv?to=mal&since=now"), [200, 408]),
    "a commit": (SEND, [200]),
    "a wait": (("POST", "/claim", {"to": "mal", "wait": 60}), []),
}
HALF = head("GET /healthz HTTP/1.1", HOST, "A: " + "a" * 12_000)[:-2]


def held(bus):
    """The bytes in all buffers, which are counted right."""
    assert sum(len(each.buffer) for each in bus.door.connections) == bus.door.early.all
    return bus.door.early.all


@pytest.mark.parametrize("which", EARLY)
def test_an_owner_that_has_most_gives_up_what_it_began(two, which):
    """What has been read before its time is counted, whatever it waits for; the innocent's is older, and answered."""
    bus, mal, ann = two
    before, heard = EARLY[which]
    bus.door.early.most = 100_000
    innocent = Guest(bus, **ann)
    innocent.asks("GET", "/recv?to=ann&since=now")
    innocent.says(HALF)
    crowd = [Guest(bus, **mal) for _ in range(20)]
    for guest in crowd if before else ():
        guest.begins(*before)
    come_true(lambda: which != "a wait" or len(bus.mailboxes.parked) == 20)
    for guest in crowd:
        guest.says(HALF)
    come_true(lambda: bus.ledger.idle() and not bus.loop.actions)
    assert 90_000 < held(bus) <= 100_000
    assert [guest.connection.closing for guest in crowd] == [True] * 13 + [False] * 7
    assert [statuses(guest.heard) for guest in crowd[:13]] == [heard] * 13
    innocent.says(b"\r\n")
    assert innocent.answer().status == 200
    bus.drain()
    come_true(lambda: all(guest.over for guest in crowd))
    for guest in crowd:
        guest.leaves()
    assert not bus.door.early.all and not bus.door.early.held and not bus.door.early.of


def test_what_is_pipelined_behind_a_commit_is_given_up_too(two):
    """The request itself is stored and answered, and then its connection is closed."""
    bus, mal, _ = two
    bus.door.early.most = 100_000
    crowd = [Guest(bus, **mal).begins(*SEND) for _ in range(20)]
    during = []

    def more():
        for guest in crowd:
            guest.says(HALF)
        bus.loop.later(0, lambda: during.append(held(bus)))

    while_the_disk_is_busy(bus, more)
    come_true(lambda: during and bus.ledger.idle() and not bus.loop.actions)
    assert 90_000 < during[0] <= 100_000
    assert [(statuses(guest.heard), guest.over) for guest in crowd] == [([200], True)] * 12 + [([200], False)] * 8


# Descriptors

WAITING = {  # what waits for long; ID is a message that nobody fetches
    "watch": ("GET", "/message/ID?wait_fetched=60", b""),
    "claim": ("POST", "/claim", {"to": "mal", "wait": 60}),
    "recv": ("GET", "/recv?to=mal&since=last&wait=60", b""),
    "ask": ("POST", "/ask?wait=60", {"to": "bob", "msg": "x"}),
    "half a body": ("POST", "/send", {"to": "bob", "msg": "x" * 16_000}),
}


@skipped_without(linux)
@pytest.mark.parametrize("which", WAITING)
def test_descriptors_are_taken_from_who_has_most(tmp_path, which):
    """One token waits on as many connections as the bus may have; another one gets in, and is not hung up on."""
    mal, ann = mint(tmp_path / "bus.db", mal=[], ann=[]).values()
    with Server(tmp_path / "bus.db") as bus, contextlib.ExitStack() as stack:
        one = stored(bus, "bob", token=mal, sender="mal")
        waits = stack.enter_context(Peer(bus, ann)).send("GET", "/recv?to=ann&since=last&wait=60")
        wait_until(lambda: {"name": "ann", "online": True}.items() <= agent_of(bus, ann, "ann").items())
        most = len(descriptors(bus)) + 60
        resource.prlimit(bus.process.pid, resource.RLIMIT_NOFILE, (most, most))
        method, path, body = WAITING[which]
        for _ in range(most + 20):
            peer = stack.enter_context(Peer(bus, mal))
            request = peer.request(method, path.replace("ID", one), body)
            peer.sock.sendall(request[:-10] if which == "half a body" else request)
        reply = ask(bus, "POST", "/send", {"to": "ann", "msg": "hello"}, token=ann)
        assert reply.status == 200
        assert [each["msg"] for each in waits.answer().json["messages"]] == ["hello"]
        assert bus.process.poll() is None


def descriptors(bus):
    return list(pathlib.Path(f"/proc/{bus.process.pid}/fd").iterdir())


def agent_of(bus, token, own):
    return next((each for each in ask(bus, "GET", "/agents", token=token).json["agents"] if each["name"] == own), {})


# Pairs of names


def test_pairs_of_names_have_a_budget_of_memory():
    """100 senders to 300 names: the oldest pairs are forgotten, and those that go on are still stopped."""
    storms = Storms(clock := Clock(), rate=0)
    storms.PAIRS = 5000
    tracemalloc.start()
    try:
        for sender in range(100):
            for to in range(300):
                storms.turn("default", f"s{sender}", f"r{to}", clock())
            storms.turn("default", "ann" if sender % 2 else "bob", "bob" if sender % 2 else "ann", clock())
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(storms.turns) == 5000
    assert held < 5000 * 700, f"{held / 5000:.0f} bytes for each pair"
    with pytest.raises(Refused, match="answered each other"):
        for turn in range(storms.most_turns):
            storms.turn("default", *(("ann", "bob") if turn % 2 else ("bob", "ann")), clock())


def test_to_forget_the_oldest_costs_the_same_however_many_were_forgotten_before():
    """Of a dict `next(iter())` walks over all that were deleted before its first entry: 10 s of silence were seen.

    So no code takes the first entry of a dict to delete it; and a name that is refused takes the place of another one.
    """
    taken = re.compile(r"del (\S+)\[next\(iter\(\1|next\(iter\((\S+)\.items\(\)\)\)")
    for source in [ROOT / "bus_server.py", *(ROOT / "bus_extensions").glob("*.py")]:
        assert not taken.search(source.read_text()), source
    budget = Budget(Clock(), rate=1, burst=1)
    for number in range(10 * budget.OWNERS):
        budget.spend(f"name {number}", 1)
    assert len(budget.left) == budget.OWNERS and next(iter(budget.left)) == f"name {9 * budget.OWNERS}"


# Memory of what is parked, or waits for its commit

HOLDING = {  # requests that wait, each with as large a body as may be; ID is a large message that nobody fetches
    "watch": ("GET", "/message/ID?wait_fetched=60", b""),
    "recv": ("GET", "/recv?to=mal&since=last&wait=60", b""),
    "log": ("GET", "/log?since=NOW&wait=60", b""),
    "claim": ("POST", "/claim", {"to": "mal", "wait": 60, "ignored": "x" * LARGE}),
    "ask": ("POST", "/ask?wait=60", {"from": "eve", "to": "bob", "msg": "x" * LARGE}),
}


@contextlib.contextmanager
def grown():
    """Bytes of Python objects that are there afterwards and were not before."""
    gc.collect()
    tracemalloc.start()
    result = []
    try:
        yield result
        gc.collect()
        result.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("options", [(), ("--verbose",)], ids=["quiet", "verbose"])
@pytest.mark.parametrize("which", HOLDING)
def test_what_is_parked_holds_no_body_and_no_text(tmp_path, capfd, which, options):
    with a_bus(time.monotonic, tmp_path / "bus.db", *options) as bus:
        stored = Guest(bus).sends("bob", "x" * LARGE)
        method, path, body = HOLDING[which]
        path = path.replace("ID", stored["id"]).replace("NOW", f"{stored['ts']:.6f}")
        with grown() as size:
            guests = [Guest(bus).begins(method, path, body) for _ in range(8)]
            come_true(lambda: len(bus.mailboxes.parked) == 8)
        assert size[0] < LARGE, f"{size[0] / 8:,.0f} bytes for each"
        assert not any(guest.heard for guest in guests)


@pytest.mark.parametrize("which", HOLDING)
def test_what_is_parked_holds_no_head(tmp_path, which):
    """It may have 16 KiB."""
    method, path, _ = HOLDING[which]
    with a_bus(time.monotonic, tmp_path / "bus.db") as bus:
        stored = Guest(bus).sends("bob")
        path = path.replace("ID", stored["id"]).replace("NOW", f"{stored['ts']:.6f}")
        body = {"from": "eve", "to": "mal", "wait": 60, "msg": "x"} if method == "POST" else b""
        with grown() as size:
            guests = [Guest(bus).begins(method, path, body, f"A: {'b' * 15_000}") for _ in range(30)]
            come_true(lambda: len(bus.mailboxes.parked) == len(bus.door.connections) - 1)
        assert size[0] < 30 * 9_000, f"{size[0] / 30:,.0f} bytes for each"
        assert not any(guest.heard for guest in guests[-8:])


def test_a_head_does_not_wait(tmp_path):
    """While it waited it held its head, of up to 16 KiB, to be known as one that is answered without a body."""
    with a_bus(time.monotonic, tmp_path / "bus.db") as bus:
        one, guest = Guest(bus).sends("bob")["id"], Guest(bus)
        guest.says(head(f"HEAD /message/{one}?wait_fetched=60 HTTP/1.1", HOST))
        come_true(lambda: guest.heard)
        assert not bus.mailboxes.parked
        assert guest.heard.startswith(b"HTTP/1.1 200 ") and guest.heard.endswith(b"\r\n\r\n")


# What waits for the disk


def sends(bus, owner, own, size, path="/send", **members):
    body = {"from": own, "to": "bob", "msg": "x" * size, **members}
    return Guest(bus, **owner).begins("POST", path, body)


@pytest.mark.parametrize("path", ["/send", "/ask?wait=0"])
def test_what_waits_for_the_disk_has_a_budget_for_each_owner_and_for_all(two, path):
    """Until the turn ends nothing is committed: so all of these wait. What is refused is not stored."""
    bus, mal, ann = two
    bus.ledger.waiting.most_each, bus.ledger.waiting.most = 10 * LARGE + 5000, 12 * LARGE
    crowd = [sends(bus, mal, "mal", LARGE, path) for _ in range(30)]
    small = sends(bus, mal, "mal", 100, path)
    innocent = [sends(bus, ann, "ann", LARGE, path) for _ in range(3)]
    assert [statuses(guest.heard) for guest in crowd] == [[]] * 10 + [[503]] * 20
    assert [statuses(guest.heard) for guest in innocent] == [[], [503], [503]], "the limit for all"
    refused = crowd[-1].answer()
    assert int(refused.fields["retry-after"]) >= 1 and "nothing was stored" in refused.json()["error"]
    assert [each.answer().status for each in [*crowd[:10], small, innocent[0]]] == [200] * 12
    assert bus.mailboxes.boxes["default", "bob"].n == 12
    assert not bus.ledger.waiting.all and not bus.ledger.waiting.held
    assert sends(bus, mal, "mal", LARGE, path).answer().status == 200


class Locked:
    """Every list fails, as while another program has locked the database."""

    def __init__(self, bus):
        self.bus, self.apply = bus, bus.state.apply

    def __enter__(self):
        def locked(operations, now):
            raise sqlite3.OperationalError("database is locked")

        self.bus.state.apply = locked

    def __exit__(self, *_):
        self.bus.state.apply = self.apply


def test_what_failed_or_was_refused_waits_no_longer(two):
    bus, mal, _ = two
    with Locked(bus):
        assert sends(bus, mal, "mal", LARGE).answer().status == 503
    assert not bus.ledger.waiting.all
    assert sends(bus, mal, "mal", LARGE, key="k").answer().status == 200
    assert sends(bus, mal, "mal", LARGE + 1, key="k").answer().status == 409
    gone = sends(bus, mal, "mal", LARGE)
    gone.leaves()
    come_true(bus.ledger.idle)
    assert not bus.ledger.waiting.all and not bus.ledger.waiting.held


def test_a_send_larger_than_a_share_is_stored_if_nothing_of_its_owner_waits(two):
    """64 names times 262,144 bytes are more than 16 MiB, where text is escaped; here all of it is an eighth."""
    bus, mal, ann = two
    bus.ledger.waiting.most_each >>= 3
    names = [f"n{number}" for number in range(64)]
    text = "\u00e9" * 12_500  # 25 KB on the way, 75 KB as it is stored
    first, second, other = [
        Guest(bus, **owner).begins("POST", f"/send?to={','.join(names)}&from={own}", text.encode())
        for owner, own in ((mal, "mal"), (mal, "mal"), (ann, "ann"))
    ]
    assert statuses(first.heard) == [] and statuses(second.heard) == [503] and statuses(other.heard) == []
    assert first.answer().status == other.answer().status == 200
    assert not bus.ledger.waiting.all


def test_each_further_copy_of_a_send_is_paid_for(two):
    """A body of 256 KiB for 64 names is 16 MiB for the disk, and 48 MiB if its text is escaped; all others wait."""
    bus, mal, ann = two
    clock, size, passes = Clock(0.0), LARGE // 4, 3
    names = [f"n{number}" for number in range(64)]
    paid = size * (Storms.PARSING + 64)
    bus.storms.work = Budget(clock, Storms.WORK, (passes + 1) * paid - 1)
    sent = [sends(bus, mal, "mal", size, to=names).answer() for _ in range(passes + 2)]
    stored = [each.status for each in sent].count(200)
    assert passes - 1 <= stored <= passes, "the time that a body took is paid for, too"
    assert {each.status for each in sent[stored:]} == {429} and "makes more work" in sent[-1].json()["error"]
    assert bus.mailboxes.boxes["default", "n0"].n == stored
    assert sends(bus, ann, "ann", size, to=names).answer().status == 200
    assert sends(bus, mal, "mal", 8000).answer().status == 200, "one copy is not what costs"
    clock.now += 2 * math.ceil(paid / Storms.WORK)
    assert sends(bus, mal, "mal", size, to=names).answer().status == 200


@pytest.mark.parametrize("path", ["/claim", "/ack", "/nack", "/extend", "/recall", "/send"])
def test_what_waits_for_a_commit_holds_no_body(tmp_path, path):
    """No budget counts these, but for sends."""
    with a_bus(time.monotonic, tmp_path / "bus.db") as bus:
        one = Guest(bus).sends("bob")["id"]
        body = {"id": one, "lease": "0" * 16, "from": "eve", "to": "bob", "msg": "x", "wait": 0}
        body = body if path == "/send" else {**body, "ignored": "x" * LARGE}
        padding = b" " * LARGE if path == "/send" else b""
        with grown() as size:
            guests = [Guest(bus).begins("POST", path, padding + json.dumps(body).encode()) for _ in range(8)]
            assert not any(guest.heard for guest in guests), "they wait"
        assert size[0] < 2 * LARGE, f"{size[0] / 8:,.0f} bytes for each"
        assert {guest.answer().status for guest in guests} <= {200, 409}



# Files


def put(guest, data, fields=()):
    name = hashlib.sha256(data).hexdigest()
    return guest.begins("PUT", f"/blob/{name}", data, *fields).answer()


def part(guest, number):
    """The first byte of a file of two, whose rest never comes."""
    return guest.begins("PUT", f"/blob/{number:064x}", b"x", "Content-Range: bytes 0-0/2").answer()


def test_files_have_a_rate_as_messages_have(two, monkeypatch):
    """Whole or in parts, and for each owner; beyond it nothing is written."""
    bus, mal, ann = two
    monkeypatch.setattr(Storms, "BURST", 5)
    bus.storms = Storms(Clock(), rate=50)
    guest = Guest(bus, **mal)
    replies = [part(guest, number) for number in range(3)] + [put(guest, b"whole" * number) for number in (1, 2)]
    assert [reply.status for reply in replies] == [202] * 3 + [201] * 2
    for refused in (part(Guest(bus, **mal), 9), put(Guest(bus, **mal), b"another")):
        assert refused.status == 429 and int(refused.fields["retry-after"]) >= 1
    assert put(Guest(bus, **ann), b"her own").status == 201
    assert len(list(pathlib.Path(f"{bus.state.path}.blobs").iterdir())) == 6


def test_a_sender_whose_name_is_an_address_does_not_pay_for_the_files_from_there(tmp_path, monkeypatch):
    """A name may look like one; messages and files have a rate each."""
    monkeypatch.setattr(Storms, "BURST", 5)
    with a_bus(time.monotonic, tmp_path / "bus.db") as bus:
        bus.storms = Storms(Clock(), rate=50)
        assert [part(Guest(bus), number).status for number in range(6)] == [202] * 5 + [429]
        assert sends(bus, {}, "127.0.0.1", 1).answer().status == 200


def blobs_of(bus):
    return bus.routes["PUT", "/blob/"].call.__self__


@pytest.fixture
def small(tmp_path):
    """As `two`, with tokens, and with a room of 1 MiB for files."""
    path = tmp_path / "bus.db"
    mal, ann = owners(path, "closed", "mal", "ann")
    with a_bus(time.monotonic, path, "--files", "1m") as bus:
        bus.door.LONG = math.inf  # as above
        yield bus, mal, ann


def test_a_part_counts_for_who_goes_on_with_it(small):
    """Else the one who began it pays for what another one sends."""
    bus, mal, ann = small
    data = bytes(5000)
    path = f"/blob/{hashlib.sha256(data).hexdigest()}"

    def sends(who, start, end):
        field = f"Content-Range: bytes {start}-{end - 1}/{len(data)}"
        return Guest(bus, **who).begins("PUT", path, data[start:end], field).answer().status

    held = blobs_of(bus).shares.held
    assert sends(ann, 0, 10) == 202 and [*held.values()] == [10 + 4096]
    assert sends(mal, 10, 4000) == 202 and [*held.values()] == [4000 + 4096]
    assert sends(mal, 4000, 5000) == 201 and [*held.values()] == [5000 + 4096] and len(held) == 1
    assert mal["token"].startswith([*held][0])


def test_in_a_room_for_files_that_is_nearly_full_no_token_has_over_a_quarter(small, monkeypatch):
    """A file counts for the token that sent it first, and what is removed or refused no longer counts."""
    bus, mal, ann = small
    blobs = blobs_of(bus)
    of_mal, of_ann = ([bytes([letter]) * (100 << 10) for letter in letters] for letters in (b"abcdefghij", b"xyz"))
    statuses = [put(Guest(bus, **mal), data).status for data in of_mal]
    assert statuses == [201] * 7 + [507] * 3, "three quarters of the room, and no more"
    assert b"nearly full" in put(Guest(bus, **mal), of_mal[7]).body
    assert [put(Guest(bus, **ann), data).status for data in of_ann] == [201, 201, 507]
    assert part(Guest(bus, **mal), 1).status == 507
    assert put(Guest(bus, **ann), of_mal[0]).status == 507, "nor may it send again what is there"
    bus.retention.keep, later = 1000, time.time_ns() + 2000 * 10**9
    monkeypatch.setattr(time, "time_ns", lambda: later)
    bus.retention.looked = later / 10**9
    blobs.forgotten(blobs.forget())
    assert blobs.used == blobs.files == 0 and not blobs.shares.held and not blobs.owners
    wrong = Guest(bus, **mal).begins("PUT", f"/blob/{0:064x}", b"not that").answer()
    assert wrong.status == 422 and not blobs.shares.held and not blobs.owners
    assert [put(Guest(bus, **ann), b"the same").status for _ in range(2)] == [201, 200]
    assert blobs.shares.all == len(b"the same") + blobs.BLOCK


def test_uploads_at_once_get_no_more_of_a_nearly_full_room_than_one_after_the_other(small):
    bus, mal, ann = small
    files = [bytes([letter]) * (250 << 10) for letter in b"abcd"]
    guests = [Guest(bus, **mal) for _ in files]
    for guest, data in zip(guests, files):
        path, fields = f"/blob/{hashlib.sha256(data).hexdigest()}", (HOST, f"Authorization: Bearer {guest.token}")
        guest.says(head(f"PUT {path} HTTP/1.1", *fields, f"Content-Length: {len(data)}"))
    come_true(lambda: len(blobs_of(bus).arriving) == len(files))
    answered = []
    for guest, data in zip(guests, files):
        guest.says(data)
        answered.append(guest.answer().status)
    assert answered == [201] * 3 + [507]


def test_tiny_files_count_as_the_blocks_they_take(small):
    bus, mal, ann = small
    statuses = [put(Guest(bus, **mal), b"%d" % number).status for number in range(256)]
    assert statuses.index(507) == 192, "three quarters of the blocks"
    assert put(Guest(bus, **ann), b"her own").status == 201


def test_as_many_files_fit_as_the_room_has_blocks(tmp_path, monkeypatch):
    """A file of one byte takes a block of the disk. What is there already goes on, and what is removed makes room."""
    with a_bus(time.monotonic, tmp_path / "bus.db", "--files", "1m") as bus:
        blobs, guest = blobs_of(bus), Guest(bus)
        most = (1 << 20) // 4096
        for number in range(most - 1):
            assert part(guest, number).status == 202
        assert put(guest, b"a whole one").status == 201
        assert part(Guest(bus), most + 1).status == put(Guest(bus), b"another").status == 507
        folder = pathlib.Path(f"{bus.state.path}.blobs")
        assert blobs.files == most == len(list(folder.iterdir())) and blobs.used == most - 1 + 11
        wrong = Guest(bus).begins("PUT", f"/blob/{0:064x}", b"y", "Content-Range: bytes 1-1/2").answer()
        assert wrong.status == 422, "its rest came, and it goes"
        again = hashlib.sha256(b"a whole one").hexdigest()
        assert Guest(bus).begins("PUT", f"/blob/{again}", b"a whole one").answer().status == 200
        assert put(Guest(bus), b"another").status == 201
        assert blobs.files == most == len(list(folder.iterdir()))
        later = time.time_ns() + 8 * 86400 * 10**9
        monkeypatch.setattr(time, "time_ns", lambda: later)
        bus.retention.looked = later / 10**9
        blobs.forgotten(blobs.forget())
        assert blobs.files == 2 == len(list(folder.iterdir())), "parts are removed after a week"
    with a_bus(time.monotonic, tmp_path / "bus.db", "--files", "1m") as bus:
        assert blobs_of(bus).files == 2, "they are counted at start"


def test_a_small_room_has_a_hundred_files(tmp_path):
    with a_bus(time.monotonic, tmp_path / "bus.db", "--files", "1k") as bus:
        guest = Guest(bus)
        assert [part(guest, number).status for number in range(101)] == [202] * 100 + [507]
