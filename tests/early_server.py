"""bus_server.py with the fault that the crash test must find: it acknowledges at once, and commits a little later.

Its readers see everything in time, so nothing is wrong with it as long as nobody kills it.
"""
import pathlib
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import bus_server  # noqa: E402

LATER = 0.1  # s, or with the first message after that


class Late:
    """A database connection that puts off its COMMIT; transactions that come meanwhile join the one that is open."""

    def __init__(self, database):
        self.database, self.due = database, 0

    def execute(self, statement, *values):
        if statement == "COMMIT":
            return None
        if statement == "BEGIN IMMEDIATE":
            if self.database.in_transaction and time.monotonic() < self.due:
                return None
            if self.database.in_transaction:
                self.database.execute("COMMIT")
            self.due = time.monotonic() + LATER
        return self.database.execute(statement, *values)

    def __getattr__(self, name):
        return getattr(self.database, name)


class EarlyLog(bus_server.Log):
    def __init__(self, path):
        super().__init__(path)
        self.reading.close()
        self.reading = self.writing  # only the one who wrote it sees what is not committed
        self.writing = Late(self.writing)

    def close(self):
        self.reading.commit()
        super().close()


bus_server.Log = EarlyLog
sys.exit(bus_server.main())
