"""Pseudo-labels of a run: found in its images before it trains, and kept in its folder."""

import json
import logging
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from transformers.utils import CONFIG_NAME

from hf_vlm.data.formats.mixture import mix_sources
from hf_vlm.data.io.durable import disk_errors
from hf_vlm.data.pseudo_labels import PseudoLabels
from hf_vlm.data.source import Source
from hf_vlm.features.loading import find_encoder, read_own_config
from hf_vlm.tasks import Task
from hf_vlm.tasks.pseudo_labels import REGIONS
from hf_vlm.training.arguments import VisionTrainingArguments
from hf_vlm.training.build import build_encoder_config
from hf_vlm.training.data import open_unlabelled_source
from hf_vlm.training.record import fingerprint

__all__ = [
    "LABELS_FILE",
    "add_unlabelled",
    "check_label_keys",
    "label_source",
    "labelling_models",
    "warn_of_unseen_images",
]

logger = logging.getLogger(__name__)

LABELS_FILE = "pseudo_labels.parquet"
NUM_COUNTED = 1000  # labelled images whose objects are counted; enough for their mean number


def check_label_keys(args: VisionTrainingArguments, task: Task | None, *, pretrains: bool) -> None:
    """ValueError for keys of pseudo-labels that do not fit each other, the command or the task (None: an encoder).

    What would stop a run only after the labels are found is refused here too.
    """
    takes_labels = task is not None and task.find_labels is not None
    has_labels = takes_labels and (pretrains or bool(args.unlabelled_data))
    if not has_labels:
        _refuse_label_keys(args, takes_labels=takes_labels)
        return
    if pretrains:
        _check_pretraining(args)
    elif args.labels_from in (None, REGIONS):
        raise ValueError("unlabelled_data are labelled by a detector of the same classes: name it with labels_from.")
    elif args.rounds != 1:
        raise ValueError("rounds are for pretraining a head: leave them out.")
    if args.rounds < 1:
        raise ValueError(f"rounds must be 1 or more, but is {args.rounds}.")
    if args.labels_per_image is not None and args.labels_per_image <= 0:
        raise ValueError(f"labels_per_image must be positive, but is {args.labels_per_image:g}.")
    if not 0 < args.unlabelled_fraction < 1:
        raise ValueError(f"unlabelled_fraction must be between 0 and 1, but is {args.unlabelled_fraction:g}.")
    if args.labels_from not in (None, REGIONS):
        read_own_config(str(args.labels_from))


def _refuse_label_keys(args: VisionTrainingArguments, *, takes_labels: bool) -> None:
    names = ("labels_per_image", "labels_from", "unlabelled_data", "num_unlabelled_examples")
    given = [name for name in names if getattr(args, name) is not None]
    given += ["rounds"] if args.rounds != 1 else []
    if given and takes_labels:
        raise ValueError(
            f"{given[0]} is for images without labels: pretrain on them, or name them by unlabelled_data."
        )
    if given:
        raise ValueError(f"{given[0]} is for heads that learn from boxes: {args.method} has no use for it.")


def _check_pretraining(args: VisionTrainingArguments) -> None:
    if args.unlabelled_data:
        raise ValueError("unlabelled_data is for fine-tuning: pretraining takes the images of data, without labels.")
    asked = {
        "eval_strategy": args.eval_strategy != "no",
        "eval_on_start": args.eval_on_start,
        "load_best_model_at_end": args.load_best_model_at_end,
        "holdout": args.holdout is not None,
    }
    if wanted := [name for name, is_asked in asked.items() if is_asked]:
        raise ValueError(f"Pretraining has no labels to evaluate a head on: leave {wanted[0]} out.")


def labelling_models(args: VisionTrainingArguments) -> list[str]:
    """Folders and Hub ids of models that label a run's images."""
    return [] if args.labels_from in (None, REGIONS) else [str(args.labels_from)]


