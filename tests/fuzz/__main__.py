"""The command: see the package. Its last line has the figures; exit code 1 if anything was violated."""
import argparse
import importlib
import pathlib
import sys
import tempfile

from tests.fuzz import told

MODES = ["raw"]


def main(arguments):
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("mode", nargs="?", choices=MODES, help="all of them if it is left out")
    parser.add_argument("--requests", type=int, help="of raw")
    parser.add_argument("--seed", type=int, help="of raw, to repeat a run")
    options = parser.parse_args(arguments)
    lines, bad = [], False
    for name in [options.mode] if options.mode else MODES:
        mode = importlib.import_module(f"tests.fuzz.{name}")
        given = {option: value for option, value in vars(options).items() if option != "mode" and value is not None}
        with tempfile.TemporaryDirectory() as folder:
            findings = mode.run(pathlib.Path(folder), **given)
        for violation in findings.violations[:20]:
            print(f"    {violation}")
        lines.append(told(name, findings))
        print(lines[-1], flush=True)
        bad = bad or bool(findings.violations)
    print("; ".join(lines))
    return int(bad)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
