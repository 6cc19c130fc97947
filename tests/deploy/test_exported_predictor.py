"""An exported model is served with the predictions of its own runtime."""

import io
import json

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from hf_vlm.cli.serve import _predictor
from hf_vlm.deploy import runtime
from hf_vlm.deploy.exported_predictor import ExportedPredictor
from hf_vlm.deploy.runtime import Runtime, as_record
from hf_vlm.deploy.server import build_server
from hf_vlm.models.image_processing_detection import VLMViTDetectionImageProcessor
from hf_vlm.models.image_processing_semantic_segmentation import VLMViTSemanticSegmentationImageProcessor
from hf_vlm.models.image_processing_vlm_vit import VLMViTImageProcessor


@pytest.fixture
def exported(tmp_path, monkeypatch):
    """`exported(model_type, processor)` is a folder whose program computes something from the pixels."""

    def program(pixel_values):
        means = pixel_values.mean(axis=(2, 3))[0]  # (channels,)
        logits = np.linspace(-2, 2, 60, dtype=np.float32).reshape(1, 3, 4, 5) + means[0]
        boxes = np.tile(np.array([0.5, 0.4, 0.3, 0.2], np.float32), (1, 12, 1))
        return {"logits": logits, "pred_boxes": boxes}

    def make(model_type, processor):
        monkeypatch.setattr(runtime, "_open_program", lambda folder, num_threads: PROGRAMS[model_type](program))
        config = {"model_type": model_type, "id2label": {str(index): f"class {index}" for index in range(5)}}
        (tmp_path / "config.json").write_text(json.dumps(config))
        (tmp_path / "model.onnx").touch()
        processor.save_pretrained(tmp_path)
        return tmp_path

    return make


def of_queries(program):
    """Logits (batch, queries, classes) of a detector."""
    return lambda pixel_values: {
        name: value.reshape(1, 12, 5) if name == "logits" else value for name, value in program(pixel_values).items()
    }


PROGRAMS = {
    "vlm_vit_detection": of_queries,
    "vlm_vit_semantic_segmentation": lambda program: program,
    "vlm_vit": lambda program: program,
}


@pytest.mark.parametrize(
    ("model_type", "processor"),
    [
        ("vlm_vit_detection", VLMViTDetectionImageProcessor()),
        ("vlm_vit_detection", VLMViTDetectionImageProcessor(image_mean=[0.5], image_std=[0.5])),
        ("vlm_vit_semantic_segmentation", VLMViTSemanticSegmentationImageProcessor()),
    ],
)
@pytest.mark.parametrize("threshold", [None, 0.6])
def test_answers_are_those_of_the_runtime(exported, model_type, processor, threshold):
    folder = exported(model_type, processor)
    file = io.BytesIO()
    Image.effect_noise((40, 30), 90).convert("RGB").save(file, "PNG")
    expected = as_record(Runtime(folder).predict(Image.open(file), threshold))
    assert expected.get("detections") or expected.get("classes")
    client = TestClient(build_server(_predictor(str(folder))))
    query = "" if threshold is None else f"?threshold={threshold}"
    answer = client.post("/predict" + query, files={"image": file.getvalue()})
    assert answer.json() == expected


def test_an_encoder_is_refused(exported):
    with pytest.raises(ValueError, match="an encoder, which predicts no classes: export a fine-tuned model"):
        ExportedPredictor(exported("vlm_vit", VLMViTImageProcessor()))
