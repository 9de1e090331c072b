"""GET /search: PROTOCOL.md section 25, as far as one token and one outside look cannot show it."""

import contextlib
import socket
import sqlite3
import threading
import time
from contextlib import closing
from pathlib import Path
from unittest import mock

import pytest

from bus_extensions import search
from bus_server import Grant, Now, Put, Query, Refused, State, draft
from tests.core.test_identity import ask
from tests.kit import inside
from tests.kit.peers import TIMED_OUT, Peer, fill, mint
from tests.kit.processes import Server, wait_until

Index = search.index.Index


@pytest.fixture(scope="module")
def closed(tmp_path_factory):
    path = tmp_path_factory.mktemp("closed") / "bus.db"
    tokens = mint(path, ann=[], boss=["--also", "bob"], sensor=["--send-only"], admin=["--operator"])
    with Server(path) as bus:
        bus.tokens = tokens
        for way in ("ann bob a", "boss ann b", "boss carl c", "sensor all d"):
            sender, to, text = way.split()
            assert ask(bus, "POST", "/send", {"to": to, "msg": f"word {text}"}, tokens[sender])[0] == 200
        yield bus


def found(bus, query, token=None):
    """The last words of the messages in all pages of a search."""
    texts, before = "", "now"
    while before is not None:
        status, answer = ask(bus, "GET", f"/search?q={query}&before={before}", token=token)
        assert status == 200, answer
        texts += "".join(message["msg"].split()[-1] for message in answer["messages"])
        before = answer["next"]
    return texts


@pytest.mark.parametrize("name, sees", [("admin", "dcba"), ("boss", "dcba"), ("ann", "dba"), ("sensor", "d")])
def test_a_token_finds_what_it_may_see(closed, name, sees):
    assert found(closed, "word", closed.tokens[name]) == sees


def test_only_an_operator_has_the_index_made_anew(closed):
    status, answer = ask(closed, "POST", "/search", token=closed.tokens["ann"])
    assert status == 403 and "only an operator" in answer["error"]
    file = Path(f"{closed.db}.search")
    assert found(closed, "word", closed.tokens["admin"])
    with sqlite3.connect(file) as index:
        index.execute("CREATE TABLE of_before (x)")
    assert ask(closed, "POST", "/search", token=closed.tokens["admin"])[0] == 200
    with sqlite3.connect(file) as index:
        assert not index.execute("SELECT 1 FROM sqlite_master WHERE name = 'of_before'").fetchone()
    assert found(closed, "word", closed.tokens["admin"]) == "dcba"


def test_without_a_search_there_is_no_index(tmp_path):
    """The bus does nothing for it: who does not search pays for none."""
    with Server(tmp_path / "bus.db") as bus:
        fill(bus, "bob", 10)
        assert bus.stop() == 0
    assert not list(tmp_path.glob("*.search*"))


# The index, without a bus


class Filled:
    """A database with messages, and its index."""

    def __init__(self, folder):
        self.state = State(str(folder / "bus.db"))
        self.state.add_tables("search", search.NOUN, search.TABLES)
        self.index, self.now = Index(self.state.path), time.time_ns() // 1000

    def put(self, *texts, **members):
        self.now += 1000
        puts = [Put([draft({"from": "ann", "to": "bob", "msg": text, **members}, None)]) for text in texts]
        return [each.tick for each in self.state.apply(puts, Now(self.now, self.now)).visible]

    def search(self, words, above=0, below=1 << 60, name="", readers=None):
        wanted = search.index.Wanted(search.match_of(words), name, readers)
        return self.index.search(wanted, above, below, self.state.last)

    def pages(self, words, name="", readers=None):
        below = 1 << 60
        while below:
            hits = self.search(words, 0, below, name, readers)
            yield hits
            below = hits.below

    def all(self, words, name="", readers=None):
        return [tick for hits in self.pages(words, name, readers) for tick in hits.ticks]


@pytest.fixture
def filled(tmp_path, monkeypatch):
    """Its slices and parts are small."""
    monkeypatch.setattr(Index, "SLICE", 7)
    monkeypatch.setattr(Index, "PART", 20)
    with closing(Filled(tmp_path).state) as state:
        state.close()
    filled = Filled(tmp_path)
    yield filled
    filled.index.close()
    filled.state.close()


def test_the_first_search_begins_with_the_newest_messages(filled, monkeypatch):
    monkeypatch.setattr(Index, "GROW_SECONDS", 0)
    ticks = filled.put(*(f"word {number}" for number in range(30)))
    first = filled.search("word")
    assert first.ticks == ticks[:-8:-1] and first.below == ticks[-7] and first.upto == ticks[-1]
    assert filled.all("word") == ticks[::-1]


