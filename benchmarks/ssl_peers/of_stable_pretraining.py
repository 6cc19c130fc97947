"""stable-pretraining's models of methods on our encoder."""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from hf_vlm import VLMViTModel
from hf_vlm.models.vit_layers import patchify

from .base import Peer


class AsTimm(nn.Module):
    """Our encoder with timm's attribute names, for methods that use its parts; sin-cos positions only."""

    def __init__(self, encoder: VLMViTModel):
        super().__init__()
        self.encoder, self.embed_dim = encoder, encoder.config.hidden_size
        self.patch_embed = PatchEmbed(encoder)
        self.pos_drop, self.blocks, self.norm = nn.Identity(), nn.Sequential(*map(Block, encoder.layers)), encoder.norm
        self.cls_token = encoder.embeddings.class_token if encoder.config.use_class_token else None
        positions = encoder.embeddings.positions(encoder.config.grid_hw)
        prefix = positions.new_zeros(1, encoder.config.num_prefix_tokens, self.embed_dim)
        self.register_buffer("pos_embed", torch.cat([prefix, positions], dim=1))

    def forward(self, images: Tensor) -> Tensor:
        images = images.to(self.pos_embed.device)  # to find the width they pass an image on the CPU
        pooled: Tensor = self.encoder(images, class_token_only=True).pooler_output
        return pooled


class Block(nn.Module):
    """A layer, with those of its modules that a method initialises again."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer
        self.attn = SimpleNamespace(proj=layer.attention.projection)
        self.mlp = SimpleNamespace(fc2=layer.mlp.down_projection)

    def forward(self, tokens: Tensor) -> Tensor:
        changed: Tensor = self.layer(tokens)
        return changed


class PatchEmbed(nn.Module):
    """Embeds all patches: (batch, channels, height, width) to (batch, patches, hidden_size)."""

    def __init__(self, encoder: VLMViTModel):
        super().__init__()
        self.proj = encoder.embeddings.patch_projection
        self.patch_size, self.grid_size = encoder.config.patch_hw, encoder.config.grid_hw

    def forward(self, images: Tensor) -> Tensor:
        patches: Tensor = self.proj(patchify(images, self.patch_size))
        return patches


class StablePretraining(Peer):
    """A method as one of its models; its teachers are moving averages of the students."""

    packages = ("stable-pretraining",)
    model: nn.Module
    teachers: Sequence[Any] = ()

    def make_views(self, *views: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        """Sets `transform`; its transforms map one dict with an image to another."""
        from stable_pretraining.data.transforms import MultiViewTransform

        transform = MultiViewTransform(list(views))
        self.transform = lambda image: [view["image"] for view in transform({"image": image})["views"]]

    def forward(self, views: list[Tensor], step: int) -> Tensor:
        return self.model(*views).loss

    def after_step(self, step: int) -> None:
        for teacher in self.teachers:
            teacher.update_ema_coefficient(step, self.args.max_steps)
            teacher.update_teacher()


def view_of(size: int, views: dict[str, Any], normalise: dict[str, Any], solarize: float = 0.0) -> Any:
    """The transform to one of its views, with our settings."""
    from stable_pretraining.data import transforms

    parts = [
        transforms.RandomResizedCrop((size, size), scale=tuple(views["crop_scale"])),
        transforms.RandomHorizontalFlip(views["flip_probability"]),
    ]
    if "jitter" in views:
        parts += [
            transforms.ColorJitter(*views["jitter"], p=views["jitter_probability"]),
            transforms.RandomGrayscale(views["grayscale_probability"]),
            transforms.RandomSolarize(128, p=solarize),
        ]
    return transforms.Compose(*parts, transforms.ToImage(**normalise))


class StablePretrainingLeJEPA(StablePretraining):
    row = "lejepa"

    def build(self, config: Any, views: dict[str, Any], normalise: dict[str, Any]) -> None:
        from stable_pretraining.backbone import MLP
        from stable_pretraining.methods.lejepa import LeJEPA

        hidden = config.projection_hidden_size
        projector = MLP(config.backbone_config.hidden_size, [hidden, hidden, config.projection_size], "batch_norm")
        self.model = LeJEPA(
            "vit_tiny_patch16_224", projector=projector, n_slices=config.num_slices, lamb=config.sigreg_weight
        )
        del self.model.backbone  # the constructor accepts only timm's, by name
        self.model.backbone = self.pooled
        local = views["local"]
        large = view_of(self.args.image_size, views, normalise)
        small = view_of(local["size"], views | local, normalise)
        self.make_views(*[large] * 2, *[small] * local["num_views"])

    def forward(self, views: list[Tensor], step: int) -> Tensor:
        return self.model(global_views=views[:2], local_views=views[2:]).loss


class StablePretrainingMoCoV3(StablePretraining):
    row = "moco_v3"

    def build(self, config: Any, views: dict[str, Any], normalise: dict[str, Any]) -> None:
        from stable_pretraining.methods.mocov3 import MoCov3

        hidden = config.projection_hidden_size
        self.model = MoCov3(
            AsTimm(self.backbone),
            projector_dims=(hidden, hidden, config.projection_size),
            predictor_hidden_dim=hidden,
            temperature=config.temperature,
            ema_decay_start=config.momentum,
        )
        self.teachers = self.model.backbone, self.model.projector
        size, solarize = self.args.image_size, views["views"][1]["solarize_probability"]
        self.make_views(view_of(size, views, normalise), view_of(size, views, normalise, solarize))


class StablePretrainingSimMIM(StablePretraining):
    row = "simmim"

    def build(self, config: Any, views: dict[str, Any], normalise: dict[str, Any]) -> None:
        from stable_pretraining.methods.simmim import SimMIM

        self.model = SimMIM(
            AsTimm(self.backbone),
            patch_size=config.backbone_config.patch_size,
            mask_ratio=config.mask_ratio,
            image_size=self.args.image_size,
        )
        self.make_views(view_of(self.args.image_size, views, normalise))


class StablePretrainingIJEPA(StablePretraining):
    row = "ijepa"

    def build(self, config: Any, views: dict[str, Any], normalise: dict[str, Any]) -> None:
        from stable_pretraining.methods.ijepa import IJEPA

        self.model = IJEPA(
            AsTimm(self.backbone),
            predictor_embed_dim=config.predictor_config.hidden_size,
            predictor_depth=config.predictor_config.num_hidden_layers,
            ema_decay_start=config.momentum,
        )
        self.teachers = (self.model.encoder,)
        self.make_views(view_of(self.args.image_size, views, normalise))

    @property
    def trained_encoder(self) -> VLMViTModel:
        return self.model.encoder.teacher.vit.encoder
