"""Work queues: each message to one worker, until it is acknowledged."""
import concurrent.futures
import contextlib
import json
import sqlite3
import threading
import time

import pytest

import bus_server
from tests.kit.near import Near
from tests.kit.peers import marks_are_written, metric
from tests.kit.processes import PATIENCE, Server, in_time, wait_until
from tests.kit.queues import ask, background, claim, mail, parked, post, send, settle, state
from tests.kit.wire import Peer, a_bus, posted, told


def listening(bus, name):
    agents = ask(bus, "GET", "/agents")[1]["agents"]
    return [agent for agent in agents if agent["name"] == name and agent["online"]]


@pytest.fixture
def bus(near):
    return near


@pytest.fixture
def impatient(tmp_path):
    """A bus that buries what failed twice."""
    with Near(tmp_path / "bus.db", "--max-attempts", "2") as bus:
        yield bus


@pytest.fixture
def mortal(tmp_path):
    """The same, and it can be killed."""
    with Server(tmp_path / "bus.db", "--max-attempts", "2") as server:
        yield server


def test_each_of_50_messages_is_claimed_once_by_one_of_4_workers(bus):
    for number in range(50):
        send(bus, msg=str(number))
    done = []

    def work():
        while True:
            jobs = claim(bus, max=3)
            if not jobs:
                return
            done.extend(job["msg"] for job in jobs)
            assert {settle(bus, "ack", job) for job in jobs} == {200}

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert sorted(done, key=int) == [str(number) for number in range(50)]


def test_a_claim_waits_for_its_message_and_gets_it_alone(bus):
    with background(claim, bus, wait=20) as first, background(claim, bus, wait=20) as second:
        wait_until(lambda: listening(bus, "builds"))
        send(bus, msg="one")
        (done, waiting) = concurrent.futures.wait([first, second], return_when=concurrent.futures.FIRST_COMPLETED)
        assert [job["msg"] for job in done.pop().result()] == ["one"]
        send(bus, msg="two")
        assert [job["msg"] for job in waiting.pop().result()] == ["two"]


def test_a_claim_is_about_1_mib_at_most_also_of_what_came_back_and_the_rest_stays(bus):
    sent = [send(bus, msg="x" * 200_000) for _ in range(8)]
    for _ in range(2):
        first, rest = claim(bus, max=100), claim(bus, max=100)
        assert 5 <= len(first) <= 7 and sorted(job["id"] for job in first + rest) == sorted(sent)
        assert {settle(bus, "nack", job) for job in first + rest} == {200}


def test_an_empty_claim_ends_with_its_hold(bus):
    began = time.monotonic()
    assert claim(bus, wait=0.3) == []
    assert 0.3 <= time.monotonic() - began < PATIENCE


def test_a_lease_that_runs_out_gives_the_message_to_another_and_fences_the_first(bus):
    send(bus)
    (lost,) = claim(bus, lease=1)
    began = time.monotonic()
    (again,) = claim(bus, wait=20)
    assert time.monotonic() - began < in_time(2), "not longer than its lease and a second"
    assert (lost["attempt"], again["attempt"]) == (1, 2) and lost["id"] == again["id"]
    assert [settle(bus, verb, lost) for verb in ("ack", "nack", "extend")] == [409, 409, 409]
    assert settle(bus, "ack", again) == 200


def test_the_lease_of_one_job_of_a_claim_is_worth_nothing_for_its_neighbour(bus):
    for number in range(3):
        send(bus, msg=str(number))
    jobs = claim(bus, max=3)
    assert len({job["lease"] for job in jobs}) == 3
    for job, other in zip(jobs, jobs[1:] + jobs[:1]):
        assert settle(bus, "ack", {"id": job["id"], "lease": other["lease"]}) == 409
    assert [settle(bus, "ack", job) for job in jobs] == [200] * 3


def test_a_lease_that_is_extended_does_not_run_out(bus):
    send(bus)
    (job,) = claim(bus, lease=1)
    assert settle(bus, "extend", job, seconds=60) == 200
    bus.later(30)
    assert claim(bus) == []
    assert settle(bus, "ack", job) == 200


