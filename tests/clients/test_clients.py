"""bus_send.py and bus_recv.py as programs: how they end, and both with the real bus; and what client tests share."""
import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request

import pytest

import bus_recv
import bus_send
from tests.kit import forked
from tests.kit.bad_servers import NOON, Scripted, mail, message, page, silence
from tests.kit.processes import PATIENCE, ROOT, Server, free_port, runs, wait_until

pytestmark = pytest.mark.usefixtures("home")


class Clock:
    """Stands for the module time; sleeping takes no time, and is noted. `during` is called with each sleep."""

    def __init__(self, during=lambda seconds: None):
        self.slept, self.during, self.offset = [], during, 0.0

    def monotonic(self):
        return time.monotonic() + self.offset

    def time(self):
        return NOON + self.offset

    def sleep(self, seconds):
        self.slept.append(seconds)
        self.offset += seconds
        self.during(seconds)


def program(script, *arguments, stdin=b"", env=None, **options):
    """A client as people run it: without site packages, and with nothing on the path."""
    command = [sys.executable, "-I", "-S", str(ROOT / script), *arguments]
    streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    process = forked.Popen(command, env={**os.environ, **(env or {})}, **streams)
    if stdin is not None and process.stdin:
        with contextlib.suppress(BrokenPipeError), process.stdin:  # the end of this writes what the buffer has
            process.stdin.write(stdin)
        process.stdin = None
    return process


def run(script, *arguments, **options):
    """Exit code, stdout, stderr."""
    process = program(script, *arguments, **options)
    out, err = process.communicate(timeout=PATIENCE)
    assert b"Traceback" not in err and b"Exception" not in err, err.decode()
    return process.returncode, (out or b"").decode(), err.decode()


def send(server, *arguments, stdin=b"hi", **env):
    return run("bus_send.py", "dell", *arguments, stdin=stdin,
               env={"AGENT_BUS_URL": server.url, "AGENT_NAME": "spark", **env})  # fmt: skip


def recv(server, *arguments, **env):
    return run("bus_recv.py", "dell", *arguments, env={"AGENT_BUS_URL": server.url, **env})


def reader(url, names=("dell",), since=None, wait=25.0, clock=None):
    """A Reader whose time costs nothing; `said` has what it announced and `warned` what it complained about."""
    made = bus_recv.Reader(names, url, None, since, wait)
    made.clock, made.said, made.warned = clock or Clock(), [], []
    made.announce, made.warn = made.said.append, made.warned.append
    return made


def cursors(home):
    return {str(path.relative_to(home / "cursors")): path.read_text().strip()
            for path in home.glob("cursors/**/*") if path.is_file() and not path.name.endswith("~lock")}  # fmt: skip


def refusing():
    """The URL of a port where nobody listens."""
    return f"http://127.0.0.1:{free_port()}"


def test_a_program_may_end_before_it_has_read_its_stdin(monkeypatch):
    """The control: such a program is judged by its exit code, however early it ends."""
    start = forked.Popen

    def start_and_wait(*command, **options):
        process = start(*command, **options)
        process.wait(PATIENCE)
        return process

    monkeypatch.setattr(forked, "Popen", start_and_wait)
    assert run("bus_send.py", "--version", stdin=b"hi")[0] == 0


# ── The program ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_exit_codes_of_a_reader():
    with Scripted(mail(message(1))) as server:
        assert recv(server, "--once")[0] == 0
        assert recv(server, "--timeout", "0")[0] == 0
    with Scripted(mail()) as server:
        assert recv(server, "--once", "--timeout", "0") == (3, "", "")
        assert recv(server, "--timeout", "0.1") == (3, "", "")
    with Scripted(silence) as server:  # an old bus holds a poll as long as it likes
        assert recv(server, "--timeout", "0") == (3, "", "")
    code, out, err = run("bus_recv.py", "dell", "--timeout", "0.1", env={"AGENT_BUS_URL": refusing()})
    assert (code, out) == (75, "") and "no bus at http" in err and "bus_doctor.py tells" in err


