"""One exception among many ends nothing but its own connection: raised at every place that these tests can find.

The places are found by a first run: raising_server.py notes what is called under each root of the loop, and the steps
below say which of them reaches it. So a function that is new is covered by being called.

| test | seen red |
|---|---|
| housekeeping_goes_on | 2026-11-28: the bus ends at every place of every timer |
| only_the_connection_pays | most places: a peer, or five senders of one list, are never answered |
| a_drain_answers_all_others | one reader's exception: the others wait for their hold |
| revoking_reaches_all_others | the bus ends in the sweep |
| without_descriptors | the listener stays closed |
| answers_are_not_given_from_inside_each_other | green since the rewrite of Connection.answer; the control is found |
| no_memory_for_an_answer | 2026-11-30: the bus hangs up; without memory for the 500 it says nothing for ever |
| an_operation_that_raises | Put.apply: 503 to all, and the bus ends |
"""
import contextlib
import hashlib
import json
import pathlib
import resource
import select
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import count, cycle

import pytest

from tests.faults import linux, skipped_without
from tests.kit import peers as kit
from tests.kit.peers import TIMED_OUT, Closed, Peer, alive, metric, mint, post, set_revoked, sockets, stored
from tests.kit.processes import ROOT, Server, comes_true, free_port, wait_until

pytestmark = skipped_without(linux)
HOLD = 0.02  # s of a wait that is to end by itself
PATIENCE = 8  # s for an answer; what is parked for longer must be answered by something else
HASTY = "bus_server.TIDY_SECONDS = bus_server.MARKS_SECONDS = 0.05; bus_server.DRAIN_SECONDS = 1"
ERRORS = ("RuntimeError", "RecursionError", "EMFILE")
ENOUGH = 6  # failures that are told before a test gives up
# What is called once for a whole list: those who are in it may all pay, but each is told.
FOR_ALL = {"Ledger.commit", "Bus.announce", "Bus.settle", "Figures.committed", "Mailboxes.add"}
FOR_ALL |= {"Mailboxes.note_removed", "Mailboxes.wake"}
# Where a list is made durable its outcome is unknown, and the bus ends: PROTOCOL.md, "What a 200 promises".
UNKNOWN = {"Ledger.apply", "Ledger.note_room", "View.has_room", "Clock.now"}


def ask(bus, *request, **more):
    return kit.ask(bus, *request, **{"patience": PATIENCE, **more})


class Raising(Server):
    """A bus that raises where it is told to."""

    def __init__(self, place, patch=HASTY, *options, **env):
        self.faults = free_port()
        env = {"PATCH": patch, "FAULT_PORT": str(self.faults), **env}
        super().__init__(place / "bus.db", *options, program=[str(ROOT / "tests/kit/raising_server.py")], env=env)

    def told(self, *of, **wanted):
        with socket.create_connection(("127.0.0.1", self.faults), PATIENCE) as peer:
            peer.sendall(json.dumps({"of": of, **wanted}).encode() + b"\n")
            return json.loads(peer.makefile("rb").read())

    def arm(self, root=None, place=None, error="RuntimeError"):
        self.told(root=root, place=place, error=error)

    def calls(self):
        return self.told("calls")["calls"]

    def places(self):
        return {tuple(each): None for each in self.told("places")["places"]}

    def again(self):
        """As after a crash, if it ended; returns whether it had."""
        try:
            ended = self.process.poll() is not None or not alive(self)
        except OSError:
            ended = True
        if ended:
            self.kill()
            self.start()
        return ended


# Housekeeping


KNOWN = {"root Bus.tidy", "root Bus.sweep", "Remove.apply", "Tokens.refresh", "Retention.age"}  # by a timer each


def periodic(bus):
    """What is called again and again while nobody asks for anything, and who was read from now and then."""
    before, found = {}, None
    for _ in range(3):
        ask(bus, "GET", "/recv?to=reader&since=0")
        begun = bus.calls()  # nothing is asked from now on: what is called comes by itself
        wait_until(lambda: all(bus.calls().get(name, 0) > begun.get(name, 0) + 2 for name in KNOWN))  # noqa: B023
        after = bus.calls()
        found = {name for name in found or after if after[name] > before.get(name, 0)}
        before = after
    return {name for name in found if not name.startswith(("root Plain", "root Listener"))}


