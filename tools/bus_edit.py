"""Edit the configuration file of another program: put values in, take them out, and leave every other byte as it is.

    text = edited("json", text, [(("mcpServers", "bus"), {"command": "x"})])
    text = without("json", text, ours, before)

The format "jsonc" is JSON that may have comments, and a comma before a closing bracket; a text of the format "json" is
extended only if it has neither. without() takes out what ours() says is ours.
A path is a tuple of keys. `ITEM` at its end appends to an array. These functions, and paths(), raise Unreadable, with
a reason, for a text that this file cannot read or whose members are of another kind; then nothing is to be written.

The parts of this file: JSON is read by `parsed`, which notes where each value stands; `put` and `cut` change the
text. TOML is changed by tables, which are found by their headers. `FORMATS` has both.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

ITEM = None  # as the last key of a path: one more item of an array
BLANK = re.compile(r"(?:\s|//[^\n]*|/\*.*?\*/)*", re.DOTALL)  # white space and comments
STRING = re.compile(r'"(?:[^"\\\x00-\x1f]|\\.)*"')
SCALAR = re.compile(rf"{STRING.pattern}|[-+.0-9a-zA-Z]+")
LINES = re.compile(r"[^\n]*\n|[^\n]+")
QUOTED = re.compile(  # in TOML, and comments, in which a quote begins nothing
    r'"""(?:[^\\]|\\.)*?"""|\'\'\'.*?\'\'\'|"(?:[^"\\\n]|\\.)*"|\'[^\'\n]*\'|#[^\n]*', re.DOTALL
)
HEADER = re.compile(r"^[ \t]*\[\[?[ \t]*([^\]\n]*?)[ \t]*\]\]?[ \t]*(?:#.*)?$")  # of a table, as a whole line

Path = tuple[Any, ...]


class Unreadable(Exception):
    """The text is not what its format says, or a value on the way is of another kind; the text says which."""


class Part(NamedTuple):
    """A value in a text: text[start:end]. A container also has its parts, by key or number, in their order."""

    begin: int  # of its key; without a key, `start`
    start: int
    end: int
    value: Any
    parts: dict[Any, Part]


# JSON with comments


def parsed(text: str) -> Part:
    """The whole text. An empty one is an empty object that stands nowhere."""
    try:
        start = after_blank(text, text.startswith("\ufeff"))
        if start == len(text):
            return Part(start, start, start, {}, {})
        part = part_at(text, start, start)
    except (ValueError, IndexError, AttributeError, RecursionError):
        raise Unreadable("it is not JSON") from None
    if after_blank(text, part.end) != len(text):
        raise Unreadable("it is not JSON")
    return part


def after_blank(text: str, at: int) -> int:
    return BLANK.match(text, at).end()  # type: ignore[union-attr]  # it matches the empty text


def part_at(text: str, begin: int, start: int) -> Part:
    """Read one value. Raises ValueError, IndexError or AttributeError where there is none."""
    if text[start] not in "{[":
        end = SCALAR.match(text, start).end()  # type: ignore[union-attr]
        return Part(begin, start, end, json.loads(text[start:end], strict=False), {})
    closing = {"{": "}", "[": "]"}[text[start]]
    parts: dict[Any, Part] = {}
    at = after_blank(text, start + 1)
    while text[at] != closing:
        first, key = at, len(parts)
        if closing == "}":
            colon = STRING.match(text, at).end()  # type: ignore[union-attr]
            key = json.loads(text[at:colon])
            colon = after_blank(text, colon)
            if text[colon] != ":":
                raise ValueError
            at = after_blank(text, colon + 1)
        parts[key] = part_at(text, first, at)
        at = after_blank(text, parts[key].end)
        if text[at] == ",":
            at = after_blank(text, at + 1)
        elif text[at] != closing:
            raise ValueError
    values = {key: part.value for key, part in parts.items()}
    return Part(begin, start, at + 1, values if closing == "}" else list(values.values()), parts)


def put(text: str, path: Path, value: Any) -> str:
    """Add a member or an item at the end of its container, and the containers that are missing on the way."""
    place, rest = parsed(text), list(path)
    while rest[0] in place.parts:
        place = place.parts[rest.pop(0)]
    if not isinstance(place.value, list if rest == [ITEM] else dict):
        raise Unreadable(f"{'.'.join(map(str, path[: -len(rest)])) or 'it'} is of another kind than we know")
    for key in reversed(rest[1:]):
        value = [value] if key is ITEM else {key: value}
    expected = parsed(text).value
    if place.start == place.end:  # an empty text
        return f"{text[: place.start]}{json.dumps({rest[0]: value}, indent=2, ensure_ascii=False)}\n"
    text = text[: place.start] + with_part(text, place, rest[0], value) + text[place.end :]
    into = expected
    for key in path[: len(path) - len(rest)]:
        into = into[key]
    into.append(value) if rest[0] is ITEM else into.update({rest[0]: value})
    if parsed(text).value != expected:
        raise Unreadable("it is written in a way that we cannot extend")
    return text


def with_part(text: str, place: Part, key: Any, value: Any) -> str:
    """The text of a container with one more part: on a line of its own, if the others have their own."""
    parts, newline = list(place.parts.values()), "\r\n" if "\r\n" in text else "\n"
    outer = indent_of(text, place.start)
    unit = (re.search(r"\n([ \t]+)\S", text) or ("", "  "))[1]
    inner = indent_of(text, parts[-1].begin) if parts else outer + unit
    last = parts[-1].end if parts else place.start + 1
    comma = after_blank(text, last)
    trailing = bool(parts) and text[comma] == ","
    body = text[place.start : place.end - 1].rstrip()  # without the closing bracket, and what stands before it
    tail = text[place.start + len(body) : place.end]
    lines = not parts or "\n" in text[place.start : parts[-1].begin] or "\n" in text[last : place.end]
    if parts and not trailing:
        body = f"{body[: last - place.start]},{body[last - place.start :]}"
    dumped = json.dumps(value, indent=unit if lines else None, ensure_ascii=False).replace("\n", newline + inner)
    written = dumped if key is ITEM else f"{json.dumps(key)}: {dumped}"
    if lines and "\n" not in tail:
        tail = f"{newline}{outer}{tail.strip()}"
    return f"{body}{newline + inner if lines else ' '}{written}{',' * trailing}{tail}"


def indent_of(text: str, at: int) -> str:
    """The white space with which the line begins."""
    line = text[text.rfind("\n", 0, at) + 1 : at]
    return line[: len(line) - len(line.lstrip(" \t"))]


def cut(text: str, path: Path) -> str:
    """Take a member or an item out, with the comma and the white space that belong to it."""
    place = root = parsed(text)
    for key in path[:-1]:
        place = place.parts[key]
    del place.value[path[-1]]  # from here on, root.value is what must be left
    keys = list(place.parts)
    number, part = keys.index(path[-1]), place.parts[path[-1]]
    begin, end = len(text[: part.begin].rstrip()), part.end
    comma = after_blank(text, end)
    if text[comma] == ",":
        end = comma + 1
    if "\n" in text[begin : part.begin] and not re.match(r"[ \t]*\r?\n", text[end:]):
        begin = part.begin  # what stands before may be a comment up to the end of its line
        end += len(text[end:]) - len(text[end:].lstrip(" \t"))
    head, tail = text[:begin], text[end:]
    if text[comma] != "," and number:
        comma = after_blank(text, place.parts[keys[number - 1]].end)
        head = text[:comma] + text[comma + 1 : begin]
    if len(keys) == 1 and not (head[place.start + 1 :] + text[end : place.end - 1]).strip():
        head, tail = text[: place.start + 1], text[place.end - 1 :]
    if parsed(head + tail).value != root.value:
        raise Unreadable("it is written in a way that we cannot shorten")
    return head + tail


def edited_json(text: str, entries: Sequence[tuple[Path, Any]]) -> str:
    for path, value in entries:
        text = put(text, path, value)
    return text


def without_json(text: str, ours: Callable[[Path, Any], bool], before: str | None) -> str:
    """Take out what is ours. A container that is empty now goes too, unless it was there, and empty, before."""
    was = parsed(before or "")
    for path in reversed([path for path, value in walk(parsed(text), ()) if ours(path, value)]):
        text = cut(text, path)
        while path := path[:-1]:
            part, had = at_path(parsed(text), path), at_path(was, path)
            if not part or part.value or text[part.start + 1 : part.end - 1].strip():  # a comment is not ours
                break
            if had and not had.value:
                text = text[: part.start] + (before or "")[had.start : had.end] + text[part.end :]
                break
            text = cut(text, path)
    return text


def walk(part: Part, path: Path) -> Iterator[tuple[Path, Any]]:
    yield path, part.value
    for key, inner in part.parts.items():
        yield from walk(inner, (*path, key))


def at_path(part: Part, path: Path) -> Part | None:
    for key in path:
        if key not in part.parts:
            return None
        part = part.parts[key]
    return part


# TOML


def edited_toml(text: str, entries: Sequence[tuple[Path, Any]]) -> str:
    """Append a table for each entry, with a comment that says whose it is."""
    check_toml(text)
    newline = "\r\n" if "\r\n" in text else "\n"
    for path, value in entries:
        lines = [f"# {path[-1]}: {NOTE}", f"[{'.'.join(path)}]", *(f"{key} = {toml(of)}" for key, of in value.items())]
        between = newline if text and not text.endswith("\n") else ""
        text += between + "".join(f"{line}{newline}" for line in lines)
    check_toml(text)
    return text


NOTE = "written by `agent-bus install`; `agent-bus uninstall` removes it"


def toml(value: Any) -> str:
    """A text, a list of texts or a table of texts, in one line."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{json.dumps(key)} = {toml(of)}" for key, of in value.items()) + " }"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def check_toml(text: str) -> None:
    """Unreadable, if Python can tell: only 3.11 and later read TOML."""
    try:
        import tomllib  # type: ignore[import-not-found, unused-ignore]

        tomllib.loads(text)
    except ModuleNotFoundError:
        pass
    except ValueError as error:
        raise Unreadable(f"it is not TOML: {error}") from None


