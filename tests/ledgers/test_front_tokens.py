"""Tokens and revocations that are made beside one front hold at all of them."""
import pathlib

import pytest

import bus_server
from bus_server import Refused
from tests.kit import inside
from tests.kit.ledger import common_look, end, invited, same, settle


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
    for bus in (a, b):
        monkeypatch.setattr(bus.gate.tokens, "rows", lambda: reads.append(1) or [])
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
    assert len(b.gate.tokens.rows()) == 2


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
