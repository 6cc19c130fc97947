"""Stochastic depth: residual branches that are skipped, and not computed, for random samples of a batch."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .packing import Packing


class StochasticDepth(nn.Module):
    """Adds a residual branch; in training, for a random subset of the samples (arXiv 1603.09382).

    The branch is computed for that subset alone, as in DINOv2 (arXiv 2304.07193), and scaled up such that its
    expectation stays the same. Where the nearest size of a subset is all samples, as with low rates and small batches,
    it is computed for all, and each sample is skipped by itself.

    Args:
        rate: Fraction of the samples whose branch is skipped, of each group where several are packed.
    """

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(
        self,
        states: Tensor,
        branch: Callable[..., Tensor],
        *inputs: Any,
        packing: Packing | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """states + branch(states, *inputs, packing=packing, **kwargs).

        Args:
            states: (samples, tokens, dim), or packed groups (1, all tokens, dim).
            branch: Takes states, `inputs`, `packing` and `kwargs`; returns an update for each token.
            inputs: Further inputs, of which those with one entry per sample are reduced to the subset.
        """
        if not self.training or self.rate == 0:
            return states + branch(states, *inputs, packing=packing, **kwargs)
        if packing is not None:
            return self._add_packed(states, branch, *inputs, packing=packing, **kwargs)
        num_samples = states.shape[0]
        kept = self.sample_kept(num_samples, states.device)
        if kept is None:
            return self._add(states, kept, branch(states, *inputs, packing=None, **kwargs))
        few = [_select(value, kept, num_samples) for value in inputs]
        return self._add(states, kept, branch(states[kept], *few, packing=None, **kwargs))

    def sample_kept(self, num_samples: int, device: torch.device) -> Tensor | None:
        """Random indices (kept,) of the samples whose branch is computed; None for all of them."""
        num_kept = max(1, round(num_samples * (1 - self.rate)))
        return None if num_kept == num_samples else torch.randperm(num_samples, device=device)[:num_kept]

    def _add_packed(
        self, states: Tensor, branch: Callable[..., Tensor], *inputs: Any, packing: Packing, **kwargs: Any
    ) -> Tensor:
        groups = packing.unpack(states)  # (samples, tokens, dim) each
        kept = [self.sample_kept(group.shape[0], states.device) for group in groups]
        few = [group if index is None else group[index] for group, index in zip(groups, kept)]
        smaller = Packing.of(few)
        updates = smaller.unpack(branch(smaller.pack(few), *inputs, packing=smaller, **kwargs))
        return packing.pack([self._add(*parts) for parts in zip(groups, kept, updates)])

    def _add(self, states: Tensor, kept: Tensor | None, updates: Tensor) -> Tensor:
        """Adds updates (kept, tokens, dim) to the kept samples of states, scaled to keep the expectation."""
        if kept is None:
            samples = torch.rand(states.shape[0], 1, 1, device=states.device) >= self.rate
            return states + updates.to(states.dtype) * samples / (1 - self.rate)
        return states.index_add(0, kept, updates.to(states.dtype), alpha=states.shape[0] / kept.shape[0])


def _select(value: Any, kept: Tensor, num_samples: int) -> Any:
    """The kept samples of an input with one entry per sample; rotary positions may be the same for all samples."""
    if isinstance(value, tuple):
        return tuple(_select(part, kept, num_samples) for part in value)
    return value[kept] if value is not None and value.shape[0] == num_samples else value


__all__ = ["StochasticDepth"]
