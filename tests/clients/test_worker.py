"""tools/bus_work.py NAME --exec CMD: each job is done by one worker, and whatever happens to that one, it is done."""
import collections
import json
import os
import random
import signal
import subprocess
import sys
import threading

import pytest

import bus_recv
import bus_send
from tests.clients.test_clients import Clock, program, refusing, run
from tests.kit.bad_servers import FAULTS, NOON, Scripted, answer, mail, message, page
from tests.kit.processes import PATIENCE, ROOT, Server, comes_true, has_taken_its_signals, runs, wait_until
from tools import bus_work

pytestmark = pytest.mark.usefixtures("home")

JOBS = int(os.environ.get("JOBS", 12))  # 50 for the full figure
BUSY = 5  # s until a machine with other work has started a worker; a lease of 60 s is the usual one
DONE = answer({"ok": True, "now": NOON, "bus": "b1"})
LOST = answer({"error": "the lease is not held"}, status=409)


def job(n, attempt=1, **fields):
    return message(n, attempt=attempt, lease=f"{n:032x}", lease_until=NOON + 60, **fields)


def worker(url, command, *arguments, **env):
    return program("tools/bus_work.py", "builds", "--exec", command, *arguments,
                   env={"AGENT_BUS_URL": url, **env})  # fmt: skip


def ended(process, code=0):
    """What stood on its stderr."""
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == code and b"Traceback" not in err, err
    return err.decode()


def orders(server, path):
    return [asked.json for asked in server.asked if asked.target == path]


def lines(path):
    return path.read_text().splitlines() if path.exists() else []


def state(bus, ident):
    return json.loads(bus.get(f"/message/{ident}"))["state"]


def give(bus, *texts):
    return [bus_send.send("builds", text, subject=text, url=bus.url, sender="spark")["id"] for text in texts]


# ── One job ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_command_gets_the_job_and_its_end_is_told(tmp_path):
    with Scripted(mail(job(1, attempt=3, subject="T1")), DONE) as server:
        command = f'cat > {tmp_path}/in; echo "$MSG_FROM $MSG_SUBJECT $AGENT_BUS_ATTEMPT" > {tmp_path}/env'
        assert ended(worker(server.url, command, "--once", "--lease", "30", AGENT_NAME="gb10")) == ""
    assert json.loads((tmp_path / "in").read_text()) == json.loads(job(1, attempt=3, subject="T1"))
    assert (tmp_path / "env").read_text() == "spark T1 3\n"
    (claim,) = orders(server, "/claim")
    assert {**claim, "wait": 0} == {"to": "builds", "channel": "default", "lease": 30, "wait": 0, "worker": "gb10"}
    assert orders(server, "/ack") == [{"id": "1", "lease": f"{1:032x}"}]


@pytest.mark.parametrize("attempt, delay", [(1, 1), (4, 8), (30, 60), (5000, 60)])
def test_what_fails_is_given_back_for_later_with_the_reason(attempt, delay):
    with Scripted(mail(job(1, attempt=attempt)), DONE) as server:
        said = f"the command ended with 7 for 1, attempt {attempt}; the next one in {delay} s"
        assert ended(worker(server.url, "exit 7", "--once"), 1) == f"bus_work: {said}\n"
    assert orders(server, "/nack") == [
        {"id": "1", "lease": f"{1:032x}", "reason": "the command ended with 7", "delay": delay}
    ]


NO_ROOM = """
import sys, tempfile
sys.path[:0] = ["tools", "."]
import bus_work
tempfile.TemporaryFile = lambda: open("/dev/full", "w+b", 0)
sys.exit(bus_work.main(["builds", "--exec", "true", "--once"]))
"""


