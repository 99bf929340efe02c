"""The controller of parameters that other ranks hold copies of: it decides nothing itself."""

from __future__ import annotations

from torch.optim import Optimizer

from .controller import Controller


class Shared(Controller):
    """Fills what all ranks have skipped of parameters that other ranks hold copies of; an Agreement does the rest."""

    def look(self) -> None:
        pass

    def advance(self, optimizer: Optimizer | None) -> None:
        pass

    def fill(self, optimizer: Optimizer, *, traced: bool = True) -> None:
        # it follows from the mask: the gradient is the mean of all ranks', whatever has run on this one
        self.table.skipped[self.rows] = ~self.table.agreed[self.rows]
        super().fill(optimizer, traced=traced)
