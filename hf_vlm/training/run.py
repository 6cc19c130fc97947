"""Whole runs of a recipe: pretraining, fine-tuning a detector, evaluating what a run left."""

import functools
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import transformers
from transformers import PreTrainedConfig, set_seed

from hf_vlm.data.sources import class_names, count_examples, has_boxes, open_stream, unlabelled
from hf_vlm.data.stream import ExampleStream
from hf_vlm.data.transforms.collate import collate_detection, collate_views
from hf_vlm.data.transforms.detection import DetectionTransform
from hf_vlm.data.transforms.device_views import DeviceViews
from hf_vlm.data.transforms.views import ViewTransform
from hf_vlm.features.device import to_best_device
from hf_vlm.features.extraction import eval_transform_for
from hf_vlm.models.image_processing_vlm_vit import VLMViTImageProcessor
from hf_vlm.models.modeling_detection import VLMViTDetectionConfig, VLMViTForObjectDetection
from hf_vlm.models.modeling_vlm_vit import VLMViTModel
from hf_vlm.training.alarms import CollapseAlarm
from hf_vlm.training.arguments import VisionTrainingArguments, parse_arguments
from hf_vlm.training.build import build_model, build_processor, load_frozen_encoder, quiet_transformers, refuse_missing
from hf_vlm.training.evaluation import evaluate_detection, evaluate_features
from hf_vlm.training.probes import build_probe, last_probe
from hf_vlm.training.record import RunRecord
from hf_vlm.training.trainer import VisionTrainer

logger = logging.getLogger(__name__)

PRETRAINING_MODEL_FOLDER = "pretraining_model"  # the whole pretraining model, beside the encoder that people use


def pretrain(
    recipe: dict[str, Any],
    *,
    write_card: Callable[[Path], Any] | None = None,
    plot: Callable[[Path], Any] | None = None,
) -> dict[str, Any]:
    """Pretrains an encoder by a recipe.

    Leaves in `output_dir` the encoder with its image processor, the recipe, `run.json` and `log.jsonl`; the whole
    pretraining model (heads, decoder) in its subfolder `pretraining_model`; checkpoints beside. Returns what
    `run.json` holds.

    Raises:
        ValueError: for a recipe, an encoder or data that cannot be used, with what to do about it.
    """
    args = parse_arguments(recipe)
    set_seed(args.seed)
    source = open_source(args, args.train_split, args.num_train_examples)
    args.see_images_of(count_examples(source))
    model = build_model(args, task="pretraining")
    processor = build_processor(args, model.config.backbone_config.num_channels)
    transform = view_transform(args, model.default_views, processor)
    on_device = DeviceViews(transform) if args.makes_views_on_device else None
    record = RunRecord(args, recipe, source, write_card, external_weights=model.config.external_weights())
    trainer = VisionTrainer(
        model=model,
        args=args,
        train_dataset=train_stream(args, unlabelled(source), on_device.sample if on_device else transform),
        data_collator=on_device.collate if on_device else collate_views,
        render=on_device.render if on_device else None,
        processing_class=processor,
        on_save=record.write,
    )
    if args.probe_steps != 0:
        trainer.add_callback(build_probe(trainer, transform, processor, source))
    if args.on_collapse != "ignore":
        trainer.add_callback(CollapseAlarm(stop=args.on_collapse == "stop"))
    _train(trainer, record)
    record.summary["probe"] = last_probe(trainer.state.log_history)
    output_dir = Path(args.output_dir)
    trainer.save_model(str(output_dir / PRETRAINING_MODEL_FOLDER), _internal_call=True)
    weights = trainer.accelerator.get_state_dict(model.trained_encoder)  # all ranks gather what is sharded
    if args.should_save:
        encoder = VLMViTModel(model.config.backbone_config)
        encoder.load_state_dict(weights)
        encoder.save_pretrained(output_dir)
        processor.save_pretrained(output_dir)
        record.write(output_dir)
        if plot is not None:
            plot(output_dir)
        if args.push_to_hub:
            trainer.upload(output_dir, "End of training")
    return record.summary