def test_an_attempt_whose_command_could_not_begin_does_not_count():
    """Else a machine without room for temporary files gives up all jobs, and none has run."""
    with Scripted(mail(job(1)), DONE) as server:
        env = {**os.environ, "AGENT_BUS_URL": server.url}
        done = subprocess.run([sys.executable, "-c", NO_ROOM], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    [given_back] = orders(server, "/nack")
    assert given_back["counts"] is False and given_back["reason"].startswith("the command did not begin: ")


def test_a_job_larger_than_any_pipe_needs_no_reader(tmp_path):
    with Scripted(mail(job(1, msg="x" * 500000)), DONE) as server:
        ended(worker(server.url, "true", "--once"))
        assert orders(server, "/ack")


def test_the_lease_is_extended_while_the_command_runs(tmp_path):
    with Scripted(mail(job(1)), DONE) as server:
        process = worker(server.url, f"while [ ! -e {tmp_path}/enough ]; do sleep 0.02; done", "--once", "--lease", "1")
        wait_until(lambda: len(orders(server, "/extend")) > 2)
        (tmp_path / "enough").touch()
        assert ended(process) == ""
    assert orders(server, "/extend")[0] == {"id": "1", "lease": f"{1:032x}", "seconds": 1}
    assert len(orders(server, "/ack")) == 1


@pytest.mark.parametrize("given, lease", [("3d", 43200), ("0", 1)])
def test_a_lease_that_the_bus_does_not_give_is_one_that_it_gives(given, lease):
    """Else it would be extended too late, or all the time."""
    with Scripted(mail(job(1)), DONE) as server:
        assert ended(worker(server.url, "true", "--once", "--lease", given)) == ""
    assert [claim["lease"] for claim in orders(server, "/claim")] == [lease]


def test_a_job_whose_lease_is_lost_is_given_up_and_its_command_killed_with_all_it_started(tmp_path):
    with Scripted(mail(job(1)), LOST) as server:
        command = f"(sleep 60; touch {tmp_path}/late) & echo $! > {tmp_path}/child; wait"
        assert "the lease of 1 is lost" in ended(worker(server.url, command, "--once", "--lease", "1"), 1)
        assert [asked.target for asked in server.asked] == ["/healthz", "/claim", "/extend"]
        assert [asked.query["to"] for asked in server.left] == [["builds"]], "it does not say that it leaves"
    wait_until(lambda: not runs(int((tmp_path / "child").read_text())))


def test_an_outage_while_the_command_runs_costs_no_job(tmp_path):
    """Extensions and an acknowledgement get lost; what counts is that the last one is heard."""

    def loses(sock):
        lost = page(502, "<html>") if server.asked[-1].target == "/extend" else b""
        sock.sendall(DONE if len(orders(server, "/ack")) > 1 else lost)

    with Scripted(mail(job(1)), loses) as server:
        process = worker(server.url, f"while [ ! -e {tmp_path}/enough ]; do sleep 0.02; done", "--once", "--lease", "1")
        wait_until(lambda: orders(server, "/extend"))
        (tmp_path / "enough").touch()
        assert "is not extended yet" in ended(process)
        extended = len(orders(server, "/extend"))
        assert [asked.target for asked in server.asked][2:] == ["/extend"] * extended + ["/ack", "/ack"]


def test_an_acknowledgement_that_comes_too_late_is_told():
    with Scripted(mail(job(1)), LOST) as server:
        assert "ack of 1: the lease is not held" in ended(worker(server.url, "true", "--once"))
        assert len(orders(server, "/ack")) == 1


@pytest.mark.parametrize("fault", ["silence", "502 from a proxy", "a body that drips"])
def test_a_claim_through_a_fault_is_made_again(fault, monkeypatch):
    monkeypatch.setattr(bus_recv, "GRACE_SECONDS", 0.5)
    monkeypatch.setattr(bus_recv, "SLOWEST_RATE", 1 << 20)
    strange = mail('{"msg": "a job without a lease"}')
    with Scripted(FAULTS[fault], strange, mail(job(1)), DONE) as server:
        made = bus_work.Worker(["builds"], None, "true", 60)
        made.url, made.clock, made.wait, made.hold = server.url, Clock(), 0.1, 0.1
        made.work(made.answers(True, PATIENCE))
    assert len(orders(server, "/claim")) >= 3 and orders(server, "/ack")


@pytest.mark.parametrize(
    "wrong", [{"id": 1.5}, {"lease": 1.5}, {"lease": ["a"]}, {"id": {}, "lease": {}}, {"attempt": "x"}]
)
def test_what_is_no_job_is_not_taken_and_ends_no_worker(wrong, tmp_path):
    strange = json.dumps({**json.loads(job(1)), **wrong})
    with Scripted(mail(strange), mail(job(2)), DONE) as server:
        ended(worker(server.url, f"echo $MSG_ID >> {tmp_path}/did", "--once"))
    assert lines(tmp_path / "did") == ["2"] and len(orders(server, "/ack")) == 1


@pytest.mark.parametrize("command, word", [
    ("nosuchcmd", "nosuchcmd"), ("./nosuchcmd a b", "./nosuchcmd"), ("  /nowhere/a; true", "/nowhere/a"),
    ("nosuchcmd|cat", "nosuchcmd"), ("", None), (" ", None),
])  # fmt: skip
def test_a_command_that_does_not_exist_is_said_before_a_job_is_taken(command, word):
    """Else it would make a dead letter of each job in the queue."""
    said = f"--exec: there is no command {word} that can be run here" if word else "--exec is empty: give a command"
    with Scripted(mail(job(1)), DONE) as server:
        assert ended(worker(server.url, command), 2) == f"bus_work: {said}; nothing was taken\n"
        assert server.asked == []


@pytest.mark.parametrize("command", [
    "true", "exit 0", "cd / && true", "x=1; true", "X=1 true", "if true; then true; fi", "{ true; }", "(true)",
    "! false", '"true"', "$SHELL -c true", ": nosuchcmd",
])  # fmt: skip
def test_every_line_that_a_shell_runs_is_a_command(command):
    with Scripted(mail(job(1)), DONE) as server:
        ended(worker(server.url, command, "--once", SHELL="/bin/sh"))
        assert orders(server, "/ack")


def test_exit_codes_of_a_worker():
    with Scripted(mail()) as server:
        assert worker(server.url, "true", "--once", "--timeout", "0").wait(PATIENCE) == 3
    with Scripted(answer({"error": "no such path"}, status=404)) as server:
        assert ended(worker(server.url, "true"), 1) == "bus_work: no such path\n"
    assert worker(refusing(), "true", "--timeout", "0").wait(PATIENCE) == 75
    for wrong in (["dell"], ["--exec", "true"], ["a", "b", "--exec", "true"], ["a b", "--exec", "true"]):
        assert run("tools/bus_work.py", *wrong)[0] == 2
        assert run("bus_recv.py", "--claim", *wrong)[0] == 2
    assert run("bus_recv.py", "--log", "--claim")[0] == 2


# ── Stopping ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_worker_that_waits_is_stopped_at_once():
    with Scripted(lambda sock: sock.recv(1)) as server:
        process = worker(server.url, "true")
        wait_until(lambda: orders(server, "/claim"))
        process.send_signal(signal.SIGTERM)
        assert ended(process) == ""


def test_a_worker_that_is_stopped_ends_its_job_first(tmp_path):
    with Scripted(mail(job(1)), DONE, mail(job(2))) as server:
        process = worker(server.url, f"touch {tmp_path}/begun; while [ ! -e {tmp_path}/enough ]; do sleep 0.02; done")
        wait_until((tmp_path / "begun").exists)
        process.send_signal(signal.SIGTERM)
        (tmp_path / "enough").touch()
        assert ended(process) == "" and len(orders(server, "/ack")) == len(orders(server, "/claim")) == 1


@pytest.mark.parametrize("signals, code", [
    ([signal.SIGTERM, signal.SIGTERM], 0), ([signal.SIGINT], 130), ([signal.SIGHUP], 0),
])  # fmt: skip
def test_a_worker_that_must_end_now_gives_its_job_back(signals, code, tmp_path, interruptible):
    with Scripted(mail(job(1)), DONE) as server:
        process = worker(server.url, f"echo $$ > {tmp_path}/pid; sleep 60")
        wait_until(lambda: lines(tmp_path / "pid"))
        for number in signals:  # two signals that come together may be one
            wait_until(lambda: has_taken_its_signals(process.pid))
            process.send_signal(number)
        assert "1 goes back to its queue" in ended(process, code)
        [order] = orders(server, "/nack")
        assert (order["reason"], order["counts"]) == ("the worker was stopped", False)
    wait_until(lambda: not runs(int((tmp_path / "pid").read_text())))


def test_a_command_that_is_just_being_started_is_killed_too(monkeypatch, interruptible):
    started = []

    class Interrupted(subprocess.Popen):
        def __init__(self, *arguments, **named):
            super().__init__(*arguments, **named)
            started.append(self)
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(subprocess, "Popen", Interrupted)
    with pytest.raises(KeyboardInterrupt), bus_recv.running("sleep 60", "{}", {}, 1):
        pass
    assert started[0].returncode == -signal.SIGKILL
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_job_whose_worker_is_stopped_again_and_again_is_not_given_up(tmp_path, interruptible):
    """Each stop was an attempt, so two of them made a dead letter of a job that never failed."""
    with Server(tmp_path / "bus.db", "--max-attempts", "2") as bus:
        [ident] = give(bus, "a")
        for stop in range(3):
            process = worker(bus.url, f"echo $AGENT_BUS_ATTEMPT >> {tmp_path}/begun; sleep 60")
            wait_until(lambda stop=stop: len(lines(tmp_path / "begun")) > stop)
            process.send_signal(signal.SIGHUP)
            assert ended(process) == f"bus_work: {ident} goes back to its queue, and this attempt does not count\n"
        assert ended(worker(bus.url, "true", "--once")) == "" and state(bus, ident) == "acknowledged"
        assert lines(tmp_path / "begun") == ["1"] * 3 and mailbox(bus, "builds.dead") == []


@pytest.mark.parametrize("then, words", [
    (DONE, "1 goes back to its queue, attempt 3"), (LOST, "1 goes back when its lease ends: the lease is not held"),
])  # fmt: skip
def test_of_an_older_bus_it_is_not_said_that_the_attempt_does_not_count(then, words, tmp_path, interruptible):
    with Scripted(mail(job(1, attempt=3)), then) as server:
        process = worker(server.url, f"touch {tmp_path}/begun; sleep 60")
        wait_until((tmp_path / "begun").exists)
        process.send_signal(signal.SIGHUP)
        assert ended(process) == f"bus_work: {words}\n"


# ── A real bus ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_each_job_is_done_once_by_one_of_four_workers(bus, tmp_path):
    ids = give(bus, *(f"{n}" for n in range(JOBS)))
    workers = [worker(bus.url, f'echo "$MSG_ID" >> {tmp_path}/done') for _ in range(4)]
    wait_until(lambda: len(lines(tmp_path / "done")) >= JOBS)
    wait_until(lambda: {state(bus, ident) for ident in ids} == {"acknowledged"})
    for process in workers:
        process.send_signal(signal.SIGTERM)
        assert ended(process) == ""
    assert sorted(lines(tmp_path / "done")) == sorted(ids)


@pytest.mark.slow("jobs of killed workers wait for the end of their lease, a second")
def test_with_workers_killed_now_and_then_each_job_is_done_and_none_is_stuck(tmp_path):
    """Attempts are told, and a killed worker's job is taken up when its lease has run out. All 50: a kill a second."""
    over, chance, log, seconds = threading.Event(), random.Random(7), tmp_path / "log", JOBS / 50
    tell = f'$MSG_ID $AGENT_BUS_ATTEMPT $(date +%s.%N)" >> {log}'
    command = f'echo "begin {tell}; sleep {seconds}; echo "end {tell}'
    with Server(tmp_path / "bus.db", "--max-attempts", "1000") as bus:
        ids, workers = give(bus, *map(str, range(JOBS))), []

        def kill_now_and_then():
            while not over.wait(seconds):
                begun = len(lines(log))
                comes_true(lambda: over.is_set() or len(lines(log)) > begun, PATIENCE)  # noqa: B023
                victim = workers.pop(chance.randrange(4))
                victim.kill()
                victim.communicate()
                workers.append(worker(bus.url, command, "--lease", "1"))

        workers += [worker(bus.url, command, "--lease", "1") for _ in range(4)]
        killing = threading.Thread(target=kill_now_and_then)
        killing.start()
        try:
            wait_until(lambda: {state(bus, ident) for ident in ids} == {"acknowledged"}, 4 * PATIENCE)
        finally:
            over.set()
            killing.join()
            for process in workers:
                process.kill()
                process.communicate()
    begun, finished = collections.defaultdict(list), set()
    for what, ident, attempt, when in map(str.split, lines(log)):
        if what == "begin":
            begun[ident].append((int(attempt), float(when)))
        else:
            finished.add(ident)
    assert finished == set(ids) and sum(map(len, begun.values())) > JOBS
    for tries in begun.values():
        for (attempt, then), (following, now) in zip(tries, tries[1:]):
            assert attempt < following
            assert now - then < (following - attempt) * (seconds + 1 + 1) + BUSY, "its lease and a second"


def test_a_worker_says_which_attempt_it_was_and_how_a_job_that_is_given_up_comes_back(tmp_path):
    with Server(tmp_path / "bus.db", "--max-attempts", "2") as bus:
        first, second = give(bus, "a", "b")
        assert f"for {first}, attempt 1 of 2; the next one in 1 s\n" in ended(worker(bus.url, "exit 3", "--once"), 1)
        process = worker(bus.url, "exit 3")
        wait_until(lambda: [state(bus, each) for each in (first, second)] == ["dead", "dead"])
        process.send_signal(signal.SIGTERM)
        back = f"To put it back: python3 {ROOT}/tools/bus_work.py builds --again {first}"
        assert f"for {first}, attempt 2 of 2; it is given up and lies in builds.dead now. {back}\n" in ended(process)
        bus.get("/recv?to=all")
        bus_send.send("all", "no job", url=bus.url, sender="spark")
        shows = f"python3 {ROOT}/tools/agent_bus.py inbox builds.dead shows what it has"
        assert again(bus, "nosuch", 3) == f"nothing is put back: builds.dead has no job nosuch; {shows}"
        assert again(bus, first) == "put back into builds: 1 job"
        assert again(bus, first, 3).startswith("nothing is put back: builds.dead has no job")
        [letter] = [message["id"] for message in mailbox(bus, "builds.dead") if message.get("dead_of") == second]
        assert again(bus, letter) == "put back into builds: 1 job"
        process = worker(bus.url, f"echo $MSG_SUBJECT >> {tmp_path}/done")
        wait_until(lambda: sorted(lines(tmp_path / "done")) == ["a", "b"])
        process.send_signal(signal.SIGTERM)
        assert ended(process) == ""
        assert again(bus, "all", 3).startswith("nothing is put back: builds.dead has no job; ")
        assert again(bus, "", 3).startswith("nothing is put back: ")


def test_all_that_were_given_up_come_back_page_after_page_but_for_what_a_worker_has():
    ours, its = (message(n, to="builds.dead", dead_of=f"{n}") for n in (1, 2))
    with Scripted(mail(ours, more=True), DONE, mail(its, message(3)), LOST) as server:
        code, out, err = run("tools/bus_work.py", "builds", "--again", "all", env={"AGENT_BUS_URL": server.url})
        assert (code, out, err) == (0, "", "bus_work: put back into builds: 1 job\n")
        assert [order["id"] for order in orders(server, "/again")] == ["1", "2"]


def test_what_is_no_dead_letter_is_not_put_back():
    strange, its = (message(n, to="builds.dead", dead_of="1", **more) for n, more in [(2, {"id": 1.5}), (3, {})])
    with Scripted(mail(strange, its), DONE) as server:
        code, _, err = run("tools/bus_work.py", "builds", "--again", "all", env={"AGENT_BUS_URL": server.url})
    assert code == 0 and "put back into builds: 1 job" in err
    assert [order["id"] for order in orders(server, "/again")] == ["3"]


def test_what_is_gone_when_it_is_put_back_and_a_page_that_leads_nowhere_stop_nothing():
    both = mail(*(message(n, to="builds.dead", dead_of=f"{n}") for n in (1, 2)), more=True)
    with Scripted(both, answer({"error": "no such message"}, status=404), DONE, both, LOST) as server:
        code, out, err = run("tools/bus_work.py", "builds", "--again", "all", env={"AGENT_BUS_URL": server.url})
        assert (code, out, err) == (0, "", "bus_work: put back into builds: 1 job\n")
        assert [order["id"] for order in orders(server, "/again")] == ["1", "2", "1", "2"]


def again(bus, ident, code=0):
    """What was said of it."""
    done = run("tools/bus_work.py", "builds", "--again", ident, env={"AGENT_BUS_URL": bus.url})
    assert done[:2] == (code, ""), done
    return done[2].partition("bus_work: ")[2].rstrip("\n")


def test_dead_letters_are_exactly_those_that_failed_each_time(tmp_path):
    """Jobs a, b, c fail always, d the first time, e never."""
    with Server(tmp_path / "bus.db", "--max-attempts", "2") as bus:
        ids = dict(zip("abcde", give(bus, *"abcde")))
        command = "case $MSG_SUBJECT in e) exit 0;; d) [ $AGENT_BUS_ATTEMPT = 2 ];; *) exit 3;; esac"
        workers = [worker(bus.url, command) for _ in range(2)]
        dead = wait_until(lambda: len(found := mailbox(bus, "builds.dead")) == 3 and found)
        wait_until(lambda: {state(bus, ids[msg]) for msg in "de"} == {"acknowledged"})
        for process in workers:
            process.send_signal(signal.SIGTERM)
            ended(process)
    assert sorted(message["msg"] for message in dead) == ["a", "b", "c"]
    assert {(message["attempts"], message["reason"]) for message in dead} == {(2, "the command ended with 3")}


def mailbox(bus, name):
    return json.loads(bus.get(f"/recv?to={name}"))["messages"]
