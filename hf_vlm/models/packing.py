"""Packing: samples of several lengths in one sequence, without padding."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """Groups of samples packed into one sequence (1, all tokens, dim), the samples of each group of one length.

    Crops of two sizes pass through each layer at once: whatever treats tokens one by one sees one large matrix, only
    attention is computed group by group. No token is padding.

    Args:
        groups: (samples, tokens of each sample) of the groups, in their order.
    """

    groups: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, groups: Sequence[Tensor]) -> "Packing":
        """The packing of groups (samples, tokens, dim)."""
        return cls(tuple((group.shape[0], group.shape[1]) for group in groups))

    def pack(self, groups: Sequence[Tensor]) -> Tensor:
        """Joins the groups' tokens (samples, tokens, dim) to (1, all tokens, dim)."""
        return torch.cat([group.flatten(0, 1) for group in groups])[None]

    def unpack(self, packed: Tensor) -> list[Tensor]:
        """Splits (1, all tokens, dim) into the groups' tokens (samples, tokens, dim), without copies."""
        parts = packed[0].split([samples * tokens for samples, tokens in self.groups])
        return [part.unflatten(0, group) for part, group in zip(parts, self.groups)]

    def map(self, function: Callable[..., Tensor], packed: Sequence[Tensor], options: Sequence[Any] | None) -> Tensor:
        """Applies a function to each group by itself, and packs what it returns.

        Args:
            function: Takes one group (samples, tokens, dim) of each packed tensor, and the group's option.
            packed: Tensors (1, all tokens, dim).
            options: One value per group; None for all of them by default.
        """
        groups = zip(*map(self.unpack, packed), options or [None] * len(self.groups))
        return self.pack([function(*group) for group in groups])


__all__ = ["Packing"]
