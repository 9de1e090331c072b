"""Changes other programs' files for bus_install.py: whole or not at all; without our entries, a file is as before."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import bus_edit
from bus_agents import AGENTS, SERVER, is_ours

import bus_recv


class InTheWay(Exception):
    """A file or an entry is not ours; the text says which, and what to do."""


def replace(path: str, content: bytes, check: Callable[[], None] = lambda: None) -> None:
    """Write a file whole or not at all, with the mode and the owner that it has; a new one is for this user alone.

    `check` is called at the last moment, and may raise.
    """
    path = os.path.realpath(path)  # a link stays a link
    folder, name = os.path.split(path)
    os.makedirs(folder, 0o700, exist_ok=True)
    try:
        number, new = tempfile.mkstemp(prefix=f".{name}.", dir=folder)  # no file of the user has this name
    except OSError as error:
        error.filename = path
        raise
    try:
        with open(number, "wb") as file:
            if os.path.exists(path):
                state = os.stat(path)
                if os.name == "posix" and os.geteuid() == 0:
                    os.chown(new, state.st_uid, state.st_gid)
                os.chmod(new, state.st_mode & 0o777)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        check()
        os.replace(new, path)
    except BaseException:
        os.unlink(new)
        raise


def remove_empty(folder: str) -> None:
    """Remove a folder and those above it, as long as they are empty and below HOME."""
    home = os.path.join(os.path.expanduser("~"), "")
    with contextlib.suppress(OSError):
        while folder.startswith(home):
            os.rmdir(folder)
            folder = os.path.dirname(folder)


def content_of(path: str) -> bytes | None:
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
        return file.read()
    return None


class Line(str):
    """A line of a file. It is the same with a comma at its end, which is there only if something follows."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, str) and self.removesuffix(",") == other.removesuffix(",")

    def __hash__(self) -> int:
        return hash(self.removesuffix(","))


def show(path: str, now: str | None, shall: str | None) -> None:
    """What would change, for a person. Lines that stay are not shown: they may hold secrets."""
    before, after = (list(map(Line, (text or "").splitlines())) for text in (now, shall))
    for line in difflib.unified_diff(before, after, path, path, n=0, lineterm=""):
        tell(line)


