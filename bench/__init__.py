"""How fast the bus is, beside its peers: `make bench`, or `python -m bench ROW...`.

    __main__     the command line; a row after the other, then the document
    figures      rounds, medians, ratios, and what they are held against
    peers        the servers that are measured, started and stopped here, and how each keeps a message
    wires        what each of them speaks, as bytes
    load         what asks them: wrk, redis-benchmark, and clients of our own
    crowd        readers that are parked, in processes of their own
    stored       databases with many messages in them
    machine      what this machine is, and what it can do at most
    rows_*       the rows: a function each, whose name is the sentence it measures
    report       docs/performance.md and its plot, from docs/performance.json
    profile      where each microsecond of a durable send goes

What keeps it honest: all contenders of a row run in one session, in rounds that take turns; each sends the same 84
bytes on as many connections; what a server says it stored is compared with what was acknowledged; the flushes of the
disk are counted; and a generator that was busy all the time is named as the limit.
"""
