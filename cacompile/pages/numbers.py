"""Numbers as the reports of a run write them."""

from __future__ import annotations

import math


def percent(share: float) -> str:
    return "–" if math.isnan(share) else f"{100 * share:.1f}%"


def amount(number: float) -> str:
    """With a decimal prefix: 50.7 G."""
    for prefix in ("", "k", "M", "G", "T", "P"):
        if float(f"{number:.3g}") < 1000.0:
            return f"{number:.3g} {prefix}".strip()
        number /= 1000.0
    return f"{number:.3g} E"


def scientific(number: float) -> str:
    return "–" if math.isnan(number) else f"{number:.2g}"


def power(number: float) -> str:
    """Of ten, the nearest: 10⁻³."""
    return "10" + str(round(math.log10(number))).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def duration(seconds: float) -> str:
    if not seconds:
        return "0"
    if seconds < 1.0:
        return f"{1000 * seconds:.3g} ms"
    if seconds < 100.0:
        return f"{seconds:.3g} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 100 else f"{minutes / 60:.1f} h"


def count(number: int, noun: str, many: str = "") -> str:
    return f"{number:,} {noun if number == 1 else many or noun + 's'}"
