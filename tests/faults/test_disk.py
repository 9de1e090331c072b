import pytest

from tests.faults import linux, program, skipped_without
from tests.faults.crash import SHORT
from tests.faults.disk import (
    disk_full,
    failing_fsync,
    flipped_bits,
    flipped_log,
    mounts,
    not_flushed,
    power_cut,
    slow_fsync,
)
from tests.kit.processes import in_time

power = skipped_without(linux, mounts, program("mkfs.ext4"))
shim = skipped_without(linux, program("gcc"))


@power
def test_nothing_acknowledged_is_lost_when_the_power_is_cut(tmp_path):
    assert power_cut(tmp_path, 2, life=SHORT).violations == []


@power
def test_a_bus_that_does_not_wait_for_the_disk_is_found_out(tmp_path):
    assert any(": lost: " in violation for violation in not_flushed(tmp_path, 2, life=SHORT).violations)


@shim
def test_a_bus_whose_disk_fails_ends_and_has_kept_what_it_acknowledged(tmp_path):
    assert failing_fsync(tmp_path, 2, life=SHORT).violations == []


@shim
def test_a_bus_that_does_not_hear_that_its_disk_fails_is_found_out(tmp_path):
    """It is no use to wait for its end."""
    found = failing_fsync(tmp_path, 2, fault="deaf", soon=0.5, life=SHORT).violations
    assert any(": lost: " in violation for violation in found)


@shim
def test_a_slow_disk_delays_nobody_but_the_senders(tmp_path):
    assert slow_fsync(tmp_path, 1.0, pause=0.4, busy=in_time).violations == []


@pytest.mark.slow("fills a disk, by the bus and by others")
@skipped_without(linux, mounts)
def test_a_full_disk_refuses_sends_and_nothing_else_until_there_is_room(tmp_path):
    assert disk_full(tmp_path, 1, size=32).violations == []


def test_a_flipped_bit_never_becomes_a_wrong_message(tmp_path):
    assert flipped_bits(tmp_path, 4, 60).violations == []


def test_a_flipped_bit_in_the_log_is_never_silent(tmp_path):
    assert flipped_log(tmp_path, 6).violations == []


def test_a_bus_that_takes_what_is_left_of_its_log_for_all_is_found_out(tmp_path):
    violations = flipped_log(tmp_path, 3, "blind").violations
    assert {each.partition(":")[0] for each in violations} == {"lost", "gap not announced"}
