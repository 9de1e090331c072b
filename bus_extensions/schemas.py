"""Messages that must fit a JSON Schema (PROTOCOL.md section 16): --schemas DIR has TYPE.json for each type.

This is the only part of the bus that needs a package, jsonschema: pip install 'agent-bus[schemas]'.
"""

from __future__ import annotations

import argparse
import json
import pathlib
from typing import Any

from bus_server import Bus, Refused, Unusable

TABLES, NOUN, OPERATIONS = None, "", ()


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--schemas",
        metavar="DIR",
        help="refuse messages that do not fit DIR/TYPE.json (JSON Schema; needs agent-bus[schemas])",
    )
    parser.add_argument("--strict", action="store_true", help="with --schemas: refuse a type without a schema")


def start(bus: Bus, options: argparse.Namespace) -> None:
    if options.strict and not options.schemas:
        raise Unusable("--strict needs --schemas")
    if options.schemas:
        bus.checks.append(Schemas(options.schemas, options.strict).check)


class Schemas:
    """The JSON Schema of each type, and the check of a message against the schema of its type."""

    def __init__(self, folder: str, strict: bool) -> None:
        try:
            import jsonschema
        except ImportError:
            raise Unusable("--schemas needs the package jsonschema: pip install 'agent-bus[schemas]'") from None
        self.strict = strict
        self.types = {}
        for file in sorted(pathlib.Path(folder).glob("*.json")):
            try:
                schema = json.loads(file.read_text())
                kind = jsonschema.validators.validator_for(schema)
                kind.check_schema(schema)
            except (OSError, ValueError, jsonschema.SchemaError) as error:
                raise Unusable(f"{file} is not a JSON Schema: {str(error).splitlines()[0]}") from None
            self.types[file.stem] = kind(schema)
        if not self.types:
            raise Unusable(f"there is no TYPE.json in {folder}")

    def check(self, message: Any) -> None:
        """422, with the member that does not fit, if a message does not fit the schema of its type.

        If its content_type is application/json, the JSON in `msg` must fit, and not the message.
        """
        of = message.get("type") if isinstance(message, dict) else None
        schema = self.types.get(of) if isinstance(of, str) else None
        if not schema:
            if self.strict:
                raise Refused(422, f"type must be one of: {', '.join(self.types)}")
            return
        is_json = str(message.get("content_type")).partition(";")[0].strip().lower() == "application/json"
        for error in schema.iter_errors(body(message) if is_json else message):
            where = ".".join([*(["msg"] if is_json else []), *map(str, error.absolute_path)]) or "the message"
            raise Refused(422, f"{where} does not fit the type {of}: {error.message[:200]}")


def body(message: dict[str, Any]) -> Any:
    """The JSON in the text of a message, or 422."""
    try:
        return json.loads(message["msg"])
    except (KeyError, TypeError, ValueError, RecursionError):
        raise Refused(422, "msg is not JSON: correct it, or send it without content_type application/json") from None
