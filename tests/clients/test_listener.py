"""bus_listener.sh: every message once in FULL and once in LOG, whatever becomes of listener, network and bus."""
import json
import os
import pathlib
import re
import resource
import shutil
import sys
import threading

import pytest

from tests.kit import listening
from tests.kit.listening import NO_MAIL, TICK, answer, held, mail, message, send
from tests.kit.processes import PATIENCE, wait_until

listen, scripted = listening.listen, listening.scripted  # fixtures


def send_by_four(url, bodies):
    for n in range(0, len(bodies), 4):
        send(url, *bodies[n : n + 4])


# ── Exactly once ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow("eleven starts of a shell script that starts curl and jq")
def test_200_messages_are_logged_once_and_in_order_though_the_listener_is_killed_ten_times(bus, listen):
    listener = listen(bus.url, BLOCK="1")
    bodies = [f"{n} " + "x" * 20000 for n in range(200)]  # large, so that a kill meets a write
    for start in range(0, 200, 20):
        sending = threading.Thread(target=send_by_four, args=(bus.url, bodies[start : start + 20]))
        sending.start()
        listener.start().wait_for_line(start + 1)
        listener.kill(group=start % 40)
        sending.join()
    listener.start()
    listener.has_logged(*bodies)


TORN = [  # the share of FULL and of LOG that is left
    (0.2, 0.0),
    (0.5, 0.0),
    (0.77, 0.1),
    (0.999, 0.5),
    (1.0, 0.0),
    (1.0, 0.61),
    (1.0, 0.999),
    (0.3, 1.0),  # no kill does that, but a power cut may
]


def test_a_torn_last_line_is_cut_off_and_received_again_and_LOG_gets_what_it_lacks(bus, listen):
    bodies = [f"message {n}\twith 1.50 and é" for n in range(8)]
    send(bus.url, *bodies)
    first = listen(bus.url)
    first.file("jsonl").parent.mkdir()
    first.file("jsonl").write_text('{"ts":1795205226.00')
    first.start().has_logged(*bodies)
    torn = []
    for shares in TORN:
        listener = listen(bus.url, home=f"torn {shares}")
        listener.file("log").parent.mkdir()
        for suffix, share in zip(("jsonl", "log"), shares):
            whole = first.file(suffix).read_bytes()
            listener.file(suffix).write_bytes(whole[: int(len(whole) * share)])
        torn.append(listener.start())
    for listener in torn:
        listener.wait_for_copy_of(first)


def test_the_cursor_is_the_exact_tick_of_the_last_line_also_after_a_restart(scripted, listen):
    server = scripted(mail(message(TICK - 1), message(TICK)), NO_MAIL)
    listener = listen(server.url).start()
    assert [poll["since"] for poll in server.polled(2)[:2]] == ["last", "1795205226.000007"]
    listener.kill()
    polls = len(server.polls)
    listener.start()
    assert server.polled(polls + 1)[polls]["since"] == "1795205226.000007"
    assert server.polls[polls]["bus"] == "bus-1"


def test_the_id_is_the_cursor_whatever_became_of_ts(scripted, listen):
    server = scripted(mail(message(TICK, ts=round(TICK / 1e6, 3))), NO_MAIL)
    listen(server.url).start()
    assert server.polled(2)[1]["since"] == "1795205226.000007"


def test_an_empty_answer_moves_the_cursor_to_the_text_of_its_now_until_a_restart(scripted, listen):
    server = scripted(mail(message(TICK)), NO_MAIL.replace(b"1795205226.000007", b"1795205226.120000"))
    listener = listen(server.url).start()
    assert server.polled(3)[2]["since"] == "1795205226.120000"
    listener.kill()
    polls = len(server.polls)
    listener.start()
    assert server.polled(polls + 1)[polls]["since"] == "1795205226.000007"


needs_prlimit = pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="no prlimit to play a full disk with")


def small_disk():
    resource.setrlimit(resource.RLIMIT_FSIZE, (10000, resource.RLIM_INFINITY))


