"""bus_outbox.py: what the bus cannot take now waits on disk, and arrives once and in order. Copies of bus_send.py."""
import contextlib
import errno
import fcntl
import io
import json
import os
import random
import stat
import subprocess
import sys
import threading
import time
from types import SimpleNamespace
from unittest import mock

import pytest

import bus_send
from tests.faults import patched
from tests.faults.history import get, observed
from tests.kit import forked
from tests.kit.bad_servers import Scripted, answer, page, stored
from tests.kit.processes import PATIENCE, ROOT, Server, free_port, full_disk, no_settings, wait_until
from tools import bus_outbox

SENDS = int(os.environ.get("OUTBOX", 25))  # 1000 for the full figure


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """We are spark, with a state directory of our own and no other setting of whoever runs the tests."""
    no_settings(monkeypatch)
    monkeypatch.setenv("AGENT_BUS_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("AGENT_NAME", "spark")
    return tmp_path / "state"


def start(*arguments, url, **options):
    command = [sys.executable, "-I", "-S", str(ROOT / "tools" / "bus_outbox.py"), *arguments]
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return forked.Popen(command, env={**os.environ, "AGENT_BUS_URL": url}, **streams, text=True, **options)


def run(*arguments, url, msg=""):
    """Exit code, stdout, stderr; in this process, because that is faster. Each message is tried once, with patience."""
    streams = {"stdin": msg, "stdout": "", "stderr": ""}
    for name, text in streams.items():
        streams[name] = io.TextIOWrapper(io.BytesIO(text.encode()), encoding="utf-8")
    once = mock.patch.multiple(bus_send, FIRST_PAUSE=9.0 * PATIENCE, LONGEST_PAUSE=9.0 * PATIENCE)
    with once, mock.patch.multiple(sys, **streams), mock.patch.dict(os.environ, AGENT_BUS_URL=url):
        try:
            code = bus_outbox.main(["--timeout", str(PATIENCE), *arguments])
        except SystemExit as usage:
            code = usage.code
        sys.stdout.flush()
        sys.stderr.flush()
    return (code, *(streams[name].buffer.getvalue().decode() for name in ("stdout", "stderr")))


def nowhere():
    return f"http://127.0.0.1:{free_port()}"


def files(home, *folders):
    return sorted(path for path in home.glob("/".join(["outbox/*/*", *folders, "*.json"])))


def texts(bus):
    return [message.msg for message in observed(bus.url)]


def test_without_a_place_for_the_messages_it_says_what_to_set(home, monkeypatch):
    home.touch()
    monkeypatch.setenv("AGENT_BUS_STATE_DIR", str(home / "state"))
    code, out, err = run("dell", url=nowhere(), msg="hi")
    assert (code, out, err.count("\n")) == (2, "", 1) and f"bus_outbox: cannot write {home}/state/outbox/" in err
    assert err.endswith("/state is a file, not a folder; set AGENT_BUS_STATE_DIR to another place\n")


def test_a_message_is_sent_at_once_when_the_bus_is_there(bus, home):
    code, out, err = run("dell", "--subject", "T1", url=bus.url, msg="hi")
    assert code == 0 and json.loads(out)["ok"] and err == "queued: nobody has ever listened as dell, 1 unread\n"
    assert texts(bus) == ["hi"] and not files(home)


@pytest.mark.parametrize("fault", [
    b"", page(502, "<html>"), page(200, "<html>"), answer({"error": "too fast"}, status=429),
    answer({"error": "draining"}, status=503), answer({"error": "disk full"}, status=507),
])  # fmt: skip
def test_what_the_bus_cannot_take_now_waits_and_is_sent_with_the_same_key(fault, home):
    with Scripted(fault, stored()) as server:
        code, out, err = run("dell", url=server.url, msg="hi")
        assert (code, out) == (0, "") and "not sent yet, but kept on this disk; 1 wait" in err and err.count("\n") == 1
        assert len(files(home)) == 1
        assert run("--flush", url=server.url) == (0, "", "")
        first, second = server.asked
    assert first.body == second.body and first.json["key"] and not files(home)


def test_what_comes_later_goes_behind_what_waits(bus):
    bus.kill()
    for n in range(3):
        assert run("dell", url=bus.url, msg=f"{n}")[0] == 0
    assert run("--flush", url=bus.url)[0] == 75
    bus.start()
    code, out, _ = run("dell", url=bus.url, msg="3")
    assert code == 0 and json.loads(out)["receiver"]["unread"] == 4
    assert texts(bus) == ["0", "1", "2", "3"]


def test_what_is_refused_for_good_is_put_aside_with_the_reason_and_holds_up_nobody(home):
    with Scripted(b"", b"", answer({"error": "to is no name"}, status=400), stored()) as server:
        for msg in ("bad", "good"):
            run("dell", url=server.url, msg=msg)
        code, out, err = run("--flush", url=server.url)
    (dead,) = files(home, "dead")
    assert (code, out) == (1, "") and str(dead) in err and "to is no name" in err and not files(home)
    assert json.loads(dead.read_text())["reason"] == "to is no name" and json.loads(dead.read_text())["msg"] == "bad"
    dead.rename(dead.parent.parent / dead.name)  # mended, somehow
    with Scripted(stored()) as mended:
        dead.parent.parent.rename(outbox_of(home, mended.url))
        assert run("--flush", url=mended.url) == (0, "", "")
    assert mended.asked[0].body == server.asked[0].body


def test_a_full_mailbox_holds_up_no_mail_for_others(tmp_path, home):
    small = patched("bus_server.MAILBOX_MESSAGES, bus_server.MUCH_MESSAGES = 2, 2")
    with Server(tmp_path / "bus.db", **small) as bus:
        for sender in "ab":
            bus_send.send("bob", "x", url=bus.url, sender=sender)
        bus.kill()
        for to, msg in (("bob", "1"), ("bob", "2"), ("carol", "3"), (["dan", "bob"], "4"), ("all", "5")):
            run(*([",".join(to)] if isinstance(to, list) else [to]), url=bus.url, msg=msg)
        bus.start()
        code, _, err = run("carol", url=bus.url, msg="6")
        assert code == 0 and "4 still wait" in err and "the mailbox of bob is full" in err
        assert texts(bus) == ["x", "x", "3", "6"], "for carol in order; the list and the broadcast go to bob too"
        code, _, err = run("--flush", url=bus.url)
        assert code == 75 and "4 still wait" in err and len(files(home)) == 4
        get(bus.url, "/recv?to=bob&since=0")
        assert run("--flush", url=bus.url)[0] == 75, "room for two"
        get(bus.url, "/recv?to=bob&since=0")
        assert run("--flush", url=bus.url)[0] == 0
        assert texts(bus) == ["x", "x", "3", "6", "1", "2", "4", "4", "5"] and not files(home)


def outbox_of(home, url):
    path = home / "outbox" / bus_outbox.bus_recv.file_name(url) / "spark"
    path.parent.mkdir(parents=True)
    return path


def test_ones_own_refused_message_is_told_with_1(home):
    with Scripted(answer({"error": "too large"}, status=413)) as server:
        code, out, err = run("dell", url=server.url, msg="bad")
    assert (code, out) == (1, "") and "too large" in err and len(files(home, "dead")) == 1


@pytest.mark.parametrize("status", sorted(bus_outbox.OURS))
def test_a_refusal_of_us_is_told_and_costs_no_message(status, home):
    with Scripted(answer({"error": "no"}, status=status)) as server:
        code, _, err = run("dell", url=server.url, msg="hi")
        assert code == 1 and "kept on this disk; 1 wait" in err and "(no)" in err
        assert run("--flush", url=server.url)[0] == 1
    assert len(files(home)) == 1 and not files(home, "dead")


@pytest.fixture
def clock(monkeypatch):
    """The clock of bus_outbox.py can be set: `now`, s since 1970."""
    clock = SimpleNamespace(now=time.time(), monotonic=time.monotonic, sleep=time.sleep)
    clock.time, clock.time_ns = lambda: clock.now, lambda: int(clock.now * 1e9)
    monkeypatch.setattr(bus_outbox, "time", clock)
    return clock


def flush_to(server, home):
    """Send what waits for another URL: (exit code, stderr, the texts that were sent)."""
    files(home)[0].parent.rename(outbox_of(home, server.url))
    code, _, err = run("--flush", url=server.url)
    return code, err, [json.loads(asked.body)["msg"] for asked in server.asked]


def test_a_message_that_waited_longer_than_its_ttl_is_not_sent(home, clock):
    run("dell", "--ttl", "3600", url=nowhere(), msg="now or never")
    clock.now += 3600
    with Scripted(stored()) as server:
        code, err, sent = flush_to(server, home)
    assert code == 1 and "longer than its ttl" in err and not sent and len(files(home, "dead")) == 1


def test_a_ttl_counts_from_its_own_message_whatever_the_clock_was_before(home, clock):
    """The number of a file, which follows the last, was taken for the time."""
    url = nowhere()
    clock.now += 86400
    run("dell", url=url, msg="while the clock is a day ahead")
    clock.now -= 86400
    run("dell", "--ttl", "5", url=url, msg="turn the pump off NOW")
    clock.now += 8
    with Scripted(stored(), stored()) as server:
        code, err, sent = flush_to(server, home)
    assert code == 1 and "it waited for 8 s" in err and sent == ["while the clock is a day ahead"]


@pytest.mark.parametrize("ttl, back, is_sent",
                         [("5", 1, True), ("3600", 60, True), ("5", 5, False), ("60", 86400, False)])  # fmt: skip
def test_a_clock_that_was_set_back_by_the_ttl_or_more_ends_a_message(ttl, back, is_sent, home, clock):
    """It may have waited for hours."""
    run("dell", "--ttl", ttl, url=nowhere(), msg="hi")
    clock.now -= back
    with Scripted(stored()) as server:
        code, err, sent = flush_to(server, home)
    assert (sent == ["hi"]) is is_sent and code == (not is_sent)
    assert is_sent or f"the clock was set back by {back} s or more since it was stored" in err


@pytest.mark.parametrize("ttl, age, is_sent",
                         [(None, 86400, True), (None, -86400, True), (60, 1, True), (60, 61, False)])  # fmt: skip
def test_what_an_older_version_stored_has_the_time_of_its_number(ttl, age, is_sent, home, clock):
    run("dell", url=nowhere(), msg="hi")
    (path,) = files(home)
    message = {"to": "dell", "msg": "hi", "sender": "spark", "channel": "default", "key": "k1"}
    path.write_text(json.dumps({**message, "ttl": ttl} if ttl else message))
    path.rename(path.with_name(f"{clock.time_ns() - age * 10**9:020d}.json"))
    with Scripted(stored()) as server:
        code, _, sent = flush_to(server, home)
        assert not server.asked or server.asked[0].json.keys() - {"ttl"} == {"from", "to", "channel", "msg", "key"}
    assert (sent == ["hi"]) is is_sent and code == (not is_sent)


def test_a_damaged_file_is_put_aside_as_it_is(home):
    url = nowhere()
    run("dell", url=url, msg="hi")
    (path,) = files(home)
    path.write_bytes(b"\0\0")
    code, _, err = run("--flush", url=url)
    (dead,) = files(home, "dead")
    assert code == 1 and "holds no message" in err and dead.read_bytes() == b"\0\0"


@pytest.mark.parametrize("edited", ['{"msg": "hi"}', '{"to": "dell", "msg": "hi", "ttl": "soon"}', "[1]", "5"])
def test_a_file_that_somebody_edited_is_put_aside_and_holds_up_nobody(home, edited):
    with Scripted(stored()) as server:
        run("dell", url=nowhere(), msg="hi")
        (path,) = files(home)
        path.parent.rename(outbox_of(home, server.url))
        (path,) = files(home)
        path.write_text(edited)
        path.with_name("9" * 20 + ".json").write_text('{"to": "dell", "msg": "behind it", "sender": "spark"}')
        code, _, err = run("--flush", url=server.url)
    assert code == 1 and "Traceback" not in err and not files(home)
    (dead,) = files(home, "dead")
    assert json.loads(server.asked[-1].body)["msg"] == "behind it"


def test_a_message_is_on_disk_before_it_is_tried(monkeypatch, home):
    """The file, then its name, then the directory, then the network."""
    done = []

    def noting(module, name, note):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, **b: (done.append(note(*a)), real(*a, **b))[1])

    outbox = bus_outbox.Outbox(nowhere(), "spark")
    noting(os, "fsync", lambda file: "directory" if stat.S_ISDIR(os.fstat(file).st_mode) else "file")
    noting(os, "replace", lambda old, new: "name")
    noting(bus_send, "send", lambda *a: "network")
    outbox.put({"to": "dell", "msg": "hi", "sender": "spark"})
    with pytest.raises(bus_send.Unreachable):
        list(outbox.flush(0))
    assert done == ["file", "name", "directory", "network"]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EIO])
