"""The first images of a run with the views that it will train on."""

import copy
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch

from hf_vlm.data.transforms.views import ViewTransform, crop_box
from hf_vlm.registry import find_model
from hf_vlm.training.build import build_config, build_processor
from hf_vlm.training.data import open_recipe_source, train_stream, view_transform
from hf_vlm.training.recipe import parse_arguments

__all__ = ["SampledViews", "sample_first_views"]

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, kw_only=True)
class SampledViews:
    """An image and its views, all (height, width, C) uint8.

    Args:
        image: Decoded image.
        views: Views as the model gets them, before normalisation.
        local_views: Local views, in the same form.
        boxes: (top, left, height, width) in the image, of the views and then of the local views.
        masks: Mask (height, width) of each view, true where the method masks it; empty for methods without masks.
    """

    image: Array
    views: list[Array]
    local_views: list[Array]
    boxes: list[tuple[int, int, int, int]]
    masks: list[Array]


def sample_first_views(recipe: dict[str, Any], num_images: int) -> list[SampledViews]:
    """The first images that a pretraining by the recipe reads, with their views.

    The masks are sampled by the method, but are not those of the run.

    Raises:
        ValueError: for a recipe or data that cannot be used, with what to do about it.
    """
    args = parse_arguments(recipe)
    entry = find_model(args.method, ["pretraining"])
    config = build_config(args, entry)
    processor = build_processor(args, entry.processor_class, config.backbone_config.num_channels)
    transform = view_transform(args, entry.model_class.default_views, processor)
    patch_size = config.backbone_config.patch_hw

    def sampled(example: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        views = _render(transform, example, rng)
        size = transform.views[0].size
        grid_hw = size[0] // patch_size[0], size[1] // patch_size[1]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(rng.integers(2**31)))
            masks = entry.model_class.sample_mask(config, grid_hw, len(transform.views))
        masks = [] if masks is None else masks.unflatten(1, grid_hw).numpy()
        masks = [mask.repeat(patch_size[0], axis=0).repeat(patch_size[1], axis=1) for mask in masks]  # (H, W) each
        return {"views": SampledViews(**views, masks=masks)}

    source = open_recipe_source(args, args.train_split, args.num_train_examples).unlabelled()
    return [example["views"] for example in islice(train_stream(args, source, sampled), num_images)]


def _render(transform: ViewTransform, example: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    views = transform(example, copy.deepcopy(rng))
    image, parameters = transform.sample(example, rng)
    settings = (*transform.views, *transform.local_views)
    return {
        "image": image,
        "views": [transform.normalize.invert(view) for view in views["pixel_values"].numpy()],
        "local_views": [
            transform.normalize.invert(view.numpy()) for view in views.get("local_pixel_values", torch.empty(0))
        ],
        "boxes": [crop_box(*pair, *image.shape[:2]) for pair in zip(settings, parameters)],
    }
