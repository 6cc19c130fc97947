"""Predictions of an exported model by numpy, Pillow and its runtime: without torch, transformers and hf_vlm.

This file is in the folder of every exported model as `predict.py`. It prints one line of JSON per image, as
`hf-vlm predict` does:

    python predict.py photo.jpg --threshold 0.5

and with `--label_maps FOLDER` writes PNGs with the class of each pixel, of a model that classifies pixels. Or it is
imported: `Runtime("folder").predict("photo.jpg")`. `pip install onnxruntime numpy pillow` is all that an ONNX model
needs; one of OpenVINO needs openvino in place of onnxruntime.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

__all__ = ["Runtime", "as_record"]

Array = np.ndarray[Any, Any]
Run = Callable[[Array], dict[str, Array]]

DECIMALS = {"score": 4, "fraction": 6, "box": 2}  # of what is written as text; boxes are in pixels
MIN_DETECTIONS = 300  # candidates of an image, or as many as queries
CONFIGS = ("config.json", "preprocessor_config.json")


class Runtime:
    """An exported model in a folder, ready to predict.

    Args:
        folder: Folder that `hf-vlm export` wrote.
        num_threads: Threads of the runtime; by default it chooses, which is mostly all cores.

    Raises:
        ValueError: The folder holds no model that can be run here, or its runtime is not installed.
    """

    def __init__(self, folder: str | os.PathLike[str], *, num_threads: int | None = None) -> None:
        self.folder = Path(folder)
        self.config, self.processor = (_read_json(self.folder / name) for name in CONFIGS)
        model_type = self.config.get("model_type")
        if model_type not in POST_PROCESSING:
            raise ValueError(
                f"{folder} holds a model of the type {model_type!r}, but only {', '.join(POST_PROCESSING)} are run "
                "without torch: use hf-vlm predict."
            )
        self._post_process = POST_PROCESSING[model_type]
        _check_processor(self.folder, self.processor)
        mean, size = self.processor["image_mean"], self.processor["size"]
        self.num_channels = 3 if isinstance(mean, float | int) else len(mean)
        self.input_size: tuple[int, int] = size["height"], size["width"]
        self._run = _open_program(self.folder, num_threads)

    def predict(self, image: str | os.PathLike[str] | Image.Image | Array, threshold: float | None = None) -> Any:
        """What the model finds in an image.

        Args:
            image: Path, Pillow image, or array (height, width, channels) of uint8 with RGB colours.
            threshold: Lowest score to report, 0 to 1; by default the model's own (0.5 for detections).

        Returns:
            A dict of `image_size` (height, width), `path` and, best first, `scores` (n,), `labels` (n,) and
            `label_names`; `boxes` (n, 4) x1, y1, x2, y2 in pixels of a detector, with `masks` (n, height, width) bool
            where it finds these; `segmentation` (height, width) of a model that classifies pixels, whose scores are
            fractions of the image. Of an encoder in their place `features` (hidden_size,), the mean of its patch
            tokens.

        Raises:
            ValueError: The image cannot be read, or the threshold is not between 0 and 1.
        """
        if threshold is not None and not 0 <= threshold <= 1:
            raise ValueError(f"threshold is {threshold}; scores are from 0 to 1.")
        array = read_image(image, self.num_channels)
        height, width = array.shape[:2]
        outputs = {name: value[0] for name, value in self._run(self.preprocess(array)[None]).items()}
        found = self._post_process(outputs, (height, width), threshold, self)
        found |= {"image_size": (height, width), "path": None}
        if "labels" in found:
            names = self.config["id2label"]
            found["label_names"] = [names[str(label)] for label in found["labels"].tolist()]
        return found | ({"path": os.fspath(image)} if isinstance(image, str | os.PathLike) else {})

    def preprocess(self, image: Array) -> Array:
        """An image (height, width, channels) uint8 to the model's input (channels, rows, columns) float32."""
        settings = self.processor
        if settings["do_resize"]:
            height, width = self.fitted_size(image.shape[:2])
            picture = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
            resized = np.atleast_3d(np.array(picture.resize((width, height), resample=settings["resample"])))
            mean = np.multiply(settings["image_mean"], 1 / settings["rescale_factor"] if settings["do_rescale"] else 1)
            image = np.full((*self.input_size, image.shape[2]), np.rint(mean), np.uint8)
            image[:height, :width] = resized
        pixels = np.moveaxis(np.atleast_3d(image), -1, 0).astype(np.float32)
        if settings["do_rescale"]:
            pixels = (pixels.astype(np.float64) * settings["rescale_factor"]).astype(np.float32)
        if settings["do_normalize"]:
            mean, std = (np.asarray(settings[name], np.float32) for name in ("image_mean", "image_std"))
            pixels = ((pixels.T - mean) / std).T
        return np.ascontiguousarray(pixels)

    def fitted_size(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """Rows and columns of the model's input that show an image (height, width); the others are padding."""
        if not self.processor.get("do_pad"):
            return self.input_size
        scale = min(self.input_size[0] / size[0], self.input_size[1] / size[1])
        return tuple(min(max(round(side * scale), 1), most) for side, most in zip(size, self.input_size))

    def resize_maps(self, maps: Array, size: tuple[int, int]) -> Array:
        """Maps (channels, rows, columns) of the model's input at the size of its image, without the padding."""
        if self.processor.get("do_pad"):
            rows, columns = self.fitted_size(size)
            maps = resize_bilinear(maps, self.input_size)[:, :rows, :columns]
        return resize_bilinear(maps, size)


def read_image(image: Any, num_channels: int) -> Array:
    """An image upright, (height, width, num_channels) uint8.

    ValueError where it cannot be read, or is an array of another type or of other channels.
    """
    if isinstance(image, np.ndarray):
        if image.ndim != 3 or image.shape[2] != num_channels or image.dtype != np.uint8:
            raise ValueError(
                f"An image array has the shape {image.shape} and the type {image.dtype}, but must be (height, width, "
                f"{num_channels}) of uint8."
            )
        return image
    if num_channels not in (1, 3):
        raise ValueError(f"The model takes {num_channels} channels: give arrays, files have 1 or 3.")
    try:
        picture = image if isinstance(image, Image.Image) else Image.open(image)
        picture.load()
        picture = ImageOps.exif_transpose(picture)
        if picture.mode.startswith("I;16"):
            picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
        elif picture.mode in ("I", "F"):
            raise ValueError("pixels of 32 bits have no known range; store them as 8 or 16 bits")
        if picture.has_transparency_data:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        array = np.array(picture.convert("L" if num_channels == 1 else "RGB"))
    except Exception as error:  # Pillow raises anything for broken files
        raise ValueError(f"{str(image)!a} cannot be read: {error}") from error
    return np.atleast_3d(array)


# --- from outputs of one image to what is found in it, as the image processors of hf_vlm do


def find_objects(outputs: dict[str, Array], size: tuple[int, int], threshold: float | None, of: Runtime) -> Any:
    """Detections from `logits` (queries, classes) and `pred_boxes` (queries, 4), the best pairs of query and class,
    and their masks from `pred_masks` (queries, rows, columns), where there are any."""
    logits, boxes = outputs["logits"], outputs["pred_boxes"]
    threshold = of.processor.get("score_threshold", 0.5) if threshold is None else threshold
    centre, extent = boxes[:, :2], boxes[:, 2:]
    corners = np.clip(np.concatenate([centre - extent / 2, centre + extent / 2], axis=1), 0, 1)
    height, width = size
    covered = [side * full / part for side, full, part in zip(size, of.input_size, of.fitted_size(size))]
    pixels = np.minimum(corners * np.array(2 * covered[::-1], np.float32), np.array(2 * [width, height]))
    is_there = (pixels[:, 2:] > pixels[:, :2]).all(axis=1) | (not of.processor.get("do_pad"))  # not in the padding
    scores = (sigmoid(logits) * is_there[:, None]).ravel()
    best = np.argsort(-scores, kind="stable")[: max(MIN_DETECTIONS, len(logits))]
    best = best[scores[best] > threshold]
    queries, labels = np.divmod(best, logits.shape[1])
    found = {"scores": scores[best], "labels": labels, "boxes": pixels[queries].astype(np.float32)}
    if "pred_masks" in outputs:
        found["masks"] = np.zeros((len(best), height, width), bool)
        for mask, query in zip(found["masks"], queries):
            mask[:] = of.resize_maps(outputs["pred_masks"][query][None], size)[0] > 0  # a probability above 0.5
    return found


def find_classes(outputs: dict[str, Array], size: tuple[int, int], threshold: float | None, of: Runtime) -> Any:
    """Classes from `logits` (classes,): the best one, or all above the threshold where an image has several."""
    logits = outputs["logits"]
    if of.config.get("problem_type") == "multi_label_classification":
        scores, limit, default = sigmoid(logits), len(logits), of.processor.get("score_threshold", 0.5)
    else:
        exponents = np.exp(logits - logits.max())
        scores, limit, default = exponents / exponents.sum(), 1, 0.0
    best = np.argsort(-scores, kind="stable")[:limit]
    best = best[scores[best] >= (default if threshold is None else threshold)]
    return {"scores": scores[best], "labels": best}


def find_segments(outputs: dict[str, Array], size: tuple[int, int], threshold: float | None, of: Runtime) -> Any:
    """The class of each pixel from `logits` (classes, rows, columns), and the fractions that the classes cover."""
    classes = of.resize_maps(outputs["logits"], size).argmax(axis=0)  # (height, width)
    counts = np.bincount(classes.ravel(), minlength=len(outputs["logits"]))
    fractions = (counts / classes.size).astype(np.float32)
    largest = np.argsort(-fractions, kind="stable")
    largest = largest[(fractions[largest] > 0) & (fractions[largest] >= (threshold or 0.0))]
    return {"segmentation": classes, "scores": fractions[largest], "labels": largest}


def find_features(outputs: dict[str, Array], size: tuple[int, int], threshold: float | None, of: Runtime) -> Any:
    """The mean of the patch tokens in `last_hidden_state` (tokens, hidden_size)."""
    tokens = outputs["last_hidden_state"]
    num_prefix = int(of.config.get("use_class_token", True)) + of.config.get("num_register_tokens", 0)
    return {"features": tokens[num_prefix:].mean(axis=0)}


POST_PROCESSING: dict[str, Callable[..., Any]] = {  # by the `model_type` of config.json
    "vlm_vit": find_features,
    "vlm_vit_detection": find_objects,
    "vlm_vit_instance_segmentation": find_objects,
    "vlm_vit_classification": find_classes,
    "vlm_vit_semantic_segmentation": find_segments,
    "vlm_vit_mask_query_segmentation": find_segments,
}


def sigmoid(logits: Array) -> Array:
    """1 / (1 + exp(-logits)), float32."""
    return (1 / (1 + np.exp(-logits.astype(np.float64)))).astype(np.float32)  # in float64 nothing overflows


def resize_bilinear(maps: Array, size: tuple[int, int]) -> Array:
    """Maps (channels, rows, columns) at another size, as torch's `interpolate` with `align_corners=False`."""
    for axis, length in enumerate(size, start=1):
        count = maps.shape[axis]
        positions = np.clip((np.arange(length) + 0.5) * (count / length) - 0.5, 0, count - 1)
        low = positions.astype(np.int64)
        high = np.minimum(low + 1, count - 1)
        weight = (positions - low).astype(np.float32)
        weight = weight[:, None] if axis == 1 else weight
        maps = maps.take(low, axis) * (1 - weight) + maps.take(high, axis) * weight
    return maps


# --- the folder


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}. Name a folder that hf-vlm export wrote.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a mapping, but holds a {type(content).__name__}.")
    return content