def test_a_directory_that_cannot_be_written_out_is_no_failure(monkeypatch, tmp_path, number):
    """As on CIFS: the message was kept, and it said that nothing was. A disk that fails is a failure."""

    def fsync(file):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError) if number == errno.EIO else contextlib.nullcontext():
        bus_outbox.sync(str(tmp_path))


def test_the_outbox_is_private(home):
    run("dell", url=nowhere(), msg="secret")
    assert stat.S_IMODE(home.stat().st_mode) == 0o700
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in home.rglob("*") if path.is_file())


def test_the_list_shows_what_waits_and_what_was_refused(home):
    url = nowhere()
    run("dell", "--subject", "two words", url=url, msg="hi")
    with Scripted(answer({"error": "no room"}, status=413)) as server:
        run("nano", url=server.url, msg="hi")
    code, out, _ = run("--list", url="http://elsewhere")
    assert code == 0 and sorted(line.partition(" ")[0] for line in out.splitlines()) == ["dead", "waiting"]
    assert f'bus={url} sender=spark to=dell channel=default subject="two words"\n' in out
    assert 'to=nano channel=default reason="no room"\n' in out


@pytest.mark.parametrize("arguments, msg", [
    ([], "hi"), (["dell", "--flush"], "hi"), (["dell", "--list"], "hi"), (["a b"], "hi"), ([","], "hi"),
    (["dell"], " "), (["dell", "--from", "a/b"], "hi"), (["dell", "--channel", "ü"], "hi"),
])  # fmt: skip
def test_wrong_usage_is_2_and_stores_nothing(arguments, msg, home):
    code, out, err = run(*arguments, url=nowhere(), msg=msg)
    assert (code, out) == (2, "") and err and not files(home)


