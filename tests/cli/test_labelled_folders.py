"""Folders as labelling tools export them, by the commands: fine-tuned, evaluated, predicted, and loaded elsewhere."""

import json
import math

import cv2
import numpy as np
import pytest
import yaml
from PIL import Image
from tiny import DETECTION_HEAD

from hf_vlm.cli.main import main
from hf_vlm.registry import find_model
from hf_vlm.tasks import TASKS

HEIGHT, WIDTH = 40, 56
NAMES = ("square", "triangle")
COLORS = ((0, 0, 0), (250, 50, 83), (36, 179, 83))  # of background, squares and triangles in masks
SHORT = (
    *("--image_size", "32", "--max_steps", "2", "--per_device_train_batch_size", "4", "--use_cpu", "true"),
    *("--save_strategy", "no", "--dataloader_num_workers", "0", "--shuffle_block", "8"),
)
MASK_HEAD = {**DETECTION_HEAD, "mask_feature_size": 16}


def polygons(row):
    """Corners (n, 2) of a square and of a triangle in an image, in pixels."""
    x, y = 4 + row, 5 + row
    return np.array([[x, y], [x + 14, y], [x + 14, y + 14], [x, y + 14]]), np.array(
        [[34, 30], [52, 30], [43, 8 + row]]
    )


