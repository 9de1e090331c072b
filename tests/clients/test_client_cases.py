"""The Python clients in odd places: an answer from the future, a dead address first, logins, tokens, no locks."""
import contextlib
import errno
import fcntl
import json
import os
import select
import socket
import subprocess
import sys
import threading
import time
import unicodedata

import pytest

import bus_recv
import bus_send
import bus_server
from tests.clients.test_clients import cursors, reader, recv, run, send
from tests.kit import forked
from tests.kit.bad_servers import HTML, NOON, Scripted, answer, drip, mail, message, page, stored
from tests.kit.processes import PATIENCE, ROOT, in_time, wait_until
from tools import bus_join

pytestmark = pytest.mark.usefixtures("home")

FUTURE = NOON + 10**7
LATE = message(1).replace(str(NOON), str(FUTURE))
TOKEN = "abt_00000000_" + "s" * 43

sys.path += [str(ROOT / "integrations" / "claude_code"), str(ROOT / "tools")]


# ── What no bus sends ────────────────────────────────────────────────────────────────────────────────────────────────

DEEP = "[" * 900 + "]" * 900


@pytest.mark.parametrize("options", [(), ("--json",), ("--exec", "cat")], ids=["blocks", "json", "exec"])
@pytest.mark.parametrize("bad", [DEEP, message(1).replace('"msg"', f'"x": {DEEP}, "msg"'),
                                 message(1).replace('"from": "spark"', '"from": "\\u0000\\ud800"')],
                         ids=["no message", "a member", "from"])  # fmt: skip
def test_a_message_that_no_bus_lets_in_does_not_end_a_reader(bad, options, home):
    with Scripted(mail(message(1), bad, message(2))) as server:
        code, out, err = recv(server, "--once", *options)
    assert code == 0 and "Traceback" not in err, err
    assert '"id": "2"' in out or "id=2" in out


# ── An answer from the future ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("bus", ["b1", None], ids=["a bus", "the first contract"])
@pytest.mark.parametrize("bad", [[], [LATE], [message(2), LATE]], ids=["now", "a message", "the last message"])
def test_an_answer_from_the_future_moves_no_cursor_and_is_said_once(bad, bus, home):
    late = mail(*bad, now=f"{FUTURE}.5", bus=bus, more=True)
    with Scripted(mail(message(1), bus=bus), late, late, mail(message(3), bus=bus), bus=bus) as server:
        one = reader(server.url)
        assert [message["id"] for message, _ in zip(one.messages(), range(2))] == ["1", "3"]
    (place,) = cursors(home).values()
    assert float(place) < NOON + 2 and "far ahead" in one.warned[0]
    assert one.warned[1:] == [f"{server.url}: connected again"]


def test_the_first_answer_of_a_run_moves_no_cursor_into_the_future_either(home):
    with Scripted(mail(now=f"{FUTURE}.5"), mail(now=f"{NOON}.5")) as server:
        code, _, err = recv(server, "--once", "--timeout", "0")
        assert code == 75 and "far ahead" in err and cursors(home) == {"b1/default/dell": "last"}


def test_a_bus_of_the_first_contract_with_a_fast_clock_gives_no_start_in_the_future(home):
    with Scripted(mail(bus=None), health=answer({"ok": True, "now": FUTURE})) as server:
        recv(server, "--once", "--timeout", "0", "--since", "now")
        assert float(server.polls[0].query["since"]) <= time.time() + 301


def test_our_own_clock_may_be_wrong_if_the_same_bus_says_so_twice(home):
    health = answer({"ok": True, "now": FUTURE, "bus": "b1"})
    with Scripted(mail(LATE, now=f"{FUTURE}.5"), health=health) as server:
        assert recv(server, "--once")[0] == 0 and cursors(home) == {"b1/default/dell": f"{FUTURE}.5"}


def test_an_observer_stays_where_it_is(home):
    with Scripted(mail(message(1), now=f"{NOON}.5"), mail(now=f"{FUTURE}.5"), mail(message(3))) as server:
        code, _, err = run("tools/bus_log.py", "--timeout", "3", env={"AGENT_BUS_URL": server.url})
    asked = [one.query["since"] for one in server.asked if one.target.startswith("/log")]
    assert asked[:3] == ["0", f"{NOON}.5", f"{NOON}.5"] and "far ahead" in err


