"""The picture as SVG, and as a page of its own around it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from . import flow
from .boxes import FONTS, Text, width_of
from .layout import COLOURS, MARGIN, WIDTH, place
from .neighbourhood import Sketch
from .picture import families_of, picture_of, slice_text
from .run_text import percent, scientific

if TYPE_CHECKING:
    from .explain import Explanation

KINDS = ("neurons", "heads", "filters", "experts", "tokens", "outputs", "rows")
_SWATCH = 20.0


def svg(found: Explanation) -> str:
    """Nothing outside it is needed to show it."""
    picture = picture_of(found)
    used = {cluster.kind for cluster in picture.clusters}
    legend = _legend([kind for kind in KINDS if kind in used], bool(picture.lines))
    drawing = place(picture, top=legend[-1][1].y)
    return render(
        "picture.svg.jinja",
        found=found,
        drawing=drawing,
        legend=legend,
        fonts=FONTS,
        kinds=KINDS,
        colours=range(COLOURS),
        width=max(drawing.width, *(text.x + text.width + MARGIN for _, text in legend)),
    )


class Svg(str):
    """A picture, as text; a notebook shows it."""

    __slots__ = ()

    def _repr_svg_(self) -> str:
        return str(self)


def sketched(sketch: Sketch) -> str:
    """The neighbourhood of a parameter; nothing outside it is needed to show it."""
    return render("flow.svg.jinja", flow=flow.place(sketch), title=sketch.title, fonts=FONTS)


def html(found: Explanation) -> str:
    """One page: the figures, the picture, and tables of all families and parameters."""
    return render("page.html.jinja", found=found, svg=svg(found), families=families_of(found), slice_text=slice_text)


def _legend(kinds: Iterable[str], lines: bool) -> list[tuple[str, Text]]:
    """(class of the mark before it, text), the first a heading without a mark."""
    marks = [(f"kind-{kind}", f"groups of {kind}") for kind in kinds]
    marks += [("dense", "dashed: always computed"), ("cut", "bold: cut into groups")]
    if lines:
        marks.append(("line", "line: an axis that dimensions share"))
    legend = [("", Text(MARGIN, MARGIN + 12, "Weights that are kept or skipped together", "head"))]
    x, y = MARGIN, MARGIN + 38
    for mark, text in marks:
        if x > MARGIN and x + _SWATCH + width_of(text, "fact") > WIDTH:
            x, y = MARGIN, y + 18
        legend.append((mark, Text(x + _SWATCH, y, text, "fact")))
        x += _SWATCH + width_of(text, "fact") + 18
    return legend


def render(template: str, **values: Any) -> str:
    """One of our templates, filled in; text is escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined  # here, so that training does without

    loader = PackageLoader("cacompile.report")
    jinja = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    jinja.filters["kind_class"] = lambda kind: f"kind-{kind}" if kind in KINDS else "kind-none"
    jinja.filters.update(percent=percent, scientific=scientific)
    return jinja.get_template(template).render(**values)
