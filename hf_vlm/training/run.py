"""Whole runs of a recipe: pretraining an encoder, fine-tuning a model for any task."""

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import transformers
from transformers import set_seed

from hf_vlm.data.io.durable import disk_errors
from hf_vlm.data.source import Source
from hf_vlm.data.stream import ExampleStream
from hf_vlm.data.tiles import Tiling
from hf_vlm.data.transforms.collate import collate_views
from hf_vlm.data.transforms.device_views import DeviceViews
from hf_vlm.models.image_processing_vlm_vit import VLMViTImageProcessor
from hf_vlm.models.modeling_vlm_vit import VLMViTModel
from hf_vlm.registry import find_model
from hf_vlm.tasks import PRETRAINABLE_TASKS, TASKS, TRAINABLE_TASKS, Task
from hf_vlm.tasks.evaluation import eval_stream, match_class_names
from hf_vlm.tasks.pseudo_labels import REGIONS
from hf_vlm.training.alarms import SIGNS, CollapseAlarm
from hf_vlm.training.arguments import VisionTrainingArguments
from hf_vlm.training.budget import warn_of_short_pretraining, with_steps_for_budget
from hf_vlm.training.build import build_model, build_processor
from hf_vlm.training.checkpoints import check_run_folder, checkpoints, clear_run_folder, prepare_run_folder
from hf_vlm.training.data import open_labelled_sources, open_train_source, train_stream, view_transform
from hf_vlm.training.inputs import inputs_for
from hf_vlm.training.labels import (
    add_unlabelled,
    check_label_keys,
    label_source,
    labelling_models,
    warn_of_unseen_images,
)
from hf_vlm.training.layout import check_divisible, divide
from hf_vlm.training.lock import run_lock
from hf_vlm.training.probes import build_probe, last_probe
from hf_vlm.training.recipe import parse_arguments
from hf_vlm.training.record import RecordProgress, RunRecord, check_publishing, not_needed
from hf_vlm.training.resume import continue_record, finished_run, mean_loss, resume_checkpoint
from hf_vlm.training.signals import StopSignals
from hf_vlm.training.trainer import VisionTrainer

__all__ = [
    "PRETRAINING_MODEL_FOLDER",
    "finetune",
    "pretrain",
    "quiet_libraries",
]

ROUND_FOLDER = "round-{}"  # with the head of an earlier round, in the folder of the last one
PRETRAINING_MODEL_FOLDER = "pretraining_model"  # with heads and decoder, in the folder of the encoder


def pretrain(
    recipe: dict[str, Any],
    source: Source | None = None,
    *,
    write_card: Callable[[Path], Any] | None = None,
    plot: Callable[[Path], Any] | None = None,
    render_labels: Callable[[Source, Path], Any] | None = None,
) -> dict[str, Any]:
    """Pretrains an encoder by a recipe, or with it a head, on labels that nobody annotated (`labels_from`).

    A head may be pretrained in `rounds`: each model is new, and learns from what the one before finds (as in CutLER,
    arXiv 2301.11320). Those before the last are in subfolders.

    Leaves in `output_dir` the encoder with its image processor, the recipe, `run.json` and `log.jsonl`; the whole
    pretraining model (heads, decoder) in its subfolder `pretraining_model`; and the checkpoints. A model with a head
    is there whole, with the labels that were found; so is one of images and texts, with its tokeniser. Returns the
    content of `run.json`.

    Args:
        source: The images to train on where they are open already, as the recipe says; None to open them.
        write_card: Function that writes the card into a folder with a saved model.
        plot: Function that renders pictures of a finished run into its folder.
        render_labels: Function that renders pseudo-labels into the folder before a head is trained on them.

    Raises:
        ValueError: for a recipe, an encoder or data that cannot be used, with what to do about it.
    """
    args = parse_arguments(recipe)
    entry = find_model(args.method, ["pretraining", *PRETRAINABLE_TASKS])
    check_label_keys(args, TASKS.get(entry.task), pretrains=True)
    check_divisible(args, entry)
    check_publishing(args, *labelling_models(args))  # now, and not when labels are found or earlier rounds are done
    if args.budget is not None:
        recipe = with_steps_for_budget(recipe, args, pretrain)
        args = parse_arguments(recipe)
    source = open_train_source(args, source)
    args.set_steps_for(source.num_examples)
    if finished := finished_run(args):
        return finished
    warn_of_short_pretraining(args, has_head=entry.task != "pretraining")
    if entry.task != "pretraining":
        warn_of_unseen_images(args, source)
    hooks = Hooks(write_card, plot, render_labels)
    if args.rounds == 1:
        return _pretrain(args, recipe, source, hooks, labels_from=args.labels_from)
    return _pretrain_in_rounds(args, recipe, source, hooks)


