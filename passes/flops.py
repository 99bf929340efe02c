"""FLOPs of a product: a number with the sizes seen when compiling, which remembers its formula in symbolic sizes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, SupportsIndex

from cacompile.layout import Monomial
from cacompile.torch_internals import expression_of

from .nodes import hint


class Flops(int):
    """Two FLOPs a multiply-add. Sums, multiples and whole shares keep the formula, an int or a sympy expression."""

    formula: Any

    def __new__(cls, value: int, formula: Any = None) -> Flops:
        made = super().__new__(cls, value)
        made.formula = int(made) if formula is None else formula
        return made

    @classmethod
    def of(cls, sizes: Iterable[Any]) -> Flops:
        """Twice the product of these sizes, symbolic ones among them."""
        sizes = list(sizes)
        formula = math.prod((_expression(size) for size in sizes), start=2)
        return cls(2 * math.prod(map(hint, sizes)), formula)

    @classmethod
    def of_count(cls, count: Any) -> Flops:
        """A count that was computed of sizes, symbolic ones among them."""
        return cls(hint(count), _expression(count))

    def __add__(self, other: int) -> Flops:
        return Flops(int(self) + int(other), self.formula + _formula(other))

    __radd__ = __add__

    def __mul__(self, times: SupportsIndex) -> Flops:
        return Flops(int(self) * int(times), self.formula * int(times))

    __rmul__ = __mul__

    def __floordiv__(self, parts: int) -> Flops:
        """A share; `parts` divides every coefficient, being a size of the result."""
        if isinstance(self.formula, int):
            return Flops(int(self) // parts)
        return Flops(int(self) // parts, self.formula / parts)


def split(counts: Sequence[int]) -> tuple[tuple[Monomial, ...], list[tuple[int, ...]]]:
    """Monomials in symbolic sizes, and for each count its integer coefficients: count = sum(coefficient * monomial).

    A count that is no polynomial with whole coefficients is taken as the number it was when compiling.
    """
    terms = [_terms(count) for count in counts]
    monomials = list(dict.fromkeys(monomial for each in terms for monomial in each)) or [Monomial("1", ())]
    return tuple(monomials), [tuple(each.get(monomial, 0) for monomial in monomials) for each in terms]


def at_sizes(count: int, sizes: Mapping[Monomial, float]) -> int:
    """A count with other sizes than when compiling. sizes: of the graph's monomials; as it is where one is missing."""
    terms = _terms(count)
    if not all(monomial in sizes for monomial in terms):
        return int(count)
    return round(sum(coefficient * sizes[monomial] for monomial, coefficient in terms.items()))


def _terms(count: int) -> dict[Monomial, int]:
    formula = _formula(count)
    if isinstance(formula, int) or formula.is_number:
        return {Monomial("1", ()): int(count)}
    import sympy  # only for symbolic sizes

    found = {}
    polynomial = sympy.Poly(sympy.expand(formula))
    for powers, coefficient in polynomial.terms():
        if not coefficient.is_Integer:
            return {Monomial("1", ()): int(count)}
        atoms = [str(atom) for atom, power in zip(polynomial.gens, powers) for _ in range(power)]
        text = str(sympy.prod(atom**power for atom, power in zip(polynomial.gens, powers)))
        found[Monomial(text, tuple(sorted(atoms)))] = int(coefficient)
    return found


def _formula(count: int) -> Any:
    return count.formula if isinstance(count, Flops) else int(count)


def _expression(size: Any) -> Any:
    if isinstance(size, int):
        return size
    expression = expression_of(size)
    return int(expression) if expression.is_number else expression
