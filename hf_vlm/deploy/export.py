"""Exports of trained models to other runtimes, which leave a folder only where the artifact passed the gate."""

import contextlib
import dataclasses
import importlib
import io
import json
import logging
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import exporters
from transformers.exporters import ExportedModel

from hf_vlm.data.images import first_images
from hf_vlm.data.io.durable import created_folder, replace_text
from hf_vlm.data.io.messages import one_line
from hf_vlm.data.io.parsing import parse_yaml
from hf_vlm.data.sources import open_source
from hf_vlm.deploy import runtime
from hf_vlm.deploy.exported_card import PARITY_FILE, PREDICT_FILE, RUNTIMES, write_exported_card
from hf_vlm.deploy.gate import Metric, compare, failures
from hf_vlm.features.export_formats import FORMATS, find_format, find_precision
from hf_vlm.features.exported import EXPORT_FILE, is_exported
from hf_vlm.features.loading import LoadedModel, load_model, quiet_transformers
from hf_vlm.tasks import TASKS, Task
from hf_vlm.tasks.evaluation import evaluate_run
from hf_vlm.tasks.task import ServedOutput
from hf_vlm.training.provenance import publishable, write_origins

__all__ = ["ExportData", "ServingModel", "export_model"]

logger = logging.getLogger(__name__)

NUM_IMAGES = 16  # that the gate compares outputs on
NUM_CALIBRATION_IMAGES = 64
SCENES = "scenes:easy"

Image = NDArray[np.uint8]


@dataclass(frozen=True)
class ExportData:
    """Images that an artifact is compared, calibrated and evaluated on.

    Attributes:
        data: Source, as `--data` takes it.
        split: Split to compare and evaluate on; calibration takes the train split where there is one.
        holdout: Fraction of that split that training held out, to compare and evaluate on instead of the whole.
        format: Format of the source; guessed by default.
        num_examples: First examples to evaluate on.
        allow_outside: Whether what annotations name outside of the source may be followed.
    """

    data: Any
    split: str = "test"
    holdout: float | None = None
    format: str | None = None
    num_examples: int = 200
    allow_outside: bool = False

    def images(self, count: int, num_channels: int) -> list[Image]:
        """The first images to compare on; ValueError where they cannot be opened."""
        if self.holdout is None:
            return self.first_images(self.split, count, num_channels)
        source = open_source(self.data, self.split, format=self.format, allow_outside=self.allow_outside)
        return first_images(source.holdout(self.holdout, count)[1], count, num_channels=num_channels)

    def first_images(self, split: str, count: int, num_channels: int) -> list[Image]:
        """The first images of a split; ValueError where it cannot be opened."""
        source = open_source(self.data, split, format=self.format, num_samples=count, allow_outside=self.allow_outside)
        return first_images(source, count, num_channels=num_channels)

    def metric(self, model: str | Path, task: Task) -> tuple[str, float] | None:
        """Name and value of the first headline metric of a saved model; None where the data have no labels for it."""
        metrics = evaluate_run(
            model,
            self.data,
            self.split,
            format=self.format,
            holdout=self.holdout,
            num_examples=self.num_examples,
            allow_outside=self.allow_outside,
        ).metrics
        return next(((name, metrics[name]) for name in task.headline if name in metrics), None)


class ServingModel(nn.Module):
    """A model that returns what serving reads of its output, in an output class of transformers."""

    def __init__(self, model: nn.Module, served: ServedOutput) -> None:
        super().__init__()
        self.model, self.config, self.fields = model, model.config, served.fields
        module, _, name = served.output_class.rpartition(".")
        self.output_class = getattr(importlib.import_module(module), name)

    def forward(self, pixel_values: Tensor) -> Any:
        """The fields that are served, of images (batch, channels, height, width)."""
        outputs = self.model(pixel_values)
        return self.output_class(**{name: outputs[name] for name in self.fields})


def export_model(
    run: str | Path,
    output_dir: str | Path,
    *,
    format: str = "onnx",
    precision: str = "fp32",
    data: ExportData | None = None,
) -> dict[str, Any]:
    """Exports a trained model of any task for a runtime, for images of its one size and any batch.

    The folder then holds the program with its configuration and image processor, what the gate measured
    (`parity.json`), a card, and for ONNX and OpenVINO `predict.py`, which needs neither torch nor hf_vlm. It is
    written aside, and gets its name only where the artifact passes the gate.

    Args:
        run: Folder of a run, or name of a model on the Hub.
        output_dir: Folder to write, which must not exist.
        format: A row of `FORMATS`.
        precision: A precision of this format.
        data: Images to compare on, and labels to evaluate on; by default those of the run where they can be opened,
            else built-in scenes without labels.

    Returns:
        What `parity.json` holds: format, precision, task, megabytes, and the fields of [`Comparison`].

    Raises:
        ValueError: There is no such format, precision or model, a package is missing, the folder exists, the model
            cannot be exported, or the artifact does not pass the gate.
    """
    output_dir = Path(output_dir)
    find_format(format)
    reduced = find_precision(format, precision)
    if output_dir.exists():
        raise ValueError(f"{output_dir} exists: name another folder with --output_dir, or delete it.")
    if is_exported(run):
        raise ValueError(f"{run} is an export: name the run that it came from.")
    reference = load_model(run)
    if reference.encoder_config.num_experts:
        raise ValueError(
            f"{run} has a sparse encoder, which is not exported: how many tokens an expert gets is known as it runs. "
            "It can be served by hf-vlm serve, and a dense encoder can learn from it by the method distill."
        )
    task = TASKS[reference.entry.task_in_use]
    if task.served is None:
        raise ValueError(f"Models for {task.name} are not exported.")
    data = data or recorded_data(run) or ExportData(SCENES)
    num_channels = reference.processor.num_channels
    images = data.images(NUM_IMAGES, num_channels)
    calibration = _calibration_images(data, num_channels) if reduced.is_calibrated else []
    samples = [_inputs(reference, [image]) for image in calibration]
    program = _export(reference, task.served, format, reduced.config(samples), _inputs(reference, images[:2]))
    reduced.finish(program.program)
    with created_folder(output_dir) as folder:
        program.save_pretrained(folder)
        reference.processor.save_pretrained(folder)
        write_origins(folder, str(run))
        if format in RUNTIMES and _runs_without_torch(folder):
            shutil.copyfile(runtime.__file__, folder / PREDICT_FILE)
        comparison = compare(reference, load_model(folder), images)
        comparison = dataclasses.replace(comparison, metric=_metric(run, folder, data, task))
        if found := failures(comparison, precision):
            raise ValueError(
                f"The {precision} artifact of {run} in the format {format} does not pass the gate: "
                f"{'; '.join(found)}. Nothing was written to {output_dir}."
            )
        record = {"format": format, "precision": precision, "task": task.pipeline, "megabytes": _megabytes(folder)}
        record |= comparison.to_dict() | {"versions": program_versions(folder)}
        replace_text(folder / PARITY_FILE, json.dumps(record, indent=1) + "\n")
        write_exported_card(folder, name=output_dir.resolve().name, run=run, record=record)
    return record


