"""The mark of a planned product, which the partitioner carries from the joint graph into the backward."""

from __future__ import annotations

from dataclasses import dataclass, replace

MARK = "convaware"
"""Key in `node.meta` under which a planned product carries its Mark."""


@dataclass(frozen=True, slots=True)
class Mark:
    """What a product needs to know to become its masked replacement."""

    param: str
    first_flags: tuple[int, ...]
    """For each dimension of the product's result, its first block among the flags."""
    blocks: tuple[int, ...]
    """For each dimension, entries a block; 0 where it is not masked."""
    shared: tuple[int, ...] = ()
    """Where it flows into gradients by several ways: of which parameters, by position among Dynamo's inputs."""

    @property
    def only(self) -> tuple[int, int, int]:
        """(first_flag, block, dimension) of the one dimension that is masked."""
        [dim] = (dim for dim, block in enumerate(self.blocks) if block)
        return self.first_flags[dim], self.blocks[dim], dim

    @property
    def transposed(self) -> Mark:
        """For the transposed product of each expert."""
        (experts, rows, columns), (e, m, n) = self.first_flags, self.blocks
        return replace(self, first_flags=(experts, columns, rows), blocks=(e, n, m))

    def arguments(self) -> tuple[list[int], list[int]]:
        """first_flags and blocks, as an operation takes them."""
        return list(self.first_flags), list(self.blocks)
