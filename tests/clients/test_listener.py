"""bus_listener.sh: every message once in FULL and once in LOG, whatever becomes of listener, network and bus."""
import contextlib
import http.server
import json
import os
import pathlib
import re
import resource
import shutil
import signal
import stat
import subprocess
import threading
import time
import urllib.request
from urllib.parse import parse_qs, urlsplit

import pytest

from tests.kit.processes import PATIENCE, ROOT, free_port, in_time, wait_until

SCRIPT = ROOT / "bus_listener.sh"
TICK = 1795205226000007  # a fraction that begins with zeros


def send(url, *bodies, to="spark", **fields):
    batch = [{"from": "dell", "to": to, "msg": body, **fields} for body in bodies]
    urllib.request.urlopen(urllib.request.Request(url + "/send", json.dumps(batch).encode()), timeout=PATIENCE).close()


def send_by_four(url, bodies):
    for n in range(0, len(bodies), 4):
        send(url, *bodies[n : n + 4])


class Listener:
    """One bus_listener.sh that polls fast, in a process group of its own: a kill takes curl and jq along, or not."""

    def __init__(self, home, url, **env):
        self.home = pathlib.Path(home)
        self.home.mkdir(exist_ok=True)
        fast = {"AGENT_NAME": "spark", "AGENT_BUS_URL": url, "AGENT_BUS_STATE_DIR": str(home), "INTERVAL": "0.05"}
        ours = ("AGENT_", "LOG", "FULL", "HEARTBEAT", "PID_FILE", "BLOCK")
        self.env = {**{k: v for k, v in os.environ.items() if not k.startswith(ours)}, **fast, **env}
        self.stderr = self.home / "stderr"
        self.process = None

    def file(self, suffix):
        return self.home / "listener" / f"spark.{suffix}"

    def start(self, **popen):
        with self.stderr.open("ab") as stderr:
            self.process = subprocess.Popen(
                [SCRIPT], env=self.env, stdout=subprocess.DEVNULL, stderr=stderr, start_new_session=True, **popen
            )
        return self

    def kill(self, group=True):
        """kill -9, of the shell alone or of all it runs."""
        (os.killpg if group else os.kill)(self.process.pid, signal.SIGKILL)
        self.process.wait(PATIENCE)

    def stop(self):
        self.process.terminate()
        return self.process.wait(PATIENCE)

    def said(self):
        return self.stderr.read_text().splitlines()

    def messages(self):
        return [json.loads(line) for line in self.lines("jsonl")]

    def log(self):
        return [line.split("\t") for line in self.lines("log") if not line.startswith("#")]

    def remarks(self):
        return [line for line in self.lines("log") if line.startswith("#")]

    def lines(self, suffix):
        """Whole ones only, and ended by a newline only."""
        path = self.file(suffix)
        return path.read_text().split("\n")[:-1] if path.exists() else []

    def wait_for_line(self, n):
        """The n-th of FULL."""
        wait_until(lambda: len(self.lines("jsonl")) >= n)

    def wait_to_say(self, words):
        return wait_until(lambda: any(words in line for line in self.said()) and self.said())

    def wait_for_copy_of(self, other):
        wait_until(lambda: [self.lines("jsonl"), self.lines("log")] == [other.lines("jsonl"), other.lines("log")])

    def has_logged(self, *bodies):
        wait_until(lambda: len(self.log()) >= len(bodies))
        assert [message["msg"] for message in self.messages()] == list(bodies)
        assert [line[1] for line in self.log()] == [message["id"] for message in self.messages()]


@pytest.fixture
def listen(tmp_path):
    """Makes listeners, and ends them."""
    made = []

    def make(url, home="home", **env):
        made.append(Listener(tmp_path / home, url, **env))
        return made[-1]

    yield make
    for listener in made:
        if listener.process:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(listener.process.pid, signal.SIGKILL)
            listener.process.wait(PATIENCE)


# ── A bus that follows a script ──────────────────────────────────────────────────────────────────────────────────────


