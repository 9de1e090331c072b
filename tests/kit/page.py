"""The page for people in a real Chromium: how a test opens it, and what stands on the bus.

The tests need Debian's chromium-headless-shell, or chromium, and the package playwright (extra `page`).
`python -m tests.extensions.page_pictures FOLDER` writes pictures of what they cannot judge.
"""
import contextlib
import importlib.util
import shutil

import pytest

from tests.core.test_identity import ask
from tests.kit.processes import PATIENCE

# The shell draws the same with half the time of a CPU.
BROWSERS = ["chromium-headless-shell", "chromium", "chromium-browser", "google-chrome"]
CHROMIUM = next(filter(None, map(shutil.which, BROWSERS)), None)
IN_CHROMIUM = pytest.mark.skipif(
    not (CHROMIUM and importlib.util.find_spec("playwright")), reason="needs chromium and the extra `page`"
)

MS = PATIENCE * 1000
DESK = {"width": 1360, "height": 860}
WATCH = """addEventListener("securitypolicyviolation", event => (window.violations ??= []).push(event.blockedURI));
window.shift = 0;
new PerformanceObserver(list => list.getEntries().forEach(each => window.shift += each.hadRecentInput ? 0 : each.value))
  .observe({type: "layout-shift", buffered: true});"""
# What a browser does with a tab that another one covers. Without a screen, all of them count as seen.
COVERED = """Object.defineProperty(document, "hidden", { get: () => true });
document.dispatchEvent(new Event("visibilitychange"));"""
FAMILY = "\U0001f468\u200d\U0001f469\u200d\U0001f467"
HOSTILE = [  # each is sent as text, as subject and in further members
    "<img src=x onerror='window.pwned=1'>",
    "<script>window.pwned=1</script>",
    "<svg onload='window.pwned=1'>",
    "<a href='javascript:window.pwned=1'>x</a>",
    "javascript:window.pwned=1",
    "<iframe srcdoc='<script>parent.pwned=1</script>'></iframe>",
    "{{constructor.constructor('window.pwned=1')()}}",
    "</textarea><script>window.pwned=1</script>",
    "```\n<script>window.pwned=1</script>\n```",
    "<style>*{display:none}</style>",
    "<meta http-equiv=refresh content='0;url=http://evil.example'>",
    "http://evil.example/?a=b",
    "\x1b[31mred\x1b[0m",
    "\u202egnp.exe",
    "a\u200bb",
    "\U000e0041\U000e0042",
    "\ufeffx",
    "Z" + "\u0301" * 60,
    "x" * (250 << 10),
    "\u2066\u2067",
    "\r\rover",
    "<img srcset='http://evil.example/x 1x'>",
    "<object data='http://evil.example/x'></object>",
    "<embed src='http://evil.example/x'>",
    "<form action='http://evil.example/'><button>Send</button></form>",
    "<base href='http://evil.example/'>",
    "<link rel=stylesheet href='http://evil.example/x.css'>",
    "<video src=x onerror='window.pwned=1'></video>",
    "<details open ontoggle='window.pwned=1'>",
    "<math><mtext><img src=x onerror='window.pwned=1'></mtext></math>",
    "<noscript><p title=\"</noscript><img src=x onerror='window.pwned=1'>\">",
    "<template><script>window.pwned=1</script></template>",
    "data:text/html,<script>parent.pwned=1</script>",
    "&lt;script&gt;window.pwned=1&lt;/script&gt;",
    "${alert(1)} `${window.pwned=1}`",
    "\x1b]8;;http://evil.example\x1b\\link\x1b]8;;\x1b\\",
    "\x9b31mred",
    "in\u034fvisible",
    "<button autofocus onfocus='window.pwned=1'>x</button>",
    FAMILY,
]


# The page looks again, and tries again, after 0.3 s and not after some seconds. What it waits for stays as it is.
HURRIED = """const later = window.setTimeout;
window.setTimeout = (act, ms, ...others) => later(act, ms > 300 && ms <= 30000 ? 300 : ms, ...others);"""