def test_what_is_given_back_comes_again_after_its_delay(bus):
    send(bus)
    (job,) = claim(bus)
    with background(claim, bus, wait=20) as other:
        wait_until(lambda: listening(bus, "builds"))
        began = time.monotonic()
        assert settle(bus, "nack", job, delay=0.5) == 200
        (again,) = other.result()
    assert again["attempt"] == 2 and time.monotonic() - began >= 0.5
    assert settle(bus, "ack", job) == 409


def test_who_waited_before_a_message_came_gets_it_when_the_lease_of_another_runs_out(bus):
    with background(claim, bus, wait=20, lease=1) as first, background(claim, bus, wait=20, lease=1) as second:
        wait_until(lambda: parked(bus) == 2)
        began = time.monotonic()
        send(bus)
        assert sorted(job["attempt"] for one in (first, second) for job in one.result()) == [1, 2]
        assert time.monotonic() - began < in_time(2), "not longer than its lease and a second"


def test_what_is_given_back_for_long_does_not_hold_up_what_comes_back_before(bus):
    send(bus, msg="long")
    send(bus, msg="soon")
    (long,), (soon,) = claim(bus), claim(bus, lease=1)
    with background(claim, bus, wait=20) as other:
        wait_until(lambda: parked(bus) == 1)
        began = time.monotonic()
        assert settle(bus, "nack", long, delay=60) == 200
        assert [job["id"] for job in other.result()] == [soon["id"]] and time.monotonic() - began < in_time(2)


def test_a_message_whose_last_worker_died_with_the_bus_is_buried_when_that_is_back(mortal):
    bus = mortal
    send(bus, msg="poison")
    claim(bus, lease=1)
    (job,) = claim(bus, lease=1, wait=20)
    bus.kill()
    wait_until(lambda: time.time() > job["lease_until"])
    bus.start()
    wait_until(lambda: mail(bus, "builds.dead") == ["poison"])


def a_claim(queue):
    return posted("/claim", to=queue, wait=20)


def test_a_worker_of_the_dead_letters_gets_one_that_is_buried_in_the_list_of_its_own_claim():
    """Its claim finds nothing and is not parked yet when, in the same list, another claim writes the letter."""
    with a_bus(time.monotonic, ":memory:", "--max-attempts", "1") as bus:
        sender, worker, undertaker = Peer(bus), Peer(bus), Peer(bus)
        sender.says(posted("/send", **{"from": "alice", "to": "builds", "msg": "poison"}))
        assert told(sender)[0] == 200
        worker.says(a_claim("builds"))
        [job] = told(worker)[1]["messages"]
        now, lists, apply = bus.clock.now, [], bus.state.apply
        bus.clock.now = lambda: now()._replace(steady=now().steady + 3_600_000_000)  # its lease has run out

        def note(operations, now):
            lists.append([(operation.kind, getattr(operation, "queue", "")) for operation in operations])
            return apply(operations, now)

        bus.state.apply = note
        worker.says(a_claim("builds.dead"))
        undertaker.says(a_claim("builds"))
        [letter] = told(worker)[1]["messages"]
        assert lists[0] == [("claim", "builds.dead"), ("claim", "builds")], "they were to be one list, in this order"
        assert (letter["msg"], letter["dead_of"], letter["attempts"]) == ("poison", job["id"], 1)
        assert not undertaker.heard and len(bus.mailboxes.parked) == 1


def test_a_clock_that_starts_in_the_past_does_not_keep_leases_for_years(tmp_path):
    path, right = str(tmp_path / "bus.db"), bus_server.wall_clock()
    with contextlib.closing(bus_server.State(path)) as state:
        state.apply([bus_server.Raise(right)], bus_server.Now(right, right))
    with contextlib.closing(bus_server.State(path)) as state:
        assert bus_server.Clock(lambda: 0, state.last).now().steady >= right - bus_server.AHEAD


@pytest.mark.parametrize("verb, seconds", [("", 43200), ("nack", 0)])
def test_a_clock_that_started_ahead_keeps_no_job_until_its_day(tmp_path, verb, seconds):
    """A worker may have a lease of 12 hours; what was given back is free at once."""
    right, month, work = bus_server.wall_clock(), 31 * 86400 * 1000000, bus_server.load_extensions(())["work"]
    with contextlib.closing(bus_server.State(str(tmp_path / "bus.db"))) as state:
        state.add_tables("work", work.NOUN, work.TABLES)

        def done(operation, after):
            return state.apply([operation], bus_server.Now(right + after, right + after)).results[0]

        def claimed(after):
            return done(work.Claim("default", "builds", 1, 60 * 1000000, 7, "ann", 5), after).jobs

        message = {"from": "ann", "to": "builds", "channel": "default", "msg": "x"}
        done(bus_server.Put([bus_server.draft(message, None)]), 0)
        [job] = claimed(month)
        if verb:
            done(work.Settle(verb, job.message.tick, job.lease, 60 * 1000000, "", 5), month)
        assert len(claimed(1)) == (seconds == 0)
        assert len(claimed(seconds * 1000000 + 2)) == (seconds > 0)