@pytest.mark.parametrize("arguments", [
    ["a b"], ["a,,b"], [""], ["-"], [".."], ["dell\n"], ["ü"], ["a" * 65], ["dell"] * 17, ["dell", "--channel", "a b"],
    ["dell", "--since", "1e9"], ["dell", "--since", "٣"], ["dell", "--since", "yesterday"], ["dell", "--timeout", "x"],
    [],
])  # fmt: skip
def test_wrong_usage_is_2_and_asks_nothing(arguments):
    with Scripted(mail(message(1))) as server:
        code, out, err = run("bus_recv.py", *arguments, env={"AGENT_BUS_URL": server.url})
        assert (code, out, server.asked) == (2, "", []) and err


def test_once_takes_all_that_waits():
    with Scripted(mail(message(1), more=True, now=f"{NOON}.1"), mail(message(2), more=True, now=f"{NOON}.2"),
                  mail(message(3)), mail(message(4))) as server:  # fmt: skip
        out = recv(server, "--once", "--json")[1]
        assert [json.loads(line)["id"] for line in out.splitlines()] == ["1", "2", "3"]


@pytest.mark.parametrize("arguments", [["--once"], ["--exec", "true", "--once"], ["--monitor", "--once"]])
def test_a_reader_that_ends_says_goodbye_with_its_cursor(arguments, home):
    with Scripted(mail(message(1))) as server:
        assert recv(server, *arguments)[0] == 0
        (goodbye,) = server.left
        asked = {name: goodbye.query[name] for name in ("to", "since", "ack", "leave", "bus")}
        since = cursors(home)["b1/default/dell"]
        assert asked == {"to": ["dell"], "since": since, "ack": "true", "leave": "true", "bus": "b1"}


def test_a_reader_that_has_ended_is_not_listening(bus):
    """By itself, or by a signal while the bus holds its poll."""
    for arguments in (["--once", "--timeout", "0"], []):
        process = program("bus_recv.py", "fresh", *arguments, env={"AGENT_BUS_URL": bus.url})
        arguments or wait_until(lambda: bus_send.send("fresh", "1", url=bus.url, sender="a")["receiver"]["online"])
        arguments or process.terminate()
        process.communicate(timeout=PATIENCE)
        assert not bus_send.send("fresh", "2", url=bus.url, sender="a")["receiver"]["online"]


@pytest.mark.parametrize("command", ["nosuchcmd", "", "nosuchcmd | cat"])
def test_a_command_that_does_not_exist_is_said_before_a_message_is_taken(command):
    with Scripted(mail(message(1))) as server:
        code, out, err = recv(server, "--exec", command, "--once")
        assert (code, out) == (2, "") and "nothing was taken" in err and server.asked == []


def test_a_page_that_was_for_others_is_not_the_end():
    with Scripted(mail(more=True, now=f"{NOON}.1"), mail(message(1))) as server:
        assert recv(server, "--timeout", "0")[0] == 0


def said(err):
    """What a reader said on stderr beside its greeting."""
    return re.sub(rb"\Abus_recv: listening as dell on \S+\n", b"", err)


def test_a_closed_stdout_ends_quietly_and_the_lost_block_is_not_received(home):
    with Scripted(mail(message(1))) as server:
        read, write = os.pipe()
        os.close(read)
        process = program("bus_recv.py", "dell", env={"AGENT_BUS_URL": server.url}, stdout=write)
        os.close(write)
        assert said(process.communicate(timeout=PATIENCE)[1]) == b"" and process.returncode == 0
        assert cursors(home) == {"b1/default/dell": "last"}
        closed = f'exec "{sys.executable}" -I -S "{ROOT}/bus_recv.py" dell >&-'
        environment = {**os.environ, "AGENT_BUS_URL": server.url}
        done = subprocess.run(["sh", "-c", closed], env=environment, stderr=subprocess.PIPE, timeout=PATIENCE)
        assert (done.returncode, said(done.stderr)) == (0, b"") and cursors(home) == {"b1/default/dell": "last"}


