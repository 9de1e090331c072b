"""How fast the bus is, beside its peers: `make bench`, or `python -m bench ROW...`.

    __main__       the command line; a row after the other, then the document
    session        the table of rows, and contenders started side by side
    rows_*         the rows: a function each, whose name is the sentence it measures
    figures        rounds, medians, ratios, and what they are held against
    peers          the servers that are measured, started and stopped here, and how each counts what it has stored
    *_bus.py       two of them that are written here: what is widely copied, and what a Python team would write
    wires          what each of them speaks, as bytes
    load           what asks them: wrk (with wrk.lua), redis-benchmark, and clients of our own
    crowd          readers that are parked, in processes of their own
    stored         databases with many messages in them
    machine        what this machine is, what it can do at most, and what a process takes of it
    report         docs/performance.md and its plot, from the rounds in .bench/rounds.json (not in git)
    profile        where each microsecond of a durable send goes; staged_server has the clocks

What keeps it honest: all contenders of a row run in one session, in rounds that take turns; each sends the same 84
bytes on as many connections; what a server has stored is compared with what it acknowledged; the flushes of the disk
and the bytes that are written to it are counted; a generator that was busy all the time is named as the limit; and what
others took of the CPUs is told.
"""
