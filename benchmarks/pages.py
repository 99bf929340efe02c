"""The tables of docs/ that are made of rows in results/.

python -m benchmarks.pages       # writes them anew, in a second; the sentences beside them are for a person
"""

from __future__ import annotations

import argparse
import csv
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import groupby, product
from pathlib import Path
from typing import NamedTuple

from benchmarks.lib.rows import RESULTS, ROOT
from benchmarks.lib.tables import markdown_table

DOCS = ROOT / "docs"


class Task(NamedTuple):
    """A section of quality.md."""

    title: str
    arms: dict[str, dict[str, str]]
    """Title of an arm -> its row."""
    time: str
    """Of convaware over dense's on a clock, and what FLOPs promise; empty where they did not take turns."""
    made: str
    """From which day to which the rows were made."""


def read_tasks(file: Path = RESULTS / "quality.md") -> list[Task]:
    found = []
    for section in file.read_text(encoding="utf-8").split("\n## ")[1:]:
        title, _, rest = section.partition("\n")
        lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in rest.splitlines() if line[:1] == "|"]
        heads, _, *rows = lines
        arms = {row[0]: dict(zip(heads, row, strict=True)) for row in rows}
        time = re.search(r"Time of convaware .*?: (.+)\.$", rest, re.M)
        (made,) = re.findall(r"^Rows of (\S+) to (\S+);", rest, re.M)
        dates = made[0] if made[0] == made[1] else f"{made[0]} to {made[1]}"
        found.append(Task(title, arms, time[1] if time else "", dates))
    return found


OURS, DENSE = "convaware, default options", "dense Inductor"
TOLERANT = "convaware, tolerance=0.2: four times the default"
CONTROLS = (
    "random groups, convaware's share in each step", "random groups frozen once, convaware's share in all", TOLERANT,
)  # fmt: skip
WORTH = "frontier / own, FLOPs"


def quality_table() -> str:
    """A row for each task that convaware was run on."""
    heads = ("task", "seeds", "dW skipped", "FLOPs / dense", "test loss: dense", "convaware",
             "**FLOPs of the dense run as good / own** (95 %)", "full dense run's", "random groups", "frozen groups",
             "four times the tolerance", "peers", "made")  # fmt: skip
    rows = []
    for task in read_tasks():
        if OURS not in task.arms:
            continue
        ours, dense = task.arms[OURS], task.arms[DENSE]
        peers = [f"{name}: {row[WORTH]}" for name, row in task.arms.items()
                 if row[WORTH] and name not in (OURS, *CONTROLS) and not name.startswith(DENSE)]  # fmt: skip
        worth = f"**{ours[WORTH]}**" + (f" ({ours['95 %']})" if ours["95 %"] else "")
        losses = (row["quality"].removeprefix("-") for row in (dense, ours))
        controls = (task.arms.get(name, {}).get(WORTH, "") for name in (DENSE, *CONTROLS))
        rows.append((task.title, ours["seeds"], ours["dW skipped"], ours["FLOPs / dense"], *losses, worth,
                     *controls, ", ".join(peers), task.made))  # fmt: skip
    return markdown_table(heads, rows)


def clock_table() -> str:
    rows = [(task.title, *_time(task.time)) for task in read_tasks() if task.time]
    return markdown_table(("task", "seconds / Inductor's, measured", "FLOPs / dense, counted"), rows)


def _time(text: str) -> tuple[str, str]:
    measured, _, promised = text.partition("; FLOPs promise ")
    return measured, promised.removesuffix(" (counted)")


