"""Semantic segmentation on the plain ViT: queries that go through its last layers find a class and a mask each."""

import math
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_outputs import SemanticSegmenterOutput
from transformers.utils import auto_docstring
from transformers.utils.output_capturing import capture_outputs

from .configuration_mask_query_segmentation import VLMViTMaskQuerySegmentationConfig
from .detection_layers import ChannelLayerNorm
from .loss_instance_segmentation import OVERSAMPLING
from .loss_mask_query_segmentation import mask_query_loss, masks_at, sample_labelled_points
from .model_on_encoder import HeadOnFreezableEncoder
from .modeling_semantic_segmentation import check_labels
from .modeling_vlm_vit import VLMViTModel
from .self_initialised import SelfInitialised
from .ssl_state import Float32State
from .vit_layers import patch_grid

MASK_STRIDE = 4  # pixels per pixel of a mask, in each direction, where patches are of a power of two
ANNEALING_POWER = 0.9


class MaskQueries(NamedTuple):
    """What queries are for: mask logits are queries @ pixels."""

    class_logits: Tensor  # (batch, queries, labels + 1), the last of no class
    queries: Tensor  # (batch, queries, channels)
    pixels: Tensor  # (batch, channels, rows, columns) at the masks' stride

    def class_map(self) -> Tensor:
        """Scores (batch, labels, rows, columns) of the classes: those of the queries, where their masks are."""
        scores = self.class_logits.float().softmax(dim=-1)[..., :-1]
        masks = torch.einsum("bqc,bcyx->bqyx", self.queries.float(), self.pixels.float()).sigmoid()
        return torch.einsum("bql,bqyx->blyx", scores, masks)

    def at(self, points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Classes, queries and pixels (batch, channels, points) at points (batch, points, 2), all float32."""
        grid = 2 * points[:, :, None] - 1  # (batch, points, 1, 2)
        pixels = F.grid_sample(self.pixels.float(), grid, padding_mode="border", align_corners=False)[..., 0]
        return self.class_logits.float(), self.queries.float(), pixels


class MaskQueryHead(nn.Module):
    """The queries, and what is read of them and of the patches after any of the layers that they go through.

    Convolutions are plain ones of few channels, unlike EoMT's: the backward pass of depthwise ones fails on some GPUs.
    """

    def __init__(self, config: VLMViTMaskQuerySegmentationConfig):
        super().__init__()
        width, size = config.encoder.hidden_size, config.mask_feature_size
        self.scale = size**-0.5  # as in attention: or else new masks would be sure of themselves
        self.query_tokens = nn.Parameter(torch.empty(1, config.num_queries, width))
        self.class_head = nn.Linear(width, config.num_labels + 1)
        self.mask_mlp = nn.Sequential(
            nn.Linear(width, width), nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, size)
        )
        doublings = max(1, int(math.log2(max(config.encoder.patch_hw) / MASK_STRIDE)))
        self.upscale = nn.Sequential(
            *(
                nn.Sequential(
                    nn.ConvTranspose2d(size if i else width, size, kernel_size=2, stride=2),
                    nn.GELU(),
                    nn.Conv2d(size, size, kernel_size=3, padding=1, bias=False),
                    ChannelLayerNorm(size, eps=config.encoder.layer_norm_eps),
                )
                for i in range(doublings)
            )
        )

    def forward(self, queries: Tensor, patches: Tensor) -> MaskQueries:
        """Of normed queries (batch, queries, dim) and a normed map of patches (batch, dim, rows, columns)."""
        return MaskQueries(self.class_head(queries), self.scale * self.mask_mlp(queries), self.upscale(patches))


class MaskAnnealing(Float32State, SelfInitialised):
    """How many of the queries of each layer see only the patches within their masks: a fraction, by the progress.

    As in EoMT it falls from 1 to 0 in one layer after the other, and ends before training does, for without masks
    attention is as fast as the encoder's own. Until a training names its progress it is 0. It is saved.
    """

    fractions: Tensor

    def __init__(self, num_layers: int):
        super().__init__()
        self.register_buffer("fractions", torch.zeros(num_layers, dtype=torch.float32))

    def init_parameters(self) -> None:
        init.zeros_(self.fractions)

    def set_progress(self, progress: float) -> None:
        """Sets the fractions for a fraction of the training that is done."""
        num_layers = self.fractions.shape[0]
        layer = torch.arange(num_layers, device=self.fractions.device)
        done = (progress * (num_layers + 2) - (layer + 1)).clamp(0, 1)  # of the layer's own part of the training
        self.fractions.copy_((1 - done) ** ANNEALING_POWER)


@auto_docstring
class VLMViTForMaskQuerySegmentation(HeadOnFreezableEncoder):
    """The encoder with queries in its last layers, in the manner of EoMT (arXiv 2503.19108).

    Learned queries join the tokens before the last layers, whose attention serves both. Of each query a class and a
    mask are read, the latter from its product with the enlarged map of the patches. The score of a class at a pixel is
    the sum over the queries of class score x mask. In training classes and masks are read before each of these layers
    too, and learned there; queries may see only the patches within their masks, less and less as training proceeds,
    where it names its progress by `after_step`.
    """

    config_class = VLMViTMaskQuerySegmentationConfig
    head_shape: ClassVar[tuple[str, ...]] = ("num_queries", "num_query_layers", "mask_feature_size")
    # transformers picks a loss by the class name.
    loss_function = staticmethod(mask_query_loss)

    def __init__(self, config: VLMViTMaskQuerySegmentationConfig):
        super().__init__(config)
        config.check(config.num_labels)  # again: from_pretrained(..., num_labels=1) sets fields that were checked
        self.backbone = VLMViTModel(config.encoder)
        self.head = MaskQueryHead(config)
        self.annealing = MaskAnnealing(config.num_query_layers) if config.use_masked_attention else None
        self.post_init()
        self.train(self.training)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, MaskQueryHead):
            init.normal_(module.query_tokens)  # as large as the tokens that they join, or all would soon be the same

    def class_layers(self) -> set[str]:
        return {"head.class_head.weight", "head.class_head.bias"}

    def after_step(self, progress: float) -> None:
        if self.annealing is not None:
            self.annealing.set_progress(progress)

    @capture_outputs(tie_last_hidden_states=False)
    @auto_docstring
    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        points: Tensor | None = None,
        *,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> SemanticSegmenterOutput:
        r"""
        labels (`torch.Tensor` of shape `(batch, height, width)`, *optional*):
            Class of each pixel, integers from 0, and 255 for pixels without one; of any size. ValueError when the
            shape, the type or a class does not fit.
        points (`torch.Tensor` of shape `(batch, points, 2)`, *optional*):
            Points at which the masks may be compared with their labels, x and y as fractions of the image; random ones
            when not given.
        """
        stages = self._stages(pixel_values, all_stages=labels is not None, output_attentions=output_attentions)
        if labels is None:
            return SemanticSegmenterOutput(logits=stages[-1].class_map())
        check_labels(labels, pixel_values.shape[0])
        with torch.autocast(pixel_values.device.type, enabled=False):
            if points is None:
                rows, columns = stages[-1].pixels.shape[2:]
                num_points = max(rows, rows * columns // self.config.mask_point_ratio)
                points = sample_labelled_points(labels, OVERSAMPLING * num_points)
            points = points.float()
            at_points = (stage.at(points) for stage in stages)
            class_logits, queries, pixels = (torch.stack(parts) for parts in zip(*at_points))  # (stages, batch, ...)
            targets = masks_at(labels, points, self.config.num_labels)
            loss = self.loss_function(class_logits, queries, pixels, targets, self.config)
            return SemanticSegmenterOutput(loss=loss, logits=stages[-1].class_map())

    def _stages(self, pixel_values: Tensor, *, all_stages: bool, **kwargs: Any) -> list[MaskQueries]:
        """What is read after the last layer, and if asked for before each layer with queries."""
        tokens, positions = self.backbone.embed(pixel_values)
        grid_hw = patch_grid(pixel_values, self.config.encoder.patch_hw)
        first = self.config.encoder.num_hidden_layers - self.config.num_query_layers
        for layer in self.backbone.layers[:first]:
            tokens = layer(tokens, positions, **kwargs)
        queries = self.head.query_tokens.to(tokens.dtype).expand(tokens.shape[0], -1, -1)
        tokens = torch.cat([queries, tokens], dim=1)  # in front, where tokens have no rotary positions
        stages = []
        for index, layer in enumerate(self.backbone.layers[first:]):
            mask = None
            if all_stages:
                stages.append(self._read(tokens, grid_hw))
                mask = self._attention_mask(stages[-1], index, grid_hw)
            tokens = layer(tokens, positions, attention_mask=mask, **kwargs)
        return [*stages, self._read(tokens, grid_hw)]

    def _read(self, tokens: Tensor, grid_hw: tuple[int, int]) -> MaskQueries:
        """Of tokens (batch, queries + prefix + patches, dim)."""
        normed, num_queries = self.backbone.norm(tokens), self.config.num_queries
        patches = normed[:, num_queries + self.config.encoder.num_prefix_tokens :]
        return self.head(normed[:, :num_queries], patches.transpose(1, 2).unflatten(2, grid_hw))

    @torch.no_grad()
    def _attention_mask(self, found: MaskQueries, layer: int, grid_hw: tuple[int, int]) -> Tensor | None:
        """Which tokens see which others (batch, 1, tokens, tokens) in a layer, in training: all but queries see all.

        Raises:
            ValueError: if the implementation of attention takes no masks.
        """
        if self.annealing is None or not self.training:
            return None
        implementation = self.backbone.config._attn_implementation
        if not implementation.startswith(("sdpa", "eager")):
            raise ValueError(
                f"The attention {implementation!r} takes no masks: train with attn_implementation sdpa, or with "
                "use_masked_attention false in the model's configuration."
            )
        pixels = F.interpolate(found.pixels, grid_hw, mode="bilinear", align_corners=False)
        is_inside = torch.einsum("bqc,bcyx->bqyx", found.queries, pixels).flatten(2) > 0  # (batch, queries, patches)
        is_free = torch.rand(is_inside.shape[:2], device=is_inside.device) >= self.annealing.fractions[layer]
        sees_patches = is_inside | is_free[:, :, None]
        num_queries = is_inside.shape[1]
        num_others = num_queries + self.config.encoder.num_prefix_tokens
        sees = F.pad(sees_patches, (num_others, 0), value=True)  # (batch, queries, tokens)
        return F.pad(sees, (0, 0, 0, sees.shape[2] - num_queries), value=True)[:, None]


__all__ = ["VLMViTForMaskQuerySegmentation", "VLMViTMaskQuerySegmentationConfig"]
