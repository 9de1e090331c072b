"""What the documents say is true: PROTOCOL.md's examples are replayed, its promises have tests, README's lines work."""

import json
import re
import socket

import pytest

import test_bus
from tests.kit.processes import ROOT

PROTOCOL = (ROOT / "PROTOCOL.md").read_text()
PAIR = re.compile(r"```http\n([A-Z]+ .*?)```\n```http\n(HTTP/1\.1 .*?)```", re.DOTALL)
NUMBER = re.compile(r"\d{10}\.\d{6}|[0-9a-f]{13,16}")  # a ts, an id, a bus
MEASURED = {
    "ts",
    "id",
    "now",
    "bus",
    "lease",
    "at",
    "lease_until",
    "until",
    "fence",
    "reply_to",
    "last_seen",
    "sent",
    "oldest",
    "since",
    "cursor",
    "dell",
    "nano",
    "from",
    "to",
    "indexed",
}  # differ in each run


def exchange(port, text):
    with socket.create_connection(("127.0.0.1", port), timeout=30) as peer:
        peer.sendall(text)
        head, _, body = b"", b"", b""
        data = b""
        while b"\r\n\r\n" not in data:
            data += peer.recv(65536)
        head, _, body = data.partition(b"\r\n\r\n")
        length = int(re.search(rb"Content-Length: (\d+)", head)[1])
        while len(body) < length:
            body += peer.recv(65536)
    return head.decode(), body.decode()


class Translation:
    """What the document calls a ts, an id or a bus, and what this run calls it. Each has one name on both sides."""

    def __init__(self):
        self.real = {}

    def request(self, text):
        return re.sub(r"\d{10}\.\d{6}|[0-9a-f]{16}|[0-9a-f]{13}", lambda match: self.real.get(match[0], match[0]), text)

    def same(self, documented, real, member=""):
        if isinstance(documented, dict):
            assert isinstance(real, dict) and list(documented) == list(real), (documented, real)
            for key in documented:
                self.same(documented[key], real[key], key)
        elif isinstance(documented, list):
            assert len(documented) == len(real), (documented, real)
            for one, other in zip(documented, real):
                self.same(one, other, member)
        elif member in MEASURED and NUMBER.fullmatch(str(documented)):
            assert NUMBER.fullmatch(str(real)), (member, documented, real)
            if member not in ("last_seen", "since", "lease_until", "until", "at"):  # moments; the others recur
                assert self.real.setdefault(str(documented), str(real)) == str(real), (member, documented)
        else:
            documented, real = (re.sub(r"\d{4}-\S+Z", "TIME", each) if isinstance(each, str) else each
                                for each in (documented, real))  # fmt: skip
            assert documented == real, (member, documented, real)


def test_every_example_of_the_protocol_is_what_the_bus_says(bus):
    """The examples are one conversation, in order, on an empty bus."""
    translation = Translation()
    pairs = PAIR.findall(PROTOCOL)
    assert len(pairs) * 2 == PROTOCOL.count("```http"), "an example without its answer"
    for request, answer in pairs:
        head, _, body = request.partition("\n\n")
        body = body.rstrip("\n")
        promised = re.search(r"Content-Length: (\d+)", head)
        assert int(promised[1] if promised else 0) == len(body.encode()), request
        raw = translation.request(head).replace("\n", "\r\n") + "\r\n\r\n" + translation.request(body)
        real_head, real_body = exchange(bus.port, raw.encode())
        documented_head, _, documented_body = answer.partition("\n\n")
        status, *headers = documented_head.split("\n")
        assert real_head.startswith(status + "\r\n"), (request, real_head, real_body)
        if documented_body.startswith("{"):
            translation.same(json.loads(documented_body, parse_float=str), json.loads(real_body, parse_float=str))
            assert all(header in real_head for header in headers)
        else:
            documented_body = re.sub(r"^\S+Z", "TIME", translation.request(documented_body), flags=re.MULTILINE)
            assert re.sub(r"^\S+Z", "TIME", real_body, flags=re.MULTILINE) == documented_body
            for header in headers:
                name = header.partition(":")[0]
                assert translation.request(header) in real_head or name == "Bus-Id", (header, real_head)


PROMISING = [*range(2, 4), *range(5, 16), 17, 18, *range(20, 29)]  # 4: tests; 16, 19: options; 29: clients
MARK = re.compile(r"\[(\d+\.\d+)\]")


