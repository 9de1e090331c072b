#!/usr/bin/env python3
"""A hook for coding agents: says how much mail waits when a session starts, and at the start, steps and end of a turn.

    bus_hook.py --format claude|codex|gemini|qwen|copilot|cursor      an event on stdin; one JSON object, or nothing
    bus_hook.py --wake      for the hook FileChanged of Claude Code, with asyncRewake: see below
    bus_hook.py --wait      for the hook Stop with asyncRewake, without the MCP server: see below
    bus_hook.py --name      the name of this session, for the command line of a Monitor

Read it in the order of a look: main, in_time, Look (one event), DRESSES (how each program takes a text), Memory (what a
session was told), and notice.py (what the bus says); then wake and wait.

A hook tells a number, never a text: a model trusts the text of a hook as if its own program had written it. Names of
senders are shown if a token vouches for them. No hook marks mail as read, and only --wait makes the name count as
listening; the messages come from bus_recv.py or bus_inbox. A notice comes again only when more has come. At the end of
a turn there is a notice only if urgent mail or an awaited reply has come, because it prolongs the turn; at most CHAIN
times in a row.

A look is one exchange with the bus, and at the start of a session two or three. It ends within 2 s whatever the bus
does, at the start of a session within 4 s, with exit code 0. If the bus is too slow or out of reach, the session is
told once. Sub-agents are told nothing: the mail is their parent's. The same exchange tells the bus what the session
does (doing.py), if that has changed.

A session that is idle is woken by a file: SessionStart tells Claude Code to watch it, the MCP server of the session
appends a line when mail has come, and the hook for FileChanged, --wake, ends with 2 and says the number on stderr. A
set-up without the MCP server has a process that waits, --wait; it is opt-in, in settings.json:

    {"hooks": {"Stop": [{"hooks": [{"type": "command", "asyncRewake": true, "timeout": 86400,
                                    "command": "python3 /path/to/bus_hook.py --wait"}]}]}}

Only one waits for each session, and none under -p, where Claude Code would wait for it.

Standard library only. It reads the environment of bus_recv.py, AGENT_NAME, and the variables of Claude Code about the
session: CLAUDE_PID, CLAUDE_PROJECT_DIR, CLAUDE_CODE_SESSION_ID, CLAUDE_CODE_SESSION_ATTENDED.
"""
from __future__ import annotations  # needs Python 3.9 or later

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

# Python 3.8 prints this text. Older ones show the line in a SyntaxError, because they do not know `:=`.
if sys.version_info < (3, 9) and (needs := "bus_hook.py needs Python 3.9 or later"):  # noqa: UP036
    sys.exit(needs)
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # python3 -I does not
import doing  # noqa: E402
import notice  # noqa: E402
import processes  # noqa: E402
import session  # noqa: E402
from notice import Counts  # noqa: E402
from session import READER, Nameless, bus_recv, harmless  # noqa: E402

ANSWER_SECONDS = 1.65  # for the bus; a prompt waits for us, for 2 s at most, and Python has to start
DEADLINE_SECONDS = 1.8  # for a whole look
START_SECONDS = 4.0  # for the look of a session that starts: it may also ask who else has its name
ANSWER_BYTES = 4 << 20  # of the bus; nothing interrupts the parser
REST_SECONDS = 60.0  # no look between the steps of a turn for so long, after the bus was slow or out of reach
CHAIN = 5  # Claude Code ends a turn that hooks have prolonged 8 times in a row

DENIED = "This session gets no mail from the agent-bus: "
NO_READER = (
    "Between turns nobody listens as {name}. {how} with command `python3 -u {reader} {name}`, "
    "description `agent-bus inbox: {name}`, timeout_ms 1800000."
)
HOW = "The Monitor tool starts a reader"
HOW_OF_PLUGIN = "The skill agent-bus:agent-bus starts a reader, and so does the Monitor tool"


def context(event: str, text: str) -> dict[str, Any]:
    return {"hookSpecificOutput": {"hookEventName": event, "additionalContext": text}}


def plain(event: str, text: str) -> dict[str, Any]:
    return {"additionalContext": text}


def block(event: str, text: str) -> dict[str, Any]:
    return {"decision": "block", "reason": text}


def nothing(event: str, text: str) -> dict[str, Any]:
    """For an event whose hook says nothing to the session."""
    return {}


