"""Queues: workers that claim a job, do it and acknowledge it."""
from __future__ import annotations

from bench import load
from bench.figures import Result, Run, interleaved
from bench.peers import BeanstalkdPeer, QueueBus
from bench.rows_send import against
from bench.session import Session, row

QUEUE, WORKERS = "jobs", 16
EACH = 400  # jobs of one worker in a round; all are stored before it, and one sender may fill a mailbox with 7,500


@row(first="0.5x beanstalkd", goal="1.0x beanstalkd")
def claims_and_acks_are_as_fast_as_beanstalkd(session: Session) -> Result:
    each = session.count(EACH, 100)

    def worked(peer: QueueBus | BeanstalkdPeer) -> Run:
        peer.deliver([QUEUE] * WORKERS * each)
        return session.observed(peer, lambda: load.works(peer.port, peer.wire, QUEUE, WORKERS, each))

    with session.running([*session.buses(QueueBus), *session.peers(BeanstalkdPeer)]) as running:
        runs = {name: lambda peer=peer: worked(peer) for name, peer in running.items()}
        for run in runs.values():
            run()
        found = interleaved(runs, session.settings.rounds, "jobs/s")
    session.notes.append(
        f"{WORKERS} workers, each on its own connection. A worker claims one job, acknowledges it and claims the next, "
        f"{each} times in a round. All jobs are in one queue before the time begins. The figures "
        "for each message are for each job. The bus writes a claim to disk before it answers; beanstalkd does not, and "
        "its jobs are free again after a restart.")
    return Result(list(found.values()), against(session, found, BeanstalkdPeer.name, 0.5, 1.0), session.notes)