def _check_processor(folder: Path, settings: dict[str, Any]) -> None:
    if settings.get("inference", "whole") != "whole":
        raise ValueError(f"{folder} cuts images into windows, which is not done without torch: use hf-vlm predict.")
    if settings.get("do_center_crop") or not {"height", "width"} <= {*settings["size"]}:
        raise ValueError(f"{folder} crops images, or has no size of a height and width: use hf-vlm predict.")


def _open_program(folder: Path, num_threads: int | None) -> Run:
    for name, (package, opener) in RUNTIMES.items():
        if (folder / name).is_file():
            try:
                return opener(folder / name, num_threads)
            except ModuleNotFoundError as error:
                raise ValueError(f"{name} needs {package}: pip install {package}") from error
    raise ValueError(f"{folder} holds no program that is run without torch: {' or '.join(RUNTIMES)}.")


def _open_onnx(path: Path, num_threads: int | None) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads or 0
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda pixel_values: dict(zip(names, session.run(None, {"pixel_values": pixel_values})))


def _open_openvino(path: Path, num_threads: int | None) -> Run:
    import openvino

    core = openvino.Core()
    program = core.read_model(str(path))
    # The CPU does not heed the precision that the program records: where it can, it computes in bfloat16.
    hint = program.get_rt_info(["runtime_options", "INFERENCE_PRECISION_HINT"]).astype(str)
    settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": hint}
    settings |= {"INFERENCE_NUM_THREADS": num_threads} if num_threads else {}
    model = core.compile_model(program, "CPU", settings)
    names = [output.get_any_name() for output in model.outputs]
    return lambda pixel_values: dict(zip(names, model({"pixel_values": pixel_values}).values()))


