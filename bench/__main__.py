"""`python -m bench [ROW...]`: measure rows side by side, and write docs/performance.md."""
from __future__ import annotations

import argparse
import importlib
import os
import pathlib
import resource
import shutil
import signal
import sys
import tempfile
import traceback

from bench import machine, peers, report
from bench.session import ROWS, Session, Settings

# In the order of the document.
for module in ("send", "names", "queue", "wait", "page", "stored", "search", "programs"):
    importlib.import_module(f"bench.rows_{module}")


def main() -> int:
    options = command_line()
    if options.list:
        print("\n".join(ROWS))
        return 0
    chosen = [name for name in ROWS if not options.rows or any(part in name for part in options.rows)]
    if not chosen:
        print(f"bench: no row has {' or '.join(options.rows)} in its name; --list has them all", file=sys.stderr)
        return 2
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # users' Pythons keep what they have compiled
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the servers are stopped
    return max(measure(name, options) for name in chosen)


def measure(name: str, options: argparse.Namespace) -> int:
    """One row; what goes wrong in it does not end the others."""
    folder = pathlib.Path(tempfile.mkdtemp(prefix="agent-bus-bench-", dir=options.folder))
    settings = Settings(folder, options.python, options.rounds, options.seconds, options.quick)
    moment, others = machine.moment(), machine.Others()
    print(f"\n{report.sentence(name)}\n", flush=True)
    try:
        result = ROWS[name].measure(Session(settings))
    except Exception:
        traceback.print_exc()
        return 1
    finally:
        shutil.rmtree(folder)
    moment["others"] = f"{others.share():.0%}"
    print(f"{report.lines(result)}\n\nOthers took {moment['others']} of the CPUs meanwhile.", flush=True)
    if options.quick:
        print("A quick look, not a result.")
    elif not options.printed:
        report.save(name, result, moment, settings)
    return 0


def interpreter(path: str) -> str:
    """The program itself: a shim of pyenv takes 200 ms to find it, and a virtual environment adds to its start."""
    return os.path.realpath(peers.output(path, "-c", "import sys; print(sys.executable)"))


def command_line() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measure agent-bus beside its peers.")
    parser.add_argument("rows", nargs="*", metavar="ROW", help="a part of the name of a row; none: all of them")
    parser.add_argument("--list", action="store_true", help="the names of all rows")
    parser.add_argument("--quick", action="store_true", help="one short round of everything, printed and not written")
    parser.add_argument("--print", action="store_true", dest="printed", help="print it, write nothing")
    parser.add_argument("--python", action="append", metavar="PATH", help="an interpreter to run the bus with; several "
                        "are measured beside each other (the one that runs this)")
    parser.add_argument("--rounds", type=int, help="of each contender (5)")
    parser.add_argument("--seconds", type=float, help="of one round (3)")
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="where, and so on which disk (%(default)s)")
    options = parser.parse_args()
    options.python = [interpreter(path) for path in options.python or [sys.executable]]
    options.rounds = options.rounds or (1 if options.quick else 5)
    options.seconds = options.seconds or (1 if options.quick else 3)
    return options


if __name__ == "__main__":
    sys.exit(main())
