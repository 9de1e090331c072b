"""The way of bytes between a socket and its Connection. Whatever a plain connection does, one with TLS does as well."""
import contextlib
import itertools
import json
import pathlib
import select
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import time
import warnings

import pytest

import bus_server
from bus_server import Listener, tls_context
from tests.kit.clock import Clock
from tests.kit.hostile import GET, HOST, WAITING, a_send, head
from tests.kit.new_keys import FOUND, NewKeys
from tests.kit.peers import invite, run
from tests.kit.processes import PATIENCE, Server, wait_until
from tests.kit.wire import LAST, LATE, a_bus, answers, come_true, heard, statuses

pytestmark = pytest.mark.skipif(not shutil.which("openssl"), reason="openssl makes the certificate")

RESET = struct.pack("ii", 1, 0)  # linger for no time: closing resets
MESSAGE = "m" * 250000


def post(to, message, *fields):
    body = json.dumps({"from": "alice", "to": to, "msg": message}).encode()
    return head("POST /send HTTP/1.1", HOST, f"Content-Length: {len(body)}", *fields, body=body)


def recv(to, *fields, query=""):
    return head(f"GET /recv?to={to}{query} HTTP/1.1", HOST, *fields)


def trusting(authority=None):
    """What a client with TLS needs: with an authority, it looks whom it speaks to."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if authority:
        context.load_verify_locations(authority.file)
    else:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


@pytest.fixture(scope="module")
def certificate(authority):
    return authority.sign("IP:127.0.0.1")


@pytest.fixture(scope="module")
def running(tmp_path_factory, certificate):
    place = tmp_path_factory.mktemp("tls") / "bus.db"
    with Server(place, "--tls-cert", certificate.file, "--tls-key", certificate.key) as bus:
        yield bus


@pytest.fixture
def bus(running, authority):
    """A bus with TLS. It must come out of the test without a word on stderr, and in good health."""
    before = running.log.read_text()
    running.context = trusting(authority)
    yield running
    assert statuses(talk(running, LAST)) == [200]
    assert running.log.read_text() == before, "the server complained on stderr"


def connect(bus, context=None, room=None):
    """`room`: bytes of what it is sent that its system keeps for it, about."""
    peer = socket.socket()
    if room:
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, room)
    peer.settimeout(PATIENCE)
    peer.connect(("127.0.0.1", bus.port))
    return (context or bus.context).wrap_socket(peer, server_hostname="127.0.0.1")


def talk(bus, sent):
    with connect(bus) as peer:
        peer.sendall(sent)
        return heard(peer)


def test_the_help_of_a_bus_with_tls_gives_https_everywhere(bus):
    text = talk(bus, head("GET / HTTP/1.1", HOST, "Connection: close"))
    assert text.count(b"https://") >= 5 and b"http://" not in text


def test_what_is_sent_over_tls_is_received_over_tls(bus):
    assert statuses(talk(bus, post("erin", "hello") + LAST)) == [200, 200]
    (answer, _) = answers(talk(bus, recv("erin") + LAST))
    assert [message["msg"] for message in answer.json()["messages"]] == ["hello"]


def test_a_reader_parked_over_tls_is_woken_by_its_message(bus):
    with connect(bus) as reader:
        reader.sendall(head(GET, HOST) + recv("carl", query="&wait=60") + LAST)
        wait_until(lambda: b'"online": true' in talk(bus, head("GET /agents HTTP/1.1", HOST) + LAST))
        talk(bus, post("carl", "wake up", "Connection: close"))
        _, woken, _ = answers(heard(reader))
    assert [message["msg"] for message in woken.json()["messages"]] == ["wake up"]


def test_a_client_that_goes_on_sending_too_large_a_body_over_tls_receives_the_413(bus):
    with connect(bus) as peer:
        peer.sendall(head("POST /send?from=mallory&to=bob HTTP/1.1", HOST, "Content-Length: 8000000"))
        for _ in range(8):
            peer.sendall(b"a" * 1000000)
        (answer,) = answers(heard(peer))
    assert answer.status == 413


def test_pipelined_answers_come_whole_and_in_order_over_tls_however_late_they_are_read(bus):
    for number in range(5):
        talk(bus, post("dora", f"{number}{MESSAGE}", "Connection: close"))
    with connect(bus, room=4096) as peer:
        peer.sendall((recv("dora") + head("GET /nothing HTTP/1.1", HOST)) * 5 + recv("dora", "Connection: close"))
        wait_until(lambda: statuses(talk(bus, LAST)) == [200])
        found = answers(heard(peer))
    assert [answer.status for answer in found] == [200, 404] * 5 + [200]
    assert all(len(answer.json()["messages"]) == 5 for answer in found[::2])


def test_who_ends_its_side_of_tls_still_hears_every_answer(bus):
    """With a memory in between, because ssl.SSLSocket.unwrap would wait for the other side."""
    coming, going = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = bus.context.wrap_bio(coming, going, server_hostname="127.0.0.1")
    with socket.create_connection(("127.0.0.1", bus.port), PATIENCE) as peer:

        def until_done(step, *arguments):
            while True:
                try:
                    return step(*arguments)
                except ssl.SSLWantReadError:
                    peer.sendall(going.read())
                    part = peer.recv(65536)
                    coming.write(part) if part else coming.write_eof()

        until_done(tls.do_handshake)
        tls.write(a_send("alice") + head(GET, HOST))
        with contextlib.suppress(ssl.SSLWantReadError):
            tls.unwrap()
        wire = b""
        while statuses(wire) != [200, 200]:
            wire += until_done(tls.read, 65536)


@pytest.mark.parametrize("how", ["closes", "resets"])
def test_a_client_that_leaves_before_its_answer_is_no_error(bus, how):
    for _ in range(100):
        with connect(bus) as peer:
            peer.sendall(post("erna", "farewell"))
            if how == "resets":
                peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)


HELLO = bytes.fromhex("160301007a010000760303")  # a ClientHello begins so


@pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.1\r\n\r\n", HELLO, HELLO + bytes(200), bytes(9)],
                         ids=["nothing", "HTTP", "half a hello", "a bad hello", "zeros"])  # fmt: skip
@pytest.mark.parametrize("how", ["closes", "ends", "resets"])
def test_a_handshake_that_breaks_off_is_no_error(bus, sent, how):
    with socket.create_connection(("127.0.0.1", bus.port), PATIENCE) as peer:
        peer.sendall(sent)
        if how == "resets":
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        elif how == "ends":
            with contextlib.suppress(OSError):
                peer.shutdown(socket.SHUT_WR)
                heard(peer)


@pytest.mark.skipif(None in FOUND, reason="libssl makes the new keys")
@pytest.mark.parametrize("number, answer", [(20, b"HTTP/1.1 200"), (2000, b"")], ids=["some", "a flood"])
def test_who_sends_nothing_but_new_keys_is_cut_off_before_they_hold_up_the_bus(bus, number, answer):
    """OpenSSL reads on while such records come, and returns to nobody. A request behind them tells: is it heard?"""
    peer = NewKeys(bus.port, PATIENCE)
    with peer.peer:
        with contextlib.suppress(ConnectionError):  # it may be cut off while it still sends
            peer.peer.sendall(peer.keys(number) + peer.data(head(GET, HOST)))
        assert peer.heard()[:12] == answer


def speaking(version):
    """A client that speaks only this version of TLS, however old."""
    context = trusting()
    context.set_ciphers("ALL:@SECLEVEL=0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        context.minimum_version = context.maximum_version = version
    return context


def test_tls_1_2_is_spoken_and_1_1_is_refused(bus):
    connect(bus, speaking(ssl.TLSVersion.TLSv1_2)).close()
    with pytest.raises(ssl.SSLError, match="alert protocol version"):
        connect(bus, speaking(ssl.TLSVersion.TLSv1_1))


# The certificate on disk


def test_the_certificate_is_for_everyone_and_nothing_else_of_its_file(tmp_path, authority):
    """bus_join.py gets it so. The file may have the key, and the certificates of authorities."""
    certificate = authority.sign("IP:127.0.0.1")
    own, key, other = (pathlib.Path(path).read_text() for path in (*certificate, authority.file))
    (tmp_path / "all.pem").write_text(f"{key}the bus\n{own}{other}")
    with Server(tmp_path / "bus.db", "--tls-cert", str(tmp_path / "all.pem")) as bus:
        invite(bus, "dell")
        bus.context = trusting(authority)
        asked = head("GET /certificate HTTP/1.1", HOST, "Connection: close")
        assert talk(bus, asked).partition(b"\r\n\r\n")[2].decode() == own
        assert statuses(talk(bus, head("GET /inbox HTTP/1.1", HOST, "Connection: close"))) == [401]
        (tmp_path / "all.pem").unlink()
        assert statuses(talk(bus, asked)) == [500]
        assert statuses(talk(bus, LAST)) == [200]


def shown(bus):
    """The certificate that a client is shown."""
    with connect(bus) as peer:
        return peer.getpeercert()["serialNumber"]


@pytest.fixture
def renewing(tmp_path, authority):
    """A bus whose certificate is renewed on disk, one way or another."""
    first = authority.sign("IP:127.0.0.1")
    certificate, key = shutil.copy(first.file, tmp_path / "cert.pem"), shutil.copy(first.key, tmp_path / "key.pem")
    with Server(tmp_path / "bus.db", "--tls-cert", str(certificate), "--tls-key", str(key)) as bus:
        bus.context = trusting(authority)
        bus.certificate, bus.key = certificate, key
        yield bus


def test_a_renewed_certificate_is_shown_after_a_sighup_and_old_connections_go_on(renewing, authority):
    with connect(renewing) as peer:
        before = shown(renewing)
        fresh = authority.sign("IP:127.0.0.1", days=2)
        shutil.copy(fresh.file, renewing.certificate)
        shutil.copy(fresh.key, renewing.key)
        renewing.process.send_signal(signal.SIGHUP)
        wait_until(lambda: shown(renewing) != before)
        peer.sendall(LAST)
        assert statuses(heard(peer)) == [200]
    assert not renewing.log.read_text()


@pytest.mark.parametrize("fault", ["missing", "garbage", "another key", "encrypted"])
def test_a_bad_certificate_leaves_the_old_one_in_place_after_a_sighup(renewing, authority, fault):
    before = shown(renewing)
    if fault == "missing":
        renewing.certificate.unlink()
    elif fault == "garbage":
        renewing.certificate.write_text("garbage")
    elif fault == "another key":
        shutil.copy(authority.sign("IP:127.0.0.1", days=3).file, renewing.certificate)
    else:
        options = ["-in", str(renewing.key), "-out", str(renewing.key), "-aes256", "-passout", "pass:secret"]
        subprocess.run(["openssl", "ec", *options], check=True, capture_output=True)
    renewing.process.send_signal(signal.SIGHUP)
    assert "keeping the old one" in wait_until(renewing.log.read_text)
    assert shown(renewing) == before


WRONG = ["no such certificate", "no such key", "another key", "no key", "no certificate", "encrypted"]


@pytest.mark.parametrize("wrong", WRONG)
def test_a_certificate_that_cannot_be_used_is_said_with_its_file_and_what_to_do(wrong, authority, tmp_path):
    (one, key), other = authority.sign("IP:127.0.0.1"), authority.sign("IP:127.0.0.1", days=2).key
    file = str(tmp_path / "file.pem")
    if wrong == "encrypted":
        options = ["-in", key, "-out", file, "-aes256", "-passout", "pass:secret"]
        subprocess.run(["openssl", "ec", *options], check=True, capture_output=True)
    options, says = {
        "no such certificate": ((file, key), f"cannot read {file}: No such file or directory"),
        "no such key": ((one, file), f"cannot read {file}: No such file or directory"),
        "another key": ((one, other), f"the key in {other} is not the key of the certificate in {one}"),
        "no key": ((one, None), f"there is no private key (PEM) in {one}: give its file as --tls-key"),
        "no certificate": ((key, key), f"there is no certificate (PEM) in {key}"),
        "encrypted": ((one, file), f"the key in {file} has a password, and the bus cannot ask for it"),
    }[wrong]
    given = [option for option in zip(("--tls-cert", "--tls-key"), options) if option[1]]
    code, _, err = run("--port", 0, "--db", tmp_path / "bus.db", *itertools.chain(*given))
    assert code == 2 and err.startswith(f"bus_server: {says}") and err.count("\n") == 1


# ── In this process ──────────────────────────────────────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def a_door(certificate, clock=time.monotonic):
    """A bus in memory, and its port; both end with it."""
    with a_bus(clock) as bus:
        sock, tls = socket.create_server(("127.0.0.1", 0)), tls_context(certificate.file, certificate.key)
        listener = Listener(bus.door, sock, tls)
        yield bus, sock.getsockname()[1]
        listener.close()
        for connection in bus.door.connections:
            connection.transport.abort()
        come_true(lambda: not bus.door.connections)


@contextlib.contextmanager
def a_guest(port):
    """A client with TLS, in the thread of the bus. It goes without a goodbye."""
    peer = socket.create_connection(("127.0.0.1", port))
    peer.setblocking(False)
    with trusting().wrap_socket(peer, do_handshake_on_connect=False) as guest:
        come_true(lambda: is_shaken(guest))
        yield guest


def is_shaken(guest):
    try:
        guest.do_handshake()
    except ssl.SSLWantReadError:
        return False
    return True


def test_of_many_small_records_that_came_at_once_each_turn_opens_one_or_two(certificate):
    """A turn is for all connections, and each record costs some microseconds, however little it holds."""
    grown = []

    def look():
        grown.append(len(connection.buffer))
        bus.loop.soon(look)

    with a_door(certificate) as (bus, port), a_guest(port) as guest:
        (connection,) = bus.door.connections
        for _ in range(100):
            guest.send(b"x")
        bus.loop.soon(look)
        come_true(lambda: len(connection.buffer) == 100)
        assert max(after - before for before, after in zip(grown, grown[1:])) <= 2


def test_what_a_client_sends_after_it_said_that_it_is_done_takes_no_memory(certificate):
    """Each answer to a request before lets the bus read on once, and OpenSSL opens nothing more."""
    kept = []

    def look():
        kept.append(connection.transport.coming.pending + len(connection.transport.raw))
        with contextlib.suppress(OSError):  # past TLS: this end has closed that
            socket.socket.send(guest, b"\x17\x03\x03\x40\x00" + bytes(16384))
        bus.loop.soon(look)

    with a_door(certificate) as (bus, port), a_guest(port) as guest:
        (connection,) = bus.door.connections
        guest.send(head(GET, HOST) * 100)
        with contextlib.suppress(ssl.SSLWantReadError):
            guest.unwrap()
        bus.loop.soon(look)
        come_true(lambda: not bus.door.connections)
        assert max(kept) < 3 * bus_server.Tls.LARGEST


def test_a_client_that_leaves_while_parked_over_tls_behind_other_requests_is_unparked(certificate):
    with a_door(certificate) as (bus, port):
        with a_guest(port) as guest:
            guest.send(head(GET, HOST) * 3 + WAITING)
            come_true(lambda: bus.mailboxes.parked)
        come_true(lambda: not bus.door.connections)
        assert not bus.mailboxes.parked and not bus.mailboxes.waiting


@pytest.mark.parametrize("sent, patience", [(b"", 10), (b"GET /hea", 10), (head(GET, HOST), 75)],
                         ids=["before its first byte", "in a head", "between requests"])  # fmt: skip
def test_who_is_too_slow_over_tls_and_then_does_not_close_is_gone_two_seconds_later(certificate, sent, patience):
    clock = Clock()
    with a_door(certificate, clock) as (bus, port), a_guest(port) as guest:
        guest.sendall(sent)
        # it reads nothing from here on: it does not even hear that it is told to go
        (connection,) = bus.door.connections
        come_true(lambda: not sent or connection.buffer or not bus.door.strangers)
        for wait in (patience, bus_server.LINGER_SECONDS):
            clock.now += wait + LATE
            bus.sweep()
        come_true(lambda: not bus.door.connections)


@pytest.mark.parametrize("sent", [b"", HELLO], ids=["silent", "half a hello"])
def test_a_handshake_has_the_time_of_a_head(certificate, sent):
    clock = Clock()
    with a_door(certificate, clock) as (bus, port), socket.create_connection(("127.0.0.1", port)) as peer:
        peer.sendall(sent)
        come_true(lambda: bus.door.connections)
        peer.setblocking(False)
        clock.now += bus_server.HEAD_SECONDS + LATE
        bus.sweep()
        come_true(lambda: select.select([peer], [], [], 0)[0])
        assert peer.recv(1) == b""
