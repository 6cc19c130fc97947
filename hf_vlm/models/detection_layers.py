"""Parts of the detector: neck, deformable attention, decoder layer and the dense one-to-many head."""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_detection import VLMViTDetectionConfig
from .vit_layers import eager_attention_forward

LevelSizes = Sequence[tuple[int, int]]
# exp of more than this is no box of an image: without a bound one broken step makes every later number infinite.
MAX_LOG_SCALE = math.log(1000.0)


def grid_anchors(level_sizes: LevelSizes, anchor_size: float, device: torch.device) -> Tensor:
    """Boxes (locations, 4) (cx, cy, w, h) relative to the image: one per cell, `anchor_size` cells wide and high."""
    levels = []
    for rows, columns in level_sizes:
        y = (torch.arange(rows, device=device, dtype=torch.float32) + 0.5) / rows
        x = (torch.arange(columns, device=device, dtype=torch.float32) + 0.5) / columns
        centres = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).flatten(0, 1)  # (rows * columns, 2)
        size = centres.new_tensor([anchor_size / columns, anchor_size / rows]).expand_as(centres)
        levels.append(torch.cat([centres, size], dim=-1))
    return torch.cat(levels)


def refine_boxes(reference: Tensor, deltas: Tensor) -> Tensor:
    """Boxes (..., 4) moved by deltas in units of their own size: centre + d * size, size * exp(d); float32."""
    deltas = deltas.float()
    centre = reference[..., :2] + deltas[..., :2] * reference[..., 2:]
    size = reference[..., 2:] * deltas[..., 2:].clamp(max=MAX_LOG_SCALE).exp()
    return torch.cat([centre, size], dim=-1)


