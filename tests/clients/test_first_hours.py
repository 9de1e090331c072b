"""What people meet in their first hours: hints to paste, ends of programs, faults of their own files and terminals."""
import os
import re

import pytest

from tests.clients.test_clients import refusing, run
from tests.kit.processes import ROOT

pytestmark = pytest.mark.usefixtures("home")


@pytest.mark.parametrize("call", [
    "bus_send.py bob hi --timeout 0", "bus_recv.py bob --timeout 0", "tools/agent_bus.py who", "tools/bus_who.py",
    "tools/agent_bus.py inbox bob", "tools/bus_lock.py unlock a", "tools/agent_bus.py unlock a", "tools/bus_work.py -h",
])  # fmt: skip
def test_a_hint_works_when_it_is_pasted_from_any_folder(call, bus, tmp_path):
    run("bus_send.py", "bob", "hi", env={"AGENT_BUS_URL": bus.url, "AGENT_NAME": "ann"})
    script, *arguments = call.split()
    url = bus.url if "lock" in call or "inbox" in call else refusing()
    *_, out, err = run(str(ROOT / script), *arguments, cwd=tmp_path, env={"AGENT_BUS_URL": url, "AGENT_NAME": "ann"})
    hints = re.findall(r"(\S+ )?(\S*\w\.py)\b(?! \[)", re.sub(r"(?m)^\S+\.py .*?:", "", out + err))
    assert hints
    for before, path in hints:
        assert before == "python3 " and os.path.exists(tmp_path / path), (path, out, err)
