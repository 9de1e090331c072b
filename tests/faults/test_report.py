"""The command judges: what missed its bar, what was not found out and what broke off fails; skipped is not passed.

And the second table of the report: each kind of fault has tests that there are, and a control.
"""
import ast
import functools
import json
import types

import pytest

from tests.faults import Result, __main__
from tests.faults.kinds import KINDS, table_of_kinds
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
    [last] = [line for line in report.text().splitlines() if line.startswith("| fate |")]
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


# Kinds of fault


@functools.cache
def functions(file):
    tree = ast.parse((__main__.ROOT / "tests" / file).read_text())
    return {each.name for each in ast.walk(tree) if isinstance(each, ast.FunctionDef)}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.kind)
def test_each_kind_of_fault_has_tests_and_a_control(kind):
    assert kind.holds and kind.control and 1 <= len(kind.tests) <= 4
    for test in kind.tests:
        file, _, name = test.partition("::")
        assert name in functions(file), test


def test_each_test_of_the_kinds_is_named_once():
    named = [test for kind in KINDS for test in kind.tests]
    assert len(named) == len(set(named)) and len({kind.kind for kind in KINDS}) == len(KINDS)


def test_the_report_ends_with_the_table_of_kinds():
    assert __main__.REPORT.read_text().endswith(table_of_kinds()), "python -m tests.faults kinds writes it anew"


def test_a_row_that_is_run_alone_keeps_the_table_of_kinds(report):
    report.run(run=good)
    assert report.text().count(table_of_kinds()) == 1 and report.text().endswith(table_of_kinds())


def test_the_table_of_kinds_is_written_alone_and_the_rows_stay(report, monkeypatch):
    report.run(run=good)
    before = report.text()
    monkeypatch.setattr(__main__, "table_of_kinds", lambda: "## Kinds of fault\n\nanother one\n")
    assert __main__.main(["kinds"]) == 0
    assert report.text() == before.replace(table_of_kinds(), "## Kinds of fault\n\nanother one\n")
