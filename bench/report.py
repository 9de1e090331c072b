"""docs/performance.md and its plot, made from the rounds in .bench/rounds.json, which git ignores."""
from __future__ import annotations

import json
import statistics
import sys
from typing import Any

from bench import machine, peers
from bench.figures import Claim, Figure, Result, shown
from bench.session import ROWS, Settings

DOCUMENT = machine.ROOT / "docs" / "performance.md"
DATA = machine.ROOT / ".bench" / "rounds.json"  # every round of every row measured here; large, so not in git
PLOT = machine.ROOT / "docs" / "performance.svg"
BEGIN, END = "<!-- written by make bench -->", "<!-- end of what make bench wrote -->"
QUIET = 5  # % of the CPUs that others may take, the kernel's own threads included
BUSY = 0.9  # of a CPU; a generator that took so much may have been the limit


def sentence(name: str) -> str:
    text = name.replace("_", " ")
    return text[0].upper() + text[1:]


def table(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def lines(result: Result) -> str:
    """A row as Markdown: its contenders, what was claimed and came of it, what to know."""
    beside = list(dict.fromkeys(what for figure in result.figures for what in figure.beside))
    heads = ["", "median", "min..max", *beside]
    rows = [[figure.contender, value(figure), spread(figure.rounds), *(cell(figure, what) for what in beside)]
            for figure in result.figures]
    parts = [table(heads, rows)]
    if result.claims:
        parts.append(table(["claim", "median", "min..max", "first bar", "goal", ""], list(map(claimed, result.claims))))
    parts += [f"- {note}" for note in result.notes]
    if any(limited(figure) for figure in result.figures):
        parts.append(f"- ≥: the generator took over {BUSY:.0%} of a CPU and may have been the limit.")
    return "\n\n".join(parts[:2]) + ("\n\n" + "\n".join(parts[2:]) if parts[2:] else "")


def value(figure: Figure) -> str:
    return ("≥ " if limited(figure) else "") + shown(figure.median, figure.unit)


def limited(figure: Figure) -> bool:
    return statistics.median(figure.beside.get("generator CPU", [0])) > BUSY


def spread(rounds: list[float]) -> str:
    return f"{shown(min(rounds))}..{shown(max(rounds))}"


def cell(figure: Figure, what: str) -> str:
    rounds = figure.beside.get(what)
    if not rounds:
        return ""
    middle = statistics.median(rounds)
    return f"{middle:.0%}" if what.endswith("CPU") else shown(middle)


def claimed(claim: Claim) -> list[str]:
    relation = "≥" if claim.at_least else "≤"
    bars = ["" if bar is None else f"{relation} {shown(bar, claim.unit)}" for bar in (claim.first, claim.goal)]
    return [claim.about, shown(claim.median, claim.unit), spread(claim.rounds), *bars, f"**{claim.verdict}**"]


# What is kept


def save(name: str, result: Result, moment: dict[str, str], settings: Settings) -> None:
    """Put the row into the data, and rebuild the document and the plot, unless they would lose a row."""
    kept: dict[str, Any] = json.loads(DATA.read_text()) if DATA.exists() else {"rows": {}}
    kept["machine"] = machine.description(settings.folder.parent)
    kept["versions"] = peers.versions(list(settings.pythons))
    kept["rows"][name] = {
        "measured": moment, "rounds": settings.rounds, "seconds": settings.seconds,
        "figures": [figure._asdict() for figure in result.figures],
        "claims": [claim._asdict() for claim in result.claims], "notes": result.notes,
    }
    kept["rows"] = {known: kept["rows"][known] for known in ROWS if known in kept["rows"]}
    DATA.parent.mkdir(exist_ok=True)
    DATA.write_text(json.dumps(kept, indent=1) + "\n")
    page = DOCUMENT.read_text()
    lost = [sentence(known) for known in ROWS if known not in kept["rows"] and f"## {sentence(known)}\n" in page]
    if lost:
        print(f"{DOCUMENT.name} stays as it is: {DATA} has no rounds of {len(lost)} rows that are in it. Measure them "
              f"here too ({'; '.join(lost)}).", file=sys.stderr)
        return
    draw(results(kept))
    write(document(kept))


def results(kept: dict[str, Any]) -> dict[str, Result]:
    return {
        name: Result([Figure(**figure) for figure in row["figures"]], [Claim(**claim) for claim in row["claims"]],
                     row["notes"])
        for name, row in kept["rows"].items()
    }


def write(text: str) -> None:
    """Between the two marks; what stands around them is written by hand."""
    page = DOCUMENT.read_text()
    before, rest = page.split(BEGIN)
    after = rest.split(END)[1]
    DOCUMENT.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")


def document(kept: dict[str, Any]) -> str:
    found = results(kept)
    parts = ["## The goals", summary(found), "![sends per second, waking, memory](performance.svg)", "## The machine",
             table(["", ""], [[what, text] for what, text in {**kept["machine"], **kept["versions"]}.items()])]
    for name, result in found.items():
        row = kept["rows"][name]
        measured = row["measured"]
        quiet = "" if int(measured["others"].rstrip("%")) <= QUIET else " **The machine was not quiet.**"
        parts += [f"## {sentence(name)}", f"First bar: {ROWS[name].first}. Goal: {ROWS[name].goal}.", lines(result),
                  f"{row['rounds']} rounds of {row['seconds']:g} s, {measured['date']}, commit {measured['commit']}, "
                  f"other processes took {measured['others']} of the CPUs.{quiet}"]
    return "\n\n".join(parts)


def summary(found: dict[str, Result]) -> str:
    rows = []
    for name, result in found.items():
        for claim in result.claims:
            rows.append([sentence(name), *claimed(claim)])
    missing = [sentence(name) for name in ROWS if name not in found]
    text = table(["row", "claim", "median", "min..max", "first bar", "goal", ""], rows)
    return text + ("\n\nNot measured yet: " + "; ".join(missing) + "." if missing else "")


# The plot

SENDS = {
    "1": "one_sender_is_as_fast_as_the_disk",
    "16": "sixteen_senders_are_as_fast_as_redis",
    "128": "a_hundred_and_twenty_eight_senders_are_as_fast_as_redis",
}
WAKING, MEMORY = "a_parked_reader_is_woken_at_once", "a_parked_reader_takes_little_memory"


def draw(found: dict[str, Result]) -> None:
    """Sends, waking and memory of every contender, each in its own colour, with the spread of the rounds."""
    from matplotlib import pyplot

    pyplot.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "agent-bus"})  # the same figures, the same file
    plot, axes = pyplot.subplots(3, figsize=(9, 12), layout="constrained", height_ratios=(3, 1, 1))
    groups = {label: found[name].figures for label, name in SENDS.items() if name in found}
    bars(axes[0], groups, "messages/s, one in each request, by connections (logarithmic)")
    axes[0].set_yscale("log")
    if groups:
        plot.legend(loc="outside upper center", fontsize="small", ncols=3)
    ranks(axes[1], found.get(WAKING), "ms from a send until a parked reader has it, p99 (logarithmic)")
    axes[1].set_xscale("log")
    ranks(axes[2], found.get(MEMORY), "KB for each parked reader")
    plot.savefig(PLOT, metadata={"Date": None})
    pyplot.close(plot)


def errors(figures: list[Figure]) -> list[list[float]]:
    """From the median down to the least round, and up to the greatest."""
    return [[figure.median - min(figure.rounds) for figure in figures],
            [max(figure.rounds) - figure.median for figure in figures]]


def bars(axes: Any, groups: dict[str, list[Figure]], label: str) -> None:
    contenders = list(dict.fromkeys(figure.contender for figures in groups.values() for figure in figures))
    width = 0.9 / max(1, len(contenders))
    for number, contender in enumerate(contenders):
        here = [(place, figure) for place, figures in enumerate(groups.values()) for figure in figures
                if figure.contender == contender]
        places = [place + (number + 0.5) * width - 0.45 for place, _ in here]
        figures = [figure for _, figure in here]
        axes.bar(places, [figure.median for figure in figures], width, yerr=errors(figures), label=contender, capsize=2)
    axes.set_xticks(range(len(groups)), list(groups))
    axes.set_ylabel(label)


def ranks(axes: Any, result: Result | None, label: str) -> None:
    figures = result.figures[::-1] if result else []
    axes.barh([figure.contender for figure in figures], [figure.median for figure in figures], xerr=errors(figures),
              capsize=2)
    axes.set_xlabel(label)
