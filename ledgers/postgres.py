"""The ledger in PostgreSQL 12 or later: one table, on a cluster that answers a commit when a second machine has it.

An entry gets its position under the lock of one row, which is held until the commit is visible. So positions are in
the order of commits, and who reads position 7 will never see a position 6 that came later.

What is dangerous about PostgreSQL here:
- A commit that waits for the second machine and is canceled is answered with success and a WARNING, and others see it,
  though the second machine may never get it. So this file cancels nothing, and a WARNING means Unknown.
- A server that is frozen keeps its connections. So each call has a deadline; then its connection is closed.
- What a primary shows after it was cut off, or after a crash, may be on no other machine. So a connection that failed
  once is never used again. The next one asks for a primary, with the settings that keep the entries, and begins with a
  commit: when that is answered, the second machine has all that this primary shows.
- A primary that was cut off may take connections for as long as it likes. So the next connection asks others first.
- A machine that is frozen takes connections, and says nothing. So each machine has its share of the time of a call, and
  the one that failed last is asked last.
- psycopg waits for a name server without a deadline. So a thread of its own looks up the addresses for the next
  connection, and this one uses those that are known.
"""

from __future__ import annotations

import contextlib
import select
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import psycopg
from psycopg import pq
from psycopg.abc import ConnDict
from psycopg.conninfo import conninfo_attempts, conninfo_to_dict, make_conninfo

from bus_server import Unusable, say

from . import READ_BYTES, Ledger, Unknown

CONNECT = 3.0  # s for a connection, where no call gives a deadline
WAKE = 1.0  # s until a listener looks whether it is to end, or connects again
TABLE = b"""
SELECT pg_advisory_xact_lock(7163022);  -- two fronts may start at once
CREATE TABLE IF NOT EXISTS agent_bus_ledger(
    position bigint PRIMARY KEY,  -- 0: the row whose lock whoever appends has
    id text NOT NULL UNIQUE, at bigint NOT NULL, entry bytea NOT NULL);
INSERT INTO agent_bus_ledger VALUES (0, '', 0, '') ON CONFLICT DO NOTHING;
CREATE OR REPLACE FUNCTION agent_bus_append(its_id text, its_entry bytea, OUT its bigint, OUT its_at bigint) AS $$
BEGIN
    PERFORM 1 FROM agent_bus_ledger WHERE position = 0 FOR UPDATE;
    SELECT position, at INTO its, its_at FROM agent_bus_ledger WHERE id = its_id;
    IF NOT FOUND THEN  -- each statement sees what was committed before it, so max() has all that had the lock before
        SELECT max(position) + 1 INTO its FROM agent_bus_ledger;
        its_at := extract(epoch FROM clock_timestamp()) * 1000000;
        INSERT INTO agent_bus_ledger VALUES (its, its_id, its_at, its_entry);
        PERFORM pg_notify('agent_bus_ledger', its::text);
    END IF;
END $$ LANGUAGE plpgsql;
"""
IS_THERE = b"SELECT to_regclass('agent_bus_ledger')::text"  # its user need not be one who may make tables
APPEND = b"SELECT its, its_at, current_setting('synchronous_standby_names') FROM agent_bus_append($1, $2)"
READ = f"""SELECT position, at, entry FROM (
    SELECT *, sum(octet_length(entry)) OVER (ORDER BY position) - octet_length(entry) AS before FROM (
        SELECT position, at, entry FROM agent_bus_ledger WHERE position > $1 ORDER BY position LIMIT $2) AS following
    ) AS summed WHERE before < {READ_BYTES} ORDER BY position""".encode()
KEPT = b"""SELECT coalesce(
    (SELECT min(position) FROM agent_bus_ledger WHERE at >= $1),
    (SELECT max(position) FROM agent_bus_ledger))"""
TRIMMED = 1000  # entries in one transaction of trim()
TRIM = f"""DELETE FROM agent_bus_ledger WHERE position IN (SELECT position FROM agent_bus_ledger
    WHERE position > 0 AND position < $1 ORDER BY position LIMIT {TRIMMED}) RETURNING position""".encode()
SETTINGS = b"""SELECT current_setting('synchronous_commit'), current_setting('synchronous_standby_names'),
    current_setting('fsync'), pg_is_in_recovery()::text"""

ALONE = "synchronous_standby_names is empty, so a message is on one machine only: set it, or --ledger-single"
PLACE = ("host", "hostaddr", "port")
Machine = tuple[Any, ...]  # where one is: its PLACE
SETTLE = b"SELECT pg_logical_emit_message(true, 'agent_bus', '')"  # the smallest transaction whose commit waits


def connect(url: str, single: bool) -> Ledger:
    """The ledger at a URL, with its table. Unusable, if it cannot be reached, or could lose what it acknowledged."""
    ledger = Postgres(url, single)
    try:
        ledger.make_table(time.monotonic() + 2 * CONNECT)
    except (Unknown, psycopg.Error) as error:
        raise Unusable(f"cannot use the ledger: {error}") from None
    return ledger


