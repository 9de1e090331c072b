"""The messages of MCP: what a client asks, and what it is answered. For mcp.py, and for bus_mcp.py on stdio.

Whoever loads this file has loaded _mcp_tools.py, under that name.
"""

from __future__ import annotations

import json
import math
from typing import Any

from _mcp_tools import KEPT, TOOLS, UNREAD, WORDS, Answer, Tool

PROTOCOLS = ("2025-11-25", "2025-06-18", "2025-03-26", "2024-11-05")  # spoken here; the first is offered to all others
ID_ROOM = 1000  # characters of an id, which is kept while a tool waits


class Wrong(Exception):
    """A message that JSON-RPC has an error number for."""

    def __init__(self, code: int, sentence: str) -> None:
        super().__init__(sentence)
        self.code = code


def parse(text: bytes) -> Any:
    try:
        return json.loads(text.decode(), parse_float=finite, parse_constant=finite)
    except (ValueError, RecursionError):
        raise Wrong(-32700, "a message must be one value of JSON, in UTF-8") from None


def finite(text: str) -> float:
    """Refuse infinite numbers: they are not JSON, so such an id could not be sent back."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError
    return value


def is_answer(message: Any) -> bool:
    """Is this an answer of the client to a request? We never send one."""
    return isinstance(message, dict) and "method" not in message and bool({"result", "error"} & message.keys())


def check(message: Any) -> None:
    """Wrong, if this is neither a request nor a notification."""
    if not isinstance(message, dict):
        raise Wrong(-32600, "a message is an object; send several one by one")
    method, params = message.get("method"), message.get("params") or {}
    if len(json.dumps(message.get("id"))) > ID_ROOM:
        raise Wrong(-32600, f"an id has at most {ID_ROOM} characters")
    if message.get("jsonrpc") != "2.0" or not isinstance(method, str) or not isinstance(params, dict):
        raise Wrong(-32600, "a request has jsonrpc: 2.0, a method, and an object or nothing as params")


def respond(message: dict[str, Any], version: str, more: str = "", **capabilities: Any) -> Answer:
    """The result of a request that needs no bus. `version` is that of the bus, `more` follows the usual words."""
    method, params = message["method"], message.get("params") or {}
    if method == "ping":
        return {}
    if method == "tools/list":
        return {"tools": [tool.listed(name) for name, tool in TOOLS.items()]}
    if method != "initialize":
        raise Wrong(-32601, f"there is no method {method}")
    wanted = params.get("protocolVersion")
    return {
        "protocolVersion": wanted if wanted in PROTOCOLS else PROTOCOLS[0],
        "capabilities": {"tools": {}, **capabilities},
        "serverInfo": {"name": "agent-bus", "version": version},
        "instructions": f"{WORDS} {UNREAD} {KEPT} {more}".rstrip(),
    }


def called(message: dict[str, Any]) -> tuple[Tool, dict[str, Any]]:
    """The tool of a tools/call, and its arguments, unchecked."""
    params = message.get("params") or {}
    name, arguments = params.get("name"), params.get("arguments")
    arguments = {} if arguments is None else arguments
    if not isinstance(name, str) or name not in TOOLS:
        raise Wrong(-32602, f"there is no tool {name}; there are {', '.join(TOOLS)}")
    if not isinstance(arguments, dict):
        raise Wrong(-32602, "the arguments of a tool are an object")
    return TOOLS[name], arguments


def result(text: str, failed: bool) -> Answer:
    """The result of a tools/call."""
    return {"content": [{"type": "text", "text": text}], "isError": failed}
