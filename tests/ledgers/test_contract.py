"""What a front relies on: each engine passes the tests of Contract, and so does the fake that stands in for one."""
import hashlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from ledgers import READ_BYTES, Unknown
from tests.faults.history import background
from tests.kit import inside, postgres
from tests.kit.ledger import Fake, Log
from tests.kit.processes import PATIENCE, wait_until

CALL = 10.0  # s


def append(ledger, entry, id=None, patience=CALL):
    return ledger.append(entry, id or hashlib.sha1(entry).hexdigest(), time.monotonic() + patience)


def read(ledger, above=0, limit=1000):
    return ledger.read(above, limit, time.monotonic() + CALL)


class Contract:
    """A subclass has `connect()`, a new way to the same empty ledger, and `out()`, in which the engine says nothing."""

    @pytest.fixture
    def ledger(self):
        ledger = self.connect()
        yield ledger
        ledger.close()

    @pytest.fixture
    def other(self):
        other = self.connect()
        yield other
        other.close()

    def test_entries_have_the_positions_1_2_3_and_the_time_of_the_engine(self, ledger, other):
        before = time.time()
        told = [append(ledger, b"a"), append(other, b"b"), append(ledger, b"c")]
        assert [position for position, _ in told] == [1, 2, 3]
        assert all(before - 1 < at / 1000000 < time.time() + 1 for _, at in told)
        assert read(other) == [(*place, entry) for place, entry in zip(told, (b"a", b"b", b"c"))]

    def test_an_empty_ledger_has_no_entries(self, ledger):
        assert read(ledger) == []

    def test_an_entry_is_any_bytes(self, ledger):
        entries = [bytes(range(256)), b"", "ß\u2028".encode(), b"\\x00\\'"]
        for number, entry in enumerate(entries):
            append(ledger, entry, f"{number}")
        assert [entry for _, _, entry in read(ledger)] == entries

    def test_the_same_id_again_stores_nothing_and_has_the_first_answer(self, ledger, other):
        first = append(ledger, b"a", "one")
        append(ledger, b"b", "two")
        assert append(other, b"a", "one") == first == append(ledger, b"another", "one")
        assert [entry for _, _, entry in read(ledger)] == [b"a", b"b"]

    def test_the_same_id_twice_at_once_is_stored_once(self, ledger, other):
        for number in range(20):
            with ThreadPoolExecutor(2) as pool:
                told = list(pool.map(lambda each: append(each, b"x", f"id-{number}"), (ledger, other)))  # noqa: B023
            assert told[0] == told[1]
        assert len(read(ledger)) == 20

    def test_a_read_begins_above_a_position_and_has_a_limit(self, ledger):
        for number in range(5):
            append(ledger, b"%d" % number)
        assert [position for position, _, _ in read(ledger, 1, 2)] == [2, 3]
        assert [position for position, _, _ in read(ledger, 3)] == [4, 5]
        assert read(ledger, 5) == [] == read(ledger, 9)

    def test_a_read_of_large_entries_ends_early_and_goes_on(self, ledger):
        for number in range(4):
            append(ledger, bytes([number]) * (READ_BYTES // 2))
        append(ledger, b"x" * (READ_BYTES + 1))
        found, reads = [], 0
        while some := read(ledger, len(found)):
            assert sum(len(entry) for _, _, entry in some[:-1]) < READ_BYTES
            found, reads = found + some, reads + 1
        assert [position for position, _, _ in found] == [1, 2, 3, 4, 5] and reads >= 2

    def test_no_entry_comes_below_one_that_was_read(self, ledger):
        """Four write at once, and one reads: what it has read is the beginning of all that there will be."""
        writers = [self.connect() for _ in range(4)]

        def write(number):
            return [append(writers[number], b"%d %d" % (number, count)) for count in range(25)]

        seen = []
        with ThreadPoolExecutor(4) as pool:
            told = [pool.submit(write, number) for number in range(4)]
            deadline = time.monotonic() + PATIENCE
            while len(seen) < 100 and time.monotonic() < deadline:
                seen += read(ledger, len(seen))
        assert [position for position, _, _ in seen] == list(range(1, 101)) and read(ledger) == seen
        places = [place for future in told for place in future.result()]
        assert sorted(places) == [each[:2] for each in seen], "who appended was told the place that readers see"
        assert all(future.result() == sorted(future.result()) for future in told)
        for writer in writers:
            writer.close()

    def test_the_oldest_entries_are_removed_and_the_others_keep_their_positions(self, ledger, other):
        told = [append(ledger, b"%d" % number) for number in range(6)]
        later, patience = told[-1][1] + 1, time.monotonic() + CALL
        ledger.trim(2, later, patience)
        assert [entry for _, _, entry in read(other)] == [b"2", b"3", b"4", b"5"] and read(ledger, 1) == read(other)
        assert [position for position, _, _ in read(ledger, 4)] == [5, 6] and read(ledger, 2, 1)[0][0] == 3
        ledger.trim(5, told[3][1], patience)
        assert [position for position, _, _ in read(ledger)] == [4, 5, 6], "none from a time on"
        ledger.trim(99, later, patience)
        assert [position for position, _, _ in read(ledger)] == [6], "the newest stays"
        ledger.trim(99, later, patience)
        assert append(other, b"6")[0] == 7 and append(ledger, b"5") == told[5]

    def test_who_listens_is_told_of_entries(self, ledger, other):
        told = []
        other.listen(told.append)

        def hears():
            position, _ = append(ledger, b"x", f"{time.monotonic_ns()}")
            return told and max(told) <= position

        wait_until(hears)
        position, _ = append(ledger, b"last")
        wait_until(lambda: position in told)

    def test_an_engine_that_says_nothing_is_unknown_by_the_deadline_and_the_same_id_mends_it(self, ledger):
        append(ledger, b"before")
        with self.out(ledger):
            for call in (
                lambda: append(ledger, b"x", "once", patience=0.3),
                lambda: ledger.trim(1, 1 << 60, time.monotonic() + 0.3),
                lambda: ledger.read(0, 1, time.monotonic() + 0.3),
                lambda: ledger.read(0, 1, time.monotonic() - 1),
            ):
                began = time.monotonic()
                with pytest.raises(Unknown):
                    call()
                assert time.monotonic() - began < 5
        position, _ = wait_until(lambda: self.tried(ledger, b"x", "once"))
        assert position == 2 and [entry for _, _, entry in read(ledger)] == [b"before", b"x"]

    def tried(self, ledger, entry, id):
        try:
            return append(ledger, entry, id)
        except Unknown:
            return None


class TestFake(Contract):
    @pytest.fixture(autouse=True)
    def log(self):
        self.log = Log()

    def connect(self):
        return Fake(self.log)

    def out(self, ledger):
        class Out:
            def __enter__(self):
                ledger.out = True

            def __exit__(self, *_):
                ledger.out = False

        return Out()

    def test_it_has_each_fault_on_demand(self):
        ledger, hints = self.connect(), []
        ledger.listen(hints.append)
        ledger.faults = ["lost", "stored", "late"]
        for id in ("a", "b", "c"):
            with pytest.raises(Unknown):
                append(ledger, b"x", id)
        assert [position for position, _, _ in read(ledger)] == [1] and append(ledger, b"x", "b")[0] == 1
        ledger.hints = lambda position: [position, position - 1, position]
        assert append(ledger, b"x", "a")[0] == 2 and hints == [1, 2, 1, 2]
        ledger.deliver()
        assert [position for position, _, _ in read(ledger)] == [1, 2, 3] and append(ledger, b"x", "c")[0] == 3
        ledger.slow = 0.05
        with pytest.raises(Unknown):
            append(ledger, b"x", "d", patience=0.01)


def psycopg_connection(server):
    import psycopg

    return psycopg.connect(server.url)


@pytest.fixture(scope="module")
def server():
    with postgres.Postgres() as server:
        yield server


@pytest.mark.skipif(bool(postgres.reason_to_skip()), reason=str(postgres.reason_to_skip()))
class TestPostgres(Contract):
    @pytest.fixture(autouse=True)
    def empty(self, server):
        self.server = server
        server.ask("DROP TABLE IF EXISTS agent_bus_ledger")

    def connect(self):
        from ledgers.postgres import connect

        return connect(self.server.url, single=True)

    def out(self, ledger):
        return self.server.frozen()

    def test_what_is_no_position_ends_no_listener(self, ledger):
        """Any user of the same database may notify of anything."""
        told = []
        ledger.listen(told.append)

        def hears(payload):
            self.server.ask(f"NOTIFY agent_bus_ledger, '{payload}'")
            return told

        wait_until(lambda: hears(7))
        for payload in ("x", "", "9" * 5000):
            self.server.ask(f"NOTIFY agent_bus_ledger, '{payload}'")
        wait_until(lambda: 8 in hears(8))

    def test_who_listens_is_told_nothing_after_the_end(self, monkeypatch):
        """A hint may be on its way to a loop that is closed by then."""
        ledger, told = self.connect(), []

        def notifies(timeout):
            yield SimpleNamespace(payload="1")
            ledger.close()
            yield SimpleNamespace(payload="2")

        listening = SimpleNamespace(pgconn=None, notifies=notifies, close=lambda: None)
        monkeypatch.setattr(ledger, "open", lambda _: ((), listening))
        monkeypatch.setattr("ledgers.postgres.rows_of", lambda *_: [])
        ledger.hear(told.append)
        assert told == [1]

    def test_an_entry_that_a_frozen_server_does_not_even_read_is_unknown_by_the_deadline(self, ledger):
        """It is larger than what the kernel keeps."""
        append(ledger, b"before")
        with self.server.frozen():
            began = time.monotonic()
            with pytest.raises(Unknown, match="in time"):
                append(ledger, b"x" * (32 << 20), patience=0.3)
            assert time.monotonic() - began < 5

    def test_a_warning_in_a_commit_is_unknown(self, ledger):
        """As PostgreSQL says it when somebody has canceled the wait for the second machine."""
        append(ledger, b"before")
        warns = "BEGIN RAISE WARNING 'canceling wait for synchronous replication'; RETURN NEW; END"
        self.server.ask(f"CREATE FUNCTION warns() RETURNS trigger AS $$ {warns} $$ LANGUAGE plpgsql")
        self.server.ask("CREATE TRIGGER t AFTER INSERT ON agent_bus_ledger FOR EACH ROW EXECUTE FUNCTION warns()")
        try:
            with pytest.raises(Unknown, match="canceling wait"):
                append(ledger, b"x", "once")
        finally:
            self.server.ask("DROP FUNCTION warns CASCADE")
        assert append(ledger, b"x", "once")[0] == 2

    def test_a_notice_in_a_commit_is_no_warning(self, ledger):
        says = "BEGIN RAISE NOTICE 'hello'; RETURN NEW; END"
        self.server.ask(f"CREATE FUNCTION says() RETURNS trigger AS $$ {says} $$ LANGUAGE plpgsql")
        self.server.ask("CREATE TRIGGER t AFTER INSERT ON agent_bus_ledger FOR EACH ROW EXECUTE FUNCTION says()")
        try:
            assert append(ledger, b"x")[0] == 1
        finally:
            self.server.ask("DROP FUNCTION says CASCADE")

    def test_fronts_that_start_at_once_make_one_table(self, monkeypatch):
        """Each has looked before any has made it."""
        from ledgers.postgres import Postgres

        looked, ask = threading.Barrier(4), Postgres.ask
        monkeypatch.setattr(Postgres, "ask", lambda *asked: (ask(*asked), looked.wait(PATIENCE))[0])
        with ThreadPoolExecutor(4) as pool:
            for each in pool.map(lambda _: self.connect(), range(4)):
                each.close()
        assert self.server.ask("SELECT position FROM agent_bus_ledger") == [(0,)]

    def test_a_user_who_may_make_no_table_uses_the_one_that_is_there(self, ledger):
        from ledgers.postgres import connect

        self.server.ask("CREATE USER clerk")
        self.server.ask("GRANT ALL ON agent_bus_ledger TO clerk")
        try:
            clerk = connect(self.server.url.replace("//postgres@", "//clerk@"), single=True)
            assert append(clerk, b"x")[0] == 1
            clerk.close()
        finally:
            self.server.ask("DROP OWNED BY clerk")
            self.server.ask("DROP USER clerk")

    def test_the_time_of_an_entry_is_that_at_which_it_got_its_position(self, ledger):
        """An entry that waited behind another one is not older than it."""
        with psycopg_connection(self.server) as holder:
            holder.execute("SELECT 1 FROM agent_bus_ledger WHERE position = 0 FOR UPDATE")
            waiting = background(append, ledger, b"x")
            wait_until(lambda: self.server.ask("SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock'"))
            [[before]] = self.server.ask("SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint")
            holder.commit()
        assert waiting.result(PATIENCE)[1] >= before

    def test_many_entries_are_removed_and_the_row_with_the_lock_stays(self, ledger):
        rows = "SELECT n, n::text, n, '' FROM generate_series(1, 2500) AS n"
        self.server.ask(f"INSERT INTO agent_bus_ledger {rows}")
        ledger.trim(2499, 1 << 60, time.monotonic() + CALL)
        assert self.server.ask("SELECT position FROM agent_bus_ledger ORDER BY 1") == [(0,), (2500,)]

    def test_a_server_that_crashes_while_entries_are_removed_is_unknown(self, ledger):
        for entry in (b"a", b"b"):
            append(ledger, entry)
        holder = psycopg_connection(self.server)
        holder.execute("SELECT 1 FROM agent_bus_ledger WHERE position = 1 FOR UPDATE")
        trimming = background(ledger.trim, 1, 1 << 60, time.monotonic() + 2 * PATIENCE)
        wait_until(lambda: self.server.ask("SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock'"))
        self.server.crash()
        with pytest.raises(Unknown):
            trimming.result(PATIENCE)
        holder.close()
        self.server.start()

    def test_after_its_end_no_connection_is_left(self, ledger):
        append(ledger, b"x")
        ledger.listen(lambda _: None)
        ours = "SELECT 1 FROM pg_stat_activity WHERE datname = 'postgres' AND pid != pg_backend_pid()"
        wait_until(lambda: len(self.server.ask(ours)) == 2)
        ledger.close()
        wait_until(lambda: not self.server.ask(ours))

    def test_a_commit_whose_wait_for_the_second_machine_is_canceled_is_unknown(self, ledger):
        """PostgreSQL answers it with success, a warning, and a row that others see: it may be on one machine only."""
        from ledgers.postgres import connect

        self.server.stop()
        self.server.start(synchronous_standby_names="nowhere")
        waiting = connect(self.server.url, single=True)
        sent = background(append, waiting, b"x", "once", 2 * PATIENCE)
        waits = "SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
        wait_until(lambda: self.server.ask(waits))
        with pytest.raises(Unknown, match="canceling wait for synchronous replication"):
            sent.result(PATIENCE)
        waiting.close()
        self.server.stop()
        self.server.start()
        assert wait_until(lambda: self.tried(ledger, b"x", "once"))[0] == 1 and len(read(ledger)) == 1

    @pytest.fixture
    def requires(self, ledger):
        """requires("second"): from now on a commit waits for that machine."""

        def requires(standbys):
            self.server.ask(f"ALTER SYSTEM SET synchronous_standby_names = '{standbys}'")
            self.server.ask("SELECT pg_reload_conf()")
            wait_until(lambda: self.server.ask("SHOW synchronous_standby_names") == [(standbys,)])

        yield requires
        requires("")

    def test_a_server_whose_quorum_is_taken_away_is_left(self, requires, capfd):
        """It was safe when we connected, and what is appended now could be on one machine only."""
        from ledgers.postgres import connect

        with self.server.second():
            requires("second")
            ours = connect(self.server.url, single=False)
            assert append(ours, b"x")[0] == 1 and ours.about()[1] == "second"
            requires("")
            for number in range(2):
                with pytest.raises(Unknown, match="synchronous_standby_names is empty"):
                    append(ours, b"%d" % number)
            with pytest.raises(Unknown, match="synchronous_standby_names is empty"):
                read(ours)
            assert inside.said(capfd).count("the ledger cannot be used") == 1, "once, however often it is tried"
            requires("second")
            append(ours, b"x")
            requires("")
            for _ in range(3):
                with pytest.raises(Unknown):
                    append(ours, b"y")
            assert inside.said(capfd).count("the ledger cannot be used") == 1, "and again, when it was good meanwhile"
        ours.close()

    def test_what_is_on_one_machine_only_is_not_shown_after_a_crash(self, requires):
        """A commit that waits when its server crashes is there when the server starts again, for everybody who asks."""
        from ledgers.postgres import connect

        with self.server.second():
            requires("second")
            ours = connect(self.server.url, single=False)
            append(ours, b"first")
        sent = background(append, ours, b"waits", "once", 2 * PATIENCE)
        wait_until(lambda: self.server.ask("SELECT 1 FROM pg_stat_activity WHERE wait_event = 'SyncRep'"))
        self.server.crash()
        with pytest.raises(Unknown):
            sent.result(PATIENCE)
        self.server.start()
        assert len(self.server.ask("SELECT 1 FROM agent_bus_ledger WHERE position > 0")) == 2
        with pytest.raises(Unknown, match="in time"):
            ours.read(0, 10, time.monotonic() + 0.5)
        with self.server.second():
            wait_until(lambda: self.tried(ours, b"waits", "once"))
            assert [entry for _, _, entry in read(ours)] == [b"first", b"waits"]
        ours.close()

    def test_a_server_that_crashed_is_used_again_and_has_all(self, ledger):
        told = [append(ledger, b"%d" % number) for number in range(3)]
        self.server.crash()
        with pytest.raises(Unknown):
            append(ledger, b"x", patience=1)
        self.server.start()
        assert [each[:2] for each in read(ledger)][:3] == told

    @pytest.mark.parametrize(
        "settings, single, why",
        [
            ({}, False, "synchronous_standby_names is empty"),
            ({"synchronous_commit": "off"}, True, "both must be on"),
            ({"synchronous_commit": "local", "synchronous_standby_names": "*"}, False, "both must be on"),
            ({"fsync": "off"}, True, "both must be on"),
        ],
        ids=lambda value: str(value),
    )
    def test_a_server_that_could_lose_messages_is_refused(self, settings, single, why):
        from bus_server import Unusable
        from ledgers.postgres import connect

        self.server.stop()
        try:
            self.server.start(**settings)
            with pytest.raises(Unusable, match=why):
                connect(self.server.url, single)
        finally:
            self.server.stop()
            self.server.start()
