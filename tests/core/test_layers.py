"""bus_server.py is written in layers, and a layer uses only what stands above it; and the file stays as small as it is.

A layer is what stands below a comment line `# ── NAME ───`. What is checked are names, at runtime and in annotations: a
name that the file defines at its top may be used in its own layer and in those below.
"""

import ast
import re
import sys

import pytest

from tests.kit.processes import ROOT

LIMIT = 4826
CLASS_LINES, CLASS_METHODS, FUNCTION_LINES = 300, 30, 40
OTHERS = {"bus_server"}  # what an extension may import beside the standard library
LAZILY = {  # and where: if --schemas is given; by the path of a file that belongs to the extension
    "schemas.py": {"jsonschema", "jsonschema_specifications"},
    "mcp.py": {"_mcp_tools", "_mcp_protocol"},
    "files.py": {"_files_streams"},
    "work.py": {"_work_letters", "_work_queues", "_work_state", "_work_words"},
    "locks.py": {"_locks_names", "_locks_state", "_locks_words"},
    "redact.py": {"_redact_copies"},
    "search.py": {"_search_index"},
    "later.py": {"_later_schedule", "_later_due"},
    "notify.py": {"_notify_rules"},
    "people.py": {"_people_similar", "_people_statuses"},
    "replies.py": {"_replies_recalls", "_replies_fetches"},
}

SOURCE = (ROOT / "bus_server.py").read_text()
EXTENSIONS = sorted((ROOT / "bus_extensions").glob("[a-z]*.py"))
TREES = {file: ast.parse(file.read_text()) for file in (ROOT / "bus_server.py", *EXTENSIONS)}
TREE = TREES[ROOT / "bus_server.py"]
BANNER = re.compile(r"# ── (\w+) ─+")
SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
DEFINITIONS = (ast.FunctionDef, ast.ClassDef)


def layers(source):
    """[(name, first line)], in order; what stands before the first of them is the layer "imports"."""
    found = [(match[1], line) for line, text in enumerate(source.splitlines(), 1) if (match := BANNER.fullmatch(text))]
    return [("imports", 0), *found]


def bound(scope):
    """The names that a function, a lambda or a comprehension binds itself: they hide those of the file."""
    names, todo = set(), list(ast.iter_child_nodes(scope))
    for node in todo:
        if isinstance(node, ast.arg):
            names.add(node.arg)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, (*DEFINITIONS, ast.ExceptHandler)):
            names.add(node.name)
        if not isinstance(node, (*SCOPES, ast.ClassDef)):
            todo += ast.iter_child_nodes(node)
    return names


def uses(node, hidden=frozenset()):
    """[(name, line)] of what a statement uses and does not bind itself, annotations too."""
    if isinstance(node, ast.Name):
        return [(node.id, node.lineno)] if isinstance(node.ctx, ast.Load) and node.id not in hidden else []
    found = []
    inside = hidden | bound(node) if isinstance(node, SCOPES) else hidden
    for field, value in ast.iter_fields(node):
        outside = field in ("decorator_list", "returns", "args") and not isinstance(node, ast.Call)
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, ast.AST):
                found += uses(each, hidden if outside else inside)
    return found


def downward(source):
    """A sentence for each use of a name that only a layer below defines."""
    order = layers(source)

    def layer(line):
        return max(number for number, (_, first) in enumerate(order) if first <= line)

    homes, statements = {}, ast.parse(source).body
    for statement in statements:
        if not isinstance(statement, (ast.Import, ast.ImportFrom)):
            for name in {statement.name} if isinstance(statement, DEFINITIONS) else bound(statement):
                homes.setdefault(name, layer(statement.lineno))
    for statement in statements:
        for name, line in uses(statement):
            here = layer(line)
            if homes.get(name, -1) > here:
                yield f"line {line}: {order[here][0]} uses {name}, which stands below, in {order[homes[name]][0]}"


def outline():
    """The lines of bus_server.py, without what its functions and classes contain: each name is in its layer still."""
    lines = SOURCE.splitlines()
    for each in TREE.body:
        if isinstance(each, DEFINITIONS):
            first = min([each.lineno, *(decorator.lineno for decorator in each.decorator_list)])
            blank = [""] * (each.end_lineno - first)
            lines[first - 1 : each.end_lineno] = [f"{each.name} = None", *blank]
    return lines


def test_a_layer_uses_only_the_layers_above_it():
    assert not list(downward(SOURCE)), "\n".join(downward(SOURCE))


def test_the_layers_are_those_of_the_map_in_the_docstring_and_in_its_order():
    listed = re.findall(r"^    (\w+)  +\S", ast.get_docstring(TREE), re.M)
    assert [name for name, _ in layers(SOURCE)[1:]] == listed and len(listed) == 9


