"""Resuming a run: from which checkpoint, with which settings changed, and whether anything is left to train."""

import json
import logging
from collections.abc import Collection
from dataclasses import MISSING, dataclass, fields, replace
from enum import Enum
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Any

import yaml
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import CONFIG_NAME

from hf_vlm.training.arguments import VisionTrainingArguments
from hf_vlm.training.checkpoints import checkpoint_folder, checkpoints, last_checkpoint, verify_checkpoint
from hf_vlm.training.provenance import RUN_FILE, publishable
from hf_vlm.training.record import RECIPE_FILE, RunRecord

__all__ = [
    "FIXED",
    "FREE",
    "SCHEDULE",
    "compare_settings",
    "continue_record",
    "finished_run",
    "mean_loss",
    "resume_checkpoint",
]

logger = logging.getLogger(__name__)


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# What becomes of a recipe key that has changed when a run is resumed. Each key is in one of three groups.
# FIXED: refused. Weights, optimiser state and data position of the checkpoint belong to the earlier value.
FIXED = _names(
    """
    method encoder_preset encoder_config model_config processor_config encoder resize_encoder load_head image_size
    text_encoder text_length
    neftune_noise_alpha
    data format train_split holdout num_train_examples labels_from labels_per_image rounds unlabelled_data
    num_unlabelled_examples unlabelled_fraction views augmentation shuffle_block seed data_seed
    per_device_train_batch_size gradient_accumulation_steps auto_find_batch_size accelerator_config
    reference_batch_size optim optim_args optim_target_modules patch_projection_lr_multiplier
    metric_for_best_model greater_is_better ema_decay lora_rank
    """
)
# SCHEDULE: refused, for the checkpoint's values would stay in force; `restart_schedule` applies the new ones instead.
SCHEDULE = _names(
    """
    max_steps images_to_see budget learning_rate batch_scaling lr_scheduler_type lr_scheduler_kwargs warmup_steps
    layer_decay encoder_lr_multiplier frozen_encoder_steps weight_decay weight_decay_end
    adam_beta1 adam_beta2 adam_epsilon max_grad_norm
    """
)
# FREE: takes effect from the resumed step on, and is listed.
FREE = _names(
    """
    output_dir overwrite_output_dir resume_from_checkpoint rewind_to restart_schedule approximate_resume
    ignore_data_skip max_bad_fraction allow_outside eval_split num_eval_examples probe_steps probe_data
    num_probe_examples on_collapse views_on attn_implementation num_train_epochs
    bf16 fp16 bf16_full_eval fp16_full_eval tf32 use_cpu full_determinism torch_compile torch_compile_backend
    torch_compile_mode use_liger_kernel liger_kernel_config use_cache torch_empty_cache_steps
    activation_checkpointing activation_checkpointing_kwargs gradient_checkpointing gradient_checkpointing_kwargs
    logging_strategy logging_steps logging_first_step logging_nan_inf_filter log_on_each_node log_level
    log_level_replica include_num_input_tokens_seen disable_tqdm report_to run_name project trackio_space_id
    trackio_bucket_id trackio_static_space_id debug skip_memory_metrics
    eval_strategy eval_steps eval_delay eval_on_start per_device_eval_batch_size prediction_loss_only
    eval_do_concat_batches eval_use_gather_object eval_accumulation_steps include_for_metrics batch_eval_metrics
    save_strategy save_steps save_total_limit save_only_model save_on_each_node enable_jit_checkpoint
    load_best_model_at_end early_stopping_patience restore_callback_states_from_checkpoint
    push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision
    dataloader_drop_last dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers
    dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order remove_unused_columns
    label_names label_smoothing_factor train_sampling_strategy length_column_name average_tokens_across_devices
    ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout
    fsdp fsdp_config deepspeed parallelism_config tp_size ep_size do_train do_eval do_predict local_rank
    """
)
BATCH_DIVISION = ("per_device_train_batch_size", "gradient_accumulation_steps")
# Values of `run.json` that are compared too, and their groups. The number of processes changes batch and scaled rate.
RECORDED = {
    "data.fingerprint": FIXED,
    "data.num_examples": FIXED,
    "data.class_names": FIXED,
    "batch_size": FREE,
    "scaled_learning_rate": SCHEDULE,
}


