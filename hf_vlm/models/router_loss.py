"""The loss of routers, which keeps experts equally loaded, added to the loss of any model on a sparse encoder."""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from .expert_layers import Routing, collect_routings, relative_entropy
from .ranks import sum_over_ranks, world_size


def router_loss(routings: Sequence[Routing]) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of the routers of a step, and metrics of how they route.

    The balance loss is that of the Switch Transformer (arXiv 2101.03961): experts x sum over experts of load x mean
    probability, which is 1 for equal loads. The z-loss is that of ST-MoE (arXiv 2202.08906). Both are means over the
    calls of sparse layers. The load, which has no gradient, is that of all ranks: the mean of the ranks' gradients is
    then that of one process with all of their images.

    Args:
        routings: Routings of the calls of sparse layers: of each layer, and of each pass of the encoder.

    Returns:
        The loss (), and by name, without gradients:
            router_balance_loss, router_z_loss: Parts of the loss, without their coefficients.
            router_entropy: Mean entropy of a token's probabilities; 1 where all experts are equally likely.
            expert_load_max, expert_load_min: Load of the most and of the least used expert of any layer, relative to
                an equal part.
            expert_load_entropy: Entropy of the loads in the layer where it is lowest; 1 for equal loads, 0 where one
                expert has all tokens.
            dropped_tokens: Fraction of the choices of experts that exceeded their capacity.
    """
    num_experts = [routing.load.shape[0] for routing in routings]
    loads = (sum_over_ranks(torch.cat([routing.load for routing in routings])) / world_size()).split(num_experts)
    balance, z_loss, total = [], [], []
    for routing, load in zip(routings, loads):
        balance.append(load.shape[0] * (load * routing.probabilities).sum())
        z_loss.append(routing.z_loss)
        total.append(routing.coefficients[0] * balance[-1] + routing.coefficients[1] * z_loss[-1])
    metrics = {
        "router_balance_loss": torch.stack(balance).mean(),
        "router_z_loss": torch.stack(z_loss).mean(),
        "router_entropy": torch.stack([routing.entropy for routing in routings]).mean(),
        "expert_load_max": torch.stack([load.max() * load.shape[0] for load in loads]).max(),
        "expert_load_min": torch.stack([load.min() * load.shape[0] for load in loads]).min(),
        "expert_load_entropy": torch.stack([relative_entropy(load) for load in loads]).min(),
        "dropped_tokens": torch.stack([routing.dropped for routing in routings]).mean(),
    }
    return torch.stack(total).mean(), {name: value.detach() for name, value in metrics.items()}


def adds_router_loss(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates the `forward` of a model whose output has a loss: in training, adds to it that of the routers.

    It is added once per call, by the outermost such model, however often the encoder is called; without sparse layers
    nothing changes. Metrics of the call are then in the model's `router_metrics`.
    """

    @wraps(forward)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not self.training:
            return forward(self, *args, **kwargs)
        with collect_routings() as routings:
            output = forward(self, *args, **kwargs)
        if not routings:
            return output
        loss, self.router_metrics = router_loss(routings)
        if isinstance(output, tuple):  # whose first value is the loss, where there is one
            return (output[0] + loss, *output[1:]) if output[0].ndim == 0 else output
        if output.get("loss") is not None:
            output["loss"] = output["loss"] + loss
        return output

    return wrapper


__all__ = ["adds_router_loss", "router_loss"]