class Hooks(NamedTuple):
    """What a run of pretraining calls to write and render into its folder."""

    write_card: Callable[[Path], Any] | None
    plot: Callable[[Path], Any] | None
    render_labels: Callable[[Source, Path], Any] | None


def _pretrain_in_rounds(
    args: VisionTrainingArguments, recipe: dict[str, Any], source: Source, hooks: Hooks
) -> dict[str, Any]:
    """Each round is a run of its own, so that one that was stopped resumes in its round."""
    folder = Path(args.output_dir)
    if not args.resumes:
        check_run_folder(args)
        if args.should_save:  # else a run that is stopped in an earlier round would find this one finished
            clear_run_folder(folder)
    labels_from = args.labels_from
    for number in range(1, args.rounds):
        earlier = recipe | {"rounds": 1, "output_dir": str(folder / ROUND_FOLDER.format(number)), "rewind_to": None}
        earlier |= {"labels_from": labels_from, "push_to_hub": False}
        earlier["resume_from_checkpoint"] = "auto" if args.resumes else None
        earlier_args = parse_arguments(earlier)
        earlier_args.set_steps_for(source.num_examples)
        if not finished_run(earlier_args):
            _pretrain(earlier_args, earlier, source, hooks, labels_from=labels_from)
        labels_from = str(folder / ROUND_FOLDER.format(number))
    if args.resume_from_checkpoint == "last" and not checkpoints(folder):
        args.resume_from_checkpoint = "auto"  # it was stopped in an earlier round
    return _pretrain(args, recipe, source, hooks, labels_from=labels_from)


def _pretrain(
    args: VisionTrainingArguments,
    recipe: dict[str, Any],
    source: Source,
    hooks: Hooks,
    *,
    labels_from: str | None,
) -> dict[str, Any]:
    set_seed(args.seed)
    task = TASKS.get(find_model(args.method).task)
    with _run_folder(args):
        if task is None:
            return _pretrain_encoder(args, recipe, source, hooks)
        started = time.perf_counter()
        source = label_source(args, source, task, labels_from or REGIONS)
        labelling_seconds = time.perf_counter() - started
        if hooks.render_labels is not None and args.should_save:
            with not_needed("The picture of the pseudo-labels"):
                hooks.render_labels(source, Path(args.output_dir))
        return _train_head(args, recipe, source, None, task, hooks.write_card, labelling_seconds)


def _pretrain_encoder(
    args: VisionTrainingArguments, recipe: dict[str, Any], source: Source, hooks: Hooks
) -> dict[str, Any]:
    entry = find_model(args.method)
    inputs = inputs_for(args, entry, source)
    model = inputs.build_model(args, entry)
    if args.layout is not None:
        divide(model, args.layout)
    processor = build_processor(args, entry.processor_class, model.config.backbone_config.num_channels)
    views = view_transform(args, model.default_views, processor)
    on_device = DeviceViews(views) if args.makes_views_on_device else None
    external = [*model.config.external_weights(), *inputs.external_weights]
    record = RunRecord(args, recipe, source, hooks.write_card, external_weights=external)

    def save_beside(folder: Path) -> None:
        inputs.save(folder)
        record.write(folder)

    trainer = VisionTrainer(
        model=model,
        args=args,
        train_dataset=train_stream(args, inputs.source, inputs.transform(on_device.sample if on_device else views)),
        data_collator=inputs.collate(on_device.collate if on_device else collate_views),
        render=on_device.render if on_device else None,
        processing_class=processor,
        on_save=save_beside,
    )
    if args.probe_steps != 0:
        trainer.add_callback(build_probe(trainer, views, processor, source))
    if args.on_collapse != "ignore":
        signs = [sign for sign in SIGNS if not (model.loss_may_vanish and sign.metric == "loss")]
        trainer.add_callback(CollapseAlarm(stop=args.on_collapse == "stop", signs=signs))
    _train(trainer, record)
    record.summary["probe"] = last_probe(trainer.state.log_history)
    _save_pretrained(trainer, processor, record, hooks.plot, is_used_whole=bool(entry.use))
    return record.summary