# ── What no bus would say ────────────────────────────────────────────────────────────────────────────────────────────


def raw(messages, bus='"b1"'):
    return page(200, f'{{"messages": [{messages}], "now": {NOON}.7, "bus": {bus}}}')


STRANGE = {
    "a number that no Decimal holds": raw('{"ts": 1e99999999999999999999}'),
    "lists nested as deep as the parser goes": raw(message(1)[:-1] + f', "x": {"[" * 600}{"]" * 600}}}'),
    "a text before a message from the future": mail('"5"', LATE),
    "an id of a bus that is too long for a file": raw(message(1), f'"{"b" * 300}"'),
    "an id of a bus that is half a character": raw(message(1), '"\\ud800"'),
}


@pytest.mark.parametrize("strange", STRANGE)
def test_an_answer_that_no_bus_would_give_ends_no_reader(strange, home):
    with Scripted(STRANGE[strange], mail(message(3))) as server:
        for got in reader(server.url).messages():
            assert bus_recv.block(got, "dell", NOON) and json.loads(bus_recv.dump(got))
            if isinstance(got, dict) and got.get("id") == "3":
                break
    assert "b1/default/dell" in cursors(home)


def test_a_bus_that_promises_more_and_gives_nothing_is_not_asked_without_a_pause(home):
    with Scripted(mail(more=True)) as server:
        one = reader(server.url)
        assert len([*zip(range(6), one.answers(False, 60))]) == 6 and len(one.clock.slept) >= 4


@pytest.mark.parametrize("client", [bus_recv, bus_send])
def test_a_length_that_is_a_lie_gives_a_drip_no_more_time(client, monkeypatch):
    for name, value in (("GRACE_SECONDS", 0.2), ("ANSWER_BYTES", 1 << 20), ("SLOWEST_RATE", 1 << 20)):
        monkeypatch.setattr(client, name, value)
    began = time.monotonic()
    with Scripted(drip(page(200, "", length=10**30))) as server, pytest.raises(client.Unreachable):
        client.exchange(server.url, "/recv", None, 0.2)
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("subject", ["\u65e5\u672c", "a\0b", "\ud800"], ids=["kanji", "NUL", "half a character"])
def test_a_subject_that_the_locale_does_not_have_is_no_end_of_a_command(subject, home):
    place = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}  # stands for a locale such as ISO-8859-1
    with Scripted(mail(message(1, subject=subject))) as server:
        command = [sys.executable, "-S", ROOT / "bus_recv.py", "dell", "--once", "--exec", 'printf %s "$MSG_SUBJECT"']
        done = forked.run(command, env={**os.environ, **place, "AGENT_BUS_URL": server.url}, capture_output=True,
                              timeout=PATIENCE)  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, subject.replace("\0", "").encode(errors="replace"), b"")


@pytest.mark.parametrize("receiver", [
    {"online": False, "last_seen": 10**400}, {"online": 10**400, "offline": 0.5}, {"online": False, "unread": "5\nlie"},
])  # fmt: skip
def test_what_is_said_of_a_receiver_makes_no_stored_message_a_refused_one(receiver, home):
    with Scripted(stored(receiver=receiver)) as server:
        code, out, err = send(server)
        assert code == 0 and json.loads(out)["ok"] and err.count("\n") <= 1


def test_an_answer_without_the_message_is_shown_as_it_is(home):
    with Scripted(answer({"x": 1})) as server:
        code, out, _ = run("bus_recv.py", "--read", "1", env={"AGENT_BUS_URL": server.url})
        assert (code, out) == (0, "-- agent-bus: not a message: null\n")


@pytest.mark.parametrize("line", ["bus_recv.py dell --json --timeout 0", "bus_send.py dell --from me --timeout 0"])
def test_without_a_stderr_nothing_else_comes_on_stdout(line, home):
    with Scripted(page(503, HTML)) as server:
        done = subprocess.run(f'echo hi | "{sys.executable}" -I -S "{ROOT}"/{line} 2>&-', shell=True, timeout=PATIENCE,
                              env={**os.environ, "AGENT_BUS_URL": server.url}, capture_output=True)  # fmt: skip
        assert (done.returncode, done.stdout) == (75, b"")


