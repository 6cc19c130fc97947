"""The sets of `label_efficiency.py`: what is trained how long, and the folders that its commands read.

A seed decides which images are labelled: the first of one permutation, of classifiers the first of each class, so that
10 are among the 50. All arms of a seed see the same ones. Everything is written to Parquet once: unlabelled images
without their labels, so that no pretraining can use them, and a folder for each number of labels and seed, with the
test split beside its training split.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hf_vlm.data.formats.mask_classes import MASK_CLASSES_FILE
from hf_vlm.data.io.decode import decode_mask
from hf_vlm.data.masks import IGNORED
from hf_vlm.data.sources import open_source

__all__ = [
    "DETECTION",
    "LABELS",
    "SETS",
    "DataSet",
    "as_words",
    "labelled_folder",
    "labelled_rows",
    "prepare",
    "quick",
]

LABELS = ("10", "50", "all")
SCENES = "scenes:icons"
CELLS = {"augmentation.quarter_turn_probability": 0.5}  # have no up and down; the recipe flips both ways
CROPS = {"augmentation.crop_probability": 0.8, "augmentation.crop_scale": [0.6, 1.3]}
UPRIGHT = {"augmentation.vertical_flip_probability": 0.0}
MIN_PIXELS = 64  # of an object that is taken from a mask: 8 x 8
ROWS_PER_GROUP = 256  # a row group is read at a time


@dataclass(frozen=True, kw_only=True)
class TaskSettings:
    """What the sets of a task have in common.

    Args:
        recipe: Recipe of fine-tuning.
        pretraining: Recipe of own pretraining.
        pretrains_head: Whether that is of the head too, which then has the same keys as in fine-tuning.
        metric: Of the test split, what tables and curves show.
        columns: Columns of the labels.
    """

    recipe: str
    pretraining: str
    pretrains_head: bool
    metric: str
    columns: tuple[str, ...]


DETECTION = TaskSettings(
    recipe="detection/vit_nano_cpu.yaml",
    pretraining="region_detection/vit_nano_cpu.yaml",
    pretrains_head=True,
    metric="ap",
    columns=("objects",),
)
INSTANCES = replace(
    DETECTION,
    recipe="instance_segmentation/vit_nano_cpu.yaml",
    pretraining="region_instance_segmentation/vit_nano_cpu.yaml",
    metric="mask_ap",
)
PIXELS = TaskSettings(
    recipe="segmentation/vit_nano_cpu.yaml",
    pretraining="mae/vit_nano_cpu.yaml",
    pretrains_head=False,
    metric="miou",
    columns=("mask",),
)
CLASSES = TaskSettings(
    recipe="classification/vit_nano_cpu.yaml",
    pretraining="lejepa/vit_nano_cpu.yaml",
    pretrains_head=False,
    metric="top1",
    columns=("label",),
)


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """A set of images and how models of it are built and trained.

    Args:
        source: Folder within `--data_dir`, or built-in scenes.
        task: What its labels are, and what is trained.
        encoder: Keys of all recipes, which say what the encoder is.
        head: Keys of those of fine-tuning, which say what the head is.
        training: Keys of fine-tuning, which takes one to four minutes of one core.
        pretraining: Keys of own pretraining, which takes two to eight.
        num_unlabelled: The first images of the training split; None for all.
        num_labelled: Number of images that "all" stands for; None for all unlabelled ones.
        num_test: The first images of the test split; None for all.
        max_objects: Images with more are left out; None for none.
        classes_of_masks: For a set that has the classes of pixels and no boxes: those whose connected pixels are
            objects, by their value.
        mask_classes: For a set of masks without names: those of the values 0, 1, ...; further values have no class.
    """

    source: str
    task: TaskSettings = DETECTION
    encoder: dict[str, Any]
    head: dict[str, Any]
    training: dict[str, Any]
    pretraining: dict[str, Any]
    num_unlabelled: int | None = None
    num_labelled: int | None = None
    num_test: int | None = None
    max_objects: int | None = None
    classes_of_masks: Mapping[int, str] | None = None
    mask_classes: tuple[str, ...] = ()

    @property
    def is_built_in(self) -> bool:
        return self.source.startswith("scenes")


def as_words(keys: Mapping[str, Any]) -> list[str]:
    """Keys of a recipe as words of a command."""
    return [word for name, value in keys.items() for word in (f"--{name}", str(value))]


# As in the demo: the recipe's encoder in batches of 8 takes longer (AP 0.014 on bccd/50 after 800 steps, 4 minutes).
SMALL = {
    "encoder_config.hidden_size": 96,
    "encoder_config.num_hidden_layers": 4,
    "encoder_config.num_attention_heads": 3,
}
BATCHES = {"per_device_train_batch_size": 16}

# Most are 256 x 256 and 320 x 256 pixels, with nuclei of 17, here 13, in the median: a patch of 16 would hold two.
# COCO's AP counts 100 detections: of the training images 94 %, of the test images 95 % have no more nuclei.
NUCLEI = DataSet(
    source="dsb2018_nuclei",
    encoder={"image_size": 192, "encoder_config.patch_size": 12, **SMALL},
    head={"model_config.num_queries": 150},
    training={"max_steps": 450, **BATCHES, **CELLS, **CROPS},
    pretraining={"max_steps": 700, "rounds": 2, **CELLS, **CROPS},
    max_objects=100,
)

SETS = {
    # 640 x 480 pixels; at this size the median box has 38 pixels, a platelet's one patch. At most 28 objects.
    "bccd": DataSet(
        source="bccd",
        encoder={"image_size": 192, "encoder_config.patch_size": 16, **SMALL},
        head={"model_config.num_queries": 60},
        training={"max_steps": 700, **BATCHES, **CELLS, **CROPS},
        pretraining={"max_steps": 1000, "rounds": 2, **CELLS, **CROPS},
    ),
    "dsb2018_nuclei": NUCLEI,
    "nuclei_masks": replace(NUCLEI, task=INSTANCES),
    # 96 x 96 pixels, at most 3 objects of 26 to 48, some of which have an up and a down; lengths are the demo's.
    "scenes": DataSet(
        source=SCENES,
        encoder={"image_size": 96, "encoder_config.patch_size": 16, **SMALL},
        head={"model_config.num_queries": 16},
        training={"max_steps": 700, **BATCHES, **CROPS, **UPRIGHT},
        pretraining={"max_steps": 1200, "rounds": 1, **BATCHES, **CROPS, **UPRIGHT},
        num_unlabelled=8000,
        num_labelled=1000,
        num_test=500,
    ),
    # How far the laptop's recipe comes with all labels, more pixels for the platelets and a longer training.
    "bccd_long": DataSet(
        source="bccd",
        encoder={"image_size": "[240, 320]"},
        head={},
        training={
            "max_steps": 2000,
            "augmentation.jitter": "[0.3, 0.3, 0.3, 0.05]",
            "augmentation.crop_probability": 0.8,
            "augmentation.crop_scale": "[0.4, 1.3]",
            **CELLS,
        },
        pretraining={"max_steps": 500, **CELLS, **CROPS},
    ),
    # Nothing was tuned on it: the recipes as they are, so the larger encoder and 1000 steps, at 192 x 256 pixels.
    "camvid": DataSet(
        source="camvid",
        encoder={},
        head={},
        training={},
        pretraining={},
        classes_of_masks={6: "sign", 8: "car", 9: "pedestrian"},
    ),
    # 480 x 360 pixels: a patch is 30 of them wide and high.
    "camvid_pixels": DataSet(
        source="camvid",
        task=PIXELS,
        encoder={"image_size": "[96, 128]", "encoder_config.patch_size": 8},
        head={},
        training={"max_steps": 400},
        pretraining={"max_steps": 1200, "views.vertical_flip_probability": 0.0},
        mask_classes=(
            *("sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian"),
            "bicyclist",
        ),
    ),
    "cifar10": DataSet(
        source="cifar10",
        task=CLASSES,
        encoder={"image_size": 32, "encoder_config.patch_size": 4},
        head={},
        training={"max_steps": 600, "per_device_train_batch_size": 64},
        pretraining={
            "max_steps": 1500,
            "per_device_train_batch_size": 64,
            "views.local": '{"num_views": 4, "size": 16, "crop_scale": [0.1, 0.4]}',
        },
        num_unlabelled=20000,
        num_labelled=5000,
        num_test=2000,
    ),
}


def quick(data: DataSet) -> DataSet:
    """The set with a few images and no second round, whose detector would find nothing: for a check that all runs."""
    pretraining = data.pretraining | ({"rounds": 1} if data.task.pretrains_head else {})
    return replace(data, num_unlabelled=40, num_labelled=20, num_test=8, pretraining=pretraining)


def prepare(data: DataSet, folder: Path, data_dir: Path | None) -> None:
    """Writes the images of a set with their labels to `pool` in a folder, and without to `unlabelled`.

    Raises:
        ValueError: The set is one of files, and there is no folder of these.
    """
    if (folder / "unlabelled" / "train.parquet").is_file():  # written last
        return
    if not data.is_built_in and data_dir is None:
        raise ValueError(f"The set {data.source} needs --data_dir, the folder that it is in.")
    location = data.source if data.is_built_in else str(data_dir / data.source)
    for split, number in (("test", data.num_test), ("train", data.num_unlabelled)):
        source = open_source(location, split, num_samples=number)
        rows, features = list(source), source.features
        if data.classes_of_masks:
            rows, features = _with_objects(rows, data.classes_of_masks), features | _object_features(data)
        if data.max_objects:
            rows = [row for row in rows if len(row["objects"]["bbox"]) <= data.max_objects]
        if data.mask_classes:
            rows = [row | {"mask": _without_others(row["mask"], len(data.mask_classes))} for row in rows]
        identity = [name for name in ("image", "image_id") if name in features]
        _write(as_table(rows, features, (*identity, *data.task.columns)), folder / "pool" / f"{split}.parquet")
    _write(as_table(rows, features, identity), folder / "unlabelled" / "train.parquet")


def _without_others(mask: dict[str, Any], num_classes: int) -> dict[str, Any]:
    """A mask with the value of no class where it has that of a class that is not counted."""
    values = decode_mask(mask)
    values[values >= num_classes] = IGNORED
    return {"bytes": cv2.imencode(".png", values.astype(np.uint8))[1].tobytes(), "path": None}


def _object_features(data: DataSet) -> dict[str, Any]:
    names = datasets.ClassLabel(names=list((data.classes_of_masks or {}).values()))
    boxes = datasets.List(datasets.List(datasets.Value("float32"), length=4))
    return {"objects": {"bbox": boxes, "category": datasets.List(names)}}


def _with_objects(rows: list[dict[str, Any]], classes: Mapping[int, str]) -> list[dict[str, Any]]:
    """Examples with a box for each connected part of a class in their mask, of at least `MIN_PIXELS`; parts of one
    object behind another are several, and objects that touch are one.
    """
    for row in rows:
        mask = cv2.imdecode(np.frombuffer(row["mask"]["bytes"], np.uint8), cv2.IMREAD_GRAYSCALE)
        boxes: list[list[int]] = []
        categories: list[int] = []
        for category, value in enumerate(classes):
            _, _, parts, _ = cv2.connectedComponentsWithStats(np.uint8(mask == value), connectivity=8)
            found = [part[:4].tolist() for part in parts[1:] if part[cv2.CC_STAT_AREA] >= MIN_PIXELS]
            boxes += found
            categories += [category] * len(found)
        row["objects"] = {"bbox": boxes, "category": categories}
    return rows


def labelled_folder(data: DataSet, folder: Path, labels: str, seed: int) -> Path:
    """A folder with the labelled images of a seed as training split, and with the test split, after `prepare`."""
    found = folder / f"{labels}-{seed}"
    if not (found / "test.parquet").is_file():  # written last
        pool = pq.read_table(folder / "pool" / "train.parquet")
        classes = pool["label"].to_pylist() if data.task is CLASSES else None
        rows = labelled_rows(len(pool), labels, seed, data.num_labelled, classes)
        _write(pool.take(rows), found / "train.parquet")
        if data.mask_classes:
            (found / MASK_CLASSES_FILE).write_text("\n".join(data.mask_classes))
        _write(pq.read_table(folder / "pool" / "test.parquet"), found / "test.parquet")
    return found


def labelled_rows(
    num_rows: int,
    labels: str,
    seed: int,
    num_labelled: int | None = None,
    classes: Sequence[int] | None = None,
) -> list[int]:
    """Which of the training images are labelled, by the permutation of the seed.

    Args:
        num_rows: Number of unlabelled images.
        labels: Their number, or "all".
        num_labelled: What "all" stands for; None for `num_rows`.
        classes: Class of each image, where the number is that of each class.
    """
    order = np.random.default_rng(seed).permutation(num_rows)
    if labels == "all":
        return sorted(order[: num_labelled or num_rows].tolist())
    if classes is None:
        return sorted(order[: int(labels)].tolist())
    in_order = np.asarray(classes)[order]
    return sorted(row for each in set(classes) for row in order[in_order == each][: int(labels)].tolist())


def as_table(rows: list[dict[str, Any]], features: datasets.Features, columns: Sequence[str]) -> pa.Table:
    """Some columns of examples, with their types."""
    schema = datasets.Features({name: features[name] for name in columns}).arrow_schema
    return pa.Table.from_pylist([{name: row[name] for name in columns} for row in rows], schema=schema)


def _write(table: pa.Table, path: Path) -> None:
    """Writes a Parquet file, which is whole or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".tmp")
    pq.write_table(table, partial, row_group_size=ROWS_PER_GROUP)
    partial.replace(path)