def recorded_data(run: str | Path) -> ExportData | None:
    """The split that a run was evaluated on; None where its recipe names none, or it cannot be opened from here."""
    path = Path(run) / "recipe.yaml"
    recipe = parse_yaml(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if not isinstance(recipe.get("data"), str) or not recipe["data"]:
        return None
    holdout = recipe.get("holdout")
    data = ExportData(
        recipe["data"],
        recipe.get("eval_split", "test") if holdout is None else recipe.get("train_split", "train"),
        holdout=holdout,
        format=recipe.get("format"),
        allow_outside=bool(recipe.get("allow_outside")),
    )
    try:
        data.images(1, 3)
    except ValueError as error:
        logger.warning("The data of the run cannot be opened, so built-in scenes take their place: %s", error)
        return None
    return data


def _calibration_images(data: ExportData, num_channels: int) -> list[Image]:
    """Images of the train split, or of the one to evaluate on where there is no other."""
    try:
        return data.first_images("train", NUM_CALIBRATION_IMAGES, num_channels)
    except ValueError as error:
        logger.warning("Calibrating on split %r, for there is no train split: %s", data.split, error)
        return data.images(NUM_CALIBRATION_IMAGES, num_channels)


def _inputs(loaded: LoadedModel, images: list[Image]) -> dict[str, Tensor]:
    encoded = loaded.processor(images, return_tensors="pt", input_data_format="channels_last")
    return {"pixel_values": encoded["pixel_values"]}


def _export(
    reference: LoadedModel, served: ServedOutput, format: str, fields: dict[str, Any], inputs: dict[str, Tensor]
) -> ExportedModel:
    """The program of a model for images of the size of the inputs, in any number."""
    row = FORMATS[format]
    # A batch of one would be taken for a constant.
    inputs = {name: torch.cat([value, value])[: max(2, len(value))] for name, value in inputs.items()}
    batch = torch.export.Dim("batch", min=1, max=row.largest_batch)
    config = getattr(exporters, row.config)(dynamic_shapes={"pixel_values": {0: batch}}, **fields)
    try:
        with quiet_exporters():
            return getattr(exporters, row.exporter)().export(
                ServingModel(reference.model, served).eval(), inputs, config
            )
    except Exception as error:  # exporters and quantisers raise their own types
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ValueError(f"The model cannot be exported to {format}: {reason}") from error


@contextlib.contextmanager
def quiet_exporters() -> Iterator[None]:
    """Silences what exporters and quantisers report of themselves: the gate says what came of it."""
    levels = {name: logging.getLogger(name).level for name in ("nncf", "onnxscript", "onnx_ir", "torch.onnx", "root")}
    for name in levels:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with quiet_transformers(), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def _runs_without_torch(folder: Path) -> bool:
    """Whether `predict.py` can do what the image processor of an export does."""
    try:
        runtime.Runtime(folder)
    except ValueError as error:
        logger.warning("There will be no %s: %s", PREDICT_FILE, error)
        return False
    return True


def _metric(run: str | Path, folder: Path, data: ExportData, task: Task) -> Metric | None:
    """The task's metric of a model and of its artifact; None, with a warning, where the data have no labels for it."""
    try:
        before = data.metric(run, task)
    except ValueError as error:
        logger.warning("The metric is not measured: %s", error)
        return None
    after = data.metric(folder, task)
    if before is None or after is None:
        return None
    return Metric(before[0], before[1], after[1], one_line(publishable(data.data)), data.split)


def _megabytes(folder: Path) -> float:
    """Size of the program with its weights: of all but Python files and JSON."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix not in (".py", ".json")]
    return round(sum(path.stat().st_size for path in files) / 1e6, 2)


def program_versions(folder: Path) -> dict[str, str]:
    """Versions of the packages that made a program, as transformers recorded them."""
    manifest = json.loads((folder / EXPORT_FILE).read_text(encoding="utf-8"))
    return dict(next(iter(manifest["components"].values()))["metadata"]["packages"])
