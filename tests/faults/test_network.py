from tests.faults import program, skipped_without
from tests.faults.network import bad_proxy, behind_nginx, framing, unkeyed


def test_each_send_through_a_bad_proxy_is_in_the_mailbox_once(tmp_path):
    assert bad_proxy(tmp_path, 120).violations == []


def test_retries_without_keys_through_a_bad_proxy_are_found_out(tmp_path):
    found = bad_proxy(tmp_path, 40, body=unkeyed, patience=1).violations
    assert any(violation.startswith("the mailbox: duplicated") for violation in found)


@skipped_without(program("nginx"))
def test_nothing_is_lost_behind_nginx_whatever_its_patience(tmp_path):
    """An impatient one cuts quiet polls; the message that comes then is there for the next, in order."""
    assert behind_nginx(tmp_path, 1, patience=1).violations == []


def test_requests_in_pieces_are_answered_as_they_should_be(tmp_path):
    assert framing(tmp_path, 1).violations == []
