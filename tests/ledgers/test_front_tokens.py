"""Tokens and revocations that are made beside one front hold at all of them."""
import fcntl
import pathlib

import pytest

import bus_server
from bus_server import Refused
from tests.kit import inside
from tests.kit.ledger import SECOND, ask, common_look, end, invited, put, request, same, settle


def test_a_token_made_beside_one_front_holds_at_all_and_so_does_its_revocation(fronts, tmp_path):
    a, b = fronts("a"), fronts("b")
    secret = invited(a)
    for bus in (a, b):
        common_look(a)
        settle(a, b)
        bus.gate.tokens.refresh()
        assert bus.gate.tokens.closed and bus.gate.tokens.grant(f"Bearer {secret}").name == "ann"
    assert pathlib.Path(f"{b.state.path}.tokens").read_text() == pathlib.Path(f"{a.state.path}.tokens").read_text()
    end(a)
    bus_server.COMMANDS["revoke"](["ann", "--db", b.state.path])
    common_look(b)
    settle(b)
    a, c = fronts("a"), fronts("c")
    for bus in (a, b, c):
        bus.gate.tokens.refresh()
        assert bus.gate.tokens.closed
        with pytest.raises(Refused, match="revoked"):
            bus.gate.tokens.grant(f"Bearer {secret}")
    same(a, b, c)
    common_look(a)
    assert not a.loop.actions, "what is in the ledger is not put there again"


def test_the_file_of_tokens_is_read_and_written_only_when_something_is_new(fronts, monkeypatch):
    """A front looks each second."""
    a, b = fronts("a"), fronts("b")
    invited(a)
    common_look(a)
    settle(a, b)
    file = pathlib.Path(f"{b.state.path}.tokens")
    before = file.stat().st_ino
    end(b)
    b = fronts("b")
    assert file.stat().st_ino == before
    common_look(b)
    reads = []
    monkeypatch.setattr(bus_server.Tokens, "rows", lambda tokens: reads.append(1) or [])
    for bus in (a, b):
        common_look(bus)
    assert not reads


def test_a_damaged_file_of_tokens_is_no_exception_each_second(fronts, capfd):
    a = fronts("a")
    invited(a)
    pathlib.Path(f"{a.state.path}.tokens").write_text("{")
    common_look(a)
    assert "Traceback" not in inside.said(capfd)


def test_a_token_that_is_not_in_the_ledger_yet_stays_in_the_file_when_others_come(fronts):
    a, b = fronts("a"), fronts("b")
    for bus in (a, b):
        invited(bus)
    common_look(a)
    settle(a, b)
    assert len(bus_server.Tokens.rows(b.gate.tokens)) == 2


def test_a_revocation_beside_a_front_that_was_stopped_holds(fronts):
    a, b = fronts("a"), fronts("b")
    secret = invited(a)
    common_look(a)
    settle(a, b)
    end(a)
    bus_server.COMMANDS["revoke"](["ann", "--db", a.state.path])
    a = fronts("a")
    common_look(a)
    settle(a, b)
    b.gate.tokens.refresh()
    with pytest.raises(Refused, match="revoked"):
        b.gate.tokens.grant(f"Bearer {secret}")


def known(*buses):
    """What was made beside the first one is known to all."""
    common_look(buses[0])
    settle(*buses)
    for bus in buses:
        bus.gate.tokens.refresh()


def test_what_is_sent_after_a_revocation_is_given_to_no_reader_of_that_token(fronts):
    """A front that stood still reads both from the ledger in one go, and the reader still waits there."""
    a, b = fronts("a"), fronts("b")
    secret = invited(a)
    known(a, b)
    reader = request(b, "GET", "/recv?to=ann&wait=25", None, f"Bearer {secret}")
    settle(b)
    bus_server.COMMANDS["revoke"](["ann", "--db", a.state.path])
    common_look(a)
    settle(a)
    put(a, sender="bob", to="ann", msg="not for everybody")
    assert reader() is None
    settle(b)
    assert reader()[0] == 401


def test_what_a_new_token_reserves_is_no_others_at_a_front_that_has_not_heard_of_the_token(fronts):
    a, b = fronts("a"), fronts("b")
    ann = invited(a)
    known(a, b)
    bob = invited(a, "bob")
    lock = {"names": ["x"]}
    assert ask(a, "POST", "/lock", lock, f"Bearer {bob}")[0] == 200
    assert ask(b, "POST", "/lock", lock, f"Bearer {ann}")[0] == 409


def test_a_token_expires_by_the_clock_of_the_ledger(fronts, log):
    """So no front takes back what another one has granted. Here the clock of the machine is days ahead."""
    a, b = fronts("a"), fronts("b")
    hour = 3600 * SECOND
    secret = invited(a, "ann", log.wall.wall // SECOND + 3600)
    known(a, b)
    for bus in (a, b):
        assert ask(bus, "POST", "/lock", {"names": ["x"]}, f"Bearer {secret}")[0] == 200
    log.wall.wall += 2 * hour
    put(a)
    settle(b)
    for bus in (a, b):
        bus.gate.tokens.refresh()
        with pytest.raises(Refused, match="expired"):
            bus.gate.tokens.grant(f"Bearer {secret}")


def test_what_was_made_elsewhere_holds_while_the_file_of_tokens_cannot_be_written(fronts, capfd):
    """A command may hang while it has the lock of the file, or the disk may take no file."""
    a, b = fronts("a"), fronts("b")
    old = invited(a)
    known(a, b)
    lock = pathlib.Path(f"{b.state.path}.tokens.lock")
    new, written = invited(a, "bob"), pathlib.Path(f"{b.state.path}.tokens")
    with lock.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        bus_server.COMMANDS["revoke"](["ann", "--db", a.state.path])
        common_look(a)
        settle(a, b)
        lock.unlink()
        lock.mkdir()
        for _ in range(3):
            common_look(b)
    assert "bob" not in written.read_text()
    with pytest.raises(Refused, match="revoked"):
        b.gate.tokens.grant(f"Bearer {old}")
    assert b.gate.tokens.grant(f"Bearer {new}").name == "bob"
    said = inside.said(capfd)
    assert said.count("holds all the same") == 1 and "Traceback" not in said
    lock.rmdir()
    common_look(b)
    assert "bob" in written.read_text()
