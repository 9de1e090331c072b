"""The kinds of fault: for each what holds, the tests that show it, and the change that makes them red.

The report (python -m tests.faults) has this as its second table. A test's file is in tests/. A new kind is a new row:
plant its control, see each of its tests red, and put the code back.
"""
from typing import NamedTuple

PLANTED = "2026-11-29"  # when each control was last planted by hand


class Kind(NamedTuple):
    kind: str
    holds: str
    tests: tuple  # one to four
    control: str  # changes to the code; after each, the tests that it turns red, if there are several


GUARDS, FAIR, MEMORY = "faults/test_kinds_guards.py", "faults/test_kinds_fairness.py", "faults/test_kinds_memory.py"
AUTHORITY, RULES = "faults/test_kinds_authority.py", "faults/test_kinds_rules.py"
BOUNDS, SHARES = "faults/test_kinds_bounds.py", "faults/test_kinds_shares.py"
EXTENSIONS = "faults/test_kinds_extensions.py"
STORAGE, PYTHON, BASH = "faults/test_kinds_storage.py", "clients/test_client_cases.py", "clients/test_listener_cases.py"

KINDS = [
    Kind("one exception ends the bus, or leaves others without an answer",
         "whatever raises in a timer, a commit, an answer or a shutdown costs one connection a 500 and the log a line",
         (f"{GUARDS}::test_housekeeping_goes_on_after_an_exception_at_any_place_of_it",
          f"{GUARDS}::test_only_the_connection_pays_on_which_it_was_raised",
          f"{GUARDS}::test_revoking_reaches_all_others",
          f"{GUARDS}::test_a_drain_answers_all_others"),
         "`Loop.attempt()` without its `except` (the first three); `Loop.each()` without it (the second and the last)"),
    Kind("the door stays closed after descriptors ran out, or one operation fails its whole list",
         "the listener opens again whatever raised meanwhile; an operation that raises is 500 for its own sender",
         (f"{GUARDS}::test_without_descriptors_an_exception_does_not_close_the_door",
          f"{GUARDS}::test_an_operation_that_raises_is_500_for_it_alone"),
         "`Listener.ready()` drops idle connections before it plans to open again (the first); `State.apply_one()` "
         "catches nothing but `Refused` (the second)"),
    Kind("an answer is given from inside another one",
         "what is pipelined behind an answer is taken in the next turn, so no depth is reached",
         (f"{GUARDS}::test_answers_are_not_given_from_inside_each_other",
          f"{GUARDS}::test_a_bus_that_answers_from_inside_an_answer_is_found_out"),
         "`Outgoing.answer()` calls `advance()` at once; the second test is this control as code"),
    Kind("one connection takes a turn for itself",
         "one request of a connection in a turn, in slices if it is long; refusals that cost little come first; reads "
         "have a rate",
         (f"{FAIR}::test_many_at_once_on_one_connection_do_not_hold_up_others",
          f"{FAIR}::test_a_bus_that_serves_all_of_one_connection_in_one_turn_is_found_out",
          f"{FAIR}::test_a_mailbox_is_not_counted_anew_before_the_rate_was_looked_at",
          f"{FAIR}::test_reads_have_a_rate"),
         "`data_received()` goes on while there is a request (the first; the second is this control as code); the rate "
         "is looked at after the mailboxes (the third); `Storms.read()` never waits (the last)"),
    Kind("memory is counted in messages",
         "an answer ends at about 1 MiB and says that there is more; unread answers have a budget of bytes; a refused "
         "send makes nothing",
         (f"{MEMORY}::test_every_answer_ends_at_about_a_mebibyte",
          f"{MEMORY}::test_what_nobody_reads_has_a_budget",
          f"{MEMORY}::test_refused_sends_make_nothing"),
         "`ANSWER_BYTES` is 1 GiB (the first); `Door.is_full()` is always false (the second); `Sending.check()` makes "
         "the mailboxes that it looks at (the third)"),
    Kind("what was named once stays for ever",
         "each token or address has a budget of new names, 429 beyond it; a name that was only looked at has no row "
         "and is gone after ten minutes; a row without mail and poll goes after `--keep`",
         (f"{MEMORY}::test_names_have_a_budget",
          f"{MEMORY}::test_whatever_one_token_names_its_bus_stays_small_and_tells_in_pages_at_once",
          f"{MEMORY}::test_a_read_of_a_new_name_leaves_no_row_and_is_gone_after_ten_minutes",
          f"{MEMORY}::test_a_row_without_mail_and_without_a_poll_for_as_long_as_mail_is_kept_goes"),
         "`Storms.name()` never waits (the first two); `Mailbox.firm` is true from the start (the third); "
         "`Retention.forget_names()` does nothing (the last)"),
    Kind("a file is looked at, then used",
         "beside a thread that makes and removes the same files each request is answered, none with 500",
         (f"{STORAGE}::test_files_beside_somebody_who_makes_and_removes_them",),
         "`size_of()` without its `try`; or the `open()` of a download without it"),
    Kind("a change counts as seen before it is done",
         "a token that was revoked while its file could not be read is tried again at each look, and refused",
         (f"{AUTHORITY}::test_revoked_while_descriptors_are_used_up",),
         "`Tokens.refresh()` notes the stamp before it reads the file"),
    Kind("two users share one slot",
         "retention and `prune` go on side by side; operations that come meanwhile wait in a list",
         ("core/test_operations.py::test_retention_and_prune_remove_side_by_side_and_none_of_them_is_lost",),
         "`Ledger.add()` keeps only the newest step; or `Retention` has one variable for both removals"),
    Kind("a right is looked at in one moment and used in another",
         "0.2 s after a token was revoked nothing of it is stored or delivered: half a body, what waits for a commit, "
         "a poll, a file; also while descriptors are used up",
         (f"{AUTHORITY}::test_revoked_between_head_and_body",
          f"{AUTHORITY}::test_revoked_while_it_waits_for_the_commit_of_another",
          f"{AUTHORITY}::test_revoked_while_it_is_parked",
          f"{AUTHORITY}::test_what_a_revoked_token_had_begun_ends_while_descriptors_are_used_up"),
         "`Gate.holds()` is always true (the first three); `Bus.entitled()` lets all pass (the second); `Door.evict()` "
         "does nothing (the third); `Tokens.rows()` without its spare descriptor (the last)"),
    Kind("a right is looked at in one moment: files, answers, quiet connections",
         "an upload, a download and an answer that nobody reads stop where they are, and a connection that waits for "
         "its next request is closed",
         (f"{AUTHORITY}::test_revoked_while_a_file_comes_in_pieces",
          f"{AUTHORITY}::test_revoked_while_a_file_is_read",
          f"{AUTHORITY}::test_revoked_while_its_answer_is_not_read",
          f"{AUTHORITY}::test_revoking_closes_the_connections_of_a_token"),
         "`Gate.holds()` is always true"),
    Kind("an id is taken for a secret",
         "an answer counts if its sender may read the mailbox that was asked; a stranger learns from `/healthz` "
         "neither the newest id nor the bus",
         (f"{AUTHORITY}::test_an_answer_counts_only_from_who_may_read_the_question",
          f"{AUTHORITY}::test_a_forged_answer_is_none_when_the_question_is_asked_again",
          f"{AUTHORITY}::test_healthz_of_a_closed_bus_tells_strangers_nothing"),
         "`Question.wants()` asks nobody who may read (the first two); `Gate.knows()` is always true (the last)"),
    Kind("a text has a second way out",
         "a recalled or expired text is told at no endpoint; who reads a message by its id has fetched it",
         (f"{AUTHORITY}::test_a_text_that_is_gone_is_gone_at_every_door",
          f"{AUTHORITY}::test_who_reads_a_message_at_another_door_has_fetched_it"),
         "`readable()` tells each text (the first); it leaves no receipt (the second)"),
    Kind("one mark stands for several mailboxes",
         "a mark moves by what was delivered of that mailbox; `all` has no mark; a receipt of work names the token",
         (f"{AUTHORITY}::test_what_a_group_got_before_a_reader_came_is_not_fetched",
          f"{AUTHORITY}::test_everyone_is_nobodys_own_mailbox",
          f"{AUTHORITY}::test_receipts_of_work_name_the_token_and_then_the_worker"),
         "`Mailboxes.presented()` moves the marks of all names, or `delivered()` looks for no hole (the first); no "
         "exception for `all` (the second); a worker is called what it says (the last)"),
    Kind("a number near zero is taken for none",
         "a ttl below a millisecond is 400, and one of a millisecond is kept",
         (f"{RULES}::test_a_ttl_below_a_millisecond_is_400", f"{RULES}::test_a_ttl_of_a_millisecond_is_one"),
         "`lifetime()` asks `if not ttl` (the first); `State.place()` takes 1,000 us for none (the second)"),
    Kind("a slow disk stands in the loop",
         "files are read, written and hashed in threads: others wait less than 0.1 s",
         (f"{FAIR}::test_a_slow_disk_for_files_holds_up_nobody_else",),
         "`Loop.in_thread()` does the work at once"),
    Kind("a line of the log blocks or raises",
         "one thread writes the lines; what has no room is dropped and counted",
         (f"{FAIR}::test_verbose_and_a_stderr_that_nobody_reads",),
         "`say` prints to stderr itself"),
    Kind("another program's lock ends the bus",
         "503 with Retry-After while it lasts; reads go on, and the next send is stored",
         (f"{FAIR}::test_another_programs_lock_is_503_while_it_lasts_and_then_over",),
         "`Bus.failed()` takes a locked database for a broken one"),
    Kind("a lock is on a name, not on the file",
         "a link to the database, or to its folder, is the same database; one with several hard links is refused",
         (f"{STORAGE}::test_a_name_of_the_same_database_is_in_use",
          f"{STORAGE}::test_a_database_with_several_names_is_refused"),
         "`lock_file()` without `realpath()` (the first); `check_names()` counts no links (the second)"),
    Kind("a loss is silent: the log",
         "a changed bit with a transaction behind it is told at start and to each reader; half a transaction at the "
         "end is not",
         (f"{STORAGE}::test_a_broken_frame_with_others_behind_it_is_damage_and_is_told",
          f"{STORAGE}::test_what_was_torn_at_the_end_is_no_damage",
          "faults/test_disk.py::test_a_flipped_bit_in_the_log_is_never_silent",
          "faults/test_disk.py::test_a_bus_that_takes_what_is_left_of_its_log_for_all_is_found_out"),
         "`State.damaged_wal()` is always false (the first and third; the last is this control as code); it is true "
         "for every log (the second)"),
    Kind("a loss is silent: a restore that was cut off",
         "a start beside half a restore refuses and says how to go on",
         (f"{STORAGE}::test_a_restore_that_was_killed_is_no_empty_bus",
          f"{STORAGE}::test_a_start_beside_half_a_restore_refuses"),
         "`check_names()` looks for no `.restoring` (the first); for no `.new` without a database (the second)"),
    Kind("a retry is not known any more",
         "the key of a message that was removed is kept for `--keep`, with what its sender was told and a hash",
         ("core/test_state.py::test_a_retry_after_its_messages_were_removed_has_the_first_answer",
          "core/test_state.py::test_a_key_is_forgotten_when_it_is_older_than_keep_and_not_before",
          "core/test_state.py::test_what_is_as_old_as_keep_leaves_no_key"),
         "`State.keep_keys()` keeps none (the first two); `ForgetKeys` takes all (the second); `Remove` keeps each, "
         "however old (the last)"),
    Kind("an innocent sender pays",
         "in a mailbox that is three quarters full a sender that has a quarter of it is refused, the others are not",
         (f"{RULES}::test_a_sender_that_fills_a_mailbox_does_not_make_others_pay",
          f"{RULES}::test_a_mailbox_that_many_fill_a_little_takes_all_of_it"),
         "`Sending.check_room()` refuses nobody before the mailbox is full (the first), or everybody (both)"),
    Kind("an attempt that was none is counted",
         "an answer that its worker did not get whole costs no attempt; one that it got does",
         (f"{RULES}::test_an_attempt_that_was_none_does_not_count",
          f"{RULES}::test_an_attempt_counts_when_it_was_handed_out_whole"),
         "`Work.lost()` gives nothing back (the first); a claim counts nothing (the second)"),
    Kind("a clock jumps",
         "nothing is removed until a clock that jumped by over an hour was seen again an hour later",
         (f"{STORAGE}::test_a_clock_that_jumps_removes_nothing",
          f"{STORAGE}::test_a_clock_that_was_right_after_all_is_believed_after_an_hour",
          f"{STORAGE}::test_a_start_with_a_clock_that_is_wrong_removes_nothing"),
         "`clock_is_trusted()` is always true (all); a clock that jumped is never trusted again (the second); the "
         "first look compares with nothing (the last)"),
    Kind("two agents answer each other without end",
         "a warning from 30 turns in ten minutes on, 429 from 120 on; `--turns` sets it, and 0 turns it off",
         (f"{RULES}::test_two_that_answer_each_other_are_warned_and_then_stopped",
          f"{RULES}::test_a_question_is_warned_of_too",
          f"{RULES}::test_turns_0_turns_both_off"),
         "`Storms.turn()` counts nothing (the first two); it takes 0 for a number of turns (the last)"),
    Kind("messages that a reader does not want are not counted",
         "an answer ends at about 1 MiB of messages that were looked at, wanted or not, and as text at 128 KiB, also "
         "one that a commit wakes",
         (f"{BOUNDS}::test_what_is_not_wanted_counts_for_its_bytes",
          f"{BOUNDS}::test_an_answer_as_text_ends_at_128_kib_and_says_that_there_is_more",
          f"{BOUNDS}::test_what_wakes_a_reader_ends_at_the_same_bytes",
          f"{BOUNDS}::test_what_cannot_be_seen_is_hidden_in_runs"),
         "`View.after()` or `Replies.thread()` counts only what it shows (the first); `Poll.room` is `ANSWER_BYTES` "
         "for text too (the second and third); `Receiving.poll_answer()` takes all (the third); `HIDDEN` matches one "
         "character (the last)"),
    Kind("what is known is counted anew: a mailbox that fills",
         "what was fetched is taken off the count, and the count is the true one, also beside a removal",
         (f"{BOUNDS}::test_what_was_fetched_is_taken_off_the_count_of_a_mailbox_and_not_counted_anew",
          f"{BOUNDS}::test_that_count_is_the_true_one_whatever_happens_to_the_mailbox",
          f"{BOUNDS}::test_that_count_is_the_true_one_while_what_was_fetched_is_being_removed"),
         "`Sending.unfetched()` counts anew after each fetch (the first); `note_removed()` leaves the count (the other "
         "two); it is taken off during a removal too (the last)"),
    Kind("what is known is counted anew: expired messages",
         "only those are counted that expired since the last count, once for all lists of names in a request",
         (f"{BOUNDS}::test_the_expired_are_counted_once_for_many_lists_and_not_again",
          f"{BOUNDS}::test_unread_is_what_a_count_of_all_messages_says_whatever_happens_to_them"),
         "`expired()` begins at 0 each time (the first); it goes on from its count after a recall, after a removal, or "
         "when the clock stepped back (the second)"),
    Kind("all names are looked at, and again for each of many",
         "once for all broadcasts of a list; a list looks at what it shows; housekeeping goes in slices",
         (f"{BOUNDS}::test_all_names_are_walked_once_for_all_broadcasts_of_a_list",
          f"{BOUNDS}::test_a_list_looks_at_no_more_names_than_it_shows",
          f"{BOUNDS}::test_names_are_forgotten_in_slices"),
         "`everybody()` counts for each channel (the first); `page()` makes a list of all names (the second); "
         "`Retention.NAMES` is above their number (the last)"),
    Kind("a key is looked up where it cannot be",
         "a retry reads the messages that have its key, sender and channel",
         (f"{BOUNDS}::test_a_retry_reads_what_has_its_channel",),
         "`EARLIER` without the channel"),
    Kind("each message is offered to all who wait",
         "a reply that cannot count asks no token; 8 wait for the reply to one question; a worker that is taken is not "
         "asked again",
         (f"{BOUNDS}::test_replies_that_do_not_count_ask_no_token_for_its_rights",
          f"{BOUNDS}::test_one_question_has_eight_who_wait_for_its_reply",
          f"{BOUNDS}::test_a_message_is_offered_to_one_worker_of_many"),
         "`Question.wants()` asks `Gate.readers()` first (the first); `Replies.asked()` sends nobody away (the "
         "second); `Mailboxes.wake()` asks all at a place (the last)"),
    Kind("a mark goes down",
         "a job that is removed after younger ones takes no gap away from who is behind them",
         ("core/test_mailboxes.py::test_the_mark_of_what_was_removed_only_goes_up",
          "core/test_state.py::test_what_is_removed_later_though_it_is_older_sets_no_mark_back",
          f"{BOUNDS}::test_a_job_that_is_removed_after_younger_ones_takes_no_gap_away"),
         "`Mailboxes.note_removed()` without `max()` (the first and last); `Remove` without it (the second)"),
    Kind("one owner takes the share of all",
         "who has most loses first: its oldest body gets 408, its connections are closed when descriptors run out",
         (f"{SHARES}::test_an_owner_that_has_most_gives_up_its_own_bodies",
          f"{SHARES}::test_descriptors_are_taken_from_who_has_most"),
         "`Door.expect()` gives up the oldest of all (the first); `Door.drop_idle()` closes what is idle alone, or "
         "looks at who has most of what is parked (the second)"),
    Kind("what waits is as large as its request",
         "a connection that is parked or waits for a commit holds neither the body, nor the head, nor a text",
         (f"{SHARES}::test_what_is_parked_holds_no_body_and_no_text",
          f"{SHARES}::test_what_is_parked_holds_no_head",
          f"{SHARES}::test_a_head_that_waits_is_answered_without_a_body",
          f"{SHARES}::test_what_waits_for_a_commit_holds_no_body"),
         "a `Watch` has the text (the first); `Bus.park()` keeps the request (the second), or takes it from a HEAD too "
         "(the third); `Bus.do()` keeps the body (the first and last)"),
    Kind("what waits for the disk is not counted",
         "503 beyond 16 MiB of one owner and 64 MiB of all; it is counted until the commit, whatever becomes of it",
         (f"{SHARES}::test_what_waits_for_the_disk_has_a_budget_for_each_owner_and_for_all",
          f"{SHARES}::test_what_failed_or_was_refused_waits_no_longer",
          f"{SHARES}::test_a_send_larger_than_a_share_is_stored_if_nothing_of_its_owner_waits"),
         "`Ledger.put()` refuses nothing (the first and last); `Ledger.commit()` takes nothing "
         "off (the first two); a send above the share is refused (the last)"),
    Kind("what is small is counted by its bytes alone: files",
         "a PUT has the rate of a message, and at most as many files fit as there are blocks",
         (f"{SHARES}::test_files_have_a_rate_as_messages_have",
          f"{SHARES}::test_as_many_files_fit_as_the_room_has_blocks",
          f"{SHARES}::test_a_small_room_has_a_hundred_files",
          f"{SHARES}::test_a_sender_whose_name_is_an_address_does_not_pay_for_the_files_from_there"),
         "`Blobs.upload()` spends nothing (the first); it does not look at their number (the second and third); it "
         "spends what a sender of that name has (the last)"),
    Kind("what is small is counted by its bytes alone: pairs of names",
         "50,000 pairs are known, some 300 bytes each, 100,000 senders and the budgets of 20,000 owners; the quietest "
         "are forgotten",
         (f"{SHARES}::test_pairs_of_names_have_a_budget_of_memory",
          f"{SHARES}::test_to_forget_the_oldest_costs_the_same_however_many_were_forgotten_before",
          "core/test_storms.py::test_whoever_is_known_is_among_a_number_and_the_quietest_are_forgotten"),
         "`Storms.turn()` without `PAIRS`, or with a deque for each (the first); `note()` on a dict, or without its "
         "limit (the last two)"),
    Kind("a cache keeps what others wrote",
         "each cache of the server has keys of few bytes",
         ("faults/test_kinds_memory.py::test_every_cache_has_keys_of_few_bytes",
          "faults/test_kinds_memory.py::test_escaping_keeps_a_few_characters_and_not_the_texts"),
         "a cache that is not in the list (the first); whole runs of hidden characters as keys (the last)"),
    Kind("work is counted in bytes, and costs more",
         "a large body pays for its CPU time, and an answer as text for four times its bytes",
         (f"{BOUNDS}::test_a_body_pays_for_the_time_that_it_takes_if_that_is_more_than_its_bytes_say",
          f"{BOUNDS}::test_an_answer_as_text_pays_more_because_hidden_characters_are_escaped"),
         "`Storms.parsing()` without its last line (the first); `answered()` without `PARSING` (the last)"),
    Kind("what expired counts as mail",
         "it takes no room in a mailbox, and a reader of a group looks at it once",
         (f"{BOUNDS}::test_what_can_no_longer_be_delivered_takes_no_room_in_a_mailbox",
          f"{BOUNDS}::test_a_full_mailbox_is_counted_again_once_a_minute",
          f"{BOUNDS}::test_expired_mail_of_a_group_is_looked_at_once"),
         "`View.sizes()` counts all (the first); `check_room()` counts again each time (the second); `has_hole()` "
         "begins at the mark (the last)"),
    Kind("what is for others is looked at without an end",
         "a question that is asked again, a page of a thread and a claim look at a bounded number and say how to go "
         "on; sixteen claims are in one list",
         (f"{BOUNDS}::test_a_question_that_is_asked_again_looks_at_few_of_the_replies_that_do_not_count",
          f"{BOUNDS}::test_a_page_of_a_thread_looks_at_few_of_the_replies_that_are_for_others",
          f"{BOUNDS}::test_a_claim_passes_over_expired_jobs_in_slices_and_comes_to_the_one_behind_them",
          f"{BOUNDS}::test_sixteen_claims_are_in_one_list_and_the_others_follow"),
         "`Replies.reply_to()` without `LOOKED`, or for any mailbox (the first); a page ends at `Bus.last`, or is 404 "
         "without a message (the second); `Claim.untaken()` without `MAX_MESSAGES`, or counts the bytes of what it "
         "found alone (the third); `Claim.is_large` is false (the last)"),
    Kind("a slice is as large as what lies there",
         "a removal and dead letters end by number and by bytes, and the next slice follows",
         ("core/test_state.py::test_a_removal_looks_at_ten_messages_for_each_that_it_may_remove_and_says_how_far_it_came",
          "core/test_state.py::test_a_slice_of_a_removal_ends_by_bytes_too",
          "core/test_index.py::test_dead_letters_are_buried_in_slices",
          f"{BOUNDS}::test_slices_of_dead_letters_follow_each_other_until_none_is_left"),
         "`Remove` without `LOOKED_PER_REMOVED` (the first), or by number alone (the second); `Bury` by number alone "
         "(the third); `Work.buried()` ends there (the last)"),
    Kind("one statement asks for each row what is the same for all",
         "the readers of a broadcast once; a key by its length; a name that never read, and the expired, from memory",
         ("core/test_state.py::test_whether_a_broadcast_was_read_is_asked_once_for_all_readers",
          f"{BOUNDS}::test_a_retry_with_another_text_is_refused_without_a_look_at_the_first_one",
          f"{BOUNDS}::test_what_is_unread_of_names_that_never_read_needs_no_look_at_the_disk",
          f"{BOUNDS}::test_a_list_counts_so_many_expired_and_the_next_one_counts_on"),
         "`UNFETCHED` with a subquery over the readers (the first); `first_copy()` reads each text (the second); "
         "`unread()` counts up to 0 on the disk (the third); `count_expired()` has no limit, or its part is kept (the "
         "last)"),
    Kind("large requests and answers cost no more than small ones",
         "an owner and its reader have a budget of bytes, charged when an answer is made, at that time",
         (f"{BOUNDS}::test_who_gave_the_bus_too_much_work_waits_with_large_bodies_lists_and_claims",
          f"{BOUNDS}::test_a_large_answer_is_charged_to_its_reader_and_not_to_others_of_its_owner",
          f"{BOUNDS}::test_a_large_message_that_is_asked_for_by_its_id_is_charged_also_if_its_text_is_not_shown",
          "core/test_storms.py::test_the_time_before_much_work_is_no_credit_for_it"),
         "`Bus.answer()` or `Work.claim()` looks at no budget (the first); `Bus.answered()` charges nothing, or the "
         "owner alone (the second); `one_of()` charges nothing (the third); `Budget.take()` keeps the time (the last)"),
    Kind("a turn has no memory, no thread or no time",
         "it is begun again; what has no thread has failed for good; of many sockets each has its turn",
         ("core/test_loop.py::test_a_turn_for_which_there_is_no_memory_is_begun_again",
          "core/test_loop.py::test_without_memory_to_report_an_exception_the_others_are_served_all_the_same",
          "core/test_loop.py::test_work_for_which_the_system_has_no_thread_has_failed_and_is_not_done_later",
          "core/test_loop.py::test_sockets_for_which_a_turn_has_no_time_come_first_in_the_next_one"),
         "`Loop.patiently()` catches nothing (the first); `say_exception()` raises (the second); `in_thread()` catches "
         "no RuntimeError, or leaves the work in the pool (the third); `take_turn()` without `timely()`, or without "
         "its order (the last)"),
    Kind("memory fails between a commit and its announcement",
         "what was not rolled back is; what nobody could be told of is found by each poll",
         ("core/test_server.py::test_what_could_not_be_rolled_back_for_want_of_memory_is_rolled_back_before_the_next_list",
          "core/test_server.py::test_after_one_failure_on_the_way_to_a_commit_the_next_send_is_stored",
          "core/test_server.py::test_a_message_that_nobody_could_be_told_of_is_found_by_each_poll",
          "core/test_server.py::test_after_any_part_of_an_announcement_failed_each_poll_looks_at_the_disk"),
         "`State.apply()` rolls nothing back first (the first); `Ledger.plan()` notes before it plans (the second); "
         "the end of a hold does not look (the third); `Bus.sure` misses a part, or comes back (the last)"),
    Kind("a name is forgotten, and its gap or its reader with it",
         "who reads it along is told of a gap, also after a restart; who polls meanwhile stays",
         (f"{BOUNDS}::test_who_reads_a_name_along_that_was_forgotten_is_told_of_a_gap_also_after_a_restart",
          f"{BOUNDS}::test_a_name_that_is_polled_while_it_is_being_forgotten_stays_and_has_a_row_again",
          f"{BOUNDS}::test_no_name_is_forgotten_while_the_clock_is_not_trusted",
          "core/test_mailboxes.py::test_a_name_that_listens_is_not_forgotten_however_long_ago_the_clock_says_its_poll_was"),
         "`Mailboxes.gap()` for observers alone, or `forgotten` is not loaded (the first); `Retention.forgotten()` "
         "drops all, or writes no row (the second); `forget_names()` trusts each clock (the third); `idle()` does not "
         "ask who listens (the last)"),
    Kind("a damaged index stays, or spreads",
         "it is merged no further, and made anew at the next start, though its pages cannot be read",
         ("core/test_index.py::test_a_damaged_list_of_runs_is_merged_no_further_and_mended_at_the_next_start",
          "core/test_index.py::test_an_index_whose_pages_no_statement_can_read_is_made_anew_at_start",
          "core/test_index.py::test_after_an_error_of_a_damaged_page_the_next_start_makes_the_index_anew",
          "core/test_index.py::test_a_damaged_page_that_also_takes_no_mark_fails_its_list_alone"),
         "`Index.merge()` takes any runs (the first); `renew_index()` drops the tables, or `mend()` does without it or "
         "without VACUUM (the second); no mark after an error (the third); the mark may raise (the last)"),
    Kind("who waits is judged by what was",
         "who waits for a fetch is shown the message by its own right, or that it is gone; a list of which nothing is "
         "left holds up nobody",
         (f"{AUTHORITY}::test_who_waits_for_a_fetch_and_is_shown_the_message_has_fetched_it",
          f"{AUTHORITY}::test_who_waits_for_the_fetch_of_what_is_removed_is_told_that_it_is_gone",
          f"{AUTHORITY}::test_who_may_answer_is_asked_of_the_tokens_as_they_are_now",
          f"{AUTHORITY}::test_a_list_of_which_nothing_may_be_done_any_more_holds_up_nobody_and_is_counted_no_longer"),
         "`Replies.unwatched()` tells with any right (the first), or tells what it had (the second); `Tokens.named` "
         "keeps what it had (the third); `Ledger.commit()` plans nothing or counts nothing out after such a list (the "
         "last)"),
    Kind("clients: a bus has more names than a page",
         "the tools and the hooks ask for their own channel and name, and say that there are more",
         ("integrations/test_mcp.py::test_on_a_bus_with_more_names_than_a_page_it_asks_for_its_own_channel_and_name",
          f"{PYTHON}::test_a_session_asks_who_listens_on_its_own_channel"),
         "`agents()` or `whoami()` asks for all (the first); `heard_elsewhere()` does (the second)"),
    Kind("what was written in part counts as written",
         "a piece of a file of which not all was written is 507 at once; the part has no hole, and goes on from there",
         (f"{EXTENSIONS}::test_a_piece_that_was_written_in_part_ends_an_upload",),
         "`Upload.wrote()` refuses a piece of which nothing was written, and no other"),
    Kind("a tool asks more than its token allows",
         "`bus_file.py put` stores and announces a file with a token that may only send",
         ("clients/test_bus_file.py::test_a_token_that_may_only_send_leaves_files_too",),
         "`held()` takes the 403 of its HEAD for the end"),
    Kind("a sender's member stands beside the bus's own",
         "a job has each member once; `attempt`, `lease` and `lease_until` are those of the bus",
         (f"{EXTENSIONS}::test_what_a_sender_calls_lease_is_not_in_a_job",),
         "`render()` of work.py leaves nothing out"),
    Kind("an endpoint has no rate",
         "each endpoint but the public ones is 429 when the budget of its owner is used up; no step is planned for it",
         (f"{EXTENSIONS}::test_whatever_is_asked_has_a_rate",),
         "`Work.settle()` or `Blobs.get()` does not call `Storms.read()`"),
    Kind("a copy outlives its message",
         "a dead letter has what is left of the ttl of its message; a job that has expired becomes none",
         (f"{EXTENSIONS}::test_a_dead_letter_lives_no_longer_than_its_message",),
         "`bury()` places a Draft without a ttl; or it does not ask `is_expired()` (`nack` and `bury`)"),
    Kind("what was named once stays for ever: queues",
         "the row that a claim made goes when nobody asks for the time of `--keep`; until then memory knows it too",
         (f"{EXTENSIONS}::test_a_row_that_a_claim_made_goes_when_nobody_asks_any_more",),
         "`Work.claim()` does not make the mailbox firm"),
    Kind("housekeeping looks at all, again and again: jobs",
         "a slice looks at 1,000 jobs and goes on behind them; only what is moved to the dead letters is read",
         (f"{EXTENSIONS}::test_jobs_that_stay_are_looked_at_in_slices_and_not_read",),
         "`Bury.apply()` reads the message of each job, or `LOOKED` is above their number"),
    Kind("one of many ways is not told",
         "who waits for a fetch is answered whichever way the message was fetched, and only for that message",
         (f"{EXTENSIONS}::test_who_waits_for_a_fetch_hears_of_it_whichever_way_it_was_fetched",
          f"{EXTENSIONS}::test_who_waits_for_a_broadcast_hears_of_its_first_fetch"),
         "`Mailboxes.note()` tells nobody (both); or it tells of all up to a message that was read by its id (the "
         "first)"),
    Kind("clients: an answer is bounded by its bytes alone",
         "a client reads 16 MiB, of which a parser makes 0.5 GB at most; a message that would not fit gets 413",
         (f"{EXTENSIONS}::test_no_answer_is_longer_than_what_a_client_reads",),
         "`ANSWER_BYTES` of the clients is 64 MiB; or `Sending.drafts()` accepts each length"),
    Kind("clients: a strange answer moves the cursor",
         "a time more than five minutes ahead moves no cursor, and is said once",
         (f"{PYTHON}::test_an_answer_from_the_future_moves_no_cursor_and_is_said_once",
          f"{BASH}::test_an_answer_from_the_future_moves_no_cursor_and_is_named"),
         "`check_times()` takes each time (the first); `verdict` in bus_listener.sh knows no `ahead` (the second)"),
    Kind("clients: what cannot be seen is printed",
         "variation selectors, fillers, blanks and annotations are written out, or are a blank in LOG",
         (f"{PYTHON}::test_what_must_be_hidden_is_and_letters_are_not",
          f"{PYTHON}::test_the_bus_the_clients_and_the_integrations_hide_the_same",
          f"{BASH}::test_what_cannot_be_seen_is_a_blank_in_LOG"),
         "`HIDDEN` of bus_recv.py without U+2800 (the first two); `LINE` of bus_listener.sh without it (the last)"),
    Kind("clients: a dead address comes first",
         "the next address is tried after 250 ms",
         (f"{PYTHON}::test_a_dead_address_costs_a_quarter_of_a_second",
          f"{PYTHON}::test_an_address_that_refuses_is_passed_at_once_and_a_slow_one_gets_more_time"),
         "`dial()` waits for each address as long as it may"),
    Kind("clients: a login in a URL is lost or shown",
         "that of a proxy is sent; one in the bus's URL is refused and not shown",
         (f"{PYTHON}::test_a_login_of_the_proxy_is_sent_with_every_request",
          f"{PYTHON}::test_a_login_of_the_proxy_opens_the_tunnel",
          f"{PYTHON}::test_a_login_in_the_url_is_refused_in_words_and_not_shown"),
         "`login_of()` finds none (the first two); `parts_of()` accepts `@` (the last)"),
    Kind("clients: a token file is read differently",
         "a byte order mark and empty lines around a token do not matter, in Python and in bash",
         (f"{PYTHON}::test_a_token_with_a_byte_order_mark_or_empty_lines_is_read",
          f"{BASH}::test_a_token_with_a_byte_order_mark_or_empty_lines_is_read"),
         "the mark is not stripped: in `credentials()` (the first), in `strip` of bus_listener.sh (the second)"),
    Kind("bus_listener.sh: an old server, rotated files",
         "a server of the first contract is read from 0, also if it hangs up on `last`; each message is stored once "
         "while files are renamed or removed",
         (f"{BASH}::test_a_server_that_drops_the_connection_on_last_is_read_from_0",
          "clients/test_listener.py::test_a_server_of_the_old_contract_is_read_from_0_and_its_clock_is_no_cursor",
          f"{BASH}::test_after_a_rotation_each_message_is_once_in_a_new_file",
          f"{BASH}::test_messages_that_arrive_during_rotations_are_stored_once_each"),
         "`digest` does not fall back to 0 after curl's 52 and 56 (the first), or after 400 (the second); `reopen` "
         "never does (the third); `receive` takes its place from FULL, which may be another one by now (the last)"),
    Kind("bus_listener.sh: no HOME, no flock, no locks",
         "it writes to the user's home, locks with perl, and says where locks do not work",
         (f"{BASH}::test_without_HOME_it_writes_where_the_python_clients_do",
          "clients/test_listener.py::test_without_flock_as_on_macOS_perl_takes_the_lock",
          f"{BASH}::test_where_locks_do_not_work_it_says_so"),
         "the home is `$HOME` alone (the first); no perl (the second); each failed lock is another listener's (the "
         "last)"),
]  # fmt: skip

PREFACE = f"""\
## Kinds of fault

We found these kinds by attacking the bus, and by running it on many machines. The files of the tests are in
[tests](../tests). A control is a deliberate mistake. Each was put into the code by hand on {PLANTED}, or is a part of
its test, and the tests named beside it failed, as they must.

| kind | what holds | tests | control |
|---|---|---|---|
"""


def table_of_kinds():
    """The second part of the report."""
    rows = [f"| {kind} | {holds} | {', '.join(f'`{test}`' for test in tests)} | {control} |\n"
            for kind, holds, tests, control in KINDS]  # fmt: skip
    return PREFACE + "".join(rows)
