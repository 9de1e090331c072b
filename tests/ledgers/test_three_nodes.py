"""Three nodes under Patroni and two fronts on this machine; `python -m tests.ledgers` has many more faults of them."""
import pytest

from tests.kit.nodes import reason_to_skip
from tests.ledgers.rows import ROWS

pytestmark = pytest.mark.skipif(bool(reason_to_skip()), reason=str(reason_to_skip()))


@pytest.mark.slow("three nodes and two fronts start, are all killed, and start again: 25 s")
def test_nothing_acknowledged_is_lost_when_all_nodes_and_all_fronts_are_killed_at_once(tmp_path):
    [row] = [row for row in ROWS if row.name == "kill-everything"]
    result = row.run(tmp_path, 1)
    assert result.violations == [], result.figures
