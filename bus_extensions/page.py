"""The page for people, at the URL of the bus in a browser (PROTOCOL.md section 23). Its files are in page/."""

from __future__ import annotations

import argparse
import pathlib
from functools import partial

from bus_server import LOADED, Answer, Bus, Headers, Refused, Request, show_help

TABLES, NOUN, OPERATIONS = None, "", ()

FOLDER = pathlib.Path(__file__).with_name("page")
KINDS = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
# No script, style or request but those of this bus; no HTML is made of text, and no other page may frame this one.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
Files = dict[str, tuple[bytes, str]]  # of a name: content and type
HEADERS: Headers = (
    ("Content-Security-Policy", POLICY),
    ("X-Content-Type-Options", "nosniff"),
    ("X-Frame-Options", "DENY"),
    ("Referrer-Policy", "no-referrer"),
    ("Cross-Origin-Opener-Policy", "same-origin"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
    ("Permissions-Policy", "camera=(), geolocation=(), microphone=(), payment=(), usb=()"),
)


def options(parser: argparse.ArgumentParser) -> None:
    """It has none."""


def start(bus: Bus, options: argparse.Namespace) -> None:
    files = {file.name: (file.read_bytes(), KINDS[file.suffix]) for file in FOLDER.glob("*") if file.suffix in KINDS}
    bus.gate.public.add("/ui/")
    bus.gate.pages |= {"/", "/ui/"}
    bus.route("GET", "/ui/", partial(show, bus, files), "the page for people, in a browser")
    bus.route("GET", "/", partial(front, bus), "this text; in a browser, the page")


def front(bus: Bus, request: Request) -> Answer:
    """A browser is led to the page, by a relative path: the bus may be under a path of a proxy."""
    if "text/html" in request.fields.get("accept", ""):
        return Answer(302, b"", "text/plain; charset=utf-8", (("Location", "ui/"),))
    return show_help(bus, request)


def show(bus: Bus, files: Files, request: Request) -> Answer:
    """One of the files that were there at the start. They hold no data of the bus, so everybody may have them."""
    file = request.parsed.rest or "index.html"
    found = (places(bus, files), KINDS[".js"]) if file == "extensions.js" else files.get(file)
    if not found:
        where = "open /ui/" if files else f"copy the folder {FOLDER} from the same version"
        raise Refused(404, f"the page has no such file: {where}")
    return Answer(200, *found, HEADERS)


def places(bus: Bus, files: Files) -> bytes:
    """The module with the places of the extensions that are loaded and have one. At the start, not all are loaded."""
    names = [name for name, state in bus.extensions.items() if state == LOADED and f"{name}.js" in files]
    return "".join(f'export {{ default as {name} }} from "./{name}.js";\n' for name in names).encode()