def test_an_attempt_that_no_float_holds_ends_no_worker():
    assert bus_recv.pause_after(-(10**400)) == bus_recv.FIRST_PAUSE


# ── What cannot be seen ──────────────────────────────────────────────────────────────────────────────────────────────


def test_the_bus_the_clients_and_the_integrations_hide_the_same():
    import session

    same = {module.HIDDEN.pattern for module in (bus_recv, bus_send, bus_server, bus_join)}
    assert len(same) == 1  # and not the patterns: they may hold surrogates, which pytest cannot print
    assert bus_recv.HIDDEN.pattern in session.UNSEEN.pattern


def test_what_must_be_hidden_is_and_letters_are_not():
    named = ("VARIATION SELECTOR", "HANGUL FILLER", "HANGUL CHOSEONG FILLER", "HANGUL JUNGSEONG FILLER",
             "HALFWIDTH HANGUL FILLER", "BRAILLE PATTERN BLANK", "INTERLINEAR ANNOTATION")  # fmt: skip
    for code in range(sys.maxunicode + 1):
        character = chr(code)
        name = unicodedata.name(character, "")
        if any(one in name for one in named) or 0x206A <= code <= 0x206F:
            assert bus_recv.HIDDEN.match(character), name
        elif unicodedata.category(character) in ("Ll", "Lu", "Nd") or "HANGUL SYLLABLE" in name:
            assert not bus_recv.HIDDEN.match(character), name


def test_nothing_hidden_reaches_a_terminal_through_an_error():
    hidden = "a\u3164b\ufe0fc\u2800d"
    with Scripted(answer({"error": hidden}, status=400)) as server:
        for code, out, err in (send(server), recv(server)):
            assert code == 1 and out == "" and not bus_recv.HIDDEN.search(err.rstrip("\n")), err
    with Scripted(answer({"error": hidden}, status=400), health=answer({"error": hidden}, status=403)) as server:
        _, out, _ = run("tools/bus_doctor.py", env={"AGENT_BUS_URL": server.url})
        assert "\\u3164" in out and not any(map(bus_recv.HIDDEN.search, out.split("\n")))


def test_a_session_asks_who_listens_on_its_own_channel():
    """A bus may have more names than one page, and most of them may be elsewhere or asleep."""
    import session

    agents = [{"name": "ann", "channel": "swarm", "online": True}, {"name": "bob", "channel": "swarm", "online": False}]
    with Scripted(answer({"ok": True, "agents": agents})) as server:
        assert session.heard_elsewhere(server.url, "swarm", ["ann", "bob", "carl"], {}) == {"ann"}
        assert server.asked[-1].query == {"channel": "swarm", "online": "true", "name": "ann,bob,carl"}


# ── A dead address first ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def two_addresses(monkeypatch):
    """A function: the name bus.example has a dead address first, then this server's."""
    real, hole, knocking = socket.getaddrinfo, socket.socket(), []
    hole.bind(("127.0.0.2", 0))
    hole.listen(0)
    for _ in range(4):  # its backlog is full: it answers nothing any more
        knocking.append(socket.socket())
        knocking[-1].setblocking(False)
        with contextlib.suppress(BlockingIOError):
            knocking[-1].connect(hole.getsockname())
    wait_until(lambda: select.select([], knocking, [], 0)[1])  # with one of them it is full

    def make(url):
        live = ("127.0.0.1", int(url.rpartition(":")[2]))

        def resolve(host, port, *arguments, **options):
            if host != "bus.example":
                return real(host, port, *arguments, **options)
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", place) for place in (hole.getsockname(), live)]

        monkeypatch.setattr(socket, "getaddrinfo", resolve)
        return f"http://bus.example:{live[1]}"

    yield make
    for sock in (hole, *knocking):
        sock.close()


def test_a_dead_address_costs_a_quarter_of_a_second(two_addresses, home):
    with Scripted(stored(), mail(message(1))) as server:
        url, began = two_addresses(server.url), time.monotonic()
        bus_send.send("dell", "hi", url=url, sender="spark")
        assert 0.2 < time.monotonic() - began < in_time(1)
        assert next(reader(url).messages())["id"] == "1"
        assert time.monotonic() - began < in_time(2.5)