@pytest.mark.parametrize("buffered", [[], ["-u"]], ids=["buffered", "-u"])
@pytest.mark.parametrize("blocking", [True, False])
def test_all_of_a_large_block_is_out(buffered, blocking, home):
    """A write may take a part of it, or nothing. With -u, as in many containers, sys.stdout has no buffer."""
    with Scripted(mail(message(1, "x" * 300000))) as server:
        read, write = os.pipe()
        os.set_blocking(write, blocking)
        command = [sys.executable, *buffered, str(ROOT / "bus_recv.py"), "dell", "--once"]
        process = subprocess.Popen(command, env={**os.environ, "AGENT_BUS_URL": server.url}, stdout=write)
        os.close(write)
        with open(read) as pipe:
            assert pipe.read().endswith(f"| {'x' * 300000}\n---\n")
        assert process.wait(PATIENCE) == 0


def test_a_full_disk_under_stdout_is_an_error_and_the_block_is_not_received(home):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    with Scripted(mail(message(1))) as server, open("/dev/full", "wb") as full:
        process = program("bus_recv.py", "dell", env={"AGENT_BUS_URL": server.url}, stdout=full)
        _, err = process.communicate(timeout=PATIENCE)
        assert process.returncode == 2 and said(err).count(b"\n") == 1 and cursors(home) == {"b1/default/dell": "last"}


SIGNALS = [(signal.SIGTERM, 0), (signal.SIGINT, 130), (signal.SIGHUP, 0)]  # and the exit code
HELD = "echo $$ > {0}/pid; until [ -e {0}/enough ]; do sleep 0.02; done"  # a command that runs until it is let go


@pytest.mark.parametrize("number, code", SIGNALS)
def test_a_signal_ends_a_waiting_reader_quietly(number, code, interruptible):
    with Scripted(silence) as server:
        process = program("bus_recv.py", "dell", env={"AGENT_BUS_URL": server.url})
        wait_until(lambda: server.polls)
        process.send_signal(number)
        out, err = process.communicate(timeout=PATIENCE)
        assert (out, said(err), process.returncode) == (b"", b"", code)


@pytest.mark.parametrize("number, code", SIGNALS)
def test_a_signal_ends_a_reader_together_with_its_command(number, code, tmp_path, interruptible):
    with Scripted(mail(message(1))) as server:
        process = program("bus_recv.py", "dell", "--exec", HELD.format(tmp_path), env={"AGENT_BUS_URL": server.url})
        pid = int(wait_until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text()))
        process.send_signal(number)
        out, err = process.communicate(timeout=PATIENCE)
        assert (out, said(err), process.returncode) == (b"", b"", code)
        wait_until(lambda: not runs(pid))


def test_a_reader_under_nohup_and_its_command_outlive_a_hangup(tmp_path):
    def ignore():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    with Scripted(mail(message(1))) as server:
        arguments, env = ("dell", "--once", "--exec", HELD.format(tmp_path)), {"AGENT_BUS_URL": server.url}
        process = program("bus_recv.py", *arguments, env=env, preexec_fn=ignore)
        wait_until((tmp_path / "pid").exists)
        process.send_signal(signal.SIGHUP)
        (tmp_path / "enough").touch()
        assert process.communicate(timeout=PATIENCE) == (b"", b"") and process.returncode == 0


@pytest.mark.parametrize("call", ["bus_send.py dell hi", "tools/bus_later.py dell hi --after 1h"])
@pytest.mark.parametrize("fault", [silence, page(503, "starting")])
def test_ctrl_c_ends_a_waiting_send_which_says_that_the_message_may_not_be_sent(call, fault, interruptible):
    with Scripted(fault) as server:
        process = program(*call.split(), env={"AGENT_BUS_URL": server.url, "AGENT_NAME": "spark"})
        wait_until(lambda: server.asked)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=PATIENCE)
        assert (out, process.returncode) == (b"", 130)
        assert err.endswith(b": stopped; the bus has not said that it has the message\n") and b"Traceback" not in err


def test_output_is_utf_8_whatever_the_locale():
    with Scripted(mail(message(1, "grüße 😀 \ud83d", subject="ü"))) as server:
        for env in ({"LC_ALL": "C"}, {"LC_ALL": "POSIX", "PYTHONIOENCODING": "latin-1"}):
            code, out, _ = recv(server, "--once", "--since", "0", **env)
            assert code == 0 and out.endswith('subject="ü"\n| grüße 😀 \\ud83d\n---\n')
            assert recv(server, "--once", "--json", **env)[1].isascii()


