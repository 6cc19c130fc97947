"""What `predict.py` of an export computes equals what the image processors, torch and Predictor compute."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from hf_vlm.data.images import load_image
from hf_vlm.data.segmentations import coco_mask, encode_mask
from hf_vlm.deploy import runtime
from hf_vlm.deploy.prediction import Prediction
from hf_vlm.deploy.runtime import (
    Runtime,
    as_record,
    encode_runs,
    find_features,
    find_objects,
    main,
    read_image,
    resize_bilinear,
    run_lengths,
)
from hf_vlm.models.image_processing_classification import VLMViTClassificationImageProcessor
from hf_vlm.models.image_processing_detection import VLMViTDetectionImageProcessor
from hf_vlm.models.image_processing_instance_segmentation import VLMViTInstanceSegmentationImageProcessor
from hf_vlm.models.image_processing_semantic_segmentation import VLMViTSemanticSegmentationImageProcessor
from hf_vlm.models.image_processing_vlm_vit import VLMViTImageProcessor
from hf_vlm.tasks.instance_segmentation import INSTANCE_SEGMENTATION

SIZE = (50, 70)  # height and width of the image that outputs are of
LABELS = {str(index): f"class {index}" for index in range(5)}


@pytest.fixture
def model(tmp_path, monkeypatch):
    """`model(processor, config, outputs)` is a runtime whose program returns the outputs (1, ...), as of one image."""

    def make(processor, config, outputs=None):
        processor.save_pretrained(tmp_path)
        (tmp_path / "config.json").write_text(json.dumps({"id2label": LABELS, **config}))
        arrays = {name: value.numpy() for name, value in (outputs or {}).items()}
        monkeypatch.setattr(runtime, "_open_program", lambda folder, num_threads: lambda pixel_values: arrays)
        return Runtime(tmp_path)

    return make


def blank():
    return np.zeros((*SIZE, 3), np.uint8)


@pytest.mark.parametrize("size", [(50, 70), (7, 9), (3, 5), (2, 20), (1, 1)])
def test_maps_are_resized_as_by_torch(size):
    maps = torch.randn(4, 6, 9)
    expected = F.interpolate(maps[None], size, mode="bilinear", align_corners=False)[0]
    np.testing.assert_allclose(resize_bilinear(maps.numpy(), size), expected, atol=1e-5)


@pytest.mark.parametrize("do_pad", [False, True])
@pytest.mark.parametrize("threshold", [0.0, 0.3, None])
def test_detections(model, threshold, do_pad):
    torch.manual_seed(0)
    outputs = {"logits": 3 * torch.randn(1, 90, 5), "pred_boxes": torch.rand(1, 90, 4)}  # 450 pairs: cut to 300
    processor = VLMViTDetectionImageProcessor(do_pad=do_pad)
    found = model(processor, {"model_type": "vlm_vit_detection"}, outputs).predict(blank(), threshold)
    default = {} if threshold is None else {"threshold": threshold}
    expected = processor.post_process_object_detection(SimpleNamespace(**outputs), target_sizes=[SIZE], **default)[0]
    assert len(expected["scores"]) == len(found["scores"]) > 50
    np.testing.assert_allclose(found["scores"], expected["scores"], atol=1e-6)
    np.testing.assert_array_equal(found["labels"], expected["labels"])
    np.testing.assert_allclose(found["boxes"], expected["boxes"], atol=1e-4)
    assert found["label_names"] == [f"class {label}" for label in expected["labels"].tolist()]
    assert as_record(found)["detections"][0]["box"]["xmax"] == found["boxes"][0, 2]


@pytest.mark.parametrize(("threshold", "do_pad"), [(0.7, False), (0.7, True), (1.0, True)])
def test_instances(model, threshold, do_pad):
    """The records equal those of `hf-vlm predict`, with their masks, to the last pixel."""
    torch.manual_seed(3)
    outputs = {"logits": 2 * torch.randn(1, 9, 5), "pred_boxes": torch.rand(1, 9, 4)}
    outputs["pred_masks"] = 4 * torch.randn(1, 9, 7, 8) - 1
    outputs["pred_masks"][0, 0] = -9.0  # nothing
    outputs["pred_masks"][0, 1] = 9.0  # all of it
    processor = VLMViTInstanceSegmentationImageProcessor(size={"height": 40, "width": 48}, do_pad=do_pad)
    found = model(processor, {"model_type": "vlm_vit_instance_segmentation"}, outputs).predict(blank(), threshold)
    reference = Prediction(
        **{
            name: value.numpy()
            for name, value in INSTANCE_SEGMENTATION.post_process(
                processor, SimpleNamespace(**outputs), threshold=threshold, sizes=[SIZE], model=None
            )[0].items()
        },
        label_names=found["label_names"],
        image_size=SIZE,
    )
    np.testing.assert_allclose(found["scores"], reference.scores, atol=1e-6)
    np.testing.assert_allclose(found["boxes"], reference.boxes, atol=1e-4)
    record, expected = as_record(found), reference.to_dict()
    assert (len(record["detections"]) > 9) is (threshold < 1)
    for one, other in zip(record["detections"], expected["detections"], strict=True):
        assert list(one) == list(other)
        assert (one["label_id"], one["mask"]) == (other["label_id"], other["mask"])
        assert one["score"] == pytest.approx(other["score"], abs=2e-4)  # rounded
        np.testing.assert_allclose(list(one["box"].values()), list(other["box"].values()), atol=0.02)


@pytest.mark.parametrize("density", [0.0, 0.001, 0.3, 1.0])
def test_run_lengths_are_those_of_coco(density):
    mask = np.random.default_rng(5).random((300, 411)) < density
    assert encode_runs(run_lengths(mask)) == encode_mask(mask, offset=(0, 0), size=mask.shape)["counts"]
    text = {"size": list(mask.shape), "counts": encode_runs(run_lengths(mask))}
    np.testing.assert_array_equal(coco_mask.decode(text), mask)


def test_ties_of_detections_are_in_the_order_of_the_queries():
    outputs = {"logits": np.zeros((3, 2), np.float32), "pred_boxes": np.full((3, 4), 0.5, np.float32)}
    of = SimpleNamespace(processor={}, input_size=SIZE, fitted_size=lambda size: SIZE)
    found = find_objects(outputs, SIZE, 0.4, of)
    np.testing.assert_array_equal(found["labels"], [0, 1, 0, 1, 0, 1])


@pytest.mark.parametrize("problem_type", ["single_label_classification", "multi_label_classification"])
@pytest.mark.parametrize("threshold", [0.0, 0.6, None])
def test_classes(model, problem_type, threshold):
    torch.manual_seed(1)
    outputs, processor = {"logits": 2 * torch.randn(1, 5)}, VLMViTClassificationImageProcessor()
    config = {"model_type": "vlm_vit_classification", "problem_type": problem_type}
    found = model(processor, config, outputs).predict(blank(), threshold)
    is_single = problem_type == "single_label_classification"
    default = (0.0 if is_single else 0.5) if threshold is None else threshold
    expected = processor.post_process_image_classification(
        SimpleNamespace(**outputs), default, top_k=1 if is_single else 5, problem_type=problem_type
    )[0]
    np.testing.assert_allclose(found["scores"], expected["scores"], atol=1e-6)
    np.testing.assert_array_equal(found["labels"], expected["labels"])
    assert [entry["score"] for entry in as_record(found)["classes"]] == pytest.approx(found["scores"], abs=1e-4)


@pytest.mark.parametrize(("threshold", "do_pad"), [(0.2, False), (None, False), (0.2, True)])
def test_segments(model, threshold, do_pad):
    torch.manual_seed(2)
    outputs = {"logits": torch.randn(1, 5, 4, 6)}
    processor = VLMViTSemanticSegmentationImageProcessor(size={"height": 40, "width": 60}, do_pad=do_pad)
    found = model(processor, {"model_type": "vlm_vit_semantic_segmentation"}, outputs).predict(blank(), threshold)
    expected = processor.post_process_semantic_segmentation(SimpleNamespace(**outputs), target_sizes=[SIZE])[0]
    np.testing.assert_array_equal(found["segmentation"], expected)
    fractions = {label: (expected == label).float().mean().item() for label in range(5)}
    shown = sorted(
        (label for label in fractions if fractions[label] >= (threshold or 1e-9)), key=lambda i: -fractions[i]
    )
    assert found["labels"].tolist() == shown
    np.testing.assert_allclose(found["scores"], [fractions[label] for label in shown], atol=1e-6)
    assert [entry["label_id"] for entry in as_record(found)["classes"]] == shown


@pytest.mark.parametrize("num_classes", [5, 300])
def test_label_maps_hold_the_class_of_each_pixel(model, tmp_path, capsys, num_classes):
    torch.manual_seed(4)
    outputs, config = {"logits": torch.randn(1, num_classes, 9, 9)}, {"model_type": "vlm_vit_semantic_segmentation"}
    names = {str(index): f"class {index}" for index in range(num_classes)}
    segmenter = model(VLMViTSemanticSegmentationImageProcessor(), config | {"id2label": names}, outputs)
    Image.fromarray(blank()).save(tmp_path / "a.jpg")
    options = ["--model", str(tmp_path), "--label_maps"]
    assert main([str(tmp_path / "a.jpg"), *options, str(tmp_path / "maps")]) == 0
    expected = segmenter.predict(blank())["segmentation"]
    with Image.open(tmp_path / "maps" / "a.png") as picture:
        np.testing.assert_array_equal(np.asarray(picture), expected)
    entries = json.loads(capsys.readouterr().out)["classes"]
    for entry in entries:
        assert entry["fraction"] == pytest.approx((expected == entry["label_id"]).mean(), abs=1e-6)
    assert sum(entry["fraction"] for entry in entries) == pytest.approx(1, abs=1e-4)
    for other in ("a.png", "b/a.jpg"):  # an image at the place of a map, and one of the same name
        assert main([str(tmp_path / "a.jpg"), str(tmp_path / other), *options, str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("would be written twice, or over an image") == 2


def test_label_maps_are_of_models_that_classify_pixels(model, tmp_path, capsys):
    config = {"model_type": "vlm_vit_classification"}
    model(VLMViTClassificationImageProcessor(), config, {"logits": torch.zeros(1, 5)})
    Image.fromarray(blank()).save(tmp_path / "a.jpg")
    assert main([str(tmp_path / "a.jpg"), "--model", str(tmp_path), "--label_maps", str(tmp_path / "maps")]) == 2
    assert "--label_maps is for models that classify pixels" in capsys.readouterr().err


def test_features_are_the_mean_of_the_patch_tokens():
    tokens = np.arange(24, dtype=np.float32).reshape(6, 4)
    config = {"use_class_token": True, "num_register_tokens": 2}
    found = find_features({"last_hidden_state": tokens}, SIZE, None, SimpleNamespace(config=config))
    np.testing.assert_allclose(found["features"], tokens[3:].mean(axis=0))


@pytest.mark.parametrize("num_channels", [1, 3])
@pytest.mark.parametrize(
    "settings", [{}, {"resample": 3}, {"do_resize": False}, {"do_normalize": False}, {"do_pad": True}]
)
def test_images_are_prepared_as_by_the_processor(model, num_channels, settings):
    statistics = {"image_mean": [0.4, 0.5, 0.6][:num_channels], "image_std": [0.2, 0.3, 0.25][:num_channels]}
    processor = VLMViTImageProcessor(size={"height": 24, "width": 40}, **statistics, **settings)
    for size in ((33, 57), (57, 33)):
        image = np.random.default_rng(0).integers(0, 256, (*size, num_channels), dtype=np.uint8)
        expected = processor(image, return_tensors="np", input_data_format="channels_last")["pixel_values"][0]
        found = model(processor, {"model_type": "vlm_vit"}).preprocess(image)
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_files_are_read_as_by_predict(tmp_path):
    values = np.random.default_rng(0).integers(0, 256, (8, 12, 4), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(values[..., :3]).save(tmp_path / "turned.png", exif=exif)
    Image.fromarray(values).save(tmp_path / "alpha.png")
    Image.fromarray(values[..., 0]).save(tmp_path / "grey.png")
    Image.fromarray(values[..., :3]).quantize(16).save(tmp_path / "palette.png")
    Image.fromarray(values[..., 0].astype(np.uint16) * 257).save(tmp_path / "deep.png")
    for path in sorted(tmp_path.iterdir()):
        for num_channels in (1, 3):
            expected = load_image(path, num_channels=num_channels).astype(int)
            # Pillow and opencv round the grey of colours differently.
            np.testing.assert_allclose(read_image(path, num_channels), expected, atol=1 if num_channels == 1 else 0)


def test_what_cannot_be_done_is_said(model, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    whole = model(VLMViTImageProcessor(), {"model_type": "vlm_vit"})
    with pytest.raises(ValueError, match=r"broken\.jpg' cannot be read"):
        whole.predict(tmp_path / "broken.jpg")
    with pytest.raises(ValueError, match="threshold is 50"):
        whole.predict(blank(), 50)
    with pytest.raises(ValueError, match=r"shape \(5, 5\) and the type uint8"):
        whole.predict(np.zeros((5, 5), np.uint8))
    with pytest.raises(ValueError, match="a model of the type 'vlm_mae', but only vlm_vit"):
        model(VLMViTImageProcessor(), {"model_type": "vlm_mae"})
    with pytest.raises(ValueError, match="cuts images into windows"):
        model(
            VLMViTSemanticSegmentationImageProcessor(inference="slide"),
            {"model_type": "vlm_vit_semantic_segmentation"},
        )
    with pytest.raises(ValueError, match=r"config\.json cannot be read"):
        Runtime(tmp_path / "nowhere")


def test_a_folder_without_a_program_is_named(tmp_path):
    VLMViTImageProcessor().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "vlm_vit"}')
    with pytest.raises(ValueError, match=r"holds no program .* model\.onnx or openvino_model\.xml"):
        Runtime(tmp_path)
