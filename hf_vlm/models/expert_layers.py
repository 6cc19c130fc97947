"""Sparse experts: several MLPs in place of one, a few of which each token passes, and the router that chooses them.

V-MoE (arXiv 2106.05974) in transformers' interface of experts. What the router owes to training, a loss that keeps the
experts equally loaded, is collected by whoever opens `collect_routings` around the encoder; see `router_loss.py`.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.integrations.moe import use_experts_implementation
from transformers.utils.generic import maybe_autocast

from .configuration_vlm_vit import VLMViTConfig
from .self_initialised import SelfInitialised


@dataclass
class Routing:
    """What a router did with the tokens of one call, of a training step.

    Args:
        load: (experts,) fraction of the choices that fell on each expert, those included that exceed its capacity.
        probabilities: (experts,) mean probability of each expert, with a gradient.
        z_loss: () mean squared log-sum-exp of the logits (arXiv 2202.08906), with a gradient.
        entropy: () mean entropy of a token's probabilities, in units of that of a uniform choice.
        dropped: () fraction of the choices that exceed the capacity.
        coefficients: Weights of the balance loss and of the z-loss, by the configuration.
    """

    load: Tensor
    probabilities: Tensor
    z_loss: Tensor
    entropy: Tensor
    dropped: Tensor
    coefficients: tuple[float, float]


_COLLECTIONS: list[list[Routing]] = []


@contextmanager
def collect_routings() -> Iterator[list[Routing]]:
    """A context whose list receives the routing of each call of a sparse layer that is trained within it.

    Layers add none that are not trained, as a teacher's, nor when activation checkpointing runs them again in the
    backward pass: the context is then closed. Of nested contexts the outermost receives all.
    """
    routings: list[Routing] = []
    _COLLECTIONS.append(routings)
    try:
        yield routings
    finally:
        _COLLECTIONS.pop()


@use_experts_implementation(has_gate=False, has_bias=True)
class VLMViTExperts(SelfInitialised):
    """The weights of all experts, and the loop over experts that transformers' faster implementations equal."""

    first = "up_proj"  # name of the first projection by the interface

    def __init__(self, config: VLMViTConfig):
        super().__init__()
        self.num_experts, self.std = config.num_experts, config.initializer_range
        self.hidden_dim, self.intermediate_dim = config.hidden_size, config.intermediate_size
        self.act_fn = ACT2FN[config.hidden_act]
        inner = self.intermediate_dim * (2 if config.use_gated_mlp else 1)
        self.register_parameter(self.first, _empty(self.num_experts, inner, self.hidden_dim))
        self.register_parameter(f"{self.first}_bias", _empty(self.num_experts, inner))
        self.down_proj = _empty(self.num_experts, self.hidden_dim, self.intermediate_dim)
        self.down_proj_bias = _empty(self.num_experts, self.hidden_dim)

    def init_parameters(self) -> None:
        """Initialises each expert as the MLP that it takes the place of: by its own numbers of inputs and outputs."""
        size = self.hidden_dim, self.intermediate_dim
        for name in (self.first, "down_proj"):
            init_weight(self.get_parameter(name), self.std, sum(size))
            init.zeros_(self.get_parameter(f"{name}_bias"))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Weighted sums (tokens, dim) of the chosen experts' outputs.

        Args:
            hidden_states: (tokens, dim).
            top_k_index: (tokens, choices) chosen experts.
            top_k_weights: (tokens, choices) weights of their outputs.
        """
        output = torch.zeros_like(hidden_states)
        first, first_bias = self.get_parameter(self.first), self.get_parameter(f"{self.first}_bias")
        for expert in range(self.num_experts):
            token, choice = torch.where(top_k_index == expert)
            inner = F.linear(hidden_states[token], first[expert], first_bias[expert])
            inner = self._apply_gate(inner) if self.has_gate else self.act_fn(inner)
            update = F.linear(inner, self.down_proj[expert], self.down_proj_bias[expert])
            output = output.index_add(0, token, (update * top_k_weights[token, choice, None]).to(output.dtype))
        return output

    def _apply_gate(self, inner: Tensor) -> Tensor:
        """Values (rows, inner) of gated experts, from both halves of their first projection (rows, 2 x inner)."""
        gate, values = inner.chunk(2, dim=-1)
        return self.act_fn(gate) * values


@use_experts_implementation(has_gate=True, has_bias=True)
class VLMViTGatedExperts(VLMViTExperts):
    """Experts with a gate (SwiGLU); the first projection's rows are those of the gate, then those of the values."""

    first = "gate_up_proj"


