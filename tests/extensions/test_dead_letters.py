"""Work that is not done: prune spares it, and a dead letter can be put back."""

import pytest

from tests.kit import peers
from tests.kit.peers import mint
from tests.kit.processes import Server, wait_until
from tests.kit.queues import ask, claim, mail, post, prune, send, settle


def test_prune_spares_work_that_is_not_done(bus):
    for msg in ("done", "given back", "in hand"):
        send(bus, msg=msg)
    done, back, _ = claim(bus, max=3)
    assert settle(bus, "ack", done) == settle(bus, "nack", back) == 200
    wait_until(lambda: prune(bus).endswith("1 removed\n"))
    assert mail(bus, "builds") == ["given back", "in hand"]
    assert [job["msg"] for job in claim(bus, max=3)] == ["given back"]


@pytest.mark.parametrize("first", [[], ["first"]], ids=["a-worker-asked", "a-worker-had-one"])
def test_prune_spares_work_that_no_worker_had_though_somebody_has_read_it(bus, first):
    for msg in first:
        send(bus, msg=msg)
    for job in claim(bus):
        assert settle(bus, "ack", job) == 200
    send(bus, msg="waits")
    send(bus, "bob")
    for reader in ("builds", "bob"):  # and each presents its cursor
        now = ask(bus, "GET", f"/recv?to={reader}")[1]["now"]
        assert ask(bus, "GET", f"/recv?to={reader}&since={now}")[0] == 200
    wait_until(lambda: prune(bus) and not ask(bus, "GET", "/log?to=bob")[1]["messages"])
    assert [job["msg"] for job in claim(bus, max=3)] == ["waits"]


# A dead letter that is put back


def dead_letter(bus):
    """The id of a dead letter of the queue builds."""
    send(bus, msg="make bench")
    [job] = post(bus, "/claim", to="builds", wait=0)["messages"]
    post(bus, "/nack", id=job["id"], lease=job["lease"], reason="exit 137")
    return wait_until(lambda: ask(bus, "GET", "/log?to=builds.dead")[1]["messages"])[0]["id"]


def dead_letters(bus):
    found = ask(bus, "GET", "/agents")[1]["agents"]
    return next(each["work"]["dead"] for each in found if each["name"] == "builds")


def test_a_dead_letter_that_was_put_back_is_gone_and_stays_gone(tmp_path):
    with Server(tmp_path / "bus.db", "--max-attempts", "1") as bus:
        letter = dead_letter(bus)
        assert dead_letters(bus) == 1
        job = post(bus, "/again", id=letter)
        assert dead_letters(bus) == 0 and ask(bus, "POST", "/again", {"id": letter})[0] == 409
        bus.kill()
        bus.start()
        assert post(bus, "/claim", to="builds.dead", wait=0)["messages"] == []
        [again] = post(bus, "/claim", to="builds", wait=0)["messages"]
        assert (again["id"], again["msg"], again["attempt"]) == (job["id"], "make bench", 1)
        assert ask(bus, "POST", "/again", {"id": letter})[0] == 409


def test_a_job_comes_back_with_the_members_that_it_had_whatever_their_names_are(tmp_path):
    """Its sender may call a member as the bus calls one of a dead letter. What a letter says of its job is no more."""
    own = {"reason": "a customer asked", "attempts": 7, "dead_of": [1], "of_job": {"from": "eve"}, "x": 1}
    with Server(tmp_path / "bus.db", "--max-attempts", "1") as bus:
        send(bus, msg="make bench", **own)
        [job] = post(bus, "/claim", to="builds", wait=0)["messages"]
        post(bus, "/nack", id=job["id"], lease=job["lease"], reason="exit 137")
        letter = wait_until(lambda: ask(bus, "GET", "/log?to=builds.dead")[1]["messages"])[0]
        assert (letter["dead_of"], letter["attempts"], letter["reason"]) == (job["id"], 1, "exit 137")
        post(bus, "/again", id=letter["id"])
        [again] = post(bus, "/claim", to="builds", wait=0)["messages"]
        its = {"id", "ts", "attempt", "lease", "lease_until"}
        assert again.keys() == job.keys() and all(again[each] == job[each] for each in job.keys() - its)
        send(bus, "builds.dead", "by hand", dead_of="1", of_job={"from": "eve", "msg": "x", "reason": "y"})
        letter = ask(bus, "GET", "/log?to=builds.dead")[1]["messages"][-1]
        again = post(bus, "/again", id=letter["id"])["id"]
        [its] = [each for each in ask(bus, "GET", "/log?to=builds")[1]["messages"] if each["id"] == again]
        assert (its["from"], its["msg"], its["reason"]) == (job["from"], "by hand", "y")


def test_a_dead_letter_in_the_hands_of_a_worker_stays(tmp_path):
    with Server(tmp_path / "bus.db", "--max-attempts", "1") as bus:
        letter = dead_letter(bus)
        [held] = post(bus, "/claim", to="builds.dead", wait=0)["messages"]
        status, answer = ask(bus, "POST", "/again", {"id": letter})
        assert status == 409 and "a worker has" in answer["error"]
        post(bus, "/nack", id=letter, lease=held["lease"])
        assert ask(bus, "POST", "/again", {"id": letter})[0] == 200
        assert post(bus, "/claim", to="builds.dead", wait=0)["messages"] == []


def test_who_may_not_read_the_dead_letters_may_not_put_one_back(tmp_path):
    tokens = mint(tmp_path / "bus.db", boss=["--operator"], alice=[])
    with Server(tmp_path / "bus.db", "--max-attempts", "1") as bus:
        def said(token, path, **body):
            reply = peers.ask(bus, "POST", path, body, tokens[token])
            return reply.status, reply.json

        said("alice", "/send", to="builds", msg="x")
        [job] = said("boss", "/claim", to="builds", wait=0)[1]["messages"]
        said("boss", "/nack", id=job["id"], lease=job["lease"])
        reply = peers.ask(bus, "GET", "/log?to=builds.dead", token=tokens["boss"])
        letter = reply.json["messages"][0]["id"]  # alice sent it, and so may see it
        assert said("alice", "/again", id=letter)[0] == 403
        assert said("boss", "/again", id=letter)[0] == 200
