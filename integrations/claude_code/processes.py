"""Which process runs a session, and whether it lives: on Linux from /proc, elsewhere from ps."""
from __future__ import annotations  # needs Python 3.9 or later

import os

SHELLS = ("sh", "bash", "dash", "zsh", "fish", "env", "uv", "uvx", "nice", "timeout")  # they start what runs a session


def birth(process: int) -> str:
    """What no other process ever has: its number, start, boot and PID namespace; "" if it has ended, or on Windows."""
    if os.name != "posix":
        return ""
    try:
        with open(f"/proc/{process}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
        return "" if fields[0] in b"ZX" else f"{process} {int(fields[19])} {this_kernel()}"
    except OSError:
        started = "" if os.path.exists("/proc/self/stat") else ps(process, "stat", "lstart")
    state, _, start = started.partition(" ")
    return f"{process} {'-'.join(start.split())} {this_kernel()}" if start and state[0] != "Z" else ""


def this_kernel() -> str:
    """Where process numbers mean the same: a boot, and a PID namespace of it."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return f"{file.read(8)} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return "here"


def is_alive(born: str, recent: bool) -> bool:
    """Does a process live? One of another PID namespace cannot be seen: `recent` is the answer for it."""
    number, _, rest = born.partition(" ")
    if not number or not rest:  # nobody's; or of an older version, which knew only the number
        return bool(number and birth(int(number)))
    _, boot, *space = rest.split(" ")
    here, *ours = this_kernel().split(" ")
    if boot == here and space != ours:
        return recent
    return boot == here and birth(int(number)) == born


def same(born: str, other: str) -> bool:
    """Is it the same process? An older version knew only its number."""
    return bool(born) and (born == other or born == other.partition(" ")[0])


def its_process(program: str = "claude") -> int | None:
    """The process that runs the session of this hook, Monitor or MCP server.

    Claude Code tells its hooks and Monitors (CLAUDE_PID), and not its MCP servers. Others tell nobody. For these it is
    the nearest process above us that is neither a shell nor was started for this same session.
    """
    told = os.environ.get("CLAUDE_PID", "")
    if program == "claude" and told.isdecimal():
        return int(told)
    if program == "claude" or os.name != "posix":
        return None
    process = os.getppid()
    for _ in range(8):
        parent, name = parent_of(process)
        if parent < 2 or not (name in SHELLS or was_given_our_session(process)):
            break
        process = parent
    return process


def parent_of(process: int) -> tuple[int, str]:
    """The number of the process above, and the name of the program."""
    try:
        with open(f"/proc/{process}/stat", "rb") as file:
            head, _, rest = file.read().rpartition(b")")
        return int(rest.split()[1]), os.fsdecode(head.partition(b"(")[2])
    except OSError:
        parent, _, name = ps(process, "ppid", "comm").partition(" ")
        return int(parent or 0), os.path.basename(name.strip()).lstrip("-")


def was_given_our_session(process: int) -> bool:
    """Only Linux tells. A wrapper around us has our session's id in its environment; what runs the session has not."""
    ours = os.environ.get("CLAUDE_CODE_SESSION_ID")
    try:
        with open(f"/proc/{process}/environ", "rb") as file:
            return bool(ours) and f"CLAUDE_CODE_SESSION_ID={ours}".encode() in file.read().split(b"\0")
    except OSError:
        return False


def ps(process: int, *columns: str) -> str:
    """What ps says of a process, in one line; "" if there is no such process, or no ps."""
    import subprocess  # slow to import

    command = ["ps", *(f"-o{column}=" for column in columns), "-p", str(process)]
    env = {"LC_ALL": "C", "PATH": "/bin:/usr/bin"}
    try:
        return subprocess.run(command, env=env, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""