class VLMViTRouter(SelfInitialised):
    """Chooses the experts of each token: those of the highest probability, in float32."""

    def __init__(self, config: VLMViTConfig):
        super().__init__()
        self.config = config
        self.weight = _empty(config.num_experts, config.hidden_size)

    def init_parameters(self) -> None:
        init_weight(self.weight, self.config.initializer_range, sum(self.weight.shape))

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Routing | None]:
        """Weights and indices (tokens, choices) of experts of tokens (tokens, dim), and, where trained, a record."""
        is_trained = self.training and self.weight.requires_grad
        config, dtype = self.config, torch.promote_types(hidden_states.dtype, torch.float32)
        with maybe_autocast(hidden_states.device.type, enabled=False):
            logits = F.linear(hidden_states.to(dtype), self.weight.to(dtype))  # (tokens, experts)
        noisy = logits
        if is_trained and config.router_noise:
            noisy = logits + torch.randn_like(logits) * (config.router_noise / config.num_experts)
        probabilities = noisy.softmax(dim=-1)
        weights, index = probabilities.topk(config.num_experts_per_tok, dim=-1)  # (tokens, choices) each
        if not is_trained:
            return self._normalise(weights), index, None
        kept = None
        if config.expert_capacity_factor is not None:
            capacity = math.ceil(config.expert_capacity_factor * index.numel() / config.num_experts)
            kept = within_capacity(weights, index, capacity, config.num_experts)
        weights, routing = self._normalise(weights), self._describe(logits, probabilities, index, kept)
        return (weights if kept is None else weights * kept), index, routing

    def _normalise(self, weights: Tensor) -> Tensor:
        """Weights that sum to 1, by a sum without a gradient: else the weight of an only choice would have none."""
        return weights / weights.sum(dim=-1, keepdim=True).detach() if self.config.norm_topk_prob else weights

    def _describe(self, logits: Tensor, probabilities: Tensor, index: Tensor, kept: Tensor | None) -> Routing:
        config = self.config
        with torch.no_grad():
            chosen = index.flatten()[:, None] == torch.arange(config.num_experts, device=index.device)
            entropy = relative_entropy(probabilities).mean()
            dropped = entropy.new_zeros(()) if kept is None else 1 - kept.to(entropy.dtype).mean()
            load = chosen.to(entropy.dtype).mean(dim=0)
        return Routing(
            load=load,
            probabilities=probabilities.mean(dim=0),
            z_loss=logits.logsumexp(dim=-1).square().mean(),
            entropy=entropy,
            dropped=dropped,
            coefficients=(config.router_aux_loss_coef, config.router_z_loss_coef),
        )


def within_capacity(weights: Tensor, index: Tensor, capacity: int, num_experts: int) -> Tensor:
    """Which choices (tokens, choices) an expert has room for: those of the highest weight, up to `capacity` of them.

    This is V-MoE's batch prioritised routing: what is dropped does not depend on the order of the images.
    """
    order = weights.flatten().argsort(descending=True, stable=True)
    experts = index.flatten()[order]
    chosen = experts[:, None] == torch.arange(num_experts, device=index.device)  # (tokens x choices, experts)
    position = chosen.cumsum(dim=0).gather(1, experts[:, None])[:, 0]  # 1 for the first of its expert
    return torch.empty_like(chosen[:, 0]).scatter(0, order, position <= capacity).view_as(index)


class VLMViTSparseMLP(nn.Module):
    """The feed-forward block as a mixture of experts: each token passes `num_experts_per_tok` of `num_experts` MLPs.

    Tokens beyond an expert's capacity pass by on the residual connection alone. There is a capacity in training alone,
    so that predictions do not depend on what else is in the batch.
    """

    def __init__(self, config: VLMViTConfig):
        super().__init__()
        self.router = VLMViTRouter(config)
        self.experts = (VLMViTGatedExperts if config.use_gated_mlp else VLMViTExperts)(config)

    @property
    def output_weight(self) -> Tensor:
        """Weights (experts, dim, inner) of the last layers."""
        return self.experts.down_proj

    def forward(self, hidden_states: Tensor) -> Tensor:
        tokens = hidden_states.flatten(0, -2)  # (all tokens, dim)
        weights, index, routing = self.router(tokens)
        if routing is not None and _COLLECTIONS and torch.is_grad_enabled():
            _COLLECTIONS[0].append(routing)
        return self._apply_experts(tokens, index, weights).view_as(hidden_states)

    def _apply_experts(self, tokens: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        device = tokens.device.type
        if device == "meta" or not torch.is_autocast_enabled(device):
            return self.experts(tokens, index, weights)
        # Autocast does not know grouped products: they would be computed in the precision of the weights.
        dtype = torch.get_autocast_dtype(device)
        narrow = {name: weight.to(dtype) for name, weight in self.experts.named_parameters()}
        return functional_call(self.experts, narrow, (tokens.to(dtype), index, weights))


def relative_entropy(probabilities: Tensor) -> Tensor:
    """Entropy of distributions (..., choices), of which a uniform one has 1."""
    uniform = math.log(probabilities.shape[-1])
    return 1 - (uniform - torch.special.entr(probabilities).sum(dim=-1)) / max(uniform, math.log(2))


def num_inactive_parameters(model: nn.Module) -> int:
    """Number of the weights that a token does not pass: of the experts that are not chosen for it."""
    return sum(
        sum(weight.numel() for weight in module.experts.parameters())
        // module.router.config.num_experts
        * (module.router.config.num_experts - module.router.config.num_experts_per_tok)
        for module in model.modules()
        if isinstance(module, VLMViTSparseMLP)
    )


def init_weight(weight: Tensor, std: float | None, fans: int) -> None:
    """Initialises weights that are no linear layer's: by a standard deviation, or else by Xavier's rule.

    The whole tensor at once, as a slice would not know that a checkpoint gave its values.

    Args:
        fans: Number of inputs and outputs, together.
    """
    if std is None:
        bound = math.sqrt(6 / fans)
        init.uniform_(weight, -bound, bound)
    else:
        init.trunc_normal_(weight, std=std)


def _empty(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape))


__all__ = [
    "Routing",
    "VLMViTExperts",
    "VLMViTGatedExperts",
    "VLMViTRouter",
    "VLMViTSparseMLP",
    "collect_routings",
    "num_inactive_parameters",
    "relative_entropy",
    "within_capacity",
]
