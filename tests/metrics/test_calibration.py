"""Calibration: the error against a loop over the bins, the temperature against the one that made the logits."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hf_vlm.metrics.calibration import calibration_error, fit_temperature, reliability_bins


def test_bins_and_error_are_those_of_a_loop():
    rng = np.random.default_rng(0)
    confidences = np.append(rng.random(300) ** 0.5, [1.0, 1 / 15, 0.0])
    is_right = rng.random(303) < confidences**2
    counts, confidence, accuracy = reliability_bins(confidences, is_right)
    error = 0.0
    for index in range(15):
        inside = (confidences > index / 15) & (confidences <= (index + 1) / 15)
        inside |= (index == 0) & (confidences == 0)
        assert counts[index] == inside.sum()
        if inside.any():
            assert confidence[index] == pytest.approx(confidences[inside].mean())
            assert accuracy[index] == pytest.approx(is_right[inside].mean())
            error += inside.sum() / 303 * abs(is_right[inside].mean() - confidences[inside].mean())
    assert calibration_error(confidences, is_right) == pytest.approx(error)


@pytest.mark.parametrize("temperature", [0.4, 1.0, 2.5])
def test_the_temperature_is_the_one_that_made_the_logits(temperature):
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(5000, 4)) * 2
    noise = rng.gumbel(size=logits.shape)
    labels = (logits + noise).argmax(axis=1)  # sampled from the softmax of the logits
    assert fit_temperature(logits * temperature, labels) == pytest.approx(temperature, rel=0.08)


def test_the_temperature_has_the_lowest_cross_entropy_of_a_grid():
    rng = np.random.default_rng(2)
    logits, labels = rng.normal(size=(5000, 3)) * 3, rng.integers(0, 3, 5000)
    logits[np.arange(5000), labels] += 2
    found = fit_temperature(logits, labels)
    values = torch.from_numpy(logits)

    def cross_entropy(temperature):
        return F.cross_entropy(values / temperature, torch.from_numpy(labels)).item()

    assert cross_entropy(found) <= min(map(cross_entropy, np.linspace(0.5, 8, 50))) + 1e-4


def test_few_images_that_are_all_right_make_no_model_certain():
    logits = np.eye(3)[[0, 1, 2, 0]] * 5
    probabilities = torch.from_numpy(logits / fit_temperature(logits, np.array([0, 1, 2, 0]))).softmax(dim=1)
    assert probabilities.max().item() == pytest.approx(5 / 6 + 1 / 6 / 3, abs=1e-3)  # Platt's (n + 1) / (n + 2)
