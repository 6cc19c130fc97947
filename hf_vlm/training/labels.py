"""Labels that nobody annotated: found in a run's images before it trains, and kept in its folder."""

import itertools
import json
import logging
from pathlib import Path
from typing import Any

from hf_vlm.data.formats.mixture import mix_sources
from hf_vlm.data.found_objects import FoundObjects
from hf_vlm.data.io.durable import disk_errors
from hf_vlm.data.source import Source
from hf_vlm.data.sources import open_source
from hf_vlm.features.loading import find_encoder
from hf_vlm.tasks import Task
from hf_vlm.tasks.evaluation import match_class_names
from hf_vlm.tasks.found_objects import REGIONS
from hf_vlm.training.arguments import VisionTrainingArguments
from hf_vlm.training.build import build_encoder_config
from hf_vlm.training.record import fingerprint

__all__ = ["LABELS_FILE", "add_unlabelled", "check_label_keys", "label_source", "labelling_models"]

logger = logging.getLogger(__name__)

LABELS_FILE = "found_objects.parquet"
NUM_COUNTED = 1000  # labelled images, of which the mean number of objects is taken


def check_label_keys(args: VisionTrainingArguments, task: Task | None, *, pretrains: bool) -> None:
    """ValueError for keys of found labels that do not fit each other, the command or the task (None: an encoder)."""
    if task is None or task.find_labels is None:
        given = [name for name in ("labels_from", "unlabelled_data") if getattr(args, name)]
        given += ["rounds"] if args.rounds > 1 else []
        if given:
            raise ValueError(f"{given[0]} is for heads that learn from boxes: {args.method} has no use for it.")
    if pretrains and args.unlabelled_data:
        raise ValueError("unlabelled_data is for fine-tuning: pretraining takes the images of data, without labels.")
    if not pretrains and bool(args.unlabelled_data) != (args.labels_from is not None):
        raise ValueError(
            "unlabelled_data and labels_from belong together: the images, and the detector that labels them."
        )
    if not 0 < args.unlabelled_fraction < 1:
        raise ValueError(f"unlabelled_fraction must be between 0 and 1, but is {args.unlabelled_fraction:g}.")
    if args.rounds < 1 or (args.rounds > 1 and not pretrains):
        raise ValueError(f"rounds must be 1, or more in pretraining a head, but is {args.rounds}.")
    if args.labels_per_image is not None and args.labels_per_image <= 0:
        raise ValueError(f"labels_per_image must be positive, but is {args.labels_per_image:g}.")


def labelling_models(args: VisionTrainingArguments) -> list[str]:
    """Folders and Hub ids of models that label a run's images."""
    return [] if args.labels_from in (None, REGIONS) else [str(args.labels_from)]


def label_source(args: VisionTrainingArguments, source: Source, task: Task, labels_from: str) -> Source:
    """The images of a source in which `labels_from`, regions or a model, finds something, with that as labels.

    What is found is kept in the run's folder, where a resumed run takes it from.

    Raises:
        ValueError: Nothing is found, or the recipe asks for an evaluation, which needs other labels.
    """
    if args.eval_strategy != "no":
        raise ValueError("Pretraining has no labels to evaluate a head on: leave eval_strategy out.")
    return _label(args, source, task, labels_from, per_image=args.labels_per_image)


def add_unlabelled(args: VisionTrainingArguments, source: Source, task: Task) -> Source:
    """A mixture of labelled images and of `unlabelled_data`, with what `labels_from` finds in these.

    Raises:
        ValueError: Nothing is found, or the detector has classes that the labelled images do not have.
    """
    unlabelled = open_source(
        args.unlabelled_data,
        args.train_split,
        num_samples=args.num_unlabelled_examples,
        allow_outside=args.allow_outside,
    )
    per_image = args.labels_per_image or _objects_per_image(source)
    found = _label(args, unlabelled, task, str(args.labels_from), per_image=per_image)
    names = task.class_names(source)
    found = match_class_names(found, task.class_names(found), names, f"split {args.train_split!r}")
    weights = {"labelled": 1 - args.unlabelled_fraction, "found": args.unlabelled_fraction}
    return mix_sources({"labelled": source, "found": found}, weights)


def _label(
    args: VisionTrainingArguments, source: Source, task: Task, labels_from: str, *, per_image: float | None
) -> Source:
    assert task.find_labels is not None
    path = Path(args.output_dir) / LABELS_FILE
    origin = _origin(labels_from, source, size=args.image_hw, per_image=per_image)
    found = FoundObjects.load(path, origin) if args.resume_from_checkpoint or args.rewind_to else None
    if found is None:
        found = task.find_labels(
            source,
            labels_from,
            size=args.image_hw,
            num_channels=_num_channels(args),
            per_image=per_image,
            num_workers=args.dataloader_num_workers,
            rank=args.process_index,
            world_size=args.world_size,
            max_bad_fraction=args.max_bad_fraction,
        )
        if args.should_save:
            with disk_errors("What was found in the images", path, lambda: "Free space there, and start again."):
                found.save(path, origin)
    if not len(found.boxes):
        advice = (
            "They show nothing that stands out from its surroundings."
            if labels_from == REGIONS
            else "Train it longer, or keep its best boxes whatever their scores, as with --labels_per_image 2."
        )
        raise ValueError(
            f"Nothing was found in {len(found.image_ids):,} images of {source.name} by {labels_from}. {advice}"
        )
    logger.info("Found %d objects in %d images by %s.", len(found.boxes), len(found.image_ids), labels_from)
    return found.label(source)


def _num_channels(args: VisionTrainingArguments) -> int:
    config = find_encoder(str(args.encoder)).config if args.encoder else build_encoder_config(args)
    return config.num_channels


def _origin(labels_from: str, source: Source, **options: Any) -> str:
    """What found labels depend on, as text."""
    data = {"data": fingerprint(source.unlabelled()), "num_examples": source.num_examples}
    return json.dumps({"labels_from": labels_from, **data, **options})


def _objects_per_image(source: Source) -> float:
    """Mean number of objects of the first labelled images."""
    counts = [len(example["objects"]["category"]) for example in itertools.islice(source, NUM_COUNTED)]
    return sum(counts) / max(len(counts), 1)