# ── With the real bus ────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_clients_and_the_bus_agree(bus):
    code, out, err = send(bus, "--subject", "T1 done", "--ttl", "60", stdin=b"zwei\n---\n\x1b[31m Zeilen\r\n\n")
    assert code == 0 and json.loads(out)["ok"] and err == "queued: nobody has ever listened as dell, 1 unread\n"
    first, again = (json.loads(send(bus, "--key", "k")[1]) for _ in range(2))
    assert first["id"] == again["id"] and (first["duplicate"], again["duplicate"]) == (False, True)
    assert send(bus, "--key", "k", stdin=b"another message")[0] == 1
    code, blocks, err = recv(bus, "--once")
    assert (code, err) == (0, "") and 'subject="T1 done"\n| zwei\n| ---\n| \\x1b[31m Zeilen\n| \n---\n20' in blocks
    assert recv(bus, "--once", "--timeout", "0") == (3, "", "")
    request = urllib.request.Request(f"{bus.url}/recv?to=dell", headers={"Accept": "text/plain"})
    with urllib.request.urlopen(request, timeout=PATIENCE) as plain:
        assert plain.read().decode() == blocks


def test_a_reader_is_woken_by_its_message(bus):
    process = program("bus_recv.py", "dell", env={"AGENT_BUS_URL": bus.url})
    wait_until(lambda: json.loads(bus.get("/agents"))["agents"])
    bus_send.send("dell", "wake up", url=bus.url, sender="spark")
    assert b"from=spark" in process.stdout.readline() and process.stdout.readline() == b"| wake up\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE) == 0
    process.communicate()


def test_a_bus_that_was_replaced_gives_its_queued_mail(bus, tmp_path):
    bus_send.send("dell", "old", url=bus.url, sender="spark")
    process = program("bus_recv.py", "dell", "--json", env={"AGENT_BUS_URL": bus.url})
    assert json.loads(process.stdout.readline())["msg"] == "old"
    bus.kill()
    other = Server(tmp_path / "other.db")
    other.start()
    bus_send.send("dell", "queued before the reader knew", url=other.url, sender="spark")
    other.kill()
    other.command[other.command.index("--port") + 1] = str(bus.port)
    with other:
        assert json.loads(process.stdout.readline())["msg"] == "queued before the reader knew"
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=PATIENCE)
    assert process.returncode == 0


def test_a_bus_that_was_restarted_loses_nothing_and_repeats_nothing(bus):
    process = program("bus_recv.py", "dell", "--json", env={"AGENT_BUS_URL": bus.url})
    for n in range(4):
        bus_send.send("dell", str(n), url=bus.url, sender="spark")
        assert json.loads(process.stdout.readline())["msg"] == str(n)
        bus.kill()
        bus.start()
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=PATIENCE)[0] == b""


def test_a_reader_killed_at_any_moment_shows_every_message(bus, tmp_path):
    count, chance = 400, random.Random(7)
    texts = {str(n) for n in range(count)}

    def seen():  # each reader has a file of its own, whose last line a kill may have torn
        lines = [line for file in tmp_path.glob("out-*") for line in file.read_bytes().splitlines(keepends=True)]
        return {json.loads(line)["msg"] for line in lines if line.endswith(b"\n")}

    def send_all():
        for text in texts:
            bus_send.send("dell", text, url=bus.url, sender="spark")

    sending = threading.Thread(target=send_all)
    sending.start()
    kills = 0
    while seen() != texts:
        with (tmp_path / f"out-{kills}").open("wb") as out:
            process = program("bus_recv.py", "dell", "--json", env={"AGENT_BUS_URL": bus.url}, stdout=out)
        enough = min(len(seen()) + chance.randrange(1, 40), count)
        wait_until(lambda enough=enough: len(seen()) >= enough)
        process.kill()
        process.communicate()
        kills += 1
    sending.join()
    assert kills > 5
