from tests.faults import linux, skipped_without
from tests.faults.soak import soak


@skipped_without(linux)
def test_messages_in_a_steady_flow_are_not_lost_and_nothing_grows(tmp_path):
    assert soak(tmp_path, 960, rate=800).violations == []
