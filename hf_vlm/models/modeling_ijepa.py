"""I-JEPA: features of image blocks predicted from the rest of the image (arXiv 2301.08243), from the paper."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor
from transformers import initialization as init
from transformers.utils import ModelOutput, auto_docstring

from .configuration_vlm_vit import VLMViTConfig
from .modeling_vlm_vit import VLMViTModel
from .ssl_layers import feature_std, flatten_views
from .ssl_masks import context_and_targets, mask_from_indices
from .ssl_model import SSLConfig, SSLPreTrainedModel, as_vit_config, returns_loss
from .ssl_predictor import MaskedPredictor
from .ssl_teacher import TeacherMixin
from .vit_layers import gather_tokens, patch_grid

PREDICTOR_DEFAULTS = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 12}


@strict
class IJEPAConfig(SSLConfig):
    r"""Configuration of [`IJEPAForPreTraining`]; the defaults are the paper's, but for the heads of the predictor.

    Args:
        backbone_config (`VLMViTConfig` or `dict`, *optional*):
            The encoder; with sin-cos positions and without a class token when not given. Where there is a class
            token, the predictor sees it as one more token of the context, and so it learns to sum the context up.
        predictor_config (`VLMViTConfig` or `dict`, *optional*):
            Width, depth and heads of the predictor; 384 x 12 with 12 heads when not given (the paper's has as many
            heads as the encoder). Image, patch and channels are the encoder's.
        num_targets (`int`, defaults to 4): Target blocks of an image.
        target_scale (`list`, defaults to [0.15, 0.2]): Range of their area as a fraction of the image's.
        target_aspect (`list`, defaults to [0.75, 1.5]): Range of their height / width.
        context_scale (`list`, defaults to [0.85, 1.0]):
            Range of the area of the context's block, from which the targets are taken out.
        context_loss_weight (`float`, defaults to 0.0):
            Weight of the loss on the patches of the context, which the predictor then predicts too, as in V-JEPA 2.1
            (arXiv 2603.14482); each counts less by the square root of its distance, in patches, to the target block.
        momentum (`float`, defaults to 0.996): Momentum of the teacher at the start; 1 at the end, along half a cosine
            as of all teachers here (the paper's goes along a line).
    """

    model_type = "vlm_ijepa"
    sub_configs = {"backbone_config": VLMViTConfig, "predictor_config": VLMViTConfig}
    batch_scaled_momentum: ClassVar[tuple[str, ...]] = ("momentum",)
    trained_encoder: ClassVar[str] = "teacher.backbone"  # the one that is evaluated in the paper

    predictor_config: Any = None
    num_targets: int = 4
    target_scale: list[float] | tuple[float, ...] = (0.15, 0.2)
    target_aspect: list[float] | tuple[float, ...] = (0.75, 1.5)
    context_scale: list[float] | tuple[float, ...] = (0.85, 1.0)
    context_loss_weight: float | int = 0.0
    momentum: float | int = 0.996

    def __post_init__(self, **kwargs: Any) -> None:
        encoder = as_vit_config(self.backbone_config, position_embedding_type="sincos", use_class_token=False)
        of_encoder = {name: getattr(encoder, name) for name in ("image_size", "patch_size", "num_channels")}
        self.backbone_config = encoder
        self.predictor_config = as_vit_config(self.predictor_config, **PREDICTOR_DEFAULTS, **of_encoder)
        super().__post_init__(**kwargs)
        for name, most in (("target_scale", 1.0), ("target_aspect", float("inf")), ("context_scale", 1.0)):
            values = getattr(self, name)
            if len(values) != 2 or not 0 < values[0] <= values[1] <= most:
                raise ValueError(
                    f"IJEPAConfig: {name} must be two rising numbers above 0"
                    f"{' and up to 1' if most == 1 else ''}, but is {list(values)}."
                )
        if self.context_loss_weight < 0:
            raise ValueError(f"IJEPAConfig: context_loss_weight must be 0 or more, but is {self.context_loss_weight}.")
        if self.num_targets < 1 or self.num_targets * self.target_scale[1] >= 1:
            raise ValueError(
                f"IJEPAConfig: {self.num_targets} target blocks of up to {self.target_scale[1]:g} of the image leave "
                "no context for sure: num_targets x the larger target_scale must lie above 0 and below 1."
            )


def sample_blocks(config: IJEPAConfig, num_images: int, grid_hw: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Indices of the context (images, context) and of the targets (images, num_targets, patches), on the CPU."""
    return context_and_targets(
        num_images,
        grid_hw,
        num_targets=config.num_targets,
        target_scale=config.target_scale,
        target_aspect=config.target_aspect,
        context_scale=config.context_scale,
    )


def nearest_distances(indices: Tensor, others: Tensor, num_columns: int) -> Tensor:
    """(batch, n): distance, in patches, of row-major indices (batch, n) to the nearest of others (batch, m)."""
    here, there = (
        torch.stack([i.div(num_columns, rounding_mode="floor"), i % num_columns], dim=-1).float()
        for i in (indices, others)
    )
    return torch.cdist(here, there).amin(-1)


@auto_docstring
@dataclass
class IJEPAOutput(ModelOutput):
    r"""
    loss (`torch.FloatTensor` of shape `()`):
        Smooth-L1 distance of predicted and true features. It may rise for long while the features become richer and
        so harder to predict: that is normal. Judge a run by `feature_std`, and by kNN or linear accuracy.
    predictions (`torch.FloatTensor` of shape `(num_targets * images, patches, hidden_size)`):
        Predicted features of the target blocks, the first block of all images first.
    feature_std (`torch.FloatTensor` of shape `()`):
        Standard deviation over the images of the targets at one position: 1 when spread evenly, 0 when the teacher
        gives the same for all images: a collapse. A fresh encoder distinguishes positions rather than images, and
        starts near 0.
    """

    loss: Tensor | None = None
    predictions: Tensor | None = None
    feature_std: Tensor | None = None


@auto_docstring
class IJEPAForPreTraining(TeacherMixin, SSLPreTrainedModel):
    """An encoder of a part of the image, and a predictor of a teacher's features of the other blocks.

    Compiled, a step is one graph after the masks, which are sampled outside it. Their sizes differ from step to step:
    the first steps recompile until sizes are variables of the graph, later ones do not.
    """

    config_class = IJEPAConfig
    # The paper's only augmentation is the crop.
    default_views = {"num_views": 1, "crop_scale": [0.3, 1.0], "flip_probability": 0.0}

    def __init__(self, config: IJEPAConfig):
        super().__init__(config)
        size = config.backbone_config.hidden_size
        self.backbone = VLMViTModel(config.backbone_config)
        self.predictor = MaskedPredictor(config.predictor_config, size, size)
        self.build_teacher("backbone")
        self.post_init()

    def finish_init(self) -> None:
        self.shrink_layers()
        super().finish_init()

    def shrink_layers(self) -> None:
        """The deeper a layer, the less it adds at first, as in BEiT (arXiv 2106.08254).

        The official constructor does this too, but `init_model` then initialises all linear layers again, with a
        deviation of 0.02. This, and Xavier's rule in the predictor, gave better features in narrow encoders
        (benchmarks/RESULTS.md, "Initial weights of narrow layers").
        """
        for layers in (self.backbone.layers, self.predictor.layers):
            for depth, layer in enumerate(layers, start=1):
                weights: Any = layer.output_weights
                for weight in weights:
                    init.copy_(weight, weight / math.sqrt(2 * depth))

    @returns_loss
    @auto_docstring
    def forward(
        self,
        pixel_values: Tensor,
        context_indices: Tensor | None = None,
        target_indices: Tensor | None = None,
    ) -> IJEPAOutput:
        r"""
        pixel_values (`torch.FloatTensor` of shape `(batch, views, channels, height, width)` or without views):
            Images; each view counts as an image.
        context_indices (`torch.LongTensor` of shape `(batch * views, context)`, *optional*):
            Row-major indices of the patches that the encoder sees; sampled, with the targets, when not given.
        target_indices (`torch.LongTensor` of shape `(batch * views, num_targets, patches)`, *optional*):
            Row-major indices of the patches of each target block.
        """
        images = flatten_views(pixel_values)
        grid_hw = patch_grid(images, self.config.backbone_config.patch_hw)
        if (context_indices is None) != (target_indices is None):
            raise ValueError("context_indices and target_indices belong together: give both or none.")
        if context_indices is None or target_indices is None:
            context_indices, target_indices = self._blocks(images.shape[0], grid_hw, images.device)
        features = self._targets(images)  # (images, patches, dim)
        encoded = self.backbone(images, visible_indices=context_indices).last_hidden_state
        # One prediction per block, none of which sees another: all first blocks, then all second ones.
        blocks = target_indices.transpose(0, 1)  # (num_targets, images, patches of a block)
        contexts, targets = context_indices.repeat(blocks.shape[0], 1), blocks.flatten(0, 1)
        encoded, features_per_block = (tokens.repeat(blocks.shape[0], 1, 1) for tokens in (encoded, features))
        weight = self.config.context_loss_weight
        predictions = self.predictor(encoded, contexts, targets, grid_hw, with_visible=weight > 0)
        of_context, of_targets = predictions[:, : -targets.shape[1]], predictions[:, -targets.shape[1] :]
        loss = F.smooth_l1_loss(of_targets.float(), gather_tokens(features_per_block, targets))
        if weight > 0:
            errors = F.smooth_l1_loss(
                of_context.float(), gather_tokens(features_per_block, contexts), reduction="none"
            ).mean(-1)  # (num_targets * images, context)
            loss = loss + weight * (errors / nearest_distances(contexts, targets, grid_hw[1]).sqrt()).mean()
        return IJEPAOutput(
            loss=loss,
            predictions=of_targets,  # (num_targets * images, patches of a block, dim)
            feature_std=feature_std(features.flatten(1)),
        )

    @torch.no_grad()
    def _targets(self, images: Tensor) -> Tensor:
        """The teacher's features of all patches, normalised each: (images, patches, dim) float32."""
        with self.teaching():
            tokens = self.teacher["backbone"](images).last_hidden_state
        patches = tokens[:, self.config.backbone_config.num_prefix_tokens :].float()
        return F.layer_norm(patches, patches.shape[-1:])

    @torch.compiler.disable
    def _blocks(self, num_images: int, grid_hw: tuple[int, int], device: torch.device) -> list[Tensor]:
        """`sample_blocks` on the device; from pinned memory the host need not wait for the copy."""
        blocks = sample_blocks(self.config, num_images, grid_hw)
        return [(t.pin_memory() if device.type == "cuda" else t).to(device, non_blocking=True) for t in blocks]

    @staticmethod
    def sample_mask(
        config: IJEPAConfig, grid_hw: tuple[int, int], num_images: int, device: torch.device | None = None
    ) -> Tensor:
        context = sample_blocks(config, num_images, grid_hw)[0].to(device)
        return ~mask_from_indices(context, grid_hw[0] * grid_hw[1])


__all__ = ["IJEPAConfig", "IJEPAForPreTraining", "IJEPAOutput"]
