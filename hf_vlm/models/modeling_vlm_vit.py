"""The encoder: a plain Vision Transformer (arXiv 2010.11929) as a model and as a backbone."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.backbone_utils import BackboneMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BackboneOutput, BaseModelOutputWithPooling
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils import auto_docstring
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_vlm_vit import VLMViTConfig

Positions = tuple[Tensor, Tensor] | None


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
    grid = patches.reshape(len(patches), rows, columns, -1, ph, pw)
    return grid.permute(0, 3, 1, 4, 2, 5).reshape(len(patches), -1, rows * ph, columns * pw)


def gather_tokens(tokens: Tensor, indices: Tensor) -> Tensor:
    """Picks tokens (batch, tokens, dim) by indices (batch, picked): (batch, picked, dim)."""
    return tokens.gather(1, indices[:, :, None].expand(-1, -1, tokens.shape[-1]))


def sincos_positions(dim: int, grid_hw: tuple[int, int], device: torch.device | None = None) -> Tensor:
    """Fixed 2-D sin-cos positions (patches, dim) of MAE (arXiv 2111.06377): half the width a row, half a column."""
    rows, columns = (torch.arange(n, dtype=torch.float32, device=device) for n in grid_hw)
    omega = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float32, device=device) / (dim // 4))  # (dim / 4,)
    y, x = (coordinate[:, None] * omega for coordinate in (rows, columns))  # (rows, dim / 4), (columns, dim / 4)
    along_x = torch.cat([x.sin(), x.cos()], dim=-1)[None].expand(len(rows), -1, -1)
    along_y = torch.cat([y.sin(), y.cos()], dim=-1)[:, None].expand(-1, len(columns), -1)
    return torch.cat([along_x, along_y], dim=-1).flatten(0, 1)  # (rows * columns, dim)


def rope_positions(head_dim: int, theta: float, grid_hw: tuple[int, int], device: torch.device) -> Tensor:
    """Angles (patches, head_dim) of DINOv3's axial rotary positions: patch centres in -1..1, not learned."""
    inv_freq = theta ** -torch.arange(0, 1, 4 / head_dim, dtype=torch.float32, device=device)  # (head_dim / 4,)
    rows, columns = (2 * (torch.arange(n, device=device) + 0.5) / n - 1 for n in grid_hw)
    centres = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).flatten(0, 1)  # (patches, 2)
    angles = 2 * math.pi * centres[:, :, None] * inv_freq  # (patches, 2, head_dim / 4)
    return angles.flatten(1).tile(2)  # (patches, head_dim)


