"""`agent-bus install service`: a bus that starts at login."""
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest

from tests.clients.test_install_claude import asked, install, tree
from tests.kit.processes import PATIENCE, ROOT
from tools import bus_install

pytestmark = pytest.mark.usefixtures("home")


def test_install_service_starts_the_bus_and_uninstall_leaves_every_byte_as_it_was(house, tmp_path):
    was = tree(house)
    database = tmp_path / "a $strange% \"name\"" / "bus.db"
    install("install", "service", "--port", "0", "--db", str(database))
    unit = house / ".config" / "systemd" / "user" / "agent-bus.service"
    assert asked(house) == ["systemctl --user daemon-reload", "systemctl --user enable --now agent-bus"]
    if shutil.which("systemd-analyze"):
        done = subprocess.run(["systemd-analyze", "--user", "verify", str(unit)], capture_output=True, text=True)
        assert "agent-bus.service" not in done.stderr, done.stderr
    (line,) = re.findall("^ExecStart=(.*)$", unit.read_text(), re.MULTILINE)
    assert "a $$strange%% " in line  # as systemd wants them
    command = shlex.split(line.replace("%%", "%").replace("$$", "$"))
    assert command[2:] == ["serve", "--port", "0", "--db", str(database)]
    process = subprocess.Popen(command, cwd="/", stdout=subprocess.PIPE)
    assert process.stdout.readline().startswith(b"listening on ")
    process.terminate()
    assert process.wait(PATIENCE) == 0
    process.stdout.close()
    install("uninstall", "service")
    assert asked(house)[2:] == ["systemctl --user disable --now agent-bus", "systemctl --user daemon-reload"]
    assert tree(house) == was
    assert "nothing is changed" in install("uninstall", "service", code=1)


def test_install_service_says_what_it_wrote_and_how_to_start_stop_and_watch_it(house):
    unit = f"{house}/.config/systemd/user/agent-bus.service"
    said = install("install", "service").splitlines()
    assert said[0] == f"wrote {unit}: with it, the bus starts when you log in"
    for command in ("status", "stop", "start"):
        assert any(f"systemctl --user {command} agent-bus" in line for line in said[1:])
    assert "its log: journalctl --user -u agent-bus -f" in said
    assert said[-1] == f"to take it away: python3 {ROOT}/tools/agent_bus.py uninstall service"
    assert install("uninstall", "service").startswith(f"removed {unit}, and stopped the bus")


def test_a_service_has_the_database_of_now(house, tmp_path):
    install("install", "service", XDG_STATE_HOME=str(tmp_path / "elsewhere"))
    unit = (house / ".config" / "systemd" / "user" / "agent-bus.service").read_text()
    assert f"Environment=XDG_STATE_HOME={tmp_path}/elsewhere\n" in unit


def test_a_service_runs_in_another_folder_so_its_paths_are_absolute(house):
    given = "--db data/bus.db --tls-cert=cert.pem --tls-k key.pem --listen unix:run/bus --allow-host data/bus.db"
    given += " --notify rules.json --files 1g --files-dir=files"
    install("install", "service", *given.split(), XDG_STATE_HOME="state$HOME %h")
    unit = (house / ".config" / "systemd" / "user" / "agent-bus.service").read_text()
    here, (line,) = os.getcwd(), re.findall("^ExecStart=(.*)$", unit, re.MULTILINE)
    of_tls = f"--tls-cert={here}/cert.pem --tls-k {here}/key.pem"
    others = f"--notify {here}/rules.json --files 1g --files-dir={here}/files"
    assert line.endswith(
        f" serve --db {here}/data/bus.db {of_tls} --listen unix:{here}/run/bus --allow-host data/bus.db {others}"
    )
    assert f'Environment="XDG_STATE_HOME={here}/state$HOME %%h"\n' in unit  # $ has no meaning there


def test_a_service_with_a_wrong_option_is_not_written(house):
    was = tree(house)
    assert "--prot" in install("install", "service", "--prot", "1", code=2)
    assert tree(house) == was


def test_a_unit_of_somebody_else_stays(house):
    unit = house / ".config" / "systemd" / "user" / "agent-bus.service"
    unit.parent.mkdir(parents=True)
    unit.write_text("[Service]\n")
    for command in ("install", "uninstall"):
        assert "not written by agent-bus" in install(command, "service", code=1)
    assert unit.read_text() == "[Service]\n"


def test_without_systemd_the_user_gets_the_line_to_run(house):
    said = "echo 'Created symlink' >&2\necho 'Failed to connect to bus' >&2\nexit 1\n"
    (house.parent / "bin" / "systemctl").write_text(f"#!/bin/sh\n{said}")
    line = "run it yourself: systemctl --user enable --now agent-bus (Failed to connect to bus: that bus is D-Bus, "
    said = install("install", "service", code=1)
    assert line in said and "the bus does not run yet" in said and "the bus runs now" not in said
    assert said.endswith(f"without a manager of services: python3 {ROOT}/bus_server.py\n")
    assert install("install", "service", "--port", "9000", code=1).endswith("bus_server.py --port 9000\n")
    was = tree(house)
    said = install("uninstall", "service")
    assert was and not tree(house) and "it still does" in said and "stopped the bus" not in said


def test_a_dry_run_shows_the_unit_and_writes_nothing(house):
    was, unit = tree(house), f"{house}/.config/systemd/user/agent-bus.service"
    said = install("install", "service", "--dry-run", "--port", "8081")
    assert f"+++ {unit}\n" in said and re.search(r"^\+ExecStart=.* serve --port 8081$", said, re.MULTILINE)
    assert tree(house) == was and not (house.parent / "asked").exists()
    assert "--prot" in install("install", "service", "--dry-run", "--prot", "1", code=2)
    install("install", "service")
    written, steps = tree(house), asked(house)
    assert "-[Service]\n" in install("uninstall", "service", "--dry-run")
    assert tree(house) == written and asked(house) == steps


def test_on_macos_launchd_gets_the_file(house, monkeypatch, capsys):
    """Only what we write and ask: nobody has tried it with launchd."""
    import plistlib

    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(sys, "argv", ["tools/agent_bus.py install"])
    was = tree(house)
    assert bus_install.main(["install", "service", "--port", "9000"]) == 0
    file = house / "Library" / "LaunchAgents" / "agent-bus.plist"
    job = plistlib.loads(file.read_bytes())
    assert job["ProgramArguments"][1:] == [str(ROOT / "tools" / "agent_bus.py"), "serve", "--port", "9000"]
    assert bus_install.main(["uninstall", "service"]) == 0
    assert asked(house) == [f"launchctl load -w {file}", f"launchctl unload -w {file}"] and tree(house) == was
