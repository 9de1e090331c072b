import http.client
import time

import pytest

from bus_server import STRANGERS
from tests.faults import linux, program, skipped_without
from tests.faults.siege import ROUNDS, no_descriptors, reach, silent_handshakes, slow_peers
from tests.kit.peers import invite, many_files
from tests.kit.processes import PATIENCE, Server

pytestmark = skipped_without(linux)


@pytest.mark.slow("waits for deadlines of 2 s, and measures before and meanwhile")
def test_slow_heads_and_bodies_are_dropped_and_hardly_felt(tmp_path):
    assert slow_peers(tmp_path, 500, patience=2).violations == []


@pytest.mark.slow("waits for a deadline of 2 s, and measures before and meanwhile")
@skipped_without(program("openssl"))
def test_silent_handshakes_are_hardly_felt_and_gone_by_their_deadline(tmp_path):
    assert silent_handshakes(tmp_path, 200, patience=2).violations == []


def test_without_descriptors_the_bus_rests_and_comes_back(tmp_path):
    assert no_descriptors(tmp_path, 120).violations == []


def test_a_burst_of_honest_clients_is_served_whole(bus):
    """More at once than strangers are kept: nobody who has sent a request is dropped for it."""
    with many_files():
        peers = []
        for _ in range(4 * STRANGERS):
            peer = reach(bus)
            peer.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            peers.append(peer)
        for peer in peers:
            assert peer.recv(65536).startswith(b"HTTP/1.1 200 ")
            peer.close()


def throughput(bus, headers, seconds=0.15):
    """Exchanges per second of one client on one connection."""
    peer = http.client.HTTPConnection("127.0.0.1", bus.port, timeout=PATIENCE)
    done, end = 0, time.monotonic() + seconds
    while time.monotonic() < end:
        peer.request("GET", "/agents", headers=headers)
        assert peer.getresponse().read().startswith(b'{"agents"')
        done += 1
    peer.close()
    return done / seconds


@pytest.mark.slow("measures in rounds")
def test_tokens_cost_less_than_a_tenth(tmp_path):
    with Server(tmp_path / "open.db") as free, Server(tmp_path / "closed.db") as closed_bus:
        token = invite(closed_bus, "alice")
        without, with_them = [], []
        for rounds in range(4 * ROUNDS):
            without.append(throughput(free, {"Authorization": f"Bearer {token}"}))
            with_them.append(throughput(closed_bus, {"Authorization": f"Bearer {token}"}))
            if rounds >= ROUNDS / 2 and max(with_them) >= 0.9 * max(without):
                return
        pytest.fail(f"with tokens {max(with_them):.0f} exchanges a second, without {max(without):.0f}")
