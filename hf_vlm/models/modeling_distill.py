"""Distillation: an encoder learns the features of a frozen one, from the Hub or from a run of this package."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import AutoConfig
from transformers import initialization as init
from transformers.utils import ModelOutput, auto_docstring

from .configuration_vlm_vit import VLMViTConfig
from .modeling_vlm_vit import VLMViTModel
from .ranks import gather_with_gradient, sum_over_ranks, world_size
from .self_initialised import SelfInitialised
from .ssl_frozen import (
    FrozenEncoderMixin,
    feature_width,
    frozen_features,
    nearest_hw,
    patch_size_of,
    read_frozen,
    renormalise,
    resize_map,
)
from .ssl_layers import flatten_views
from .ssl_model import SSLConfig, SSLPreTrainedModel, as_vit_config, returns_loss
from .ssl_prototypes import cross_entropy
from .ssl_state import Float32State
from .vit_layers import patch_grid


@strict
class DistillConfig(SSLConfig):
    r"""Configuration of [`DistillForPreTraining`].

    Args:
        backbone_config (`VLMViTConfig` or `dict`, *optional*): The encoder that learns.
        teacher (`str`):
            The encoder that it learns from: a folder or Hub id of a model of transformers whose last layer has one
            token per patch or is a map (ViT, DINOv2, DINOv3, CLIP, SigLIP, ConvNeXt, ...), or of an encoder of this
            package. Code that comes with a model is never run.
        teacher_revision (`str`, *optional*): Commit of a teacher on the Hub. The one that is found is kept here.
        teacher_config (`PreTrainedConfig` or `dict`, *optional*): The teacher's configuration; read when not given.
        teacher_mean, teacher_std (`list`, *optional*):
            Normalisation, of pixels in 0..1, that the teacher was trained with; read from its image processor when not
            given.
        teacher_image_size (`int` or `(height, width)`, *optional*):
            Pixels that the teacher sees, multiples of its patch. When not given, the images' own size, rounded to its
            patch: more makes the teacher's map finer, and each step more expensive.
        image_mean, image_std (`list`, *optional*):
            Normalisation of the images that `forward` is given; ImageNet's for three channels when not given, else
            0.5.
        image_weight (`float`, defaults to 1.0):
            Weight, beside the patches' loss, of that of the whole image: the class token of either encoder, or the
            mean of its patches where it has none.
        queue_size (`int`, defaults to 2048):
            The teacher's features of that many images are compared with each image's.
        temperature (`float`, defaults to 0.07): Temperature of these similarities.
    """

    model_type = "vlm_distill"
    sub_configs = {"backbone_config": VLMViTConfig, "teacher_config": AutoConfig}
    needs_image_statistics: ClassVar[bool] = True
    renamed_fields: ClassVar[dict[str, str]] = {"class_token_weight": "image_weight"}

    teacher: str = ""
    teacher_revision: str | None = None
    teacher_config: Any = None
    teacher_mean: list[float] | tuple[float, ...] | None = None
    teacher_std: list[float] | tuple[float, ...] | None = None
    teacher_image_size: int | list[int] | tuple[int, int] | None = None
    image_mean: list[float] | tuple[float, ...] | None = None
    image_std: list[float] | tuple[float, ...] | None = None
    image_weight: float | int = 1.0
    queue_size: int = 2048
    temperature: float = 0.07

    def __post_init__(self, **kwargs: Any) -> None:
        self.backbone_config = as_vit_config(self.backbone_config)
        read_frozen(self, "teacher")
        super().__post_init__(**kwargs)
        self.check_range(0, math.inf, "image_weight")
        self.check_range(1, math.inf, "queue_size")
        self.check_range(1e-3, math.inf, "temperature")
        if self.teacher_config is None:
            return  # as transformers' own comparison with the defaults makes it
        patch_hw = patch_size_of(self.teacher_config)
        if any(side % patch for side, patch in zip(self.teacher_hw(patch_hw), patch_hw)):
            raise ValueError(
                f"DistillConfig: teacher_image_size {self.teacher_image_size} is not a multiple of the teacher's "
                f"patch, {patch_hw[0]} x {patch_hw[1]} pixels."
            )

    def external_weights(self) -> list[str]:
        return [self.teacher] if self.teacher else []

    def teacher_hw(self, image_hw: tuple[int, int]) -> tuple[int, int]:
        """Height and width at which the teacher sees images of `image_hw`."""
        size = self.teacher_image_size
        if size is None:
            return nearest_hw(image_hw, patch_size_of(self.teacher_config))
        height, width = (size, size) if isinstance(size, int) else size
        return height, width


@auto_docstring
@dataclass
class DistillOutput(ModelOutput):
    r"""
    loss (`torch.FloatTensor` of shape `()`): Distance of the patches and of the whole image.
    patch_cosine (`torch.FloatTensor` of shape `()`): Mean cosine of predicted and true patch features: 1 at best.
    patch_smooth_l1 (`torch.FloatTensor` of shape `()`): Their mean smooth-L1 distance.
    image_kl (`torch.FloatTensor` of shape `()`):
        Mean divergence of an image's predicted similarities to those of the queue from the teacher's: 0 at best.
    image_cosine (`torch.FloatTensor` of shape `()`): Mean cosine of predicted and true features of the whole image.
    """

    loss: Tensor | None = None
    patch_cosine: Tensor | None = None
    patch_smooth_l1: Tensor | None = None
    image_kl: Tensor | None = None
    image_cosine: Tensor | None = None


class RunningStandardizer(Float32State, SelfInitialised):
    """Features (rows, size) with mean 0 and deviation 1 per dimension, by the statistics of all batches so far.

    A teacher's dimensions differ by orders of magnitude, and have means that are the same for every image: cosines of
    raw features are near 1 whatever the student predicts. The statistics are of all batches of a training so far and
    of all ranks, and are saved.
    """

    mean: Tensor
    variance: Tensor
    num_batches: Tensor

    def __init__(self, size: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(size, dtype=torch.float32))
        self.register_buffer("variance", torch.ones(size, dtype=torch.float32))
        self.register_buffer("num_batches", torch.zeros((), dtype=torch.float32))

    def init_parameters(self) -> None:
        init.zeros_(self.mean)
        init.ones_(self.variance)
        init.zeros_(self.num_batches)

    @torch.no_grad()
    def forward(self, features: Tensor) -> Tensor:
        features = features.float()
        if self.training:
            self._update(features)
        return (features - self.mean) * torch.rsqrt(self.variance + 1e-6)

    def _update(self, features: Tensor) -> None:
        count = features.shape[0] * world_size()
        mean = sum_over_ranks(features.sum(0)) / count  # (size,)
        variance = sum_over_ranks((features - mean).square().sum(0)) / count
        self.num_batches += 1
        weight, moved = 1 / self.num_batches, mean - self.mean  # all batches count the same
        self.variance.copy_(self.variance + weight * (variance - self.variance + (1 - weight) * moved.square()))
        self.mean.copy_(self.mean + weight * moved)


class FeatureQueue(Float32State, SelfInitialised):
    """The last `size` features (size, dim) that it was given in training, by all ranks, L2-normalised; zeros at first.

    Zeros are as similar to every feature. The queue is saved.
    """

    features: Tensor
    num_seen: Tensor

    def __init__(self, size: int, dim: int):
        super().__init__()
        self.register_buffer("features", torch.zeros(size, dim, dtype=torch.float32))
        self.register_buffer("num_seen", torch.zeros((), dtype=torch.int64))

    def init_parameters(self) -> None:
        init.zeros_(self.features)
        init.zeros_(self.num_seen)

    @torch.no_grad()
    def forward(self, features: Tensor) -> Tensor:
        """Adds features (rows, dim), the newest in place of the oldest, and returns all."""
        if not self.training:
            return self.features
        size = self.features.shape[0]
        new = gather_with_gradient(features)[-size:]  # of all ranks
        positions = (self.num_seen + torch.arange(new.shape[0], device=new.device)) % size
        queue = self.features.index_copy(0, positions, new)  # a copy, as the loss of a step keeps what it compared
        self.features.copy_(queue)
        self.num_seen += new.shape[0]
        return queue


def similarity_divergence(predictions: Tensor, targets: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """Mean KL divergence () of softmax(predictions x queue / temperature) from softmax(targets x queue / temperature).

    The images of the queue are pseudo-classes: what the teacher knows is which of them an image resembles, which is
    learned sooner than the values of its features (measured: benchmarks/RESULTS.md). SEED (arXiv 2101.04731) and
    lightly-train distil so.

    Args:
        predictions, targets: (rows, dim), L2-normalised.
        queue: (size, dim), L2-normalised.
    """
    cosines = targets @ queue.T  # (rows, size)
    similarities = (cosines / temperature).softmax(-1)
    divergence = cross_entropy(predictions @ queue.T, similarities, temperature)
    return (divergence - cross_entropy(cosines, similarities, temperature)).mean()


def feature_distance(predictions: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cosine and mean smooth-L1 distance of rows (rows, dim), in float32.

    The loss is 1 - cosine + distance, on standardised targets, as UNIC distils each teacher (arXiv 2408.05088);
    AM-RADIO (2312.06709) and Theia (2407.20179) weigh the same two.
    """
    predictions = predictions.float()
    cosine = F.cosine_similarity(predictions, targets, dim=-1).mean()
    return cosine, F.smooth_l1_loss(predictions, targets)