def unsafe(single: bool, commit: str, standbys: str, fsync: str, in_recovery: str) -> str:
    """Why these settings of a server are not enough; "" if they are."""
    if in_recovery == "true":
        return "this server is a standby: give the primary, or several hosts with target_session_attrs=read-write"
    if fsync != "on" or commit not in ("on", "remote_apply"):
        return f"the server has fsync {fsync} and synchronous_commit {commit}, and both must be on"
    if not (single or standbys):
        return ALONE
    return ""


class Postgres:
    """See Ledger. One connection appends and reads; another one listens, in a thread of its own."""

    def __init__(self, url: str, single: bool) -> None:
        options = conninfo_to_dict(url)
        options.setdefault("target_session_attrs", "read-write")
        options.update(keepalives_idle=5, keepalives_interval=2, keepalives_count=3)
        self.options = options
        self.failed: dict[Machine, float] = {}  # when it failed last, on the monotonic clock, s
        self.single = single
        self.connection: psycopg.Connection[Any] | None = None
        self.machine: Machine = ()  # of this connection, or of the last one
        self.machines: dict[Machine, ConnDict] = {}  # each address, with the options for it, as it was looked up last
        self.looking = threading.Lock()  # held while a thread looks up the addresses
        self.unknown = "the name server has not answered in time"
        self.drops = 0  # connections that were given up
        self.warnings: list[str] = []
        self.told = ""  # the last reason why a server was not taken
        self.leads = self.standbys = ""
        self.closed, self.telling = threading.Event(), threading.Lock()  # it is held while a hint is given, or we close

    def make_table(self, deadline: float) -> None:
        if self.ask(IS_THERE, [], deadline) == [[b""]]:
            server = self.connected(deadline).pgconn
            exchange(server, partial(server.send_query, TABLE), deadline)

    def connected(self, deadline: float) -> psycopg.Connection[Any]:
        """The connection, or a new one whose server is safe; else Unknown, and whoever asks gives it up."""
        if not self.connection:
            self.machine, self.connection = self.open(deadline)
            self.connection.add_notice_handler(self.noticed)
            self.leads = f"{self.connection.info.host}:{self.connection.info.port}"
            self.check(self.connection.pgconn, deadline)
        return self.connection

    def check(self, server: pq.abc.PGconn, deadline: float) -> None:
        [settings] = rows_of(server, SETTINGS, [], deadline)
        why = unsafe(self.single, *(setting.decode() for setting in settings))
        if why and why != self.told:
            say(f"bus_server: the ledger cannot be used: {why}")
        self.told = why
        if why:
            raise Unknown(why)
        if not self.single:
            rows_of(server, SETTLE, [], deadline)

    def about(self) -> tuple[str, str]:
        return self.leads, self.standbys

    def open(self, deadline: float) -> tuple[Machine, psycopg.Connection[Any]]:
        """A connection to the first machine that takes one. The one that failed last is asked last.

        Each machine has an equal share of the time, so that frozen ones do not hide one that works. The last one has no
        more: meanwhile nobody would see that another one leads now.
        """
        machines = self.addresses(deadline)
        why, share = "", (deadline - time.monotonic()) / len(machines)
        for machine in sorted(machines, key=lambda machine: self.failed.get(machine, 0.0)):
            try:
                return machine, connection_to(make_conninfo("", **machines[machine]), time.monotonic() + share)
            except (Unknown, psycopg.Error) as error:
                self.failed[machine] = time.monotonic()
                why = str(error).partition("\n")[0]
        raise Unknown(why)  # of several machines, why the last one failed

    def addresses(self, deadline: float) -> dict[Machine, ConnDict]:
        """The machines that are known. They are looked up again meanwhile."""
        if self.looking.acquire(blocking=False):
            threading.Thread(target=self.look_up, name="addresses", daemon=True).start()
        if not self.machines and self.looking.acquire(timeout=max(deadline - time.monotonic(), 0)):
            self.looking.release()  # the first time we wait for whoever looks them up
        if not self.machines:
            raise Unknown(self.unknown)
        return self.machines

    def look_up(self) -> None:
        """In a thread: learn the addresses. While one of the names has none, the others stay as they are."""
        try:
            found = {tuple(map(one.get, PLACE)): one for one in conninfo_attempts(self.options)}
            names, before = ({one.get("host") for one in each.values()} for each in (found, self.machines))
            self.machines = found if names >= before else self.machines
        except psycopg.Error as error:
            self.unknown = str(error)
        finally:
            self.looking.release()

    def noticed(self, notice: psycopg.errors.Diagnostic) -> None:
        if notice.severity_nonlocalized not in ("NOTICE", "INFO", "LOG", "DEBUG"):
            self.warnings.append(str(notice.message_primary))

    def ask(self, statement: bytes, values: list[bytes], deadline: float) -> list[list[bytes]]:
        """The rows of one statement, which is one transaction. Unknown if anything is not as it should be."""
        self.warnings = []
        try:
            rows = rows_of(self.connected(deadline).pgconn, statement, values, deadline)
            if self.warnings:
                raise Unknown(self.warnings[0])
            return rows
        except (Unknown, psycopg.Error, OSError) as error:
            self.drop()
            raise Unknown(str(error).strip()) from None

    def drop(self) -> None:
        """Close the connection, without a word to the server: what is under way there goes on, or does not."""
        connection, self.connection = self.connection, None
        if connection:
            connection.close()
            self.failed[self.machine] = time.monotonic()
            self.drops += 1

    def append(self, entry: bytes, id: str, deadline: float) -> tuple[int, int]:
        [[position, at, standbys]] = self.ask(APPEND, [id.encode(), entry], deadline)
        self.standbys = standbys.decode()
        if not (self.single or standbys):  # it was taken away from a server that was safe when we connected
            self.drop()
            raise Unknown(ALONE)
        return int.from_bytes(position, "big"), int.from_bytes(at, "big")

    def read(self, above: int, limit: int, deadline: float) -> list[tuple[int, int, bytes]]:
        rows = self.ask(READ, [above.to_bytes(8, "big"), limit.to_bytes(8, "big")], deadline)
        return [(int.from_bytes(position, "big"), int.from_bytes(at, "big"), entry) for position, at, entry in rows]

    def trim(self, upto: int, before: int, deadline: float) -> None:
        """On a connection of its own, so that no append waits for it."""
        _, opened = self.open(deadline)
        with contextlib.closing(opened) as connection:
            try:
                [[kept]] = rows_of(connection.pgconn, KEPT, [before.to_bytes(8, "big")], deadline)
                end = min(upto + 1, int.from_bytes(kept, "big")).to_bytes(8, "big")
                while len(rows_of(connection.pgconn, TRIM, [end], deadline)) == TRIMMED:
                    pass
            except (psycopg.Error, OSError) as error:
                raise Unknown(str(error).strip()) from None

    def listen(self, tell: Callable[[int], None]) -> None:
        threading.Thread(target=self.hear, args=[tell], name="ledger", daemon=True).start()

    def hear(self, tell: Callable[[int], None]) -> None:
        while not self.closed.is_set():
            with contextlib.suppress(psycopg.Error, OSError, Unknown):
                self.hear_one(tell, time.monotonic() + CONNECT)
            self.closed.wait(WAKE)

    def hear_one(self, tell: Callable[[int], None], deadline: float) -> None:
        """Listen to a machine, until it fails, or the other connection has left its machine, which may be frozen."""
        drops = self.drops
        _, opened = self.open(deadline)
        with contextlib.closing(opened) as connection:
            rows_of(connection.pgconn, b"LISTEN agent_bus_ledger", [], deadline)
            while not self.closed.is_set() and self.drops == drops:
                for notify in connection.notifies(timeout=WAKE):
                    self.pass_on(tell, notify.payload)

    def pass_on(self, tell: Callable[[int], None], payload: str) -> None:
        """Every user of the database may notify of anything."""
        with self.telling, contextlib.suppress(ValueError):
            if not self.closed.is_set():
                tell(int(payload))

    def close(self) -> None:
        with self.telling:
            self.closed.set()
        self.drop()


