from sklearn.datasets import load_digits

from hf_vlm.data.scenes.digits import Digits
from hf_vlm.data.scenes.splits import NUM_SAMPLES


def test_splits_have_no_digit_in_common():
    train, validation, test = (Digits(split) for split in NUM_SAMPLES)
    for category in range(10):
        samples = [{glyph.tobytes() for glyph in part.glyphs[category]} for part in (train, validation, test)]
        assert sum(map(len, samples)) == len(set.union(*samples))
        assert len(samples[0]) > 2.9 * len(samples[1]) > 2.9 * 33
    total = sum(len(glyphs) for part in (train, validation, test) for glyphs in part.glyphs)
    assert total == len(load_digits().images) == 1797