@pytest.mark.parametrize(
    "added, at, edge",
    [
        ("def early(): return Mailboxes(None)", "Loop", "Loop uses Mailboxes, which stands below, in Mailboxes"),
        ("def early(state: State) -> None: ...", "Wire", "Wire uses State, which stands below, in State"),
        ("def early() -> list[Bus]: ...", "State", "State uses Bus, which stands below, in Bus"),
        ("EARLY: Clock", "Words", "Words uses Clock, which stands below, in State"),
        ("class Early(Bus): pass", "Mailboxes", "Mailboxes uses Bus, which stands below, in Bus"),
        ("class Early:\n    @command_line\n    def a(self): ...", "Bus", "Bus uses command_line, which stands"),
        ("def early(a=[one for one in COMMANDS]): ...", "Bus", "Bus uses COMMANDS, which stands below, in start"),
    ],
    ids=lambda value: value.splitlines()[0] if len(value) > 9 else value,
)
def test_one_use_of_a_layer_below_is_found(added, at, edge):
    """The control: the checker sees what it looks for."""
    lines = outline()
    [start] = [line for name, line in layers(SOURCE) if name == at]
    end = next((line for line in range(start + 1, len(lines)) if BANNER.fullmatch(lines[line])), len(lines))
    found = list(downward("\n".join([*lines[:end], added, *lines[end:]])))
    assert len(found) == 1 and edge in found[0], found


def test_a_name_of_its_own_is_no_use_of_a_layer_below():
    """Many functions have a parameter or a loop variable that is called like a function far below."""
    own = "def early(log, inbox=1):\n    for agents in log:\n        print(agents, inbox, [main for main in log])\n"
    lines = outline()
    [end] = [line for name, line in layers(SOURCE) if name == "Loop"]
    assert not list(downward("\n".join([*lines[: end - 1], own, *lines[end - 1 :]])))


def docstrings(tree):
    """The lines that docstrings take."""
    having = (*DEFINITIONS, ast.Module)
    firsts = [node.body[0] for node in ast.walk(tree) if isinstance(node, having) and ast.get_docstring(node)]
    return {line for first in firsts for line in range(first.lineno, first.end_lineno + 1)}


def lines_of_code(source):
    """Not counted are blank lines, lines with a comment alone, and docstrings."""
    texts = [text.strip() for text in source.splitlines()]
    not_code = docstrings(ast.parse(source))
    return sum(bool(text) and text[0] != "#" for line, text in enumerate(texts, 1) if line not in not_code)


def test_lines_of_code_are_counted_without_comments_blank_lines_and_docstrings():
    assert lines_of_code('"""a\n\nb"""\n\n# c\nX = """d\ne"""  # f\n\ndef g():\n    """h"""\n    return 1\n') == 4


def test_no_parameter_of_sql_has_a_number():
    """Python 3.14 refuses `?1` with a sequence, and 3.12 warns on stderr."""
    files = [*TREES, *(ROOT / "ledgers").glob("*.py"), *(ROOT / "tools").glob("*.py")]
    assert not [file.name for file in files if re.search(r"[ (,]\?[0-9]", file.read_text())]


def test_the_core_does_not_grow():
    assert lines_of_code(SOURCE) <= LIMIT, f"bus_server.py has {lines_of_code(SOURCE)} lines of code, LIMIT is {LIMIT}"


def test_no_class_and_no_function_is_too_large_to_be_read():
    too_large = []
    for file, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, DEFINITIONS):
                lines = node.end_lineno - node.lineno + 1
                methods = sum(isinstance(each, ast.FunctionDef) for each in node.body)
                of_class = isinstance(node, ast.ClassDef)
                most = CLASS_LINES if of_class else FUNCTION_LINES
                if lines > most or (of_class and methods > CLASS_METHODS):
                    too_large.append(f"{file.name}: {node.name} has {lines} lines and {methods} methods")
    assert not too_large, "\n".join(too_large)


def test_each_layer_begins_with_a_paragraph_that_a_newcomer_can_act_on():
    lines = SOURCE.splitlines()
    for name, first in layers(SOURCE)[1:]:
        following = lines[first : first + 20]
        paragraph = [text for text in following[: following.index("")] if text.startswith("# ")]
        assert len(paragraph) >= 2, f"the layer {name} says in no paragraph what it is and where to begin"


def test_each_class_has_a_docstring():
    for file, tree in TREES.items():
        classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
        bare = {node.name for node in classes if not ast.get_docstring(node)}
        assert not bare, f"{file.name}: no docstring in {', '.join(sorted(bare))}"


def imported(node):
    """The first parts of the names of the modules that are imported in it."""
    for each in ast.walk(node):
        if isinstance(each, ast.Import):
            yield from (alias.name.split(".")[0] for alias in each.names)
        elif isinstance(each, ast.ImportFrom):
            yield each.module.split(".")[0] if each.module and not each.level else "another extension"


@pytest.mark.skipif(not hasattr(sys, "stdlib_module_names"), reason="Python 3.9 does not know what its library has")
def test_the_core_imports_the_standard_library_and_an_extension_the_core_too():
    assert set(imported(TREE)) <= sys.stdlib_module_names
    for file in EXTENSIONS:
        tree = TREES[file]
        others = set(imported(tree)) - sys.stdlib_module_names - OTHERS - LAZILY.get(file.name, set())
        assert not others, f"{file.name} imports {others}"
        at_start = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
        assert not LAZILY.get(file.name, set()).intersection(*map(imported, at_start)), file.name


def test_the_core_has_no_extension_by_name_but_in_the_table_of_what_is_elsewhere():
    names = {file.stem for file in EXTENSIONS}
    assert not names & set(imported(TREE))
    [table] = [
        node for node in TREE.body if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "ELSEWHERE"
    ]
    assert {key.value for key in table.value.keys} <= names
