"""Predictions equal a plain loop of processor, model and post-processing, whatever the images come as."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import pipeline

from hf_vlm.data.images import image_paths
from hf_vlm.deploy.predict import Predictor
from hf_vlm.deploy.prediction import Prediction
from hf_vlm.tasks.calibration import Calibration
from hf_vlm.viz.sheets import class_color


@pytest.fixture(scope="module")
def predictor(saved_detector):
    return Predictor.from_pretrained(saved_detector, device="cpu")


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    sizes = [(60, 90), (40, 30), (32, 48), (100, 50), (50, 100)]
    noise = [Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)) for _ in sizes]
    return [np.asarray(image.resize((w, h))) for image, (h, w) in zip(noise, sizes, strict=True)]


def expected(predictor, image, threshold):
    """One image through the model by hand."""
    inputs = predictor.processor(Image.fromarray(image), return_tensors="pt")
    with torch.no_grad():
        outputs = predictor.model(**inputs)
    scores = outputs.logits[0].sigmoid()
    height, width = image.shape[:2]
    found = []
    for query in range(scores.shape[0]):
        x, y, w, h = outputs.pred_boxes[0, query].tolist()
        box = [(x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height]
        box = np.clip(box, 0, [width, height, width, height])
        found += [(s, label, box) for label, s in enumerate(scores[query].tolist()) if s > threshold]
    return sorted(found, key=lambda entry: -entry[0])


def check(predictions, others):
    assert len(predictions) == len(others)
    for one, other in zip(predictions, others, strict=True):
        np.testing.assert_array_equal(one.labels, other.labels)
        np.testing.assert_allclose(one.scores, other.scores, atol=1e-5)
        np.testing.assert_allclose(one.boxes, other.boxes, atol=1e-3)
        assert one.image_size == other.image_size


@pytest.mark.parametrize(("threshold", "batch_size"), [(0.4, 1), (0.4, 2), (0.55, 8)])
def test_equals_the_loop(predictor, images, threshold, batch_size):
    predictions = predictor.predict(images, threshold, batch_size=batch_size)
    assert len(predictions) == len(images)
    for prediction, image in zip(predictions, images, strict=True):
        found = expected(predictor, image, threshold)
        assert len(prediction) == len(found) > 0
        np.testing.assert_allclose(prediction.scores, [score for score, _, _ in found], atol=1e-5)
        np.testing.assert_array_equal(prediction.labels, [label for _, label, _ in found])
        np.testing.assert_allclose(prediction.boxes, [box for _, _, box in found], atol=1e-3)
        assert prediction.label_names == [("cat", "dog", "bird")[label] for _, label, _ in found]
        assert prediction.image_size == image.shape[:2]
        assert prediction.path is None


def test_a_stored_threshold_is_used_by_predictions_and_the_pipeline(detector_run, images):
    image = Image.fromarray(images[0])
    threshold, default = 0.62, Predictor.from_pretrained(detector_run, device="cpu").predict(image)[0]
    Calibration(processor={"score_threshold": threshold}).store(detector_run)
    predictor = Predictor.from_pretrained(detector_run, device="cpu")
    assert predictor.score_threshold == threshold
    stored = predictor.predict(image)[0]
    check([stored], predictor.predict(image, threshold))
    assert len(predictor.predict(image, 0.5)[0]) == len(default) > len(stored) > 0
    piped = pipeline("object-detection", model=str(detector_run))
    np.testing.assert_allclose([found["score"] for found in piped(image, threshold=None)], stored.scores, atol=1e-5)
    assert len(piped(image)) == len(default)  # transformers gives 0.5 by itself


def test_files_folders_and_wildcards(predictor, images, tmp_path):
    (tmp_path / "sub").mkdir()
    paths = [tmp_path / name for name in ("a.png", "b.PNG", "sub/c.png", "sub/d.bmp", "sub/e.tiff")]
    for image, path in zip(images, paths, strict=True):
        Image.fromarray(image).save(path)
    (tmp_path / "notes.txt").write_text("no image")
    reference = predictor.predict(images, 0.4)
    from_folder = predictor.predict(tmp_path, 0.4)
    check(from_folder, reference)
    assert [p.path for p in from_folder] == [str(path) for path in paths]
    check(predictor.predict(str(tmp_path / "*.png"), 0.4), reference[:1])
    check(
        predictor.predict([paths[1], images[0], str(tmp_path / "sub")], 0.4), [reference[i] for i in (1, 0, 2, 3, 4)]
    )
    check(predictor.predict(Image.fromarray(images[3]), 0.4), reference[3:4])
    check(predictor.predict(images[3], 0.4), reference[3:4])


def test_every_kind_of_picture_is_made_rgb(predictor, images, tmp_path):
    grey = images[0][..., 0]
    as_rgb = np.repeat(grey[..., None], 3, axis=2)
    reference = predictor.predict(as_rgb, 0.4)
    check(predictor.predict([grey, grey[..., None], Image.fromarray(grey)], 0.4), reference * 3)
    turned = Image.fromarray(np.rot90(images[0]).copy())  # orientation 6: to be turned clockwise to be upright
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.png", exif=exif)
    upright = predictor.predict(images[0], 0.4)
    check(predictor.predict(tmp_path / "turned.png", 0.4), upright)
    check(predictor.predict(Image.open(tmp_path / "turned.png"), 0.4), upright)


def test_to_dict_is_json(predictor, images):
    prediction = predictor.predict(images[0], 0.4)[0]
    content = json.loads(json.dumps(prediction.to_dict()))
    assert (content["height"], content["width"], content["path"]) == (60, 90, None)
    assert len(content["detections"]) == len(prediction)
    first = content["detections"][0]
    assert first["score"] == round(float(prediction.scores[0]), 4)
    assert first["label"] == prediction.label_names[0]
    assert first["label_id"] == prediction.labels[0]
    corners = [first["box"][key] for key in ("xmin", "ymin", "xmax", "ymax")]
    assert corners == [round(float(value), 2) for value in prediction.boxes[0]]


def prediction_of(size, path=None):
    return Prediction(
        boxes=np.array([[10, 20, 30, 40]], dtype=np.float32),
        scores=np.array([0.9], dtype=np.float32),
        labels=np.array([2]),
        label_names=["bird"],
        image_size=size,
        path=path,
    )


def test_drawing_a_prediction(tmp_path):
    image = Image.new("RGB", (64, 48), (10, 20, 30))
    image.save(tmp_path / "a.png")
    drawn = prediction_of((48, 64)).draw(image)
    assert drawn.size == (320, 240)
    assert drawn.getpixel((50, 150)) == drawn.getpixel((149, 199)) == class_color(2)
    assert prediction_of((48, 64), str(tmp_path / "a.png")).draw().tobytes() == drawn.tobytes()
    assert prediction_of((48, 64)).draw(np.asarray(image)).tobytes() == drawn.tobytes()
    assert prediction_of((48, 64)).draw(image, scale=1).getpixel((10, 30)) == class_color(2)


def test_drawing_needs_the_same_image():
    with pytest.raises(ValueError, match="was not made from a file"):
        prediction_of((48, 64)).draw()
    with pytest.raises(ValueError, match=r"The image is \(64, 48\), but the prediction was made on \(48, 64\)"):
        prediction_of((48, 64)).draw(Image.new("RGB", (48, 64)))


def test_what_cannot_be_read_is_named(predictor, images, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"broken\.jpg"):
        predictor.predict(tmp_path)
    with pytest.raises(ValueError, match="There are no images at"):
        predictor.predict(tmp_path / "*.png")
    with pytest.raises(ValueError, match=r"shape \(60, 90, 3\) and type float64; expected .* uint8"):
        predictor.predict(images[0].astype(float))
    with pytest.raises(ValueError, match="has 4 channels, but the model takes 3"):
        predictor.predict(np.zeros((5, 5, 4), dtype=np.uint8))
    with pytest.raises(ValueError, match="threshold is 50"):
        predictor.predict(images[0], 50)


def test_brackets_in_a_folder_name_are_no_wildcards(tmp_path):
    folder = tmp_path / "photos [2024]"
    folder.mkdir()
    Image.new("RGB", (4, 4)).save(folder / "a.png")
    assert image_paths(folder) == [str(folder / "a.png")]
    assert image_paths(str(tmp_path / "**" / "*.png")) == [str(folder / "a.png")]


def test_what_predicts_nothing_or_is_no_model(saved_encoder, detector_run, tmp_path):
    with pytest.raises(ValueError, match="image-feature-extraction predicts no classes: fine-tune it"):
        Predictor.from_pretrained(saved_encoder)
    (detector_run / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match=r"holds no model: .*preprocessor_config"):
        Predictor.from_pretrained(detector_run)
    with pytest.raises(ValueError, match="holds no model: there is no config"):
        Predictor.from_pretrained(tmp_path)


def test_missing_weights_are_an_error(detector_run):
    from safetensors.torch import load_file, save_file

    weights = load_file(detector_run / "model.safetensors")
    del weights[next(name for name in weights if not name.startswith("backbone"))]
    save_file(weights, detector_run / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks 1 of the model's weights, such as "):
        Predictor.from_pretrained(detector_run)