DAY = 86400 * 1000000  # us


class Queue:
    """The queue builds in a State whose wall clock is `wrong` by so much; its steady clock is right."""

    def __init__(self, state):
        self.state, self.right, self.after, self.wrong = state, bus_server.wall_clock(), 0, 0
        self.work = bus_server.load_extensions(())["work"]
        state.add_tables("work", self.work.NOUN, self.work.TABLES)

    def done(self, operation):
        steady = self.right + self.after
        return self.state.apply([operation], bus_server.Now(steady + self.wrong, steady)).results[0]

    def put(self, msg, ttl=86400):
        message = {"from": "ann", "to": "builds", "channel": "default", "msg": msg, "ttl": ttl}
        self.done(bus_server.Put([bus_server.draft(message, None)]))

    def claim(self, limit=10):
        self.after += 1000000
        return self.done(self.work.Claim("default", "builds", limit, 60 * 1000000, self.after, "ann", 2)).jobs

    def claimed(self, limit=10):
        return [json.loads(f"{{{job.message.text}}}")["msg"] for job in self.claim(limit)]

    def settle(self, verb, job):
        self.done(self.work.Settle(verb, job.message.tick, job.lease, 0, "", 2))


@pytest.fixture
def queue(tmp_path):
    with contextlib.closing(bus_server.State(str(tmp_path / "bus.db"))) as state:
        yield Queue(state)


def test_a_clock_that_is_wrong_for_a_moment_loses_no_job(queue):
    """What it takes for expired is passed over; when it is right again, each is handed out once, as before."""
    for msg in ("done", "in hand", "first", "short", "second"):
        queue.put(msg, 1800 if msg == "short" else 86400)
    done, _ = queue.claim(2)
    queue.settle("ack", done)
    queue.wrong = 31 * DAY
    queue.put("later")
    assert queue.claimed() == ["later"]
    queue.wrong = 0
    assert queue.claimed(1) == ["first"]
    assert queue.claimed() == ["short", "second"] and queue.claimed() == []


@pytest.mark.parametrize("verb", ["", "nack"])
@pytest.mark.parametrize("attempts", [1, 2])
def test_a_clock_that_is_wrong_for_a_moment_loses_no_job_that_came_back(queue, verb, attempts):
    """Its lease ends, or it is given back, also for the last time, while the clock says that it has expired."""
    queue.put("job")
    for attempt in range(attempts):
        [job] = queue.claim()
        queue.wrong = 31 * DAY if attempt == attempts - 1 else 0
        if verb:
            queue.settle(verb, job)
        queue.after += 61 * 1000000
    queue.done(queue.work.Bury(2))
    assert queue.claimed() == []
    queue.wrong = 0
    assert queue.claimed() == ["job"] and queue.claimed() == []


def test_a_small_step_back_of_the_clock_looks_through_the_last_hour_of_a_queue_alone(queue):
    """What expired before stays passed over, so that a long queue is not read again at each correction."""
    for msg in ("expires", "expires an hour later"):
        queue.put(msg, 10)
        queue.after += 20 * 1000000
        assert queue.claimed() == []
        queue.after += 3700 * 1000000
    queue.after -= 3700 * 1000000
    queue.wrong = -15 * 1000000
    [[first]] = queue.state.writing.execute("SELECT first FROM work_passed").fetchall()
    assert queue.claimed() == ["expires an hour later"]
    assert first > queue.right + 3700 * 1000000


def test_null_is_as_if_it_were_not_there(bus):
    send(bus)
    assert len(claim(bus, channel=None, lease=None, worker=None)) == 1
    assert ask(bus, "POST", "/claim", {"to": None})[0] == 400


def test_an_acknowledgement_may_be_repeated(bus):
    send(bus)
    (job,) = claim(bus)
    assert [settle(bus, "ack", job), settle(bus, "ack", job), settle(bus, "nack", job)] == [200, 200, 409]
    assert claim(bus) == []


