"""A web page for a model: an image, a threshold, and what is found in it. It needs the extra `app` (gradio)."""

import functools
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hf_vlm.data.io.decode import BadImageError, decode_image
from hf_vlm.deploy.markdown import markdown
from hf_vlm.deploy.prediction import Prediction

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read on import: gradio reports its use otherwise

import gradio as gr

__all__ = ["build_app", "mount_app"]

NUM_CACHED = 4  # images whose predictions are kept, for thresholds to be applied to
MAX_SIDE = 1600  # pixels of the rendered picture
MAX_NAMES = 5  # of classes in a line
LOWEST_WITH_MASKS = 0.1
MAX_WAITING = 64  # events of all visitors
KEPT_SECONDS = 3600  # of uploaded files
SAVE_JSON = """(found) => {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([JSON.stringify(found, null, 1)], {type: "application/json"}));
  link.download = "prediction.json";
  link.click();
  URL.revokeObjectURL(link.href);
}"""


def build_app(predictor: Any, examples: Sequence[str | Path] = (), *, name: str = "Predictions") -> gr.Blocks:
    """A page that shows predictions, of any task. It is gradio's `Blocks`: `launch()` serves it alone.

    The model sees an image once; thresholds are applied to what it predicted.

    Args:
        predictor: A [`Predictor`], or what has its `predict(images, threshold)`.
        examples: Images to choose from.
        name: Title of the page.
    """
    # This shows which task it is, and a first call takes longest.
    sample = predictor.predict([np.full((64, 64, 3), 128, np.uint8)], 0.0)[0]

    @functools.lru_cache(maxsize=NUM_CACHED)
    def predicted(path: str) -> tuple[NDArray[Any], Prediction]:
        image, _ = decode_image(path)
        return image, predictor.predict([image], lowest_threshold(sample))[0]

    def show(path: str | None, threshold: float) -> tuple[Any, ...]:
        nothing: tuple[Any, ...] = None, "", [], None, gr.Button(interactive=False)
        if path is None:
            return nothing
        try:
            image, everything = predicted(path)
        except BadImageError as error:  # gr.Error would leave the predictions of the image before
            reason = str(error).rpartition(f"{os.path.basename(path)}: ")[2]
            gr.Warning(f"This file cannot be read: {reason}", title="Choose another file")
            return nothing
        found = everything.select(everything.scores >= threshold)
        return render(image, found), summary(found), table(found), found.to_dict(), gr.Button(interactive=True)

    with gr.Blocks(title=name, analytics_enabled=False, delete_cache=(KEPT_SECONDS, KEPT_SECONDS)) as app:
        gr.Markdown(f"# {markdown(name)}")
        with gr.Row(equal_height=False):
            with gr.Column(min_width=300):
                photo = _image_input(examples)
                threshold = _threshold_input(sample)
                if examples:
                    gr.Examples([os.fspath(path) for path in examples], photo, label="Examples")
            with gr.Column(scale=2, min_width=300):
                picture = gr.Image(
                    label="Prediction", show_label=False, interactive=False, format="webp", buttons=["fullscreen"]
                )
                counts = gr.Markdown()
                rows = gr.Dataframe(headers=headers(sample), show_label=False, interactive=False)
                with gr.Accordion("JSON", open=False):
                    record = gr.JSON(show_label=False)
                save = gr.Button("Save as JSON", interactive=False, size="sm")
        inputs, outputs = [photo, threshold], [picture, counts, rows, record, save]
        photo.change(show, inputs, outputs, api_name="predict")
        threshold.change(show, inputs, outputs, show_progress="hidden", api_visibility="private")
        save.click(None, record, None, js=SAVE_JSON)
    app.queue(max_size=MAX_WAITING, default_concurrency_limit=1)
    return app


def _image_input(examples: Sequence[str | Path]) -> gr.Image:
    photo = gr.Image(label="Image", sources=["upload", "clipboard"], type="filepath", image_mode=None, buttons=[])
    uploads, allowed = Path(photo.GRADIO_CACHE).resolve(), {Path(path).resolve() for path in examples}

    async def keep(path: str | Path | None) -> str | None:
        """Refuses URLs, which gradio would fetch, and files of this machine, which it opens where it is mounted."""
        if path is not None and Path(path).resolve() not in allowed and uploads not in Path(path).resolve().parents:
            raise gr.Error("This page takes uploaded files alone.", print_exception=False)
        return await move(path)

    move, photo.async_move_resource_to_block_cache = photo.async_move_resource_to_block_cache, keep
    # Files are decoded here, within its limits, and not by gradio.
    photo.preprocess = lambda payload: payload and payload.path
    return photo


def _threshold_input(sample: Prediction) -> gr.Slider:
    if sample.segmentation is not None:
        return gr.Slider(0, 1, 0, step=0.01, label="Smallest part of the image that a class covers")
    has_several = sample.boxes is not None or len(sample) > 1  # one class per image is reported whatever its score
    return gr.Slider(lowest_threshold(sample), 1, 0.5 if has_several else 0, step=0.01, label="Lowest score")


def mount_app(server: Any, page: gr.Blocks, *, max_bytes: int) -> Any:
    """A FastAPI application with the page at `/`, below its own routes.

    Args:
        max_bytes: Largest file that can be uploaded.
    """
    gr.mount_gradio_app(
        server,
        page,
        path="/",
        max_file_size=max_bytes,
        show_error=False,
        run_history=False,
        footer_links=[],
        ssr_mode=False,
        mcp_server=False,
        enable_monitoring=False,
    )
    server.state.end_streams = server.routes[-1].app.stop_event.set
    return server


def lowest_threshold(sample: Prediction) -> float:
    """Where the slider begins, and what the model is asked for: masks of all candidates would fill the memory."""
    return 0.0 if sample.masks is None else LOWEST_WITH_MASKS


def summary(found: Prediction) -> str:
    """What was found, in a line."""
    if not len(found):
        return "Nothing reaches the threshold."
    if found.boxes is None:
        return ", ".join(
            f"**{markdown(name)}** {score:.2f}"
            for name, score in zip(found.label_names[:MAX_NAMES], found.scores.tolist())
        )
    counts = Counter(found.label_names).most_common()
    more = f" and {len(counts) - MAX_NAMES} more classes" if len(counts) > MAX_NAMES else ""
    return ", ".join(f"{count} **{markdown(name)}**" for name, count in counts[:MAX_NAMES]) + more


def render(image: NDArray[Any], found: Prediction) -> Image.Image:
    """The prediction on its image, no larger than a screen."""
    picture = found.draw(image)
    picture.thumbnail((MAX_SIDE, MAX_SIDE))
    return picture


def headers(sample: Prediction) -> list[str]:
    """Names of the columns of `table`."""
    value = "score" if sample.segmentation is None else "fraction"
    return ["class", value] + ([] if sample.boxes is None else ["left", "top", "right", "bottom"])


def table(found: Prediction) -> list[list[Any]]:
    """A row per object or class, best first; boxes in whole pixels."""
    rows: list[list[Any]] = [[name, round(score, 3)] for name, score in zip(found.label_names, found.scores.tolist())]
    if found.boxes is not None:
        rows = [row + [round(value) for value in box] for row, box in zip(rows, found.boxes.tolist())]
    return rows