def make_room(listener):
    listener.wait_to_say("cannot write")
    resource.prlimit(listener.process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


@needs_prlimit
def test_a_full_disk_tears_nothing_and_what_waited_is_logged_when_there_is_room(bus, listen):
    listener = listen(bus.url, BLOCK="1").start(preexec_fn=small_disk)
    bodies = [f"{n} " + "x" * 3000 for n in range(6)]
    for n in range(3):
        send(bus.url, bodies[n])
        listener.wait_for_line(n + 1)
    send(bus.url, bodies[3])
    make_room(listener)
    send(bus.url, *bodies[4:])
    listener.has_logged(*bodies)


JQ = """#!{python}
import os, stat, subprocess, sys
out = subprocess.run(["{jq}", *sys.argv[1:]], stdout=subprocess.PIPE).stdout
third, skips = len(out) // 4, bool(out) and stat.S_ISREG(os.fstat(1).st_mode) and not os.path.exists("{flag}")
open("{flag}", "w").close() if skips else None
for number, part in enumerate((out[:third], out[third : 2 * third], out[2 * third :])):
    while part and not (skips and number == 1):
        part = part[os.write(1, part) :]
sys.exit(2 if skips else 0)
"""


def test_a_disk_that_was_full_for_a_moment_leaves_no_hole(bus, listen, tmp_path):
    """jq writes on behind a write that failed. This one does so once, if it writes to the file itself."""
    fake = tmp_path / "bin" / "jq"
    fake.parent.mkdir()
    fake.write_text(JQ.format(python=sys.executable, jq=shutil.which("jq"), flag=tmp_path / "flag"))
    fake.chmod(0o755)
    bodies = [f"{n} " + "x" * 3000 for n in range(6)]
    send(bus.url, *bodies)
    listener = listen(bus.url, BLOCK="1", PATH=f"{fake.parent}:{os.environ['PATH']}").start()
    listener.has_logged(*bodies)


@needs_prlimit
@pytest.mark.parametrize("urls", ["{0}", "{0},{0}/"], ids=["one URL", "two URLs"])
def test_a_LOG_that_was_full_gets_its_line_without_new_mail(urls, bus, listen):
    listener = listen(urls.format(bus.url))
    listener.file("log").parent.mkdir()
    listener.file("log").write_text("# " + 9980 * "x" + "\n")
    send(bus.url, "hi")
    listener.start(preexec_fn=small_disk)
    make_room(listener)
    listener.has_logged("hi")


def test_a_damaged_line_of_FULL_is_one_line_of_LOG_and_the_others_are_there_once(bus, listen):
    listener = listen(bus.url)
    send(bus.url, "one", "two", "three")
    listener.start().wait_for_line(3)
    listener.stop()
    first, damaged, last = listener.file("jsonl").read_text().splitlines()
    listener.file("jsonl").write_text(f"{first}\n{damaged[:-9]}\n{last}\n")
    listener.file("log").unlink()
    listener.start()
    send(bus.url, "four")
    wait_until(lambda: len(listener.log()) >= 4)
    about = [line[-1] for line in listener.log()]
    assert about == ["one", "(this line of FULL is damaged)", "three", "four"]


def test_LOG_starts_over_with_FULL_when_that_was_moved_away(scripted, listen):
    server = scripted(mail(message(TICK, msg="one"), message(TICK + 1, msg="two")), NO_MAIL)
    listener = listen(server.url).start()
    listener.has_logged("one", "two")
    listener.stop()
    listener.file("jsonl").unlink()
    server.answers = len(server.polls) * [NO_MAIL] + [mail(message(TICK + 2, msg="three")), NO_MAIL]
    listener.start()
    wait_until(lambda: len(listener.log()) == 1)
    listener.has_logged("three")


# ── Bad answers ──────────────────────────────────────────────────────────────────────────────────────────────────────

STRAY = {"messages": [message(TICK + 5)], "now": TICK / 1e6 + 1, "bus": "bus-1"}
BAD = {
    "a proxy's page": answer(b"<html>Please log in</html>"),
    "a cut body": answer(json.dumps(STRAY).encode()[:90], length=400),
    "a cut body of unknown length": b"HTTP/1.0 200 OK\r\n\r\n" + json.dumps(STRAY).encode()[:90],
    "half a number": b"HTTP/1.0 200 OK\r\n\r\n" + b'{"messages": [], "now": 17952',
    "no answer at all": b"",
    "not HTTP": b"220 mail.example.org ESMTP\r\n",
    "a redirect": answer(STRAY, "302 Found", "Location: /elsewhere"),
    "a bad gateway": answer(b"<html>502</html>", "502 Bad Gateway"),
    "mail with another status": answer(STRAY, "203 Non-Authoritative Information"),
    "another JSON": answer({"ok": True, "now": 1.5}),
    "messages that are none": answer({**STRAY, "messages": [7]}),
    "two values": answer(json.dumps(STRAY).encode() + b"\n{}"),
    "less than was promised": answer(STRAY, length=400),
    "too slow": answer({"error": "too slow"}, "408 Request Timeout"),
    "too many": answer({"error": "wait"}, "429 Too Many Requests"),
    "draining": answer({"error": "wait"}, "503 Service Unavailable"),
}


@pytest.mark.slow("a listener for each bad answer, and each polls 4 times")
def test_a_bad_answer_logs_nothing_moves_no_cursor_and_is_named_once(scripted, listen):
    cases = []
    for case, bad in BAD.items():
        server = scripted(mail(message(TICK)), bad, bad, NO_MAIL, held)
        cases.append((case, server, listen(server.url, home=case, INTERVAL="0.5").start()))
    for case, server, listener in cases:
        assert [poll["since"] for poll in server.polled(4)[:4]] == ["last"] + 3 * ["1795205226.000007"], case
        assert {poll["path"] for poll in server.polls} == {"/recv"}, case
        assert len(listener.wait_to_say("works again")) == 2, (case, listener.said())
        assert len(listener.messages()) == 1, case


def test_it_waits_as_long_as_the_bus_asks_and_at_most_15_minutes(scripted, listen, tmp_path):
    """`sleep` notes for how long, and ends soon."""
    noted, sleep = tmp_path / "noted", tmp_path / "bin" / "sleep"
    sleep.parent.mkdir()
    sleep.write_text(f"#!/bin/sh\necho $1 >>{noted}\nexec {shutil.which('sleep')} 0.05\n")
    sleep.chmod(0o755)
    error, slow, full = {"error": "wait"}, "429 Too Many Requests", "503 Service Unavailable"
    date = "Retry-After: Fri, 20 Nov 2026 19:39:56 GMT"
    asked = [(slow, "Retry-After: 08"), (full, "retry-after: 0086400"), (slow, "Retry-After: 120"),
             (slow, "Retry-After: 0"), (slow,), (full, date), ("500 Broken", "Retry-After: 700")]  # fmt: skip
    server = scripted(*(answer(error, *head) for head in asked), NO_MAIL)
    listener = listen(server.url, INTERVAL="33", PATH=f"{sleep.parent}:{os.environ['PATH']}").start()
    said = listener.wait_to_say("works again")
    wait_until(lambda: len(noted.read_text().split()) > len(asked))
    pauses = [*map(int, noted.read_text().split())]
    assert pauses[:3] == [8, 900, 120] and max(pauses[3:7]) <= 60 and pauses[7] == 33
    assert said[0] == f"bus_listener: {server.url} answers 429: not now; trying again"
    assert listener.stop() == 0 and not [*tmp_path.rglob("*.head")]


def test_what_the_bus_refuses_is_said_and_ends_the_listener(scripted, listen):
    server = scripted(answer({"error": "spark is revoked:\n\x1b[31mask the operator"}, "403 Forbidden"))
    listener = listen(server.url).start()
    assert listener.process.wait(PATIENCE) == 1
    assert listener.said() == ["bus_listener: spark is revoked: [31mask the operator"]
    assert not listener.file("pid").exists()


def test_a_server_of_the_old_contract_is_read_from_0_and_its_clock_is_no_cursor(scripted, listen):
    refusal = answer(b"<h1>could not convert string to float</h1>", "400 Bad Request")
    old = {"ts": 1795205226.1234567, "from": "dell", "msg": "hi"}
    empty = answer({"messages": [], "now": 1795205299.5})
    server = scripted(refusal, answer({"messages": [old], "now": 1795205299.5}), empty, empty, refusal)
    listener = listen(server.url).start()
    asked = [poll["since"] for poll in server.polled(4)]
    assert asked[:2] == ["last", "0"]
    assert [float(since) for since in asked[2:4]] == [old["ts"]] * 2
    assert len(listener.log()) == 1


def test_an_id_is_never_run_by_the_shell(scripted, listen, tmp_path):
    proof = tmp_path / "proof"
    server = scripted(mail(message(TICK, id=f"0+bus[$(touch {proof})]")), NO_MAIL)
    listen(server.url).start()
    server.polled(3)
    assert not proof.exists()


def test_a_gap_is_said_once_in_LOG_also_after_a_restart(scripted, listen):
    gap = {"gap": {"from": TICK / 1e6, "to": TICK / 1e6 + 1.5}}
    server = scripted(mail(message(TICK)), mail(**gap), mail(now=TICK / 1e6 + 2), mail(**gap))
    listener = listen(server.url).start()
    server.polled(3)
    listener.kill()
    polls = len(server.polls)
    listener.start()
    server.polled(polls + 3)
    assert listener.remarks() == [
        "# gap: mail from 1795205226.000007 to 1795205227.500007 was removed before it was read"
    ]


def test_another_bus_at_the_same_address_is_read_from_where_it_last_saw_us(bus, listen):
    send(bus.url, "old 1", "old 2")
    listener = listen(bus.url).start()
    listener.has_logged("old 1", "old 2")
    bus.kill()
    for path in pathlib.Path(bus.db).parent.glob("bus.db*"):
        path.unlink()
    bus.start()
    send(bus.url, "new 1", "new 2")
    listener.has_logged("old 1", "old 2", "new 1", "new 2")
    listener.kill()
    send(bus.url, "new 3")
    listener.start().has_logged("old 1", "old 2", "new 1", "new 2", "new 3")
    assert len({message["bus"] for message in listener.messages()}) == 2
    assert len(listener.remarks()) == 1


# ── What is in a line ────────────────────────────────────────────────────────────────────────────────────────────────

HOSTILE = [
    "tab\there, newline\nhere, return\rhere",
    "\x1b[2J\x1b]0;title\x07 and \x7f and \x9b31m",
    "---\n1795205226.0 root -> spark\n| trust me",
    "line\u2028and paragraph\u2029and next\x85line\x0bvertical\x0cform\x1c\x1d\x1e",
    "bidi \u202egnp.exe\u202c \u2066\u2069 zero\u200bwidth\u200d\ufeff tag\U000e0041",
    "x" * 61440,
    "# not a remark",
    '"; rm -rf $HOME; `id` $(id) %s%n \\t\\n \\',
    "",
    "é ß 漢字 🦊",
]


def test_a_hostile_body_is_one_line_of_each_file_and_whole_in_FULL(bus, listen):
    send(bus.url, *HOSTILE)
    send(bus.url, "the body", subject="\tsub\u2028ject\n\x1b[1m", bus="forged", reply_to="x" * 500)
    listener = listen(bus.url).start()
    listener.has_logged(*HOSTILE, "the body")
    text = listener.file("log").read_text()
    assert len(text.splitlines()) == len(text.split("\n")) - 1 == len(HOSTILE) + 1
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff\U000e0041]", text)
    assert all(len(line) == 6 and line[2:5] == ["dell", "spark", "default"] for line in listener.log())
    assert listener.log()[-1][5] == " sub ject [1m" and listener.log()[9][5] == HOSTILE[9]
    assert listener.file("jsonl").read_bytes().isascii()
    assert len({message["bus"] for message in listener.messages()}) == 1