def goes_on(bus, names):
    """The names of what is periodic and is not called again."""
    before, stuck = bus.calls(), []

    def all_came():
        stored(bus, "reader")  # what was there is older than --keep by now
        ask(bus, "GET", "/recv?to=reader&since=0")
        now = bus.calls()
        stuck[:] = sorted(name for name in names if now.get(name, 0) <= before.get(name, 0))
        return not stuck

    comes_true(all_came, PATIENCE)
    return stuck


@pytest.mark.slow("raises at about sixty places, and waits after each until all timers have come again")
def test_housekeeping_goes_on_after_an_exception_at_any_place_of_it(tmp_path):
    with Raising(tmp_path, HASTY, "--keep", "1s") as bus:
        stored(bus, "reader")
        names = periodic(bus)
        assert names >= KNOWN
        roots = {name[5:] for name in names if name.startswith("root ")} - {"Ledger.commit", "Plain.end"}
        housekeeping = [each for each in bus.places() if each[0] in roots and not each[1].startswith("Plain.")]
        assert len(housekeeping) > 15, housekeeping
        found = []
        for (root, place), error in zip(housekeeping, cycle(ERRORS)):
            bus.arm(root, place, error)
            with contextlib.suppress(OSError):
                comes_true(lambda: ask(bus, "GET", "/recv?to=reader&since=0") and bus.told("fired")["fired"], 1)
            if bus.again():
                found.append(f"{error} in {place} under {root} ended the bus")
            else:
                bus.arm()
                stuck = goes_on(bus, names)
                found += [f"after {error} in {place} under {root}: never again {name}" for name in stuck]
                if found:
                    bus.kill()
                    bus.start()
            if len(found) >= ENOUGH:
                break
        assert not found, "\n".join(found)
        one = stored(bus, "old")
        wait_until(lambda: ask(bus, "GET", f"/message/{one}").status == 404)


# Connections


def exchange(bus, *request, **more):
    with Peer(bus, patience=PATIENCE) as peer:
        peer.send(*request, **more)
        return peer.outcome()


def now(bus):
    return ask(bus, "GET", "/healthz").json["now"]


numbers = count()


def one_list(bus):
    """Five senders and two readers, and a group, whose answers come from one transaction."""
    since = now(bus)
    peers = [Peer(bus, patience=PATIENCE) for _ in range(8)]
    for number in range(3):
        peers[number].send("GET", f"/recv?to=reader-{number % 2}&since={since}&wait=0.2")
    comes_true(lambda: metric(bus, "parked") + sum(map(answered, peers[:3])) >= 3, 0.2)  # unless one of them pays
    with standing(bus):
        for number in range(5):
            peers[3 + number].send("POST", "/send", {"from": f"s{number}", "to": f"reader-{number % 2}", "msg": "x"})
    return done(peers)


def answered(peer):
    """It has an answer, or the bus has hung up."""
    return bool(select.select([peer.sock], [], [], 0)[0])


@contextlib.contextmanager
def standing(bus):
    """What is sent meanwhile comes in one turn."""
    bus.process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        bus.process.send_signal(signal.SIGCONT)


def done(peers):
    """Their outcomes; together they have no more patience than one."""
    end, outcomes = time.monotonic() + PATIENCE, []
    for peer in peers:
        peer.sock.settimeout(max(end - time.monotonic(), 0.05))
        outcomes.append(peer.outcome())
        peer.close()
    return outcomes


def a_send(bus):
    return [exchange(bus, "POST", "/send", {"from": "ann", "to": "bob", "msg": "x", "ttl": 60, "key": "k"})]


def a_text(bus):
    return [exchange(bus, "POST", "/send?from=ann&to=bob", b"hello")]


def an_array(bus):
    return [exchange(bus, "POST", "/send", [{"from": "ann", "to": ["bob", "carl", "all"], "msg": "x"}] * 3)]


def a_read(bus):
    return [exchange(bus, "GET", "/recv?to=bob&since=0&max=2"),
            exchange(bus, "GET", "/recv?to=bob,carl&since=last", Accept="text/plain")]  # fmt: skip


def a_cursor_ahead(bus):
    return [exchange(bus, "GET", f"/recv?to=bob&since={now(bus) + 1:.6f}")]