DRESSES: dict[str, dict[str, Callable[[str, str], dict[str, Any]]]] = {
    "claude": {
        **dict.fromkeys(("SessionStart", "UserPromptSubmit", "PostToolBatch", "Stop"), context),
        "Notification": nothing,
    },
    "codex": {**dict.fromkeys(("SessionStart", "UserPromptSubmit", "PostToolUse"), context), "Stop": block},
    "qwen": {**dict.fromkeys(("SessionStart", "UserPromptSubmit", "PostToolUse"), context), "Stop": block},
    "gemini": {
        **dict.fromkeys(("SessionStart", "BeforeAgent", "AfterTool"), context),
        "AfterAgent": lambda event, text: {"decision": "deny", "reason": text},
    },
    "copilot": {
        **dict.fromkeys(("sessionStart", "userPromptSubmitted", "postToolUse"), plain),
        "agentStop": block,
    },
    "cursor": {
        "sessionStart": lambda event, text: {"additional_context": text},
        "stop": lambda event, text: {"followup_message": text},
    },
}
STARTS, STEPS = ("SessionStart", "sessionStart"), ("PostToolBatch", "PostToolUse", "AfterTool", "postToolUse")
ENDS = ("Stop", "AfterAgent", "agentStop", "stop")
NOTHING: dict[str, Any] = {"unread": 0, "pressing": 0, "newest": 0.0, "trouble": "", "rest": 0.0, "chain": 0,
                           "said": {}, "said_at": 0.0, "place": ""}  # fmt: skip


class Memory:
    """What a session was told, in a file of its own: the hooks of one session look one after the other.

    Members: `unread` and `pressing`, the numbers of the last look that told, or that found less; `newest`, the time of
    the newest message then; `trouble`, the sentence about a bus that does not answer; `rest`, until when no step of a
    turn looks; `chain`, how often in a row mail has prolonged a turn; `said` and `said_at`, the last status that the
    bus was told, and when; `place`, for which bus and channel that all is, "" in a file of an older version.
    """

    def __init__(self, event: dict[str, Any]) -> None:
        self.session = event.get("session_id") or event.get("sessionId") or event.get("conversation_id")
        self.path = os.path.join(bus_recv.state_directory(), "turns", bus_recv.file_name(str(self.session)))
        self.is_new = not os.path.exists(self.path)
        if self.is_new:
            self.forget_others()
        self.file = bus_recv.private_file(self.path, os.O_RDWR, "r+")
        self.busy = not bus_recv.try_lock(self.file, self.path)
        self.its: dict[str, Any] = {**NOTHING}
        with contextlib.suppress(ValueError, TypeError):  # or the file is new, or of an older version
            self.its.update(json.load(self.file))

    def is_at(self, place: str) -> None:
        """What was told on another bus or channel is not told here: a session may be resumed there."""
        if self.its["place"] not in ("", place):
            self.its.update(NOTHING)
        self.its["place"] = place

    def forget_others(self) -> None:
        """Remove the files of sessions that are long gone."""
        with contextlib.suppress(OSError):
            for entry in os.scandir(os.path.dirname(self.path)):
                if entry.stat().st_mtime < time.time() - session.DAY * 7:
                    os.remove(entry.path)

    def has_grown(self, counts: Counts, pressing: bool) -> bool:
        """Did more mail come since the last look; or `pressing`: more that is urgent, or that is awaited?"""
        if pressing:
            return counts.pressing > self.its["pressing"]
        return counts.unread > self.its["unread"] or counts.newest > self.its["newest"]

    def note(self, counts: Counts, told: bool) -> dict[str, Any]:
        """The members to save after a look: what was told, or that there is less now."""
        found = {"unread": counts.unread, "pressing": counts.pressing}
        if told:
            return {**found, "newest": counts.newest}
        return {member: min(number, self.its[member]) for member, number in found.items()}

    def save(self, **its: Any) -> None:
        self.its.update(its)
        self.file.seek(0)
        self.file.write(json.dumps(self.its))
        self.file.truncate()
        self.file.flush()


