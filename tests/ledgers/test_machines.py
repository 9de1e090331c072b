"""Which machine of PostgreSQL a front talks to, and for how long: some are frozen, or standbys, or crash."""
import contextlib
import os
import socket
import threading
import time

import pytest

from ledgers import Unknown
from tests.kit import postgres
from tests.kit.processes import free_port, in_time, wait_until

pytestmark = pytest.mark.skipif(bool(postgres.reason_to_skip()), reason=str(postgres.reason_to_skip()))

if not postgres.reason_to_skip():
    from psycopg.conninfo import conninfo_to_dict

    import ledgers.postgres
    from ledgers.postgres import Postgres, connect, exchange


@pytest.fixture(scope="module")
def server():
    with postgres.Postgres() as server:
        yield server


@pytest.fixture
def opened():
    """opened(url): a ledger that is closed after the test."""
    with contextlib.ExitStack() as stack:

        def make(url):
            ledger = Postgres(url, single=True)
            stack.callback(ledger.close)
            return ledger

        yield make


@pytest.fixture
def silent():
    """The ports of three machines that take connections and say nothing."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(3)]
        yield [each.getsockname()[1] for each in sockets]


def url_of(*places):
    """Of machines: each a port of this machine, or a folder with the socket of a server."""
    hosts = ",".join("127.0.0.1" if isinstance(each, int) else str(each) for each in places)
    ports = ",".join(str(each) if isinstance(each, int) else "5432" for each in places)
    return f"postgresql://postgres@/postgres?host={hosts}&port={ports}"


def test_machines_that_say_nothing_have_one_deadline_together(silent, opened):
    ledger = opened(url_of(*silent))
    for call in (
        lambda end: ledger.append(b"x", "x", end),
        lambda end: ledger.read(0, 1, end),
        lambda end: ledger.trim(1, 1, end),
    ):
        began = time.monotonic()
        with pytest.raises(Unknown, match="did not answer in time"):
            call(began + 0.5)
        assert 0.4 < time.monotonic() - began < in_time(1.9)  # one machine of them would have 2 s of psycopg


def test_no_call_waits_for_a_name_server_longer_than_its_deadline(opened, monkeypatch):
    """Also if PostgreSQL is well. An address that has changed is learned meanwhile."""
    ledger, addresses, asked, answers = opened(url_of("a.example", "b.example")), {}, [], threading.Event()

    def look_up(name, port, **_):
        assert answers.wait(60)
        if name not in addresses:
            raise OSError("no such name")
        return [(0, 0, 0, "", (addresses[name], port))]

    def connect(conninfo, deadline):
        asked.append(conninfo_to_dict(conninfo)["hostaddr"])
        raise Unknown("it is down")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr(ledgers.postgres, "connection_to", connect)

    def tries(why, seconds=1):
        began = time.monotonic()
        del asked[:]
        with pytest.raises(Unknown, match=why):
            ledger.open(began + seconds)
        assert time.monotonic() - began < in_time(seconds + 1)
        return sorted(asked)

    assert tries("has not answered in time", 0.2) == []
    answers.set()
    wait_until(lambda: not ledger.looking.locked())
    assert tries("failed to resolve host") == []
    addresses.update({"a.example": "10.0.0.7", "b.example": "10.0.0.8"})
    assert tries("it is down") == ["10.0.0.7", "10.0.0.8"]
    wait_until(lambda: not ledger.looking.locked())
    answers.clear()
    assert tries("it is down") == tries("it is down") == ["10.0.0.7", "10.0.0.8"], "they are known, and nobody waits"
    addresses["a.example"] = "10.0.0.9"
    answers.set()
    wait_until(lambda: tries("it is down") == ["10.0.0.8", "10.0.0.9"])
    del addresses["b.example"]
    for _ in range(2):
        wait_until(lambda: not ledger.looking.locked())
        assert tries("it is down") == ["10.0.0.8", "10.0.0.9"], "the name server has lost one of them"


def test_a_call_waits_for_the_first_look_up_of_another_one(opened, monkeypatch):
    """A front begins to listen and to read at the same time."""

    def connect(conninfo, deadline):
        raise Unknown("it is down")

    ledger = opened(url_of("127.0.0.1"))
    monkeypatch.setattr(ledgers.postgres, "connection_to", connect)
    ledger.looking.acquire()
    threading.Timer(0.1, ledger.look_up).start()
    with pytest.raises(Unknown, match="it is down"):
        ledger.open(time.monotonic() + in_time(5))


def test_a_machine_that_answers_is_found_behind_several_that_say_nothing(server, silent, opened):
    """In one call: who asks again begins a new one, with the same deadline."""
    connect(server.url, single=True).close()
    ledger = opened(url_of(*silent, server.folder))
    position, _ = ledger.append(b"x", "behind", time.monotonic() + 4)
    told = []
    ledger.listen(told.append)
    wait_until(lambda: told or not ledger.append(b"x", str(time.monotonic()), time.monotonic() + 4))
    assert position >= 1 and ledger.about()[0].startswith(str(server.folder))


def test_a_machine_that_said_nothing_is_asked_last_by_the_next_connection(server, opened):
    """As that of a listener, or of who removes entries, beside one that works."""
    connect(server.url, single=True).close()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(0)
        ledger = opened(url_of(silent.getsockname()[1], server.folder))
        for _ in range(2):
            _, connection = ledger.open(time.monotonic() + 4)
            connection.close()
        silent.accept()[0].close()
        with pytest.raises(BlockingIOError):
            silent.accept()


def test_the_last_machine_does_not_take_the_time_of_those_that_refused(silent, opened):
    """One of them may lead in the next moment, and only a further connection sees it."""
    ledger = opened(url_of(*(free_port() for _ in range(9)), silent[0]))
    began = time.monotonic()
    with pytest.raises(Unknown, match="did not answer in time"):
        ledger.open(began + 20)
    assert 1.9 < time.monotonic() - began < 10


def test_a_start_without_an_answer_is_given_up(silent, monkeypatch):
    from bus_server import Unusable

    monkeypatch.setattr(ledgers.postgres, "CONNECT", 0.2)
    began = time.monotonic()
    with pytest.raises(Unusable, match="cannot use the ledger: .*in time"):
        connect(url_of(*silent), single=True)
    assert time.monotonic() - began < 5


@pytest.fixture
def twice(server, tmp_path):
    """The folder of the socket under two names: two machines for who connects."""
    connect(server.url, single=True).close()
    other = f"{server.folder}-other"
    os.symlink(server.folder, other)
    yield str(server.folder), other
    os.unlink(other)


def test_after_a_failure_other_machines_are_asked_first(twice, opened):
    ledger, led = opened(url_of(*twice)), []
    for number in range(4):
        ledger.append(b"x", f"failure {number}", time.monotonic() + 10)
        led.append(ledger.about()[0].partition(":")[0])
        if number != 1:  # without a failure it stays
            ledger.drop()
    assert led == [twice[0], twice[1], twice[1], twice[0]]


def test_who_listens_leaves_a_machine_with_the_other_connection(server, twice, opened):
    """A machine that is frozen keeps its connections, and tells nothing."""
    ledger, told = opened(url_of(*twice)), []
    ledger.listen(told.append)
    asked = "SELECT pid FROM pg_stat_activity WHERE query LIKE 'LISTEN%'"
    listening = lambda: len(found := server.ask(asked)) == 1 and found  # noqa: E731
    before = wait_until(listening)
    position, _ = ledger.append(b"x", "before", time.monotonic() + 10)
    wait_until(lambda: position in told)
    ledger.drop()
    wait_until(lambda: listening() not in (False, before))
    position, _ = ledger.append(b"x", "after", time.monotonic() + 10)
    wait_until(lambda: position in told)


def test_who_listens_is_told_again_after_a_crash_of_the_server(server, twice, opened):
    ledger, told = opened(server.url), []
    ledger.listen(told.append)
    wait_until(lambda: told or not ledger.append(b"x", str(time.monotonic()), time.monotonic() + 10))
    server.crash()
    with pytest.raises(Unknown):
        ledger.append(b"x", "while it is away", time.monotonic() + 1)
    server.start()
    told.clear()
    wait_until(lambda: told or not ledger.append(b"x", str(time.monotonic()), time.monotonic() + 10))


def test_who_listens_waits_between_two_attempts(opened, silent):
    ledger, done = opened(url_of(silent[0])), []

    class Closed(threading.Event):
        def wait(self, seconds):
            done.append(seconds)

    def refuse(deadline):
        done.append("asked")
        if len(done) >= 6:
            ledger.closed.set()
        raise Unknown("away")

    ledger.closed, ledger.open = Closed(), refuse
    ledger.hear(lambda _: None)
    assert done == ["asked", ledgers.postgres.WAKE] * 4


def test_a_standby_is_passed_over_and_alone_it_is_refused(server):
    from bus_server import Unusable

    standby = postgres.Postgres()
    (standby.data / "standby.signal").touch()
    with standby:
        connect(url_of(standby.folder, server.folder), single=True).close()
        with pytest.raises(Unusable, match="read-only|read-write"):
            connect(standby.url, single=True)
        with pytest.raises(Unusable, match="this server is a standby: give the primary"):
            connect(f"{standby.url}&target_session_attrs=any", single=True)


def test_a_connection_over_a_network_ends_when_its_machine_is_gone(opened):
    """Who listens sends nothing, and would not notice."""
    port = free_port()
    with postgres.Postgres() as server:
        server.stop()
        server.url += f"&port={port}"
        server.start(listen_addresses="127.0.0.1", port=port)
        _, connection = opened(url_of(port)).open(time.monotonic() + 10)
        with contextlib.closing(connection), socket.socket(fileno=os.dup(connection.fileno())) as its:
            assert its.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            named = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
            assert [its.getsockopt(socket.IPPROTO_TCP, each) for each in named] == [5, 2, 3]


class Scripted:
    """A connection whose server reads nothing more until we have read what it says: both would wait for ever."""

    def __init__(self):
        self.ours, self.its = socket.socketpair()
        self.ours.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                self.ours.send(b"x" * 65536)
        self.its.send(b"a notice")
        self.socket, self.read = self.ours.fileno(), b""

    def flush(self):
        return not self.read

    def consume_input(self):
        self.read += self.ours.recv(100)

    def is_busy(self):
        return False

    def get_result(self):
        return None


def test_what_the_server_says_meanwhile_is_read_and_no_answer_at_all_is_unknown():
    server = Scripted()
    with pytest.raises(Unknown, match="closed the connection"):
        exchange(server, lambda: None, time.monotonic() + 10)
    assert server.read == b"a notice"
    server.ours.close()
    server.its.close()
