"""Settings follow batch and data by the rules of their sources."""

import pytest

from hf_vlm.training.scaling import KNOWN_RUNS, images_to_see, scaled_learning_rate, scaled_momentum


@pytest.mark.parametrize(("size", "seen"), KNOWN_RUNS)
def test_known_runs_are_met(size, seen):
    assert images_to_see(size) == pytest.approx(seen, rel=1e-6)


def test_more_images_are_seen_more_but_less_often():
    sizes = [10, 1_000, 9_469, 20_000, 50_000, 300_000, 1_281_167, 10**7, 142_109_386, 10**9]
    seen = [images_to_see(size) for size in sizes]
    assert seen == sorted(seen)
    epochs = [count / size for count, size in zip(seen[4:], sizes[4:], strict=True)]
    assert epochs == sorted(epochs, reverse=True)
    assert images_to_see(10) == pytest.approx(10 * 7.6e6 / 9_469, abs=1)
    assert images_to_see(10**9) == 1_920_000_000


def test_rates_scale_with_the_batch():
    assert scaled_learning_rate(1e-3, 1024, 256, "linear") == pytest.approx(4e-3)
    assert scaled_learning_rate(1e-3, 1024, 256, "sqrt") == pytest.approx(2e-3)
    assert scaled_learning_rate(1e-3, 64, 256, "sqrt") == pytest.approx(5e-4)


def test_a_teacher_moves_as_far_in_one_large_step_as_in_several_small_ones():
    assert scaled_momentum(0.99, 512, 128) == pytest.approx(0.99**4)
    assert scaled_momentum(0.99, 128, 128) == 0.99