def read_rows(name: str) -> list[dict[str, str]]:
    with open(RESULTS / name, newline="", encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


def spread(row: Mapping[str, str], digits: int = 3) -> str:
    """Median and quartiles of a row of results."""
    median, *quartiles = (f"{float(row[name]):.{digits}f}" for name in ("median", "lower_quartile", "upper_quartile"))
    return f"{median} [{', '.join(quartiles)}]"


STEP_ARMS = {
    "dense": "nothing (dense version)",
    "keep 0.75": "25 %",
    "keep 0.5": "50 %",
    "keep 0.25": "75 %",
    "keep 0": "100 %",
    "turns 2": "every group in every second step, in the controller's turns",
    "turns 4": "every group in every fourth step, in the controller's turns",
    "oracle": "static oracle: these weights frozen before compiling",
}


def step_table(file: str = "step_time_cpu.csv") -> str:
    rows = {(row["arm"], row["measure"], row["unit"]): row for row in read_rows(file)}
    measures = ("forward and backward", "whole step")
    kept = ("seconds saved / FLOPs saved", "seconds saved / the oracle's in proportion")
    lines = []
    for arm, title in STEP_ARMS.items():
        saved = float(rows[arm, "whole step", "share of a step's FLOPs saved"]["median"])
        times = (spread(rows[arm, measure, "ratio to inductor"]) for measure in measures)
        shares = (f"{float(rows[arm, 'whole step', unit]['median']):.2f}" if saved else "" for unit in kept)
        lines.append((title, *times, f"{saved:.1%}" if saved else "", *shares))
    heads = *(f"{measure} / Inductor" for measure in measures), "step's FLOPs saved (counted)", *kept
    return markdown_table(("dW skipped", *heads), lines)


def overhead_table() -> str:
    rows = [(row["case"], spread(row, 1)) for row in read_rows("overhead_cpu.csv")
            if row["measure"] == "host time a call over the library's"]  # fmt: skip
    return markdown_table(("operation", "host time over the library call's, microseconds"), rows)


def host_table() -> str:
    """Of this checkout's arms: what a step of many tiny layers takes beyond plain aot_eager's."""
    rows = [row for row in read_rows("host_time_cpu.csv") if row["unit"] == "us" and "(this" in row["arm"]]
    lines = []
    for arm, each in groupby(rows, lambda row: row["arm"].partition(" (")[0]):
        added = {row["measure"]: spread(row, 0) for row in each if row["measure"].endswith(", added")}
        lines.append((arm, *added.values()))
    heads = [measure.removesuffix(", added") for measure in added]
    return markdown_table(("groups", *(f"{head}, added, microseconds" for head in heads)), lines)


START_ARMS = {"inductor": "Inductor", "convaware": "convaware", "convaware aside": '`switch="when compiled"`'}


def start_table() -> str:
    """Of each kind of start: to the end of the first backward, and what the first masked backward adds to a step."""
    rows = {(row["case"].partition(" ")[0], row["arm"], row["measure"], row["unit"]): row
            for row in read_rows("startup_cpu.csv")}  # fmt: skip
    lines = []
    for kind, arm in product(dict.fromkeys(kind for kind, *_ in rows), START_ARMS):
        switch = rows.get((kind, arm, "switch", "s"))
        ratio = spread(rows[kind, arm, "start", "ratio to inductor's start"]) if arm != "inductor" else ""
        lines.append((kind, START_ARMS[arm], spread(rows[kind, arm, "start", "s"], 2), ratio,
                      spread(switch, 2) if switch else ""))  # fmt: skip
    heads = ("start", "backend", "first forward and backward, s", "over Inductor's", "first skipping adds, s")
    return markdown_table(heads, lines)


def alive_table() -> str:
    """What is alive of graphs, by start and state, of Inductor and of this checkout; and of an earlier one if known."""
    lines = []
    for (case, arm), each in groupby(
        sorted(read_rows("alive_cpu.csv"), key=lambda row: (row["case"], "before" in row["arm"], row["arm"])),
        lambda row: (row["case"], row["arm"]),
    ):
        found = {row["measure"]: float(row["median"]) for row in each}
        start, _, state = case.partition(",")
        counts = (f"{found[name]:,.0f}" for name in ("objects", "graphs", "nodes of graphs", "fake tensors"))
        lines.append((start.partition(" ")[0], state.rpartition(", ")[2], arm, f"{found['bytes'] / 1e6:.2f}", *counts))
    heads = ("start", "after", "backend", "Python's bytes, MB", "objects", "graphs", "nodes of graphs", "fake tensors")
    return markdown_table(heads, lines)


CUTS = {"0.25": "a quarter", "0.5": "half", "0.75": "three quarters"}
CUT_GOAL = 1.03


def cut_table() -> str:
    """Of each model and cut; a median beyond the goal in bold."""
    rows = {(row["case"], row["arm"], row["measure"], row["unit"]): row for row in read_rows("truncated_cpu.csv")}
    lines = []

    def over(unit: str, case: str, cut: str, measure: str) -> str:
        row = rows[case, f"frozen {cut}", measure, f"ratio to {unit}"]
        bold = "**" * (unit != "dense" and float(row["median"]) > CUT_GOAL)
        return f"{bold}{spread(row)}{bold}"

    for case, cut in product(dict.fromkeys(case for case, *_ in rows), CUTS):
        oracle = f"oracle {cut}"
        measures = ("forward", "forward and backward", "whole step")
        saved = (f"{float(rows[case, arm, 'saved by the forward', 'MiB']['median']):.2f}"
                 for arm in (f"frozen {cut}", oracle, "dense"))  # fmt: skip
        ratios = (over(oracle, case, cut, measure) for measure in measures)
        lines.append((case, CUTS[cut], *ratios, over("dense", case, cut, "whole step"), " / ".join(saved)))
    heads = ("model", "frozen", "forward / oracle", "forward and backward / oracle", "whole step / oracle",
             "whole step / dense Inductor", "saved activations, MiB: frozen / oracle / dense")  # fmt: skip
    return markdown_table(heads, lines)


FLIPPING_ARMS = {
    "freeze": "`session.freeze`, by a schedule",
    "flip, compiled": "setting `requires_grad`, Inductor",
    "drop gradients": "dropping gradients, Inductor",
    "flip, eager": "LISA by hand, no compiler",
}


def flipping_table() -> str:
    rows = {(row["arm"], row["measure"]): row for row in read_rows("flipping_cpu.csv")}
    later, setting = "later 100 steps", "setting what is frozen in later 100 steps"

    def median(arm: str, measure: str) -> float:
        return float(rows[arm, measure]["median"])

    lines = [
        (title, f"{median(arm, 'first 100 steps'):.1f}", spread(rows[arm, later]),
         f"{median(arm, later) / median('freeze', later):.3f}", spread(rows[arm, setting], 1),
         f"{median(arm, 'graphs traced by Dynamo'):.0f}")
        for arm, title in FLIPPING_ARMS.items()
    ]  # fmt: skip
    heads = (
        "",
        "first 100 steps, s",
        f"{later}, s",
        "over freeze",
        "of it setting what is frozen, ms",
        "graphs traced",
    )
    return markdown_table(heads, lines)


def zoo_table() -> str:
    notes = {row["model"]: row for row in read_rows("zoo_notes.csv")}
    rows = [
        (row["model"], row["source"], _yes(row["trains"]), _yes(row["grads_equal"]), f"{float(row['coverage']):.1%}",
         f"{float(row['semantic']):.1%}", row["graph_breaks"], row["compile_ratio"], notes[row["model"]]["date"])
        for row in sorted(read_rows("zoo.csv"), key=lambda row: (row["source"], row["model"]))
    ]  # fmt: skip
    heads = ("model", "from", "trains", "gradients as Inductor's", "dW FLOPs masked",
             "of those in groups with a meaning", "graph breaks", "compiling / Inductor's", "made")  # fmt: skip
    return markdown_table(heads, rows)


def _yes(value: str) -> str:
    return "yes" if value == "True" else "no"


def fine_tuning_table() -> str:
    rows = read_rows("fine_tuning_cpu.csv")
    lines = []
    for way, each in groupby(rows, lambda row: row["arm"]):
        by_measure = {(row["measure"], row["unit"].partition(" ")[0]): row for row in each}
        dw = by_measure.get(("dW", "share"))
        lines.append((
            way,
            spread(by_measure["step", "ratio"]),
            f"{float(by_measure['FLOPs of a step', 'ratio']['median']):.3f}",
            f"{float(dw['median']):.1%}" if dw else "",
            f"{float(by_measure['saved by the forward', 'MiB']['median']):.2f}",
        ))  # fmt: skip
    heads = ("way", "step / Inductor's with all weights, measured", "FLOPs / those, counted",
             "dW, of its own step's FLOPs", "saved activations, MiB")  # fmt: skip
    return markdown_table(heads, lines)


TABLES: dict[str, dict[str, Callable[[], str]]] = {
    "fine-tuning.md": {"ways": fine_tuning_table},
    "freezing.md": {"cuts": cut_table, "flipping": flipping_table},
    "performance.md": {
        "step": step_table,
        "MiniLM step": partial(step_table, "step_time_minilm_cpu.csv"),
        "operations": overhead_table,
        "host": host_table,
        "start": start_table,
        "alive": alive_table,
    },
    "results.md": {"quality": quality_table, "clock": clock_table},
    "zoo.md": {"models": zoo_table},
}
"""Page -> name of a table in it -> what makes it."""


def marks(name: str) -> tuple[str, str]:
    return f"<!-- {name}: written by benchmarks.pages -->\n\n", f"\n\n<!-- end of {name} -->"


def pages() -> Iterator[tuple[Path, str, str]]:
    """(page, its text now, its text with the tables that the results make)."""
    for page, tables in TABLES.items():
        text = now = (DOCS / page).read_text(encoding="utf-8")
        for name, table in tables.items():
            begin, end = marks(name)
            before, _, rest = text.partition(begin)
            text = before + begin + table() + end + rest.partition(end)[2]
        yield DOCS / page, now, text


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args(argv)
    for page, now, anew in pages():
        page.write_text(anew, encoding="utf-8")
        print(f"{page.relative_to(ROOT)}: {'as it was' if now == anew else 'written'}")


if __name__ == "__main__":
    main()
