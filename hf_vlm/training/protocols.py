"""Evaluation protocols: what an encoder is worth to a classifier, frozen, adapted by low rank, or trained whole."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_vlm.features.accuracy import evaluate_features
from hf_vlm.features.device import to_best_device
from hf_vlm.features.extraction import eval_transform_for
from hf_vlm.models.image_processing_vlm_vit import VLMViTImageProcessor
from hf_vlm.registry import find_model
from hf_vlm.tasks.evaluation import eval_stream, match_class_names
from hf_vlm.tasks.feature_extraction import FEATURE_EXTRACTION
from hf_vlm.training.arguments import VisionTrainingArguments
from hf_vlm.training.build import build_processor, load_encoder
from hf_vlm.training.data import open_labelled_sources
from hf_vlm.training.recipe import parse_arguments
from hf_vlm.training.run import finetune

__all__ = ["PROTOCOLS", "evaluate_protocols"]

# What a protocol changes in the recipe of a classifier; None where a classifier is fitted to features, not trained.
PROTOCOLS: dict[str, dict[str, Any] | None] = {
    "knn": None,
    "linear": None,
    "attentive": {"model_config": {"pooling": "attentive", "freeze_encoder": True}},
    "lora": {"lora_rank": 8, "layer_decay": 1.0},
    "full": {},
}


def evaluate_protocols(
    recipe: Mapping[str, Any], protocols: Sequence[str] = tuple(PROTOCOLS), *, num_seeds: int = 1
) -> Iterator[tuple[str, list[float]]]:
    """Top-1 accuracy from 0 to 1 on the held-out images of a classifier's recipe, protocol by protocol.

    All protocols have the same labelled images. `knn` and `linear` are fitted once to frozen features, of the mean
    patch token and where there is a class token of it (`_class`) and of both (`_both`). The others train a classifier
    by the recipe: one query that attends to the frozen tokens (`attentive`), the encoder adapted by updates of low
    rank (`lora`), or trained whole (`full`), each in a folder of its own in `output_dir`, with the seeds `seed`,
    `seed + 1`, ...

    Yields:
        Name and accuracies, one for each seed.

    Raises:
        ValueError: The recipe is none of a classifier, names no encoder, or its images have no single label each.
    """
    unknown = [name for name in protocols if name not in PROTOCOLS]
    if unknown or not protocols:
        raise ValueError(f"There is no protocol {', '.join(unknown) or 'named'}: choose of {', '.join(PROTOCOLS)}.")
    if num_seeds < 1:
        raise ValueError(f"The number of seeds is {num_seeds}, but at least one is needed.")
    args = parse_arguments(dict(recipe))
    if find_model(args.method).task != "image-classification":
        raise ValueError(
            f"Protocols compare accuracies, but the method {args.method} is no classifier: take a recipe such as "
            "classification/vit_nano_cpu.yaml."
        )
    if not args.encoder:
        raise ValueError("Protocols evaluate an encoder: name one with --encoder.")
    frozen = tuple(name for name in protocols if PROTOCOLS[name] is None)
    if frozen:
        found = _accuracies_of_features(args)
        yield from ((name, [value]) for name, value in found.items() if name.startswith(frozen))
    for name in protocols:
        if (changes := PROTOCOLS[name]) is not None:
            yield name, [_trained_accuracy(recipe, args, name, changes, args.seed + i) for i in range(num_seeds)]


def _accuracies_of_features(args: VisionTrainingArguments) -> dict[str, float]:
    source, held_out = open_labelled_sources(args, None)
    names = FEATURE_EXTRACTION.class_names(source)
    found = FEATURE_EXTRACTION.class_names(held_out)
    held_out = match_class_names(held_out, found, names, f"split {args.train_split!r}")
    encoder = to_best_device(load_encoder(args))
    processor = build_processor(args, VLMViTImageProcessor, encoder.config.num_channels)
    train, test = (
        eval_stream(part, eval_transform_for(processor), max_bad_fraction=args.max_bad_fraction)
        for part in (source, held_out)
    )
    return evaluate_features(encoder.eval(), train, test, batch_size=args.per_device_eval_batch_size)


def _trained_accuracy(
    recipe: Mapping[str, Any], args: VisionTrainingArguments, name: str, changes: dict[str, Any], seed: int
) -> float:
    model_config = {**recipe.get("model_config", {}), **changes.get("model_config", {})}
    folder = Path(args.output_dir) / f"{name}-{seed}"
    run = finetune({**recipe, **changes, "model_config": model_config, "seed": seed, "output_dir": str(folder)})
    return float(run["metrics"]["top1"])
