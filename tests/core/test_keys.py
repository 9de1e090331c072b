"""The keys of the state: what is sent again is stored once, also after a restart and when it was removed."""

import pytest

from bus_server import (
    ForgetKeys,
    Mark,
    Marks,
    Refused,
    Remove,
)
from tests.kit.inside import said
from tests.kit.store import OnSqlite, commit, message, remove, texts


class TestKeys(OnSqlite):
    def test_a_key_is_stored_once_also_within_a_list_and_after_a_restart(self, store, reopen):
        first = commit(store, message("bob", "x", key="k"), message("bob", "x", key="k"))
        [one], [other] = first.results
        assert [one.duplicate, other.duplicate] == [False, True]
        [[again]] = commit(reopen(), message("bob", "x", key="k")).results
        assert again.duplicate and again.ticks == one.ticks == other.ticks and len(first.visible) == 1

    def test_what_is_kept_of_keys_is_read_from_what_is_removed_and_not_from_what_is_spared(self, store, monkeypatch):
        ticks = []
        for number in range(40):
            ticks.append(commit(store, message("bob" if number % 20 else "eve", key=f"k{number}")).last)
        commit(store, also=[Marks([Mark("default", "eve", True, ticks[-1], ticks[-1], 1)], [], {})])
        read = []
        monkeypatch.setattr(store, "checked", lambda row: read.append(row[0]) or type(store).checked(store, row))
        commit(store, also=[Remove(0, ticks[-1] + 1, True, [], 0)])
        assert read == [ticks[0], ticks[20]]

    def test_a_key_that_many_senders_use_is_looked_up_for_one(self, store):
        commit(store, *[message("bob", sender=f"agent-{n}", key="1") for n in range(2000)])
        steps = []
        store.view.database.set_progress_handler(lambda: steps.append(1), 1000)
        assert commit(store, message("bob", sender="agent-7", key="1")).results[0][0].duplicate
        assert len(steps) < 5, "it looked through the messages of the others"

    def test_a_key_belongs_to_its_sender_and_channel(self, store):
        applied = commit(
            store,
            message("bob", key="k"),
            message("bob", key="k", sender="eve"),
            message("bob", key="k", channel="lab"),
        )
        assert [stored.duplicate for [stored] in applied.results] == [False, False, False]

    def test_a_key_with_another_message_is_refused_and_its_neighbours_are_stored(self, store):
        applied = commit(
            store,
            message("bob", "1", key="k"),
            [message("bob", "2", key="k"), message("bob", "3")],
            message("bob", "4"),
        )
        first, refused, last = applied.results
        assert not isinstance(first, Refused) and refused.status == 409 and not isinstance(last, Refused)
        assert texts(store, "bob") == ["1", "4"], "a refused array left something behind"
        assert commit(store, message(["bob", "eve"], "1", key="k")).results[0].status == 409

    @pytest.mark.parametrize("other", ["2", "a text of another length"])
    def test_a_retry_beside_another_message_with_its_key_has_its_answer(self, store, other):
        [first] = commit(store, message("bob", "1", key="k")).results[0]
        retry, refused = commit(store, message("bob", "1", key="k"), message("bob", other, key="k")).results
        assert retry[0].ticks == first.ticks and refused.status == 409

    def test_a_retry_may_give_the_members_in_another_order(self, store):
        first = commit(store, message("bob", key="k", a=1, b={"c": 1, "d": [2]})).results[0][0]
        [[again]] = commit(store, message("bob", key="k", b={"d": [2], "c": 1}, a=1)).results
        assert again.duplicate and again.ticks == first.ticks
        for other in ({"a": 1, "b": {"c": 1, "d": [3]}}, {"a": True, "b": {"c": 1, "d": [2]}}, {"a": 1}):
            assert commit(store, message("bob", key="k", **other)).results[0].status == 409

    def test_a_list_of_names_is_stored_as_one(self, store):
        [[stored]] = commit(store, message(["bob", "eve"], key="k")).results
        assert len(stored.ticks) == 2
        assert commit(store, message(["bob", "eve"], key="k")).results[0][0].ticks == stored.ticks

    @pytest.mark.parametrize("gone", ["one copy", "all copies"])
    def test_a_retry_after_its_messages_were_removed_has_the_first_answer(self, store, gone):
        [[stored]] = commit(store, message(["bob", "eve"], key="k")).results
        commit(store, also=[remove(stored.ticks[0 if gone == "one copy" else 1] + 1)])
        [[again]] = commit(store, message(["bob", "eve"], key="k")).results
        assert again.duplicate and again.ticks == stored.ticks
        assert commit(store, message("bob", "other", key="k")).results[0].status == 409

    def test_a_key_is_forgotten_when_it_is_older_than_keep_and_not_before(self, store):
        old, new = [commit(store, message("bob", key=key)).last for key in ("old", "new")]
        commit(store, also=[remove(new + 1)])
        assert commit(store, also=[ForgetKeys(old), ForgetKeys(new, 1), ForgetKeys(new)]).results == [0, 1, 0]
        assert not commit(store, message("bob", key="old")).results[0][0].duplicate
        assert commit(store, message("bob", key="new")).results[0][0].duplicate

    def test_what_is_as_old_as_keep_leaves_no_key(self, store):
        old, new = [commit(store, message("bob", key=key)).last for key in ("old", "new")]
        commit(store, also=[remove(new + 1, keys_from=new)])
        assert store.writing.execute("SELECT key FROM keys").fetchall() == [("new",)]

    def test_a_key_whose_name_is_damaged_is_forgotten_too(self, store):
        """Else ForgetKeys would find it again and again."""
        last = commit(store, message("bob", key="k")).last
        commit(store, also=[remove(last + 1)])
        store.writing.execute("UPDATE keys SET key = CAST(x'ff6b' AS TEXT)")
        assert commit(store, also=[ForgetKeys(last + 1, 1), ForgetKeys(last + 1, 1)]).results == [1, 0]

    def test_a_damaged_key_is_told_and_its_retry_is_stored_anew(self, store, capfd):
        first = commit(store, message("bob", key="k")).last
        commit(store, also=[remove(first + 1)])
        store.writing.execute("UPDATE keys SET name = 'cob'")
        assert not commit(store, message("bob", key="k")).results[0][0].duplicate
        assert "the key k of alice is damaged" in said(capfd)
        assert commit(store, message("bob", key="k")).results[0][0].duplicate

    def test_a_damaged_message_with_a_key_can_be_removed(self, store):
        last = commit(store, message("bob", key="k"), message("bob", key="l")).last
        store.writing.execute("UPDATE messages SET text = 'no JSON' WHERE key = 'k'")
        assert commit(store, also=[remove(last + 1)]).results == [last]
