"""LeJEPA: views agree, and features are held to an isotropic Gaussian (arXiv 2511.08544), written from the paper."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers.utils import ModelOutput, auto_docstring

from .modeling_vlm_vit import VLMViTModel
from .ranks import rank, sum_over_ranks, world_size
from .ssl_layers import ProjectionHead, check_local_views, check_views, flatten_views_view_major
from .ssl_model import SSLConfig, SSLPreTrainedModel, returns_loss


@strict
class LeJEPAConfig(SSLConfig):
    r"""Configuration of [`LeJEPAForPreTraining`].

    Args:
        backbone_config (`VLMViTConfig` or `dict`, *optional*): The encoder.
        projection_hidden_size (`int`, defaults to 2048): Width of the projection head's hidden layers.
        projection_size (`int`, defaults to 64): Width of the projections; 16 does for small encoders and data.
        sigreg_weight (`float`, defaults to 0.05): Weight of SIGReg, the rest being that of the invariance; 0.02 for
            small data.
        join_views (`bool`, defaults to `False`):
            Whether SIGReg takes all views of a batch as one sample, as stable-pretraining's LeJEPA does, and not each
            view as one, as the paper does. A weight is then stronger by the number of views, and the sample larger,
            which helps small batches.
        num_slices (`int`, defaults to 1024): Random directions in which the distribution is tested, new each time.
        num_knots (`int`, defaults to 17): Points of the characteristic function, from 0 to `max_knot`.
        max_knot (`float`, defaults to 3.0): The last of them.
    """

    model_type = "vlm_lejepa"

    projection_hidden_size: int = 2048
    projection_size: int = 64
    sigreg_weight: float | int = 0.05
    join_views: bool = False
    num_slices: int = 1024
    num_knots: int = 17
    max_knot: float | int = 3.0

    def __post_init__(self, **kwargs: Any) -> None:
        self.check_range(0, 1, "sigreg_weight")
        self.check_range(2, math.inf, "num_knots")
        super().__post_init__(**kwargs)


@auto_docstring
@dataclass
class LeJEPAOutput(ModelOutput):
    r"""
    loss (`torch.FloatTensor` of shape `()`): Weighted sum of the two parts.
    invariance (`torch.FloatTensor` of shape `()`): Squared distance of views to the mean of the large ones.
    sigreg (`torch.FloatTensor` of shape `()`):
        Distance of the projections' distribution to a Gaussian: about 1 for a sample of one, and in proportion to the
        batch for anything else.
    feature_std (`torch.FloatTensor` of shape `()`):
        Mean standard deviation of the projections: 1 is what SIGReg aims at, 0 a collapse. They are not normalised
        before, which would hide a collapse into the origin.
    """

    loss: Tensor | None = None
    invariance: Tensor | None = None
    sigreg: Tensor | None = None
    feature_std: Tensor | None = None


def _waves(samples: Tensor, num_knots: int, spacing: float) -> Iterator[tuple[int, Tensor, Tensor]]:
    """k, cos(k x spacing x samples) and sin(...) of each knot k, one at a time.

    An angle is added to the last by one rotation, so that a cosine is computed once for all knots.
    """
    step_cos, step_sin = (samples * spacing).cos(), (samples * spacing).sin()
    cos, sin = torch.ones_like(samples), torch.zeros_like(samples)
    for knot in range(num_knots):
        yield knot, cos, sin
        cos, sin = cos * step_cos - sin * step_sin, sin * step_cos + cos * step_sin


class _EppsPulley(torch.autograd.Function):
    """The Epps-Pulley statistic of `samples` (samples, rows, slices) of all ranks, with its gradient written out.

    Kept for the gradient are the samples and one mean per knot; autograd would keep each sample's waves at each knot.
    """

    @staticmethod
    def forward(ctx: Any, samples: Tensor, num_knots: int, max_knot: float) -> Tensor:
        spacing = max_knot / (num_knots - 1)
        knots = torch.arange(num_knots, device=samples.device) * spacing
        target = (-knots.square() / 2).exp()  # the characteristic function of a standard normal, and the window
        weights = torch.full_like(knots, 2 * spacing)  # trapezoids, for both signs of t
        weights[0] = weights[-1] = spacing
        weights = weights * target
        sums = [torch.stack([cos.sum(1), sin.sum(1)]) for _, cos, sin in _waves(samples, num_knots, spacing)]
        count = samples.shape[1] * world_size()
        means = sum_over_ranks(torch.stack(sums, dim=-1)) / count  # (2, samples, slices, knots)
        errors = torch.stack([means[0] - target, means[1]])
        ctx.save_for_backward(samples, errors * weights * knots)
        ctx.shape = num_knots, spacing
        ctx.scale = world_size() / errors[0, ..., 0].numel()  # DDP will average the gradients of all ranks
        return count * (errors.square().sum(0) @ weights).mean()

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> Any:
        samples, slopes = ctx.saved_tensors
        total = torch.zeros_like(samples)
        for knot, cos, sin in _waves(samples, *ctx.shape):
            of_cos, of_sin = slopes[..., knot][:, :, None]  # (samples, 1, slices) each
            total += of_sin * cos - of_cos * sin
        return total * (2 * ctx.scale * gradient), None, None


def sigreg(projections: Tensor, slices: Tensor, num_knots: int = 17, max_knot: float = 3.0) -> Tensor:
    """How far projections are from a standard normal distribution, seen from random directions: SIGReg.

    N x integral of |ECF(t) - exp(-t^2 / 2)|^2 exp(-t^2 / 2) dt over -max_knot to max_knot, ECF being the empirical
    characteristic function of the N rows of all ranks along a direction; the mean over directions and samples.

    Args:
        projections: (samples, rows, dim) of this rank, float32, a sample being what is tested by itself.
        slices: (dim, slices) unit directions, the same on all ranks.

    Returns:
        (): 0 for a perfect fit; the same on all ranks.
    """
    return _EppsPulley.apply(projections @ slices, num_knots, max_knot)  # type: ignore[no-any-return]


def invariance(projections: Tensor, num_large: int) -> Tensor:
    """Mean squared distance of all views (views, rows, dim) to the mean of the first `num_large`."""
    return (projections - projections[:num_large].mean(0)).square().mean()


def sample_slices(dim: int, num_slices: int, device: torch.device) -> Tensor:
    """Random unit directions (dim, num_slices), those of the first rank everywhere."""
    slices = torch.randn(dim, num_slices, device=device)
    return F.normalize(slices if world_size() == 1 else sum_over_ranks(slices * (rank() == 0)), dim=0)


@auto_docstring
class LeJEPAForPreTraining(SSLPreTrainedModel):
    """An encoder with equal features for views of one image, kept from a collapse by their distribution alone."""

    config_class = LeJEPAConfig
    # Two large and six small views with BYOL's colours, as in the official README.
    default_views = {
        "num_views": 2,
        "crop_scale": [0.3, 1.0],
        "flip_probability": 0.5,
        "jitter": [0.4, 0.4, 0.2, 0.1],
        "jitter_probability": 0.8,
        "grayscale_probability": 0.2,
        "blur_probability": 0.5,
        "solarize_probability": 0.2,
        "local": {"num_views": 6, "size": 96, "crop_scale": [0.05, 0.3]},
    }

    def __init__(self, config: LeJEPAConfig):
        super().__init__(config)
        self.backbone = VLMViTModel(config.backbone_config)
        self.projection_head = ProjectionHead(
            config.backbone_config.hidden_size, config.projection_hidden_size, config.projection_size, num_layers=3
        )
        self.post_init()

    @returns_loss
    @auto_docstring
    def forward(
        self,
        pixel_values: Tensor,
        local_pixel_values: Tensor | None = None,
        slices: Tensor | None = None,
    ) -> LeJEPAOutput:
        r"""
        pixel_values (`torch.FloatTensor` of shape `(batch, views, channels, height, width)`):
            Large views of each image; their mean is the target of all views.
        local_pixel_values (`torch.FloatTensor` of shape `(batch, local_views, channels, h, w)`, *optional*):
            Small views.
        slices (`torch.FloatTensor` of shape `(projection_size, num_slices)`, *optional*):
            Unit directions of SIGReg; sampled when not given.
        """
        config, (batch, num_large) = self.config, check_views(pixel_values).shape[:2]
        crops = [pixel_values, *check_local_views(local_pixel_values, batch)]
        if sum(views.shape[1] for views in crops) < 2:
            raise ValueError("LeJEPA compares views of an image, but there is only one: set num_views to 2 or more.")
        encoded = self.backbone.encode_crops(
            [flatten_views_view_major(views) for views in crops], class_tokens_only=True
        )
        pooled = torch.cat([output.pooler_output for output in encoded])  # (all views * batch, hidden_size)
        projections = self.projection_head(pooled).float().unflatten(0, (-1, batch))  # (all views, batch, size)
        if slices is None:
            slices = sample_slices(config.projection_size, config.num_slices, pixel_values.device)
        samples = projections.flatten(0, 1)[None] if config.join_views else projections
        with torch.autocast(projections.device.type, enabled=False):
            distance = sigreg(samples, slices, config.num_knots, config.max_knot)
            agreement = invariance(projections, num_large)
        return LeJEPAOutput(
            loss=(1 - config.sigreg_weight) * agreement + config.sigreg_weight * distance,
            invariance=agreement,
            sigreg=distance,
            feature_std=projections[:num_large].detach().flatten(0, 1).std(0).mean(),
        )


__all__ = ["LeJEPAConfig", "LeJEPAForPreTraining", "LeJEPAOutput", "invariance", "sigreg"]
