#!/usr/bin/env python3
"""One command for all programs of agent-bus: `agent-bus send bob hello`, or `python3 tools/agent_bus.py` in a clone.

It does nothing itself. COMMANDS says which program each command is, and with which first arguments; that program's
main() gets the rest, in this process. The help and the completion of shells are made from the same table. To add a
command, add a row.

The parts of this file, in order: the table; run (hand on to a program); help; completion; main.
Exit code: that of the program; 2 for a command that does not exist.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import os
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

# Python 3.8 prints this text. Older ones show the line in a SyntaxError, because they do not know `:=`.
if sys.version_info < (3, 9) and (needs := "agent_bus.py needs Python 3.9 or later"):  # noqa: UP036
    sys.exit(needs)

HERE = os.path.dirname(os.path.realpath(__file__))
# The programs lie beside this file or one folder up, or are installed.
sys.path += [folder for folder in (HERE, os.path.dirname(HERE)) if folder not in sys.path]
sys.path.sort(key=lambda folder: folder.endswith("-packages"))  # else an older version that is installed wins


ASKS = "--ask"  # the option with which bus_send.py asks


class Command(NamedTuple):
    """A row of the help, and the program behind it."""

    purpose: str
    example: str  # what follows `agent-bus`
    program: str = ""  # the module whose main() is called; without one, OWN has the function
    first: tuple[str, ...] = ()  # arguments of that program, before those of the user


GROUPS: dict[str, dict[str, Command]] = {
    "Messages": {
        "send": Command("send a message", "send bob 'T1 is done'", "bus_send"),
        "ask": Command("send a question, print the reply", "ask bob 'Is T1 done?'", "bus_send", (ASKS,)),
        "recv": Command("print messages as they arrive", "recv bob", "bus_recv"),
        "inbox": Command("look at unread mail, take none of it", "inbox bob", "bus_inbox", ("look",)),
        "later": Command("send a message at a later time", "later bob 'T1?' --after 1h", "bus_later"),
        "ack": Command("mark mail as read, up to this id", "ack 660ba678a1b40 bob", "bus_inbox", ("ack",)),
    },
    "Look": {
        "who": Command("who listens, and how much mail waits", "who --watch", "bus_who"),
        "log": Command("everybody's messages, as they pass", "log --last 20 --short", "bus_log"),
        "search": Command("find messages by their words", "search disk full", "bus_search"),
        "open": Command("print a link to the page of the bus", "open"),
        "doctor": Command("find what fails on the way to the bus", "doctor", "bus_doctor"),
    },
    "Jobs and files": {
        "work": Command("do the jobs of a queue", "work builds --exec ./build", "bus_work"),
        "file": Command("send a file, or get one", "file put a.tgz --to bob", "bus_file"),
        "lock": Command("reserve files before you change them", "lock 'src/db/*' --why T2", "bus_lock", ("lock",)),
        "unlock": Command("release what you have reserved", "unlock 'src/db/*'", "bus_lock", ("unlock",)),
        "locks": Command("who has reserved what", "locks src/a.py", "bus_lock", ("list",)),
        "outbox": Command("send when the bus is reachable again", "outbox bob < report.md", "bus_outbox"),
        "relay": Command("pass mail on to another bus", "relay bob --to-bus work", "bus_relay"),
    },
    "Agents and machines": {
        "install": Command("connect an agent; start bus at login", "install claude", "bus_install", ("install",)),
        "uninstall": Command("take away what install has added", "uninstall claude", "bus_install", ("uninstall",)),
        "invite": Command("make a token for an agent", "invite dell", "bus_server", ("invite",)),
        "join": Command("connect this machine to a bus", "join https://host:8080 dell", "bus_join"),
        "tokens": Command("list the tokens", "tokens", "bus_server", ("tokens",)),
        "revoke": Command("revoke tokens: of a name, or by id", "revoke dell", "bus_server", ("revoke",)),
    },
    "The bus": {
        "serve": Command("run the bus", "serve --port 8080", "bus_server"),
        "prune": Command("remove old messages", "prune --older 7d", "bus_server", ("prune",)),
        "redact": Command("take a secret out of a message", "redact 660ba678a1b40", "bus_redact"),
        "backup": Command("copy the bus, also while it runs", "backup monday.db", "bus_server", ("backup",)),
        "restore": Command("replace a stopped bus with a copy", "restore monday.db", "bus_server", ("restore",)),
        "move": Command("bring a bus onto a ledger, or back", "move --db bus.db --back", "bus_server", ("move",)),
    },
    "This command": {
        "help": Command("this text, or that of a command", "help send"),
        "completion": Command("a script that completes in your shell", "completion zsh"),
        "version": Command("the version, and where it is", "version"),
    },
}
# The shell completes files for these only.
TAKE_FILES = ("file", "work", "lock", "unlock", "locks", "recv", "serve", "backup", "restore", "prune", "move")
TAKE_TEXT = ("bus_send", "bus_later", "bus_outbox")
COMMANDS = {name: command for group in GROUPS.values() for name, command in group.items()}
# Words of other tools, and what they are here. No typo of a command of ours is among them.
ELSEWHERE = {
    "read": "inbox or recv", "receive": "recv", "get": "recv or file get", "mail": "inbox", "unread": "inbox",
    "watch": "recv or log", "reply": "send --reply-to", "post": "send", "done": "ack", "status": "who",
    "agents": "who", "list": "who", "ps": "who", "start": "serve", "server": "serve", "service": "install service",
    "upload": "file put", "put": "file put", "download": "file get", "release": "unlock", "history": "log",
}  # fmt: skip

OTHERS = """\
Programs of their own (in a clone: in integrations/)
  agent-bus-wake     wake a closed agent when urgent mail waits for it
  agent-bus-mcp      the tools of an agent, over stdio: `install` adds it
  agent-bus-hook     the notices of an agent: `install` adds it
  bus_listener.sh    write mail to files, with bash, curl and jq alone

