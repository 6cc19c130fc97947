"""The record of a run, which is saved with every model: recipe, data, versions, metrics."""

import hashlib
import json
import logging
import math
import os
import platform
import subprocess
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from transformers import TrainerCallback, TrainerControl, TrainerState

from hf_vlm.data.io.decode import BadImageError, read_image_bytes
from hf_vlm.data.io.durable import replace_text
from hf_vlm.data.source import Source
from hf_vlm.training.arguments import VisionTrainingArguments
from hf_vlm.training.provenance import RUN_FILE, origins_of, publishable

logger = logging.getLogger(__name__)

RECIPE_FILE = "recipe.yaml"
# Recipe keys that concern one start of a run.
NOT_REPRODUCED_KEYS = ("overwrite_output_dir", "resume_from_checkpoint", "rewind_to", "restart_schedule")


class Position(NamedTuple):
    """How far a run had come when it was started."""

    step: int = 0
    num_images: int = 0
    seconds: float = 0.0


class RunRecord:
    """The record of a run: recipe, data, versions, git state and metrics, saved with every model."""

    def __init__(
        self,
        args: VisionTrainingArguments,
        recipe: dict[str, Any],
        source: Source,
        write_card: Callable[[Path], Any] | None,
        *,
        class_names: list[str] | None = None,
        external_weights: Collection[str] = (),
    ):
        ours = {name: getattr(args, name) for name in VisionTrainingArguments.__annotations__}
        self.recipe = {
            name: publishable(value)
            for name, value in (recipe | ours).items()
            if name not in NOT_REPRODUCED_KEYS and not name.endswith("_token")
        }
        self.write_card = write_card
        self._begin, self._started = Position(), time.perf_counter()
        packages = ("torch", "transformers", "datasets", "accelerate", "hf_vlm")
        self.summary: dict[str, Any] = {
            "method": args.method,
            "encoder": publishable(args.encoder),
            "origins": check_publishing(args, *external_weights),
            "data": {
                "source": publishable(args.data),
                "split": args.train_split,
                "fingerprint": fingerprint(source),
                "num_examples": source.num_examples,
                "class_names": class_names,
            },
            "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
            "git": git_state(),
            "batch_size": args.total_batch_size,
            "scaled_learning_rate": args.scaled_learning_rate,
            "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores, {args.n_gpu} GPUs, {args.world_size} ranks",
            "device": torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else args.device.type,
            "num_processes": args.world_size,
            "metrics": {},
        }

    def resume(self, run: dict[str, Any], step: int, changes: dict[str, Any]) -> None:
        """Takes over what the record in a checkpoint counts.

        Args:
            run: Content of the `run.json` in the checkpoint.
            step: Step of the checkpoint.
            changes: Settings that change there, as `{name: [before, now]}`.
        """
        batch_size = run.get("batch_size", self.summary["batch_size"])
        self._begin = Position(step, run.get("num_images_seen", step * batch_size), run.get("seconds", 0.0))
        self.summary["changes"] = [*run.get("changes", []), *([{"step": step, **changes}] if changes else [])]

    def advance(self, step: int) -> None:
        """Counts the steps, images and seconds of the run, over all its starts."""
        since = step - self._begin.step
        self.summary |= {
            "seconds": round(self._begin.seconds + time.perf_counter() - self._started, 1),
            "num_steps": step,
            "num_images_seen": self._begin.num_images + since * self.summary["batch_size"],
        }

    def write(self, folder: Path) -> None:
        """Writes recipe and record into the folder of a saved model, and the card, without which it is whole too."""
        replace_text(folder / RECIPE_FILE, yaml.safe_dump(self.recipe, sort_keys=False))
        replace_text(folder / RUN_FILE, as_json(self.summary) + "\n")
        if self.write_card is not None:
            with not_needed("The model card"):
                self.write_card(folder)


@contextmanager
def not_needed(what: str) -> Iterator[None]:
    """A context whose failure, of any kind, is a warning: no reason to lose a model."""
    try:
        yield
    except Exception as error:  # templates and plots raise their own types
        logger.warning(
            "%s could not be written, and the model is saved without: %s: %s", what, type(error).__name__, error
        )


def check_publishing(args: VisionTrainingArguments, *external_weights: str) -> list[str]:
    """Models of others that a run's weights are initialised from, labelled by or distilled from.

    Raises:
        ValueError: The run would publish weights that come from them, whose terms decide, without a licence.
    """
    origins = sorted({origin for source in (args.encoder, *external_weights) for origin in origins_of(source)})
    if args.push_to_hub and not args.hub_private_repo and origins:
        raise ValueError(
            f"push_to_hub would publish weights that come from {' and '.join(origins)} without a licence. Set "
            "hub_private_repo, or publish it when it is done: hf-vlm push --license ..."
        )
    return origins


class RecordProgress(TrainerCallback):
    """Keeps a run's record up to date, for whatever is saved of it while it trains."""

    def __init__(self, record: RunRecord) -> None:
        self.record = record

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            mark_unfinished(Path(args.output_dir))
        self.record.advance(state.global_step)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.record.advance(state.global_step)


def mark_unfinished(folder: Path) -> None:
    """Notes in the record of a model from an earlier start of a run that the run trains again."""
    path = folder / RUN_FILE
    if path.is_file() and (run := json.loads(path.read_text())).get("finished"):
        replace_text(path, as_json(run | {"finished": False}) + "\n")


def as_json(values: Any, *, digits: int = 17) -> str:
    """Indented JSON; NaN, the value of metrics without objects, is not JSON and becomes null.

    Args:
        digits: Significant digits of numbers; all of them by default.
    """

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: plain(item) for name, item in value.items()}
        if isinstance(value, list):
            return [plain(item) for item in value]
        if isinstance(value, float):
            return None if math.isnan(value) else float(f"{value:.{digits}g}")
        return value

    return json.dumps(plain(values), indent=2)


def fingerprint(source: Source, num_examples: int = 16) -> str:
    """A short hash of a source's columns and first encoded images, to detect later whether data changed."""
    digest = hashlib.sha256(repr(source.features).encode())
    for example in source.dataset.take(num_examples):
        try:
            content = read_image_bytes(example["image"])
        except BadImageError:  # training counts and skips it
            content = b""
        digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()[:16]


def git_state() -> dict[str, Any]:
    """Commit of the working folder, and whether there are changes; empty outside a checkout."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return {}


__all__ = ["RecordProgress", "RunRecord", "as_json", "check_publishing", "fingerprint", "git_state", "not_needed"]