@dataclass(frozen=True)
class Change:
    """A setting that is not what it was when a checkpoint was saved."""

    name: str
    before: Any
    now: Any
    group: Collection[str]

    def __str__(self) -> str:
        return f"{self.name}: {self.before} -> {self.now}"


def resume_checkpoint(args: VisionTrainingArguments) -> Path | None:
    """The checkpoint that the options name: `rewind_to`, or `resume_from_checkpoint` with a folder, last or auto.

    None for a run that begins, which `auto` allows where there is no checkpoint.

    Raises:
        ValueError: There is no such checkpoint, or files of it are missing.
    """
    checkpoint = _named_checkpoint(args.resume_from_checkpoint, args.rewind_to, Path(args.output_dir))
    if checkpoint is not None:
        verify_checkpoint(checkpoint, checksums=False)
    return checkpoint


def _named_checkpoint(wanted: str | None, rewind_to: int | None, folder: Path) -> Path | None:
    if rewind_to is not None:
        return checkpoint_folder(folder, rewind_to)
    if wanted == "last" or (wanted == "auto" and checkpoints(folder)):
        return Path(last_checkpoint(folder))
    return Path(wanted) if wanted and wanted != "auto" else None


def finished_run(args: VisionTrainingArguments) -> dict[str, Any] | None:
    """The record of a run that the options would resume but that is done; None for others.

    It has trained all its steps, or was stopped early by the `early_stopping_patience` that is asked for.
    """
    folder, wanted = Path(args.output_dir), args.resume_from_checkpoint
    if not wanted or args.rewind_to is not None or not (folder / CONFIG_NAME).is_file():  # the model's last file
        return None
    if wanted not in ("last", "auto") and not _is_same(wanted, checkpoint_folder(folder, args.max_steps)):
        return None
    try:
        run = _read(folder / RUN_FILE)
    except ValueError:  # cut off while it was written: not finished
        return None
    patience = args.early_stopping_patience
    is_done = run.get("finished") and run["method"] == args.method
    stopped_early = patience is not None and run.get("stopped_by_patience") == patience
    if not is_done or not (run["num_steps"] == args.max_steps or stopped_early):
        return None
    logger.info("The run in %s is finished, with its %d steps: nothing is changed.", folder, run["num_steps"])
    return run


def _is_same(path: str, other: Path) -> bool:
    return Path(path).resolve() == other.resolve()


def continue_record(record: RunRecord, checkpoint: Path, args: VisionTrainingArguments) -> None:
    """Continues the record of a run from a checkpoint, with the settings that change there.

    Raises:
        ValueError: A setting has changed that cannot take effect (`compare_settings`), or the run is to end before.
    """
    changes = compare_settings(checkpoint, record, args)
    step = _read(checkpoint / TRAINER_STATE_NAME).get("global_step", 0)
    if step > args.max_steps:
        raise ValueError(f"{checkpoint} is past the {args.max_steps} steps of the run (max_steps).")
    changed = {change.name: [change.before, change.now] for change in changes}
    record.resume(_read(checkpoint / RUN_FILE), step, changed)


def mean_loss(log_history: list[dict[str, float]]) -> float:
    """Mean of the logged losses, each of which is a mean over the steps since the one before."""
    entries = [(0, 0.0), *((int(entry["step"]), entry["loss"]) for entry in log_history if "loss" in entry)]
    total = sum(loss * (step - before) for (before, _), (step, loss) in pairwise(entries))
    return total / max(entries[-1][0], 1)