def _save_pretrained(
    trainer: VisionTrainer,
    processor: VLMViTImageProcessor,
    record: RunRecord,
    plot: Callable[[Path], Any] | None,
    *,
    is_used_whole: bool,
) -> None:
    """Saves the trained encoder in `output_dir`, and the whole model in a subfolder, or there in its place."""
    model, output_dir = trainer.model, Path(trainer.args.output_dir)
    if plot is not None and trainer.args.should_save:
        with not_needed("The plot of the curves"):
            plot(output_dir)
    with trainer.saving_model(output_dir) as folder:
        record.summary["finished"] = is_used_whole
        trainer.save_model(str(folder if is_used_whole else folder / PRETRAINING_MODEL_FOLDER), _internal_call=True)
        weights = trainer.whole_weights(model.trained_encoder)
        if trainer.args.should_save and not is_used_whole:
            encoder = VLMViTModel(model.config.backbone_config)
            encoder.load_state_dict(weights)
            encoder.save_pretrained(folder)
            processor.save_pretrained(folder)
            record.summary["finished"] = True
            record.write(folder)
    if trainer.args.push_to_hub and trainer.args.should_save:
        trainer.upload(output_dir, "End of training")


def finetune(
    recipe: dict[str, Any], source: Source | None = None, *, write_card: Callable[[Path], Any] | None = None
) -> dict[str, Any]:
    """Fine-tunes a model for the task of the recipe's method, from `encoder` or from random initialisation.

    Leaves in `output_dir` the model with its image processor, the recipe, `log.jsonl` and `run.json`, which holds the
    metrics on `eval_split`. Returns the content of `run.json`.

    Args:
        source: The images to train on where they are open already, as the recipe says; None to open them.
        write_card: Function that writes the card into a folder with a saved model.

    Raises:
        ValueError: for a recipe, an encoder or data that cannot be used, with what to do about it.
    """
    args = parse_arguments(recipe)
    set_seed(args.seed)
    task = TASKS[find_model(args.method, TRAINABLE_TASKS).task]
    check_label_keys(args, task, pretrains=False)
    check_divisible(args, find_model(args.method))
    check_publishing(args, *labelling_models(args))
    if args.budget is not None:
        recipe = with_steps_for_budget(recipe, args, finetune)
        args = parse_arguments(recipe)
    _check_best_metric(args, task)
    source, held_out = open_labelled_sources(args, source)
    task.class_names(source)  # refuses data without these labels, before there is a folder
    args.set_steps_for(source.num_examples)
    if finished := finished_run(args):
        return finished
    with _run_folder(args):
        started = time.perf_counter()
        source = add_unlabelled(args, source, task) if args.unlabelled_data else source
        labelling_seconds = time.perf_counter() - started
        return _train_head(args, recipe, source, held_out, task, write_card, labelling_seconds)


