import collections
import shutil

import pytest

from tests.kit.authority import Authority
from tests.kit.processes import Server


@pytest.fixture
def bus(tmp_path):
    """A running bus with an empty database of its own."""
    with Server(tmp_path / "bus.db") as server:
        yield server


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    if not shutil.which("openssl"):
        pytest.skip("openssl makes the certificates")
    return Authority(tmp_path_factory.mktemp("authority"))


def pytest_collection_modifyitems(items):
    """Files with slow tests come first, so that none of several workers begins such a file when the others are done."""
    slow = collections.Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])