def write_image(path, row):
    """A picture of the two objects on noise; the classes of its pixels (height, width), 0 for the background."""
    pixels = np.random.default_rng(row).integers(0, 60, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    classes = np.zeros((HEIGHT, WIDTH), np.uint8)
    for label, corners in enumerate(polygons(row), start=1):
        cv2.fillPoly(pixels, [corners], (240, 200 - 90 * label, 60 * label))
        cv2.fillPoly(classes, [corners], label)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return classes


def run_lengths(mask):
    """Run lengths of zeros and ones in turn, column by column, as COCO writes crowds."""
    flat = mask.T.ravel()
    ends = [*np.flatnonzero(np.diff(flat)) + 1, flat.size]
    counts = np.diff([0, *ends]).tolist()
    return {"counts": counts if not flat[0] else [0, *counts], "size": list(mask.shape)}


def write_coco(folder):
    """CVAT's "COCO 1.0": one subset, numbers with holes, attributes, polygons, and a group as run lengths."""
    images, annotations = [], []
    for row in range(8):
        name, image_id = f"photo {row}.jpg", 7 + 3 * row
        write_image(folder / "images" / name, row)
        unused = {"license": 0, "flickr_url": "", "coco_url": "", "date_captured": 0}
        images.append({"id": image_id, "width": WIDTH, "height": HEIGHT, "file_name": name, **unused})
        for label, corners in enumerate(polygons(row)):
            (left, top), (right, bottom) = corners.min(axis=0).tolist(), corners.max(axis=0).tolist()
            crowd = np.zeros((HEIGHT, WIDTH), np.uint8)
            crowd[top:bottom, left:right] = 1
            is_crowd = row == 3 and label == 1
            annotation = {"id": 100 + 5 * len(annotations), "image_id": image_id, "category_id": (2, 5)[label]}
            annotation["segmentation"] = run_lengths(crowd) if is_crowd else [corners.ravel().astype(float).tolist()]
            annotation |= {"area": float((right - left) * (bottom - top)), "iscrowd": int(is_crowd)}
            annotation["bbox"] = [float(left), float(top), float(right - left), float(bottom - top)]
            annotations.append(annotation | {"attributes": {"occluded": False, "rotation": 0.0}})
    categories = [{"id": number, "name": name, "supercategory": ""} for number, name in zip((2, 5), NAMES)]
    content = {"licenses": [{"name": "", "id": 0, "url": ""}], "info": {"contributor": "", "year": ""}}
    content |= {"categories": categories, "images": images, "annotations": annotations}
    (folder / "annotations").mkdir()
    (folder / "annotations" / "instances_default.json").write_text(json.dumps(content))


def write_yolo(folder):
    """Ultralytics' layout for segmentation: a line of a class and relative corners for each object."""
    for split, rows in (("train", range(6)), ("val", range(6, 8))):
        for row in rows:
            write_image(folder / "images" / split / f"{row}.png", row)
            lines = [
                " ".join(map(str, [label, *(corners / (WIDTH, HEIGHT)).ravel().round(6)]))
                for label, corners in enumerate(polygons(row))
            ]
            (folder / "labels" / split).mkdir(parents=True, exist_ok=True)
            (folder / "labels" / split / f"{row}.txt").write_text("\n".join(lines) + "\n")
    content = {"path": ".", "train": "images/train", "val": "images/val", "names": dict(enumerate(NAMES))}
    (folder / "data.yaml").write_text(yaml.safe_dump(content))


def write_colored_masks(folder):
    """CVAT's "Segmentation mask 1.1": Pascal VOC's folders, with classes as colours."""
    lines = [f"{name}:{','.join(map(str, color))}::" for name, color in zip(("background", *NAMES), COLORS)]
    for row in range(8):
        classes = write_image(folder / "JPEGImages" / f"{row}.jpg", row)
        for kind in ("SegmentationClass", "SegmentationObject"):
            (folder / kind).mkdir(exist_ok=True)
            Image.fromarray(np.array(COLORS, np.uint8)[classes]).save(folder / kind / f"{row}.png")
    (folder / "ImageSets" / "Segmentation").mkdir(parents=True)
    (folder / "ImageSets" / "Segmentation" / "default.txt").write_text("\n".join(map(str, range(8))))
    (folder / "labelmap.txt").write_text("\n".join(["# label:color_rgb:parts:actions", *lines]))


def write_cityscapes(folder):
    """Cityscapes' folders, with the classes as numbers."""
    for split, rows in (("train", range(6)), ("val", range(6, 8))):
        for row in rows:
            stem = f"ulm/ulm_{row:06}_000019"
            classes = write_image(folder / "leftImg8bit" / split / f"{stem}_leftImg8bit.png", row)
            mask = folder / "gtFine" / split / f"{stem}_gtFine_labelIds.png"
            mask.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(classes).save(mask)
    (folder / "mask_classes.txt").write_text("\n".join(["background", *NAMES]))


def write_class_folders(folder):
    """A folder for each class, beside a file that an operating system leaves."""
    for split, rows in (("train", range(6)), ("val", range(6, 8))):
        for row in rows:
            write_image(folder / split / NAMES[row % 2] / f"{row}.jpg", row)
        (folder / split / NAMES[0] / ".DS_Store").write_bytes(b"Bud1")


HOLDOUT = ("--holdout", "0.5")  # where there is one subset
OBJECTS, PIXELS = list(NAMES), ["background", *NAMES]
# How the folder is written, the recipe, its head, options, class names and a metric.
CASES = {
    "coco_boxes": (write_coco, "detection", DETECTION_HEAD, HOLDOUT, OBJECTS, "ap50"),
    "coco_masks": (write_coco, "instance_segmentation", MASK_HEAD, HOLDOUT, OBJECTS, "mask_ap"),
    "yolo_boxes": (write_yolo, "detection", DETECTION_HEAD, (), OBJECTS, "ap50"),
    "yolo_masks": (write_yolo, "instance_segmentation", MASK_HEAD, (), OBJECTS, "mask_ap"),
    "colored_masks": (write_colored_masks, "segmentation", {}, HOLDOUT, PIXELS, "miou"),
    "cityscapes": (write_cityscapes, "segmentation", {}, (), PIXELS, "miou"),
    "class_folders": (write_class_folders, "classification", {}, (), OBJECTS, "top1"),
}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """The folder of an encoder that has seen images of such a folder without their labels."""
    folder = tmp_path_factory.mktemp("encoder")
    write_class_folders(folder / "data")
    config = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8}
    words = ["--encoder_config", json.dumps(config), "--model_config.decoder_config", json.dumps(config)]
    words += ["--data", str(folder / "data"), "--probe_steps", "0", "--output_dir", str(folder / "run")]
    assert main(["pretrain", "mae/vit_nano_cpu.yaml", *SHORT, *words]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def finetuned(encoder, tmp_path_factory):
    """`finetuned(case)`: the folders of its data and of the model that was fine-tuned on them."""
    found = {}

    def finetune(case):
        if case not in found:
            write, recipe, head, options, *_ = CASES[case]
            folder = tmp_path_factory.mktemp(case)
            (folder / "data").mkdir()
            write(folder / "data")
            words = ["--data", str(folder / "data"), "--encoder", str(encoder), "--output_dir", str(folder / "run")]
            words += [word for key, value in head.items() for word in (f"--model_config.{key}", str(value))]
            assert main(["finetune", f"{recipe}/vit_nano_cpu.yaml", *SHORT, *words, *options]) == 0
            found[case] = folder / "data", folder / "run"
        return found[case]

    return finetune


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_labelled_folder_becomes_a_model_that_is_evaluated_and_predicts(case, finetuned, tmp_path, capsys):
    *_, options, names, metric = CASES[case]
    data, run = finetuned(case)
    config = json.loads((run / "config.json").read_text())
    assert [config["id2label"][str(index)] for index in range(len(names))] == names
    record = json.loads((run / "run.json").read_text())
    assert record["data"]["num_examples"] in (range(1, 8) if options else [6])
    assert math.isfinite(record["metrics"][metric])

    saved = tmp_path / "metrics.json"
    split = "train" if options else "validation"
    assert main(["evaluate", str(run), "--data", str(data), "--split", split, "--save", str(saved)]) == 0
    metrics = json.loads(saved.read_text())
    assert 0 <= metrics[metric] <= 1
    if not options:  # the images on which it was evaluated in training
        assert metrics[metric] == pytest.approx(record["metrics"][metric], abs=1e-6)

    capsys.readouterr()
    photo = next(path for path in sorted(data.rglob("*")) if path.suffix in (".jpg", ".png"))
    threshold = ["--threshold", "0"] if "boxes" in case or case in ("coco_masks", "yolo_masks") else []
    assert main(["predict", str(run), str(photo), *threshold, "--save", str(tmp_path / "out.png")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["height"], found["width"]) == (HEIGHT, WIDTH)
    entries = found["detections"] if threshold else found["classes"]
    assert entries
    assert {entry["label"] for entry in entries} <= set(names)
    assert cv2.imread(str(tmp_path / "out.png")).size


ELSEWHERE = """
import json
import numpy as np
from transformers import pipeline
found = {}
for name, (task, folder, image, options) in json.loads(MODELS).items():
    found[name] = pipeline(task, model=folder, trust_remote_code=True)(image, **options)
print(json.dumps(found, default=lambda mask: np.asarray(mask).tolist()))
"""


@pytest.mark.slow
def test_fine_tuned_models_are_pipelines_where_the_package_is_not(encoder, finetuned, tmp_path, run_process):
    options = {"coco_boxes": {"threshold": 0.0}, "coco_masks": {"threshold": 0.0}, "colored_masks": {}}
    options |= {"class_folders": {}}
    image = tmp_path / "image.png"
    write_image(image, 1)
    models = {"encoder": ("image-feature-extraction", str(encoder), str(image), {})}
    for case, given in options.items():
        _, run = finetuned(case)
        task = TASKS[find_model(json.loads((run / "run.json").read_text())["method"]).task].pipeline
        models[case] = (task, str(run), str(image), given)
    code = f"MODELS = {json.dumps(json.dumps(models))}\n{ELSEWHERE}"
    found = json.loads(run_process(code, tmp_path, forbid_hf_vlm=True).splitlines()[-1])
    assert np.shape(found["encoder"]) == (1, 17, 32)  # the class token and 4 x 4 patches
    assert np.isfinite(found["encoder"]).all()
    assert len(found["coco_boxes"]) == 5 * len(NAMES)  # a score for each query and class
    assert {entry["label"] for entry in found["coco_boxes"] + found["coco_masks"]} <= set(NAMES)
    assert {np.shape(entry["mask"]) for entry in found["coco_masks"] + found["colored_masks"]} <= {(HEIGHT, WIDTH)}
    masks = [np.array(entry["mask"], bool) for entry in found["colored_masks"]]
    assert (sum(mask.astype(int) for mask in masks) == 1).all()  # one class for each pixel
    assert sum(entry["score"] for entry in found["class_folders"]) == pytest.approx(1)
