"""session.py: a session is renamed, and its mail goes on where it was: nothing is lost, and nothing comes twice."""
import json
import os
import subprocess
import sys
import time

import pytest

import bus_recv
import bus_send
from tests.kit import sessions
from tests.kit.bad_servers import NOON, Scripted, answer
from tests.kit.processes import PATIENCE, ROOT
from tests.kit.sessions import name, read

sys.path[:0] = [str(ROOT / "integrations" / "claude_code"), str(ROOT / "tools")]
import bus_inbox  # noqa: E402
import notice  # noqa: E402
import session  # noqa: E402

project, lives = sessions.project, sessions.lives  # fixtures


@pytest.fixture
def api(bus, lives, monkeypatch):
    """A bus, and a session that has the name api there: process 1 in /x/api, with the id a."""
    monkeypatch.setenv("AGENT_BUS_URL", bus.url)
    lives.begin(1)
    name(1, "a")


begun = pytest.mark.usefixtures("api")


def test_a_title_renames_and_a_new_process_keeps_it(lives, monkeypatch):
    lives.begin(1)
    assert name(1, "a") == "api"
    assert session.this_session(1, "/x/api", "a", "the reviewer")[:2] == ("the-reviewer", ("api",))
    lives.end(1)
    lives.begin(2)
    assert session.this_session(2, "/x/api", "a", "the reviewer")[:2] == ("the-reviewer", ("api",))
    lives.begin(3)
    assert name(3, "b", title="planner") == "planner", "a title from the start"
    monkeypatch.setenv("AGENT_NAME", "dell")
    lives.begin(4)
    assert name(4, "c", title="planner") == "dell", "AGENT_NAME is stronger at the start"
    assert name(4, "c", title="boss") == "boss"
    assert name(4) == "boss"


def test_the_old_name_is_read_for_a_day_and_free_then(lives):
    lives.begin(1)
    lives.begin(2)
    name(1, "a")
    assert session.rename(1, "lead") == "api"
    assert session.rename(1, "boss") == "lead"
    assert session.this_session(1, "/x/api", "a").names == ["boss", "lead", "api"]
    assert name(2, "b") == "api-2"
    with session.Register() as names:
        names.names["boss"]["old"] = {"lead": time.time() - 1, "api": time.time() - 1}
    assert session.this_session(1, "/x/api", "a").names == ["boss"]
    lives.begin(3)
    assert name(3, "c") == "api"


@pytest.mark.parametrize("new", ["all", "Root", "no name", "", "api-2", "x" * 65])
def test_a_name_that_is_not_free_or_no_name_is_refused(lives, new):
    lives.begin(1)
    lives.begin(2)
    name(1, "a")
    name(2, "b")
    with pytest.raises(ValueError, match="reserved|is not a name|is another session"):
        session.rename(1, new)
    assert name(1) == "api"


@begun
def test_a_rename_goes_on_where_the_old_name_was():
    """Nothing that waits for either name is passed over, and what was read does not come again."""

    def send(to, text):
        return bus_send.send(to, text, sender="spark")["id"]

    send("api", "read before")
    assert [each["msg"] for each in bus_recv.receive("api", once=True)] == ["read before"]
    send("boss", "for the new name, from before")
    send("api", "for the old name")
    session.rename(1, "boss")
    me = session.this_session(1, "/x/api", "a")
    assert notice.count(me, 5).unread == 2
    read = [each["msg"] for each in bus_recv.receive(me.names, once=True)]
    assert read == ["for the new name, from before", "for the old name"]
    assert notice.count(me, 5).unread == 0
    send("api", "later")
    assert notice.count(me, 5).unread == 1


@begun
def test_what_was_read_of_an_old_name_does_not_come_to_the_next_session_that_has_it(lives):
    session.rename(1, "boss")
    bus_send.send("api", "for the first", sender="spark")
    assert read(session.this_session(1, "/x/api", "a")) == ["for the first"]
    lives.end(1)
    bus_send.send("api", "for whoever comes", sender="spark")
    lives.begin(2)
    assert read(session.this_session(2, "/x/api", "b")) == ["for whoever comes"]
    lives.begin(3)
    name(3, "c")
    lives.end(2)
    session.rename(3, "lead")
    assert session.rename(3, "api") == "lead"
    assert read(session.this_session(3, "/x/api", "c")) == []


@begun
def test_what_a_session_has_read_of_its_old_name_stays_read_when_another_one_has_its_new_name(lives):
    session.rename(1, "boss")
    bus_send.send("api", "for the first", sender="spark")
    assert read(session.this_session(1, "/x/api", "a")) == ["for the first"]
    lives.end(1)
    lives.begin(2)
    assert name(2, "b", title="boss") == "boss"
    lives.begin(3)
    me = session.this_session(3, "/x/api", "c")
    assert (me.names, read(me)) == (["api"], [])


@begun
def test_a_place_that_a_renamed_session_needs_is_not_that_of_the_next_session(lives):
    """Older mail for its new name makes it begin there; what was read of that name before is read nevertheless."""
    bus_send.send("boss", "older", sender="spark")
    bus_send.send("api", "read", sender="spark")
    assert read(session.this_session(1, "/x/api", "a")) == ["read"]
    session.rename(1, "boss")
    assert session.rename(1, "api") == "boss"
    lives.end(1)
    lives.begin(2)
    me = session.this_session(2, "/x/api", "b")
    assert (me.names, read(me)) == (["api"], [])


@begun
def test_a_session_that_takes_its_old_name_again_gets_nothing_twice():
    session.rename(1, "boss")
    bus_send.send("api", "1", sender="spark")
    assert read(session.this_session(1, "/x/api", "a")) == ["1"]
    bus_send.send("boss", "2", sender="spark")
    assert session.rename(1, "api") == "boss"
    assert read(session.this_session(1, "/x/api", "a")) == ["2"]