def tables(text: str) -> list[tuple[int, str]]:
    """The headers of tables: the number of the line, and what is in the brackets. A text of many lines has none."""
    bare = QUOTED.sub(lambda found: found[0] if "\n" not in found[0] else re.sub("[^\n]", "x", found[0]), text)
    return [(at, found[1]) for at, line in enumerate(LINES.findall(bare)) if (found := HEADER.match(line.rstrip()))]


def key_path(name: str) -> Path:
    return tuple(key.strip("\"'") for key in re.split(r"\s*\.\s*", name))


def without_toml(text: str, ours: Callable[[Path, Any], bool], before: str | None) -> str:
    """Take out our tables and those below them, each up to its last line that is neither empty nor a comment."""
    lines, headers = LINES.findall(text), tables(text)
    taken: list[Path] = []
    gone: set[int] = set()
    for (number, name), (following, _) in zip(headers, [*headers[1:], (len(lines), "")]):
        path = key_path(name)
        if any(path[: len(of)] == of for of in taken) or ours(path, "".join(lines[number:following])):
            taken.append(path)
            last = max(at for at in range(number, following) if not re.match(r"\s*(#|$)", lines[at]))
            gone.update(range(number - (number > 0 and NOTE in lines[number - 1]), last + 1))
    left = "".join(line for number, line in enumerate(lines) if number not in gone)
    if gone and max(gone) == len(lines) - 1 and before and not before.endswith("\n"):
        left = left[:-1].removesuffix("\r")  # the end of line that we had to add
    check_toml(left)
    return left