def test_the_doctor_goes_to_the_address_that_answers(two_addresses, monkeypatch, capsys):
    import bus_doctor

    with Scripted(mail(bus=None), bus=None) as server:
        monkeypatch.setenv("AGENT_BUS_URL", two_addresses(server.url))
        monkeypatch.setenv("AGENT_BUS_PLAIN_HTTP", "1")
        began = time.monotonic()
        bus_doctor.main(["--hold", "0"])
        assert "ok    tcp" in capsys.readouterr().out and time.monotonic() - began < in_time(5)


def test_an_address_that_refuses_is_passed_at_once_and_a_slow_one_gets_more_time(monkeypatch):
    waits = []

    def create(place, timeout):
        waits.append((place[0], timeout))
        if place[0] == "127.0.0.3":
            raise ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")
        if len([one for one in waits if one[0] == place[0]]) < 3:
            raise socket.timeout("timed out")
        sock = socket.socket()
        sock.connect(("127.0.0.1", place[1]))
        return sock

    places = [(2, 1, 6, "", (f"127.0.0.{n}", 0)) for n in (3, 4, 5)]
    with Scripted(stored()) as server:
        port = int(server.url.rpartition(":")[2])
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [(*one[:4], (one[4][0], port)) for one in places])
        monkeypatch.setattr(socket, "create_connection", create)
        with bus_recv.dial(("bus.example", port), 10) as sock:
            assert sock.gettimeout() == 10
    assert [(host[-1], timeout) for host, timeout in waits] == [
        ("3", 0.25), ("4", 0.25), ("5", 0.25), ("3", 1.0), ("4", 1.0), ("5", 1.0), ("3", 3.0), ("4", 3.0)
    ]  # fmt: skip


# ── Logins and tokens ────────────────────────────────────────────────────────────────────────────────────────────────

LOGIN = "Basic bWU6cCB3"  # me:p w


def test_a_login_of_the_proxy_is_sent_with_every_request(monkeypatch, home):
    with Scripted(stored(), mail(message(1))) as proxy:
        monkeypatch.setenv("http_proxy", proxy.url.replace("//", "//me:p%20w@"))
        bus_send.send("dell", "hi", url="http://bus.example:8080", sender="spark")
        assert next(reader("http://bus.example:8080").messages())["id"] == "1"
        env = {"AGENT_BUS_URL": "http://bus.example:8080", "AGENT_NAME": "spark"}
        run("tools/bus_doctor.py", env=env)
        run("tools/bus_file.py", "get", "0" * 64, "-o", str(home) + "x", "--timeout", "0", env=env)
        assert len(proxy.asked) > 5 and {one.headers.get("proxy-authorization") for one in proxy.asked} == {LOGIN}
        assert any(one.target.endswith("/blob/" + "0" * 64) for one in proxy.asked)


def test_a_login_of_the_proxy_opens_the_tunnel(monkeypatch, home):
    with Scripted(page(403, HTML)) as proxy:
        monkeypatch.setenv("https_proxy", proxy.url.replace("//", "//me:p%20w@"))
        with pytest.raises(bus_send.Unreachable):
            bus_send.send("dell", "secret", url="https://bus.example", sender="spark", patience=0)
        assert proxy.asked[0].method == "CONNECT" and proxy.asked[0].headers["proxy-authorization"] == LOGIN


@pytest.mark.parametrize("program", [
    ["bus_send.py", "dell", "--from", "spark"], ["bus_recv.py", "dell", "--once"], ["tools/bus_log.py"],
    ["tools/bus_search.py", "hi"], ["tools/bus_redact.py", "660ba678a1b40"],
    ["tools/bus_work.py", "q", "--exec", "true"], ["tools/bus_file.py", "get", "0" * 64],
    ["tools/bus_outbox.py", "dell", "--from", "spark"], ["tools/bus_doctor.py"],
    ["integrations/claude_code/bus_hook.py", "--name"],
], ids=lambda program: program[0])  # fmt: skip
@pytest.mark.parametrize("token", ["", TOKEN])
def test_a_login_in_the_url_is_refused_in_words_and_not_shown(program, token, home, tmp_path):
    env = {"AGENT_BUS_URL": "http://me:s3cr3t/#?@10.0.0.5", "AGENT_BUS_TOKEN": token, "CLAUDE_PID": str(os.getpid())}
    code, out, err = run(*program, stdin=b"hi", env=env)
    assert code in (1, 2) and "has a login" in out + err and "s3cr3t" not in out + err
    assert not [path for path in tmp_path.rglob("*") if "s3cr3t" in path.name]


