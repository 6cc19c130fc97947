"""Images that keep their aspect ratio, from a recipe to a pipeline and to an export that runs without torch."""

import json

import numpy as np
import pytest
from PIL import Image
from transformers import pipeline

from hf_vlm.deploy.export import ExportData, export_model
from hf_vlm.deploy.predict import Predictor
from hf_vlm.deploy.runtime import Runtime
from hf_vlm.tasks.evaluation import evaluate_run
from hf_vlm.training.run import finetune

SIZES = [(40, 120), (120, 40), (64, 64), (90, 60)]  # height, width
NAMES = ["bright", "dark"]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A COCO folder of images of several shapes, each with two rectangles."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    content = {"images": [], "annotations": [], "categories": [{"id": i, "name": n} for i, n in enumerate(NAMES)]}
    for row, (height, width) in enumerate(SIZES):
        pixels = rng.integers(100, 140, (height, width, 3), dtype=np.uint8)
        for label, (x, y, w, h) in enumerate([(2, 3, 18, 24), (width - 24, height - 16, 22, 14)]):
            pixels[y : y + h, x : x + w] = (250, 5)[label]
            polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
            box = {"bbox": [x, y, w, h], "area": w * h, "segmentation": [polygon], "iscrowd": 0}
            content["annotations"].append({"id": 2 * row + label + 1, "image_id": row, "category_id": label} | box)
        Image.fromarray(pixels).save(folder / f"{row}.png")
        content["images"].append({"id": row, "file_name": f"{row}.png", "height": height, "width": width})
    (folder / "annotations.json").write_text(json.dumps(content))
    return folder


@pytest.mark.slow
def test_one_batch_is_learned_and_served_everywhere(images, make_recipe, tmp_path):
    changes = {"data": str(images), "processor_config": {"do_pad": True}, "num_train_examples": 4, "max_steps": 300}
    changes |= {"augmentation": {"flip_probability": 0.0, "crop_probability": 0.0}, "learning_rate": 3e-3}
    changes |= {"eval_split": "train", "num_eval_examples": 4, "image_size": 64, "class_names": None}
    recipe = make_recipe("instance_segmentation", **{k: v for k, v in changes.items() if v is not None})
    finetune(recipe)
    run = recipe["output_dir"]
    metrics = evaluate_run(run, str(images), "train").metrics
    assert metrics["box_ap"] > 0.7
    assert metrics["mask_ap50"] > 0.9
    export_model(run, tmp_path / "onnx", data=ExportData(str(images), split="train", num_examples=4))
    predictor, runtime = Predictor.from_pretrained(run, device="cpu"), Runtime(tmp_path / "onnx")
    detector = pipeline("image-segmentation", model=run)
    for path in sorted(images.glob("*.png")):
        (expected,) = predictor.predict(path, 0.3)
        assert len(expected) >= 2
        found = runtime.predict(path, 0.3)
        np.testing.assert_allclose(found["boxes"], expected.boxes, atol=0.05)
        np.testing.assert_array_equal(found["labels"], expected.labels)
        assert (found["masks"] == expected.masks).mean() > 0.999
        best = detector(str(path), threshold=0.3)[0]
        assert (np.asarray(best["mask"]).astype(bool) == expected.masks[0]).mean() > 0.999