def paths_toml(text: str) -> set[Path]:
    """Those of the tables; with Python 3.11 and later, of every table and value."""
    try:
        import tomllib  # type: ignore[import-not-found, unused-ignore]
    except ModuleNotFoundError:
        return {key_path(name) for _, name in tables(text)}

    def below(value: Any, path: Path) -> Iterator[Path]:
        yield path
        for key, inner in value.items() if isinstance(value, dict) else ():
            yield from below(inner, (*path, key))

    check_toml(text)
    return set(below(tomllib.loads(text), ()))


def paths_json(text: str) -> set[Path]:
    return {path for path, _ in walk(parsed(text), ())}


def edited_strict(text: str, entries: Sequence[tuple[Path, Any]]) -> str:
    """As edited_json(), for a program that would not read the text if it had a comment or a comma too many.

    Such a text can still be shortened, so that an uninstall takes our entries out.
    """
    if text.strip("\ufeff \t\r\n"):
        try:
            json.loads(text.removeprefix("\ufeff"))
        except ValueError:
            raise Unreadable("it is not JSON") from None
    return edited_json(text, entries)


FORMATS = {
    "json": (edited_strict, without_json, paths_json),
    "jsonc": (edited_json, without_json, paths_json),
    "toml": (edited_toml, without_toml, paths_toml),
}


def edited(form: str, text: str, entries: Sequence[tuple[Path, Any]]) -> str:
    """The text with these entries, each (path, value), none of which it has yet."""
    return FORMATS[form][0](text, entries)


def without(form: str, text: str, ours: Callable[[Path, Any], bool], before: str | None) -> str:
    """The text without what ours(path, value) is true for. `before` is the text of before we edited it, if known.

    In TOML, value is the text of the table.
    """
    return FORMATS[form][1](text, ours, before)


def paths(form: str, text: str) -> set[Path]:
    """The paths of all that is in the text."""
    return FORMATS[form][2](text)
