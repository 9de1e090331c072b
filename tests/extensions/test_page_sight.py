"""The page in a real Chromium, for people who cannot see it or only little of it.

With axe-core in ~/.cache/agent-bus-page/node_modules each view and state is judged on a desk and on a phone.
"""
import pathlib

import pytest

from tests.kit.page import IN_CHROMIUM, go_to, opens_a_message, show

pytestmark = IN_CHROMIUM
AXE = pathlib.Path.home() / ".cache/agent-bus-page/node_modules/axe-core/axe.min.js"


def loses_the_bus(page, bus):
    page.route("**/log?*", lambda route: route.abort())
    page.reload()
    page.wait_for_selector("#banner:has-text('out of reach')")


def many_polled(page, bus):
    """More than has a row each: there is a field of cells."""
    for number in range(20):
        bus.get(f"/recv?to=agent-{number}&since=0")
    page.reload()
    page.wait_for_selector(".cell")


STATES = {  # bus: {name: (where, and what a person does there)}; the first one is loaded, the others are gone to
    "busy": {
        "now": ("#/", None),
        "messages": ("#/messages", None),
        "conversation": ("#/messages/planner/dell", None),
        "one message": ("#/messages", lambda page, bus: opens_a_message(page)),
        "agents": ("#/agents", None),
        "deaf agent": ("#/agents/archivist", None),
        "work": ("#/work", None),
        "mail": ("#/mail", None),
        "say": ("#/", lambda page, bus: page.keyboard.press("c")),
        "keys": ("#/", lambda page, bus: page.keyboard.press("?")),
        "out of reach": ("#/", loses_the_bus),
    },
    "noted": {"a place": ("#/more/notes", None), "a place with fields": ("#/more/seek", None)},
    "near": {"empty": ("#/", None), "many agents": ("#/", many_polled)},
    "closed": {"token": (None, None)},
}


@pytest.mark.skipif(not AXE.exists(), reason="axe-core is not installed in ~/.cache/agent-bus-page")
@pytest.mark.parametrize("name", STATES)
def test_people_who_see_little_can_use_it(request, page, name):
    bus = request.getfixturevalue(name)
    for state, (where, act) in STATES[name].items():
        if where is None:
            page.goto(f"{bus.url}/ui/")
            page.wait_for_selector("main > *")
        else:
            show(page, bus, where) if page.url == "about:blank" else go_to(page, where)
            page.wait_for_function("() => document.querySelector('main').innerText.length > 40")
        if act:
            page.wait_for_selector("main > *")
            act(page, bus)
        assert page.evaluate("window.violations ?? []") == [], (state, "of the Content-Security-Policy")
        judge(page, state, "dialog" if page.locator("dialog[open]").count() else "html")  # all else is covered by it
        for part in ("dialog", "#panel"):  # the next state begins without what was opened in this one
            page.keyboard.press("Escape")
            page.wait_for_selector(part, state="hidden")


def judge(page, state, part):
    if not page.evaluate("Boolean(window.axe)"):
        page.evaluate(AXE.read_text())
    # Of the rules only one knows of colours, and most is in sight where there is room.
    for width, scheme, rules in ((390, "light", None), (1360, "light", None), (1360, "dark", ["color-contrast"])):
        page.set_viewport_size({"width": width, "height": 860})
        page.emulate_media(color_scheme=scheme)
        page.evaluate("new Promise(requestAnimationFrame)")  # a page hears of its new size with its next frame
        assert violations(page, part, rules) == [], (state, width, scheme)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, (state, scheme)


def violations(page, part, rules):
    options = {"resultTypes": ["violations"], **({"runOnly": rules} if rules else {})}
    found = page.evaluate("([part, options]) => axe.run(part, options)", [part, options])["violations"]
    return [(each["id"], node["target"], node.get("failureSummary")) for each in found for node in each["nodes"]]