def finetune(recipe: dict[str, Any], *, write_card: Callable[[Path], Any] | None = None) -> dict[str, Any]:
    """Fine-tunes a detector by a recipe, from `encoder` or from random initialisation.

    Leaves in `output_dir` the detector with its image processor, the recipe, `log.jsonl` and `run.json`, in which the
    figures on `eval_split` stand. Returns what `run.json` holds.

    Raises:
        ValueError: for a recipe, an encoder or data that cannot be used, with what to do about it.
    """
    args = parse_arguments(recipe)
    set_seed(args.seed)
    source = open_source(args, args.train_split, args.num_train_examples)
    args.see_images_of(count_examples(source))
    names = class_names(source)
    if not has_boxes(source) or names is None:
        raise ValueError(f"{args.data} has no boxes in split {args.train_split!r}: detection needs labelled images.")
    model = build_model(args, task="object-detection", class_names=names)
    processor = build_processor(args, model.config.backbone_config.num_channels)
    transform = detection_transform(processor, train=True, augmentation=args.augmentation, num_classes=len(names))
    held_out = _eval_stream(args, open_source(args, args.eval_split, args.num_eval_examples), processor, names)
    evaluator = functools.partial(
        evaluate_detection, processor=processor, class_names=names, batch_size=args.per_device_eval_batch_size
    )
    record = RunRecord(args, recipe, source, write_card)
    trainer = VisionTrainer(
        model=model,
        args=args,
        train_dataset=train_stream(args, source, transform),
        eval_dataset=held_out,
        data_collator=collate_detection,
        processing_class=processor,
        evaluator=evaluator,
        on_save=record.write,
    )
    _train(trainer, record)
    trainer.save_model(args.output_dir, _internal_call=True)  # now: held-out images can stop the last evaluation
    figures = _last_metrics(trainer)
    record.summary["metrics"] = {n.removeprefix("eval_"): v for n, v in figures.items() if n.startswith("eval_")}
    if args.should_save:
        record.write(Path(args.output_dir))
    if args.push_to_hub:
        trainer.push_to_hub()
    return record.summary


def evaluate_run(
    run_dir: str | Path,
    data: str,
    split: str,
    *,
    format: str | None = None,
    num_examples: int | None = None,
    max_bad_fraction: float = 0.01,
) -> dict[str, float]:
    """What a model's folder is worth on a split of a source.

    Of a detector COCO's figures, also a class; of an encoder kNN and linear accuracy of its frozen features, fitted on
    the train split.

    Raises:
        ValueError: if the folder holds neither, the classes of the data are not the detector's, there are no class
            labels for an encoder, or more than `max_bad_fraction` of the images cannot be read.
    """
    open_split = functools.partial(open_stream, data, format=format, num_samples=num_examples)
    plain_stream = functools.partial(ExampleStream, shuffle=False, repeat=False, max_bad_fraction=max_bad_fraction)
    if _holds_encoder(run_dir):
        encoder, processor = load_frozen_encoder(run_dir)
        transform = eval_transform_for(encoder, processor)
        streams = []
        for name in ("train", split):
            source = open_split(name)
            if "label" not in source.features:
                raise ValueError(f"{data} has no class labels in split {name!r}: kNN and linear accuracy need them.")
            streams.append(plain_stream(source, transform))
        return evaluate_features(to_best_device(encoder), *streams)
    model, processor = load_detector(run_dir)
    source = open_split(split)
    names = [model.config.id2label[index] for index in range(model.config.num_labels)]
    found = class_names(source)
    if found != names:
        raise ValueError(f"{data} has the classes {found}, but the detector {run_dir} knows {names}.")
    stream = plain_stream(source, detection_transform(processor, train=False, num_classes=len(names)))
    return evaluate_detection(model, stream, processor, class_names=names, per_class=True)


def _holds_encoder(run_dir: str | Path) -> bool:
    try:
        return PreTrainedConfig.get_config_dict(run_dir)[0].get("model_type") != VLMViTDetectionConfig.model_type
    except OSError as error:
        raise ValueError(f"{run_dir} holds no model: {str(error).splitlines()[0]}") from error


