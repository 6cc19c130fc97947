"""What arms of `label_efficiency.py` that are no commands of hf_vlm share: their words, their test, their record."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from hf_vlm.cli.recipes import read_recipe
from hf_vlm.data.source import Source
from hf_vlm.data.stream import Transform
from hf_vlm.metrics.detection import coco_detection_metrics
from hf_vlm.tasks.detection import DETECTION, predict_detection
from hf_vlm.tasks.evaluation import eval_stream
from hf_vlm.training.arguments import VisionTrainingArguments
from hf_vlm.training.data import open_recipe_source
from hf_vlm.training.recipe import parse_arguments
from hf_vlm.training.record import as_json

__all__ = ["Arm", "open_arm"]


@dataclass(frozen=True)
class Arm:
    """A recipe of a detector, and its data."""

    args: VisionTrainingArguments
    source: Source
    held_out: Source

    @property
    def class_names(self) -> list[str]:
        return DETECTION.class_names(self.source)

    def finish(self, model: nn.Module, processor: Any, transform: Transform, **record: Any) -> None:
        """Evaluates a model with its own image processor, of any package, and leaves `run.json` as a command would."""
        stream = eval_stream(self.held_out, transform, max_bad_fraction=0.0)
        metrics = coco_detection_metrics(*predict_detection(model, stream, processor), class_names=self.class_names)
        folder = Path(self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "run.json").write_text(as_json({**record, "metrics": metrics, "finished": True}) + "\n")


def open_arm(argv: Sequence[str]) -> Arm:
    """The arm that the words of `hf-vlm finetune` describe.

    Raises:
        ValueError: for a recipe or data that cannot be used.
    """
    args = parse_arguments(read_recipe(argv, command="finetune")[0])
    return Arm(args, *(open_recipe_source(args, split, None) for split in (args.train_split, args.eval_split)))
