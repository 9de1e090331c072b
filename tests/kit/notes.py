"""An extension of a test, its place on the page for people, and a bus that has both."""
import shutil

from bus_extensions import page
from tests.kit.processes import ROOT, Server, copied

NOTHING = '''
TABLES, NOUN, OPERATIONS = None, "", ()


def options(parser):
    pass


def start(bus, options):
    pass
'''
NOTES = r'''
from bus_server import Refused, encode, ok, parse_json

TABLES, NOUN, OPERATIONS = None, "", ()
notes = [{"id": "1", "text": "buy <b>milk</b>"}, {"id": "2", "text": "\u202egnp.exe"}]


def options(parser):
    pass


def start(bus, options):
    def found(request):
        words = request.query().one("words") or ""
        return ok(bus, f'"notes": {encode([note for note in notes if words in note["text"]])}')

    def drop(request):
        asked = parse_json(request.body)
        for note in notes:
            if note["id"] == asked["id"]:
                notes.remove(note)
                return ok(bus, f'"by": {encode(asked["by"])}')
        raise Refused(409, f"there is no note {asked['id']}")

    bus.route("GET", "/notes", found)
    bus.route("POST", "/notes", drop)
'''
NOTES_PLACE = """
export default {
  title: "Notes", says: "what people keep in mind", path: "notes", rows: answer => answer.notes,
  columns: { number: note => note.id, text: note => note.text },
  actions: [{ title: "Drop", may: note => note.id === "1", sure: "The note is gone then.",
    ask: (note, me) => ["notes", { id: note.id, by: me }], done: (note, answer) => `dropped by ${answer.by}` }],
  onMessage: [{ title: "Note", ask: message => ["notes", { id: message.id }] }],
};
"""
FIND_PLACE = """
export default {
  title: "Find a note", says: "notes with a word", path: "notes", fields: { words: "Words" },
  rows: answer => answer.notes, columns: { text: note => note.text },
};
"""


def extended(folder, **extensions):
    """A bus with the page, what the page needs, these extensions, and the place of one that it does not have."""
    ours = folder / "bus_extensions"
    shutil.copytree(page.FOLDER, ours / "page")
    shutil.copy(ROOT / "bus_server.py", folder)
    for name in ("history", "page", "people"):
        for file in (ROOT / "bus_extensions" / f"{name}.py", *(ROOT / "bus_extensions").glob(f"_{name}_*.py")):
            copied(file, ours)
    for name, (code, place) in extensions.items():
        (ours / f"{name}.py").write_text(code)
        (ours / "page" / f"{name}.js").write_text(place)
    (ours / "page/gone.js").write_text(NOTES_PLACE)
    return Server(folder / "bus.db", program=("-S", str(folder / "bus_server.py")))