def warn_of_unseen_images(args: VisionTrainingArguments, source: Source) -> None:
    """Warns where labels are found in more images than the run sees."""
    seen = args.max_steps * args.total_batch_size
    if source.num_examples is not None and source.num_examples > seen and args.process_index == 0:
        logger.warning(
            "Labels are found in all %d images, of which the run sees %d: name fewer with --num_train_examples, or "
            "train longer.",
            source.num_examples,
            seen,
        )


def label_source(args: VisionTrainingArguments, source: Source, task: Task, labels_from: str) -> Source:
    """The images of a source in which `labels_from`, regions or a model, finds something, with that as labels.

    What is found is kept in the run's folder, where a resumed run takes it from.

    Raises:
        ValueError: Nothing is found.
    """
    return _label(args, source, task, labels_from, per_image=args.labels_per_image)


def add_unlabelled(args: VisionTrainingArguments, source: Source, task: Task) -> Source:
    """A mixture of labelled images and of `unlabelled_data`, with what `labels_from` finds in these.

    Raises:
        ValueError: Nothing is found, or the detector has classes that the labelled images do not have.
    """
    names = task.class_names(source)
    known = (read_own_config(str(args.labels_from)).get("id2label") or {}).values()
    if unknown := [name for name in known if name not in names]:
        raise ValueError(f"labels_from: {args.labels_from} has classes that the labelled images lack: {unknown}.")
    unlabelled = open_unlabelled_source(args)
    if args.holdout is not None:  # by path, so that images which are among the labelled ones too stay apart
        unlabelled, _ = unlabelled.holdout(args.holdout)
    per_image = args.labels_per_image or _objects_per_image(source)
    found = _label(args, unlabelled, task, str(args.labels_from), per_image=per_image)
    found = found.with_classes(names)
    weights = {"labelled": 1 - args.unlabelled_fraction, "found": args.unlabelled_fraction}
    return mix_sources({"labelled": source, "found": found}, weights)


def _label(
    args: VisionTrainingArguments, source: Source, task: Task, labels_from: str, *, per_image: float | None
) -> Source:
    assert task.find_labels is not None
    path = Path(args.output_dir) / LABELS_FILE
    num_channels = _num_channels(args) if labels_from == REGIONS else 3
    origin = _origin(labels_from, source, size=args.image_hw, num_channels=num_channels, per_image=per_image)
    kept = PseudoLabels.load(path, origin) if args.resumes and args.process_index == 0 else None
    found = broadcast_object_list([kept])[0]
    if found is None:
        found = task.find_labels(
            source,
            labels_from,
            size=args.image_hw,
            num_channels=num_channels,
            per_image=per_image,
            num_workers=args.dataloader_num_workers,
            rank=args.process_index,
            world_size=args.world_size,
            max_bad_fraction=args.max_bad_fraction,
        )
        if args.should_save:
            with disk_errors("The pseudo-labels", path, lambda: "Free space there, and start again."):
                found.save(path, origin)
    if not len(found.boxes):
        advice = (
            "They show nothing that stands out from its surroundings."
            if labels_from == REGIONS
            else f"That model is whole: fine-tune from it with --encoder {labels_from}. For one more round, train it "
            "longer, or keep its best boxes whatever their scores (--labels_per_image 2); --rounds 1 trains one alone."
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
    """What pseudo-labels depend on, as text."""
    data = {"data": fingerprint(source.unlabelled()), "num_examples": source.num_examples}
    config = Path(labels_from) / CONFIG_NAME
    trained = config.stat().st_mtime_ns if config.is_file() else None  # written last when a model is saved
    return json.dumps({"labels_from": labels_from, "trained": trained, **data, **options})


def _objects_per_image(source: Source) -> float:
    """Mean number of objects of the first labelled images."""
    first = source.dataset.select_columns(["objects"]).take(NUM_COUNTED)
    counts = [len(example["objects"]["category"]) for example in first]
    return sum(counts) / max(len(counts), 1)
