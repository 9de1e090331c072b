import pytest

from tests.faults import linux, program, skipped_without
from tests.faults.disk import mounts
from tests.faults.everything import FAULTS, early, siege

pytestmark = skipped_without(linux, mounts, program("mkfs.ext4"), program("gcc"))


@pytest.mark.slow("40 s of load, with each fault once and then combined; then it waits until everything has arrived")
def test_everything_at_once_loses_nothing_and_leaves_nobody_without_an_answer(tmp_path):
    """The facts are those of the hour. The bars in seconds are ten times as wide, as other tests run at the same time
    and one window in forty seconds weighs much; that memory stays flat cannot be seen in so short a time.
    """
    result = siege(tmp_path, 40, slack=10)
    assert result.violations == []
    assert all(fault in result.figures for fault in FAULTS), "each was injected"


@pytest.mark.slow("20 s: less may lose nothing by chance")
def test_a_bus_under_siege_that_acknowledges_before_it_commits_is_found_out(tmp_path):
    assert any("lost: " in violation for violation in early(tmp_path, 20).violations)