RUNTIMES: dict[str, tuple[str, Callable[[Path, int | None], Run]]] = {
    "model.onnx": ("onnxruntime", _open_onnx),
    "openvino_model.xml": ("openvino", _open_openvino),
}


# --- the command


def as_record(found: dict[str, Any]) -> dict[str, Any]:
    """What `predict` returns as JSON values, as `hf-vlm predict` prints them."""
    height, width = found["image_size"]
    record: dict[str, Any] = {"path": found["path"], "height": height, "width": width}
    if "features" in found:
        return record | {"features": found["features"].tolist()}
    value = "fraction" if "segmentation" in found else "score"
    entries: list[dict[str, Any]] = [
        {"label": name, "label_id": int(label), value: round(float(score), DECIMALS[value])}
        for name, label, score in zip(found["label_names"], found["labels"], found["scores"], strict=True)
    ]
    if "boxes" not in found:
        return record | {"classes": entries}
    for entry, box in zip(entries, found["boxes"].astype(float).round(DECIMALS["box"]).tolist(), strict=True):
        entry["box"] = dict(zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
    for entry, mask in zip(entries, found.get("masks", ())):
        entry["mask"] = {"size": [height, width], "counts": encode_runs(run_lengths(mask))}
    return record | {"detections": entries}


def run_lengths(mask: Array) -> list[int]:
    """Lengths of the runs of equal pixels of a mask (height, width), down the columns, beginning with zeros."""
    flat = np.concatenate([[False], mask.T.ravel()])
    return list(map(int, np.diff(np.flatnonzero(flat[1:] != flat[:-1]), prepend=0, append=mask.size)))


def encode_runs(runs: Sequence[int]) -> str:
    """Run lengths as COCO's text: differences to the run before last, in characters of 5 bits, the lowest first
    (https://github.com/cocodataset/cocoapi/blob/master/common/maskApi.c, `rleToString`)."""
    text = ""
    for index, run in enumerate(runs):
        value, more = run - (runs[index - 2] if index > 2 else 0), True
        while more:
            bits, value = value & 31, value >> 5
            more = value != (-1 if bits & 16 else 0)  # the highest bit is the sign
            text += chr(48 + (bits | 32 * more))
    return text


def save_label_map(found: dict[str, Any], path: Path) -> None:
    """Writes the class number of each pixel as a greyscale PNG, of 8 bits, or of 16 where 256 classes are too few.

    ValueError where the model does not classify pixels, or the file cannot be written.
    """
    if "segmentation" not in found:
        raise ValueError("--label_maps is for models that classify pixels, and this one does not.")
    classes = found["segmentation"]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(classes.astype(np.uint8 if classes.max() < 256 else np.uint16)).save(path)
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error}") from error