def test_dead_letters_are_those_that_failed_so_often_and_say_why(impatient):
    bus = impatient
    bad, good = send(bus, msg="bad"), send(bus, msg="good")
    while True:
        jobs = claim(bus, max=10)
        if not jobs:
            break
        for job in jobs:
            settle(bus, "ack" if job["msg"] == "good" else "nack", job, reason="it does not compile")
    (letter,) = ask(bus, "GET", "/recv?to=builds.dead")[1]["messages"]
    assert (letter["msg"], letter["from"], letter["dead_of"]) == ("bad", "alice", bad)
    assert (letter["attempts"], letter["reason"]) == (2, "it does not compile")
    assert (state(bus, bad), state(bus, good)) == ("dead", "acknowledged")


def test_agents_says_how_a_queue_is_worked_on_also_after_a_restart(mortal):
    bus = mortal

    def work(name="builds"):
        agents = ask(bus, "GET", f"/agents?name={name}")[1]["agents"]
        return agents[0].get("work") if agents else None

    for _ in range(3):
        send(bus)
    assert work() is None, "nobody has claimed anything"
    jobs = claim(bus, max=2, worker="w1") + claim(bus, worker="w2")
    assert work() == {"in_hand": 3, "dead": 0, "workers": 2}
    assert settle(bus, "nack", jobs[0]) == 200 and work() == {"in_hand": 2, "dead": 0, "workers": 2}
    (again,) = claim(bus, worker="w3")
    assert settle(bus, "nack", again) == 200 and work() == {"in_hand": 2, "dead": 1, "workers": 2}
    assert settle(bus, "ack", jobs[1]) == 200
    marks_are_written(bus)
    bus.kill()
    bus.start()
    assert work() == {"in_hand": 1, "dead": 1, "workers": 1} and work("builds.dead") is None
    (letter,) = claim(bus, to="builds.dead")
    assert work() == {"in_hand": 1, "dead": 0, "workers": 1}
    assert work("builds.dead") == {"in_hand": 1, "dead": 0, "workers": 1} and settle(bus, "ack", letter) == 200


def test_a_lease_that_is_over_is_in_nobodys_hand(bus):
    send(bus)
    claim(bus, lease=60)

    def work():
        [there] = ask(bus, "GET", "/agents?name=builds")[1]["agents"]
        return there["work"]

    assert work()["in_hand"] == 1
    bus.later(61)
    assert work() == {"in_hand": 0, "dead": 0, "workers": 0}


def test_a_job_that_came_back_is_unread_wherever_that_is_counted(bus):
    """It was in no number: fetched, in nobody's hand, not dead. Given back, for later too, or its lease ran out."""
    for msg in ("done", "given back", "for later", "left"):
        send(bus, msg=msg)
    jobs = {job["msg"]: job for job in claim(bus, max=4)}
    assert counted(bus) == (0, None)
    settle(bus, "ack", jobs["done"])
    settle(bus, "nack", jobs["for later"], delay=3600)
    assert counted(bus) == (1, jobs["for later"]["ts"])
    settle(bus, "nack", jobs["given back"])
    settle(bus, "extend", jobs["left"], seconds=60)
    bus.later(61)
    assert counted(bus) == (3, jobs["given back"]["ts"])
    assert post(bus, "/send", **{"from": "alice", "to": "builds", "msg": "new"})["receiver"]["unread"] == 4
    assert len(claim(bus, max=2)) == 2 and counted(bus)[0] == 2


def test_a_job_that_came_back_and_expired_is_not_unread(bus):
    ident = send(bus, ttl=3)
    [job] = claim(bus, wait=PATIENCE)
    assert job["id"] == ident and settle(bus, "nack", job) == 200
    wait_until(lambda: of_queue(bus)["unread"] == 0)
    assert counted(bus) == (0, None)


def test_of_very_many_jobs_that_came_back_some_are_counted(monkeypatch):
    """A list of names may not take long because one of them is a queue whose workers all failed."""
    with a_bus() as inside:
        monkeypatch.setattr(inside.mailboxes.back.__func__.__globals__["Queues"], "LOOKED", 2)
        peer = Peer(inside)

        def said(request):
            peer.says(request)
            return told(peer)[1]

        for _ in range(3):
            said(posted("/send", **{"from": "alice", "to": "builds", "msg": "x"}))
        for job in said(posted("/claim", to="builds", max=3, wait=0))["messages"]:
            said(posted("/nack", id=job["id"], lease=job["lease"]))
        inside.looks, inside.countable = looks, countable = 9, 9
        assert inside.mailboxes.back("default", "builds", 1 << 60)[0] == 2
        assert inside.looks < looks and inside.countable == countable - 2