class Change:
    """What one file of an agent program is now, what it is without our entries, and what it shall become."""

    def __init__(self, path: str, form: str, record: dict[str, Any]) -> None:
        self.path, self.form, self.record = path, form, record
        try:
            content = content_of(path)
            self.now = None if content is None else content.decode()
            self.base = self.shall = self.without_ours()
        except (bus_edit.Unreadable, UnicodeDecodeError) as error:
            self.refuse(error)

    def refuse(self, error: Exception) -> NoReturn:
        why = "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else error
        raise InTheWay(f"{self.path} is left as it is, because {why}: correct it first") from None

    def without_ours(self) -> str | None:
        """None: without our entries there is no such file. Unreadable, if it is not what we know."""
        before = self.record.get("before")
        if self.now is None or ("before" in self.record and digest(self.now) == self.record["after"]):
            return before if self.now is not None else None
        left = bus_edit.without(self.form, self.now, is_ours, before)
        emptied = left != self.now and "before" in self.record and is_bare(left) and is_bare(before or "")
        return before if emptied else left

    def other(self, path: bus_edit.Path) -> str:
        """What the entry at this path is, and how one removes it. Arguments and headers are not shown: secrets."""
        values: dict[bus_edit.Path, Any] = {}  # of all entries; none of them is to go
        bus_edit.without(self.form, self.shall or "", lambda at, value: values.update({at: value}) is not None, None)
        value, what = values.get(path), ""
        if isinstance(value, dict):
            first = next((value[key] for key in ("url", "httpUrl", "command") if value.get(key)), "")
            what = str(first[0] if isinstance(first, list) else first)
        elif isinstance(value, str):  # of TOML
            what = "".join(re.findall(r"""^\s*(?:url|command)\s*=\s*["']([^"'\n]*)""", value, re.MULTILINE)[:1])
        removes = next((agent.removes for agent in AGENTS.values() if agent.servers.path() == self.path), "")
        what = re.sub("//[^/@]*@|[?].*", lambda match: "//" * (match[0][0] == "/"), what)  # a password, a query
        shown = f" ({bus_recv.visible(what)})" if what else ""
        return f"{shown}: {removes or 'remove or rename it there'}"

    def add(self, entries: Sequence[tuple[bus_edit.Path, Any]]) -> None:
        try:
            there = bus_edit.paths(self.form, self.shall or "")
            for path, _ in entries:
                if path[-1] == SERVER and path in there:
                    raise InTheWay(f"{self.path} has a server {SERVER} already{self.other(path)}, then install again")
            fresh = [(path, value) for path, value in entries if path not in there]
            self.shall = bus_edit.edited(self.form, self.shall or "", fresh)
        except bus_edit.Unreadable as error:
            self.refuse(error)

    def write(self) -> dict[str, Any]:
        """Write the file, or remove it; returns what is to be remembered."""
        made = self.record.get("made") or missing_above(self.path)
        if self.shall is None and self.now is not None:
            self.check()
            os.remove(os.path.realpath(self.path))  # a link stays: it is the user's
        elif self.shall is not None and self.shall != self.now:
            replace(self.path, self.shall.encode(), self.check)
        return {"before": self.base, "made": made, "after": digest(self.shall or "")}

    def check(self) -> None:
        """An agent program that runs writes its own settings now and then, and they must stay."""
        if content_of(self.path) != (None if self.now is None else self.now.encode()):
            raise InTheWay(f"another program has just changed {self.path}, so it is left as it is: run this again")


def is_bare(text: str) -> bool:
    """Is there nothing in this JSON but, maybe, the version that some programs ask for?"""
    return not re.sub(r'"version"\s*:\s*1', "", text).strip(" \t\r\n{}")


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def missing_above(path: str) -> list[str]:
    """The folders that will be made for this file, the lowest first."""
    missing = []
    while not os.path.isdir(path := os.path.dirname(path)):
        missing.append(path)
    return missing


def write_all(files: dict[str, Change]) -> dict[str, Any]:
    """Write the files, and remove the folders that an install has made if nothing is in them; what to remember."""
    records = {path: change.write() for path, change in files.items()}
    gone = [change for change in files.values() if change.shall is None]
    made = {folder for change in gone for folder in change.record.get("made", [])}
    for folder in sorted(made, key=len, reverse=True):
        with contextlib.suppress(OSError):  # one that is not empty is in use
            os.rmdir(folder)
    return records


def record_file(name: str) -> str:
    """Where the files of an agent program are kept as they were before the install, and the digests of those after."""
    return os.path.join(bus_recv.state_directory(), "installed", f"{name}.json")


def changes(name: str) -> dict[str, Change]:
    """The files of an agent program, by path."""
    agent, kept = AGENTS[name], {}
    with contextlib.suppress(ValueError):  # a damaged record is none
        kept = dict(json.loads(content_of(record_file(name)) or b"{}"))
    files = [file for file in (agent.servers, agent.hooks) if file]
    return {path: Change(path, file.form(), kept.get(path, {})) for file in files for path in [file.path()]}


def keep(name: str, files: dict[str, Any]) -> None:
    """Remember what the files were, or forget it."""
    path = record_file(name)
    if files:
        replace(path, json.dumps(files).encode())
        return
    with contextlib.suppress(OSError):
        os.remove(path)
        remove_empty(os.path.dirname(path))


def tell(line: str) -> None:
    bus_recv.emit(f"{bus_recv.visible(line)}\n")


def complain(line: str) -> None:
    bus_recv.complain(line, "bus_install")
