"""State that training advances beside the weights: it stays in float32 whatever the model is cast to."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def in_float32(function: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """What a function of `nn.Module._apply` makes of a tensor, but never of fewer bits than float32."""
    result = function(tensor)
    is_narrow = result.is_floating_point() and result.dtype.itemsize < torch.float32.itemsize
    return tensor.to(result.device, torch.float32) if is_narrow else result


class Float32State(nn.Module):
    """A module that `to`, `half` and the like move, but cast to nothing below float32.

    A moving average and a count change by less than bfloat16 resolves: there they would stand still.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        return super()._apply(lambda tensor: in_float32(fn, tensor), recurse)


__all__ = ["Float32State", "in_float32"]
