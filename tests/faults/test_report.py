"""The command judges: what missed its bar, what was not found out and what broke off fails; skipped is not passed."""
import json
import types

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


@pytest.fixture
def report(tmp_path, monkeypatch):
    """A report of one row, which is run again and again."""

    def run(**row):
        monkeypatch.setattr(__main__, "ROWS", [Row(name="fate", fault="fate", bar="none", full=7, **row)])
        return __main__.main(["fate"])

    file = tmp_path / "report.md"
    monkeypatch.setattr(__main__, "REPORT", file)
    monkeypatch.setattr(__main__, "KEPT", tmp_path / "kept.json")
    return types.SimpleNamespace(run=run, text=file.read_text)


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
def test_a_row_is_judged_and_reported(report, row, code, said):
    assert report.run(**row) == code
    assert said in report.text()


@pytest.mark.parametrize(
    ("runs", "agree", "cell"),
    [
        ([{"run": good}], 0, "| — |"),
        ([{"run": good}] * 2, 1, "| passed: 7 times; "),
        ([{"run": bad}, {"run": good}], 0, "| FAILED: 7 times; **2 lost**; "),
        ([{"run": good}, {"run": bad}], 0, "| passed: 7 times; "),
        ([{"run": bad}, {"run": good}, {"run": good}], 1, "| passed: 7 times; "),
        ([{"run": good, "control": Control("forgets", bad)}] * 2, 1, "| passed: 7 times; "),
        ([{"run": good, "control": Control("forgets", good)}, {"run": good}], 0, "| FAILED: 7 times; "),
        ([{"run": good, "needs": (absent,)}, {"run": good}], 0, "| skipped: its tool is not installed; "),
    ],
    ids=["one", "two", "failed-then", "failed-now", "long-ago", "found-out", "not-found-out", "skipped"],
)
def test_the_run_before_stands_beside_the_last_and_both_must_have_passed_to_agree(report, runs, agree, cell):
    for row in runs:
        report.run(**row)
    assert f"two runs in a row agree in {agree} of 1 rows" in report.text()
    last = report.text().splitlines()[-1]
    assert cell in last[last.index("load"):], "behind when the last one was"


def test_what_is_kept_is_what_the_report_says():
    """Each row has one outcome or two, and all that are kept are shown."""
    kept = json.loads(__main__.KEPT.read_text())
    assert all(len(runs) in (1, 2) and len(run) == 5 for runs in kept.values() for run in runs)
    shown = __main__.REPORT.read_text()
    for verdict, result, _, _, when in [run for runs in kept.values() for run in runs]:
        result = result.replace("\n", " ")
        assert f"{verdict}: {result}" in shown and when.partition(", load")[0] in shown


def test_a_row_of_another_size_is_not_reported_and_an_unknown_name_is_an_error(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(__main__, "ROWS", [Row("fate", "fate", "none", good, 7)])
    monkeypatch.setattr(__main__, "REPORT", tmp_path / "report.md")
    assert __main__.main(["fate=3"]) == 0 and "3 times" in capsys.readouterr().out
    assert __main__.main(["luck"]) == 2 and "there are fate" in capsys.readouterr().out
    assert not (tmp_path / "report.md").exists()