class Scripted(http.server.ThreadingHTTPServer):
    """Gives the n-th poll the n-th of its raw answers, and the last one to all after it; `polls` is what was asked."""

    daemon_threads = True

    def __init__(self, *answers):
        super().__init__(("127.0.0.1", 0), ScriptedAnswer)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.answers, self.polls = answers, []
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def polled(self, times):
        """The queries of the polls so far, at least `times`."""
        wait_until(lambda: len(self.polls) >= times)
        return self.polls


class ScriptedAnswer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        path, server = urlsplit(self.path), self.server
        query = {word: values[0] for word, values in parse_qs(path.query).items()}
        answer = server.answers[min(len(server.polls), len(server.answers) - 1)]
        server.polls.append({"path": path.path, "agent": self.headers["User-Agent"], **query})
        if callable(answer):
            answer(self)
        else:
            self.wfile.write(answer)

    def log_message(self, *_):
        pass


@pytest.fixture
def scripted():
    made = []

    def make(*answers):
        made.append(Scripted(*answers))
        return made[-1]

    yield make
    for server in made:
        server.shutdown()
        server.server_close()


def answer(body, status="200 OK", *headers, length=None):
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {length or len(body)}", "Connection: close", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def message(tick, **fields):
    usual = {"ts": tick / 1e6, "id": f"{tick:x}", "from": "dell", "to": "spark", "channel": "default", "msg": "hi"}
    return {**usual, **fields}


def mail(*messages, bus="bus-1", now=TICK / 1e6, **fields):
    return answer({"messages": messages, "now": now, "bus": bus, **fields})


NO_MAIL = mail()


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


@needs_prlimit
def test_a_LOG_that_was_full_gets_its_line_without_new_mail(bus, listen):
    listener = listen(bus.url)
    listener.file("log").parent.mkdir()
    listener.file("log").write_text("# " + 9980 * "x" + "\n")
    send(bus.url, "hi")
    listener.start(preexec_fn=small_disk)
    make_room(listener)
    listener.has_logged("hi")


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
        server = scripted(mail(message(TICK)), bad, bad, NO_MAIL)
        cases.append((case, server, listen(server.url, home=case, INTERVAL="0.5").start()))
    for case, server, listener in cases:
        assert [poll["since"] for poll in server.polled(4)[:4]] == ["last"] + 3 * ["1795205226.000007"], case
        assert {poll["path"] for poll in server.polls} == {"/recv"}, case
        assert len(listener.wait_to_say("works again")) == 2, (case, listener.said())
        assert len(listener.messages()) == 1, case


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


# ── One process, its files, its end ──────────────────────────────────────────────────────────────────────────────────


def test_a_second_listener_is_refused_while_the_first_lives_and_a_pid_in_a_file_refuses_nobody(scripted, listen):
    server = scripted(NO_MAIL)
    first = listen(server.url).start()
    wait_until(lambda: first.file("heartbeat").exists())
    assert int(first.file("pid").read_text()) == first.process.pid
    second = listen(server.url).start()
    assert second.process.wait(PATIENCE) == 2
    assert ["another listener" in line for line in second.said()] == [True]
    assert int(first.file("pid").read_text()) == first.process.pid
    first.kill()
    first.file("pid").write_text(f"{os.getpid()}\n")  # the pid of a dead listener is someone else's now
    third = listen(server.url).start()
    wait_until(lambda: first.file("pid").read_text() == f"{third.process.pid}\n")
    assert third.process.poll() is None


def test_a_curl_that_a_kill_left_behind_holds_no_lock_and_spoils_no_answer(scripted, listen):
    late, left = threading.Event(), threading.Event()

    def orphaned(request):
        late.wait(PATIENCE)
        request.wfile.write(mail(message(TICK, msg="x" * 5000)))
        request.rfile.read(1)
        left.set()

    def meanwhile(request):
        late.set()
        left.wait(PATIENCE)
        request.wfile.write(NO_MAIL)

    server = scripted(orphaned, meanwhile, NO_MAIL)
    listener = listen(server.url).start()
    server.polled(1)
    listener.kill(group=False)
    listener.start()
    server.polled(4)
    assert listener.said() == []


