"""Fronts of the next version, for the tests of upgrades: the entries that they write have another head, of format 2."""
from ledgers.mirror import Mirror


class Newer(Mirror):
    FORMATS = (1, 2)

    def to_bytes(self, entry):
        entry = super().to_bytes(entry)
        return entry.replace(b"[2, ", b'[2, "new", ', 1) if self.format == 2 else entry

    def from_bytes(self, entry, *at):
        return super().from_bytes(entry.replace(b'[2, "new", ', b"[2, ", 1), *at)


class Hasty(Newer):
    """It does not ask whether all fronts that live understand format 2."""

    def choose_format(self, fronts):
        self.format = max(self.FORMATS)