@begun
def test_older_mail_for_the_new_name_brings_no_mail_again_that_was_read():
    """Nor a broadcast, over two renames; but who asks for a time gets all from then on."""
    for to in ("lead", "boss", "api", "all"):
        bus_send.send(to, f"for {to}", sender="spark")
    assert read(session.this_session(1, "/x/api", "a")) == ["for api", "for all"]
    session.rename(1, "boss")
    assert session.rename(1, "lead") == "boss"
    me = session.this_session(1, "/x/api", "a")
    assert me.names == ["lead", "boss", "api"]
    assert [each["msg"] for each in bus_inbox.Inbox(me.name).look(0)[0]] == ["for lead"]
    assert read(me) == ["for lead", "for boss"] and read(me) == []
    since = {"once": True, "timeout": 0, "since": "1h"}
    assert len(list(bus_recv.receive(me.names, **since))) == 4


@begun
def test_a_rename_without_the_bus_loses_nothing(monkeypatch):
    for to in ("boss", "api"):
        bus_send.send(to, f"for {to}", sender="spark")
    assert read(session.this_session(1, "/x/api", "a")) == ["for api"]
    monkeypatch.setattr(session.Register, "digest", lambda *_: {})
    session.rename(1, "boss")
    assert read(session.this_session(1, "/x/api", "a")) == ["for boss"]


@begun
def test_a_reader_shows_nothing_again_that_came_while_its_session_was_renamed():
    """It follows at its next poll. Until then it reads as the old name."""
    mail = bus_recv.SessionReader(["api", "team"]).messages(timeout=PATIENCE)
    for to in ("boss", "api", "team", "all"):
        bus_send.send(to, f"for {to}", sender="spark")
    assert next(mail)["msg"] == "for api"
    session.rename(1, "boss")
    assert [next(mail)["msg"] for _ in range(3)] == ["for team", "for all", "for boss"]
    bus_send.send("api", "later", sender="spark")
    assert next(mail)["msg"] == "later"


@begun
def test_a_reader_that_runs_follows_its_session_to_a_new_name():
    command = [sys.executable, "-c", "import bus_recv; bus_recv.FOLLOW_SECONDS = 0.2; bus_recv.main()", "api", "team"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    reader = subprocess.Popen([*command, "--json"], env=env, stdout=-1, stderr=-1, text=True)

    def comes(to):
        id = bus_send.send(to, f"for {to}", sender="spark")["id"]
        return json.loads(reader.stdout.readline())["id"] == id

    try:
        assert comes("api")
        session.rename(1, "boss")
        assert comes("boss") and comes("api") and comes("team")
        session.rename(1, "chief")
        assert comes("chief") and comes("boss") and comes("api")
        assert session.this_session(1, "/x/api", "a").names == ["chief", "boss", "api"]
        assert notice.count(session.this_session(1, "/x/api", "a"), 5).reader, "the hooks know that it reads"
    finally:
        reader.terminate()
        _, said = reader.communicate(timeout=PATIENCE)
    assert "reading as boss, api, team from now on" in said


@begun
def test_a_reader_that_has_an_old_name_counts_as_a_reader_of_the_session(bus):
    """It goes on with the new name when its poll ends, so no hook tells of what it will show."""
    reader = bus_recv.Cursor(json.loads(bus.get("/healthz"))["bus"], "default", "api", print)
    session.rename(1, "boss")
    me = session.this_session(1, "/x/api", "a")
    assert me.names == ["boss", "api"] and notice.count(me, 5).reader
    reader.lock.close()
    assert not notice.count(me, 5).reader


def test_the_longest_names_on_the_longest_channel_can_be_changed(lives, monkeypatch):
    """Their capitals are three bytes each in the name of a file."""
    monkeypatch.setenv("AGENT_BUS_CHANNEL", "C" * 64)
    lives.begin(1)
    assert name(1, "a", folder=f"/x/{'A' * 60}") == "A" * 60
    assert session.rename(1, "B" * 64) == "A" * 60
    reader = bus_recv.SessionReader(["A" * 60])
    reader.bus, reader.cursor = "b1", bus_recv.Cursor("b1", "C" * 64, "A" * 60, print)
    reader.follow(1.0)
    assert reader.names == ["B" * 64, "A" * 60]


def test_a_rename_on_one_bus_moves_no_cursor_of_another(lives, monkeypatch):
    """The names are those of other sessions there, on the same channel."""
    lives.begin(1)
    with Scripted(answer({"agents": [], "messages": [], "now": NOON, "bus": "b1"})) as server:
        monkeypatch.setenv("AGENT_BUS_URL", server.url)
        assert name(1, "a") == "api" and list(bus_recv.receive("api", timeout=0)) == []
    for reader, at in (("api", "100.0"), ("boss", "900.0")):
        bus_recv.Cursor("b2", "default", reader, print).move(at)
    session.rename(1, "boss")
    lives.end(1)
    lives.begin(2)
    assert name(2, "b") == "api"
    assert [session.own_cursor("b2", "default", reader) for reader in ("api", "boss")] == ["100.0", "900.0"]


@begun
def test_the_mail_of_a_renamed_session_is_counted_from_its_place_on_this_bus(bus):
    session.rename(1, "boss")
    me = session.this_session(1, "/x/api", "a")
    assert read(me) == []
    place = bus_recv.Cursor("b2", "default", "boss", print)
    bus_send.send("boss", "hi", sender="spark")
    place.move(f"{time.time() + 60:.6f}")  # there somebody has read on
    assert notice.count(me, 5).unread == 1
