import collections

import pytest

from tests.kit.processes import Server


@pytest.fixture
def bus(tmp_path):
    """A running bus with an empty database of its own."""
    with Server(tmp_path / "bus.db") as server:
        yield server


def pytest_collection_modifyitems(items):
    """Files with slow tests come first, so that none of several workers begins such a file when the others are done."""
    slow = collections.Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])