class Look:
    """One event: what the session is told, and what its Memory keeps. In a thread, because a bus may drip for ever."""

    def __init__(self, program: str, event: dict[str, Any], happened: str) -> None:
        self.program, self.happened, self.dress = program, happened, DRESSES[program][happened]
        self.starts, self.steps, self.ends = happened in STARTS, happened in STEPS, happened in ENDS
        self.silent = self.dress is nothing
        idle = self.starts or self.ends or event.get("notification_type") == "idle_prompt"
        self.state = "idle" if idle else "waiting" if self.silent else "busy"
        self.directory = project_of(event)
        self.title = event.get("session_title")
        self.memory = Memory(event)
        self.before = self.starts and self.memory.is_new and event.get("source", "startup") in ("startup", "fork")
        chain = int(event.get("loop_count", self.memory.its["chain"]))
        self.chain = chain if event.get("stop_hook_active") or "loop_count" in event else 0
        self.over = threading.Lock()  # held by whoever speaks: one text at most
        self.facts: list[str] = []
        self.watched = ""

    def run(self) -> None:
        """Look, and speak; a session hears once that it gets no mail, or that the bus is slow or away."""
        its = self.memory.its
        rests = self.steps and 0 < its["rest"] - time.time() <= REST_SECONDS  # else the clock was ahead
        if self.memory.busy or rests or (self.ends and self.chain >= CHAIN):
            return
        trouble = ""
        try:
            process = processes.its_process(self.program)
            me = session.this_session(process, self.directory, self.memory.session, self.title)
            self.memory.is_at(session.place_of("names"))
            self.facts.append(me.news)
            status = self.status(me)
            counts = self.introduce(me, status) if self.starts else notice.count(me, ANSWER_SECONDS, status)
        except (Nameless, ValueError, OSError) as no:  # OSError: no place for a file, or no locks
            trouble = f"{DENIED}{no}"
        except bus_recv.Refused as refused:
            trouble = f"{DENIED}{notice.reason(refused)}"
        except bus_recv.Unreachable as fault:
            trouble = out_of_reach(notice.reason(fault))
        if trouble:
            self.trouble(trouble)
            return
        told = self.notice(me, counts)
        prolonged = self.chain + 1 if self.ends and any(self.facts) else 0
        said = {"said": status, "said_at": time.time()} if status else {}
        self.speak(**self.memory.note(counts, told), **said, trouble="", rest=0.0, chain=prolonged)

    def status(self, me: session.Self) -> dict[str, Any]:
        """What the bus is to be told about this session; nothing if it was told that."""
        if self.program == "cursor":  # it has no event for the beginning of a turn
            return {}
        status, its = doing.status(me, self.state, self.directory), self.memory.its
        lately = abs(time.time() - its["said_at"]) < doing.SAID_SECONDS  # the clock may have been ahead then
        return {} if status == its["said"] and lately else status

    def introduce(self, me: session.Self, status: dict[str, Any]) -> Counts:
        """The facts for a session that starts: its name, whether somebody listens, who else has the name."""
        url = bus_recv.settings()["AGENT_BUS_URL"]
        why = f", {me.why}" if me.why else ""
        self.facts.append(f"This session is {me.name} on the agent-bus at {url}{why}.")
        if self.program == "claude":
            self.watched = notice.wake_file(me.name)
        counts = notice.count(me, ANSWER_SECONDS, status)
        if not counts.reader and self.program == "claude" and is_attended() and not notice.is_watched(me.name):
            how = HOW_OF_PLUGIN if os.environ.get("CLAUDE_PLUGIN_ROOT") else HOW
            self.facts.append(NO_READER.format(name=me.name, reader=READER, how=how))
        self.facts.append(notice.read_elsewhere(me))
        return counts

    def notice(self, me: session.Self, counts: Counts) -> bool:
        """Say how much waits, if there is a reason to; true if that was said."""
        presses = self.ends and self.program != "cursor"  # which has no other event for a notice
        if self.silent or counts.reader or not counts.unread:
            return False  # what a reader has not shown yet, it will show
        if not self.starts and not self.memory.has_grown(counts, presses):
            return False
        self.facts.append(notice.notice(me, counts, self.before))
        return True

    def trouble(self, sentence: str) -> None:
        """Say it, if it was not said yet; but no turn is prolonged for it."""
        said = self.memory.its["trouble"]
        if self.ends or self.silent:
            self.facts = []
        elif self.starts or sentence != said:
            self.facts.append(sentence)
            said = sentence
        self.speak(trouble=said, rest=time.time() + REST_SECONDS)

    def speak(self, **its: Any) -> None:
        """Print what there is to say. What was said is remembered only after it was printed."""
        if not self.over.acquire(blocking=False):
            return
        text = harmless(" ".join(filter(None, self.facts)))
        if text and not self.silent:
            said = self.dress(self.happened, text)
            if self.watched:
                said["hookSpecificOutput"]["watchPaths"] = [self.watched]
            bus_recv.emit(json.dumps(said) + "\n")
        self.memory.save(**its)


def project_of(event: dict[str, Any]) -> str | None:
    roots = event.get("workspace_roots") or [os.environ.get("CLAUDE_PROJECT_DIR") or event.get("cwd")]
    return roots[0]


def is_attended() -> bool:
    """Whether somebody sits before this session of Claude Code; under -p it would only wait for its Monitor to end."""
    return os.environ.get("CLAUDE_CODE_SESSION_ATTENDED") == "1"


class NoEvent(Exception):
    """Whoever called this hook gave it no event."""


def the_event() -> dict[str, Any]:
    with contextlib.suppress(ValueError):
        event = json.loads(sys.stdin.buffer.read())
        if isinstance(event, dict):
            return event
    raise NoEvent("stdin must have the event as a JSON object: the program of the agent calls this hook")


def out_of_reach(why: str) -> str:
    url = bus_recv.settings()["AGENT_BUS_URL"]
    return f"The agent-bus at {url} is slow or out of reach ({why}): until it answers, no hook tells of mail."


