"""The length of a run by the time that it may take, and a warning where pretraining is too short to gain anything."""

import contextlib
import io
import json
import logging
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers.trainer import TRAINER_STATE_NAME

from hf_vlm.training.arguments import VisionTrainingArguments
from hf_vlm.training.callbacks import LogFile, read_log
from hf_vlm.training.checkpoints import checkpoints
from hf_vlm.training.data import open_train_source, open_unlabelled_source
from hf_vlm.training.provenance import RUN_FILE

__all__ = ["parse_budget", "warn_of_short_pretraining", "with_steps_for_budget"]

logger = logging.getLogger(__name__)

UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
RESERVE = 0.05  # fraction of the time for what is no step: starting, probes, saving
TRIAL_STEPS, LOGGED_STEPS = 9, 3  # the first three are slower than later ones
TRIAL_IMAGES = 256
# What a run has no use for while it is tried.
TRIAL_KEYS = {
    "budget": None,
    "max_steps": TRIAL_STEPS,
    "logging_strategy": "steps",
    "logging_steps": LOGGED_STEPS,
    "frozen_encoder_steps": 0,
    "eval_strategy": "no",
    "num_eval_examples": 8,
    "load_best_model_at_end": False,
    "save_strategy": "no",
    "probe_steps": 0,
    "on_collapse": "ignore",
    "resume_from_checkpoint": None,
    "rewind_to": None,
    "restart_schedule": False,
    "push_to_hub": False,
    "report_to": "none",
    "rounds": 1,
    "disable_tqdm": True,
}
# Fewest images seen by which pretraining gained anything in benchmarks/RESULTS.md: frozen features of groceries, and a
# detector of blood cells by region proposals.
IMAGES_TO_GAIN = {"encoder": 26_400, "head": 8_000}


def parse_budget(text: str) -> float:
    """Seconds of a budget such as 90s, 10m, 2h or 1d.

    Raises:
        ValueError: It is none.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhd])", str(text).strip())
    if not found or not float(found[1]):
        raise ValueError(f"budget must be a time such as 90s, 10m, 2h or 1d, but is {text!r}.")
    return float(found[1]) * UNITS[found[2]]


def with_steps_for_budget(
    recipe: dict[str, Any], args: VisionTrainingArguments, run: Callable[[dict[str, Any]], Any]
) -> dict[str, Any]:
    """The recipe with `max_steps` in place of `budget`, by a trial of a few steps in a temporary folder.

    A run that is resumed keeps the number of steps that it began with.

    Args:
        args: Arguments of the recipe.
        run: What trains by a recipe.

    Raises:
        ValueError: The budget is no time, or too short for a step; or as `run` does.
    """
    seconds, started = parse_budget(str(args.budget)), time.perf_counter()
    num_steps = _steps_of_begun_run(args)
    if num_steps is None:
        of_step, before = _try(recipe, args, run)
        left = seconds * (1 - RESERVE) - (time.perf_counter() - started)
        num_steps = int((left / args.rounds - before) / of_step)
        logger.info("budget: %s are %d steps of %.3g s.", args.budget, num_steps, of_step)
    num_steps = broadcast_object_list([num_steps])[0]  # ranks measure different times
    if num_steps < 1:
        raise ValueError(f"budget: {args.budget} is too short to train a step.")
    return recipe | {"budget": None, "max_steps": num_steps}


def _steps_of_begun_run(args: VisionTrainingArguments) -> int | None:
    """Number of steps of the run that is resumed, in whichever round it was stopped; None for a run that begins."""
    if not args.resumes:
        return None
    folder, named = Path(args.output_dir), Path(args.resume_from_checkpoint or "")
    runs = [folder, *folder.glob("round-*")]
    begun = [named / TRAINER_STATE_NAME]
    begun += [checkpoint / TRAINER_STATE_NAME for run in runs for checkpoint in reversed(checkpoints(run))]
    begun += [run / RUN_FILE for run in runs]  # of a round that is finished
    for path in begun:
        with contextlib.suppress(OSError, ValueError, KeyError):
            state = json.loads(path.read_text())
            return int(state["max_steps" if path.name == TRAINER_STATE_NAME else "num_steps"])
    return None


def _try(
    recipe: dict[str, Any], args: VisionTrainingArguments, run: Callable[[dict[str, Any]], Any]
) -> tuple[float, float]:
    """Seconds of a step, and of finding labels in all images before."""
    images = {"num_train_examples": min(args.num_train_examples or TRIAL_IMAGES, TRIAL_IMAGES)}
    if args.unlabelled_data:
        images["num_unlabelled_examples"] = min(args.num_unlabelled_examples or TRIAL_IMAGES, TRIAL_IMAGES)
    with tempfile.TemporaryDirectory() as own, _quiet():
        folder = Path(broadcast_object_list([own])[0]) / "trial"  # of all ranks
        run(recipe | TRIAL_KEYS | images | {"output_dir": str(folder)})
        log = read_log(folder / LogFile.name)
        record = json.loads((folder / RUN_FILE).read_text()) if args.process_index == 0 else {}
        PartialState().wait_for_everyone()  # before the folder is deleted
    if args.process_index:
        return 1.0, 0.0  # the first rank decides
    labelling = record.get("labelling_seconds", 0.0)
    if labelling:
        tried = images.get("num_unlabelled_examples", images["num_train_examples"])
        labelling *= max((_num_to_label(args) or tried) / tried, 1.0)
    rates = [entry["images_per_second"] for entry in log if "images_per_second" in entry]
    return record["batch_size"] / rates[-1], labelling


def _num_to_label(args: VisionTrainingArguments) -> int | None:
    if args.unlabelled_data:
        return open_unlabelled_source(args).num_examples
    return open_train_source(args).num_examples


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """A context without what a trial prints and logs, warnings of a short run among them; errors are raised."""
    ours = logging.getLogger("hf_vlm")
    level = ours.level
    ours.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        ours.setLevel(level)


def warn_of_short_pretraining(args: VisionTrainingArguments, *, has_head: bool) -> None:
    """Warns where pretraining from random weights sees fewer images than any that was measured to gain something."""
    what = "head" if has_head else "encoder"
    seen, enough = args.max_steps * args.total_batch_size, IMAGES_TO_GAIN[what]
    if args.encoder is None and seen < enough and args.process_index == 0:
        logger.warning(
            "This run sees %s images: no gain by pretraining %s %s was measured with fewer than %s. "
            "Train %d steps or more (--max_steps).",
            f"{seen:,}",
            "a" if has_head else "an",
            what,
            f"{enough:,}",
            -(-enough // args.total_batch_size),
        )