def _train_head(
    args: VisionTrainingArguments,
    recipe: dict[str, Any],
    source: Source,
    held_out: Source | None,
    task: Task,
    write_card: Callable[[Path], Any] | None,
    labelling_seconds: float,
) -> dict[str, Any]:
    entry = find_model(args.method)
    names = task.class_names(source)
    set_seed(args.seed)  # again: a model that found the labels took random numbers, labels of a file take none
    model = build_model(
        args,
        entry,
        class_names=names,
        head_fields=task.head_fields(source),
        minimum_fields=task.minimum_fields(source),
    )
    processor = build_processor(args, entry.processor_class, model.config.backbone_config.num_channels)
    options, evaluated_as = {"class_names": names, "augmentation": args.augmentation}, _as_evaluated(args, task)
    record = RunRecord(args, recipe, source, write_card, class_names=names, external_weights=labelling_models(args))
    record.summary["data"]["labels_found"] = held_out is None  # and not annotated
    record.summary["labelling_seconds"] = round(labelling_seconds, 1)
    trainer = VisionTrainer(
        model=model,
        args=args,
        train_dataset=train_stream(args, source, task.transform(processor, train=True, **options)),
        eval_dataset=None if held_out is None else _held_out_stream(args, held_out, evaluated_as, processor, names),
        data_collator=task.collate(train=True, **options),
        processing_class=processor,
        evaluator=functools.partial(
            evaluated_as.evaluate, processor=processor, class_names=names, batch_size=args.per_device_eval_batch_size
        ),
        on_save=record.write,
    )
    _train(trainer, record)
    if trainer.state.global_step < args.max_steps:
        record.summary["stopped_by_patience"] = args.early_stopping_patience
    trainer.save_model(
        args.output_dir, _internal_call=True
    )  # before the last evaluation, which bad held-out images can stop
    if held_out is not None:
        logged = _last_metrics(trainer)
        metrics = {n.removeprefix("eval_"): v for n, v in logged.items() if n.startswith("eval_")}
        record.summary["metrics"] = metrics
        calibration = task.calibrate(metrics)
        calibration.apply(trainer.model, processor)
    record.summary["finished"] = True
    if args.should_save:
        folder = Path(args.output_dir)
        with disk_errors("The record", folder, lambda: "Free space there; the model itself is whole."):
            if held_out is not None:
                calibration.store(folder)
            record.write(folder)
    if args.push_to_hub:
        trainer.push_to_hub()
    trainer.accelerator.wait_for_everyone()  # the model is there, for all ranks that start from it
    return record.summary


def _as_evaluated(args: VisionTrainingArguments, task: Task) -> Task:
    """The task on tiles, where it is trained on tiles and can be evaluated on them."""
    tile = args.augmentation.get("tile")
    return task if tile is None or task.tile is None else task.tile(Tiling(tile))


def _held_out_stream(
    args: VisionTrainingArguments, source: Source, task: Task, processor: VLMViTImageProcessor, names: list[str]
) -> ExampleStream:
    return eval_stream(
        match_class_names(source, task.class_names(source), names, f"split {args.train_split!r}"),
        task.transform(processor, train=False, class_names=names),
        max_bad_fraction=args.max_bad_fraction,
        rank=args.process_index,
        world_size=args.world_size,
    )


@contextmanager
def _run_folder(args: VisionTrainingArguments) -> Iterator[None]:
    """A context in which the run's folder is there and is this run's alone."""
    if not args.resumes:
        check_run_folder(args)  # now, and not when labels are found or earlier rounds are done
    prepare_run_folder(Path(args.output_dir))
    with run_lock(Path(args.output_dir)) if args.process_index == 0 else nullcontext():
        yield


def _train(trainer: VisionTrainer, record: RunRecord) -> None:
    checkpoint = resume_checkpoint(trainer.args)
    if checkpoint is not None:
        continue_record(record, checkpoint, trainer.args)
    trainer.add_callback(RecordProgress(record))
    with StopSignals() as signals:
        trainer.add_callback(signals)
        result = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    signals.raise_if_stopped(trainer.args, trainer.state)
    record.summary["train_loss"] = mean_loss(trainer.state.log_history) if checkpoint else result.training_loss


def _check_best_metric(args: VisionTrainingArguments, task: Task) -> None:
    """ValueError where the best checkpoint is to be chosen by what evaluation does not measure, as the loss."""
    wanted = args.metric_for_best_model
    measured = {*task.headline, *(name for name in task.metric_names if not name.endswith("/"))}
    if wanted is not None and wanted.removeprefix("eval_") not in measured:
        raise ValueError(
            f"metric_for_best_model is {wanted!r}, which evaluation does not measure: name one of "
            f"{', '.join(sorted(measured))}."
        )


def _last_metrics(trainer: VisionTrainer) -> dict[str, float]:
    """Metrics of the trained model: from the log if the last step was evaluated, else from a new evaluation."""
    entries = [entry for entry in trainer.state.log_history if any(name.startswith("eval_") for name in entry)]
    if entries and entries[-1]["step"] == trainer.state.global_step and not trainer.args.load_best_model_at_end:
        return dict(entries[-1])
    return trainer.evaluate()


def quiet_libraries() -> None:
    """Disables the libraries' progress bars for loading and saving weights: commands show their own progress."""
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