def box_position_embedding(boxes: Tensor, size: int) -> Tensor:
    """Sines and cosines (..., 4 * size) of boxes (..., 4), `size` per coordinate (DAB-DETR, arXiv 2201.12329)."""
    frequencies = 10000.0 ** (-torch.arange(size // 2, device=boxes.device, dtype=torch.float32) / (size // 2))
    angles = 2 * math.pi * boxes.float()[..., None] * frequencies  # (..., 4, size / 2)
    return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(-2)


class ChannelLayerNorm(nn.LayerNorm):
    """LayerNorm over the channels of a map (batch, channels, rows, columns): no statistics of the batch to sync."""

    def forward(self, feature_map: Tensor) -> Tensor:
        return super().forward(feature_map.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNormAct(nn.Sequential):
    """Convolution that keeps the map's size, channel norm and SiLU."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 1, eps: float = 1e-6):
        super().__init__(
            nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False),
            ChannelLayerNorm(out_channels, eps=eps),
            nn.SiLU(),
        )


class C2fBlock(nn.Module):
    """Cross-stage block of YOLOv8 with channel LayerNorm, as in LW-DETR's projector (arXiv 2406.03459)."""

    def __init__(self, in_channels: int, out_channels: int, num_blocks: int, eps: float = 1e-6):
        super().__init__()
        half = out_channels // 2
        self.split = ConvNormAct(in_channels, 2 * half, eps=eps)
        self.blocks = nn.ModuleList(
            nn.Sequential(ConvNormAct(half, half, 3, eps), ConvNormAct(half, half, 3, eps)) for _ in range(num_blocks)
        )
        self.merge = ConvNormAct((2 + num_blocks) * half, out_channels, eps=eps)

    def forward(self, feature_map: Tensor) -> Tensor:
        parts = list(self.split(feature_map).chunk(2, dim=1))
        for block in self.blocks:
            parts.append(parts[-1] + block(parts[-1]))
        return self.merge(torch.cat(parts, dim=1))


class DetectionNeck(nn.Module):
    """Concatenated encoder maps to one map at the patch stride, and to a second one at half of it with two levels."""

    def __init__(self, config: VLMViTDetectionConfig):
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        in_channels = len(config.encoder.out_indices) * config.encoder.hidden_size
        self.coarse = C2fBlock(in_channels, width, config.neck_num_blocks, eps)
        self.fine = None
        if config.num_neck_levels == 2:
            self.fine = nn.Sequential(
                nn.ConvTranspose2d(in_channels, width, kernel_size=2, stride=2),
                ChannelLayerNorm(width, eps=eps),
                nn.SiLU(),
                C2fBlock(width, width, config.neck_num_blocks, eps),
            )

    def forward(self, feature_maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        stacked = torch.cat(list(feature_maps), dim=1)  # (batch, taps * dim, rows, columns)
        coarse = self.coarse(stacked)  # (batch, hidden_size, rows, columns)
        return (coarse,) if self.fine is None else (coarse, self.fine(stacked))  # (.., 2 * rows, 2 * columns)


class ZeroInitLinear(nn.Linear):
    """Linear layer whose weight and bias start at zero: at first its output is the same everywhere."""


class SamplingOffsets(nn.Linear):
    """Offsets of the sampled points; they start fixed, each head in its own direction, each point one step further."""

    def __init__(self, hidden_size: int, num_heads: int, num_levels: int, num_points: int):
        super().__init__(hidden_size, num_heads * num_levels * num_points * 2)
        self.shape = (num_heads, num_levels, num_points, 2)

    def initial_bias(self) -> Tensor:
        """Points on the sides of squares around the query, flat in the order heads, levels, points, (x, y)."""
        num_heads, _, num_points, _ = self.shape
        angles = torch.arange(num_heads, dtype=torch.float32) * (2 * math.pi / num_heads)
        direction = torch.stack([angles.cos(), angles.sin()], dim=-1)
        direction = direction / direction.abs().amax(-1, keepdim=True)  # (heads, 2)
        steps = torch.arange(1, num_points + 1, dtype=torch.float32)
        return (direction[:, None, None] * steps[:, None]).expand(self.shape).flatten()


class DeformableAttention(nn.Module):
    """Multi-scale deformable attention (arXiv 2010.04159) with plain `F.grid_sample`: runs on every device.

    Each head samples `num_points` points per level, given as offsets in units of the query's reference box.
    """

    def __init__(self, hidden_size: int, num_heads: int, num_levels: int, num_points: int):
        super().__init__()
        self.num_heads, self.num_levels, self.num_points = num_heads, num_levels, num_points
        self.sampling_offsets = SamplingOffsets(hidden_size, num_heads, num_levels, num_points)
        self.attention_weights = ZeroInitLinear(hidden_size, num_heads * num_levels * num_points)
        self.value_projection = nn.Linear(hidden_size, hidden_size)
        self.output_projection = nn.Linear(hidden_size, hidden_size)

    def forward(self, queries: Tensor, reference_boxes: Tensor, source: Tensor, level_sizes: LevelSizes) -> Tensor:
        """Attends from queries (batch, queries, dim) to a source (batch, locations, dim).

        Args:
            reference_boxes: (batch, queries, 4) as (cx, cy, w, h), fractions of the image.
            level_sizes: rows and columns of each level; their products add up to `locations`.
        """
        batch, num_queries, dim = queries.shape
        grouped = (batch, num_queries, self.num_heads, self.num_levels, self.num_points)
        offsets = self.sampling_offsets(queries).view(*grouped, 2).float()
        weights = self.attention_weights(queries).view(batch, num_queries, self.num_heads, -1).softmax(-1)
        boxes = reference_boxes[:, :, None, None, None]  # (batch, queries, 1, 1, 1, 4)
        locations = boxes[..., :2] + offsets / self.num_points * boxes[..., 2:] * 0.5
        grids = (2 * locations - 1).permute(3, 0, 2, 1, 4, 5).flatten(1, 2)  # (levels, batch * heads, queries, ..)

        value = self.value_projection(source).view(batch, -1, self.num_heads, dim // self.num_heads)
        value = value.permute(0, 2, 3, 1).flatten(0, 1)  # (batch * heads, head_dim, locations)
        sampled = []
        for level, grid, (rows, columns) in zip(value.split([r * c for r, c in level_sizes], -1), grids, level_sizes):
            # Sampled in float32: bfloat16 cannot resolve neighbouring cells of a large map.
            feature_map = level.float().view(batch * self.num_heads, -1, rows, columns)
            sampled.append(F.grid_sample(feature_map, grid, align_corners=False))  # (b * h, head_dim, queries, points)
        weights = weights.transpose(1, 2).flatten(0, 1)[:, None]  # (batch * heads, 1, queries, levels * points)
        output = (torch.cat(sampled, dim=-1).to(value.dtype) * weights).sum(-1)  # (batch * heads, head_dim, queries)
        return self.output_projection(output.view(batch, dim, num_queries).transpose(1, 2))


class DetectionDecoderLayer(GradientCheckpointingLayer):
    """Self-attention among the queries, deformable attention to the neck maps, and an MLP; post-norm as in DETR."""

    def __init__(self, config: VLMViTDetectionConfig):
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        self.config = config
        self.num_heads = config.num_self_attention_heads
        self.is_causal = False
        self.query_key = nn.Linear(width, 2 * width)
        self.value = nn.Linear(width, width)
        self.projection = nn.Linear(width, width)
        self.self_attention_norm = nn.LayerNorm(width, eps=eps)
        self.cross_attention = DeformableAttention(
            width, config.num_cross_attention_heads, config.num_neck_levels, config.num_points
        )
        self.cross_attention_norm = nn.LayerNorm(width, eps=eps)
        self.mlp = nn.Sequential(
            nn.Linear(width, config.intermediate_size),
            ACT2FN[config.hidden_act],
            nn.Linear(config.intermediate_size, width),
        )
        self.mlp_norm = nn.LayerNorm(width, eps=eps)

    def forward(
        self, queries: Tensor, positions: Tensor, reference_boxes: Tensor, source: Tensor, level_sizes: LevelSizes
    ) -> Tensor:
        queries = self.self_attention_norm(queries + self.self_attention(queries, positions))
        attended = self.cross_attention(queries + positions, reference_boxes, source, level_sizes)
        queries = self.cross_attention_norm(queries + attended)
        return self.mlp_norm(queries + self.mlp(queries))

    def self_attention(self, queries: Tensor, positions: Tensor) -> Tensor:
        batch, num_queries, width = queries.shape
        heads = (batch, num_queries, self.num_heads, width // self.num_heads)
        query, key = (part.view(heads).transpose(1, 2) for part in self.query_key(queries + positions).chunk(2, -1))
        value = self.value(queries).view(heads).transpose(1, 2)  # (batch, heads, queries, head_dim)
        attend: Callable[..., tuple[Tensor, Tensor | None]] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        scaling = (width // self.num_heads) ** -0.5
        attended, _ = attend(self, query, key, value, None, scaling=scaling, dropout=0.0)
        return self.projection(attended.flatten(2))  # (batch, queries, width)


class ClassHead(nn.Linear):
    """Class logits; its bias starts at the prior probability, so that the many empty queries do not flood the loss."""


class BoxLayer(nn.Linear):
    """Hidden layer of a box head, initialised to keep the scale of its input.

    The small weights of the other layers would shrink it, and with it the steps of boxes: after 150 steps of a toy
    problem the boxes' L1 error was 0.17 with them and 0.09 with this.
    """


class BoxHead(nn.Sequential):
    """Box deltas by an MLP whose last layer starts at zero: untrained boxes are their references."""

    def __init__(self, hidden_size: int):
        super().__init__(
            BoxLayer(hidden_size, hidden_size), nn.ReLU(),
            BoxLayer(hidden_size, hidden_size), nn.ReLU(),
            ZeroInitLinear(hidden_size, 4),
        )  # fmt: skip


class DenseHead(nn.Module):
    """One-to-many head on the neck maps that only training uses: dense supervision teaches neck and encoder fast."""

    def __init__(self, config: VLMViTDetectionConfig):
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        self.convs = nn.Sequential(ConvNormAct(width, width, 3, eps), ConvNormAct(width, width, 3, eps))
        self.class_head = ClassHead(width, config.num_labels)
        self.box_head = BoxHead(width)

    def forward(self, feature_maps: Sequence[Tensor], anchors: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (batch, locations, labels) and boxes (batch, locations, 4)."""
        states = torch.cat([self.convs(m).flatten(2) for m in feature_maps], dim=-1).transpose(1, 2)
        return self.class_head(states), refine_boxes(anchors, self.box_head(states))


__all__ = [
    "BoxHead",
    "BoxLayer",
    "C2fBlock",
    "ChannelLayerNorm",
    "ClassHead",
    "DeformableAttention",
    "DenseHead",
    "DetectionDecoderLayer",
    "DetectionNeck",
    "SamplingOffsets",
    "ZeroInitLinear",
    "box_position_embedding",
    "grid_anchors",
    "refine_boxes",
]
