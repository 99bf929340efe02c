"""What a run found, for reading: Markdown tables and two plots beside the rows."""

from __future__ import annotations

from pathlib import Path

from benchmarks.gpu.rows import Rows
from benchmarks.lib.tables import markdown_table
from benchmarks.lib.timing import Spread

CHECK, KERNELS, MODELS = "gpu check", "gpu kernels", "gpu models"


def check_table(rows: Rows) -> str:
    """Kernel by kernel: how many cases, the worst relative error."""
    errors = rows.find(CHECK, "relative error", "share")
    lines = []
    for kernel in dict.fromkeys(arm for _, arm in errors):
        mine = [spread.median for (_, arm), spread in errors.items() if arm == kernel]
        lines.append((kernel, len(mine), f"{max(mine):.1e}"))
    return markdown_table(("kernel", "cases that pass", "worst relative error"), lines)


def _arm(arm: str) -> tuple[str, float]:
    """("tiles", 0.5) of "tiles 0.5"."""
    way, _, share = arm.partition(" ")
    return way, float(share or 1)


def kernel_table(rows: Rows, way: str) -> str:
    """One line a shape; for every density the time over the ideal: density times the library's time."""
    times, rates = rows.find(KERNELS, "time", "ms"), rows.find(KERNELS, "rate", "TFLOP/s")
    over, ratio = rows.find(KERNELS, "time", "over ideal"), rows.find(KERNELS, "time", "ratio to library")
    lines = []
    for case in dict.fromkeys(case for case, _ in times):
        mine = {share: arm for c, arm in times if c == case for w, share in [_arm(arm)] if w == way}
        cells = [f"{times[case, 'library'].median:.3f}", f"{rates[case, 'library'].median:.0f}"]
        for low, high in ((0.99, 1.1), (0.6, 0.99), (0.4, 0.6), (0.2, 0.4), (0.01, 0.2)):
            arm = next((arm for share, arm in mine.items() if low <= share < high), None)
            cells.append("" if arm is None else f"{over[case, arm].median:.2f} ({rates[case, arm].median:.0f})")
        cells.append(f"{ratio[case, mine[0.0]].median:.3f}" if 0.0 in mine else "")
        lines.append((case, *cells))
    heads = ("dW", "library, ms", "TFLOP/s", "all on", "about 3/4", "about 1/2", "about 1/4", "about 1/10", "all off")
    return markdown_table(heads, lines)


def model_table(rows: Rows) -> str:
    """One line a model and arm."""
    milliseconds = rows.find(MODELS, "whole step", "ms")
    columns = (("forward and backward", "inductor"), ("whole step", "inductor"), ("forward and backward", "oracle"))
    found = [rows.find(MODELS, measure, f"ratio to {base}") for measure, base in columns]
    skipped = rows.find(MODELS, "dW FLOPs skipped", "share")
    lines = []
    for key, spread in milliseconds.items():
        share = f"{skipped[key].median:.0%}" if key in skipped else ""
        lines.append((*key, share, f"{spread.median:.2f}", *(str(each[key]) if key in each else "" for each in found)))
    heads = ("model", "arm", "dW skipped", "step, ms", *(f"{measure} / {base}" for measure, base in columns))
    return markdown_table(heads, lines)


def write_markdown(rows: Rows, file: Path) -> str:
    """All tables, and everything that failed or was not run; returns the text."""
    stamp = ", ".join(
        f"{name} {rows.stamp[name]}" for name in ("date", "commit", "torch", "python") if rows.stamp[name]
    )
    missing = [(benchmark, *note) for benchmark in (CHECK, KERNELS, MODELS) for note in rows.notes(benchmark)]
    parts = (
        f"# {rows.stamp['device']}: masked kernels and step times",
        f"{stamp}. Medians of interleaved rounds; ratios round by round, median [quartiles]. Written by `make gpu`.",
        "## Correct",
        check_table(rows),
        "## Kernels\n\nTime over the ideal, which is the share of blocks that are on times the library's time for all"
        " of dW, and in brackets TFLOP/s of what is on; all off: time over the library's. bfloat16, caches flushed.",
        "### Flags read on the device: the Triton kernel alone\n\n" + kernel_table(rows, "tiles"),
        "### Flags seen by the host: library or kernel, as measured on this device\n\n" + kernel_table(rows, "host"),
        "## Whole models\n\nThe oracle has every weight of a linear layer or convolution frozen before compiling:"
        " compare it with keep 0. Its optimizer steps fewer weights, so forward and backward is the fair column.",
        model_table(rows),
        "## Failed, or not run\n",
        markdown_table(("part", "what", "case", "arm", "why"), missing) if missing else "Nothing.",
    )
    text = "\n\n".join(parts) + "\n"
    file.write_text(text)
    return text


def draw(rows: Rows, stem: Path) -> None:
    """`<stem>_kernels.png`: time against density. `<stem>_models.png`: step times against Inductor."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    ratio = rows.find(KERNELS, "time", "ratio to library")
    if ratio:
        figure, both = pyplot.subplots(1, 2, figsize=(13, 5.5), sharey=True)
        for axes, way in zip(both, ("tiles", "host")):
            for case in dict.fromkeys(case for case, _ in ratio):
                points = {_arm(arm)[1]: s.median for (c, arm), s in ratio.items() if c == case and _arm(arm)[0] == way}
                axes.plot(*zip(*sorted(points.items())), marker=".", linewidth=1, label=case)
            axes.plot((0, 1), (0, 1), "k--", linewidth=1, label="ideal")
            axes.set(xlabel="share of blocks on", title={"tiles": "flags on the device", "host": "host chooses"}[way])
            axes.set(ylim=(0, 2))
            axes.grid(alpha=0.3)
        both[0].set_ylabel("time / library's for all of dW")
        both[1].legend(fontsize=5, loc="center left", bbox_to_anchor=(1.0, 0.5))
        figure.savefig(f"{stem}_kernels.png", dpi=130, bbox_inches="tight")
        pyplot.close(figure)
    steps = rows.find(MODELS, "whole step", "ratio to inductor")
    if steps:
        _draw_models(steps, Path(f"{stem}_models.png"))


def _draw_models(steps: dict[tuple[str, str], Spread], file: Path) -> None:
    from matplotlib import pyplot

    cases, arms = (list(dict.fromkeys(key[i] for key in steps)) for i in (0, 1))
    figure, axes = pyplot.subplots(figsize=(11, 0.6 + 0.9 * len(cases)))
    height = 0.8 / len(arms)
    for i, arm in enumerate(arms):
        places = [n for n, case in enumerate(cases) if (case, arm) in steps]
        spreads = [steps[cases[n], arm] for n in places]
        errors = [[s.median - s.lower for s in spreads], [s.upper - s.median for s in spreads]]
        axes.barh([n + i * height for n in places], [s.median for s in spreads], height, xerr=errors, label=arm)
    axes.axvline(1.0, color="k", linewidth=1)
    axes.set_yticks([n + 0.4 for n in range(len(cases))], cases, fontsize=7)
    axes.set(xlabel="whole step / dense Inductor's", xlim=(0.5, None))
    axes.invert_yaxis()
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(file, dpi=130, bbox_inches="tight")
    pyplot.close(figure)
