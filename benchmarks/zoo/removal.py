"""Zeros in a group's slices against its unit taken out by hooks, over the zoo.

    python -m benchmarks.zoo.removal                     # all models, to benchmarks/results/zoo_removal.csv
    python -m benchmarks.zoo.removal --models gpt2 bert

The first and the last group of each family of neurons, heads, filters and experts; a row for each model and kind:

    checked   groups that were compared
    exact     of those, equal to the model without the unit, and other than the model with it
    heard     of those, read by modules of which it is known what they read
    silent    of those, zeros for their readers once what makes them is zero, and nothing else changed for them; not so
              the channels of a state space layer, which make each other's step sizes, nor heads that share their values
    apart     not comparable, with a reason: such as a unit that no module's input or output shows
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import pandas as pd
import torch
from tabulate import tabulate

import cacompile
from benchmarks.lib.rows import RESULTS
from benchmarks.zoo.models import ZOO, MissingLibrary
from benchmarks.zoo.units import check_units

OPTIONS = {"block_rows": 32}


def rows_of(name: str) -> list[dict[str, object]]:
    torch._dynamo.reset()
    case = ZOO[name][1]()
    for param in case.model.parameters():
        if not param.any():  # such as the last norm of a residual branch, behind which nothing could be seen
            torch.nn.init.normal_(param, std=0.3)
    explanation = cacompile.explain(case.model, *case.args, options=OPTIONS, **case.kwargs)
    return [
        {
            "model": name,
            "kind": kind,
            **{count: getattr(found, count) for count in ("checked", "exact", "heard", "silent")},
            "apart": len(found.apart),
            "note": "; ".join([*found.wrong, *dict.fromkeys(found.apart.values())])[:200],
        }
        for kind, found in check_units(case.model, case.args, case.kwargs, explanation.groups).items()
    ]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(ZOO), default=list(ZOO))
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args(argv)
    warnings.filterwarnings("ignore")
    found: list[dict[str, object]] = []
    for name in arguments.models:
        try:
            found += rows_of(name)
        except MissingLibrary as missing:
            print(f"{name}: {missing}")
            continue
        arguments.out.mkdir(parents=True, exist_ok=True)
        pd.DataFrame(found).to_csv(arguments.out / "zoo_removal.csv", index=False)
    print(tabulate(found, headers="keys"))


if __name__ == "__main__":
    main()
