"""DINOv2: self-distillation of images and of masked patches (arXiv 2304.07193), written from the paper."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers.utils import ModelOutput, auto_docstring

from .modeling_vlm_vit import VLMViTModel
from .ranks import gather_with_gradient, rank
from .ssl_layers import check_local_views, check_views, feature_std, flatten_views_view_major
from .ssl_masks import block_masking
from .ssl_model import SSLConfig, SSLPreTrainedModel, returns_loss
from .ssl_prototypes import Centering, PrototypeHead, cross_entropy, entropy, koleo_loss, sinkhorn
from .ssl_teacher import TeacherMixin, warm_up
from .vit_layers import patch_grid


@strict
class DINOv2Config(SSLConfig):
    r"""Configuration of [`DINOv2ForPreTraining`]; the defaults are the official ones of ViT-L/16 on ImageNet-1k.

    Args:
        backbone_config (`VLMViTConfig` or `dict`, *optional*): The encoder.
        num_prototypes (`int`, defaults to 65536): Prototypes of the head. A few thousand do for small data.
        head_hidden_size (`int`, defaults to 2048): Width of the head's MLP.
        bottleneck_size (`int`, defaults to 256): Width of what is compared with the prototypes.
        separate_heads (`bool`, defaults to `False`): Whether patches have a head of their own (the paper's long runs).
        student_temperature (`float`, defaults to 0.1): Temperature of the student.
        teacher_temperature (`float`, defaults to 0.07): Temperature of the teacher after warm-up; unstable above.
        warmup_teacher_temperature (`float`, defaults to 0.04): Temperature of the teacher at the start.
        teacher_temperature_warmup (`float`, defaults to 0.3): Fraction of training until the temperature is reached.
        momentum (`float`, defaults to 0.992): Momentum of the teacher at the start; 1 at the end.
        centering (`str`, defaults to `"sinkhorn"`): `"sinkhorn"` as in the paper, or `"centering"` by a running mean,
            as in DINO and in the official short runs.
        center_momentum (`float`, defaults to 0.9): Momentum of that mean.
        frozen_prototypes (`float`, defaults to 0.01): Fraction of training, at the start, in which the learning rate
            of prototypes is 0 (see `late_parameters`, which the package's trainer reads).
        mask_probability (`float`, defaults to 0.5): Fraction of the global views that are masked.
        mask_ratio_range (`list`, defaults to [0.1, 0.5]): Range of the fraction of their patches that is
            masked, spread evenly over the views.
        ibot_weight (`float`, defaults to 1.0): Weight of the loss of masked patches (iBOT, arXiv 2111.07832).
        koleo_weight (`float`, defaults to 0.1): Weight of KoLeo, which spreads features of different images.
    """

    model_type = "vlm_dinov2"
    batch_scaled_momentum: ClassVar[tuple[str, ...]] = ("momentum",)
    trained_encoder: ClassVar[str] = "teacher.backbone"  # the better of the two, as in the paper

    num_prototypes: int = 65536
    head_hidden_size: int = 2048
    bottleneck_size: int = 256
    separate_heads: bool = False
    student_temperature: float = 0.1
    teacher_temperature: float = 0.07
    warmup_teacher_temperature: float = 0.04
    teacher_temperature_warmup: float | int = 0.3
    momentum: float | int = 0.992
    centering: str = "sinkhorn"
    center_momentum: float | int = 0.9
    frozen_prototypes: float | int = 0.01
    mask_probability: float | int = 0.5
    mask_ratio_range: list[float] | tuple[float, ...] = (0.1, 0.5)
    ibot_weight: float | int = 1.0
    koleo_weight: float | int = 0.1

    def __post_init__(self, **kwargs: Any) -> None:
        if self.centering not in ("sinkhorn", "centering"):
            raise ValueError(f"DINOv2Config: centering is {self.centering!r}, but must be sinkhorn or centering.")
        ratios = list(self.mask_ratio_range)
        if len(ratios) != 2 or not 0 <= ratios[0] <= ratios[1] < 1:
            raise ValueError(f"DINOv2Config: mask_ratio_range must be two rising numbers in 0 to 1, but is {ratios}.")
        self.check_range(
            0, 1, "mask_probability", "center_momentum", "frozen_prototypes", "teacher_temperature_warmup"
        )
        self.check_range(0.001, math.inf, "student_temperature", "teacher_temperature", "warmup_teacher_temperature")
        self.check_range(0, math.inf, "ibot_weight", "koleo_weight")
        super().__post_init__(**kwargs)


@auto_docstring
@dataclass
class DINOv2Output(ModelOutput):
    r"""
    loss (`torch.FloatTensor` of shape `()`): Weighted sum of the parts.
    dino (`torch.FloatTensor` of shape `()`): Cross entropy of views with the teacher's other views.
    ibot (`torch.FloatTensor` of shape `()`): Cross entropy of masked patches with the teacher's, which sees them.
    koleo (`torch.FloatTensor` of shape `()`): Minus the mean log distance of images to their nearest, both views.
    teacher_entropy (`torch.FloatTensor` of shape `()`): Entropy of a view's target over the largest possible
        one. 1 is a collapse.
    teacher_marginal_entropy (`torch.FloatTensor` of shape `()`): Entropy of the mean target over the largest
        possible one. Near 0 is a collapse.
    feature_std (`torch.FloatTensor` of shape `()`):
        Standard deviation of the normalised class tokens x sqrt(dim): 1 when spread evenly, 0 when all are the
        same.
    """

    loss: Tensor | None = None
    dino: Tensor | None = None
    ibot: Tensor | None = None
    koleo: Tensor | None = None
    teacher_entropy: Tensor | None = None
    teacher_marginal_entropy: Tensor | None = None
    feature_std: Tensor | None = None


def masked_counts(config: DINOv2Config, grid_hw: tuple[int, int], num_images: int) -> list[int]:
    """Number of patches to mask per image: ratios evenly spread over the range for a part of the images, else 0."""
    low, high = config.mask_ratio_range
    num_masked = round(num_images * config.mask_probability)
    ratios = [low + (high - low) * (index + 0.5) / num_masked for index in range(num_masked)]
    return [max(1, round(ratio * grid_hw[0] * grid_hw[1])) for ratio in ratios] + [0] * (num_images - num_masked)


def view_loss(logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """Mean cross entropy of all pairs of a student's view and another view of the teacher.

    Args:
        logits: (views, batch, prototypes) of the student, the two large views first.
        targets: (2, batch, prototypes) of the teacher, which sees the large views.
        temperature: The student's.
    """
    num_small, batch = logits.shape[0] - 2, logits.shape[1]
    of_large = cross_entropy(logits[:2], targets.flip(0), temperature).sum()
    # The cross entropy is linear in the targets: a small view against both is twice that against their mean.
    of_small = 2 * cross_entropy(logits[2:], targets.mean(0), temperature).sum()
    return (of_large + of_small) / ((2 + 2 * num_small) * batch)


@auto_docstring
class DINOv2ForPreTraining(TeacherMixin, SSLPreTrainedModel):
    """A student that sees crops and masked images learns what its moving average predicts for whole ones."""

    config_class = DINOv2Config
    # DINO's: two large views with unequal blur and solarisation, eight small ones. DINOv2's code applies the blur with
    # one minus the probability that it is given: never and mostly.
    default_views = {
        "crop_scale": [0.32, 1.0],
        "flip_probability": 0.5,
        "jitter": [0.4, 0.4, 0.2, 0.1],
        "jitter_probability": 0.8,
        "grayscale_probability": 0.2,
        "views": [{"blur_probability": 1.0}, {"blur_probability": 0.1, "solarize_probability": 0.2}],
        "local": {"num_views": 8, "size": 96, "crop_scale": [0.05, 0.32], "blur_probability": 0.5},
    }

    def __init__(self, config: DINOv2Config):
        super().__init__(config)
        size = config.backbone_config.hidden_size
        sizes = size, config.head_hidden_size, config.bottleneck_size, config.num_prototypes
        self.backbone = VLMViTModel(config.backbone_config)
        self.head = PrototypeHead(*sizes)
        if config.separate_heads:
            self.patch_head = PrototypeHead(*sizes)
        self.mask_token = nn.Parameter(torch.empty(1, 1, size))
        if config.centering == "centering":
            self.view_targets = Centering(config.num_prototypes, config.center_momentum)
            self.patch_targets = Centering(config.num_prototypes, config.center_momentum)
        self.build_teacher("backbone", "head", *(["patch_head"] if config.separate_heads else []))
        self.post_init()

    @returns_loss
    @auto_docstring
    def forward(
        self,
        pixel_values: Tensor,
        local_pixel_values: Tensor | None = None,
        masked: Tensor | None = None,
    ) -> DINOv2Output:
        r"""
        pixel_values (`torch.FloatTensor` of shape `(batch, 2, channels, height, width)`):
            Two large views of each image.
        local_pixel_values (`torch.FloatTensor` of shape `(batch, local_views, channels, h, w)`, *optional*):
            Small views, which only the student sees.
        masked (`torch.BoolTensor` of shape `(2 * batch, patches)`, *optional*):
            Patches that the student does not see, first views first; sampled when not given.
        """
        config, batch = self.config, pixel_values.shape[0]
        views = flatten_views_view_major(check_views(pixel_values, num_views=2))  # (2 * batch, channels, h, w)
        crops = [views, *map(flatten_views_view_major, check_local_views(local_pixel_values, batch))]
        masked, num_masked = self._masks(views, masked)
        # Masked patches in the order of the images; their number is known, so nothing waits for the device.
        chosen = masked.flatten().int().argsort(descending=True, stable=True)[:num_masked]
        view_targets, patch_targets = self._targets(views, chosen)

        encoded = self.backbone.encode_crops(crops, masked=masked, mask_token=self.mask_token)
        pooled = torch.cat([output.pooler_output for output in encoded])  # ((2 + local views) * batch, dim)
        view_logits, patch_logits = self._apply_heads(self, pooled, self._patches(encoded[0])[chosen])

        dino = view_loss(
            view_logits.unflatten(0, (-1, batch)), view_targets.unflatten(0, (2, batch)), config.student_temperature
        )
        of_patches = cross_entropy(patch_logits, patch_targets, config.student_temperature)  # (masked,)
        of_images = masked.sum(1)[chosen // masked.shape[1]]  # (masked,): masked patches in the image of each
        ibot = (of_patches / of_images).sum() / masked.shape[0]
        features = F.normalize(encoded[0].pooler_output.float(), dim=-1)  # (2 * batch, dim)
        spread = torch.stack([self._koleo(view) for view in features.chunk(2)]).sum()
        return DINOv2Output(
            loss=dino + config.ibot_weight * ibot + config.koleo_weight * spread,
            dino=dino,
            ibot=ibot,
            koleo=spread,
            teacher_entropy=entropy(view_targets),
            teacher_marginal_entropy=entropy(view_targets.mean(0, keepdim=True)),
            feature_std=feature_std(features),
        )

    def _masks(self, views: Tensor, masked: Tensor | None) -> tuple[Tensor, int]:
        """Masks (2 * batch, patches) and the number of masked patches; sampled, unless given."""
        if masked is not None:
            return masked, int(masked.sum())
        grid_hw = patch_grid(views, self.config.backbone_config.patch_hw)
        masked = self.sample_mask(self.config, grid_hw, views.shape[0], views.device)
        return masked, sum(masked_counts(self.config, grid_hw, views.shape[0]))

    @staticmethod
    def sample_mask(
        config: DINOv2Config, grid_hw: tuple[int, int], num_images: int, device: torch.device | None = None
    ) -> Tensor:
        counts = torch.tensor(masked_counts(config, grid_hw, num_images)).to(device, non_blocking=True)
        return block_masking(counts[torch.randperm(num_images, device=device)], grid_hw)

    @torch.no_grad()
    def _targets(self, views: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """The teacher's assignments of views (2 * batch, prototypes) and of chosen patches (masked, prototypes)."""
        config = self.config
        with self.teaching():
            encoded = self.teacher["backbone"](views)
            logits = self._apply_heads(self.teacher, encoded.pooler_output, self._patches(encoded)[chosen])
        temperature = warm_up(
            config.warmup_teacher_temperature,
            config.teacher_temperature,
            self.progress,
            config.teacher_temperature_warmup,
        )
        if config.centering == "sinkhorn":
            return sinkhorn(logits[0], temperature), sinkhorn(logits[1], temperature)
        return self.view_targets(logits[0], temperature), self.patch_targets(logits[1], temperature)

    def _patches(self, encoded: Any) -> Tensor:
        """Patch tokens of all images in one list (images * patches, dim)."""
        return encoded.last_hidden_state[:, self.config.backbone_config.num_prefix_tokens :].flatten(0, 1)

    @staticmethod
    def _koleo(features: Tensor) -> Tensor:
        with torch.autocast(features.device.type, enabled=False):
            return koleo_loss(features, gather_with_gradient(features), rank() * features.shape[0])

    def _apply_heads(self, part: Any, pooled: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of views and of patches by the heads of student or teacher; one that serves both is applied once."""
        if self.config.separate_heads:
            return part.head(pooled), part.patch_head(patches)
        logits = part.head(torch.cat([pooled, patches]))
        return logits[: pooled.shape[0]], logits[pooled.shape[0] :]

    def late_parameters(self) -> dict[str, float]:
        """The student's prototypes, by `frozen_prototypes`."""
        heads = ("head", "patch_head") if self.config.separate_heads else ("head",)
        return dict.fromkeys((f"{head}.prototypes.weight" for head in heads), self.config.frozen_prototypes)


__all__ = ["DINOv2Config", "DINOv2ForPreTraining", "DINOv2Output"]