def sections():
    """The text of each section by its number, without the examples."""
    parts = re.split(r"^## (\d+)\. ", re.sub(r"```.*?```", "", PROTOCOL, flags=re.DOTALL), flags=re.MULTILINE)
    return {int(number): text for number, text in zip(parts[1::2], parts[2::2])}


def promises(text):
    """Each paragraph, item of a list and row of a table."""
    for paragraph in filter(None, map(str.strip, text.partition("\n")[2].split("\n\n"))):
        if paragraph.startswith("|"):
            yield from paragraph.split("\n")[2:]
        else:
            yield from filter(None, re.split(r"^- ", paragraph, flags=re.MULTILINE))


def checks():
    """The number of each check of test_bus.py, in its order."""
    found = [check for name, check in vars(test_bus).items() if name.startswith("test_")]
    return [re.match(r"\d+\.\d+", check.__doc__)[0] for check in found]


def elsewhere():
    """The numbers that other tests show."""
    return re.findall(r"^\| \[(\d+\.\d+)\] \| `test_", PROTOCOL, re.MULTILINE)


@pytest.mark.parametrize("number", PROMISING)
def test_every_promise_of_the_protocol_names_its_check(number):
    found = [*promises(sections()[number])]
    assert found and not [promise for promise in found if not MARK.search(promise)]


def test_every_check_is_named_by_its_section_and_every_name_is_a_check():
    """One check has each number, and one row of the table; some have both."""
    known = [*dict.fromkeys(checks() + elsewhere())]
    assert all(len(set(each)) == len(each) for each in (checks(), elsewhere())) and len(checks()) > 80
    for number in PROMISING:
        named = set(MARK.findall(sections()[number]))
        assert named <= set(known), number
        assert {each for each in known if each.startswith(f"{number}.")} <= named, number
    assert {int(each.partition(".")[0]) for each in known} <= set(PROMISING)


def test_the_checks_are_in_the_order_of_their_numbers():
    numbers = [tuple(map(int, each.split("."))) for each in checks()]
    assert numbers == sorted(numbers)


def test_every_promise_of_the_protocol_has_its_test():
    named = set(re.findall(r"`(test_\w+)`", PROTOCOL))
    code = "".join(path.read_text() for path in [ROOT / "test_bus.py", *(ROOT / "tests").rglob("test_*.py")])
    missing = [name for name in named if f"def {name}(" not in code]
    assert named and not missing, missing


def test_the_names_called_valid_are_valid(bus):
    names = re.findall("`(.+?)`", re.search("Valid: (.+?)\\. Invalid", PROTOCOL)[1])
    assert len(names) > 3
    assert all(b'"messages": []' in bus.get(f"/recv?to={name}") for name in names)


def test_changing_md_has_every_seam_and_names_only_what_there_is():
    text = (ROOT / "docs" / "changing.md").read_text()
    sources = [path for folder in ("bus_extensions", "tests") for path in (ROOT / folder).rglob("*.py")]
    core = (ROOT / "bus_server.py").read_text()
    code = core + "".join(path.read_text() for path in sources)
    seams = re.findall(r"self\.(\w+): ", re.search(r"# The seams.*?core_routes", core, re.DOTALL)[0])
    routes = {"routes": "route", "extensions": "ELSEWHERE"}  # an extension does not touch these two itself
    assert len(seams) > 6 and not [seam for seam in seams if f"{routes.get(seam, f'bus.{seam}')}" not in text]
    called = (
        set(re.findall(r"`(?:\w+\.)*(\w+)\(", text)) - {"endpoint"} - set(re.findall(r"^ +\| .*?`(\w+)\(", text, re.M))
    )
    missing = [name for name in called if not re.search(rf"\b(def|class) {name}\b|\b{name} = ", code)]
    assert len(called) > 15 and not missing, missing
    files = {file for file in re.findall(r"`((?:tests|docs|bus_extensions)/[\w/.]+\.\w+)`", text) if "NAME" not in file}
    assert len(files) > 6 and not [file for file in files if not (ROOT / file).exists()]


@pytest.mark.parametrize("path", ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))])
def test_in_a_block_that_is_pasted_whole_no_line_is_taken_as_the_answer_to_a_question(path):
    """`invite` asks on a terminal: so it is the last line of its block, or has --yes."""
    for block in re.findall(r"```sh\n(.*?)```", (ROOT / path).read_text(), re.DOTALL):
        *others, _ = block.splitlines()
        assert not [line for line in others if " invite " in line and "--yes" not in line], block