def of_queue(bus, queue="builds"):
    return ask(bus, "GET", f"/agents?name={queue}")[1]["agents"][0]


def counted(bus, queue="builds"):
    """(unread messages, the ts of the oldest), which are the same in each answer that has them."""
    unread, oldest = map(of_queue(bus, queue).get, ("unread", "oldest"))
    assert ask(bus, "GET", "/inbox")[1]["recipients"]["default"][queue] == unread
    assert ask(bus, "GET", "/channels")[1]["channels"]["default"]["unread"] == unread
    labels = f'{{channel="default",name="{queue}"}}'
    assert metric(bus, f"unread{labels}") == unread
    assert (metric(bus, f"oldest_unread_seconds{labels}") > 0) == bool(unread) == (oldest is not None)
    return unread, oldest


def test_a_message_whose_last_worker_died_is_buried_though_nobody_asks_for_work(impatient):
    bus = impatient
    send(bus, msg="poison")
    claim(bus, lease=1)
    (job,) = claim(bus, lease=1, wait=20)
    assert job["attempt"] == 2
    wait_until(lambda: mail(bus, "builds.dead") == ["poison"])


def test_many_extensions_of_a_lease_set_few_timers():
    """Each was one, for as long as the lease: up to 12 hours."""
    with a_bus() as inside:
        peer = Peer(inside)
        peer.says(posted("/send", **{"from": "alice", "to": "builds", "msg": "x"}))
        told(peer)
        peer.says(posted("/claim", to="builds"))
        [job] = told(peer)[1]["messages"]
        before = len(inside.loop.timers)
        for _ in range(50):
            peer.says(posted("/extend", id=job["id"], lease=job["lease"], seconds=43200))
            assert told(peer)[0] == 200
        assert len(inside.loop.timers) < before + 10


def test_leases_outlive_a_crash_of_the_bus(mortal):
    bus = mortal
    send(bus)
    (job,) = claim(bus)
    bus.kill()
    bus.start()
    assert claim(bus) == [], "it is still leased"
    assert settle(bus, "ack", job) == 200


def test_expired_work_is_not_handed_out(bus):
    send(bus, msg="late", ttl=0.001)
    wait_until(lambda: ask(bus, "GET", "/inbox")[1]["recipients"]["default"]["builds"] == 0)
    assert claim(bus) == []


def test_work_behind_what_expired_was_recalled_or_is_damaged_is_handed_out(bus):
    for _ in range(3):
        send(bus, msg="late", ttl=0.001)
    assert ask(bus, "POST", "/recall", {"id": send(bus, msg="recalled")})[0] == 200
    damaged = send(bus, msg="damaged")
    wait_until(lambda: ask(bus, "GET", "/inbox")[1]["recipients"]["default"]["builds"] == 1)
    with contextlib.closing(sqlite3.connect(bus.db)) as database:
        database.execute("UPDATE messages SET text = replace(text, 'damaged', 'Damaged') WHERE tick = ?",
                         (int(damaged, 16),))  # fmt: skip
        database.commit()
    send(bus, msg="good")
    assert [job["msg"] for job in claim(bus)] == ["good"]


@pytest.mark.parametrize(
    "path, body",
    [
        ("/claim", {}),
        ("/claim", {"to": "all"}),
        ("/claim", {"to": "x" * 62}),
        ("/claim", {"to": "builds", "lease": "soon"}),
        ("/claim", '{"to": "builds", "wait": 1e999}'),
        ("/claim", ["builds"]),
        ("/ack", {"id": "1"}),
        ("/ack", {"lease": "1"}),
        ("/ack", {"id": "xyz", "lease": "1"}),
        ("/nack", {"id": "1", "lease": "1", "delay": "x"}),
        ("/recall", {}),
    ],
)
def test_a_wrong_request_is_refused_in_words(bus, path, body):
    status, answer = ask(bus, "POST", path, body)
    assert status == 400 and answer["error"]
