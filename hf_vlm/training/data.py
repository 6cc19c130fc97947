"""The images of a run: opened as its recipe says, held out, and streamed to this rank."""

import logging
from collections.abc import Callable
from typing import Any

from hf_vlm.data.inspection.pixel_range import check_pixel_range
from hf_vlm.data.source import Source
from hf_vlm.data.sources import open_source
from hf_vlm.data.stream import ExampleStream
from hf_vlm.data.transforms.views import ViewTransform
from hf_vlm.models.image_processing_vlm_vit import VLMViTImageProcessor
from hf_vlm.registry import find_model
from hf_vlm.tasks import TASKS
from hf_vlm.training.arguments import VisionTrainingArguments

__all__ = [
    "open_labelled_sources",
    "open_recipe_source",
    "open_train_source",
    "open_unlabelled_source",
    "train_stream",
    "view_transform",
]

logger = logging.getLogger(__name__)

FEW_HELD_OUT = 10  # images, below which chance decides metrics


def open_recipe_source(args: VisionTrainingArguments, split: str, num_examples: int | None) -> Source:
    """A split of the recipe's data.

    Raises:
        ValueError: The recipe names no data, or these cannot be used; see `open_source` and `check_pixel_range`.
    """
    if not args.data:
        raise ValueError("No data: name a folder, a file, a Hub id or scenes with --data or in the recipe.")
    task = TASKS.get(find_model(args.method).task)  # none of methods that pretrain an encoder
    source = open_source(
        args.data,
        split,
        format=args.format,
        num_samples=num_examples,
        allow_outside=args.allow_outside,
        object_masks=task is not None and task.reads_object_masks,
    )
    check_pixel_range(source)
    return source


def train_stream(
    args: VisionTrainingArguments, source: Source, transform: Callable[..., dict[str, Any]]
) -> ExampleStream:
    """The examples that this rank trains on, in their order."""
    return ExampleStream(
        source.dataset,
        transform,
        seed=args.data_seed if args.data_seed is not None else args.seed,
        block_size=args.shuffle_block,
        rank=args.data_rank,
        world_size=args.num_data_ranks,
        max_bad_fraction=args.max_bad_fraction,
    )


def open_train_source(args: VisionTrainingArguments, source: Source | None = None) -> Source:
    """The images to train on, which may be open already, as the recipe says."""
    if source is None:
        return open_recipe_source(args, args.train_split, args.num_train_examples)
    check_pixel_range(source)  # as `open_recipe_source` does
    return source


def open_unlabelled_source(args: VisionTrainingArguments) -> Source:
    """The images of `unlabelled_data`, as the recipe says."""
    source = open_source(
        args.unlabelled_data,
        args.train_split,
        num_samples=args.num_unlabelled_examples,
        object_masks=False,
        allow_outside=args.allow_outside,
    )
    check_pixel_range(source)
    return source


def open_labelled_sources(args: VisionTrainingArguments, source: Source | None) -> tuple[Source, Source]:
    """The images to fine-tune on, and those to evaluate on: a split of their own, or a fraction that is held out."""
    source = open_train_source(args, source)
    if args.holdout is None:
        try:
            return source, open_recipe_source(args, args.eval_split, args.num_eval_examples)
        except ValueError as error:
            raise ValueError(
                f"{error} (Images to evaluate on are needed: name their split with --eval_split, or hold out a tenth "
                "of the training images with --holdout 0.1.)"
            ) from error
    source, held_out = source.holdout(args.holdout, args.num_eval_examples)
    counts = [part.num_examples or "an unknown number" for part in (source, held_out)]
    logger.info("Holding out a fraction of %g of the images: training on %s, evaluating on %s.", args.holdout, *counts)
    if held_out.num_examples is not None and held_out.num_examples < FEW_HELD_OUT:
        logger.warning(
            "%d held-out images are few: metrics, and the score threshold that is chosen by them, depend on chance. "
            "A larger --holdout takes more.",
            held_out.num_examples,
        )
    return source, held_out


def view_transform(
    args: VisionTrainingArguments, default_views: dict[str, Any], processor: VLMViTImageProcessor
) -> ViewTransform:
    """The views of a recipe: the method's own with the recipe's changes, normalised as the processor does."""
    return ViewTransform.from_dict(
        {**default_views, "size": list(args.image_hw), **args.views},
        image_mean=processor.image_mean,
        image_std=processor.image_std,
        num_channels=len(processor.image_mean),
    )
