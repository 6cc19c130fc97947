"""What evaluation determines is stored in a model's folder, and nothing else in it changes."""

import json

import pytest

from hf_vlm.models.image_processing_detection import VLMViTDetectionImageProcessor
from hf_vlm.tasks.calibration import Calibration


def test_a_saved_model_takes_the_settings(tmp_path, detector, processor):
    detector.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert (
        VLMViTDetectionImageProcessor.from_pretrained(tmp_path).score_threshold == 0.5
    )  # as saved before there was one
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    Calibration(processor={"score_threshold": 0.25}).store(tmp_path)
    loaded = VLMViTDetectionImageProcessor.from_pretrained(tmp_path)
    assert loaded.score_threshold == 0.25
    changed = {path.name for path in tmp_path.iterdir() if before.get(path.name) != path.read_bytes()}
    assert changed == {"preprocessor_config.json"}
    settings = [json.loads(text) for text in (before["preprocessor_config.json"], loaded.to_json_string())]
    assert {**settings[0], "score_threshold": 0.25}.items() <= settings[1].items()
    Calibration(config={"temperature": 2.0}).store(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == {
        **json.loads(before["config.json"]),
        "temperature": 2.0,
    }


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"score_threshold cannot be stored in .*Give a run's folder"):
        Calibration(processor={"score_threshold": 0.25}).store(tmp_path)
    Calibration().store(tmp_path)
    assert not list(tmp_path.iterdir())