def in_time(program: str, named: str | None) -> int:
    """Look in a thread, and end without it: a name server, a dripping answer or a pipe may hold it for ever."""
    bus_recv.ANSWER_BYTES = ANSWER_BYTES
    looks: list[Look] = []

    def work() -> None:
        event = the_event()
        happened = named or event.get("hook_event_name")
        of_a_child = event.get("agent_id") or event.get("status", "completed") != "completed"
        if happened in DRESSES[program] and not of_a_child:
            try:
                looks.append(Look(program, event, happened))
            except OSError as no:  # no place for its memory, or no locks there
                if happened in STARTS:
                    bus_recv.emit(json.dumps(DRESSES[program][happened](happened, harmless(f"{DENIED}{no}"))) + "\n")
                return
            looks[0].run()

    thread = threading.Thread(target=in_silence, args=(work,), daemon=True)
    began = time.monotonic()
    thread.start()
    thread.join(DEADLINE_SECONDS)
    if looks and looks[0].starts:
        thread.join(began + START_SECONDS - time.monotonic())
    if looks and thread.is_alive():
        in_silence(looks[0].trouble, out_of_reach(f"no answer within {ANSWER_SECONDS} s"))
    return 0


def wake() -> int:
    """For FileChanged: the exit code, 2 with a notice on stderr if mail has come that the session was not told of."""
    event = the_event()
    if not is_attended():
        return 0
    me = session.this_session(processes.its_process(), project_of(event), event.get("session_id"))
    return say_news(event, me, notice.count(me, ANSWER_SECONDS))


def wait() -> int:
    """The exit code: 2 when there is a notice on stderr, else 0."""
    event, process = the_event(), processes.its_process()
    if not process or not is_attended():
        return 0

    def who() -> session.Self:
        return session.this_session(process, project_of(event))

    with notice.alone(who().name, "wait") as ours:
        if not ours:
            return 0
    for me, counts in notice.arrivals(who, complain, "wait", lambda: bool(processes.birth(process))):
        if say_news(event, me, counts):
            return 2
    return 0


def memory_of(event: dict[str, Any], patience: float) -> Memory:
    """The memory of the session. Another hook of it may use it; we wait for that one for up to `patience` seconds."""
    end = time.monotonic() + patience
    while (memory := Memory(event)).busy and time.monotonic() < end:
        time.sleep(0.02)
        memory.file.close()
    return memory


def say_news(event: dict[str, Any], me: session.Self, counts: Counts) -> int:
    """2, and a notice on stderr, if the session was not told of this mail and no reader will; else 0."""
    memory = memory_of(event, DEADLINE_SECONDS)
    with memory.file:
        memory.is_at(session.place_of("names"))
        if memory.busy or counts.reader or not counts.unread or not memory.has_grown(counts, False):
            return 0
        print(harmless(notice.notice(me, counts)), file=sys.stderr, flush=True)
        memory.save(**memory.note(counts, True))
        return 2


def in_silence(work: Callable[..., Any], *arguments: Any) -> Any:
    """The result of `work`, or 0. A missing bus is not reported; a defect is one line."""
    try:
        return work(*arguments)
    except (Nameless, bus_recv.Refused, bus_recv.Busy, bus_recv.Unreachable, OSError):
        return 0
    except NoEvent as no:
        complain(str(no))
    except Exception as defect:
        complain(f"{type(defect).__name__}: {defect}")
    return 0


def complain(line: str) -> None:
    bus_recv.complain(line, "bus_hook")


def main() -> None:
    import argparse

    parser = argparse.ArgumentParser(description="A hook that tells how much mail waits on an agent-bus.")
    parser.error = lambda why: sys.exit(f"bus_hook: {why}")  # with 1: a hook that ends with 2 holds up the turn
    ways = parser.add_mutually_exclusive_group(required=True)
    ways.add_argument("--format", choices=DRESSES, help="print one JSON object, or nothing, for the event on stdin")
    ways.add_argument("--wake", action="store_true", help="end with exit code 2 if more mail has come")
    ways.add_argument("--wait", action="store_true", help="wait for mail, then end with exit code 2")
    ways.add_argument("--name", action="store_true", help="print the name of this session")
    parser.add_argument("--event", help="with --format: the name of the event, for a program that does not send it")
    options = parser.parse_args()
    if options.name:
        try:
            process, project = processes.its_process(), os.environ.get("CLAUDE_PROJECT_DIR")
            return print(session.this_session(process, project).name)
        except (Nameless, ValueError, OSError) as error:
            sys.exit(f"bus_hook: {error}")
    if options.format:
        os._exit(in_time(options.format, options.event))  # even if a thread still runs
    os._exit(in_silence(wake if options.wake else wait))


if __name__ == "__main__":
    main()
