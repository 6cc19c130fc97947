"""SimCLR: contrastive learning of two views of each image (arXiv 2002.05709)."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers.utils import ModelOutput, auto_docstring
from transformers.utils.generic import can_return_tuple

from .modeling_vlm_vit import VLMViTModel, VLMViTPreTrainedModel
from .ssl_layers import (
    ProjectionHead,
    SSLConfig,
    check_views,
    feature_std,
    flatten_views_view_major,
    gather_with_gradient,
    rank,
)


@strict
class SimCLRConfig(SSLConfig):
    r"""Configuration of [`SimCLRForPreTraining`].

    Args:
        backbone_config (`VLMViTConfig` or `dict`, *optional*): The encoder.
        projection_hidden_size (`int`, defaults to 2048): Width of the projection head's hidden layers.
        projection_size (`int`, defaults to 128): Width of the projections that are compared.
        num_projection_layers (`int`, defaults to 3): Layers of the projection head (3 as in SimCLR v2); batch norm
            follows each, the last one too, as in the official code.
        temperature (`float`, defaults to 0.2): Temperature of the similarities. Between lightly-train's 0.1 and
            lightly's 0.5; solo-learn uses 0.2 on small images.
    """

    model_type = "vlm_simclr"

    projection_hidden_size: int = 2048
    projection_size: int = 128
    num_projection_layers: int = 3
    temperature: float | int = 0.2
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        if self.temperature <= 0:
            raise ValueError(f"SimCLRConfig: temperature must be positive, but is {self.temperature}.")
        super().__post_init__(**kwargs)


@auto_docstring
@dataclass
class SimCLROutput(ModelOutput):
    r"""
    loss (`torch.FloatTensor` of shape `()`): NT-Xent.
    projections (`torch.FloatTensor` of shape `(2 * batch, projection_size)`): Normalised; first views first.
    accuracy (`torch.FloatTensor` of shape `()`): Share of views whose nearest other view is their own partner.
    feature_std (`torch.FloatTensor` of shape `()`): Spread of the projections: 1 when even, 0 when alike, a collapse.
    """

    loss: Tensor | None = None
    projections: Tensor | None = None
    accuracy: Tensor | None = None
    feature_std: Tensor | None = None


class _ContrastiveCrossEntropy(torch.autograd.Function):
    """Cross entropy of similarities (queries, keys) with its gradient written out: a third of autograd's passes.

    logits = queries @ keys.T / temperature, and -inf where a query meets itself
    loss   = mean(logsumexp(logits) - logits[partner])
    d loss / d logits = (softmax(logits) - one_hot(partner)) / queries
    """

    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, keys: Tensor, own: Tensor, partners: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        logits = (queries / temperature) @ keys.T  # (queries, keys)
        logits.scatter_(1, own[:, None], float("-inf"))
        best, nearest = logits.max(dim=1)
        weights = logits.softmax(dim=1)  # (queries, keys)
        # The largest weight is exp(best - logsumexp).
        normaliser = best - weights.gather(1, nearest[:, None])[:, 0].log()
        loss = (normaliser - logits.gather(1, partners[:, None])[:, 0]).mean()
        ctx.save_for_backward(queries, keys, partners, weights)
        ctx.scale = 1 / (temperature * len(queries))
        accuracy = (nearest == partners).float().mean()
        ctx.mark_non_differentiable(accuracy)
        return loss, accuracy

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor, _: Any) -> Any:
        queries, keys, partners, weights = ctx.saved_tensors
        scale = gradient * ctx.scale
        of_queries = (weights @ keys - keys[partners]) * scale  # (queries, dim)
        of_keys = (weights.T @ queries).index_add_(0, partners, queries, alpha=-1) * scale  # (keys, dim)
        return of_queries, of_keys, None, None, None


def nt_xent(projections: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Normalised temperature-scaled cross entropy over the 2N views of all ranks.

    `projections` (2 x batch, dim) are L2-normalised, first views first. A view's positive is its partner, its
    negatives are all other views of all ranks; itself is left out of the denominator. Computed in float32: bfloat16
    is 0.06 coarse where logits are near 10. Returns the mean over the local views, and the top-1 accuracy.
    """
    projections = projections.float()
    num_local = len(projections)
    rows = torch.arange(num_local, device=projections.device)
    offset = rank() * num_local
    partners = (rows + num_local // 2) % num_local + offset
    keys = gather_with_gradient(projections)  # (world x 2 x batch, dim)
    keys = keys.view_as(keys)  # a function of one tensor given twice would not compile
    with torch.autocast(projections.device.type, enabled=False):
        loss, accuracy = _ContrastiveCrossEntropy.apply(projections, keys, rows + offset, partners, temperature)
    return loss, accuracy


@auto_docstring
class SimCLRForPreTraining(VLMViTPreTrainedModel):
    """An encoder with a projection head; partners are pulled together, all other images of the batch pushed apart."""

    config_class = SimCLRConfig
    # Views as in SimCLR, appendix A, at its strength 0.5 for CIFAR; crops from 0.2 on as in MoCo v3, not 0.08.
    default_views = {
        "num_views": 2,
        "crop_scale": [0.2, 1.0],
        "flip_probability": 0.5,
        "jitter": [0.4, 0.4, 0.4, 0.1],
        "jitter_probability": 0.8,
        "grayscale_probability": 0.2,
        "blur_probability": 0.5,
    }

    def __init__(self, config: SimCLRConfig):
        super().__init__(config)
        self.backbone = VLMViTModel(config.backbone_config)
        self.projection_head = ProjectionHead(
            config.backbone_config.hidden_size,
            config.projection_hidden_size,
            config.projection_size,
            num_layers=config.num_projection_layers,
            last_norm=True,
        )
        self.post_init()

    @can_return_tuple
    @auto_docstring
    def forward(self, pixel_values: Tensor, **kwargs: Any) -> SimCLROutput:
        r"""
        pixel_values (`torch.FloatTensor` of shape `(batch, 2, channels, height, width)`):
            Two views of each image.
        """
        views = flatten_views_view_major(
            check_views(pixel_values, num_views=2)
        )  # (2 * batch, channels, height, width)
        pooled = self.backbone(views, class_token_only=True).pooler_output  # (2 * batch, hidden_size)
        projections = F.normalize(self.projection_head(pooled).float(), dim=-1)  # (2 * batch, projection_size)
        loss, accuracy = nt_xent(projections, self.config.temperature)
        return SimCLROutput(
            loss=loss, projections=projections, accuracy=accuracy, feature_std=feature_std(projections)
        )


__all__ = ["SimCLRConfig", "SimCLRForPreTraining", "SimCLROutput", "nt_xent"]
