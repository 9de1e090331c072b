import pytest

from tests.kit.processes import Server


@pytest.fixture
def bus(tmp_path):
    """A running bus with an empty database of its own."""
    with Server(tmp_path / "bus.db") as server:
        yield server