def test_a_search_waits_half_a_second_for_the_index_and_says_how_far_it_is(filled, monkeypatch):
    first = filled.put("word")
    assert filled.search("word").ticks == first
    more = filled.put(*["word"] * 20)
    with mock.patch.object(Index, "GROW_SECONDS", 0):
        hits = filled.search("word")
    assert hits.ticks == [*more[6::-1], *first] and hits.upto == more[6] and hits.below is None
    assert filled.search("word").upto == more[-1] and Index.GROW_SECONDS == 0.5


def test_a_search_stops_between_two_parts_of_the_index(filled, monkeypatch):
    monkeypatch.setattr(Index, "FIND_SECONDS", -1)
    ticks = filled.put(*["word"] * 100)
    hits = filled.search("word")
    assert 7 <= len(hits.ticks) <= 28 and hits.below == hits.ticks[-1]
    assert filled.all("word") == ticks[::-1] and filled.all("other") == []


def test_where_a_search_stops_does_not_tell_of_mail_of_others(filled, monkeypatch):
    """It stops after so many bytes of texts, however long it took, and whether somebody else's mail has the words."""
    monkeypatch.setattr(Index, "FIND_SECONDS", -1)
    monkeypatch.setattr(Index, "FIND_BYTES", 1000)
    monkeypatch.setattr(Index, "HITS", 10)
    filled.put(*["word"] * 100)
    nobody = [(hits.ticks, hits.below) for hits in filled.pages("other", "zoe", ["zoe", "all"])]
    assert len(nobody) > 2
    assert [(hits.ticks, hits.below) for hits in filled.pages("word", "zoe", ["zoe", "all"])] == nobody
    monkeypatch.setattr(Index, "FIND_BYTES", 1 << 20)
    assert [hits.below for hits in filled.pages("word", "zoe", ["zoe"])] == [None]


def test_the_names_of_a_message_are_whole_and_are_no_words(filled):
    mine = filled.put("word", "word")
    theirs = filled.put("word", **{"from": "an", "to": "bo"})
    assert filled.all("word", "ann", []) == filled.all("word", "x", ["y", "bob"]) == mine[::-1]
    assert filled.all("word", "an", []) == filled.all("word", "x", ["bo"]) == theirs
    assert filled.all("word", "bob", ["ann"]) == filled.all("word", "a", ["b"]) == []
    assert filled.all("to626F62") == filled.all("from616E6E") == []


def test_an_answer_of_the_index_has_so_many_hits(filled, monkeypatch):
    monkeypatch.setattr(Index, "HITS", 10)
    ticks = filled.put(*["word"] * 25)
    assert [len(filled.search("word", 0, below).ticks) for below in (1 << 60, ticks[-10], ticks[5])] == [10, 10, 5]
    assert filled.all("word") == ticks[::-1] and filled.search("word", ticks[20]).ticks == ticks[:20:-1]


def test_the_parts_of_removed_messages_go(filled):
    ticks = filled.put(*["word"] * 100)
    filled.all("word")
    with filled.index.opened(ticks[-1]) as database:
        before = database.execute("SELECT count(*) FROM parts").fetchone()
    filled.state.writing.execute("DELETE FROM messages WHERE tick < ?", (ticks[-1],))
    filled.put(*["word"] * 30)
    filled.all("word")
    with filled.index.opened(filled.state.last) as database:
        parts = database.execute("SELECT part FROM parts").fetchall()
        tables = database.execute("SELECT name FROM main.sqlite_master WHERE sql LIKE 'CREATE VIRTUAL%'").fetchall()
    assert len(parts) < before[0] and sorted(tables) == sorted((f"part_{part}",) for (part,) in parts)


def test_texts_are_not_stored_twice(filled):
    filled.put(*["lorem ipsum " * 300] * 60)
    assert len(filled.all('"ipsum lorem"')) == 60
    filled.index.close()
    index = filled.index.file.read_bytes()
    assert len(index) < 60 * 3600 * 0.7 and b"lorem ipsum" not in index


DAMAGE = ["no file", "no database", "half of it", "of another bus", "of the future", "of text"]


@pytest.mark.parametrize("damage", DAMAGE)
def test_an_index_that_is_none_of_these_messages_is_made_anew(filled, damage):
    ticks = filled.put(*["word"] * 50)
    filled.all("word")
    filled.index.close()
    file, writing = filled.index.file, filled.state.writing
    if damage == "no file":
        file.unlink()
    elif damage == "no database":
        file.write_bytes(b"x" * 5000)
    elif damage == "half of it":
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    elif damage == "of another bus":
        writing.execute("UPDATE bus SET id = 'x'")
    elif damage == "of the future":
        ticks = ticks[:-10]
        writing.execute("DELETE FROM messages WHERE tick > ?", (ticks[-1],))
        filled.state.last = ticks[-1]
    else:
        with closing(sqlite3.connect(file)) as index:
            index.execute("UPDATE parts SET upto = 'x'")
            index.commit()
    for _ in range(2):  # a damaged file may cost one search its answer
        try:
            assert filled.all("word") == ticks[::-1]
            return
        except sqlite3.DatabaseError:
            pass
    raise AssertionError("it is still damaged")


