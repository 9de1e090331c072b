"""A bus with several URLs: when one does not answer, a client goes on at the next; nothing is lost or twice."""
import contextlib
import json
import shutil
import socket
import threading
import time

import pytest

import bus_recv
import bus_send
from integrations.claude_code import quick
from tests.clients.test_clients import Clock, cursors, program, reader, refusing, run
from tests.clients.test_configuration import TOKEN, tokens, whole
from tests.kit.bad_servers import FAULTS, Scripted, answer, mail, message, reset, silence, stored
from tests.kit.listening import Listener
from tests.kit.peers import log_of
from tests.kit.processes import PATIENCE, Server, in_time, wait_until

pytestmark = pytest.mark.usefixtures("home")

LISTENER = pytest.mark.skipif(not (shutil.which("curl") and shutil.which("jq")), reason="bus_listener.sh needs them")
NOT_READY = answer({"error": "this front cannot reach its ledger"}, "Retry-After: 60", status=503)


class Door:
    """A further URL of a bus: it passes connections on. `close` breaks those that are open, as a kill would."""

    def __init__(self, bus, port=0):
        self.bus, self.open, self.lock = bus, [], threading.Lock()
        self.listener = socket.create_server(("127.0.0.1", port), backlog=64)
        self.port = self.listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self):
        with contextlib.suppress(OSError):  # until the listener is closed
            while True:
                pair = [self.listener.accept()[0], socket.create_connection(("127.0.0.1", self.bus.port))]
                with self.lock:
                    self.open += pair
                for source, sink in (pair, pair[::-1]):
                    threading.Thread(target=self._pass, args=[source, sink], daemon=True).start()

    def _pass(self, source, sink):
        with contextlib.suppress(OSError):
            while part := source.recv(65536):
                self.carry(sink, part)
            sink.shutdown(socket.SHUT_WR)

    def carry(self, sink, part):
        sink.sendall(part)

    def close(self):
        with contextlib.suppress(OSError):  # it was closed before
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        with self.lock:
            for sock in self.open:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class Mute(Door):
    """It passes requests on, and breaks off before the answer."""

    def carry(self, sink, part):
        if part.startswith(b"HTTP/"):
            raise OSError
        sink.sendall(part)

    def _pass(self, source, sink):
        super()._pass(source, sink)
        for sock in (source, sink):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)


@pytest.fixture(autouse=True)
def nothing_failed(monkeypatch):
    for client in (bus_send, bus_recv):
        monkeypatch.setattr(client, "FAILURES", {})