def rotate(states: Tensor, positions: tuple[Tensor, Tensor]) -> Tensor:
    """Turns queries or keys (batch, heads, tokens, head_dim); class and register tokens stay as they are."""
    cos, sin = positions
    num_prefix = states.shape[-2] - cos.shape[-2]
    prefix, patches = states[:, :, :num_prefix], states[:, :, num_prefix:]
    first, second = patches.chunk(2, dim=-1)
    turned = patches * cos + torch.cat([-second, first], dim=-1) * sin
    return torch.cat([prefix, turned], dim=-2)


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
    """Plain attention over (batch, heads, tokens, head_dim); returns (batch, tokens, heads, head_dim) and weights."""
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = F.dropout(scores.softmax(dim=-1), p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def build_norm(config: VLMViTConfig, size: int) -> nn.Module:
    """A normalisation layer of the kind that the configuration names."""
    norm_class = nn.RMSNorm if config.norm_type == "rmsnorm" else nn.LayerNorm
    return norm_class(size, eps=config.layer_norm_eps)


class VLMViTEmbeddings(nn.Module):
    """Patch projection, learned or fixed positions, class and register tokens."""

    def __init__(self, config: VLMViTConfig):
        super().__init__()
        self.config = config
        self.patch_projection = nn.Linear(config.patch_dim, config.hidden_size)
        if config.use_class_token:
            self.class_token = nn.Parameter(torch.empty(1, 1, config.hidden_size))
        if config.num_register_tokens:
            self.register_tokens = nn.Parameter(torch.empty(1, config.num_register_tokens, config.hidden_size))
        if config.position_embedding_type == "learned":
            rows, columns = config.grid_hw
            self.position_embedding = nn.Parameter(torch.empty(1, rows * columns, config.hidden_size))

    def positions(self, grid_hw: tuple[int, int]) -> Tensor | None:
        """Positions to add to the patch tokens of a grid: (1, patches, hidden_size), or None for rotary ones."""
        config, device = self.config, self.patch_projection.weight.device
        if config.position_embedding_type == "rope":
            return None
        if config.position_embedding_type == "sincos":
            return sincos_positions(config.hidden_size, grid_hw, device)[None].to(self.patch_projection.weight.dtype)
        if grid_hw == config.grid_hw:
            return self.position_embedding
        rows, columns = config.grid_hw
        stored = self.position_embedding.reshape(1, rows, columns, -1).permute(0, 3, 1, 2)  # (1, dim, rows, columns)
        resized = F.interpolate(stored.float(), size=grid_hw, mode="bicubic", align_corners=False)
        return resized.to(stored.dtype).flatten(2).transpose(1, 2)  # (1, patches, dim)

    def forward(self, pixel_values: Tensor, visible_indices: Tensor | None = None) -> Tensor:
        batch, _, height, width = pixel_values.shape
        ph, pw = self.config.patch_hw
        patches = patchify(pixel_values, (ph, pw))  # (batch, patches, channels * ph * pw)
        positions = self.positions((height // ph, width // pw))
        if visible_indices is not None:  # only what is seen is embedded: masked patches cost nothing
            patches = gather_tokens(patches, visible_indices)
            if positions is not None:
                positions = gather_tokens(positions.expand(batch, -1, -1), visible_indices)
        tokens = self.patch_projection(patches)  # (batch, patches, hidden_size)
        if positions is not None:
            tokens = tokens + positions
        prefix = []
        if self.config.use_class_token:
            prefix.append(self.class_token.expand(batch, -1, -1))
        if self.config.num_register_tokens:
            prefix.append(self.register_tokens.expand(batch, -1, -1))
        return torch.cat([*prefix, tokens], dim=1) if prefix else tokens  # (batch, prefix + patches, hidden_size)


class VLMViTAttention(nn.Module):
    """Multi-head self-attention through transformers' attention interface."""

    def __init__(self, config: VLMViTConfig):
        super().__init__()
        self.config = config
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=config.qkv_bias)
        self.query_norm = build_norm(config, self.head_dim) if config.use_qk_norm else nn.Identity()
        self.key_norm = build_norm(config, self.head_dim) if config.use_qk_norm else nn.Identity()
        self.projection = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self, hidden_states: Tensor, positions: Positions = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        batch, num_tokens, _ = hidden_states.shape
        qkv = self.qkv(hidden_states).view(batch, num_tokens, 3, -1, self.head_dim)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (batch, heads, tokens, head_dim)
        query, key = self.query_norm(query), self.key_norm(key)
        if positions is not None:
            query, key = rotate(query, positions), rotate(key, positions)
        attend: Callable[..., tuple[Tensor, Tensor | None]] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        dropout = self.config.attention_dropout if self.training else 0.0
        output, weights = attend(self, query, key, value, None, scaling=self.scaling, dropout=dropout, **kwargs)
        return self.projection(output.reshape(batch, num_tokens, -1)), weights


class VLMViTMLP(nn.Module):
    """The feed-forward block, gated (SwiGLU) when the configuration asks for it."""

    def __init__(self, config: VLMViTConfig):
        super().__init__()
        self.activation = ACT2FN[config.hidden_act]
        if config.use_gated_mlp:
            self.gate_projection = nn.Linear(config.hidden_size, config.intermediate_size)
        self.up_projection = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down_projection = nn.Linear(config.intermediate_size, config.hidden_size)
        self.use_gate = config.use_gated_mlp

    def forward(self, hidden_states: Tensor) -> Tensor:
        up = self.up_projection(hidden_states)
        inner = self.activation(self.gate_projection(hidden_states)) * up if self.use_gate else self.activation(up)
        return self.down_projection(inner)


class LayerScale(nn.Module):
    """A learned gain a channel on a residual branch (arXiv 2103.17239)."""

    def __init__(self, size: int, value: float):
        super().__init__()
        self.value = value
        self.gain = nn.Parameter(torch.empty(size))

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states * self.gain


class VLMViTLayer(GradientCheckpointingLayer):
    """Pre-norm transformer block with LayerScale and batch-subset stochastic depth."""

    def __init__(self, config: VLMViTConfig, drop_path_rate: float = 0.0):
        super().__init__()
        scale = config.layerscale_value
        self.drop_path_rate = drop_path_rate
        self.norm1 = build_norm(config, config.hidden_size)
        self.attention = VLMViTAttention(config)
        self.layer_scale1 = nn.Identity() if scale is None else LayerScale(config.hidden_size, scale)
        self.norm2 = build_norm(config, config.hidden_size)
        self.mlp = VLMViTMLP(config)
        self.layer_scale2 = nn.Identity() if scale is None else LayerScale(config.hidden_size, scale)

    def forward(self, hidden_states: Tensor, positions: Positions = None, **kwargs: Any) -> Tensor:
        def attention(states: Tensor, positions: Positions) -> Tensor:
            return self.layer_scale1(self.attention(self.norm1(states), positions, **kwargs)[0])

        def mlp(states: Tensor, positions: Positions) -> Tensor:
            return self.layer_scale2(self.mlp(self.norm2(states)))

        hidden_states = self._residual(hidden_states, positions, attention)
        return self._residual(hidden_states, positions, mlp)

    def _residual(self, states: Tensor, positions: Positions, branch: Callable[..., Tensor]) -> Tensor:
        """Adds a branch; in training it is computed only for the samples that stochastic depth keeps (DINOv2)."""
        if not self.training or self.drop_path_rate == 0:
            return states + branch(states, positions)
        batch = len(states)
        num_kept = max(1, round(batch * (1 - self.drop_path_rate)))
        kept = torch.randperm(batch, device=states.device)[:num_kept]
        if positions is not None and positions[0].shape[0] == batch:  # positions of visible patches differ a sample
            positions = positions[0][kept], positions[1][kept]
        update = branch(states[kept], positions)
        return states.index_add(0, kept, update.to(states.dtype), alpha=batch / num_kept)


@auto_docstring
class VLMViTPreTrainedModel(PreTrainedModel):
    """Base of every model: how weights are initialised, what the attention and compile machinery may rely on."""

    config_class = VLMViTConfig
    base_model_prefix = "backbone"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # losses are means over the batch: gradient accumulation must divide them
    _no_split_modules = ["VLMViTLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": VLMViTLayer, "attentions": VLMViTAttention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = getattr(self.config, "initializer_range", 0.02)
        if isinstance(module, nn.Linear):
            init.trunc_normal_(module.weight, std=std)
        elif isinstance(module, VLMViTEmbeddings):
            for name in ("class_token", "register_tokens", "position_embedding"):
                if hasattr(module, name):
                    init.trunc_normal_(getattr(module, name), std=std)
        elif isinstance(module, LayerScale):
            init.constant_(module.gain, module.value)


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


class _Encoder(VLMViTPreTrainedModel):
    """Parts and steps that the model and the backbone share, so that their weights have the same names."""

    def __init__(self, config: VLMViTConfig):
        super().__init__(config)
        rates = [
            config.drop_path_rate * i / max(1, config.num_hidden_layers - 1) for i in range(config.num_hidden_layers)
        ]
        self.embeddings = VLMViTEmbeddings(config)
        self.layers = nn.ModuleList([VLMViTLayer(config, rate) for rate in rates])
        self.norm = build_norm(config, config.hidden_size)

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.patch_projection

    def _embed(self, pixel_values: Tensor, visible_indices: Tensor | None = None) -> tuple[Tensor, Positions]:
        """Tokens (batch, prefix + patches, dim), and cos and sin (batch or 1, 1, patches, head_dim) where rotary."""
        check_pixel_values(pixel_values, self.config)
        pixel_values = pixel_values.to(self.embeddings.patch_projection.weight.dtype)
        tokens = self.embeddings(pixel_values, visible_indices)
        if self.config.position_embedding_type != "rope":
            return tokens, None
        ph, pw = self.config.patch_hw
        grid_hw = pixel_values.shape[2] // ph, pixel_values.shape[3] // pw
        head_dim = self.config.hidden_size // self.config.num_attention_heads
        angles = rope_positions(head_dim, self.config.rope_theta, grid_hw, tokens.device)[
            None
        ]  # (1, patches, head_dim)
        if visible_indices is not None:
            angles = gather_tokens(angles.expand(len(tokens), -1, -1), visible_indices)
        angles = angles[:, None]  # (batch or 1, 1, patches, head_dim)
        return tokens, (angles.cos().to(tokens.dtype), angles.sin().to(tokens.dtype))


@auto_docstring
class VLMViTModel(_Encoder):
    """The encoder: images to token features."""

    def __init__(self, config: VLMViTConfig):
        super().__init__(config)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    @auto_docstring
    def forward(
        self, pixel_values: Tensor, visible_indices: Tensor | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        r"""
        visible_indices (`torch.LongTensor` of shape `(batch, visible)`, *optional*):
            Row-major indices of the patches to encode. All patches are encoded when it is not given.
        """
        hidden_states, positions = self._embed(pixel_values, visible_indices)
        for layer in self.layers:
            hidden_states = layer(hidden_states, positions, **kwargs)
        hidden_states = self.norm(hidden_states)  # (batch, prefix + patches, hidden_size)
        pooled = hidden_states[:, 0] if self.config.use_class_token else self._mean_of_patches(hidden_states)
        return BaseModelOutputWithPooling(last_hidden_state=hidden_states, pooler_output=pooled)

    def _mean_of_patches(self, hidden_states: Tensor) -> Tensor:
        return hidden_states[:, self.config.num_prefix_tokens :].mean(dim=1)


@auto_docstring
class VLMViTBackbone(BackboneMixin, _Encoder):
    """The encoder as a backbone: images to feature maps of chosen layers."""

    def __init__(self, config: VLMViTConfig):
        super().__init__(config)
        self.num_features = [config.hidden_size] * (config.num_hidden_layers + 1)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    @auto_docstring
    def forward(self, pixel_values: Tensor, **kwargs: Any) -> BackboneOutput:
        hidden_states, positions = self._embed(pixel_values)
        ph, pw = self.config.patch_hw
        grid_hw = pixel_values.shape[2] // ph, pixel_values.shape[3] // pw
        maps = []
        stages: Sequence[nn.Module] = [nn.Identity(), *self.layers]
        for name, stage in zip(self.stage_names, stages):
            hidden_states = stage(hidden_states) if name == "stem" else stage(hidden_states, positions, **kwargs)
            if name in self.out_features:
                tokens = self.norm(hidden_states) if self.config.apply_layernorm else hidden_states
                patches = tokens[:, self.config.num_prefix_tokens :]  # (batch, patches, hidden_size)
                maps.append(patches.transpose(1, 2).reshape(len(patches), -1, *grid_hw))  # (batch, dim, rows, columns)
        return BackboneOutput(feature_maps=tuple(maps))


__all__ = ["VLMViTBackbone", "VLMViTModel", "VLMViTPreTrainedModel"]
