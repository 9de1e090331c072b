"""What a hostile or careless peer sends, as data. Statuses are literals from PROTOCOL.md, never read off the server.

Everything that must not be stored is signed `mallory`, everything that must be is signed `alice`: so one look at
`/log?from=mallory` tells whether anything was smuggled past a refusal, out of a body, or behind a framing error.
"""
import json
from typing import NamedTuple

HOST = "Host: localhost"
GET = "GET /healthz HTTP/1.1"
SEND = "POST /send HTTP/1.1"


def head(*lines, body=b""):
    """A request as it should be, but for what is wrong in these lines."""
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def a_send(sender, *fields, to="bob"):
    """A whole request that is stored wherever it is taken for one."""
    body = b'{"from": "%s", "to": "%s", "msg": "hello"}' % (sender.encode(), to.encode())
    return head(SEND, HOST, f"Content-Length: {len(body)}", *fields, body=body)


def padded(size):
    """A good head of exactly `size` bytes."""
    return head(GET, HOST, "A: " + "b" * (size - len(head(GET, HOST, "A: "))))


SMUGGLED = a_send("mallory")
MAIL = SMUGGLED.partition(b"\r\n\r\n")[2]
SIZE = len(MAIL)
ALICE = a_send("alice")
WAITING = head("GET /recv?to=carl&wait=50 HTTP/1.1", HOST)
CHUNKED = b"%x\r\n%s\r\n0\r\n\r\n" % (SIZE, MAIL)


# ── Framing ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class Broken(NamedTuple):
    """Not a request: one answer, then the connection is closed, and what follows is never looked at."""

    name: str
    status: int
    sent: bytes


def sized(length, *fields):
    """A send whose Content-Length is `length`."""
    return head(SEND, HOST, f"Content-Length:{length}", *fields, body=MAIL)