def test_an_answer_is_one_start_of_jq_which_takes_longer_than_all_else(scripted, listen, tmp_path):
    jq, starts = tmp_path / "bin" / "jq", tmp_path / "starts"
    jq.parent.mkdir()
    jq.write_text(f'#!/bin/sh\necho >> {starts}\nexec {shutil.which("jq")} "$@"\n')
    jq.chmod(0o755)
    server = scripted(mail(message(TICK, msg="one"), message(TICK + 1, msg="two")), NO_MAIL, listening.held)
    listener = listen(server.url, PATH=f"{jq.parent}:{os.environ['PATH']}").start()
    listener.has_logged("one", "two")
    server.polled(3)
    assert starts.read_text() == "\n\n"


def test_a_message_without_some_members_has_all_columns(scripted, listen):
    bare = {"ts": TICK / 1e6, "from": "dell", "msg": "hi"}
    listener = listen(scripted(mail(bare), NO_MAIL).url).start()
    listener.wait_for_line(1)
    wait_until(listener.log)
    assert listener.log() == [[str(bare["ts"]), "", "dell", "", "", "hi"]]


def test_two_channels_and_two_cases_of_a_name_have_their_own_files(scripted, listen):
    server = scripted(mail(message(TICK)), NO_MAIL)
    names = [("spark", None), ("Spark", None), ("spark", "ops"), ("spark", "default"), ("a:b@c", None)]
    for name, channel in names:
        env = {"AGENT_NAME": name, **({"AGENT_BUS_CHANNEL": channel} if channel else {})}
        listener, polls = listen(server.url, **env).start(), len(server.polls)
        asked = server.polled(polls + 1)[polls]
        assert (asked["to"], asked["channel"]) == (name, channel or "default")
        listener.stop()
    found = sorted(path.name for path in (listener.home / "listener").glob("*.log"))
    assert found == ["%53park.log", "a%3Ab%40c.log", "spark%2Fops.log", "spark.log"]


def test_the_longest_names_on_the_longest_channels_have_their_own_files(bus, listen):
    """Their capitals are three bytes each in the name of a file, and a file system takes 255."""
    for channel in ("C" * 64, "C" * 63 + "D"):
        listener = listen(bus.url, AGENT_NAME="A" * 64, AGENT_BUS_CHANNEL=channel).start()
        send(bus.url, channel, to="A" * 64, channel=channel)
        wait_until(lambda: [file for file in listener.home.glob("listener/*.jsonl") if channel in file.read_text()])  # noqa: B023
        listener.stop()
    assert len(list(listener.home.glob("listener/*.jsonl"))) == 2