def looks(bus):
    one = stored(bus, "bob", reply_to=None)
    paths = f"/log?max=3 /inbox /agents /metrics /message/{one} /thread/{one} / /healthz /bus_send.py /nothing"
    return [*(exchange(bus, "GET", path) for path in paths.split()), exchange(bus, "OPTIONS", "/send")]


def a_question(bus):
    """It is answered while its sender waits."""
    asker, friend = f"asker-{next(numbers) % 20}", f"friend-{next(numbers) % 21}"
    with Peer(bus, patience=PATIENCE) as peer:
        peer.send("POST", "/ask?wait=0.2", {"from": asker, "to": friend, "msg": "well?"})
        question = []

        def asked():
            reply = ask(bus, "GET", f"/recv?to={friend}&since=0&max=1000").json
            question[:] = [each["id"] for each in reply["messages"] if each["from"] == asker]
            return question or answered(peer)

        with contextlib.suppress(KeyError, ValueError):
            comes_true(asked, 1)
        answers = []
        if question:
            answer = {"from": friend, "to": asker, "msg": "so", "reply_to": question[-1]}
            answers = [exchange(bus, "POST", "/send", answer)]
        return [peer.outcome(), *answers]


def a_message_taken_back(bus):
    one = stored(bus, "nobody")
    return [exchange(bus, "POST", "/recall", {"id": one})]


def work(bus):
    """A job that is claimed, given back, and claimed again by one who waits."""
    stored(bus, "queue")
    with Peer(bus, patience=PATIENCE) as peer:
        reply = peer.send("POST", "/claim", {"to": "queue", "wait": 0, "lease": 1}).answer()
        if reply.status != 200 or not reply.json["messages"]:
            return [reply.status]
        job = reply.json["messages"][0]
        given = {"id": job["id"], "lease": job["lease"]}
        outcomes = [exchange(bus, "POST", "/extend", given), exchange(bus, "POST", "/nack", given)]
    return [200, *outcomes, exchange(bus, "POST", "/claim", {"to": "queue", "wait": 0.3, "max": 100})]


def a_worker_that_waits(bus):
    with Peer(bus, patience=PATIENCE) as peer:
        peer.send("POST", "/claim", {"to": f"queue-{next(numbers) % 5}", "wait": HOLD})
        return [peer.outcome()]


def a_file(bus):
    data = b"%d" % next(numbers)
    path = f"/blob/{hashlib.sha256(data).hexdigest()}"
    put = exchange(bus, "PUT", path, data)
    return [put, exchange(bus, "GET", path)] if put == 201 else [put]


def a_sender_that_waits(bus):
    one = stored(bus, "late")
    with Peer(bus, patience=PATIENCE) as peer:
        peer.send("GET", f"/message/{one}?wait_fetched=0.2")
        return [exchange(bus, "GET", "/recv?to=late&since=0&max=1000"), peer.outcome()]


def a_hold(bus):
    """Three are over at the same time."""
    peers = [Peer(bus, patience=PATIENCE) for _ in range(3)]
    since = now(bus)
    for number, peer in enumerate(peers):
        peer.send("GET", f"/recv?to=idle-{number}&since={since}&wait={HOLD}")
    return done(peers)


def a_reader_that_hangs_up(bus):
    with Peer(bus, patience=PATIENCE) as peer, Peer(bus, patience=PATIENCE) as other:
        peer.send("GET", f"/recv?to=gone&since={now(bus)}&wait=1")
        other.send("GET", f"/recv?to=here&since={now(bus)}&wait={HOLD}")
        peer.close()
        return [other.outcome()]


def wrong(bus):
    return [exchange(bus, "GET", "/recv"), exchange(bus, "POST", "/send", b"{"), exchange(bus, "BREW", "/")]


STEPS = [one_list, a_send, a_text, an_array, a_read, a_cursor_ahead, looks, a_question, a_message_taken_back, work,
         a_worker_that_waits, a_file, a_sender_that_waits, a_hold, a_reader_that_hangs_up, wrong]  # fmt: skip


def try_step(step, bus):
    """Its outcomes; what it needs beforehand may be what failed, and then it pays for itself."""
    try:
        return step(bus)
    except TIMED_OUT:
        return [None]
    except (AssertionError, OSError, ValueError, KeyError, StopIteration, Closed) as error:
        return [f"{type(error).__name__}: {error}"[:80]]