@contextlib.contextmanager
def place_for_tabs(browser):
    """What tabs share, as those of a person do: a cache, cookies, and what pages keep for longer than a tab."""
    context = browser.new_context(viewport=DESK)
    context.set_default_timeout(MS)
    context.add_init_script(WATCH)
    yield context
    context.close()


@contextlib.contextmanager
def tab(context):
    """A tab, which fails the test on an error of its scripts."""
    page = context.new_page()
    page.errors = []
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.on("dialog", lambda dialog: page.errors.append(dialog.message))
    yield page
    page.close()
    assert not page.errors


@contextlib.contextmanager
def opened(browser):
    """A tab that shares nothing with another one."""
    with place_for_tabs(browser) as context, tab(context) as page:
        yield page


def fill(bus):
    for name in ("dell", "planner", "spark"):
        bus.get(f"/recv?to={name}&since=0")
    for number in range(12):
        send(bus, "planner", "dell", f"number {number}", subject="p95" if number % 4 == 0 else None)
        send(bus, "dell", "planner", "the tests are green")
    question = send(bus, "oncall", "planner", "Which application is it?")
    send(bus, "planner", "oncall", "svc-report", reply_to=question["id"])
    send(bus, "dell", "archivist", "store this")
    send(bus, "planner", ["spark", "dell"], "still quiet?")
    send(bus, "nano", "builds", "make bench")
    job = ask(bus, "POST", "/claim", {"to": "builds", "worker": "w"})[1]["messages"][0]
    assert ask(bus, "POST", "/nack", {"id": job["id"], "lease": job["lease"], "reason": "exit 137"})[0] == 200
    for number, text in enumerate(HOSTILE):  # of four senders: 20 of one in a minute would be one row
        odd = {"__proto__": text[:40], "constructor": {"a": [text[:40]]}}
        send(bus, f"mallory-{number % 4}", "spark", text, subject=text[:40], **odd)


def send(bus, sender, to, text, token=None, **members):
    message = {"from": sender, "to": to, "msg": text, **{name: value for name, value in members.items() if value}}
    status, answer = ask(bus, "POST", "/send", message, token)
    assert status == 200, answer
    return answer


def show(page, bus, path="#/"):
    """The page at a view, once the bus has answered."""
    page.goto(f"{bus.url}/ui/{path}")
    page.wait_for_selector("#live.good")
    return page


# To another view of the page that is open, until that is drawn; and messages beside it, one after the other.
GO = """async ([path, patience]) => {
    const end = Date.now() + patience, main = document.getElementById("main"), before = main.firstElementChild;
    if (location.hash === path) return;
    location.hash = path;
    while (main.firstElementChild === before) {
        if (Date.now() > end) throw new Error(`${path} is not drawn`);
        await new Promise(done => setTimeout(done, 5));
    }
}"""
OPEN = """async ([ids, patience]) => {
    const end = Date.now() + patience, found = [], all = what => [...document.querySelectorAll(`#panel ${what}`)];
    for (const id of ids) {
        location.hash = `${location.hash.split("?")[0]}?id=${id}`;
        while (!all("dd").some(dd => dd.textContent === id)) {
            if (Date.now() > end) throw new Error(`${id} is not drawn`);
            await new Promise(done => setTimeout(done, 5));
        }
        found.push([all(".body")[0].textContent, all("dt").map(dt => dt.textContent)]);
    }
    return found;
}"""


def go_to(page, path):
    """As who follows a link: nothing is loaded anew. Its path must be another one than that of the view before."""
    page.evaluate(GO, [path, MS])


def opened_beside(page, ids):
    """Of each of these messages, opened beside the view: its text, and the names of its members."""
    return page.evaluate(OPEN, [ids, MS])


def texts(page, selector=".message-row"):
    return page.locator(selector).all_inner_texts()


def opens_a_message(page):
    page.keyboard.press("j")
    page.keyboard.press("Enter")
    page.wait_for_selector("#panel .body")
