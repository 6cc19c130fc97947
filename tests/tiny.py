"""One table of tiny models: name -> fields of the configuration, and the batch that the model is given.

A name is that of a row of the registry, or of a variant of one. A new method or task adds one entry, and has with it
the tests that all have in common: two ranks, no waiting and no recompilation, one batch learned, reloading by remote
code.
"""

import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from hf_vlm.models.configuration_vlm_vit import VLMViTConfig
from hf_vlm.models.image_processing_vlm_vit import VLMViTImageProcessor
from hf_vlm.models.modeling_vlm_vit import VLMViTModel
from hf_vlm.models.ssl_masks import context_and_targets
from hf_vlm.registry import MODELS
from hf_vlm.training.texts import train_tokenizer

BACKBONE = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SPARSE = {"num_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 1.0}
DECODER = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


@dataclass(frozen=True)
class Tiny:
    """A row of the registry, how small it is built, and what its `forward` takes.

    Args:
        row: Name of the row.
        fields: Fields of the configuration beside `backbone_config`.
        num_views: Views of each image; 0 for models that take images without an axis of views.
        has_local_views: Whether there are small views as well.
        image_hw: Height and width of the images.
        choices: What `forward` would sample, such as masks, for a number of images.
        inputs: What else a batch holds, such as texts, for a number of images.
        labels: Labels of a number of images.
        frozen: Field that names the folder of a frozen encoder, where the method has one.
        backbone: Changes of `BACKBONE`.
    """

    row: str
    fields: dict[str, Any] = field(default_factory=dict)
    num_views: int = 1
    has_local_views: bool = False
    image_hw: tuple[int, int] = (32, 32)
    choices: Callable[[int], dict[str, Any]] = lambda num_images: {}
    inputs: Callable[[int], dict[str, Any]] = lambda num_images: {}
    labels: Callable[[int], list[dict[str, Any]]] | None = None
    frozen: str | None = None
    backbone: dict[str, Any] = field(default_factory=dict)


def patch_noise(num_images):
    return {"noise": torch.rand(num_images, 16)}


def mask_block_noise(num_images):
    return {"noise": torch.rand(num_images, 6)}  # 2 x 3 mask blocks, the last row and column cut off


def masked_first_views(num_images):
    """As many patches of each image, so that halves of the batch weigh the same."""
    first = torch.rand(num_images, 16).argsort(dim=1) < 5
    return {"masked": torch.cat([first, torch.zeros_like(first)])}


def unit_slices(num_images):
    return {"slices": F.normalize(torch.randn(16, 16), dim=0)}


def block_indices(num_images):
    context, targets = context_and_targets(num_images, (4, 4))
    return {"context_indices": context, "target_indices": targets}


def boxes(num_images):
    counts = (4, 1, 0, 0, 1, 0)[:num_images]
    return [{"class_labels": torch.randint(3, (n,)), "boxes": torch.rand(n, 4) * 0.3 + 0.2} for n in counts]


def classes(num_images):
    return torch.randint(3, (num_images,))


def masks(num_images):
    """As many pixels without a class in each image, so that halves of the batch weigh the same."""
    labels = torch.randint(3, (num_images, 32, 32))
    labels[:, :8] = 255
    return labels


def instances(num_images):
    """Boxes with ellipses in them as masks."""
    y, x = torch.meshgrid(*[(torch.arange(32) + 0.5) / 32] * 2, indexing="ij")
    labels = boxes(num_images)
    for label in labels:
        centre_x, centre_y, width, height = label["boxes"][:, :, None, None].unbind(1)
        label["masks"] = ((x - centre_x) / width) ** 2 + ((y - centre_y) / height) ** 2 < 0.25
    return labels


def candidates(num_images):
    return {"points": torch.rand(num_images, 24, 2)}


def texts(num_images):
    """As many tokens in each text, so that halves of the batch weigh the same; the rest is padding."""
    mask = (torch.arange(6) < 4).long().expand(num_images, -1)
    return {"input_ids": torch.randint(1, 32, (num_images, 6)) * mask, "attention_mask": mask}


TEXT_MODEL = {
    "model_type": "bert",
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 8,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
IMAGE_TEXT = {"text_config": TEXT_MODEL, "projection_size": 16}
PROJECTION = {"projection_hidden_size": 32, "projection_size": 16}
MAE = {"decoder_config": DECODER}
LEJEPA = {**PROJECTION, "num_slices": 16}
DINOV2 = {"num_prototypes": 16, "head_hidden_size": 32, "bottleneck_size": 16, "frozen_prototypes": 0.0}
IMAGE_LOSSES = {
    **MAE,
    "perceptual_weight": 1.0,
    "adversarial_weight": 0.1,
    "adversarial_start": 0.0,
    "discriminator_size": 8,
}
FROZEN_STATISTICS = ([0.4, 0.5, 0.6], [0.2])
DETECTION_HEAD = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_decoder_layers": 1,
    "num_self_attention_heads": 4,
    "num_cross_attention_heads": 4,
    "num_queries": 5,
    "neck_num_blocks": 1,
}
DETECTION = DETECTION_HEAD | {"id2label": {0: "cat", 1: "dog", 2: "bird"}}
MASK_QUERIES = {
    "num_queries": 5,
    "num_query_layers": 1,
    "mask_feature_size": 16,
    "id2label": DETECTION["id2label"],
}
TINY = {
    "encoder": Tiny("encoder", num_views=0),
    "backbone": Tiny("backbone", num_views=0),
    "simclr": Tiny("simclr", PROJECTION, num_views=2),
    "moco_v3": Tiny("moco_v3", PROJECTION, num_views=2),
    "mae": Tiny("mae", MAE, choices=patch_noise),
    "mae_partial": Tiny("mae", {**MAE, "use_cross_attention": True, "prediction_ratio": 0.5}, choices=patch_noise),
    "mae_sparse": Tiny("mae", MAE, choices=patch_noise, backbone=SPARSE),
    "mae_image_losses": Tiny("mae_image_losses", IMAGE_LOSSES, choices=patch_noise),
    "mae_frozen_encoder": Tiny(
        "mae_image_losses", {**MAE, "perceptual_weight": 1.0}, choices=patch_noise, frozen="perceptual_encoder"
    ),
    "simmim": Tiny("simmim", {"mask_patch_size": 16}, image_hw=(24, 40), choices=mask_block_noise),
    "lejepa": Tiny("lejepa", LEJEPA, num_views=2, has_local_views=True, choices=unit_slices),
    "lejepa_joined": Tiny(
        "lejepa", {**LEJEPA, "join_views": True}, num_views=2, has_local_views=True, choices=unit_slices
    ),
    "dinov2": Tiny("dinov2", DINOV2, num_views=2, has_local_views=True, choices=masked_first_views),
    "dinov2_centering": Tiny(
        "dinov2",
        {**DINOV2, "centering": "centering", "separate_heads": True},
        num_views=2,
        has_local_views=True,
        choices=masked_first_views,
    ),
    "ijepa": Tiny("ijepa", {"predictor_config": DECODER}, choices=block_indices),
    "distill": Tiny("distill", frozen="teacher"),
    "image_text": Tiny("image_text", {**IMAGE_TEXT, "num_extra_blocks": 1}, inputs=texts),
    "image_text_softmax": Tiny(
        "image_text", {**IMAGE_TEXT, "loss_type": "softmax", "text_pooling": "pooler"}, inputs=texts
    ),
    "detection": Tiny("detection", DETECTION, num_views=0, labels=boxes),
    "instance_segmentation": Tiny(
        "instance_segmentation",
        {**DETECTION, "mask_feature_size": 16},
        num_views=0,
        choices=candidates,
        labels=instances,
    ),
    "classification": Tiny("classification", {"id2label": DETECTION["id2label"]}, num_views=0, labels=classes),
    "semantic_segmentation": Tiny(
        "semantic_segmentation", {"id2label": DETECTION["id2label"]}, num_views=0, labels=masks
    ),
    "mask_query_segmentation": Tiny(
        "mask_query_segmentation", MASK_QUERIES, num_views=0, choices=candidates, labels=masks
    ),
}
PRETRAINING = [
    name for name, tiny in TINY.items() for entry in MODELS if (entry.name, entry.task) == (tiny.row, "pretraining")
]


def perturb(model: torch.nn.Module, std: float = 0.2) -> None:
    """Adds noise to all parameters: heads that differ between classes and locations."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(std * torch.randn_like(parameter))


def config_fields(name, folder, backbone=BACKBONE):
    """Fields of the configuration; a frozen encoder, where there is one, is saved in `folder`."""
    tiny = TINY[name]
    backbone = {**tiny.backbone, **backbone}
    if tiny.row in ("encoder", "backbone"):
        return backbone
    fields = {"backbone_config": backbone, **tiny.fields}
    if tiny.frozen:
        encoder = Path(folder) / "frozen"
        if not encoder.is_dir():
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(1)
                VLMViTModel(VLMViTConfig(**backbone)).save_pretrained(encoder)
        mean, std = FROZEN_STATISTICS
        fields |= {tiny.frozen: str(encoder), f"{tiny.frozen}_mean": mean, f"{tiny.frozen}_std": std}
    return fields


def build(name, folder=None, backbone=None, **changes):
    """The model of a name in training mode, its weights those of seed 0.

    Args:
        folder: Where a frozen encoder is saved; by default a folder that is gone once the model is built.
        backbone: Changes of `BACKBONE`.
        changes: Changes of the configuration.
    """
    if folder is None:
        with tempfile.TemporaryDirectory() as temporary:
            return build(name, temporary, backbone, **changes)
    entry = next(entry for entry in MODELS if entry.name == TINY[name].row)
    fields = config_fields(name, folder, BACKBONE | (backbone or {}))
    torch.manual_seed(0)
    return entry.model_class(entry.config_class(**{**fields, **changes})).train()


def batch(name, num_images=4, *, with_choices=True):
    """What a training step gives the model; `with_choices` also what `forward` would sample itself."""
    tiny = TINY[name]
    views = (tiny.num_views,) if tiny.num_views else ()
    inputs = {"pixel_values": torch.randn(num_images, *views, 3, *tiny.image_hw)}
    if tiny.has_local_views:
        inputs["local_pixel_values"] = torch.randn(num_images, 2, 3, 16, 16)
    inputs |= tiny.inputs(num_images)
    if tiny.labels is not None:
        inputs["labels"] = tiny.labels(num_images)
    return inputs | (tiny.choices(num_images) if with_choices else {})


def save_image_text(folder):
    """The folder of a model of images and texts with its tokeniser, random but not the same for all images."""
    tokenizer = train_tokenizer(["a photo of a cat.", "a photo of a black dog.", "two cats"] * 3)
    tokenizer.model_max_length = 16
    text_model = {**TEXT_MODEL, "vocab_size": len(tokenizer), "max_position_embeddings": 16}
    model = build("image_text", text_config=text_model).eval()
    perturb(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    VLMViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def slow_but(names: Iterable[str], *quick: str) -> list[Any]:
    """Parameters of a test, all of them slow but a few: what it shows of these holds for nearly all others."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]