def unpaid(right, outcomes, place):
    """What is wrong with these outcomes, if more than one connection paid, or one was never answered."""
    if None in outcomes:
        return "somebody was never answered"
    paid = sum(one != other for one, other in zip(right, outcomes))
    return f"{paid} of {len(right)} paid: {outcomes}" if paid > 1 and place not in FOR_ALL else ""


@pytest.mark.slow("raises at about four hundred places")
def test_only_the_connection_pays_on_which_it_was_raised(tmp_path):
    with Raising(tmp_path, HASTY) as bus:
        reached, right = {}, {}
        for step in STEPS:
            before = set(bus.places()) if step is not one_list else set()
            open_now = sockets(bus)
            right[step] = step(bus)
            wait_until(lambda open_now=open_now: sockets(bus) <= open_now)
            for each in bus.places():
                if each not in before and each[0] not in ("Bus.tidy",) and each[1] not in UNKNOWN:
                    reached.setdefault(each, step)
        timers = {"Bus.tidy", "Blobs.forget", "Work.bury", "Bus.save_marks"}  # the test above has those
        reached = {each: step for each, step in reached.items() if each[0] not in timers}
        assert len(reached) > 60
        found = []
        for ((root, place), step), error in zip(reached.items(), cycle(ERRORS)):
            bus.arm(root, place, error)  # and what was armed before is so no more
            outcomes = try_step(step, bus)
            if bus.again():
                found.append(f"{error} in {place} under {root}: {step.__name__}: the bus ended or stands")
            else:
                wrong = unpaid(right[step], outcomes, place)
                if wrong:
                    found.append(f"{error} in {place} under {root}: {step.__name__}: {wrong}")
                    bus.kill()
                    bus.start()
            if len(found) >= ENOUGH:
                break
        bus.arm()
        assert not found, "\n".join(found)
        assert {step: try_step(step, bus) for step in STEPS} == right, "the bus is as it was"


def draining(place, arm=None, **env):
    """The outcomes of four parked readers when the bus is told to end, and its exit code."""
    with Raising(place, HASTY, **env) as bus:
        since = now(bus)
        peers = [Peer(bus, patience=PATIENCE) for _ in range(4)]
        idle = [Peer(bus) for _ in range(2)]
        for peer in idle:
            peer.send("GET", "/healthz").answer()
        for number, peer in enumerate(peers):
            peer.send("GET", f"/recv?to=reader-{number}&since={since}&wait=20")
        wait_until(lambda: metric(bus, "parked") >= 4)
        if arm:
            bus.arm(*arm)
        bus.process.send_signal(signal.SIGTERM)
        outcomes = done(peers)
        return outcomes, bus.reap()


@pytest.mark.slow("a server for each place, about twelve")
def test_a_drain_answers_all_others(tmp_path):
    file = tmp_path / "places.json"
    (tmp_path / "first").mkdir()
    assert draining(tmp_path / "first", PLACES=str(file)) == ([200] * 4, 0)
    roots = "Bus.drain", "Loop.signals"
    kinds = "Connection.", "Mailboxes.", "Plain."
    places = [each for each in json.loads(file.read_text()) if each[0] in roots and each[1].startswith(kinds)]
    places = [each for each in places if each[1] not in ("Plain.wait", "Plain.send", "Plain.pause_reading")]
    assert len(places) > 3, file.read_text()

    def wrong(number, place, error):
        folder = tmp_path / str(number)
        folder.mkdir()
        outcomes, code = draining(folder, (*place, error))
        return f"{error} in {place[1]}: {outcomes}, exit code {code}" if outcomes.count(200) < 3 or code else ""

    with ThreadPoolExecutor(6) as pool:  # most of their time is DRAIN_SECONDS
        found = [*filter(None, pool.map(wrong, count(), places, cycle(ERRORS)))]
    assert not found, "\n".join(found)


