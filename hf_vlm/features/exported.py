"""Exported models as models: predicted with and evaluated by the code that runs those they were exported from."""

import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.exporters import ExportedModel

from hf_vlm.data.io.parsing import parse_json
from hf_vlm.features.export_formats import find_format, format_of_backend

__all__ = ["EXPORT_FILE", "ExportedVisionModel", "is_exported", "load_exported", "program_files"]

EXPORT_FILE = "export.json"  # what transformers writes beside a program


class ExportedVisionModel(nn.Module):
    """A program in a runtime, which computes where and how it was set up; `to` and `train` change nothing."""

    def __init__(self, program: ExportedModel, largest_batch: int | None = None) -> None:
        super().__init__()
        self.program, self.config, self.largest_batch = program, program.config, largest_batch
        # By which callers find the device that images belong on.
        self.anchor = nn.Parameter(torch.empty(0, device=program.device), requires_grad=False)

    @property
    def device(self) -> torch.device:
        """Where images belong."""
        return self.anchor.device

    def to(self, *args: Any, **kwargs: Any) -> "ExportedVisionModel":
        """The model itself: its runtime was chosen when it was loaded."""
        return self

    def forward(self, pixel_values: Tensor, **unused: Any) -> Any:
        """The outputs, in an output class of transformers, of images (batch, channels, height, width) float32."""
        parts = pixel_values.split(self.largest_batch or max(1, pixel_values.shape[0]))
        outputs = [self.program(pixel_values=part.contiguous()) for part in parts]
        if len(outputs) == 1:
            return outputs[0]
        return type(outputs[0])(**{name: torch.cat([part[name] for part in outputs]) for name in outputs[0]})


def is_exported(source: str | Path) -> bool:
    """Whether a folder holds an exported model."""
    return (Path(source) / EXPORT_FILE).is_file()


def program_files(folder: Path) -> list[str]:
    """Names of the files that a folder's program consists of, with its weights."""
    components = _read_manifest(folder)["components"].values()
    names = [name for entry in components for name in (entry["file"], f"{entry['file']}.data")]
    names += [str(Path(name).with_suffix(".bin")) for name in names if name.endswith(".xml")]
    return [name for name in map(os.path.basename, names) if (folder / name).is_file()]


def load_exported(folder: str | Path) -> ExportedVisionModel:
    """The program in a folder that `hf-vlm export` wrote, in its runtime.

    Raises:
        ValueError: It cannot be read, or its runtime is not installed.
    """
    folder = Path(folder)
    backend = _read_manifest(folder)["export_format"]
    row = find_format(format_of_backend(backend))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of torch, about transformers' runner of its programs
            program = ExportedModel.from_pretrained(folder, trust_remote_code=False, **row.runner(folder))
        return ExportedVisionModel(program, row.largest_batch)
    except Exception as error:  # runtimes raise their own types
        raise ValueError(f"{folder} holds no program that {backend} can run: {str(error).splitlines()[0]}") from error


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / EXPORT_FILE
    try:
        manifest = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(manifest, dict) or not {"components", "export_format"} <= manifest.keys():
        raise ValueError(f"{path} cannot be read: it names no components and format of an export.")
    return manifest
