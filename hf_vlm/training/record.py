"""The record of a run, which is saved with every model: recipe, data, versions, metrics."""

import hashlib
import json
import math
import os
import platform
import subprocess
from collections.abc import Callable, Collection
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from hf_vlm.data.io.durable import replace_text
from hf_vlm.data.source import Source
from hf_vlm.training.arguments import VisionTrainingArguments
from hf_vlm.training.provenance import RUN_FILE, origins_of, publishable

RECIPE_FILE = "recipe.yaml"
NOT_REPRODUCED_KEYS = ("overwrite_output_dir", "resume_from_checkpoint")  # recipe keys that concern one start of a run


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
            for name, value in (ours | recipe).items()
            if name not in NOT_REPRODUCED_KEYS and not name.endswith("_token")
        }
        self.write_card = write_card
        packages = ("torch", "transformers", "datasets", "accelerate", "hf_vlm")
        self.summary: dict[str, Any] = {
            "method": args.method,
            "encoder": publishable(args.encoder),
            "origins": self._origins(args.encoder, *external_weights),
            "data": {
                "source": publishable(args.data),
                "split": args.train_split,
                "fingerprint": fingerprint(source),
                "num_examples": args.num_train_examples,
                "class_names": class_names,
            },
            "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
            "git": git_state(),
            "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores, {args.n_gpu} GPUs, {args.world_size} ranks",
            "metrics": {},
        }
        if args.push_to_hub and not args.hub_private_repo and self.summary["origins"]:
            raise ValueError(
                f"push_to_hub would publish weights that come from {' and '.join(self.summary['origins'])} without a "
                "licence. Set hub_private_repo, or publish it when it is done: hf-vlm push --license ..."
            )

    @staticmethod
    def _origins(*sources: str | None) -> list[str]:
        """Models of others that this run's weights are initialised or distilled from."""
        return sorted({origin for source in sources for origin in origins_of(source)})

    def write(self, folder: Path) -> None:
        """Writes recipe, record and card into a folder that holds a saved model."""
        replace_text(folder / RECIPE_FILE, yaml.safe_dump(self.recipe, sort_keys=False))
        replace_text(folder / RUN_FILE, as_json(self.summary) + "\n")
        if self.write_card is not None:
            self.write_card(folder)


def as_json(values: Any) -> str:
    """Indented JSON; NaN, the value of metrics without objects, is not JSON and becomes null."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: plain(item) for name, item in value.items()}
        return None if isinstance(value, float) and math.isnan(value) else value

    return json.dumps(plain(values), indent=2)


def fingerprint(source: Source, num_examples: int = 16) -> str:
    """A short hash of a source's columns and first encoded images, to detect later whether data changed."""
    digest = hashlib.sha256(repr(source.features).encode())
    for example in source.dataset.take(num_examples):
        image = example["image"]
        content = image["bytes"] if image["bytes"] is not None else str(image["path"]).encode()
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


__all__ = ["RunRecord", "as_json", "fingerprint", "git_state"]