@pytest.mark.slow("revokes a token at about fifteen places")
def test_revoking_reaches_all_others(tmp_path):
    tokens = mint(tmp_path / "bus.db", bob=["--also", "b1,b2,b3,b4"], boss=["--operator"])
    token, operator = tokens["bob"], tokens["boss"]
    with Raising(tmp_path, HASTY) as bus:

        def revoked(arm=None):
            set_revoked(bus, "bob", None)
            wait_until(lambda: ask(bus, "GET", "/recv?to=bob&since=0", token=token).status == 200)
            since = ask(bus, "GET", "/recv?to=bob&since=now", token=token).json["now"]
            peers = [Peer(bus, token, patience=PATIENCE) for _ in range(4)]
            for number, peer in enumerate(peers, 1):
                peer.send("GET", f"/recv?to=b{number}&since={since}&wait=20")
            wait_until(lambda: len(online(bus, operator)) >= 4)
            if arm:
                bus.arm(*arm)
            set_revoked(bus, "bob", 1)
            return done(peers)

        before = bus.places()
        assert revoked() == [401] * 4
        places = [each for each in bus.places() if each not in before and each[0] == "Bus.sweep"]
        assert places, "nothing is found by which it evicts"
        found = []
        for (root, place), error in zip(places, cycle(ERRORS)):
            try:
                outcomes = revoked((root, place, error))
            except (OSError, AssertionError) as missed:
                outcomes = [f"{missed!r}"[:60]]
            if bus.again() or [each for each in outcomes if each != 401] not in ([], [0], [500]):
                found.append(f"{error} in {place}: {outcomes}")
            bus.arm()
            if len(found) >= ENOUGH:
                break
        assert not found, "\n".join(found)


def online(bus, operator):
    agents = ask(bus, "GET", "/agents", token=operator).json["agents"]
    return [each for each in agents if each["name"][0] == "b" and each["name"] != "boss" and each["online"]]


NO_PLAN = """
later = bus_server.Loop.later
def fails_once(loop, patience, action):
    if patience == bus_server.Listener.RETRY:
        bus_server.Loop.later = later
        raise OSError(24, "Too many open files (raised on purpose)")
    later(loop, patience, action)
bus_server.Loop.later = fails_once
"""  # the functions of Loop are no places


@pytest.mark.parametrize("place", ["Door.drop_idle", "Plain.abort", "Loop.later", "Listener.welcome"])
def test_without_descriptors_an_exception_does_not_close_the_door(tmp_path, place):
    with Raising(tmp_path, HASTY + (NO_PLAN if place == "Loop.later" else "")) as bus:
        peers = [Peer(bus, patience=PATIENCE).send("GET", "/healthz") for _ in range(3)]
        assert [peer.outcome() for peer in peers] == [200] * 3
        bus.arm(None, place, "EMFILE")
        open_now = len(list(pathlib.Path(f"/proc/{bus.process.pid}/fd").iterdir()))
        resource.prlimit(bus.process.pid, resource.RLIMIT_NOFILE, (open_now, open_now + 100))
        with contextlib.ExitStack() as guests:

            def refused():
                """One more guest: a descriptor that was open when they were counted may have been closed since."""
                guests.enter_context(Peer(bus)).send("GET", "/healthz")
                return "raised on purpose" in bus.log.read_text()

            wait_until(refused)
        resource.prlimit(bus.process.pid, resource.RLIMIT_NOFILE, (open_now + 100, open_now + 100))
        assert bus.process.poll() is None
        wait_until(lambda: alive(bus))


# Answers from inside an answer

SHALLOW = "sys.setrecursionlimit(300);"  # 230 answers inside each other do not fit, whatever a Python allows
INSIDE = """
def answer(self, answer):
    if answer and self.phase is not bus_server.LINGER:
        self.write(answer)
        if self.phase is bus_server.IDLE and self.buffer:
            self.advance()
bus_server.Connection.answer = answer
"""


def fetched_behind_each_other(bus):
    """230 requests that fit into the buffer behind each other; the first waits, and all are answered by one fetch."""
    one = stored(bus, "bob")
    with Peer(bus, patience=PATIENCE) as peer, Peer(bus, patience=PATIENCE) as reader:
        peer.sock.sendall(peer.request("GET", f"/message/{one}?wait_fetched=9") * 230)
        wait_until(lambda: metric(bus, "parked") >= 1)
        assert reader.send("GET", "/recv?to=bob&since=0").outcome() == 200
        return until_one_fails(peer, 230)


def until_one_fails(peer, count):
    outcomes = []
    while len(outcomes) < count and outcomes[-1:] in ([], [200]):
        outcomes.append(peer.outcome())
    return outcomes


