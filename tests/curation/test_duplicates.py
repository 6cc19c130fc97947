"""Near duplicates against a loop, and features that copies share."""

import numpy as np
import pytest
from curated_data import cropped, encoded, jpeg, picture, smaller

from hf_vlm.curation import duplicates
from hf_vlm.curation.duplicates import greedy_duplicates
from hf_vlm.curation.measure import pixel_features
from hf_vlm.data.io.decode import decode_image


def by_loop(features, min_similarity):
    found = []
    for row, feature in enumerate(features):
        kept = [other for other in range(row) if found[other] < 0]
        copies = [other for other in kept if feature @ features[other] >= min_similarity]
        found.append(copies[0] if copies else -1)
    return np.array(found)


@pytest.mark.parametrize("block", [1, 4, 100])
def test_near_duplicates_are_those_of_a_loop(block, monkeypatch):
    monkeypatch.setattr(duplicates, "BLOCK", block)
    rng = np.random.default_rng(0)
    features = np.repeat(rng.normal(size=(12, 6)), 4, axis=0) + 0.2 * rng.normal(size=(48, 6))
    features = (features / np.linalg.norm(features, axis=1, keepdims=True))[rng.permutation(48)].astype(np.float32)
    found, expected = greedy_duplicates(features, 0.93), by_loop(features, 0.93)
    assert ((found >= 0) == (expected >= 0)).all()
    assert 10 < (found >= 0).sum() < 40
    is_copy = found >= 0
    assert (np.einsum("nd,nd->n", features[is_copy], features[found[is_copy]]) >= 0.93).all()
    assert (found[found[is_copy]] == -1).all()  # what stays in place of a copy stays
    assert greedy_duplicates(features[:0], 0.93).shape == (0,)


@pytest.mark.parametrize("copy", [jpeg, smaller, cropped])
def test_features_of_pixels_are_those_of_copies_alone(copy):
    images = [picture(seed) for seed in range(30)]
    features = np.stack([pixel_features(image) for image in images])
    copies = np.stack([pixel_features(decode_image(copy(image))[0]) for image in images])
    similarities = copies @ features.T
    assert similarities.diagonal().min() > 0.9
    assert (similarities - 2 * np.eye(30)).max() < 0.8
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, rtol=1e-5)
    assert pixel_features(decode_image(encoded(images[0]))[0]).tolist() == features[0].tolist()
