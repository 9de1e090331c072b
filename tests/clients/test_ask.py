"""bus_send.py --ask waits for what answers it, and --reply-to answers: whichever is faster, and whatever is cut."""
import json
import os
import random
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

import bus_recv
import bus_send
from tests.clients.test_clients import Clock, program, refusing, run
from tests.kit.bad_servers import FAULTS, NOON, Scripted, answer, page, silence, stored
from tests.kit.processes import PATIENCE, wait_until

pytestmark = pytest.mark.usefixtures("home")

QUESTIONS = int(os.environ.get("QUESTIONS", 90))  # 1000 for the full figure
REPLY = {"ts": NOON + 1, "id": "652a7c1b2f3e2", "from": "dell", "to": "spark", "channel": "default", "msg": "yes\n"}
NOT_YET = {"online": False, "last_seen": None, "unread": 1}


def ask(server, *arguments, stdin=b"well?", **env):
    return run("bus_send.py", "dell", "--ask", *arguments, stdin=stdin,
               env={"AGENT_BUS_URL": server.url, "AGENT_NAME": "spark", **env})  # fmt: skip


def held(server):
    return [float(asked.query["wait"]) for asked in server.asked]


def test_the_answer_is_printed_and_who_gave_it_is_told():
    with Scripted(stored(reply=REPLY)) as server:
        assert ask(server, "--subject", "T1") == (0, "yes\n", "bus_send: 652a7c1b2f3e2 from dell\n")
        (asked,) = server.asked
    assert (asked.method, asked.target) == ("POST", "/ask?wait=25.000")
    assert {**asked.json, "key": ""} == {
        "from": "spark", "to": "dell", "channel": "default", "msg": "well?", "subject": "T1", "key": "",
    }  # fmt: skip


def test_what_cannot_be_seen_in_an_answer_is_written_out():
    with Scripted(stored(reply={**REPLY, "msg": "a\x1b[2J\r\nb\u202e ü 😀\U000e0041"})) as server:
        assert ask(server, LC_ALL="C")[1] == "a\\x1b[2J\nb\\u202e ü 😀\\U000e0041\n"


