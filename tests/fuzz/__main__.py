"""The command: see the package. Its last line has the figures; exit code 1 if anything was violated or is missing."""
import argparse
import importlib
import pathlib
import subprocess
import sys
import tempfile

from tests.fuzz import NEEDS, python_for, told


def main(arguments):
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("mode", nargs="?", choices=NEEDS, help="all of them, in full, if it is left out")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--requests", type=int, help="of raw (a million)")
    size.add_argument("--seconds", type=int, help="of schema (180) or coverage (600)")
    parser.add_argument("--seed", type=int, help="of raw, to repeat a run")
    options = parser.parse_args(arguments)
    if options.mode:
        return one(options.mode, arguments, {option: value for option, value in vars(options).items()
                                             if option != "mode" and value is not None})
    lines, codes = [], []
    for mode in NEEDS:
        done = subprocess.run([sys.executable, "-m", "tests.fuzz", mode], stdout=subprocess.PIPE, text=True)
        print(done.stdout, end="", flush=True)
        lines.append(done.stdout.splitlines()[-1])
        codes.append(done.returncode)
    print("; ".join(lines))
    return max(codes)


def one(mode, arguments, size):
    """Run a mode, with the interpreter that can."""
    python = python_for(mode)
    if not python:
        print(f"{mode}: skipped, {NEEDS[mode]} is not here: make fuzz installs it")
        return 1
    if python != sys.executable:
        return subprocess.run([python, "-m", "tests.fuzz", *arguments]).returncode
    with tempfile.TemporaryDirectory() as folder:
        findings = importlib.import_module(f"tests.fuzz.{mode}").run(pathlib.Path(folder), **size)
    for violation in findings.violations[:20]:
        print(f"    {violation}")
    print(told(mode, findings))
    return int(bool(findings.violations))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