@pytest.fixture
def unreachable():
    """The URL of a machine that is gone: it does not even refuse. The queue of this listener is full."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener, contextlib.ExitStack() as stack:
        for _ in range(4):
            sock = stack.enter_context(socket.socket())
            sock.setblocking(False)
            sock.connect_ex(listener.getsockname())
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def both(*doors):
    return ",".join(getattr(door, "url", door) for door in doors)


def seconds(attempt):
    began = time.monotonic()
    attempt()
    return time.monotonic() - began


# ── Sending ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("gone", [False, True])
def test_a_send_takes_the_next_url_at_once(gone, bus, unreachable):
    dead = unreachable if gone else refusing()
    warned = []
    for urls in (both(dead, bus), both(bus, dead)):
        bus_send.FAILURES.clear()
        assert seconds(lambda: bus_send.send("dell", "hi", url=urls, sender="spark", warn=warned.append)) < 0.5  # noqa: B023
    assert len(log_of(bus, "dell")) == 2 and not warned


def test_a_url_that_failed_is_not_the_first_again(bus, unreachable):
    urls = both(unreachable, bus)
    bus_send.send("dell", "hi", url=urls, sender="spark")
    assert bus_send.FAILURES.get(unreachable) == 1
    assert seconds(lambda: bus_send.send("dell", "hi", url=urls, sender="spark")) < 0.2


@pytest.mark.parametrize("fault", [NOT_READY, FAULTS["502 from a proxy"], reset])
def test_what_is_not_an_answer_of_the_bus_leads_to_the_next_url_with_the_same_key(fault):
    clock = Clock()
    with Scripted(fault) as sick, Scripted(stored()) as well, pytest.MonkeyPatch.context() as patch:
        patch.setattr(bus_send, "time", clock)
        bus_send.send("dell", "hi", url=both(sick, well), sender="spark")
        (first,), (second,) = sick.asked, well.asked
        assert first.body == second.body and first.json["key"] and clock.slept == []


def test_a_refusal_is_the_bus_s_own_word_and_no_other_url_is_asked():
    with Scripted(answer({"error": "to is required"}, status=400)) as first, Scripted(stored()) as second:
        with pytest.raises(bus_send.Refused, match="to is required"):
            bus_send.send("", "hi", url=both(first, second), sender="spark")
        assert not second.asked


def test_a_send_whose_answer_was_lost_is_stored_once(bus):
    with Mute(bus) as mute:
        found = bus_send.send("dell", "hi", url=both(mute, bus), sender="spark")
    assert found["duplicate"] is True and log_of(bus, "dell") == ["hi"]


def test_without_any_url_the_usual_words_name_all():
    urls = both(refusing(), refusing())
    env = {"AGENT_BUS_URL": urls, "AGENT_NAME": "ann"}
    code, out, err = run("bus_send.py", "dell", "hi", "--timeout", "0", env=env)
    assert (code, out) == (75, "")
    assert err.startswith(f"bus_send: no bus at {urls} (Connection refused). Is bus_server running there, ")
    code, out, err = run("bus_recv.py", "dell", "--timeout", "0", env={"AGENT_BUS_URL": urls})
    assert (code, out) == (75, "") and f"no bus at {urls} (Connection refused)." in err


def test_it_pauses_after_a_whole_round_and_only_as_long_as_one_of_them_asks_for(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(bus_send, "time", clock)
    dead, warned = refusing(), []
    with Scripted(NOT_READY, NOT_READY, stored()) as server:
        bus_send.send("dell", "hi", url=both(server, dead), sender="spark", warn=warned.append)
        assert len(server.asked) == 3 and len(clock.slept) == 2 and max(clock.slept) <= 2
    assert "503: this front cannot reach its ledger; Connection refused" in warned[0]


def test_a_name_without_an_address_does_not_end_the_patience_for_the_others(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(bus_send, "time", clock)

    def lookup(host, *rest, **more):
        if host == "nowhere.example":
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return real(host, *rest, **more)

    real = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    with Scripted(reset, stored()) as server:
        bus_send.send("dell", "hi", url=both(server, "http://nowhere.example"), sender="spark")
        assert len(server.asked) == 2
    with pytest.raises(bus_send.Unreachable):
        bus_send.send("dell", "hi", url="http://nowhere.example,http://nowhere.example:81", sender="spark")
    assert len(clock.slept) == 1


def test_after_a_silent_url_the_next_attempt_begins_at_the_other(monkeypatch):
    monkeypatch.setattr(bus_send, "GRACE_SECONDS", 1.0)
    monkeypatch.setattr(bus_send, "FIRST_PAUSE", 0.001)
    with Scripted(silence) as silent, Scripted(stored()) as well:
        bus_send.send("dell", "hi", url=both(silent, well), sender="spark")
        assert len(silent.asked) == len(well.asked) == 1


@pytest.mark.parametrize("urls, error", [
    ("http://a:1,b:2", "'b:2' is not the URL of a bus"), ("http://a:1,", "'' is not the URL of a bus"),
    ("http://a:1,http://b:x", "'http://b:x' is not the URL"), ("http://a:1,http://", "'http://' is not the URL"),
    ("http://a:1, http://b:2", "' http://b:2' is not the URL of a bus"), ("http://a:1,http://me:pw@b:2", "has a login"),
])  # fmt: skip
def test_a_url_that_is_wrong_is_told_even_if_the_one_before_works(urls, error, tmp_path):
    with Scripted(stored()) as server, pytest.raises(ValueError, match=error) as told:
        bus_send.send("dell", "hi", url=urls.replace("http://a:1", server.url), sender="spark")
    assert "pw" not in str(told.value) and not server.asked


# ── Reading ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_reader_goes_on_at_the_other_url_with_its_cursor(bus, home):
    with Door(bus) as one, Door(bus) as other:
        process = program("bus_recv.py", "dell", "--json", env={"AGENT_BUS_URL": both(one, other)})
        lines = []
        threading.Thread(target=lambda: lines.extend(process.stdout), daemon=True).start()
        for number, broken in enumerate((one, other, None)):
            bus_send.send("dell", f"{number}", url=bus.url, sender="spark")
            wait_until(lambda: len(lines) > number)  # noqa: B023
            if broken:
                broken.close()
            if broken is other:  # the first one is started again, at its old address
                one = Door(bus, one.port)
        process.terminate()
        _, err = process.communicate(timeout=PATIENCE)
    one.close()
    assert [json.loads(line)["msg"] for line in lines] == ["0", "1", "2"]
    assert len(cursors(home)) == 1, err


def test_a_reader_whose_answer_was_lost_gets_it_at_the_other_url_within_a_round():
    with Scripted(mail(message(1)), reset) as one, Scripted(mail(message(2))) as other:
        messages = (made := reader(both(one, other))).messages()
        assert [next(messages)["id"], next(messages)["id"]] == ["1", "2"]
        assert made.warned == [] and made.clock.slept == []
        assert other.polls[0].query["since"] == one.polls[1].query["since"]  # the same place, and no /healthz again
        assert len(other.asked) == 1


def test_a_reader_says_once_that_no_url_answers():
    with Scripted(mail(message(1)), reset, reset, reset, mail(message(2))) as one:
        dead = refusing()
        messages = (made := reader(both(one, dead))).messages()
        assert [next(messages)["id"], next(messages)["id"]] == ["1", "2"]
        assert len([line for line in made.warned if "trying again" in line]) == 1, made.warned
        assert made.warned[0].startswith(f"no bus at {one.url},{dead} (")


@LISTENER
def test_the_listener_goes_on_at_the_other_url(bus, tmp_path):
    with Door(bus) as one, Door(bus) as other:
        listener = Listener(tmp_path / "home", both(one, other), BLOCK="1").start()
        try:
            for number, door in enumerate((one, other)):
                bus_send.send("spark", f"{number}", url=bus.url, sender="dell")
                listener.wait_for_line(number + 1)
                assert not listener.said()
                door.close()
            listener.wait_to_say("trying again")
            assert f"no answer from {both(one, other)} (curl" in listener.said()[0]
            one = Door(bus, one.port)
            bus_send.send("spark", "2", url=bus.url, sender="dell")
            listener.wait_for_line(3)
            assert [each["msg"] for each in listener.messages()] == ["0", "1", "2"] and not listener.remarks()
        finally:
            listener.stop()
            one.close()


@LISTENER
@pytest.mark.parametrize("urls, error", [
    ("http://127.0.0.1:1,b:2", "must start with http"), ("http://127.0.0.1:1,", "must start with http"),
    ("http://127.0.0.1:1,http://me:pw@b", "has a login"), ("http://127.0.0.1:1,http://b", "in the clear"),
])  # fmt: skip
def test_the_listener_checks_each_url(urls, error, tmp_path):
    listener = Listener(tmp_path / "home", urls, AGENT_BUS_TOKEN=TOKEN).start()
    assert listener.process.wait(PATIENCE) == 2 and error in listener.said()[0]


# ── The configuration file ───────────────────────────────────────────────────────────────────────────────────────────


@LISTENER
@pytest.mark.parametrize("script", ["bus_send.py", "bus_listener.sh"])
@pytest.mark.parametrize("given, known", [
    (None, True), ("{one},{two}", True), ("{two}/,{one}", True), ("{two}", True),
    ("{two},{other}", False), ("{other}", False),
])  # fmt: skip
def test_the_token_of_a_file_is_for_all_urls_of_that_file_and_for_no_other(script, given, known, configure, tmp_path):
    with Scripted(NOT_READY) as one, Scripted(stored(), mail()) as two, Scripted(stored()) as other:
        configure(whole(one, AGENT_BUS_URL=both(one, two)))
        urls = given and given.format(one=one.url, two=two.url, other=other.url)
        env = {"AGENT_NAME": "spark", **({"AGENT_BUS_URL": urls} if urls else {})}
        if script == "bus_send.py":
            run(script, "dell", "hi", "--timeout", "1", env=env)
        else:
            listener = Listener(tmp_path / "home", "", **env)
            listener.env["XDG_CONFIG_HOME"] = str(tmp_path / "config")
            listener.start()
            wait_until(lambda: two.asked or other.asked)
            listener.stop()
        assert two.asked or other.asked
        assert tokens(two) | tokens(one) | tokens(other) == {f"Bearer {TOKEN}" if known else None}


def test_a_token_in_the_clear_is_refused_whichever_url_has_it(monkeypatch):
    monkeypatch.setenv("AGENT_BUS_TOKEN", TOKEN)
    with Scripted(stored()) as server, pytest.raises(ValueError, match="in the clear"):
        bus_send.send("dell", "hi", url=both(server, "http://bus.example"), sender="spark")
    assert not server.asked


# ── Tools and hooks ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_hook_that_meets_a_silent_url_still_asks_the_other_in_its_time(monkeypatch):
    """Each has its part. The one that answers gets more, so that a machine that stands still fails nothing."""
    given, get_at = [], quick.get_at

    def note(url, path, seconds, *more):
        given.append((url, seconds))
        return get_at(url, path, seconds if url == silent.url else PATIENCE, *more)

    monkeypatch.setattr(quick, "get_at", note)
    counts = answer({"unread": 0, "now": 1.5, "bus": "b1"})
    with Scripted(silence) as silent, Scripted(counts) as well:
        urls, began = both(silent, well), time.monotonic()
        assert quick.get(urls, "/digest", 0.2)["bus"] == "b1" and time.monotonic() - began < in_time(1)
        assert given == [(silent.url, 0.1), (well.url, 0.1)]
        assert quick.get(urls, "/digest", 0.2)["bus"] == "b1" and len(silent.asked) == 1


def test_the_doctor_looks_at_each_url_and_names_the_one_that_fails(bus, tmp_path):
    dead = refusing()
    with Door(bus) as door:
        code, out, _ = doctor(door, bus)
        assert code == 0 and "FAIL" not in out and out.count("ok    send") == 2
    code, out, _ = doctor(dead, bus)
    assert code == 1 and out.count("ok    send") == 1 and f"ok    url    {dead}, from AGENT_BUS_URL" in out
    assert told(out) == [f"1 of 2 fail: {dead}", f"until that is mended, the clients use {bus.url}"]
    code, out, _ = doctor(dead, dead)
    assert code == 1 and told(out) == [f"2 of 2 fail: {dead}, {dead}", "the clients reach no bus"]


def test_the_doctor_finds_urls_of_two_buses(bus, tmp_path):
    with Server(tmp_path / "other.db") as other:
        code, out, _ = doctor(bus, other)
    assert code == 1 and told(out) == ["they are of 2 buses", "AGENT_BUS_URL may have several URLs only of one bus"]


def doctor(*urls):
    return run("tools/bus_doctor.py", "--hold", "0", env={"AGENT_BUS_URL": both(*urls), "AGENT_NAME": "spark"})


def told(out):
    """What the last two lines say: of all URLs together, and what to do."""
    found, advice = out.splitlines()[-2:]
    return [found.partition("FAIL  urls   ")[2], advice.partition(" -> ")[2]]


def test_a_file_is_stored_through_the_url_that_works(bus, tmp_path):
    (tmp_path / "x").write_text("hello")
    env = {"AGENT_BUS_URL": both(refusing(), bus), "AGENT_NAME": "spark"}
    code, _, err = run("tools/bus_file.py", "put", str(tmp_path / "x"), "--to", "dell", env=env)
    assert code == 0, err
    assert len(log_of(bus, "dell")) == 1


@pytest.mark.parametrize("call", [
    "bus_who.py", "bus_inbox.py look dell", "bus_log.py --no-follow", "bus_outbox.py dell hi", "agent_bus.py open",
])  # fmt: skip
def test_every_tool_takes_several_urls(call, bus):
    script, *arguments = call.split()
    urls = both(bus, refusing()) if "open" in call else both(refusing(), bus)
    code, out, err = run(f"tools/{script}", *arguments, env={"AGENT_BUS_URL": urls, "AGENT_NAME": "spark"})
    assert code == (3 if "inbox" in call else 0), err  # 3: nothing is unread
    assert "open" not in call or out == f"{bus.url}/ui/\n"


def test_an_mcp_client_over_http_needs_one_url():
    env = {"AGENT_BUS_URL": "http://a:1,http://b:2", "AGENT_NAME": "spark"}
    code, _, err = run("tools/bus_install.py", "install", "gemini", "--http", "--dry-run", env=env)
    assert code == 2 and "--http takes one URL" in err
