"""Mixup, CutMix and random erasing against loops and the distributions they are of."""

import numpy as np
import pytest
import torch
from scipy import stats

from hf_vlm.data.transforms.mixing import (
    MixParameters,
    MixSettings,
    erase,
    mix_labels,
    mix_pixels,
    sample_mix,
)

SIZE = (24, 40)


def sample_many(number=2000, **settings):
    rng = np.random.default_rng(0)
    return [sample_mix(MixSettings(**settings), SIZE, rng) for _ in range(number)]


def test_nothing_is_mixed_by_default():
    assert not MixSettings().mixes
    assert not MixSettings(mixup_alpha=0.8, mix_probability=0).mixes
    assert MixSettings(cutmix_alpha=1.0).mixes


def test_blends_are_of_a_beta_distribution():
    mixed = sample_many(mixup_alpha=0.8)
    assert all(parameters.box is None for parameters in mixed)
    assert stats.kstest([p.weight for p in mixed], stats.beta(0.8, 0.8).cdf).pvalue > 0.01


def test_rectangles_take_the_weight_of_their_area():
    mixed = sample_many(cutmix_alpha=1.0)
    for parameters in mixed:
        top, left, bottom, right = parameters.box
        assert 0 <= top <= bottom <= SIZE[0]
        assert 0 <= left <= right <= SIZE[1]
        covered = sum(1 for _ in range(top, bottom) for _ in range(left, right))
        assert parameters.weight == pytest.approx(1 - covered / (SIZE[0] * SIZE[1]))
    heights = np.array([p.box[2] - p.box[0] for p in mixed]) / SIZE[0]
    assert heights.max() > 0.9
    # Sides of a share sqrt(u), u even in 0 to 1, about a centre that is even in 0 to 1, clipped: its mean is
    # E[s - s^2 / 4] with s = sqrt(u), 2 / 3 - 1 / 8.
    assert heights.mean() == pytest.approx(2 / 3 - 1 / 8, abs=0.03)


def test_half_of_the_mixed_images_are_cut_where_both_are_on():
    mixed = sample_many(mixup_alpha=0.8, cutmix_alpha=1.0, mix_probability=0.6)
    assert np.mean([p == MixParameters() for p in mixed]) == pytest.approx(0.4, abs=0.03)
    assert np.mean([p.box is not None for p in mixed]) == pytest.approx(0.3, abs=0.03)


def test_pixels_are_mixed_and_the_images_stay_as_they_were():
    image, other = torch.randn(2, 3, *SIZE)
    copies = image.clone(), other.clone()
    blended = mix_pixels(image, other, MixParameters(0.3))
    torch.testing.assert_close(blended, 0.3 * image + 0.7 * other)
    cut = mix_pixels(image, other, MixParameters(0.9, (2, 10, 9, 20)))
    for row in range(SIZE[0]):
        for column in range(SIZE[1]):
            shown = other if 2 <= row < 9 and 10 <= column < 20 else image
            assert torch.equal(cut[:, row, column], shown[:, row, column])
    assert torch.equal(mix_pixels(image, other, MixParameters()), image)
    assert torch.equal(image, copies[0])
    assert torch.equal(other, copies[1])


def test_labels_are_mixed_with_those_of_the_next_image():
    labels = torch.eye(4)[[2, 0, 3]]
    mixed = mix_labels(labels, [MixParameters(0.25), MixParameters(), MixParameters(0.5, (0, 0, 1, 1))])
    torch.testing.assert_close(mixed, torch.tensor([[0.75, 0, 0.25, 0], [1, 0, 0, 0], [0, 0, 0.5, 0.5]]))


def test_a_rectangle_is_erased_by_noise():
    rng = np.random.default_rng(0)
    areas, values = [], []
    for _ in range(300):
        image = np.full((3, *SIZE), 7.0, dtype=np.float32)
        erase(image, rng)
        erased = (image != 7).all(axis=0)
        rows, columns = np.flatnonzero(erased.any(axis=1)), np.flatnonzero(erased.any(axis=0))
        assert erased.sum() == (rows[-1] + 1 - rows[0]) * (columns[-1] + 1 - columns[0])  # a rectangle
        areas.append(erased.mean())
        values.append(image[:, erased].ravel())
    assert 0.01 < min(areas) < 0.04
    assert 0.28 < max(areas) < 0.37
    assert np.mean(areas) == pytest.approx(0.175, abs=0.02)
    values = np.concatenate(values)
    assert abs(values.mean()) < 0.02
    assert values.std() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"mixup_alpha": -1}, "mixup_alpha must be a number of 0 or more"),
        ({"cutmix_alpha": "1"}, "cutmix_alpha must be a number of 0 or more"),
        ({"mix_probability": 2}, "mix_probability must be between 0 and 1"),
    ],
)
def test_wrong_settings_are_explained(values, words):
    with pytest.raises(ValueError, match=words):
        MixSettings(**values)