def connection_to(conninfo: str, deadline: float) -> psycopg.Connection[Any]:
    """A connection to one machine. That of psycopg waits for 2 s at least, and for each machine anew."""
    server = pq.PGconn.connect_start(conninfo.encode())
    while (status := server.connect_poll()) != pq.PollingStatus.OK:
        if status == pq.PollingStatus.FAILED:
            raise Unknown(server.get_error_message())
        wait(server, deadline, select.POLLIN if status == pq.PollingStatus.READING else select.POLLOUT)
    server.nonblocking = 1
    return psycopg.Connection[Any](server)


def rows_of(server: pq.abc.PGconn, statement: bytes, values: list[bytes], deadline: float) -> list[list[bytes]]:
    """The rows of one statement; values and rows are binary."""
    binary = pq.Format.BINARY
    formats = [binary] * len(values)
    send = partial(server.send_query_params, statement, values, param_formats=formats, result_format=binary)
    [rows] = exchange(server, send, deadline)
    return [[rows.get_value(row, column) or b"" for column in range(rows.nfields)] for row in range(rows.ntuples)]


def exchange(server: pq.abc.PGconn, send: Callable[[], None], deadline: float) -> list[pq.abc.PGresult]:
    """Send something and wait for all of its results, until the deadline and no longer.

    What psycopg has for this waits for ever for a server that is frozen, or cancels.
    """
    send()
    while server.flush():
        wait(server, deadline, select.POLLIN | select.POLLOUT)
        server.consume_input()
    results = []
    while True:
        while server.is_busy():
            wait(server, deadline, select.POLLIN)
            server.consume_input()
        result = server.get_result()
        if result is None:
            break
        results.append(result)
    for each in results:
        if each.status not in (pq.ExecStatus.TUPLES_OK, pq.ExecStatus.COMMAND_OK):
            raise Unknown(each.get_error_message())
    if not results:
        raise Unknown("the server closed the connection")
    return results


def wait(server: pq.abc.PGconn, deadline: float, events: int) -> None:
    poll = select.poll()
    poll.register(server.socket, events)
    if not poll.poll(max(deadline - time.monotonic(), 0) * 1000):
        raise Unknown("the server did not answer in time")