"""
CONFIGURATION = """\
Environment
  AGENT_BUS_URL        the bus (http://127.0.0.1:8080); or its URLs, as URL,URL
  AGENT_NAME           your own name: the sender, and whose mail is read
  AGENT_BUS_TOKEN      the token, or AGENT_BUS_TOKEN_FILE: a file with it
  AGENT_BUS_CA         the certificates that TLS trusts, if not the system's
  AGENT_BUS_CHANNEL    the channel (default)
  AGENT_BUS_PROFILE    the configuration file to use (default)
  AGENT_BUS_STATE_DIR  how far each name has read (~/.local/state/agent-bus)
  NO_COLOR             no colours

Where a setting comes from, the first that has it: an option of the command; the
environment; the file PROFILE.env in ~/.config/agent-bus, of lines like
AGENT_BUS_URL=http://host:8080, which only you may read (chmod 600). `--bus
PROFILE` chooses the file. It is used only for the bus that it names.
"""


def called() -> str:
    """How the user calls this program."""
    me = sys.argv[0]
    return f"python3 {shlex.quote(me)}" if me.endswith(".py") else os.path.basename(me)


def in_errors(*command: str) -> str:
    """How this program, or a command of it, is called before the sentence of an error: as its programs say it."""
    return " ".join([os.path.basename(sys.argv[0]), *command])


def run(name: str, arguments: Sequence[str]) -> int:
    """Run a command in this process. Its program takes its own name, for its help and its errors, from sys.argv."""
    command, wants_help = COMMANDS[name], {"-h", "--help"}.intersection(arguments)
    if not command.program:
        arguments = take_bus(arguments) if name == "open" else arguments
        if wants_help:
            return show_help([name])
        if len(arguments) > ARGUMENTS[name]:
            further = shlex.quote(arguments[ARGUMENTS[name]])
            raise Unknown(f"{further} is one word too many: `{called()} help {name}`", name)
        return OWN[name](arguments)
    program, me = load(command.program, command.first), called()
    example = f"{me} {command.example}"
    if command.program == "bus_server" and command.first:  # not `serve`, whose answers go to other machines
        program.called = lambda function: f"{me} {function}"
    sys.argv = [f"{sys.argv[0]} {name}", *arguments]
    if command.first == (ASKS,) and wants_help:
        print(help_of_ask(command, example), end="")
        return 0
    try:
        return int(program.main([*command.first, *arguments]) or 0)
    except SystemExit as end:
        similar = similar_option(name, arguments) if end.code == 2 and command.program != "bus_server" else ""
        is_text = end.code == 2 and program.__name__ in TAKE_TEXT and any(re.match("-[^-]", one) for one in arguments)
        hint = f"did you mean {similar}?" if similar else "a text that begins with - stands behind --" * is_text
        if hint and sys.stderr:
            print(f"{in_errors()}: {hint}", file=sys.stderr)
        raise


def similar_option(name: str, arguments: Sequence[str]) -> str:
    """The option that the first unknown one of a command may stand for. Beginnings of an option are known, too."""
    import difflib  # only for a typo

    given = [word.partition("=")[0] for word in arguments[: [*arguments, "--"].index("--")] if word.startswith("--")]
    options = [word for word in words(name) if word.startswith("--")]
    unknown = [one for one in given if not any(option.startswith(one) for option in options)]
    return "".join(difflib.get_close_matches(unknown[0], options, 1, 0.7)) if unknown else ""


def load(program: str, first: Sequence[str] = ()) -> Any:
    """The module of a program. A machine that has joined a bus has only the clients."""
    try:
        return importlib.import_module(program)
    except ModuleNotFoundError as error:
        lacks = f"this needs {error.name}.py, which is not in {HERE}"
        is_of_bus = program == "bus_server" and first  # `serve` has no `first`: it may begin a bus here
        where = "on the machine of the bus" if is_of_bus else "in a clone of agent-bus, or after `pip install` of one"
        raise Missing(f"{lacks}: run it {where}") from None


def is_here(name: str) -> bool:
    """Whether the program of a command is on this machine."""
    program = COMMANDS[name].program
    return not program or importlib.util.find_spec(program) is not None


def show_help(arguments: Sequence[str]) -> int:
    """The help of one command is that of its program."""
    if arguments:
        name = known(arguments[0])
        if COMMANDS[name].program:
            return run(name, ["--help"])
        about = ABOUT.get(name, "").replace("agent-bus", called()) if name == "open" else ABOUT.get(name, "")
        takes = {"completion": " {bash,zsh,fish}", "help": " [COMMAND]", "open": " [--bus PROFILE]"}.get(name, "")
        print(f"usage: {called()} {name}{takes}\n\n{COMMANDS[name].purpose}\n{about}", end="")
        return 0
    print(f"usage: {called()} COMMAND ...\nThe options of a command: {called()} help COMMAND\n\n{'':51}for example")
    for title, commands in GROUPS.items():
        lines = [f"  {name:10} {row.purpose:37} {row.example}" for name, row in commands.items() if is_here(name)]
        if lines:
            print(title, *lines, "", sep="\n")
    print(OTHERS * is_here("install") + CONFIGURATION, end="")
    return 0


def help_of_ask(command: Command, example: str) -> str:
    """The help of `send`, which is the same program, with the purpose of `ask` and without what has no use there."""
    usage, _, options = help_of(command.program, command.first).split("\n\n", 2)
    options = re.sub(rf"^  (?:{ASKS}|--json) .*\n(?: {{10}}.*\n)*", "", options, flags=re.MULTILINE)
    options = re.sub(r"\(\S+\s+with\s+--ask:\s+(\w+)\)", r"(\1)", options)
    options = re.sub(r"keep\s+trying\s+for\s+S", "wait for the reply for S", options)
    options = re.sub(r"a name,\s+names\s+as\s+a,b,c,\s+or\s+all", "who is asked", options)
    usage = re.sub(rf"\[(?:{ASKS}|--json)\] ?", "", usage)
    usage = "\n".join(filter(None, map(str.rstrip, usage.split("\n"))))
    purpose = "Send a question, wait for the reply, print its text. Exit code 3: no reply yet."
    return f"{usage}\n\n{purpose}\nFor example: {example}\n\n{options}"


def version(arguments: Sequence[str]) -> int:
    print(f"agent-bus {load('bus_send').VERSION} in {HERE}, Python {sys.version.split()[0]}")
    return 0


def open_page(arguments: Sequence[str]) -> int:
    """Print the link to the page, with the token of this user: on the bus, only a browser needs it."""
    client = load("bus_recv")
    try:
        found = client.settings()
        url = client.urls_of(found["AGENT_BUS_URL"])[0].rstrip("/")
        header = client.credentials(url)
    except (OSError, ValueError) as error:
        raise Unknown(str(error), "open") from None
    if not url.startswith("http"):
        raise Unknown(f"{url} is a Unix socket, which a browser cannot open: give the bus a port as well", "open")
    print(f"{url}/ui/" + "".join(f"#token={value.split()[-1]}" for value in header.values()))
    try:
        client.ask(url, "/healthz", 2)
    except (client.Refused, client.Unreachable) as fault:
        client.complain(client.no_bus(url, fault), in_errors("open"))
        return 75
    return 0


# Completion


def completion(arguments: Sequence[str]) -> int:
    """Print a script for a shell. It has the commands, and the options that their programs have today."""
    shell = arguments[0] if arguments else ""
    if shell not in SHELLS:
        raise Unknown(f"it is for {', '.join(SHELLS)}: `{called()} completion bash`", "completion")
    print(SHELLS[shell]({name: words(name) for name in COMMANDS if is_here(name)}), end="")
    return 0


def words(name: str) -> list[str]:
    """What may follow a command: its options and, if it has them, its own commands. The help of its program says so."""
    command = COMMANDS[name]
    if not command.program:
        return {"help": [*filter(is_here, COMMANDS)], "completion": [*SHELLS], "open": ["--bus"]}.get(name, [])
    text = help_of(command.program, command.first)
    choices = re.findall(r"^  \{([a-z,]+)\}", text, re.MULTILINE)
    further = [word for choice in choices for word in choice.split(",")]
    text += "".join(help_of(command.program, (*command.first, word)) for word in further)
    return further + sorted(set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", text)) - set(command.first))


def help_of(program: str, first: Sequence[str]) -> str:
    """What its program says; an empty text without the program."""
    out, ends = io.StringIO(), contextlib.suppress(SystemExit, Missing)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()), ends:
        load(program).main([*first, "--help"])
    return out.getvalue()


def take_files(known: dict[str, list[str]]) -> list[str]:
    return [name for name in TAKE_FILES if name in known]


def bash(known: dict[str, list[str]]) -> str:
    cases = "\n".join(
        f"        {name}) words={shlex.quote(' '.join(found))} ;;" for name, found in known.items() if found
    )
    return f"""\
_agent_bus() {{
    local words={shlex.quote(" ".join(known))}
    [ "$COMP_CWORD" -gt 1 ] && case ${{COMP_WORDS[1]}} in
{cases}
        *) words= ;;
    esac
    COMPREPLY=($(compgen -W "$words" -- "${{COMP_WORDS[COMP_CWORD]}}"))
    case ${{COMP_WORDS[1]}} in
        {"|".join(take_files(known))}) compopt -o default 2>/dev/null ;;
    esac
}}
complete -F _agent_bus agent-bus
"""


def zsh(known: dict[str, list[str]]) -> str:
    cases = "\n".join(f"        {name}) compadd -- {shlex.join(found)} ;;" for name, found in known.items() if found)
    commands = "\n".join(f"        {shlex.quote(f'{name}:{COMMANDS[name].purpose}')}" for name in known)
    return f"""\
#compdef agent-bus
_agent_bus() {{
    local -a commands=(
{commands}
    )
    if (( CURRENT == 2 )); then
        _describe command commands
        return
    fi
    case $words[2] in
{cases}
    esac
    [[ $words[2] == ({"|".join(take_files(known))}) ]] && _files
}}
compdef _agent_bus agent-bus
"""


def fish(known: dict[str, list[str]]) -> str:
    lines = [f"-n 'not __fish_seen_subcommand_from {' '.join(take_files(known))}' -f"]
    for name, found in known.items():
        lines.append(f"-n __fish_use_subcommand -f -a {name} -d {shlex.quote(COMMANDS[name].purpose)}")
        for word in found:
            kind = f"-l {word[2:]}" if word.startswith("--") else f"-a {word}"
            lines.append(f"-n '__fish_seen_subcommand_from {name}' {kind}")
    return "".join(f"complete -c agent-bus {line}\n" for line in lines)


SHELLS: dict[str, Callable[[dict[str, list[str]]], str]] = {"bash": bash, "zsh": zsh, "fish": fish}
ARGUMENTS = {"help": 1, "completion": 1, "version": 0, "open": 0}  # how many each of our own commands takes
OWN: dict[str, Callable[[Sequence[str]], int]] = {
    "help": show_help,
    "completion": completion,
    "version": version,
    "open": open_page,
}
ABOUT = {
    "open": """
The link has your token, if you have one. An agent's token shows its own mail
only. For a person who may see all:
    agent-bus invite YOURNAME --operator --page --expires 12h
""",
    "completion": """
bash, in ~/.bashrc:                  eval "$(agent-bus completion bash)"
zsh, in ~/.zshrc, after compinit:    eval "$(agent-bus completion zsh)"
fish, in ~/.config/fish/config.fish: agent-bus completion fish | source
"""
}


class Unknown(Exception):
    """The user has asked for what there is not, or what cannot be had; the text says what to do. Then the command."""


class Missing(Unknown):
    """The program of a command is not on this machine."""


def known(name: str) -> str:
    """The name of a command. Unknown says which one may be meant."""
    if name in COMMANDS:
        return name
    import difflib  # only for a typo

    similar = [ELSEWHERE[name]] if name in ELSEWHERE else difflib.get_close_matches(name, COMMANDS, 3)
    meant = f"did you mean {' or '.join(similar)}?" if similar else f"`{called()} help` lists them"
    raise Unknown(f"there is no command {name!r}: {meant}")


def take_bus(arguments: Sequence[str]) -> Sequence[str]:
    """What follows `--bus PROFILE`, which chooses the bus; all of it, if it does not begin with that."""
    if not arguments or not re.match("--bus($|=)", arguments[0]):
        return arguments
    profile, number = load("bus_recv").profile, 1 + (arguments[0] == "--bus")
    parser = argparse.ArgumentParser(prog=called(), add_help=False)
    parser.add_argument("--bus", type=profile, metavar="PROFILE")
    parser.parse_args(arguments[:number])
    return arguments[number:]


def dispatch(arguments: list[str]) -> int:
    name, *rest = take_bus(arguments) or ["help"]
    return run(known({"-h": "help", "--help": "help", "--version": "version"}.get(name, name)), rest)


def main(argv: Sequence[str] | None = None) -> int:
    try:
        try:
            return dispatch(list(sys.argv[1:] if argv is None else argv))
        finally:
            if sys.stdout:  # None: `>&-`
                sys.stdout.flush()
    except Unknown as unknown:
        if sys.stderr:
            sentence, *command = unknown.args
            print(f"{in_errors(*command)}: {sentence}", file=sys.stderr)
        return 2
    except OSError as error:  # as on a full disk
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # else the interpreter would try again at exit, and complain
        if isinstance(error, BrokenPipeError):  # nobody reads us any more
            return 0
        if sys.stderr:
            print(f"{in_errors()}: {error.filename or 'cannot write the output'}: {error.strerror}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
