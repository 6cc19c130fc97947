"""A page on which images are dropped and predictions seen: the app of a Space of an exported model, without torch."""

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read on import: gradio reports its use otherwise
here = Path(__file__).parent
sys.path.insert(0, str(here / "model"))

import gradio as gr  # noqa: E402
from predict import Runtime, as_record, read_image  # noqa: E402

LOWEST_WITH_MASKS = 0.1  # masks of all candidates would fill the memory

runtime = Runtime(here / "model")


def show(path: str | None, threshold: float) -> tuple[Any, str, Any]:
    """The image with what is found in it marked, a line that names the best, and the record of `predict.py`."""
    if path is None:
        return None, "", None
    try:
        found = runtime.predict(path, threshold)
        image = read_image(path, 3)
    except ValueError as error:
        raise gr.Error(str(error), print_exception=False) from error
    record = as_record(found)
    del record["path"]  # gradio would look for a file there
    names = [f"{name} {score:.2f}" for name, score in zip(found["label_names"], found["scores"])]
    return (image, list(zip(regions(found), names))), ", ".join(names[:10]) or "nothing", record


def regions(found: dict[str, Any]) -> list[Any]:
    """A mask (height, width), or a box in whole pixels, for each object or class; none for classes of the image."""
    if "segmentation" in found:
        return [found["segmentation"] == label for label in found["labels"]]
    if "masks" in found:
        return list(found["masks"])
    return [tuple(map(round, box)) for box in found.get("boxes", np.empty((0, 4))).tolist()]


def build_app(examples: list[str]) -> gr.Interface:
    """The page; `examples` are images to choose from."""
    sample = runtime.predict(np.full((64, 64, runtime.num_channels), 128, np.uint8), 1.0)  # shows which task it is
    lowest = LOWEST_WITH_MASKS if "masks" in sample else 0.0
    start = max(lowest, runtime.processor.get("score_threshold", 0.5)) if "boxes" in sample else 0.0
    label = "Smallest part of the image that a class covers" if "segmentation" in sample else "Lowest score"
    return gr.Interface(
        show,
        [gr.Image(type="filepath", label="Image"), gr.Slider(lowest, 1, start, step=0.01, label=label)],
        [gr.AnnotatedImage(label="Prediction"), gr.Textbox(label="Best"), gr.JSON(label="JSON")],
        examples=[[path, start] for path in examples] or None,
        title="{{ name }}",
        api_name="predict",
        flagging_mode="never",
        analytics_enabled=False,
    )


if __name__ == "__main__":
    build_app(sorted(map(str, here.glob("examples/*")))).launch()