@pytest.mark.parametrize("suffix", ["log", "jsonl", "pid", "heartbeat"])
def test_a_symbolic_link_is_not_followed(listen, tmp_path, suffix):
    listener = listen("http://127.0.0.1:1")
    listener.file(suffix).parent.mkdir()
    listener.file(suffix).symlink_to(tmp_path / "target")
    assert listener.start().process.wait(PATIENCE) == 2
    assert not (tmp_path / "target").exists()
    assert ["symbolic link" in line for line in listener.said()] == [True]


def test_files_and_directory_are_for_their_user_only(scripted, listen):
    server = scripted(mail(message(TICK)), NO_MAIL)
    listener = listen(server.url)
    directory = listener.file("log").parent
    directory.mkdir(mode=0o755)
    listener.start()
    wait_until(lambda: listener.file("heartbeat").exists())
    modes = {stat.S_IMODE(path.stat().st_mode) for path in directory.iterdir()}
    assert (stat.S_IMODE(directory.stat().st_mode), modes) == (0o700, {0o600})


@pytest.mark.parametrize("env", [{"BLOCK": "1"}, {"INTERVAL": "60"}, {}], ids=["parked", "resting", "backing off"])
def test_SIGTERM_ends_it_at_once_and_takes_its_curl_along(scripted, listen, env):
    gone = threading.Event()

    def park(request):
        if request.rfile.read(1) == b"":
            gone.set()

    server = scripted(park if "BLOCK" in env else NO_MAIL if env else b"")
    listener = listen(server.url, **env).start()
    server.polled(1)
    wait_until(lambda: env == {"BLOCK": "1"} or listener.file("heartbeat").exists() or listener.said())
    began = time.monotonic()
    assert listener.stop() == 0
    assert time.monotonic() - began < in_time(1)
    assert not listener.file("pid").exists() and not listener.file("jsonl.answer").exists()
    assert "BLOCK" not in env or gone.wait(PATIENCE)


def test_its_last_request_says_that_it_leaves_and_what_it_has_written(bus, listen):
    listener = listen(bus.url, BLOCK="1").start()
    send(bus.url, "one")
    wait_until(listener.file("heartbeat").exists)
    listener.has_logged("one")
    assert listener.stop() == 0
    [spark] = [agent for agent in json.loads(bus.get("/agents"))["agents"] if agent["name"] == "spark"]
    assert (spark["online"], spark["unread"]) == (False, 0)


def test_to_a_server_of_the_old_contract_it_says_nothing_at_its_end(scripted, listen):
    server = scripted(answer({"messages": [], "now": 1.5}))
    listener = listen(server.url, INTERVAL="60").start()
    wait_until(listener.file("heartbeat").exists)
    assert listener.stop() == 0 and len(server.polls) == 1


def test_a_bus_on_loopback_is_polled_without_the_proxy_and_with_the_chosen_agent(scripted, listen):
    server = scripted(NO_MAIL)
    proxy = f"http://127.0.0.1:{free_port()}"
    listen(server.url + "/", http_proxy=proxy, all_proxy=proxy, no_proxy="example.org").start()
    assert server.polled(1)[0]["agent"] == "Mozilla/5.0"
    listen(server.url, home="other", AGENT_BUS_UA="listener of dell", BLOCK="1").start()
    wait_until(lambda: [poll["agent"] for poll in server.polls].count("listener of dell") > 1)
    first, second = [poll for poll in server.polls if poll["agent"] == "listener of dell"][:2]
    assert (first["block"], first["max"], first["since"]) == ("false", "50", "last"), "it says that it is connected"
    assert (second["block"], second["wait"], second["max"]) == ("true", "25", "50")


WRONG = {
    "no name": {"AGENT_NAME": ""},
    "a name with a newline": {"AGENT_NAME": "spark\n"},
    "a name that climbs": {"AGENT_NAME": "../spark"},
    "a long name": {"AGENT_NAME": "s" * 65},
    "a channel that is no name": {"AGENT_BUS_CHANNEL": "a b"},
    "another scheme": {"AGENT_BUS_URL": "file:///etc/passwd"},
    "an interval in words": {"INTERVAL": "soon"},
    "a directory that is a file": {"AGENT_BUS_STATE_DIR": "/dev/null"},
    "a LOG in no directory": {"LOG": "/nonexistent/spark.log"},
}