@auto_docstring
class DistillForPreTraining(FrozenEncoderMixin, SSLPreTrainedModel):
    """An encoder, and linear layers from its tokens to those of a frozen teacher, which is not saved with it."""

    config_class = DistillConfig
    frozen_name = "teacher"
    # Student and teacher see the same crop, in true colours, as a teacher helps most (arXiv 2106.05237).
    default_views = {"num_views": 1, "crop_scale": [0.2, 1.0], "flip_probability": 0.5}

    def __init__(self, config: DistillConfig):
        super().__init__(config)
        if config.teacher_config is None:
            raise ValueError("DistillConfig: there is no teacher: give a folder or a Hub id as teacher.")
        encoder = config.backbone_config
        width = feature_width(config.teacher_config, config.teacher_hw(encoder.image_hw))
        self.backbone = VLMViTModel(encoder)
        self.patch_head = nn.Linear(encoder.hidden_size, width)
        self.patch_targets = RunningStandardizer(width)
        if config.image_weight > 0:
            self.image_head = nn.Linear(encoder.hidden_size, width)
            self.image_targets = RunningStandardizer(width)
            self.image_queue = FeatureQueue(config.queue_size, width)
        self.post_init()
        self.load_frozen()

    @returns_loss
    @auto_docstring
    def forward(self, pixel_values: Tensor) -> DistillOutput:
        r"""
        pixel_values (`torch.FloatTensor` of shape `(batch, views, channels, height, width)` or without views):
            Images, normalised by `image_mean` and `image_std`; each view counts as an image.
        """
        images, encoder = flatten_views(pixel_values), self.config.backbone_config
        patches, image = self._targets(images)  # (batch, dim, rows, columns), (batch, dim)
        output = self.backbone(images)
        targets = resize_map(patches, patch_grid(images, encoder.patch_hw)).flatten(2).transpose(1, 2)
        patch_cosine, patch_distance = feature_distance(
            self.patch_head(output.last_hidden_state[:, encoder.num_prefix_tokens :]).flatten(0, 1),
            self.patch_targets(targets.flatten(0, 1)),
        )
        loss, of_image = 1 - patch_cosine + patch_distance, {}
        if self.config.image_weight > 0:
            divergence, cosine = self._compare_images(self.image_head(output.pooler_output), image)
            loss = loss + self.config.image_weight * divergence
            of_image = {"image_kl": divergence, "image_cosine": cosine}
        return DistillOutput(loss=loss, patch_cosine=patch_cosine, patch_smooth_l1=patch_distance, **of_image)

    def _compare_images(self, predictions: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """Divergence () and mean cosine () of predicted features of images (batch, dim) from the teacher's."""
        # bfloat16 would resolve cosines to 0.004, a twentieth of the temperature.
        with torch.autocast(predictions.device.type, enabled=False):
            targets = F.normalize(self.image_targets(features), dim=-1)  # float32, but for a model in float64
            predictions = F.normalize(predictions.to(targets.dtype), dim=-1)
            queue = self.image_queue(targets)
            divergence = similarity_divergence(predictions, targets, queue, self.config.temperature)
        return divergence, (predictions.detach() * targets).sum(-1).mean()

    @torch.no_grad()
    def _targets(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The teacher's features of patches (batch, dim, rows, columns) and of the image (batch, dim), in float32."""
        config = self.config
        images = resize_map(
            renormalise(images.float(), config, "teacher"), config.teacher_hw((images.shape[2], images.shape[3]))
        )
        patches, image = frozen_features(
            self.teacher, images.to(self.teacher.dtype), patch_size_of(config.teacher_config)
        )
        return patches.float(), image.float()


__all__ = [
    "DistillConfig",
    "DistillForPreTraining",
    "DistillOutput",
    "FeatureQueue",
    "RunningStandardizer",
    "feature_distance",
    "similarity_divergence",
]