BROKEN = [
    # Line ends
    Broken("only LF", 400, b"GET /healthz HTTP/1.1\nHost: localhost\n\n"),
    Broken("LF after the request line", 400, b"GET /healthz HTTP/1.1\nHost: localhost\r\n\r\n"),
    Broken("LF after one header", 400, b"GET /healthz HTTP/1.1\r\nHost: localhost\nA: b\r\n\r\n"),
    Broken("LF as the empty line", 400, b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\n"),
    Broken("only CR", 400, b"GET /healthz HTTP/1.1\rHost: localhost\r\r\n\r\n"),
    Broken("CR between two headers", 400, b"GET /healthz HTTP/1.1\r\nHost: localhost\rA: b\r\n\r\n"),
    Broken("CR in a value", 400, b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nA: b\rc\r\n\r\n"),
    Broken("CR before CRLF", 400, b"GET /healthz HTTP/1.1\r\nHost: localhost\r\r\n\r\n"),
    Broken("CR in the request line", 400, b"GET /healthz\r HTTP/1.1\r\nHost: localhost\r\n\r\n"),
    Broken("an empty line first", 400, b"\r\n" + head(GET, HOST)),
    Broken("an LF first", 400, b"\n" + head(GET, HOST)),
    Broken("a space first", 400, b" " + head(GET, HOST)),
    # Bytes no head may have
    Broken("NUL in the request line", 400, head("GET /heal\0thz HTTP/1.1", HOST)),
    Broken("NUL in a header name", 400, head(GET, HOST, "A\0: b")),
    Broken("NUL in a value", 400, head(GET, HOST, "A: b\0c")),
    Broken("a control character in a value", 400, head(GET, HOST, "A: b\x01c")),
    Broken("ESC in the request line", 400, head("GET /\x1b[2J HTTP/1.1", HOST)),
    Broken("DEL in a value", 400, head(GET, HOST, "A: b\x7f")),
    Broken("a vertical tab before a value", 400, head(GET, HOST, "A:\x0bb")),
    Broken("obs-text in the target", 400, head("GET /h\xe9althz HTTP/1.1", HOST)),
    Broken("obs-text in a header name", 400, head(GET, HOST, "\xc4: b")),
    Broken("a TLS ClientHello", 400, b"\x16\x03\x01\x00\xc8\x01\x00\x00\xc4\x03\x03" + b"\r\n\r\n"),
    # Header lines
    Broken("a folded header", 400, head(GET, HOST, "A: b", " c")),
    Broken("a header folded with a tab", 400, head(GET, HOST, "A: b", "\tc")),
    Broken("a fold with nothing before it", 400, head(GET, " " + HOST)),
    Broken("a fold that hides a length", 400, head(SEND, HOST, "A: b", f" Content-Length: {SIZE}", body=MAIL)),
    Broken("a space before the colon", 400, head(GET, HOST, "A : b")),
    Broken("a tab before the colon", 400, head(GET, HOST, "A\t: b")),
    Broken("a space before the colon of a length", 400, head(SEND, HOST, f"Content-Length : {SIZE}", body=MAIL)),
    Broken("no colon", 400, head(GET, HOST, "A")),
    Broken("no colon, and a length behind it", 400, head(SEND, HOST, "A", f"Content-Length: {SIZE}", body=MAIL)),
    Broken("an empty header name", 400, head(GET, HOST, ": b")),
    Broken("a space in a header name", 400, head(GET, HOST, "A B: c")),
    Broken("parentheses in a header name", 400, head(GET, HOST, "A(B): c")),
    Broken("a quoted header name", 400, head(GET, HOST, '"A": b')),
    # Host
    Broken("no Host", 400, head(GET)),
    Broken("no Host on a send", 400, head(SEND, f"Content-Length: {SIZE}", body=MAIL)),
    Broken("two Hosts", 400, head(GET, HOST, "Host: other")),
    Broken("the same Host twice", 400, head(GET, HOST, HOST.lower())),
    Broken("two Hosts on HTTP/1.0", 400, head("GET /healthz HTTP/1.0", HOST, HOST)),
    Broken("two Authorizations", 400, head(GET, HOST, "Authorization: Bearer a", "authorization: Bearer b")),
    # Content-Length
    Broken("two lengths", 400, sized(SIZE, "Content-Length: 5")),
    Broken("the same length twice", 400, sized(SIZE, f"content-length: {SIZE}")),
    Broken("a list of equal lengths", 400, sized(f"{SIZE}, {SIZE}")),
    Broken("a plus sign in the length", 400, sized(f"+{SIZE}")),
    Broken("a length below zero", 400, sized("-1")),
    Broken("a length of minus zero", 400, sized("-0")),
    Broken("a hexadecimal length", 400, sized(hex(SIZE))),
    Broken("a length with an underscore", 400, sized("1_0")),
    Broken("a length with a fraction", 400, sized(f"{SIZE}.0")),
    Broken("a length with an exponent", 400, sized("1e1")),
    Broken("a length in words", 400, sized("ten")),
    Broken("an empty length", 400, sized("")),
    Broken("a length with a space inside", 400, sized("4 3")),
    Broken("a length with a no-break space", 400, sized(f"\xa0{SIZE}")),
    Broken("a length in superscript", 400, sized("\xb2\xb3")),
    Broken("a length with a semicolon", 400, sized(f"{SIZE};")),
    Broken("a length one above the limit", 413, sized(262145)),
    Broken("a length of eight digits", 413, sized(99999999)),
    Broken("a length beyond 64 bits", 413, sized(2**64 + SIZE)),
    # Transfer-Encoding
    Broken("chunked", 501, head(SEND, HOST, "Transfer-Encoding: chunked", body=CHUNKED)),
    Broken("chunked, in capitals", 501, head(SEND, HOST, "TRANSFER-ENCODING: CHUNKED", body=CHUNKED)),
    Broken("chunked behind a tab", 501, head(SEND, HOST, "Transfer-Encoding:\tchunked", body=CHUNKED)),
    Broken("chunked behind a vertical tab", 400, head(SEND, HOST, "Transfer-Encoding:\x0bchunked", body=CHUNKED)),
    Broken("chunked before a space and a colon", 400, head(SEND, HOST, "Transfer-Encoding : chunked", body=CHUNKED)),
    Broken("xchunked", 501, head(SEND, HOST, "Transfer-Encoding: xchunked", body=CHUNKED)),
    Broken("identity", 501, head(SEND, HOST, "Transfer-Encoding: identity", body=MAIL)),
    Broken("gzip, chunked", 501, head(SEND, HOST, "Transfer-Encoding: gzip, chunked", body=CHUNKED)),
    Broken("an empty transfer coding", 501, head(SEND, HOST, "Transfer-Encoding:", body=MAIL)),
    Broken("two Transfer-Encodings", 400,
           head(SEND, HOST, "Transfer-Encoding: chunked", "Transfer-Encoding: identity", body=CHUNKED)),
    Broken("chunked with a length", 400, sized(SIZE, "Transfer-Encoding: chunked")),
    Broken("a length with chunked", 400,
           head(SEND, HOST, "Transfer-Encoding: chunked", f"Content-Length: {len(CHUNKED)}", body=CHUNKED)),
    Broken("chunked on a GET", 501, head(GET, HOST, "Transfer-Encoding: chunked", body=CHUNKED)),
    Broken("chunked on HTTP/1.0", 501, head("POST /send HTTP/1.0", "Transfer-Encoding: chunked", body=CHUNKED)),
    # A body where there is none
    Broken("a body on GET", 400, head(GET, HOST, f"Content-Length: {len(SMUGGLED)}", body=SMUGGLED)),
    Broken("a body on OPTIONS", 400, head("OPTIONS /send HTTP/1.1", HOST, f"Content-Length: {SIZE}", body=MAIL)),
    # Expect
    Broken("another expectation", 417, sized(SIZE, "Expect: 200-ok")),
    Broken("an expectation on GET", 417, head(GET, HOST, "Expect: the best")),
    Broken("100-continue and more", 417, sized(SIZE, "Expect: 100-continue, 200-ok")),
    Broken("two expectations", 400, sized(SIZE, "Expect: 100-continue", "Expect: 100-continue")),
    Broken("100-continue before too large a body", 413, sized(262145, "Expect: 100-continue")),
    # The request line
    Broken("HTTP/0.9", 400, b"GET /healthz\r\n\r\n"),
    Broken("HTTP/1.2", 505, head("GET /healthz HTTP/1.2", HOST)),
    Broken("HTTP/2.0", 505, head("GET /healthz HTTP/2.0", HOST)),
    Broken("the preface of HTTP/2", 400, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
    Broken("HTTP/1.10", 400, head("GET /healthz HTTP/1.10", HOST)),
    Broken("HTTP/01.1", 400, head("GET /healthz HTTP/01.1", HOST)),
    Broken("HTTP/1", 400, head("GET /healthz HTTP/1", HOST)),
    Broken("HTTP/1,1", 400, head("GET /healthz HTTP/1,1", HOST)),
    Broken("http in lower case", 400, head("GET /healthz http/1.1", HOST)),
    Broken("another protocol", 400, head("GET /healthz ICY/1.1", HOST)),
    Broken("an absolute target", 400, head("GET http://localhost/healthz HTTP/1.1", HOST)),
    Broken("an authority as target", 400, head("CONNECT localhost:80 HTTP/1.1", HOST)),
    Broken("an asterisk as target", 400, head("OPTIONS * HTTP/1.1", HOST)),
    Broken("a relative target", 400, head("GET healthz HTTP/1.1", HOST)),
    Broken("no target", 400, head("GET HTTP/1.1", HOST)),
    Broken("a fragment", 400, head("GET /healthz#top HTTP/1.1", HOST)),
    Broken("a fragment in the query", 400, head("GET /healthz?a=b#top HTTP/1.1", HOST)),
    Broken("a tab after the method", 400, head("GET\t/healthz HTTP/1.1", HOST)),
    Broken("a tab after the target", 400, head("GET /healthz\tHTTP/1.1", HOST)),
    Broken("two spaces after the method", 400, head("GET  /healthz HTTP/1.1", HOST)),
    Broken("two spaces after the target", 400, head("GET /healthz  HTTP/1.1", HOST)),
    Broken("a space at the end", 400, head("GET /healthz HTTP/1.1 ", HOST)),
    Broken("a space in the target", 400, head("GET /health z HTTP/1.1", HOST)),
    Broken("two versions", 400, head("GET /healthz HTTP/1.1 HTTP/1.1", HOST)),
    Broken("a method that is no token", 400, head("G(E)T /healthz HTTP/1.1", HOST)),
    # Sizes
    Broken("a request line of 8193 bytes", 414, head(f"GET /{'a' * 8179} HTTP/1.1", HOST)),
    Broken("65 headers", 431, head(GET, HOST, *["A: b"] * 64)),
    Broken("a head of 16385 bytes", 431, padded(16385)),
    Broken("a large head before a body with LF", 431,
           head(SEND, HOST, "Content-Length: 8", "A: " + "b" * 17000, body=b"a\nb\0c\rde")),
]  # fmt: skip


class Whole(NamedTuple):
    """One or several requests, each answered in turn; the connection goes on unless `closes`."""

    name: str
    answers: tuple[int, ...]
    sent: bytes
    stored: int = 0  # messages from alice
    closes: bool = False


def hiding(line, status, name):
    """A request whose body is a request: it is read and left alone."""
    return Whole(name, (status,), head(line, HOST, f"Content-Length: {len(SMUGGLED)}", body=SMUGGLED))


def got(status, target, name=None):
    return Whole(name or f"GET {target}", (status,), head(f"GET {target} HTTP/1.1", HOST))


WHOLE = [
    got(200, "/healthz", "a plain GET"),
    Whole("HTTP/1.0 without Host", (200,), head("GET /healthz HTTP/1.0"), closes=True),
    Whole("HTTP/1.0 that keeps alive", (200,), head("GET /healthz HTTP/1.0", "Connection: Keep-Alive")),
    Whole("Connection: close", (200,), head(GET, HOST, "Connection: close"), closes=True),
    Whole("close among other options", (200,), head(GET, HOST, "Connection: TE ,CLOSE"), closes=True),
    Whole("an upgrade that is not taken", (200,), head(GET, HOST, "Connection: Upgrade", "Upgrade: h2c")),
    Whole("no space after the colon", (200,), head(GET, "Host:localhost")),
    Whole("much space around a value", (200,), head(GET, "Host: \t  localhost\t ")),
    Whole("an empty value", (200,), head(GET, HOST, "A:")),
    Whole("obs-text in a value", (200,), head(GET, HOST, "A: gr\xfc\xdfe")),
    Whole("a tab in a value", (200,), head(GET, HOST, "A: b\tc")),
    Whole("another header twice", (200,), head(GET, HOST, "A: b", "A: c")),
    Whole("every character of a header name", (200,), head(GET, HOST, "!#$%&'*+-.^_`|~09AZaz: b")),
    Whole("a length of 0 on GET", (200,), head(GET, HOST, "Content-Length: 0")),
    Whole("64 headers", (200,), head(GET, HOST, *["A: b"] * 63)),
    Whole("a request line of 8192 bytes", (404,), head(f"GET /{'a' * 8178} HTTP/1.1", HOST)),
    Whole("a head of 16384 bytes", (200,), padded(16384)),
    Whole("a send", (200,), ALICE, stored=1),
    Whole("a send with a padded length", (200,), ALICE.replace(b"Length: ", b"Length: 00000"), stored=1),
    Whole("a send with odd capitals", (200,), ALICE.replace(b"Content-Length", b"cONTENT-lENGTH"), stored=1),
    Whole("a send over HTTP/1.0", (200,), ALICE.replace(b"HTTP/1.1", b"HTTP/1.0"), stored=1, closes=True),
    Whole("a send that expects 100", (200,), a_send("alice", "Expect: 100-Continue"), stored=1),
    Whole("a send over HTTP/1.0 that expects 100", (200,),
        a_send("alice", "Expect: 100-continue").replace(b"HTTP/1.1", b"HTTP/1.0"), stored=1, closes=True),
    Whole("three sends", (200, 200, 200), ALICE * 3, stored=3),
    Whole("a send among reads", (200, 200, 404), head(GET, HOST) + ALICE + head("GET /x HTTP/1.1", HOST), stored=1),
    Whole("a send without a body", (400,), head(SEND, HOST)),
    Whole("a send that is not JSON", (400, 200), ALICE.replace(b'{"from', b"{'from") + head(GET, HOST)),
    Whole("a raw send that looks like a request", (200,),
        head("POST /send?from=alice&to=bob HTTP/1.1", HOST, f"Content-Length: {len(SMUGGLED)}", body=SMUGGLED),
        stored=1),
    Whole("a raw send that looks chunked", (200,),
        head("POST /send?from=alice&to=bob HTTP/1.1", HOST, f"Content-Length: {len(CHUNKED)}", body=CHUNKED),
        stored=1),
    hiding(SEND, 400, "a request in a body that is not JSON"),
    hiding("POST /nowhere HTTP/1.1", 404, "a request in a body for no endpoint"),
    hiding("POST /recv?to=bob HTTP/1.1", 405, "a request in a body for a reading endpoint"),
    hiding("PUT /send HTTP/1.1", 405, "a request in the body of a PUT"),
    hiding("PATCH /send HTTP/1.1", 501, "a request in the body of a PATCH"),
    Whole("another method", (501,), head("PATCH /send HTTP/1.1", HOST)),
    Whole("TRACE", (501,), head("TRACE / HTTP/1.1", HOST)),
    Whole("a method in lower case", (501,), head("get /healthz HTTP/1.1", HOST)),
    Whole("a method of all token characters", (501,), head("!#$%&'*+-.^_`|~09AZaz / HTTP/1.1", HOST)),
    Whole("the name of an attribute as method", (501,), head("__class__ / HTTP/1.1", HOST)),
    got(405, "/send"),
    *[got(404, path) for path in
      ["/..", "/../healthz", "/x/../healthz", "/./healthz", "/%2e%2e/healthz", "/../../etc/passwd", "//healthz",
       "//localhost/healthz", "/healthz/", "/%00", "/healthz%00", "/%68ealthz", "/HEALTHZ", "/healthz;a", "/\\healthz",
       "/bus_server.py", "/bus.db", "/message/", "/message/..", "/message/%00", "/message/0x1"]],
    got(404, "/message/ffffffffffffffff", "an id beyond 63 bits"),
]  # fmt: skip


class Cut(NamedTuple):
    """The peer sends this and closes its side; it still hears every answer, as with `nc -N`."""

    name: str
    answers: tuple[int, ...]
    sent: bytes
    stored: int = 0


CUT = [
    Cut("nothing", (), b""),
    Cut("one byte", (400,), b"G"),
    Cut("half a request line", (400,), b"GET /heal"),
    Cut("a head without its empty line", (400,), b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n"),
    Cut("a head without its last byte", (400,), head(GET, HOST)[:-1]),
    Cut("HTTP/0.9 without an empty line", (400,), b"GET /healthz\r\n"),
    Cut("a whole GET", (200,), head(GET, HOST)),
    Cut("a whole send", (200,), ALICE, stored=1),
    Cut("a send without its body", (400,), SMUGGLED.partition(b"\r\n\r\n")[0] + b"\r\n\r\n"),
    Cut("a send without its last byte", (400,), SMUGGLED[:-1]),
    Cut("a send with a length one too high", (400,), sized(SIZE + 1)),
    Cut("a raw send without its last byte", (400,),
        head("POST /send?from=mallory&to=bob HTTP/1.1", HOST, "Content-Length: 6", body=b"hello")),
    Cut("an expectation and no body", (400,), a_send("mallory", "Expect: 100-continue")[:-SIZE]),
    Cut("a whole send and half of one", (200, 400), ALICE + SMUGGLED[:-1], stored=1),
    Cut("a whole send and half a head", (200, 400), ALICE + b"POST /se", stored=1),
    Cut("three sends", (200, 200, 200), ALICE * 3, stored=3),
    Cut("a reader that would wait", (200,), WAITING),
    Cut("a reader that would wait, and a GET", (200, 404), WAITING + head("GET /x HTTP/1.1", HOST)),
    Cut("two readers that would wait", (200, 200), WAITING * 2),
    Cut("a send and a reader that would wait", (200, 200), ALICE + WAITING, stored=1),
    Cut("a question that would wait", (200,), ALICE.replace(b"/send", b"/ask"), stored=1),
]  # fmt: skip


# ── JSON and Unicode ─────────────────────────────────────────────────────────────────────────────────────────────────


class Payload(NamedTuple):
    name: str
    body: bytes
    jq: bool = True  # jq 1.6 can carry it: its numbers are 64-bit floats, printed with 17 digits


def mail(sender, **members):
    """A message as JSON text. Each member is JSON text too, so that it can be wrong; None leaves it out."""
    given = {"from": f'"{sender}"', "to": '"bob"', "msg": '"hello"', **members}
    text = ", ".join(f'"{member}": {value}' for member, value in given.items() if value is not None)
    return f"{{{text}}}".encode("utf-8", "surrogatepass")


def bad(name, **members):
    return Payload(name, mail("mallory", **members))


def good(name, jq=True, **members):
    return Payload(name, mail("alice", **members), jq)


def string(text):
    return f'"{text}"'


def nested(opening, closing, depth):
    """`depth` levels, of which the message is the first."""
    return opening * (depth - 1) + "1" + closing * (depth - 1)


TEMPLATE = mail("mallory", msg='"%s"')
NAMES_THAT_ARE_NONE = {
    "empty": "", "with a newline at its end": "bob\\n", "with a space": "bo b", "of 65 letters": "b" * 65,
    "with Arabic digits": "bob\u0661", "with fullwidth letters": "\uff42ob", "with an umlaut": "b\u00f6b",
    "that starts with a dot": ".bob", "that starts with a dash": "-bob", "that climbs": "..", "with a slash": "a/b",
    "with a backslash": "a\\\\b", "with a NUL": "bob\\u0000", "with a quote": 'bob\\"', "with a comma": "a,b",
    "with a percent sign": "bob%00", "with a Kelvin sign": "boo\u212a", "with half a pair": "bob\\ud800",
}  # fmt: skip
ENCODINGS_THAT_ARE_NOT_UTF_8 = {
    "Latin-1": b"caf\xe9", "an overlong slash": b"\xc0\xaf", "an overlong NUL": b"\xc0\x80",
    "an overlong slash in three bytes": b"\xe0\x80\xaf", "an overlong slash in four bytes": b"\xf0\x80\x80\xaf",
    "half a surrogate pair": b"\xed\xa0\x80", "CESU-8": b"\xed\xa0\xbd\xed\xb8\x80", "0xFF": b"\xff",
    "a character cut short": b"\xe2\x82", "a lone continuation": b"\x80", "beyond U+10FFFF": b"\xf4\x90\x80\x80",
}  # fmt: skip

REFUSED = [
    # Not a message
    Payload("an empty body", b""),
    Payload("only white space", b" \r\n\t"),
    Payload("an empty array", b"[]"),
    Payload("an array of arrays", b"[[]]"),
    Payload("an array of null", b"[null]"),
    Payload("an array of numbers", b"[1]"),
    Payload("a string", b'"hello"'),
    Payload("a number", b"1"),
    Payload("null", b"null"),
    Payload("true", b"true"),
    Payload("an empty object", b"{}"),
    Payload("a form", b"from=mallory&to=bob&msg=hello"),
    Payload("a good message and a bad one", b"[" + mail("mallory") + b"," + mail("mallory", to=None) + b"]"),
    Payload("a good message and a number", b"[" + mail("mallory") + b", 1]"),
    Payload("a key twice in an array", b"[" + b",".join([mail("mallory", key='"k"')] * 2) + b"]"),
    bad("no from", **{"from": None}),
    bad("no to", to=None),
    bad("no msg", msg=None),
    # Not JSON
    Payload("a comma at the end", mail("mallory")[:-1] + b",}"),
    Payload("two documents", mail("mallory") * 2),
    Payload("text behind the message", mail("mallory") + b"x"),
    Payload("half a message", mail("mallory")[:-1]),
    Payload("single quotes", mail("mallory").replace(b'"', b"'")),
    Payload("a comment", b"/**/" + mail("mallory")),
    Payload("a no-break space around it", b"\xc2\xa0" + mail("mallory")),
    Payload("a form feed", b"\x0c" + mail("mallory")),
    Payload("a newline in a string", TEMPLATE % b"a\nb"),
    Payload("a tab in a string", TEMPLATE % b"a\tb"),
    Payload("a control character in a string", TEMPLATE % b"\x01"),
    Payload("an unknown escape", TEMPLATE % b"\\x41"),
    Payload("a short escape", TEMPLATE % b"\\u12"),
    Payload("a signed escape", TEMPLATE % b"\\u-123"),
    Payload("an escape with 0x", TEMPLATE % b"\\u0x12"),
    Payload("an escape with a space", TEMPLATE % b"\\u 123"),
    # Numbers
    *[bad(f"the number {text}", extra=text) for text in
      ["NaN", "Infinity", "-Infinity", "nan", "1e999", "-1e999", "01", "+1", "0x10", "1_0", ".5", "1.", "1e",
       "\u0661"]],
    bad("1e999 deep inside", extra='[{"a": [1e999]}]'),
    bad("NaN as ttl", ttl="NaN"),
    bad("NaN in a member that the bus overwrites", ts="NaN"),
    bad("1e999 as ttl", ttl="1e999"),
    bad("an integer of 4301 digits", extra="1" * 4301),
    bad("minus 4301 digits", extra="-" + "1" * 4301),
    bad("an integer of 4301 digits deep inside", extra='[{"a": %s}]' % ("1" * 4301)),
    bad("an integer of 200000 digits", extra="1" * 200000),
    # Depth, members given twice
    bad("lists 33 deep", extra=nested("[", "]", 33)),
    bad("objects 33 deep", extra=nested('{"a": ', "}", 33)),
    bad("mixed 33 deep", extra=nested('[{"a": ', "}]", 17)),
    bad("lists 100000 deep", extra=nested("[", "]", 100000)),
    Payload("100000 open brackets", b"[" * 100000),
    Payload("50000 open objects", b'{"a":' * 50000),
    Payload("a message inside 32 arrays", b"[" * 32 + mail("mallory") + b"]" * 32),
    bad("to twice", to='"carl", "to": "bob"'),
    bad("msg twice, and equal", msg='"a", "msg": "a"'),
    bad("a member twice", extra='1, "extra": 2'),
    bad("a member twice, once escaped", extra='1, "\\u0065xtra": 2'),
    bad("a member twice in an object", extra='{"a": 1, "a": 1}'),
    bad("a member twice deep inside", extra='[[{"b": [{"a": 1, "a": 2}]}]]'),
    # NUL and surrogates
    bad("an escaped NUL", msg='"a\\u0000b"'),
    bad("an escaped NUL in a member", extra='["\\u0000"]'),
    bad("an escaped NUL in a member's name", **{"a\\u0000": "1"}),
    bad("an escaped NUL behind a backslash", msg='"\\\\\\u0000"'),
    bad("an escaped NUL in a key", key='"\\u0000"'),
    bad("an escaped NUL as subject", subject='"\\u0000"'),
    Payload("a NUL in a string", TEMPLATE % b"a\0b"),
    Payload("a NUL at the end", mail("mallory") + b"\0"),
    bad("a high surrogate", msg='"\\ud800"'),
    bad("a low surrogate", msg='"\\udfff"'),
    bad("a pair reversed", msg='"\\ude00\\ud83d"'),
    bad("a high surrogate and a pair", msg='"\\ud83d\\ud83d\\ude00"'),
    bad("a high surrogate and text", msg='"\\uD83Dx"'),
    bad("half a pair in a subject", subject='"\\ud83d"'),
    bad("half a pair deep inside", extra='[{"a": ["\\udead"]}]'),
    bad("half a pair in a member's name", **{"\\udead": "1"}),
    bad("half a pair in a name deep inside", extra='[{"\\udead": 1}]'),
    # Encodings
    *[Payload(f"not UTF-8: {name}", TEMPLATE % text) for name, text in ENCODINGS_THAT_ARE_NOT_UTF_8.items()],
    *[Payload(encoding, mail("mallory").decode().encode(encoding))
        for encoding in ["UTF-16", "UTF-16-LE", "UTF-16-BE", "UTF-32", "UTF-32-BE"]],
    # Types
    *[bad(f"{value} as {member}", **{member: value})
        for member in ["from", "to", "msg", "channel"] for value in ["null", "1", "true", "{}", "[1]"]
        if (member, value) != ("channel", "null")],
    *[bad(f"{value} as {member}", **{member: value})
        for member in ["key", "reply_to"] for value in ["1", "true", "{}", "[]"]],
    *[bad(f"{value} as ttl", ttl=value) for value in ['"5"', "true", "[]", "{}", "0", "-1", "1e10"]],
    bad("a list as from", **{"from": '["mallory"]'}),
    bad("a list as msg", msg='["hello"]'),
    bad("a list as channel", channel='["lab"]'),
    bad("nobody in a list", to="[]"),
    bad("a list in a list", to='[["bob"]]'),
    bad("null in a list", to='["bob", null]'),
    bad("a bad name in a list", to='["bob", "b b"]'),
    bad("65 names in a list", to=str([f"b{n}" for n in range(65)]).replace("'", '"')),
    # Names and keys
    *[bad(f"a name {what} as {member}", **{member: string(name)})
        for what, name in NAMES_THAT_ARE_NONE.items() for member in ["from", "to", "channel"]
        if name or member != "channel"],
    *[bad(f"from {name}", **{"from": string(name)}) for name in
        ["all", "system", "operator", "user", "ALL", "System", "oPERATOR", "User"]],
    bad("an empty key", key='""'),
    bad("a key with a space", key='"a b"'),
    bad("a key of 129 characters", key=string("k" * 129)),
    bad("a key with an umlaut", key='"\u00fc"'),
    bad("a key with a newline", key='"k\\n"'),
    bad("a key with DEL", key='"k\\u007f"'),
]  # fmt: skip

PASSED = [
    # Text
    good("an empty message", msg='""'),
    good("quotes and backslashes", msg=r'"\"\\\/\b\f\n\r\t"'),
    good("an escaped backslash before u0000", msg=r'"\\u0000"'),
    good("two of them", msg=r'"\\\\u0000"'),
    good("an escaped backslash before ud800", msg=r'"\\ud800"'),
    good("the highest control character", msg=r'"\u001f"'),
    good("every control character but NUL", msg=string("".join(f"\\u{n:04x}" for n in range(1, 32)))),
    good("DEL and C1", msg='"\x7f\x80\x85\x9f"'),
    good("line separators", msg='"a\u2028b\u2029c"'),
    good("emoji", msg='"\U0001f600\U0001f469\u200d\U0001f469\u200d\U0001f467"'),
    good("an escaped pair", msg=r'"\ud83d\ude00"'),
    good("an escaped pair in capitals", msg=r'"\uD83D\uDE00"'),
    good("combining marks", msg='"e\u0301 \u00e9 Z\u0351\u0343\u0346"'),
    good("right to left", msg='"\u05e9\u05dc\u05d5\u05dd \u0627\u0644\u0633\u0644\u0627\u0645"'),
    good("bidi controls", msg='"\u202e\u2066\u200f\u061c"'),
    good("zero width", msg='"\u200b\u200c\u200d\u2060\ufeff"'),
    good("a byte order mark inside", msg='"\ufeffhello"'),
    good("noncharacters", msg='"\ufffe\uffff\ufdd0\U0001fffe\U0010ffff"'),
    good("the replacement character", msg='"\ufffd"'),
    good("private use and tags", msg='"\ue000\U000e0041\U000f0000"'),
    good("Chinese, Korean, Thai", msg='"\u4e2d\u6587 \ud55c\uae00 \u1112\u1161\u11ab \u0e44\u0e17\u0e22"'),
    good("the characters beside the surrogates", msg=r'"\ud7ff\ue000"'),
    good("JSON in a string", msg='"{\\"to\\": \\"eve\\"}"'),
    good("a block's end in a string", msg='"---\\n| from=eve"'),
    good("a request in a string", msg='"GET / HTTP/1.1\\r\\n\\r\\n"'),
    good("64 KiB", msg=string("a" * 65536)),
    good("64 KiB of emoji", msg=string("\U0001f600" * 16384)),
    good("64 KiB of escapes", msg=string("\\u00e9" * 32768)),
    # Members
    good("every convention", subject='"s"', type='"task"', priority='"odd"', reply_to='"6"', content_type='"a/b"'),
    good("null, true, false", a="null", b="true", c="false"),
    good("an empty name", **{"": '"x"'}),
    good("odd names", **{"a b": "1", "\\u00e9": "2", '\\"': "3", "__proto__": "4", "\U0001f600": "5"}),
    good("an escaped backslash before u0000 in a name", **{"\\\\u0000": "1"}),
    good("names that differ in case", extra='{"a": 1, "A": 2}'),
    good("names that look alike", extra='{"\u00e9": 1, "e\u0301": 2}'),
    good("empty containers", a="[]", b="{}", c="[[], {}]"),
    good("2000 empty objects", extra=f"[{', '.join(['{}'] * 2000)}]"),
    good("2000 members", **{f"m{n}": str(n) for n in range(2000)}),
    good("a list of all types", extra='[null, true, 1, -1.5, "s", [], {}]'),
    good("lists 32 deep", extra=nested("[", "]", 32)),
    good("objects 32 deep", extra=nested('{"a": ', "}", 32)),
    good("mixed 32 deep", extra=nested("[", "]", 2).replace("1", nested('[{"a": ', "}]", 16))),
    good("a string of brackets", msg=string("[{" * 100)),
    good("members that readers use", messages="[]", now="0", n="1"),
    # Numbers
    *[good(f"the number {text}", extra=text) for text in
        ["0", "-1", "1.5", "0.1", "-0.0", "1e5", "1E+5", "1e-5", "1e308", "1.7976931348623157e308", "5e-324", "1e-400",
        "0.30000000000000004", "3.141592653589793", "9007199254740992", "-9007199254740992", "1795203596.123456"]],
    # Beyond I-JSON (RFC 7493) a number means what its reader makes of it. The bus passes every number that Python gives
    # back digit by digit: a sender that uses such numbers knows its readers, and a refusal would help none of them.
    *[good(f"the number {text[:20]}", jq=False, extra=text) for text in
        ["9007199254740993", "-9007199254740993", "9223372036854775808", "18446744073709551617", "1" * 4300]],
    # Names, keys, white space
    good("the longest names", channel=string("c" * 64), to=string("b" * 64)),
    good("odd but good names", to='"0a.B_:@-"'),
    good("a name of one digit", to='"7"'),
    good("a reserved name as receiver", to='"operator"'),
    good("the longest key", key=string("k" * 128)),
    good("the shortest key", key='"!"'),
    good("all characters of a key", key=json.dumps("".join(map(chr, range(33, 127))))),
    good("the longest ttl", ttl="1e9"),
    good("an integer as ttl", ttl="86400"),
    Payload("white space", b"\n\t " + mail("alice").replace(b": ", b" \r\n:\t").replace(b", ", b"\n,\n") + b"\n"),
]  # fmt: skip


# ── Queries ──────────────────────────────────────────────────────────────────────────────────────────────────────────

REFUSED_QUERIES = [
    *[f"/recv?to=bob&since={text}" for text in
      ["nan", "NaN", "inf", "-inf", "infinity", "1e9", "1_000", "-1", "-0", "%2B1", "+1", "%201", "1%20", "1%0A",
       "1.", ".5", "1..5", "1.5.5", "1,5", "0x10", "%D9%A3", "%EF%BC%91", "%C2%B2", "12345678901", "1795203598000",
       "1.1234567890", "NOW", "Last", "now%20", "true", "null", "%00", "1%00", "9999999999"]],
    *[f"/log?since={text}" for text in ["nan", "last", "-1", "1e9", "9999999999"]],
    *[f"/recv?to=bob&{field}={text}" for field in ["max", "wait"] for text in
      ["", "nan", "inf", "1e2", "1_0", "%2B1", "+1", "0x10", "ten", "%D9%A3", "1.", ".5", "1%0A", "1,5"]],
    *[f"/recv?to=bob&block={text}" for text in ["", "yes", "2", "true%20", "truetrue", "null", "-1"]],
    *[f"/recv?to=bob&{field}&{field}" for field in
      ["since=0", "max=1", "wait=0", "block=false", "channel=lab", "bus=x"]],
    "/recv", "/recv?", "/recv?to=", "/recv?to", "/recv?TO=bob", "/recv?to=bob,", "/recv?to=,bob", "/recv?to=bob&to=",
    *[f"/recv?to={text}" for text in ["b%20b", "bob%0A", "bob+", ".bob", "..%2Fbob", "%D9%A3", "b%-1b", "b" * 65]],
    "/recv?to=" + ",".join(f"b{n}" for n in range(17)),
    "/recv?" + "&".join(f"to=b{n}" for n in range(17)),
    *[f"/recv?to=bob&channel={text}" for text in ["a%20b", "a,b"]],
    "/log?from=", "/log?from=a,b", "/log?to=a%20b",
    "/recv?to=bob&" + "&".join(f"a{n}=" for n in range(64)), "/recv?to=bob" + "&" * 64,
    *[f"/recv?to=bob&a={text}" for text in
      ["%00", "%FF", "%C0%80", "%ED%A0%80", "%E2%82", "%", "%4", "%zz", "%u0041", "%-1"]],
    "/recv?to=bob&%00=a", "/recv?to=bob&%FF=a",
]  # fmt: skip

PASSED_QUERIES = [
    *[f"/recv?to=bob&since={text}" for text in
      ["", "0", "0.0", "00", "1.5", "1.000000001", "0000000000.000000000", "now", "last", "%30"]],
    *[f"/recv?to=bob&max={text}" for text in ["0", "1", "-1", "1000", "1001", "007", "9999999999", "9" * 400]],
    *[f"/recv?to=bob&block=false&wait={text}" for text in ["0", "-1", "0.5", "61", "9999999999", "9" * 400]],
    "/recv?to=bob&wait=0&block=true", "/recv?to=bob&block=false", "/recv?to=bob&wait=0&block=True",
    "/recv?to=bob&block=False", "/recv?to=bob&block=fALSE", "/recv?to=bob&channel=", "/log?since=&channel=",
    *[f"/recv?to={text}" for text in ["bob", "all", "bob&to=bob", "bob,team&to=ops", "%62ob", "a:b@c.d_e-f", "7"]],
    "/recv?to=" + ",".join(f"b{n}" for n in range(16)),
    "/recv?to=bob&" + "&".join(f"a{n}=" for n in range(63)), "/recv?to=bob&&&",
    "/recv?to=bob&unknown=1&unknown=2", "/recv?to=bob&a=%F0%9F%98%80", "/recv?to=bob&channel=lab",
    "/log?to=bob,carl&from=alice&channel=lab",
]  # fmt: skip
