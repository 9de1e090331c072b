"""The command judges: what missed its bar, what was not found out and what broke off fails; skipped is not passed."""
import pytest

from tests.faults import Result, __main__
from tests.faults.rows import Control, Row


def good(place, size=1):
    return Result(f"{size} times", [])


def bad(place, size=1):
    return Result(f"{size} times", ["keeper: lost: one", "the log: lost: another"])


def broken(place, size=1):
    raise AssertionError("waited for a fact that never came true")


def absent():
    return "its tool is not installed"


@pytest.mark.parametrize(
    ("row", "code", "said"),
    [
        ({"run": good}, 0, "| passed: 7 times | — |"),
        ({"run": good, "control": Control("forgets", bad)}, 0, "| passed: 7 times | forgets: found out (2 lost) |"),
        ({"run": bad}, 1, "| FAILED: 7 times; **2 lost** | — |"),
        ({"run": broken}, 1, "| FAILED: it broke off; **1 broke off** | — |"),
        ({"run": good, "control": Control("forgets", good)}, 1, "forgets: NOT found out"),
        ({"run": good, "control": Control("forgets", broken)}, 1, "forgets: NOT found out"),
        ({"run": broken, "needs": (absent,)}, 0, "| skipped: its tool is not installed | — |"),
    ],
    ids=["good", "found-out", "bad", "broken", "not-found-out", "control-broken", "skipped"],
)
def test_a_row_is_judged_and_reported(tmp_path, monkeypatch, row, code, said):
    monkeypatch.setattr(__main__, "ROWS", [Row(name="fate", fault="fate", bar="none", full=7, **row)])
    monkeypatch.setattr(__main__, "REPORT", tmp_path / "report.md")
    monkeypatch.setattr(__main__, "KEPT", tmp_path / "kept.json")
    assert __main__.main(["fate"]) == code
    assert said in (tmp_path / "report.md").read_text()


def test_a_row_of_another_size_is_not_reported_and_a_name_that_is_none_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(__main__, "ROWS", [Row("fate", "fate", "none", good, 7)])
    monkeypatch.setattr(__main__, "REPORT", tmp_path / "report.md")
    assert __main__.main(["fate=3"]) == 0 and "3 times" in capsys.readouterr().out
    assert __main__.main(["luck"]) == 2 and "there are fate" in capsys.readouterr().out
    assert not (tmp_path / "report.md").exists()
