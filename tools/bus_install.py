#!/usr/bin/env python3
"""Connect an agent program to the bus, or start the bus at login; and take that away again.

    python3 tools/bus_install.py install claude
    python3 tools/bus_install.py install codex --dry-run
    python3 tools/bus_install.py install gemini --http --url http://10.0.0.5:8080 --name alice
    python3 tools/bus_install.py install service --port 8080
    python3 tools/bus_install.py uninstall claude

An agent program gets the MCP server `bus` and, where it has hooks, the hook that tells of waiting mail. What else is in
these files stays as it is, with its comments. What the files were before is kept in the state directory, so `uninstall`
leaves every byte as it was; if somebody changed a file meanwhile, only our entries go. --dry-run shows the difference
and changes nothing. With --http the program needs a URL and a token only; then the server is POST /mcp of the bus, and
nothing of ours runs on the machine.

What is written names this program's own files, so it works in every folder; after you move or remove this program,
install again. No token is written: it is in AGENT_BUS_TOKEN, or in our configuration file.

`service` writes a unit for systemd's user manager, or on macOS an agent for launchd (which nobody has tried yet): the
bus runs whenever this user is logged in. The entry of an agent program also gets the AGENT_BUS_... variables that are
set at the install, except secrets and names. The bus gets the options after the word `service`, with absolute paths,
and one variable of this shell: XDG_STATE_HOME.

The other parts: bus_agents.py (the table of the agent programs: which files, and what is written there), bus_change.py
and bus_edit.py (how these files are changed), bus_service.py (the service).
Exit code: 0 done, 1 refused (another's file or entry is in the way), 2 usage, 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import glob
import os
import shlex
import shutil
import sys
import sysconfig
from collections.abc import Sequence

# Python 3.8 prints this text. Older ones show the line in a SyntaxError, because they do not know `:=`.
if sys.version_info < (3, 9) and (needs := "bus_install.py needs Python 3.9 or later"):  # noqa: UP036
    sys.exit(needs)

HERE = os.path.dirname(os.path.realpath(__file__))
sys.path += [HERE, os.path.dirname(HERE)]  # the clients lie beside this file or one folder up, or are installed
sys.path.sort(key=lambda folder: folder.endswith("-packages"))  # else an older version that is installed wins
from bus_agents import AGENTS, hooks_of, server, token_of  # noqa: E402
from bus_change import Change, InTheWay, changes, complain, keep, show, tell, write_all  # noqa: E402
from bus_service import install_service, uninstall_service  # noqa: E402

import bus_recv  # noqa: E402

ANSWER_SECONDS = 2.0  # for the bus, which may be down


def install_agent(name: str, options: argparse.Namespace) -> int:
    agent, files = AGENTS[name], changes(name)
    entries = [(agent.servers, [(agent.servers.at, server(agent, options))])]
    if agent.hooks and (hooks := hooks_of(agent, options)):
        entries.append((agent.hooks, [*agent.skeleton, *hooks]))
    for file, added in entries:
        files[file.path()].add(added)
    if options.dry_run:
        return show_all(files)
    already = " already" * all(change.now == change.shall for change in files.values())
    ours_in = list(dict.fromkeys(file.path() for file, _ in entries))
    records = write_all(files)
    keep(name, {path: records[path] for path in ours_in})
    missing = f"; there is no `{name}` on your PATH yet" * (name == "claude" and not shutil.which(name))
    tell(f"{agent.title} has the tools of the bus{already}, from its next start on: {' and '.join(ours_in)}{missing}")
    for line in [*session(options), *advice(name, options, hooked=len(entries) > 1)]:
        tell(line)
    return 0


def session(options: argparse.Namespace) -> list[str]:
    """Which bus and which name a session will have, whether that bus answers now, and if a session gets no mail."""
    given = bus_recv.settings(options.url)
    url, name = given["AGENT_BUS_URL"], options.name or given.get("AGENT_NAME")
    who = name or ("what its token says" if options.http else "the title of the session, or its folder")
    if name and name == os.environ.get("AGENT_NAME") and not (options.name or options.http):
        who += f" if AGENT_NAME is set where it starts; to have it written, give --name {name}"
    now, denied = "it does not answer now", []
    try:
        bus_recv.ask(url, "/healthz", ANSWER_SECONDS)
        now = "it answers"
        its, _ = bus_recv.ask(url, "/whoami", ANSWER_SECONDS)  # does it need a token that we do not have?
        if options.name and its.get("name", options.name) not in (None, options.name):
            now += f", but the token that is set here sends as {bus_recv.word(its['name'])} only"
    except (bus_recv.Refused, bus_recv.Unreachable, ValueError) as fault:
        status = getattr(fault, "status", 0)
        if status == 401:
            denied.append(no_mail(url))
        elif status != 404:  # of an older bus, or one without people.py
            now += f" ({fault})"
    return [f"the bus is {url}: {now}. The name of a session there is {who}", *denied]


def no_mail(url: str) -> str:
    """Why the bus gives this machine no mail, and how the machine gets a token."""
    invite = bus_recv.called("python3 bus_server.py invite", "invite")
    how = f"on the machine of the bus, run {invite} NAME, and paste the line that it prints here"
    if bus_recv.credentials(url):
        why = "the bus does not accept the token that is set here, which is wrong, cut off, revoked or expired"
        doctor = bus_recv.called("bus_doctor.py", "doctor")
        return f"sessions get no mail: {why}; {doctor} tells more. For a new one, {how}"
    return f"sessions get no mail until this machine has a token: {how}"


def advice(name: str, options: argparse.Namespace, hooked: bool) -> list[str]:
    """What the user must know, or still has to do."""
    agent, lines, given = AGENTS[name], [], bus_recv.settings(options.url)
    if name == "claude" and (plugin := plugin_folder()):
        lines.append(
            "this tells a session how much mail waits; to have its text shown as it comes, use the plugin "
            f"instead: claude --plugin-dir {shlex.quote(plugin)}"
        )
    file = shlex.quote(bus_recv.configuration()[0])
    if options.http and token_of(options):
        lines.append(f"{agent.title} takes the token from its environment; before you start it: set -a; . {file}")
    elif not options.http and os.environ.get("AGENT_BUS_TOKEN"):
        lines.append(f"AGENT_BUS_TOKEN is not written there: put it into {file}, or use AGENT_BUS_TOKEN_FILE")
    if options.http and given.get("AGENT_BUS_CA") and name == "claude":
        trusted = shlex.quote(given["AGENT_BUS_CA"])
        lines.append(f"start Claude Code with NODE_EXTRA_CA_CERTS={trusted}, so that it trusts the bus")
    no_hook = f"{agent.title} has no hook of ours: it hears of mail when it calls bus_inbox"
    return lines + [line for line in (agent.allow, agent.allow_hook if hooked else no_hook) if line]


def uninstall_agent(name: str, options: argparse.Namespace) -> int:
    files = changes(name)
    mine = {path: change for path, change in files.items() if change.now != change.shall}
    if not mine:
        raise InTheWay(f"there is nothing of agent-bus in {' and '.join(files)}: nothing is changed")
    if options.dry_run:
        return show_all(mine)
    write_all(mine)
    keep(name, {})
    tell(f"the entries of agent-bus are removed from {' and '.join(mine)}")
    if AGENTS[name].wake:
        remove_wakes()
    return 0


def remove_wakes() -> None:
    """Remove the files that wake idle sessions, but those of a session that still has one of their locks."""
    top = glob.escape(bus_recv.state_directory())
    older = glob.glob(os.path.join(top, "*.wake"))  # of a version that had one file for a name on all buses
    for path in (*older, *glob.glob(os.path.join(top, "wake", "*", "*", "*.wake"))):
        locks = glob.glob(f"{glob.escape(path)}~*")
        with contextlib.ExitStack() as stack:
            opened = [(stack.enter_context(open(lock, "r+b")), lock) for lock in locks]
            if not all(bus_recv.try_lock(*each) for each in opened):
                continue
        for each in (path, *locks):
            os.unlink(each)


def show_all(files: dict[str, Change]) -> int:
    for change in files.values():
        show(change.path, change.now, change.shall)
    return 0


def plugin_folder() -> str | None:
    """The folder of our plugin, if it is here: the clone, or what pip has put beside the programs."""
    schemes = [scheme for scheme in ("", f"{os.name}_user") if not scheme or scheme in sysconfig.get_scheme_names()]
    data = [sysconfig.get_path("data", scheme) if scheme else sysconfig.get_path("data") for scheme in schemes]
    places = [os.path.dirname(HERE), *(os.path.join(place, "share", "agent-bus") for place in data)]
    return next((place for place in places if os.path.isdir(os.path.join(place, ".claude-plugin"))), None)


def command_line() -> argparse.ArgumentParser:
    adds = "Connect an agent program to the bus, or start the bus at login."
    parser = argparse.ArgumentParser(description=adds)
    commands = parser.add_subparsers(dest="command", required=True)
    own = parser.prog if " " in parser.prog else None  # `agent-bus install` is a whole name
    after = "What follows `install service` are the options of the bus."
    for word, purpose in (("install", adds), ("uninstall", "Take away again what install has added.")):
        installs = word == "install"
        usage = f"{own or f'{parser.prog} {word}'} [-h] [OPTIONS] AGENT"
        command = commands.add_parser(
            word, prog=own, usage=usage, help=purpose, description=purpose, allow_abbrev=False, epilog=after * installs
        )
        command.set_defaults(parser=command)
        choices = ",".join([*AGENTS, "service"])
        command.add_argument("agent", metavar=f"{{{choices}}}", help="an agent program; or service: the bus at login")
        command.add_argument("--bus", type=bus_recv.profile, metavar="PROFILE", help="the bus of PROFILE.env")
        command.add_argument("--dry-run", action="store_true", help="show what would change, and change nothing")
        if installs:
            command.add_argument(
                "--http", action="store_true", help="use the bus by its URL, without a program of ours"
            )
            command.add_argument("--url", help="the bus, if it is not that of the configuration")
            command.add_argument("--name", help="the agent's name on the bus, in every folder")
    return parser


def run(options: argparse.Namespace, further: Sequence[str]) -> int:
    installs = options.command == "install"
    if options.agent == "service":
        return install_service(further, options.dry_run) if installs else uninstall_service(options.dry_run)
    if options.agent in AGENTS and not installs:
        return uninstall_agent(options.agent, options)
    if options.agent in AGENTS:
        if options.name:
            bus_recv.check_name(options.name)
        bus_recv.urls_of(bus_recv.settings(options.url)["AGENT_BUS_URL"])  # ValueError, if that is none
        return install_agent(options.agent, options)
    known = [*AGENTS, "service"]
    similar = difflib.get_close_matches(options.agent, known, 1)
    others = "; another agent can run the MCP server, agent-bus-mcp" if installs else ""
    meant = f"did you mean {similar[0]}?" if similar else f"only {', '.join(known)}{others}"
    complain(f"{options.agent!r} is not known: {meant}")
    return 2


def main(argv: Sequence[str] | None = None) -> int:
    parser = command_line()
    options, further = parser.parse_known_args(argv)
    if further and (options.agent != "service" or options.command != "install"):
        options.parser.error(f"unrecognized arguments: {' '.join(further)}")
    if options.agent == "service" and any(getattr(options, given, None) for given in ("http", "url", "name")):
        options.parser.error("--http, --url and --name are for an agent program")
    try:
        return run(options, further)
    except InTheWay as error:
        complain(str(error))
        return 1
    except (ValueError, OSError) as error:
        complain(f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error))
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
