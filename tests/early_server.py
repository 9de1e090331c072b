"""bus_server.py with the fault that the crash test must find: it acknowledges first, and commits with the next batch.

Its readers see everything at once, so nothing is wrong with it as long as nobody kills it.
"""
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import bus_server  # noqa: E402


class Late:
    """A database connection whose COMMIT waits for the next BEGIN."""

    def __init__(self, database):
        self.database = database

    def execute(self, statement, *values):
        if statement == "COMMIT":
            return None
        if statement == "BEGIN IMMEDIATE" and self.database.in_transaction:
            self.database.execute("COMMIT")
        return self.database.execute(statement, *values)

    def __getattr__(self, name):
        return getattr(self.database, name)


class EarlyLog(bus_server.Log):
    def __init__(self, path):
        super().__init__(path)
        self.reading.close()
        self.reading = self.writing  # only the one who wrote it sees what is not committed
        self.writing = Late(self.writing)


bus_server.Log = EarlyLog
sys.exit(bus_server.main())