def load_detector(run_dir: str | Path) -> tuple[VLMViTForObjectDetection, VLMViTImageProcessor]:
    """The detector and its image processor from a folder or the Hub; ValueError where there is none, or a part."""
    try:
        with quiet_transformers():
            model, report = VLMViTForObjectDetection.from_pretrained(run_dir, output_loading_info=True)
        processor = VLMViTImageProcessor.from_pretrained(run_dir)
    except OSError as error:
        raise ValueError(f"{run_dir} holds no detector: {str(error).splitlines()[0]}") from error
    refuse_missing(run_dir, report, "detector")
    return to_best_device(model).eval(), processor


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


def detection_transform(
    processor: VLMViTImageProcessor, *, train: bool, num_classes: int, augmentation: dict[str, Any] | None = None
) -> DetectionTransform:
    """The transform that prepares images as the processor of a detector does."""
    return DetectionTransform.from_dict(
        augmentation or {},
        size=(processor.size["height"], processor.size["width"]),
        train=train,
        image_mean=processor.image_mean,
        image_std=processor.image_std,
        num_channels=len(processor.image_mean),
        num_classes=num_classes,
    )


def open_source(args: VisionTrainingArguments, split: str, num_examples: int | None) -> datasets.IterableDataset:
    """The recipe's data; ValueError where it names none."""
    if not args.data:
        raise ValueError("No data: name a folder, a file, a Hub id or scenes with --data or in the recipe.")
    return open_stream(args.data, split, format=args.format, num_samples=num_examples)


def train_stream(
    args: VisionTrainingArguments, source: datasets.IterableDataset, transform: Callable[..., dict[str, Any]]
) -> ExampleStream:
    """What this rank trains on, in its order."""
    return ExampleStream(
        source,
        transform,
        seed=args.data_seed if args.data_seed is not None else args.seed,
        block_size=args.shuffle_block,
        rank=args.process_index,
        world_size=args.world_size,
        max_bad_fraction=args.max_bad_fraction,
    )


def _eval_stream(
    args: VisionTrainingArguments,
    source: datasets.IterableDataset,
    processor: VLMViTImageProcessor,
    names: list[str],
) -> ExampleStream:
    if class_names(source) != names:
        raise ValueError(
            f"Split {args.eval_split!r} of {args.data} has the classes {class_names(source)}, "
            f"but split {args.train_split!r} has {names}."
        )
    transform = detection_transform(processor, train=False, num_classes=len(names))
    return ExampleStream(
        source,
        transform,
        shuffle=False,
        repeat=False,
        rank=args.process_index,
        world_size=args.world_size,
        max_bad_fraction=args.max_bad_fraction,
    )


def _train(trainer: VisionTrainer, record: RunRecord) -> None:
    started = time.perf_counter()
    resume = trainer.args.resume_from_checkpoint
    result = trainer.train(resume_from_checkpoint=True if resume == "last" else resume)
    record.summary |= {
        "seconds": round(time.perf_counter() - started, 1),
        "num_steps": result.global_step,
        "num_images_seen": result.global_step * trainer.args.total_batch_size,
        "train_loss": result.training_loss,
    }


def _last_metrics(trainer: VisionTrainer) -> dict[str, float]:
    """Figures of the model as it is after training, from the log where its last step was one of evaluation."""
    entries = [entry for entry in trainer.state.log_history if any(name.startswith("eval_") for name in entry)]
    if entries and entries[-1]["step"] == trainer.state.global_step and not trainer.args.load_best_model_at_end:
        return dict(entries[-1])
    return trainer.evaluate()


def quiet_libraries() -> None:
    """Commands show their own progress; the libraries' bars for loading and saving weights would tear it apart."""
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()


__all__ = [
    "PRETRAINING_MODEL_FOLDER",
    "detection_transform",
    "evaluate_run",
    "finetune",
    "load_detector",
    "open_source",
    "pretrain",
    "quiet_libraries",
    "train_stream",
    "view_transform",
]