@pytest.mark.parametrize("client", [bus_send, bus_recv])
@pytest.mark.parametrize("variable", ["AGENT_BUS_TOKEN", "AGENT_BUS_TOKEN_FILE"])
@pytest.mark.parametrize("content", [f"\ufeff{TOKEN}\r\n", f"\n \n{TOKEN}", f"\ufeff\r\n\r\n{TOKEN}\r\n\r\n"])
def test_a_token_with_a_byte_order_mark_or_empty_lines_is_read(client, variable, content, home, monkeypatch, tmp_path):
    path = tmp_path / "token"
    path.write_bytes(content.encode())
    path.chmod(0o600)
    monkeypatch.setenv(variable, str(path) if variable.endswith("FILE") else content)
    assert client.credentials("https://bus.example") == {"Authorization": f"Bearer {TOKEN}"}


@pytest.mark.parametrize("content", [f"{TOKEN}\n{TOKEN}".encode(), f"x: {TOKEN}".encode(), TOKEN.encode("utf-16")])
def test_a_file_that_holds_more_than_a_token_is_refused(content, home, monkeypatch, tmp_path):
    (tmp_path / "token").write_bytes(content)
    (tmp_path / "token").chmod(0o600)
    monkeypatch.setenv("AGENT_BUS_TOKEN_FILE", str(tmp_path / "token"))
    with pytest.raises(ValueError, match="no token"):
        bus_recv.credentials("https://bus.example")


# ── A file system without locks ──────────────────────────────────────────────────────────────────────────────────────

LOCKLESS = """
import errno, fcntl, runpy, sys
def flock(*_):
    raise OSError(errno.ENOLCK, "No locks available")
fcntl.flock = flock
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("program", [
    ["bus_recv.py", "dell", "--once"], ["tools/bus_outbox.py", "dell", "--from", "spark"],
    ["integrations/claude_code/bus_hook.py", "--name"],
], ids=lambda program: program[0])  # fmt: skip
def test_where_locks_do_not_work_it_says_so(program, home):
    with Scripted(mail(message(1))) as server:
        env = {**os.environ, "AGENT_BUS_URL": server.url, "CLAUDE_PID": str(os.getpid())}
        command = [sys.executable, "-c", LOCKLESS, str(ROOT / program[0]), *program[1:]]
        done = subprocess.run(command, input="hi", env=env, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode in (1, 2) and f"locks do not work in {home}" in done.stderr
    assert "set AGENT_BUS_STATE_DIR" in done.stderr and "Traceback" not in done.stderr


def test_a_session_hears_that_locks_do_not_work(home):
    hook = str(ROOT / "integrations/claude_code/bus_hook.py")
    event = json.dumps({"hook_event_name": "SessionStart", "session_id": "s1", "source": "startup"})
    with Scripted(mail(message(1))) as server:
        env = {**os.environ, "AGENT_BUS_URL": server.url, "AGENT_NAME": "dell"}
        command = [sys.executable, "-c", LOCKLESS, hook, "--format", "claude"]
        done = subprocess.run(command, input=event, env=env, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0 and "locks do not work in" in done.stdout


def test_a_lock_of_another_process_is_no_fault(home, tmp_path):
    with open(tmp_path / "lock", "w+") as ours, open(tmp_path / "lock", "w+") as theirs:
        fcntl.flock(ours, fcntl.LOCK_EX)
        assert bus_recv.try_lock(theirs, str(tmp_path / "lock")) is False


@pytest.mark.parametrize("client", [bus_send, bus_recv])
def test_a_deadline_that_nobody_cancels_keeps_no_process_alive(client):
    """A signal may come when the timer runs, and before anything would cancel it: then a reader ended 38 s late."""
    ours, its = socket.socketpair()
    with ours, its, client.hung_up_after(60, ours):
        timers = [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]
        assert timers and all(timer.daemon for timer in timers)