def test_what_is_damaged_or_recalled_has_no_words_and_harms_no_other(filled):
    ticks = filled.put("word", "word", "word", "word", "word")
    writing = filled.state.writing
    writing.execute("UPDATE messages SET text = '\"msg\": \"word' WHERE tick = ?", ticks[1:2])
    writing.execute("UPDATE messages SET text = x'00ff' WHERE tick = ?", ticks[2:3])
    writing.execute("UPDATE messages SET expires = 1 WHERE tick = ?", ticks[3:4])
    assert filled.all("word") == [ticks[4], ticks[0]]


HOSTILE = [
    "word OR 1", "word*", "^word", "word NEAR(a, 2)", "msg:word", "{msg subject}:word", '"word', 'word"', '""word""',
    "word--", "word'; DROP TABLE parts", "w\u00f6rd " * 20, "a " * 100, "-word", "(word", "word)", "\\", "word\ttab",
    "%s part_%d",
]  # fmt: skip


@pytest.mark.parametrize("words", HOSTILE)
def test_nothing_in_a_query_is_syntax(filled, words):
    filled.put("a word")
    try:
        match = search.match_of(words)
    except Refused as refused:
        assert refused.status == 400
        return
    for readers in (None, ["bob"]):
        wanted = search.index.Wanted(match, "ann", readers)
        assert filled.index.search(wanted, 0, 1 << 60, filled.state.last).below is None


# With a bus


def test_the_limit_of_hits_does_not_tell_of_mail_of_others(tmp_path):
    """One hit less than the limit is one's own; another's mail has one of the words, and an answer shows no hit."""
    tokens = mint(tmp_path / "bus.db", ann=[], zoe=[])
    with Server(tmp_path / "bus.db") as bus:
        fill(bus, "zoe", Index.HITS - 1, "swordfish zebra", sender="zoe", token=tokens["zoe"], at_once=1000)
        assert ask(bus, "POST", "/send", {"to": "bob", "msg": "a swordfish"}, tokens["ann"])[0] == 200
        answers = [
            ask(bus, "GET", f"/search?q={word}&from=nobody", token=tokens["zoe"]) for word in ("swordfish", "zebra")
        ]
        assert [(status, each["messages"], each["next"]) for status, each in answers] == [(200, [], None)] * 2


def test_hits_that_a_token_may_not_see_keep_no_page_from_it(tmp_path):
    tokens = mint(tmp_path / "bus.db", ann=[], zoe=[])
    with Server(tmp_path / "bus.db") as bus:
        assert ask(bus, "POST", "/send", {"to": "ann", "msg": "word a"}, tokens["zoe"])[0] == 200
        fill(bus, "carl", Index.HITS, "word", sender="zoe", token=tokens["zoe"], at_once=1000)
        status, answer = ask(bus, "GET", "/search?q=word", token=tokens["ann"])
        assert (status, [each["msg"] for each in answer["messages"]], answer["next"]) == (200, ["word a"], None)


def test_a_search_whose_token_is_revoked_while_it_waits_gets_nothing(tmp_path):
    bus = inside.make(tmp_path / "bus.db")
    try:
        searches = next(route.call.__self__ for key, route in bus.routes.items() if key == ("GET", "/search"))
        bus.gate.tokens.closed = True  # and none is valid any more
        connection, job = mock.Mock(token="abt_00000000"), mock.Mock()
        searches.answer(connection, job, None)
        assert connection.answer.call_args.args[0].status == 401 and not job.then.called
    finally:
        inside.close(bus)


def test_an_owner_has_four_searches(tmp_path):
    """The thread of the index is held by the test."""
    bus = inside.make(tmp_path / "bus.db")
    try:
        searches = next(route.call.__self__ for key, route in bus.routes.items() if key == ("GET", "/search"))
        begun, go = threading.Event(), threading.Event()
        request = mock.Mock(**{"owner.return_value": "me", "query.return_value": Query("q=word")})
        request.grant = Grant("", "ann", (), False, False)
        with mock.patch.object(searches.index, "search", lambda *_: (begun.set(), go.wait(20))):
            for _ in range(searches.WAITING):
                searches.search(request)
            with pytest.raises(Refused) as refused:
                searches.search(request)
            assert refused.value.status == 429 and "search again" in refused.value.sentence
            request.owner.return_value = "another"
            searches.search(request)
            go.set()
            bus.loop.run(lambda: not searches.jobs)
        assert not searches.waiting and request.peer.guard.call_count == searches.WAITING + 1
    finally:
        inside.close(bus)


