"""Predictions as files: JSON lines, one COCO json, or labels of YOLO."""

import contextlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from hf_vlm.data.io.durable import replace_text, replaced_file
from hf_vlm.data.io.messages import redact_url
from hf_vlm.deploy.prediction import Prediction

__all__ = ["FORMATS", "Write", "output_names", "prediction_writer"]

FORMATS = ("json", "coco", "yolo")
Write = Callable[[Prediction, Path], None]  # a prediction, and the name of its image, as of `output_names`


def output_names(paths: Sequence[str]) -> list[Path]:
    """A relative path for what is written about each image: as in the images' common folder, without extension.

    The extension stays where two images differ in nothing else.
    """
    absolute = [os.path.abspath(redact_url(path).partition("://")[2] or path) for path in paths]
    common = os.path.commonpath([os.path.dirname(path) for path in absolute]) if paths else ""
    relative = [Path(os.path.relpath(path, common)) for path in absolute]
    stems = Counter(path.with_suffix("") for path in relative)  # a.jpg and a.png
    return [path if stems[path.with_suffix("")] > 1 else path.with_suffix("") for path in relative]


@contextlib.contextmanager
def prediction_writer(format: str, output: Path | None, class_names: Sequence[str]) -> Iterator[Write]:
    """A function that writes one prediction after the other.

    Args:
        format: `json`, one line per image; `coco`, one file for all; `yolo`, a file of labels per image.
        output: File to write, of YOLO the folder; by default the standard output, but for YOLO.
        class_names: Names of the model's classes, by number.

    Raises:
        ValueError: There is no such format, YOLO has no folder, or the output cannot be written.
    """
    if format not in FORMATS:
        raise ValueError(f"there is no format {format!r} of predictions; there are {', '.join(FORMATS)}")
    if format == "yolo":
        if output is None:
            raise ValueError("--format yolo writes a file per image: name a folder with --output")
        yield lambda prediction, name: _write_labels(prediction, output / name.with_name(f"{name.name}.txt"))
        output.mkdir(parents=True, exist_ok=True)
        replace_text(output / "classes.txt", "".join(f"{name}\n" for name in class_names))
        return
    with _opened(output) as write_line:
        if format == "json":
            yield lambda prediction, name: write_line(json.dumps(prediction.to_dict()))
        else:
            images: list[dict[str, Any]] = []
            annotations: list[dict[str, Any]] = []
            yield lambda prediction, name: _append(prediction, images, annotations)
            categories = [{"id": index, "name": name} for index, name in enumerate(class_names)]
            write_line(json.dumps({"images": images, "annotations": annotations, "categories": categories}))


@contextlib.contextmanager
def _opened(output: Path | None) -> Iterator[Callable[[str], None]]:
    if output is None:
        yield lambda line: print(line, flush=True)  # noqa: T201
        return
    with replaced_file(output) as file:

        def write_line(line: str) -> None:
            file.write(f"{line}\n".encode())

        yield write_line


def _append(prediction: Prediction, images: list[dict[str, Any]], annotations: list[dict[str, Any]]) -> None:
    height, width = prediction.image_size
    image: dict[str, Any] = {"id": len(images) + 1, "file_name": prediction.path, "height": height, "width": width}
    if prediction.frame is not None:
        image["frame_id"] = prediction.frame
    images.append(image)
    for annotation in prediction.to_coco(image_id=image["id"]):
        annotations.append({"id": len(annotations) + 1, **annotation})


def _write_labels(prediction: Prediction, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, "".join(f"{line}\n" for line in prediction.to_yolo()))
