from tests.faults import linux, program, skipped_without
from tests.faults.disk import mounts, not_flushed, power_cut

power = skipped_without(linux, mounts, program("mkfs.ext4"))


@power
def test_nothing_acknowledged_is_lost_when_the_power_is_cut(tmp_path):
    assert power_cut(tmp_path, 5).violations == []


@power
def test_a_bus_that_does_not_wait_for_the_disk_is_found_out(tmp_path):
    assert any(": lost: " in violation for violation in not_flushed(tmp_path, 2).violations)
