"""A program that is forked off (tests/kit/forked.py) is in every way like one that was started."""
import json
import os
import signal
import subprocess
import sys
import threading

import pytest

from tests.kit import forked
from tests.kit.processes import PATIENCE, ROOT, runs

ABOUT = """\
import json, os, signal, sys
print(json.dumps([sys.argv, __name__, __file__, os.getcwd(), dict(os.environ), sys.stdin.read(), sys.path[0],
    os.getsid(0) == os.getpid(), sorted(os.listdir("/proc/self/fd")), sys.stdout.encoding, sys.stdout.errors,
    sys.stdout.line_buffering, sys.stdout.write_through, sys.stderr.errors, sys.stdin.encoding,
    str(signal.getsignal(signal.SIGINT)), signal.getsignal(signal.SIGHUP) is signal.SIG_IGN,
    signal.getsignal(signal.SIGPIPE), "bus_server" in sys.modules]))
"""
ENDS = {
    "nothing": "", "a number": "raise SystemExit(300)", "a sentence": "raise SystemExit('no')", "an error": "1 / 0",
    "ctrl-c": "raise KeyboardInterrupt", "a kill": "import os; os.kill(os.getpid(), 9)", "unflushed": "print('x' * 9)",
    "at the end": "import atexit; atexit.register(print, 'over')",
    "a thread": "import threading as t, time\nt.Thread(target=lambda: (time.sleep(0.01), print('late'))).start()",
    "a file": "import sys; open(sys.argv[0] + '.made', 'w').write('kept'); print(open(sys.argv[0] + '.made').read())",
    "stderr": "import sys; sys.stderr.write('half'); sys.stdout.write('other')",
}  # fmt: skip


def both(command, **options):
    """What the started program and the forked one have done; the second one was forked."""
    process = forked.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)
    process.communicate(timeout=PATIENCE)
    assert process.ends, "it was not forked"
    done = [run(command, capture_output=True, timeout=PATIENCE, **options) for run in (subprocess.run, forked.run)]
    return [(each.returncode, each.stdout, each.stderr) for each in done]


@pytest.mark.parametrize("end", ENDS)
def test_it_ends_as_one(end, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(ENDS[end])
    started, other = both([sys.executable, "-I", "-S", str(program)])
    assert (other[0], other[1]) == (started[0], started[1])
    assert other[2].splitlines()[-1:] == started[2].splitlines()[-1:]  # a traceback has a line of forker.py


@pytest.mark.parametrize("flags", [["-S"], ["-I", "-S"], ["-u", "-S"]], ids="".join)
@pytest.mark.parametrize("session, locale", [(True, {}), (False, {}), (False, {"LANG": "", "LC_ALL": ""})])
def test_it_has_what_one_has(flags, session, locale, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(ABOUT)
    env = {**os.environ, "OURS": "\udcff", **locale}
    env.pop("PYTHONUNBUFFERED", None)
    command = [sys.executable, *flags, str(program), "a b", "ü"]
    started, other = both(command, env=env, cwd=tmp_path, input=b"given", start_new_session=session)
    assert json.loads(other[1]) == json.loads(started[1])


def test_a_stdout_that_takes_nothing_is_told(tmp_path):
    program = tmp_path / "program.py"
    program.write_text("print('lost')")
    with open("/dev/full", "wb") as full:
        command = [sys.executable, "-I", "-S", str(program)]
        done = [run(command, stdout=full, stderr=subprocess.PIPE, timeout=PATIENCE)
                for run in (subprocess.run, forked.run)]  # fmt: skip
    assert [each.returncode for each in done] == [120, 120] and all(b"Exception" in each.stderr for each in done)


def test_a_changed_program_is_run_as_it_is_now(tmp_path):
    program = tmp_path / "program.py"
    for text in ("before", "after now"):
        program.write_text(f"print({text!r})")
        assert forked.run([sys.executable, str(program)], capture_output=True, text=True).stdout == f"{text}\n"


def test_it_is_killed_and_waited_for_by_several(tmp_path):
    program = tmp_path / "program.py"
    program.write_text("import signal\nprint('runs', flush=True)\nsignal.pause()")
    process = forked.Popen([sys.executable, str(program)], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"runs\n" and process.poll() is None and runs(process.pid)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.01)
    found = []
    waiting = [threading.Thread(target=lambda: found.append(process.wait(PATIENCE))) for _ in range(3)]
    [each.start() for each in waiting]
    process.kill()
    [each.join() for each in waiting]
    assert found == 3 * [-signal.SIGKILL] and process.poll() == -signal.SIGKILL and not runs(process.pid)
    process.kill()  # this does nothing
    process.communicate()


@pytest.mark.parametrize("command, options", [
    ([sys.executable, "-X", "utf8", str(ROOT / "bus_send.py"), "--help"], {}),
    ([sys.executable, "-c", "print(1)"], {}),
    ([sys.executable, str(ROOT / "bus_send.py"), "--help"], {"env": {**os.environ, "PYTHONIOENCODING": "latin-1"}}),
    ([sys.executable, str(ROOT / "bus_send.py"), "--help"], {"preexec_fn": lambda: None}),
    (["true"], {}),
])  # fmt: skip
def test_what_a_fork_cannot_be_is_started(command, options):
    process = forked.Popen(command, stdout=subprocess.PIPE, **options)
    process.communicate(timeout=PATIENCE)
    assert process.returncode == 0 and process.ends is None
