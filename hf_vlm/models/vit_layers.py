"""Parts of the encoder: patches, positions, attention, the MLP and the layer of them."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_vlm_vit import VLMViTConfig
from .expert_layers import VLMViTSparseMLP
from .packing import Packing
from .stochastic_depth import StochasticDepth

Positions = tuple[Tensor, Tensor] | None


def patch_grid(pixel_values: Tensor, patch_hw: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of patches in images (..., height, width)."""
    return pixel_values.shape[-2] // patch_hw[0], pixel_values.shape[-1] // patch_hw[1]


def check_pixel_values(pixel_values: Tensor, config: VLMViTConfig) -> None:
    """ValueError when images are not (batch, num_channels, height, width) with sides divisible by the patch."""
    shape = tuple(pixel_values.shape)
    if len(shape) != 4 or shape[1] != config.num_channels:
        raise ValueError(f"pixel_values must be (batch, {config.num_channels}, height, width), but are {shape}.")
    for size, patch, side in zip(shape[2:], config.patch_hw, ("height", "width")):
        if size % patch:
            below = size // patch * patch
            raise ValueError(
                f"Image {side} {size} is not a multiple of the patch {side} {patch}: resize images to {below} or "
                f"{below + patch} pixels."
            )


def patchify(pixel_values: Tensor, patch_hw: tuple[int, int]) -> Tensor:
    """Cuts images (batch, channels, height, width) into patches (batch, patches, channels x patch h x patch w).

    Values of a patch are in the order of a convolution kernel, so a patch-embedding convolution is a linear layer.
    """
    batch, channels, height, width = pixel_values.shape
    ph, pw = patch_hw
    grid = pixel_values.reshape(batch, channels, height // ph, ph, width // pw, pw)
    return grid.permute(0, 2, 4, 1, 3, 5).reshape(batch, (height // ph) * (width // pw), channels * ph * pw)


def unpatchify(patches: Tensor, grid_hw: tuple[int, int], patch_hw: tuple[int, int]) -> Tensor:
    """Puts patches (batch, patches, values) back into images (batch, channels, height, width)."""
    (rows, columns), (ph, pw) = grid_hw, patch_hw
    grid = patches.reshape(patches.shape[0], rows, columns, -1, ph, pw)
    return grid.permute(0, 3, 1, 4, 2, 5).reshape(patches.shape[0], -1, rows * ph, columns * pw)


def gather_tokens(tokens: Tensor, indices: Tensor) -> Tensor:
    """Gathers tokens (batch, tokens, dim) by indices (batch, picked): (batch, picked, dim)."""
    return _select_rows(tokens.flatten(0, 1), indices, tokens.shape[1])


def gather_patches(pixel_values: Tensor, indices: Tensor, patch_hw: tuple[int, int]) -> Tensor:
    """Cuts out the patches at row-major indices (batch, picked) alone: (batch, picked, values), as `patchify` gives.

    A patch is gathered as its rows of pixels, so that the images are read once and the other patches never.
    """
    channels, height = pixel_values.shape[1:3]
    (ph, pw), (rows, columns) = patch_hw, patch_grid(pixel_values, patch_hw)
    first = indices // columns * (ph * columns) + indices % columns  # a patch's first row of pixels in its channel
    row = torch.arange(ph, device=indices.device) * columns
    channel = torch.arange(channels, device=indices.device) * (rows * ph * columns)
    lines = (first[:, :, None, None] + channel[:, None] + row).flatten(1)  # (batch, picked * channels * patch height)
    picked = _select_rows(pixel_values.reshape(-1, pw), lines, channels * height * columns)
    return picked.reshape(*indices.shape, channels * ph * pw)


def _select_rows(rows: Tensor, indices: Tensor, num_rows: int) -> Tensor:
    """Rows (batch x num_rows, dim) at indices (batch, picked) of each example: several times as fast as `gather`."""
    starts = torch.arange(indices.shape[0], device=indices.device)[:, None] * num_rows
    return rows.index_select(0, (indices + starts).flatten()).unflatten(0, indices.shape)


def sincos_positions(
    dim: int,
    grid_hw: tuple[int, int],
    device: torch.device | None = None,
    *,
    spread_hw: tuple[int, int] | None = None,
) -> Tensor:
    """Fixed 2-D sin-cos positions (patches, dim) of MAE (arXiv 2111.06377): half for the row, half for the column.

    Args:
        spread_hw: Rows and columns of the grid over which the patches are spread: their centres keep their positions
            in the image, as when a table of that size is interpolated. By default `grid_hw`, with steps of 1.
    """
    rows, columns = (
        (torch.arange(n, dtype=torch.float32, device=device) + 0.5) * (spread / n) - 0.5
        for n, spread in zip(grid_hw, spread_hw or grid_hw)
    )
    omega = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float32, device=device) / (dim // 4))  # (dim / 4,)
    y, x = (coordinate[:, None] * omega for coordinate in (rows, columns))  # (rows, dim / 4), (columns, dim / 4)
    along_x = torch.cat([x.sin(), x.cos()], dim=-1)[None].expand(grid_hw[0], -1, -1)
    along_y = torch.cat([y.sin(), y.cos()], dim=-1)[:, None].expand(-1, grid_hw[1], -1)
    return torch.cat([along_x, along_y], dim=-1).flatten(0, 1)  # (rows * columns, dim)


def interpolate_positions(positions: Tensor, grid_hw: tuple[int, int], method: str) -> Tensor:
    """Positions (1, dim, rows, columns) resized to a grid, by a `position_interpolation` of [`VLMViTConfig`]."""
    options: dict[str, Any] = {"mode": "bicubic", "align_corners": False, "antialias": method == "bicubic_antialias"}
    if method == "bicubic_offset":
        scale = [(size + 0.1) / before for size, before in zip(grid_hw, positions.shape[2:])]
        return F.interpolate(positions, scale_factor=scale, **options)
    return F.interpolate(positions, size=grid_hw, **options)


def rope_positions(head_dim: int, theta: float, grid_hw: tuple[int, int], device: torch.device) -> Tensor:
    """Angles (patches, head_dim) of DINOv3's axial rotary positions: patch centres in -1..1, not learned."""
    inv_freq = theta ** -torch.arange(0, 1, 4 / head_dim, dtype=torch.float32, device=device)  # (head_dim / 4,)
    rows, columns = (2 * (torch.arange(n, device=device) + 0.5) / n - 1 for n in grid_hw)
    centres = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).flatten(0, 1)  # (patches, 2)
    angles = 2 * math.pi * centres[:, :, None] * inv_freq  # (patches, 2, head_dim / 4)
    return angles.flatten(1).tile(2)  # (patches, head_dim)


def rotate(states: Tensor, positions: tuple[Tensor, Tensor]) -> Tensor:
    """Rotates queries or keys (batch, heads, tokens, head_dim); class and register tokens are left as they are."""
    cos, sin = positions
    num_prefix = states.shape[-2] - cos.shape[-2]
    prefix, patches = states[:, :, :num_prefix], states[:, :, num_prefix:]
    first, second = patches.chunk(2, dim=-1)
    rotated = patches * cos + torch.cat([-second, first], dim=-1) * sin
    return torch.cat([prefix, rotated], dim=-2)


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Plain attention over (batch, heads, tokens, head_dim); returns (batch, tokens, heads, head_dim) and weights.

    The mask, if any, is bool, broadcast to (batch, heads, tokens, context): True where a token sees the other.
    """
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    weights = F.dropout(scores.softmax(dim=-1), p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def build_norm(config: VLMViTConfig, size: int) -> nn.Module:
    """The normalisation layer that the configuration names."""
    norm_class = nn.RMSNorm if config.norm_type == "rmsnorm" else nn.LayerNorm
    return norm_class(size, eps=config.layer_norm_eps)


class VLMViTAttention(nn.Module):
    """Multi-head attention through transformers' attention interface, of tokens to themselves or to a context."""

    def __init__(self, config: VLMViTConfig):
        super().__init__()
        size = config.hidden_size
        self.config = config
        self.head_dim = size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        # Three products are as fast as one, and need no copies to be split and, in the backward pass, joined.
        self.query, self.key, self.value = (nn.Linear(size, size, bias=config.qkv_bias) for _ in range(3))
        self.query_norm = build_norm(config, self.head_dim) if config.use_qk_norm else nn.Identity()
        self.key_norm = build_norm(config, self.head_dim) if config.use_qk_norm else nn.Identity()
        self.projection = nn.Linear(size, size)

    def forward(
        self,
        hidden_states: Tensor,
        positions: Any = None,  # Positions; a list of them for packed groups
        context: Tensor | None = None,
        context_positions: Positions = None,
        attention_mask: Tensor | None = None,
        packing: Packing | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if context is None:
            context, context_positions = hidden_states, positions
        states = self.query(hidden_states), self.key(context), self.value(context)  # (batch, tokens, dim) each
        if packing is not None:
            return self.projection(packing.map(partial(self._attend_group, **kwargs), states, positions)), None
        output, weights = self._attend(*states, positions, context_positions, attention_mask, **kwargs)
        return self.projection(output), weights

    def _attend_group(self, query: Tensor, key: Tensor, value: Tensor, positions: Positions, **kwargs: Any) -> Tensor:
        return self._attend(query, key, value, positions, positions, **kwargs)[0]

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        positions: Positions,
        context_positions: Positions,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of projected states (batch, tokens, dim), and its weights where the implementation gives them."""
        query = self.query_norm(self._heads(query))  # (batch, heads, tokens, head_dim)
        key = self.key_norm(self._heads(key))  # (batch, heads, context, head_dim)
        if positions is not None:
            query = rotate(query, positions)
        if context_positions is not None:
            key = rotate(key, context_positions)
        attend: Callable[..., tuple[Tensor, Tensor | None]] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        dropout = self.config.attention_dropout if self.training else 0.0
        output, weights = attend(
            self, query, key, self._heads(value), attention_mask, scaling=self.scaling, dropout=dropout, **kwargs
        )
        return output.flatten(2), weights

    def _heads(self, states: Tensor) -> Tensor:
        return states.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class VLMViTMLP(nn.Module):
    """The feed-forward block, gated (SwiGLU) where the configuration sets `use_gated_mlp`."""

    def __init__(self, config: VLMViTConfig):
        super().__init__()
        self.activation = ACT2FN[config.hidden_act]
        if config.use_gated_mlp:
            self.gate_projection = nn.Linear(config.hidden_size, config.intermediate_size)
        self.up_projection = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down_projection = nn.Linear(config.intermediate_size, config.hidden_size)
        self.use_gate = config.use_gated_mlp

    @property
    def output_weight(self) -> Tensor:
        """Weights (dim, inner) of the last layer."""
        return self.down_projection.weight

    def forward(self, hidden_states: Tensor) -> Tensor:
        up = self.up_projection(hidden_states)
        inner = self.activation(self.gate_projection(hidden_states)) * up if self.use_gate else self.activation(up)
        return self.down_projection(inner)


class LayerScale(nn.Module):
    """A learned gain per channel on a residual branch (arXiv 2103.17239)."""

    def __init__(self, size: int, value: float):
        super().__init__()
        self.value = value
        self.gain = nn.Parameter(torch.empty(size))

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states * self.gain


class VLMViTLayer(GradientCheckpointingLayer):
    """Pre-norm transformer block with LayerScale and stochastic depth.

    Its tokens attend to themselves, or to a `context` (batch, context, dim), which is not changed: where only some
    tokens are needed after a layer, only these are given, with all of them as their context. Of these a token sees
    those for which an `attention_mask` (batch, 1, tokens, context) bool is True.

    Args:
        config: Shape of the layer.
        drop_path_rate: Rate of stochastic depth.
        is_sparse: Whether the MLP is a mixture of experts.
    """

    def __init__(self, config: VLMViTConfig, drop_path_rate: float = 0.0, is_sparse: bool = False):
        super().__init__()
        size, scale = config.hidden_size, config.layerscale_value
        self.residual = StochasticDepth(drop_path_rate)
        self.norm1 = build_norm(config, size)
        self.attention = VLMViTAttention(config)
        self.layer_scale1 = nn.Identity() if scale is None else LayerScale(size, scale)
        self.norm2 = build_norm(config, size)
        self.mlp = (VLMViTSparseMLP if is_sparse else VLMViTMLP)(config)
        self.layer_scale2 = nn.Identity() if scale is None else LayerScale(size, scale)

    @property
    def output_weights(self) -> tuple[Tensor, Tensor]:
        """Weights of the layers whose outputs are added to the tokens."""
        return self.attention.projection.weight, self.mlp.output_weight

    def forward(
        self,
        hidden_states: Tensor,
        positions: Any = None,  # Positions; a list of them for packed groups
        context: Tensor | None = None,
        context_positions: Positions = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        inputs = (positions, context, context_positions, attention_mask)
        states = self.residual(hidden_states, self._attend, *inputs, **kwargs)
        return self.residual(states, self._feed_forward, packing=kwargs.get("packing"))

    def _attend(
        self,
        states: Tensor,
        positions: Any,
        context: Tensor | None,
        context_positions: Positions,
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> Tensor:
        normed = None if context is None else self.norm1(context)
        states, _ = self.attention(self.norm1(states), positions, normed, context_positions, attention_mask, **kwargs)
        return self.layer_scale1(states)

    def _feed_forward(self, states: Tensor, packing: Packing | None = None) -> Tensor:
        return self.layer_scale2(self.mlp(self.norm2(states)))


def build_layers(config: VLMViTConfig) -> nn.ModuleList:
    """The layers of a configuration, those of `sparse_layer_indices` with experts."""
    sparse = config.sparse_layer_indices
    return nn.ModuleList(
        [VLMViTLayer(config, rate, is_sparse=index in sparse) for index, rate in enumerate(config.drop_path_rates)]
    )


__all__ = [
    "LayerScale",
    "Positions",
    "VLMViTAttention",
    "VLMViTLayer",
    "build_layers",
    "build_norm",
    "check_pixel_values",
    "eager_attention_forward",
    "gather_patches",
    "gather_tokens",
    "patch_grid",
    "patchify",
    "rope_positions",
    "rotate",
    "sincos_positions",
    "unpatchify",
]