def test_several_processes_share_an_outbox(bus, home):
    """Each message arrives once, those of one caller in order, and none is left behind by two that part at the door."""

    def call(caller):
        outbox = bus_outbox.Outbox(bus.url, "spark")
        for n in range(10):
            outbox.put({"to": "dell", "msg": f"{caller} {n}", "key": f"{caller}-{n}", "sender": "spark"})
            list(outbox.flush(0))

    callers = [threading.Thread(target=call, args=[caller]) for caller in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    arrived = texts(bus)
    assert len(arrived) == 40 and not files(home)
    for caller in range(4):
        assert [msg for msg in arrived if msg.startswith(f"{caller} ")] == [f"{caller} {n}" for n in range(10)]


def test_what_is_stored_while_another_process_sends_is_sent_by_that_one(bus):
    sender, other = (bus_outbox.Outbox(bus.url, "spark") for _ in range(2))
    sender.put({"to": "dell", "msg": "first", "sender": "spark"})
    for _, message, _ in sender.flush(0):
        if message["msg"] == "first":
            other.put({"to": "dell", "msg": "second", "sender": "spark"})
            assert list(other.flush(0)) == []
    assert texts(bus) == ["first", "second"]


@pytest.mark.slow("each send is a process, and the bus is away half of the time")
def test_sends_with_the_bus_going_up_and_down_arrive_once_and_in_order(bus):
    """The bus is killed and started; now and then so is the one who sends, and then nobody knows about that message."""
    chance, over, unknown = random.Random(7), threading.Event(), set()

    def up_and_down():
        while not over.wait(chance.uniform(0.1, 0.8)):
            bus.kill()
            over.wait(chance.uniform(0, 0.5))
            bus.start()

    trouble = threading.Thread(target=up_and_down)
    trouble.start()
    try:
        for n in range(SENDS):
            process = start("dell", "--timeout", "0.1", url=bus.url)
            if n % 5 == 4:
                unknown.add(f"{n}")
                process.stdin.write(f"{n}")
                process.stdin.close()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(chance.uniform(0, 0.15))
                process.kill()
                process.stdout.close()
                process.stderr.close()
                process.wait()
            else:
                _, err = process.communicate(f"{n}", timeout=PATIENCE)
                assert process.returncode == 0, err
    finally:
        over.set()
        trouble.join()
    wait_until(lambda: run("--flush", url=bus.url)[0] == 0)
    arrived = texts(bus)
    assert arrived == sorted(set(arrived), key=int)
    assert {f"{n}" for n in range(SENDS)} - set(arrived) <= unknown


# ── Copies ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_copies_are_what_the_readers_get(bus, monkeypatch, tmp_path):
    monkeypatch.setenv("AGENT_BUS_OUTBOX", str(tmp_path / "sent-{name}.jsonl"))
    sent = [("dell", {"subject": "T1 ü", "priority": "high"}), (["dell", "nano"], {"ttl": 3600.5, "channel": "ops"}),
            (["nano"], {"reply_to": "652a"}),
            ("all", {"type": "result", "fields": {"own": {"x": [1.5, None]}}})]  # fmt: skip
    for to, fields in sent:
        bus_send.send(to, "grüße\n", url=bus.url, **fields)
    env = {**os.environ, "AGENT_BUS_URL": bus.url}
    read = []
    for where in (["dell", "nano", "all"], ["dell", "nano", "--channel", "ops"]):
        command = [sys.executable, str(ROOT / "bus_recv.py"), *where, "--json", "--once"]
        read += forked.run(command, env=env, capture_output=True, text=True, timeout=PATIENCE).stdout.splitlines()
    assert sorted((tmp_path / "sent-spark.jsonl").read_text().splitlines()) == sorted(read) and len(read) == 5
    assert stat.S_IMODE((tmp_path / "sent-spark.jsonl").stat().st_mode) == 0o600


def test_a_copy_that_cannot_be_written_is_told_and_changes_nothing(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("AGENT_BUS_OUTBOX", str(tmp_path / "nowhere" / "sent"))
    with Scripted(stored(), stored(id="a strange bus")) as server:
        assert bus_send.send("dell", "hi", url=server.url)["ok"] is True
        told = capsys.readouterr().err
        assert told.count("\n") == 1 and "stored, but no copy" in told and "No such file" in told
        monkeypatch.setenv("AGENT_BUS_OUTBOX", str(tmp_path / "sent"))
        assert bus_send.send("dell", "hi", url=server.url)["ok"] is True
    assert "stored, but no copy" in capsys.readouterr().err


def test_a_copy_that_has_no_room_leaves_no_part_of_a_line(monkeypatch, tmp_path, capsys):
    """The next copy was glued to it."""
    copies = tmp_path / "sent"
    monkeypatch.setenv("AGENT_BUS_OUTBOX", str(copies))
    with Scripted(stored(), stored(), stored()) as server:
        bus_send.send("dell", "one", url=server.url)
        with full_disk(1000):
            assert bus_send.send("dell", "two " * 1000, url=server.url)["ok"] is True
        told = capsys.readouterr().err
        assert "stored, but no copy" in told and str(copies) in told
        bus_send.send("dell", "three", url=server.url)
    assert [json.loads(line)["msg"] for line in copies.read_text().splitlines()] == ["one", "three"]


def test_a_copy_behind_a_torn_line_is_a_line_of_its_own(monkeypatch, tmp_path):
    copies = tmp_path / "sent"
    copies.write_text('{"from": "spark", "msg": "tor')
    monkeypatch.setenv("AGENT_BUS_OUTBOX", str(copies))
    with Scripted(stored()) as server:
        bus_send.send("dell", "whole", url=server.url)
    torn, line = copies.read_text().splitlines()
    assert torn.endswith('"tor') and json.loads(line)["msg"] == "whole"


def test_copies_go_into_a_pipe_of_which_nothing_is_taken(monkeypatch, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    pipe = os.open(tmp_path / "pipe", os.O_RDWR | os.O_NONBLOCK)
    monkeypatch.setenv("AGENT_BUS_OUTBOX", str(tmp_path / "pipe"))
    with Scripted(stored(), stored()) as server:
        for msg in ("one", "two"):
            bus_send.send("dell", msg, url=server.url)
    read = os.read(pipe, 9999).decode()
    os.close(pipe)
    assert [json.loads(line)["msg"] for line in read.splitlines()] == ["one", "two"]


def test_a_line_that_another_process_is_writing_is_not_taken_for_a_torn_one(tmp_path):
    path = tmp_path / "lines"
    adding = threading.Thread(target=bus_send.append, args=[str(path), "two\n"])

    def is_open_twice():
        links = [os.path.join("/proc/self/fd", name) for name in os.listdir("/proc/self/fd")]
        return [os.path.islink(link) and os.readlink(link) for link in links].count(str(path)) == 2

    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        print("on", end="", file=file, flush=True)
        adding.start()
        wait_until(lambda: not adding.is_alive() or is_open_twice())
        print("e", file=file, flush=True)
    adding.join(PATIENCE)
    assert path.read_text() == "one\ntwo\n"


def test_only_what_is_stored_is_copied(monkeypatch, tmp_path):
    monkeypatch.setenv("AGENT_BUS_OUTBOX", str(tmp_path / "sent"))
    monkeypatch.setattr(bus_send, "FIRST_PAUSE", 0.001)
    with Scripted(b"", stored(), answer({"error": "no"}, status=400)) as server:
        bus_send.send("dell", "after a fault", url=server.url)
        with pytest.raises(bus_send.Refused):
            bus_send.send("dell", "refused", url=server.url)
    with pytest.raises(bus_send.Unreachable):
        bus_send.send("dell", "unknown", url=nowhere(), patience=0)
    (line,) = (tmp_path / "sent").read_text().splitlines()
    assert json.loads(line)["msg"] == "after a fault" and "key" not in json.loads(line)


def test_a_flush_says_that_mail_waits_for_another_bus():
    assert run("dell", url=nowhere(), msg="hi")[0] == 0
    code, _, err = run("--flush", url=nowhere())
    assert code == 0 and "1 wait for another bus, or of another sender: --list shows them" in err


def test_without_room_for_the_message_it_says_where_and_that_nothing_is_kept(home, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(bus_outbox, "store", full)
    code, _, err = run("dell", url=nowhere(), msg="hi")
    assert code == 2 and err.startswith(f"bus_outbox: nothing is kept, and nothing was sent: {home}/outbox/")
    assert err.endswith(": No space left on device\n")


def test_ctrl_c_while_it_tries_says_that_the_message_is_kept(home, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(bus_send, "send", interrupted)
    code, _, err = run("dell", url=nowhere(), msg="hi")
    assert code == 130 and len(files(home)) == 1
    assert err.startswith("bus_outbox: not sent yet, but kept on this disk: it goes out with ") and "--flush" in err


def test_a_bus_with_three_long_urls_has_an_outbox():
    far = [f"http://internal-agent-bus-front-{n}-1234567890.eu-central-1.elb.amazonaws.invalid:8443" for n in "123"]
    outbox = bus_outbox.Outbox(",".join(far), "spark")
    assert outbox.put({"to": "dell", "msg": "hi"}) in outbox.waiting()


def spelled(url):
    """The same bus, as another profile may have it."""
    return f"{url.replace('127.0.0.1', 'LocalHost')}/"


def test_one_bus_has_one_outbox_however_its_url_is_spelled(bus, home):
    bus.kill()
    for url, msg in ((bus.url, "0"), (spelled(bus.url), "1"), (f"{bus.url}/,http://127.0.0.2:9", "2")):
        assert run("dell", url=url, msg=msg)[0] == 0
    bus.start()
    assert run("dell", url=bus.url, msg="3")[0] == 0
    assert texts(bus) == ["0", "1", "2", "3"] and not files(home)


def test_what_waits_in_the_folder_of_an_older_version_goes_out_first(home):
    """That version had a folder for each spelling of the URL."""
    with Scripted(stored(), stored(), stored()) as server:
        run("dell", url=nowhere(), msg="0")
        run("dell", url=nowhere(), msg="another bus")
        older, other = sorted(files(home), key=lambda path: path.name)
        for path, url in ((older, spelled(server.url)), (other, server.url.replace("127.0.0.1", "127.0.0.2"))):
            path.parent.rename(outbox_of(home, url))
        assert run("dell", url=server.url, msg="1")[0] == 0
    assert [asked.json["msg"] for asked in server.asked] == ["0", "1"] and len(files(home)) == 1


def test_what_another_program_sends_from_an_older_folder_is_left_to_it(home):
    with Scripted(stored(), stored()) as server:
        run("dell", url=nowhere(), msg="0")
        older = outbox_of(home, spelled(server.url))
        files(home)[0].parent.rename(older)
        with bus_outbox.locked(str(older / "~delivery")) as held:
            assert held and run("--flush", url=server.url)[0] == 0
        assert not server.asked and len(files(home)) == 1
        assert run("--flush", url=server.url)[0] == 0
    assert [asked.json["msg"] for asked in server.asked] == ["0"] and not files(home)


def test_a_message_that_is_moved_takes_the_place_of_no_other(home):
    url = nowhere()
    outbox = bus_outbox.Outbox(url, "spark")
    older = outbox_of(home, spelled(url))
    older.mkdir()
    for number, msg in (("1", "new"), ("2", "newer")):
        bus_outbox.store(outbox.path, f"{number:0>20}.json", {"msg": msg})
    bus_outbox.store(older, f"{1:020d}.json", {"msg": "old"})
    outbox.take_over()
    found = [bus_outbox.read(os.path.join(outbox.path, name))["msg"] for name in outbox.waiting()]
    assert found == ["new", "newer", "old"]
