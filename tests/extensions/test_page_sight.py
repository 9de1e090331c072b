"""The page in a real Chromium, for people who cannot see it or only little of it.

With axe-core in ~/.cache/agent-bus-page/node_modules each view and state is judged on a desk and on a phone.
"""
import pathlib

import pytest

from tests.kit.page import IN_CHROMIUM, opens_a_message, show

pytestmark = IN_CHROMIUM
AXE = pathlib.Path.home() / ".cache/agent-bus-page/node_modules/axe-core/axe.min.js"


def loses_the_bus(page):
    page.route("**/log?*", lambda route: route.abort())
    page.reload()
    page.wait_for_selector("#banner:has-text('out of reach')")


STATES = {  # name: (the bus, where, and what a person does there)
    "now": ("busy", "#/", None),
    "messages": ("busy", "#/messages", None),
    "conversation": ("busy", "#/messages/planner/dell", None),
    "one message": ("busy", "#/messages", opens_a_message),
    "agents": ("busy", "#/agents", None),
    "deaf agent": ("busy", "#/agents/archivist", None),
    "work": ("busy", "#/work", None),
    "mail": ("busy", "#/mail", None),
    "say": ("busy", "#/", lambda page: page.keyboard.press("c")),
    "keys": ("busy", "#/", lambda page: page.keyboard.press("?")),
    "a place": ("noted", "#/more/notes", None),
    "a place with fields": ("noted", "#/more/seek", None),
    "300 agents": ("crowd", "#/", None),
    "empty": ("bus", "#/", None),
    "token": ("closed", None, None),
    "out of reach": ("busy", None, loses_the_bus),
}


@pytest.mark.skipif(not AXE.exists(), reason="axe-core is not installed in ~/.cache/agent-bus-page")
@pytest.mark.parametrize("state", STATES)
def test_people_who_see_little_can_use_it(request, page, state):
    name, where, act = STATES[state]
    bus = request.getfixturevalue(name)
    if where is None:
        page.goto(f"{bus.url}/ui/")
        page.wait_for_selector("main > *")
    else:
        show(page, bus, where)
        page.wait_for_function("() => document.querySelector('main').innerText.length > 40")
    if act:
        page.wait_for_selector("main > *")
        act(page)
    assert page.evaluate("window.violations ?? []") == [], "of the Content-Security-Policy"
    page.evaluate(AXE.read_text())
    for width in (390, 1360):
        page.set_viewport_size({"width": width, "height": 860})
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            page.evaluate("new Promise(requestAnimationFrame)")  # a page hears of its new size with its next frame
            # Of the rules only this one knows of colours. They are enough for the second scheme.
            rules = ["color-contrast"] if scheme == "dark" else None
            assert violations(page, rules) == [], (width, scheme)
            assert page.evaluate("document.documentElement.scrollWidth") <= width, scheme


def violations(page, rules=None):
    options = {"resultTypes": ["violations"], **({"runOnly": rules} if rules else {})}
    found = page.evaluate("options => axe.run(document, options)", options)["violations"]
    return [(each["id"], node["target"], node.get("failureSummary")) for each in found for node in each["nodes"]]
