"""A classifier's scores against numpy."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from hf_vlm.models.image_processing_classification import VLMViTClassificationImageProcessor

LOGITS = [[0.0, 2.0, -1.0, 1.0], [-3.0, -2.0, -4.0, -1.0]]


def classes_of(**options: Any) -> list[dict[str, torch.Tensor]]:
    outputs = SimpleNamespace(logits=torch.tensor(LOGITS))
    return VLMViTClassificationImageProcessor().post_process_image_classification(outputs, **options)


def softmax(logits: Any) -> np.ndarray:
    return np.exp(logits) / np.exp(logits).sum()


def sigmoid(logits: Any) -> np.ndarray:
    return 1 / (1 + np.exp(-np.asarray(logits)))


@pytest.mark.parametrize(
    ("problem_type", "scores_of"), [("single_label_classification", softmax), ("multi_label_classification", sigmoid)]
)
def test_scores_are_best_first(problem_type: str, scores_of: Any) -> None:
    results = classes_of(problem_type=problem_type, threshold=0.0)
    assert [result["labels"].tolist() for result in results] == [[1, 3, 0, 2], [3, 1, 0, 2]]
    for result, logits in zip(results, LOGITS):
        expected = scores_of(logits)[result["labels"].numpy()]
        np.testing.assert_allclose(result["scores"].numpy(), expected, rtol=1e-5)


def test_several_classes_per_image_are_kept_above_the_models_own_threshold() -> None:
    results = classes_of(problem_type="multi_label_classification")
    assert all((result["scores"] >= 0.5).all() for result in results)
    everything = classes_of(problem_type="multi_label_classification", threshold=0.0)
    assert [len(result["scores"]) for result in results] == [int((one["scores"] >= 0.5).sum()) for one in everything]


def test_threshold_and_number_of_classes() -> None:
    first, second = classes_of(threshold=0.25, problem_type="multi_label_classification")
    assert first["labels"].tolist() == [1, 3, 0, 2]
    assert second["labels"].tolist() == [3]
    assert [result["labels"].tolist() for result in classes_of(top_k=1)] == [[1], [3]]
    assert [len(result["scores"]) for result in classes_of(threshold=0.9)] == [0, 0]


def test_what_cannot_be_answered_is_refused() -> None:
    with pytest.raises(ValueError, match="problem_type is 'regression'"):
        classes_of(problem_type="regression")
    with pytest.raises(ValueError, match="top_k is 0"):
        classes_of(top_k=0)


def test_save_and_load(tmp_path: Path) -> None:
    processor = VLMViTClassificationImageProcessor(size={"height": 16, "width": 24}, image_mean=[0.5] * 3)
    processor.save_pretrained(tmp_path)
    loaded = VLMViTClassificationImageProcessor.from_pretrained(tmp_path)
    assert loaded.to_dict() == processor.to_dict()
    assert loaded.to_dict()["image_processor_type"] == "VLMViTClassificationImageProcessor"