def polls_behind_each_other(bus):
    """A poll that is parked, is answered by one message, and finds the next poll behind it, which is answered too."""
    since = now(bus)
    with Peer(bus, patience=PATIENCE) as peer:
        peer.sock.sendall(peer.request("GET", f"/recv?to=bob&since={since}&wait=9") * 200)
        wait_until(lambda: metric(bus, "parked") >= 1)
        stored(bus, "bob")
        return until_one_fails(peer, 200)


@pytest.mark.parametrize("many", [fetched_behind_each_other, polls_behind_each_other])
def test_answers_are_not_given_from_inside_each_other(tmp_path, many):
    with Raising(tmp_path, SHALLOW) as bus:
        assert set(many(bus)) == {200}
        assert alive(bus) and "RecursionError" not in bus.log.read_text()


def test_a_bus_that_answers_from_inside_an_answer_is_found_out(tmp_path):
    with Raising(tmp_path, SHALLOW + INSIDE) as bus, contextlib.suppress(OSError):
        assert {0, None, 500} & set(fetched_behind_each_other(bus))


# Operations


NO_MEMORY = """
from itertools import islice
http_bytes, failures = bus_server.http_bytes, iter(range({times}))
def in_little_memory(answer, *how):
    if (b"large" in answer.body or answer.status == 500) and list(islice(failures, 1)):
        raise MemoryError
    return http_bytes(answer, *how)
bus_server.http_bytes = in_little_memory
"""
JOB = {"to": "queue", "lease": 3600, "wait": 30}


@pytest.mark.parametrize("parked", [False, True])
def test_without_memory_for_an_answer_it_is_500_and_counts_as_not_delivered(tmp_path, parked):
    with Raising(tmp_path, HASTY + NO_MEMORY.format(times=1)) as bus, Peer(bus, patience=PATIENCE) as worker:
        if parked:
            worker.send("POST", "/claim", JOB)
            wait_until(lambda: metric(bus, "parked") == 1)
        post(bus, "queue", msg="large")
        if not parked:
            worker.send("POST", "/claim", JOB)
        assert worker.answer().status == 500
        [again] = ask(bus, "POST", "/claim", JOB).json["messages"]
        assert (again["msg"], again["attempt"]) == ("large", 1)


def test_without_memory_for_a_request_it_is_read_later(tmp_path):
    patch = """
failures = iter(range(9))
def read(plain):
    for _ in failures:
        raise MemoryError
    return 16384
bus_server.Plain.READ = property(read)
"""
    with Raising(tmp_path, HASTY + patch) as bus:
        assert post(bus, "bob").status == 200


def test_without_memory_even_for_a_500_the_connection_ends(tmp_path):
    with Raising(tmp_path, HASTY + NO_MEMORY.format(times=4)) as bus, Peer(bus, patience=PATIENCE) as reader:
        post(bus, "bob", msg="large")
        with pytest.raises(Closed):
            reader.send("GET", "/recv?to=bob&since=0").answer()
        assert [each["msg"] for each in ask(bus, "GET", "/recv?to=bob&since=0").json["messages"]] == ["large"]


BROKEN_PUT = """
apply = bus_server.Put.apply
def broken(put, state, now):
    if any("break" in one.text for one in put.drafts):
        raise {error}
    return apply(put, state, now)
bus_server.Put.apply = broken
"""


@pytest.mark.parametrize("error", ["RuntimeError('x')", "RecursionError('x')"])
def test_an_operation_that_raises_is_500_for_it_alone(tmp_path, error):
    with Raising(tmp_path, HASTY + BROKEN_PUT.format(error=error)) as bus:
        peers = [Peer(bus, patience=PATIENCE) for _ in range(5)]
        ask(bus, "GET", "/healthz")
        with standing(bus):
            for number, peer in enumerate(peers):
                body = {"from": f"s{number}", "to": "bob", "msg": "break" if number == 2 else "x"}
                peer.send("POST", "/send", body)
        assert done(peers) == [200, 200, 500, 200, 200]
        assert alive(bus) and post(bus, "bob").status == 200
        messages = ask(bus, "GET", "/recv?to=bob&since=0").json["messages"]
        assert [each["from"] for each in messages] == ["s0", "s1", "s3", "s4", "ann"]