def test_one_renewal_of_the_index_waits_and_no_more(tmp_path):
    """On a bus without tokens everybody may ask for one, and each search waits behind it."""
    bus = inside.make(tmp_path / "bus.db")
    try:
        searches = bus.routes["POST", "/search"].call.__self__
        request, go = mock.Mock(**{"owner.return_value": "me"}), threading.Event()
        with mock.patch.object(searches.index, "renew", lambda last: go.wait(20)):
            searches.renew(request)
            with pytest.raises(Refused) as refused:
                searches.renew(request)
            assert refused.value.status == 429 and len(searches.jobs) == 1
            go.set()
            bus.loop.run(lambda: not searches.jobs)
            searches.renew(request)
            bus.loop.run(lambda: not searches.jobs)
    finally:
        inside.close(bus)


def test_the_index_grows_without_a_search_once_there_was_one(tmp_path):
    with Server(tmp_path / "bus.db") as bus:
        assert found(bus, "word") == ""
        fill(bus, "bob", 2500, "word x", at_once=500)

        def indexed():
            with closing(sqlite3.connect(f"file:{bus.db}.search?mode=ro", uri=True)) as index:
                return index.execute("SELECT sum(messages) FROM parts").fetchone()[0] == 2500

        wait_until(indexed)
        assert found(bus, "word") == "x" * 2500


def test_a_bus_that_can_have_no_index_says_why():
    bus = inside.make(":memory:")
    inside.close(bus)
    with pytest.raises(Refused) as refused:
        bus.routes["GET", "/search"].call(mock.Mock(**{"owner.return_value": "me"}))
    assert refused.value.status == 501 and refused.value.sentence.endswith("its messages are in no file")


def test_without_fts5_the_bus_says_so(tmp_path, monkeypatch):
    assert search.index.why_not(str(tmp_path / "bus.db")) == ""
    monkeypatch.setattr(search.index, "PART", "CREATE VIRTUAL TABLE part_%d USING fts99(msg)")
    assert search.index.why_not(str(tmp_path / "bus.db")) == "the SQLite of its Python has no FTS5"


def test_an_index_that_fails_costs_503_and_the_next_search_finds(tmp_path, capfd):
    with Server(tmp_path / "bus.db") as bus:
        fill(bus, "bob", 3, "word x")
        assert found(bus, "word") == "xxx"
        file = Path(f"{bus.db}.search")
        with file.open("r+b") as stream:
            stream.write(b"y" * file.stat().st_size)
        Path(f"{file}-wal").unlink()
        answers = [ask(bus, "GET", "/search?q=word") for _ in range(3)]
        assert {status for status, _ in answers} <= {200, 503} and len(answers[-1][1]["messages"]) == 3


def test_a_kill_while_the_index_is_written_costs_nothing(tmp_path):
    """After each of ten kills, some while the index was begun, it is gone on with or made anew."""
    with Server(tmp_path / "bus.db") as bus:
        fill(bus, "bob", 4000, "word x", at_once=500)
        for number in range(10):
            with socket.create_connection(("127.0.0.1", bus.port)) as peer:
                peer.sendall(b"GET /search?q=word HTTP/1.1\r\nHost: localhost\r\n\r\n")
                peer.settimeout(0.004 * number + 0.001)
                with contextlib.suppress(*TIMED_OUT):
                    peer.recv(100)
                bus.kill()
            bus.start()
        assert found(bus, "word") == "x" * 4000
        assert "Traceback" not in bus.log.read_text()


def test_a_search_while_the_bus_is_written_to_finds_each_message_once(tmp_path):
    with Server(tmp_path / "bus.db") as bus, Peer(bus) as writer:
        for number in range(30):
            body = [{"from": "ann", "to": "bob", "msg": f"word {number}"}] * 40
            assert writer.send("POST", "/send", body).answer().status == 200
            assert len(ask(bus, "GET", f"/search?q=word+{number}")[1]["messages"]) == 40
        assert found(bus, "word") == "".join(f"{number}" * 40 for number in reversed(range(30)))


def test_a_slice_of_large_messages_has_fewer(filled, monkeypatch):
    monkeypatch.setattr(Index, "SLICE_BYTES", 10000)
    ticks = filled.put(*["word " + "x" * 4000] * 9, "word", "word " + "y" * 20000, *["word"] * 9)
    assert filled.all("word") == ticks[::-1] and filled.index.taken < Index.SLICE * 2
    with filled.index.opened(ticks[-1]) as database:
        assert database.execute("SELECT sum(messages) FROM parts").fetchone() == (len(ticks),)
