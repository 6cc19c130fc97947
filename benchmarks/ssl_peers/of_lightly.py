"""lightly's losses, heads and transforms on our encoder."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from hf_vlm import VLMViTModel
from hf_vlm.models.vit_layers import patch_grid

from .base import Peer


def lightly_colors(views: dict[str, Any], strength: float) -> dict[str, float]:
    """Our colour jitter as arguments of lightly's transforms, which multiply it by a strength."""
    names = ("cj_bright", "cj_contrast", "cj_sat", "cj_hue")
    colors = {name: value / strength for name, value in zip(names, views["jitter"])}
    colors |= {"cj_strength": strength, "cj_prob": views["jitter_probability"]}
    return colors | {"random_gray_scale": views["grayscale_probability"], "hf_prob": views["flip_probability"]}


def lightly_crops(views: dict[str, Any], image_size: int, **options: Any) -> Any:
    """lightly's transform to two large views and several small ones."""
    from lightly.transforms import DINOTransform

    local = views["local"]
    return DINOTransform(
        global_crop_size=image_size,
        global_crop_scale=tuple(views["crop_scale"]),
        local_crop_size=local["size"],
        local_crop_scale=tuple(local["crop_scale"]),
        n_local_views=local["num_views"],
        gaussian_blur=(views["blur_probability"],) * 3,
        **lightly_colors(views, strength=0.5),  # the only one that its second large view accepts
        **options,
    )


class LightlySimCLR(Peer):
    row = "simclr"

    def build(self, config: Any, views: dict[str, Any], normalise: dict[str, Any]) -> None:
        from lightly.loss import NTXentLoss
        from lightly.models.modules import SimCLRProjectionHead
        from lightly.transforms import SimCLRTransform

        sizes = config.projection_hidden_size, config.projection_size, config.num_projection_layers
        self.head = SimCLRProjectionHead(config.backbone_config.hidden_size, *sizes)
        self.loss = NTXentLoss(temperature=config.temperature)
        self.transform = SimCLRTransform(
            input_size=self.args.image_size,
            min_scale=views["crop_scale"][0],
            gaussian_blur=views["blur_probability"],
            normalize=normalise,
            **lightly_colors(views, strength=1.0),
        )

    def forward(self, views: list[Tensor], step: int) -> Tensor:
        first, second = (self.head(self.pooled(view)) for view in views)
        return self.loss(first, second)


class LightlyLeJEPA(Peer):
    row = "lejepa"

    def build(self, config: Any, views: dict[str, Any], normalise: dict[str, Any]) -> None:
        from lightly.loss import LeJEPALoss
        from lightly.models.modules import LeJEPAProjectionHead

        self.head = LeJEPAProjectionHead(
            config.backbone_config.hidden_size, config.projection_hidden_size, config.projection_size
        )
        self.loss = LeJEPALoss(config.sigreg_weight, sigreg_num_vectors=config.num_slices)
        self.transform = lightly_crops(views, self.args.image_size, solarization_prob=0.0, normalize=normalise)

    def forward(self, views: list[Tensor], step: int) -> Tensor:
        large, small = (self.head(self.pooled(torch.cat(group))) for group in (views[:2], views[2:]))
        large, small = (projected.unflatten(0, (-1, len(views[0]))) for projected in (large, small))
        return self.loss(global_proj=large, local_proj=small)


class LightlyDINOv2(Peer):
    row = "dinov2"

    def build(self, config: Any, views: dict[str, Any], normalise: dict[str, Any]) -> None:
        from lightly.loss import DINOLoss, IBOTPatchLoss, KoLeoLoss
        from lightly.models.modules import DINOv2ProjectionHead

        size = config.backbone_config.hidden_size
        sizes = size, config.head_hidden_size, config.bottleneck_size, config.num_prototypes
        self.head, teacher_head = DINOv2ProjectionHead(*sizes), DINOv2ProjectionHead(*sizes)
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, size))
        self.teacher = nn.ModuleDict({"backbone": copy.deepcopy(self.backbone), "head": teacher_head})
        self.teacher.requires_grad_(False)
        self.of_views = DINOLoss(config.num_prototypes, student_temp=config.student_temperature)
        self.of_patches = IBOTPatchLoss(config.num_prototypes, student_temp=config.student_temperature)
        self.koleo = KoLeoLoss()
        self.transform = lightly_crops(
            views,
            self.args.image_size,
            solarization_prob=views["views"][1]["solarize_probability"],
            normalize=normalise,
        )

    def forward(self, views: list[Tensor], step: int) -> Tensor:
        from lightly.models.utils import random_block_mask
        from lightly.utils.scheduler import linear_warmup_schedule

        config, large = self.config, torch.cat(views[:2])
        mask = random_block_mask(
            (len(large), *patch_grid(large, config.backbone_config.patch_hw)),
            min_num_masks_per_block=1,  # its default of 4 is more than a tenth of a small image
            device=large.device,
        )
        masked = mask.flatten(1)  # (2 * batch, patches)
        with torch.no_grad():
            tokens = self.teacher["backbone"](large).last_hidden_state
            targets = self.teacher["head"](tokens[:, 0])
            patch_targets = self.teacher["head"](tokens[:, 1:][masked])
        tokens = self.backbone(large, masked=masked, mask_token=self.mask_token).last_hidden_state
        logits = torch.cat([self.head(tokens[:, 0]), self.head(self.pooled(torch.cat(views[2:])))])
        num_warmup = int(config.teacher_temperature_warmup * self.args.max_steps)
        bounds = config.warmup_teacher_temperature, config.teacher_temperature
        temperature = linear_warmup_schedule(step, num_warmup, *bounds)
        dino = self.of_views(targets.chunk(2), logits.chunk(len(views)), teacher_temp=temperature)
        ibot = self.of_patches(patch_targets, self.head(tokens[:, 1:][masked]), mask, teacher_temp=temperature)
        koleo = sum(self.koleo(view) for view in tokens[:, 0].chunk(2))
        return dino + config.ibot_weight * ibot + config.koleo_weight * koleo

    def after_step(self, step: int) -> None:
        from lightly.models.utils import update_momentum
        from lightly.utils.scheduler import cosine_schedule

        momentum = cosine_schedule(step, self.args.max_steps, self.config.momentum, 1.0)
        update_momentum(self.backbone, self.teacher["backbone"], m=momentum)
        update_momentum(self.head, self.teacher["head"], m=momentum)

    @property
    def trained_encoder(self) -> VLMViTModel:
        return self.teacher["backbone"]
