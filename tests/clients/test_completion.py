"""`agent-bus completion`: what bash, zsh and fish complete."""
import shlex
import shutil
import subprocess

import pytest

from tests.clients.test_agent_bus import SCRIPT
from tests.clients.test_clients import run
from tools import agent_bus

pytestmark = pytest.mark.usefixtures("home")


@pytest.fixture(scope="module")
def scripts():
    return {shell: run(SCRIPT, "completion", shell)[1] for shell in agent_bus.SHELLS}


def test_bash_completes_commands_and_their_options(scripts):
    def completed(*words):
        line = f"COMP_WORDS=({shlex.join(words)}); COMP_CWORD={len(words) - 1}; _agent_bus; echo ${{COMPREPLY[@]}}"
        done = subprocess.run(["bash", "-c", f"{scripts['bash']}\n{line}"], capture_output=True, text=True)
        assert not done.stderr
        return done.stdout.split()

    assert completed("agent-bus", "re") == ["recv", "relay", "revoke", "redact", "restore"]
    assert completed("agent-bus", "send", "--sub") == ["--subject"]
    assert "--keep" in completed("agent-bus", "serve", "--") and "--to" in completed("agent-bus", "file", "put", "--")
    assert completed("agent-bus", "install", "cl") == ["claude"]
    assert completed("agent-bus", "completion", "z") == ["zsh"]


def test_files_are_completed_only_for_commands_that_take_them(scripts):
    def asks(command):
        line = f"compopt() {{ echo \"$@\"; }}; COMP_WORDS=(agent-bus {command} x); COMP_CWORD=2; _agent_bus"
        done = subprocess.run(["bash", "-c", f"{scripts['bash']}\n{line}"], capture_output=True, text=True)
        return done.stdout

    assert asks("file") == "-o default\n" and asks("send") == asks("who") == ""
    assert "-o default -F" not in scripts["bash"]
    assert "not __fish_seen_subcommand_from file " in scripts["fish"].splitlines()[0]


def test_zsh_completes_commands_and_their_options(scripts):
    if not shutil.which("zsh"):
        pytest.skip("needs zsh")
    stubs = 'compdef() { }; _files() { }; compadd() { shift; print -l -- "$@" }; _describe() { print -l -- ${(P)2} }\n'

    def completed(*words):
        line = f"words=({shlex.join(words)}); CURRENT={len(words)}; _agent_bus"
        done = subprocess.run(["zsh", "-fc", f"{stubs}{scripts['zsh']}\n{line}"], capture_output=True, text=True)
        assert not done.stderr
        return done.stdout.splitlines()

    first = completed("agent-bus", "")
    assert "send:send a message" in first and len(first) == len(agent_bus.COMMANDS)
    assert "--subject" in completed("agent-bus", "send", "") and "claude" in completed("agent-bus", "install", "")


def test_fish_has_a_line_for_every_command_and_option(scripts):
    lines = scripts["fish"].splitlines()
    assert all(line.startswith("complete -c agent-bus -n ") for line in lines)
    assert [name for name in agent_bus.COMMANDS if not any(f"-f -a {name} " in line for line in lines)] == []
    assert "complete -c agent-bus -n '__fish_seen_subcommand_from send' -l subject" in lines
    if shutil.which("fish"):
        text = f"{scripts['fish']}\ncomplete -C 'agent-bus rec'"
        assert "recv" in subprocess.run(["fish", "-c", text], capture_output=True, text=True, check=True).stdout


def test_another_shell_gets_the_ones_that_are_known():
    code, out, err = run(SCRIPT, "completion", "tcsh")
    assert (code, out) == (2, "") and "bash, zsh, fish" in err