def label_map_paths(images: Sequence[str], folder: Path | None) -> Sequence[Path | None]:
    """Paths of the label maps of images in a folder; None for each where there is no folder.

    ValueError where two of them would be the same, or one an image.
    """
    if folder is None:
        return [None] * len(images)
    paths = [folder / f"{Path(image).stem}.png" for image in images]
    taken = {os.path.realpath(image) for image in images}
    for path in map(os.path.realpath, paths):
        if path in taken:
            raise ValueError(f"--label_maps {folder}: {path} would be written twice, or over an image.")
        taken.add(path)
    return paths


def main(argv: Sequence[str] | None = None) -> int:
    """Predicts on images with the model beside this file; returns 2 where something cannot be read, else 0."""
    parser = argparse.ArgumentParser(description="Predicts on images; prints one line of JSON per image.")
    parser.add_argument("images", nargs="+", help="image files")
    parser.add_argument("--threshold", type=float, help="lowest score to report, 0 to 1; the model's own by default")
    parser.add_argument("--label_maps", type=Path, help="folder for PNGs of the class of each pixel, named as images")
    parser.add_argument("--model", default=Path(__file__).parent, help="folder of the model; that of this file")
    parser.add_argument("--num_threads", type=int, help="threads to compute with; all cores by default")
    arguments = parser.parse_args(argv)
    status = 0
    try:
        maps = label_map_paths(arguments.images, arguments.label_maps)
        runtime = Runtime(arguments.model, num_threads=arguments.num_threads)
    except ValueError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    for path, label_map in zip(arguments.images, maps, strict=True):
        try:
            found = runtime.predict(path, arguments.threshold)
            if label_map is not None:
                save_label_map(found, label_map)
            sys.stdout.write(json.dumps(as_record(found)) + "\n")
        except ValueError as error:
            sys.stderr.write(f"{error}\n")
            status = 2
    return status


if __name__ == "__main__":
    sys.exit(main())