def compare_settings(checkpoint: Path, record: RunRecord, args: VisionTrainingArguments) -> list[Change]:
    """The settings that are not those a checkpoint was trained with, all of them such as may take effect.

    Raises:
        ValueError: One of them cannot change within a run, or needs `restart_schedule`; all are named.
    """
    changes = list(_changes(checkpoint, record, args))
    fixed = [change for change in changes if change.group is FIXED]
    schedule = [change for change in changes if change.group is SCHEDULE and not args.restart_schedule]
    problem = ""
    if fixed:
        problem += f"\nThese cannot change within a run:{_lines(fixed)}"
        problem += "\nSet them back, or begin a run in another --output_dir; its --encoder may be this run's."
    if schedule:
        problem += f"\nThese stay as they are in the checkpoint:{_lines(schedule)}"
        problem += "\nSet them back, or apply the new values from there on with --restart_schedule true."
    if problem:
        raise ValueError(f"{checkpoint} was trained with other settings (before -> now).{problem}")
    if changes and args.process_index == 0:
        logger.warning("%s resumes with other settings (before -> now):%s", checkpoint, _lines(changes))
    return changes


def _lines(changes: list[Change]) -> str:
    return "".join(f"\n  {change}" for change in changes)


def _changes(checkpoint: Path, record: RunRecord, args: VisionTrainingArguments) -> list[Change]:
    if not (checkpoint / RECIPE_FILE).is_file():
        logger.warning("%s holds no %s: its settings cannot be compared with today's.", checkpoint, RECIPE_FILE)
        return []
    before = _read(checkpoint / RECIPE_FILE)
    before["max_steps"] = _read(checkpoint / TRAINER_STATE_NAME).get("max_steps")  # which images_to_see decides, too
    now = record.recipe | {"max_steps": args.max_steps}
    defaults = _defaults()
    changes = [
        Change(name, before.get(name, default), now.get(name, default), _group(name))
        for name, default in defaults.items()
        if name != "images_to_see" and not name.endswith("_token")
    ]
    run, old_run = record.summary, _read(checkpoint / RUN_FILE)
    changes += [
        Change(name, _value(old_run, name), _value(run, name), group)
        for name, group in RECORDED.items()
        if _value(old_run, name) is not None  # as in records of earlier versions
    ]
    changes = [change for change in changes if not _is_equal(change.before, change.now)]
    if not any(change.name.startswith("data.") for change in changes):  # the same images, found elsewhere
        changes = [_freed(change) if change.name == "data" else change for change in changes]
    if old_run.get("batch_size") == run["batch_size"]:  # the same images in each step, divided otherwise
        changes = [replace(change, group=FREE) if change.name in BATCH_DIVISION else change for change in changes]
    return changes


def _defaults() -> dict[str, Any]:
    """The default of each recipe key."""
    return {
        field.name: publishable(field.default_factory() if field.default_factory is not MISSING else field.default)
        for field in fields(VisionTrainingArguments)
        if field.init
    }


def _group(name: str) -> Collection[str]:
    """The group of a key; one that a later transformers adds is not known to have an effect, and so is FIXED."""
    return next((group for group in (FREE, SCHEDULE) if name in group), FIXED)


def _freed(change: Change) -> Change:
    """A source is free to move; the weights of a mixture are not free to change."""
    weights = [list(value.values()) if isinstance(value, dict) else [] for value in (change.before, change.now)]
    return change if weights[0] != weights[1] else Change(change.name, change.before, change.now, FREE)


def _is_equal(before: Any, now: Any) -> bool:
    """Whether two values mean the same; paths may be given from another folder, of which records hold the end only."""
    before, now = (value.value if isinstance(value, Enum) else value for value in (before, now))
    if isinstance(before, dict) and isinstance(now, dict):
        return before.keys() == now.keys() and all(_is_equal(before[name], now[name]) for name in before)
    if isinstance(before, list | tuple) and isinstance(now, list | tuple):
        return len(before) == len(now) and all(map(_is_equal, before, now))
    if isinstance(before, str) and isinstance(now, str) and "/" in before + now:
        first, second = (PurePosixPath(path).parts for path in (before, now))
        length = min(len(first), len(second))
        return first[-length:] == second[-length:]
    return bool(before == now)


def _value(run: dict[str, Any], name: str) -> Any:
    value: Any = run
    for part in name.split("."):
        value = (value or {}).get(part)
    return value


def _read(path: Path) -> dict[str, Any]:
    """Content of a JSON or YAML file; empty where there is none, ValueError where it is damaged."""
    try:
        text = path.read_text(encoding="utf-8")
        return dict(json.loads(text) if path.suffix == ".json" else yaml.safe_load(text))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