@pytest.mark.parametrize("env", WRONG.values(), ids=WRONG)
def test_a_wrong_configuration_is_one_sentence_and_exit_2(listen, env):
    listener = listen("http://127.0.0.1:1", **env).start()
    assert listener.process.wait(PATIENCE) == 2
    assert len(listener.said()) == 1 and listener.said()[0].startswith("bus_listener: ")


@pytest.mark.parametrize("arguments", [["spark", "x"], ["--url", "http://127.0.0.1:1"], [""], ["-x"]])
def test_what_is_not_one_name_is_refused_in_words(arguments, tmp_path):
    env = {"PATH": os.environ["PATH"], "AGENT_NAME": "spark", "HOME": str(tmp_path)}
    done = subprocess.run([SCRIPT, *arguments], env=env, capture_output=True, text=True, timeout=PATIENCE)
    said = "is not understood: it takes one NAME and no options, only variables; see --help\n"
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.endswith(said)
    assert done.stderr.count("\n") == 1 and "\x1b" not in done.stderr and not list(tmp_path.iterdir())


def test_it_takes_the_name_as_every_other_program_does(bus, tmp_path):
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "AGENT_BUS_URL": bus.url, "AGENT_NAME": "other"}
    with subprocess.Popen([SCRIPT, "lis"], env=env, stdout=subprocess.PIPE, text=True) as process:
        line = process.stdout.readline()
        process.terminate()
    folder = tmp_path / ".local/state/agent-bus/listener"
    assert line == f"writing the mail of lis to {folder}/lis.log and {folder}/lis.jsonl\n"


@pytest.mark.parametrize("option", ["-h", "--help"])
def test_its_help_names_its_variables(option, tmp_path):
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    done = subprocess.run([SCRIPT, option], env=env, capture_output=True, text=True, timeout=PATIENCE)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("usage: AGENT_BUS_URL=")
    text = pathlib.Path(SCRIPT).read_text()
    variables = set(re.findall(r"\$\{([A-Z_]+):-", text)) - {"HOME", "XDG_CONFIG_HOME", "XDG_STATE_HOME", "NO_PROXY"}
    assert [name for name in variables if not re.search(rf"\b{name}\b", done.stdout)] == []


def test_without_a_place_for_its_files_it_says_what_to_set(listen):
    listener = listen("http://127.0.0.1:1", AGENT_BUS_STATE_DIR="/dev/null").start()
    assert listener.process.wait(PATIENCE) == 2
    assert listener.said() == ["bus_listener: cannot write to /dev/null/listener: set AGENT_BUS_STATE_DIR"]


def path_with(tmp_path, tools):
    """A PATH where only these tools are."""
    directory = tmp_path / "bin"
    directory.mkdir()
    for tool in tools.split():
        (directory / tool).symlink_to(shutil.which(tool))
    return str(directory)


def test_without_flock_as_on_macOS_perl_takes_the_lock(scripted, listen, tmp_path):
    if not shutil.which("perl"):
        pytest.skip("perl is not installed")
    tools = "env bash curl jq perl chmod dd grep mkdir mkfifo rm sleep tail touch wc"
    server, path = scripted(NO_MAIL), path_with(tmp_path, tools)
    first = listen(server.url, PATH=path).start()
    wait_until(lambda: first.file("heartbeat").exists())
    second = listen(server.url, PATH=path).start()
    assert second.process.wait(PATIENCE) == 2
    first.kill()
    third = listen(server.url, PATH=path).start()
    wait_until(lambda: first.file("pid").read_text() == f"{third.process.pid}\n")
    assert ["another listener" in line for line in first.said()] == [True]


@pytest.mark.parametrize("missing", ["curl", "jq"])
def test_a_missing_tool_is_named(listen, tmp_path, missing):
    path = path_with(tmp_path, {"curl": "env bash jq", "jq": "env bash curl"}[missing])
    listener = listen("http://127.0.0.1:1", PATH=path).start()
    assert listener.process.wait(PATIENCE) == 2
    assert listener.said() == [f"bus_listener: {missing} is not installed"]
