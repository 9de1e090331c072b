"""Messages that must fit a JSON Schema (PROTOCOL.md section 16): --schemas DIR has TYPE.json for each type.

This is the only part of the bus that needs a package, jsonschema: pip install 'agent-bus[schemas]'.
"""

from __future__ import annotations

import argparse
import json
import pathlib
from collections.abc import Iterator
from typing import Any
from urllib.parse import urldefrag, urljoin

from bus_server import Bus, Refused, Unusable, parse_json

TABLES, NOUN, OPERATIONS = None, "", ()


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--schemas",
        metavar="DIR",
        help="refuse messages that do not fit DIR/TYPE.json (JSON Schema; needs agent-bus[schemas]); with content_type "
        "application/json, the JSON in msg must fit",
    )
    parser.add_argument(
        "--strict",
        action="store_true",
        help="with --schemas: refuse a type without a schema, and a message without a type",
    )


def start(bus: Bus, options: argparse.Namespace) -> None:
    if options.strict and not options.schemas:
        raise Unusable("--strict needs --schemas")
    if options.schemas:
        bus.checks.append(Schemas(options.schemas, options.strict).check)


class Schemas:
    """The JSON Schema of each type, and the check of the messages of a request against the schemas of their types."""

    VALUES = 1000  # JSON values in the messages of a request that have a schema: some 40 ms, if each has a `$ref`

    def __init__(self, folder: str, strict: bool) -> None:
        try:
            import jsonschema
            from jsonschema_specifications import REGISTRY  # of the schemas of JSON Schema itself; it fetches nothing
        except ImportError:
            raise Unusable("--schemas needs jsonschema 4.18 or later: pip install 'agent-bus[schemas]'") from None
        self.strict = strict
        self.types = {}
        for file in sorted(pathlib.Path(folder).glob("*.json")):
            try:
                schema = json.loads(file.read_text())
                kind = jsonschema.validators.validator_for(schema)
                kind.check_schema(schema)
                check_is_whole(schema)
            except (OSError, ValueError, jsonschema.SchemaError) as error:
                raise Unusable(f"{file} is not a JSON Schema: {str(error).splitlines()[0]}") from None
            self.types[file.stem] = kind(schema, registry=REGISTRY)
        if not self.types:
            raise Unusable(f"there is no TYPE.json in {folder}")

    def check(self, messages: list[Any]) -> None:
        """422 with the member that does not fit, if a message does not fit the schema of its type; 413 over VALUES.

        If its content_type is application/json, the JSON in `msg` must fit, and not the message.
        """
        typed = [(message, schema) for message in messages if (schema := self.schema(message))]
        if self.strict and len(typed) < len(messages):
            raise Refused(422, f"type must be one of: {', '.join(self.types)}")
        judged = [body(message) if is_json(message) else message for message, _ in typed]
        for number, _ in enumerate(values_of(judged), 1):
            if number > self.VALUES:
                why = f"messages of a type with a schema may have {self.VALUES} JSON values together in one request"
                raise Refused(413, f"{why}: send fewer at once, or a file; nothing was stored")
        for (message, schema), value in zip(typed, judged):
            path, why = misfit(schema, value)
            if why:
                where = ".".join([*(["msg"] if is_json(message) else []), *path]) or "the message"
                raise Refused(422, f"{where} does not fit the type {message['type']}: {why}")

    def schema(self, message: Any) -> Any:
        """The schema of a message's type, or None."""
        of = message.get("type") if isinstance(message, dict) else None
        return self.types.get(of) if isinstance(of, str) else None


def values_of(values: list[Any]) -> Iterator[Any]:
    """These values of JSON and all those in them."""
    found = values[:]
    for value in found:  # which grows
        yield value
        found += value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def check_is_whole(schema: Any) -> None:
    """ValueError, if it refers to a schema at another place: the bus would have to fetch that, and waits for nobody."""
    parts = [each for each in values_of([schema]) if isinstance(each, dict)]
    named = [each[member] for member in ("$id", "id") for each in parts if isinstance(each.get(member), str)]
    base = next(iter(named), "")
    own = {"", *(urldefrag(urljoin(base, each)).url for each in named)}
    for ref in (each["$ref"] for each in parts if isinstance(each.get("$ref"), str)):
        place = urldefrag(urljoin(base, ref)).url
        if place not in own and not place.startswith(("http://json-schema.org/", "https://json-schema.org/")):
            raise ValueError(f"the $ref {ref} is not in this file: put what it names under $defs")


def misfit(schema: Any, value: Any) -> tuple[list[str], str]:
    """Where a value does not fit a schema, and why; nothing, if it fits.

    The package raises errors of many kinds: for `multipleOf` and a number too large for a float, for a `$ref` without
    an end, or for one that leads nowhere.
    """
    try:
        error = next(schema.iter_errors(value), None)
    except Exception as fault:
        return [], f"it cannot be checked, because of {type(fault).__name__}"
    return ([*map(str, error.absolute_path)], error.message[:200]) if error else ([], "")


def is_json(message: dict[str, Any]) -> bool:
    return str(message.get("content_type")).partition(";")[0].strip().lower() == "application/json"


def body(message: dict[str, Any]) -> Any:
    """The JSON in the text of a message, by the rules for the body of a request; or 422."""
    try:
        return parse_json(message["msg"].encode())
    except (KeyError, AttributeError, UnicodeEncodeError, Refused):
        raise Refused(422, "msg is not JSON: correct it, or send it without content_type application/json") from None