def test_the_same_question_is_asked_until_it_is_answered(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(bus_send, "time", clock)

    def hold(sock):
        clock.offset += 25
        sock.sendall(stored(reply=None))

    with Scripted(hold, hold, hold, stored(reply=REPLY)) as server:
        found = bus_send.ask("dell", "well?", url=server.url, sender="spark", timeout=90)
    assert found["reply"]["msg"] == "yes\n" and [round(wait) for wait in held(server)] == [25, 25, 25, 15]
    assert len({asked.body for asked in server.asked}) == 1


def test_without_an_answer_it_ends_with_3_and_says_what_will_be():
    with Scripted(stored(reply=None, receiver=NOT_YET)) as server:
        code, out, err = ask(server, "--timeout", "0.05")
    assert (code, out) == (3, "") and len(server.asked) < 4
    assert err == ("queued: nobody has ever listened as dell, 1 unread\n"
                   "bus_send: no answer to 652a7c1b2f3e1 yet: it will arrive as mail\n")  # fmt: skip


@pytest.mark.parametrize("channel, named", [("ops", " on the channel ops"), ("default", "")])
def test_the_channel_of_a_question_is_named_and_not_that_of_the_environment(channel, named):
    with Scripted(stored(channel=channel, reply=None, receiver=NOT_YET)) as server:
        err = ask(server, "--timeout", "0", "--channel", channel, AGENT_BUS_CHANNEL="builds")[2]
    assert err.startswith(f"queued: nobody has ever listened as dell{named}, 1 unread\n")


def test_a_person_is_told_once_what_became_of_the_question(monkeypatch, capsys):
    with Scripted(stored(reply=None, receiver=NOT_YET)) as server:
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
        monkeypatch.setenv("AGENT_BUS_URL", server.url)
        assert bus_send.main(["dell", "well?", "--ask", "--timeout", "0.05", "--from", "spark"]) == 3
    err = capsys.readouterr().err
    assert err.count("queued: ") == 1 and err.count("waiting up to") == err.count("no answer to") == 1


def test_a_bus_that_does_not_hold_is_not_run_down(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(bus_send, "time", clock)
    with Scripted(*[stored(reply=None)] * 5, stored(reply=REPLY)) as server:
        bus_send.ask("dell", "well?", url=server.url, sender="spark")
    assert len(clock.slept) == 5 and min(clock.slept) > 0.5


@pytest.mark.parametrize("fault", ["204", "400 as HTML", "503 from the bus", "504 from a proxy", "ok that is not true",
                                   "a body that drips", "JSON of something else", "silence"])  # fmt: skip
def test_a_question_through_a_fault_is_asked_again_with_the_same_key(fault, monkeypatch):
    monkeypatch.setattr(bus_send, "GRACE_SECONDS", 0.1)
    monkeypatch.setattr(bus_send, "SLOWEST_RATE", 1 << 20)
    monkeypatch.setattr(bus_send, "HOLD_SECONDS", 0.1)
    monkeypatch.setattr(bus_send, "FIRST_PAUSE", 0.001)
    with Scripted(FAULTS[fault], FAULTS[fault], stored(reply=REPLY)) as server:
        assert bus_send.ask("dell", "well?", url=server.url, sender="spark")["reply"] == REPLY
    assert len({asked.body for asked in server.asked}) == 1 and len(server.asked) >= 3


def test_a_hold_that_is_cut_is_halved_and_restored_slowly(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(bus_send, "time", clock)

    def cut(sock):
        clock.offset += 3  # what the proxy took until it gave up
        sock.sendall(page(504, "<html>"))

    with Scripted(cut, cut, b"", stored(reply=None), stored(reply=None), stored(reply=REPLY)) as server:
        bus_send.ask("dell", "well?", url=server.url, sender="spark")
    assert [round(wait, 1) for wait in held(server)] == [25, 12.5, 6.2, 6.2, 6.9, 7.6]


def test_a_question_that_is_stored_and_then_cut_off_is_unanswered_and_one_that_is_not_is_unknown(monkeypatch):
    monkeypatch.setattr(bus_send, "time", Clock())
    with Scripted(stored(reply=None), b"") as server:
        assert bus_send.ask("dell", "well?", url=server.url, sender="spark", timeout=60)["reply"] is None
    with Scripted(b"") as server, pytest.raises(bus_send.Unreachable, match="--key "):
        bus_send.ask("dell", "well?", url=server.url, sender="spark", timeout=60)
    code, out, err = run("bus_send.py", "dell", "--ask", "--timeout", "0", "--from", "spark", stdin=b"?",
                         env={"AGENT_BUS_URL": refusing()})  # fmt: skip
    assert (code, out) == (75, "") and err.count("\n") == 1


def test_a_question_that_the_bus_refuses_ends_with_1():
    with Scripted(answer({"error": "a question has one receiver"}, status=400)) as server:
        assert ask(server) == (1, "", "bus_send: a question has one receiver\n")


def test_a_question_is_copied_once(monkeypatch, tmp_path):
    monkeypatch.setenv("AGENT_BUS_OUTBOX", str(tmp_path / "sent"))
    monkeypatch.setattr(bus_send, "time", Clock())
    with Scripted(stored(reply=None), stored(reply=None), stored(reply=REPLY)) as server:
        bus_send.ask("dell", "well?", url=server.url, sender="spark")
    assert [json.loads(line)["msg"] for line in (tmp_path / "sent").read_text().splitlines()] == ["well?"]


def test_ctrl_c_ends_a_question_quietly(interruptible):
    with Scripted(silence) as server:
        process = program("bus_send.py", "dell", "--ask", "--from", "spark", stdin=b"?",
                          env={"AGENT_BUS_URL": server.url})  # fmt: skip
        wait_until(lambda: server.asked)
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=PATIENCE) == (b"", b"") and process.returncode == 130


# ── Answering ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_answer_finds_who_asked_and_where(bus):
    """Question and answer from two shells; the question is on a channel that the one who answers does not name."""
    process = program("bus_send.py", "dell", "--ask", "--channel", "ops", stdin=b"Is T1 done?",
                      env={"AGENT_BUS_URL": bus.url, "AGENT_NAME": "spark"})  # fmt: skip
    question = next(bus_recv.receive("dell", url=bus.url, channel="ops", timeout=PATIENCE))
    env = {"AGENT_BUS_URL": bus.url, "AGENT_NAME": "dell", "AGENT_BUS_CHANNEL": "elsewhere"}
    code, out, _ = run("bus_send.py", "--reply-to", question["id"], stdin="It is. ü".encode(), env=env)
    assert code == 0 and json.loads(out)["channel"] == "ops"
    assert process.communicate(timeout=PATIENCE)[0].decode() == "It is. ü\n" and process.returncode == 0
    mail = next(bus_recv.receive("spark", url=bus.url, channel="ops", timeout=PATIENCE))
    assert (mail["msg"], mail["reply_to"], mail["from"]) == ("It is. ü", question["id"], "dell")


@pytest.mark.parametrize("text", [["ok"], ["yes", "I", "am"], ["yes I am"]])
def test_words_behind_reply_to_are_the_text_and_a_name_before_it_is_the_receiver(text, bus):
    """Also where stdin is not the text, as in a command of `recv --exec`."""
    env = {"AGENT_BUS_URL": bus.url, "AGENT_NAME": "dell"}
    number = bus_send.send("dell", "are you there?", url=bus.url, sender="spark")["id"]
    assert run("bus_send.py", "--subject", "re", "--reply-to", number, *text, stdin=b"{}", env=env)[0] == 0
    assert run("bus_send.py", "nano", *text, f"--reply-to={number}", env=env)[0] == 0
    for name in ("spark", "nano"):
        assert next(bus_recv.receive(name, url=bus.url, timeout=PATIENCE))["msg"] == " ".join(text)


def test_a_text_that_begins_with_the_value_of_an_option_before_is_not_taken_for_a_receiver(bus):
    env = {"AGENT_BUS_URL": bus.url}
    number = bus_send.send("alice", "who is it?", url=bus.url, sender="spark")["id"]
    for option in ("--reply-to", "--rep"):
        assert run("bus_send.py", "--from", "alice", option, number, "alice", option, env=env, stdin=b"")[0] == 2
        words = ["bus_send.py", "--from", "alice", option, number, "alice", "agrees"]
        assert run(*words, env=env)[0] == 0
        assert next(bus_recv.receive("spark", url=bus.url, timeout=PATIENCE))["msg"] == "alice agrees"


def test_an_answer_to_nothing_is_refused_and_one_to_nobody_is_wrong_usage(bus):
    env = {"AGENT_BUS_URL": bus.url, "AGENT_NAME": "dell"}
    assert run("bus_send.py", "--reply-to", "652a7c1b2f3e1", stdin=b"hi", env=env)[0] == 1
    assert run("bus_send.py", "--reply-to", "../healthz", stdin=b"hi", env=env)[0] == 2
    assert run("bus_send.py", stdin=b"hi", env=env)[0] == 2
    with Scripted(answer({"message": "no"})) as server:
        code, out, err = run("bus_send.py", "--reply-to", "652a7c1b2f3e1", "--timeout", "0", stdin=b"hi",
                             env={**env, "AGENT_BUS_URL": server.url})  # fmt: skip
        assert (code, out) == (75, "") and "who sent" in err and len(server.asked) == 1


def test_an_answer_is_never_missed_whichever_is_faster(bus):
    """Some answers come at once, some later, some while nobody waits for them."""
    chance, over = random.Random(7), threading.Event()
    answered = [threading.Event() for _ in range(QUESTIONS)]
    delays = [chance.choice([0, 0, chance.uniform(0, 0.05)]) for _ in range(QUESTIONS)]

    def reply(question):
        over.wait(delays[int(question["msg"])])
        bus_send.send(question["from"], question["msg"], url=bus.url, sender="dell", reply_to=question["id"])
        answered[int(question["msg"])].set()

    def answer_all(pool):
        for question in bus_recv.receive("dell", url=bus.url, wait=1):
            if over.is_set():
                return
            pool.submit(reply, question)

    def ask_one(n):
        said = {"url": bus.url, "sender": f"asker-{n}", "key": f"{n}"}
        if n % 3 == 2:  # the answer comes between two questions
            bus_send.ask("dell", f"{n}", timeout=0, **said)
            assert answered[n].wait(PATIENCE)
        return bus_send.ask("dell", f"{n}", timeout=PATIENCE, **said)["reply"]["msg"]

    with ThreadPoolExecutor(8) as askers, ThreadPoolExecutor(8) as pool:
        answering = pool.submit(answer_all, pool)
        try:
            assert list(askers.map(ask_one, range(QUESTIONS))) == [f"{n}" for n in range(QUESTIONS)]
        finally:
            over.set()
            bus_send.send("dell", "0", url=bus.url, sender="herald")
            answering.result(PATIENCE)
