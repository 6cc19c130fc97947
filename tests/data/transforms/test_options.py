"""Plain values of a recipe to settings, and the messages for wrong ones."""

from dataclasses import dataclass

import pytest

from hf_vlm.data.transforms.options import as_jitter, as_probability, as_range, as_size, build_settings, check_keys


@dataclass(frozen=True, kw_only=True)
class Example:
    size: int
    blur: float = 0.5


def test_settings_are_built_from_plain_values():
    assert build_settings(Example, {"size": 3, "blur": 0.1}, where="views") == Example(size=3, blur=0.1)
    assert build_settings(Example, {"size": 3}, where="views") == Example(size=3, blur=0.5)


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(ValueError, match=r"'blurr' of views.*'blur'"):
        build_settings(Example, {"size": 3, "blurr": 0.1}, where="views")
    with pytest.raises(ValueError, match="'size' of views is missing"):
        build_settings(Example, {"blur": 0.1}, where="views")
    with pytest.raises(ValueError, match=r"'zzz' of views\. Known: blur, size\."):
        check_keys({"zzz": 1}, ["blur", "size"], where="views")


def test_values_are_read():
    assert as_size("size", 8) == (8, 8)
    assert as_size("size", [8, 16]) == (8, 16)
    assert as_range("scale", [0.2, 1], low=0, high=1) == (0.2, 1.0)
    assert as_probability("flip", 1) == 1.0
    assert as_jitter("jitter", [0.4, 0.4, 0.4, 0.1]) == (0.4, 0.4, 0.4, 0.1)


@pytest.mark.parametrize("value", [0, -1, "8", [8], [8, 0], [8.5, 8], True, None])
def test_sizes_out_of_range_are_refused(value):
    with pytest.raises(ValueError, match="size must be"):
        as_size("size", value)


@pytest.mark.parametrize("value", [0.5, [0.5], [0.5, 0.2], [0.0, 0.5], [0.5, 1.5], ["a", 1]])
def test_ranges_out_of_range_are_refused(value):
    with pytest.raises(ValueError, match=r"scale must be a pair \[from, to\] above 0 and up to 1"):
        as_range("scale", value, low=0, high=1)


@pytest.mark.parametrize("value", [-0.1, 1.1, "1", None, [0.5]])
def test_probabilities_out_of_range_are_refused(value):
    with pytest.raises(ValueError, match="flip must be between 0 and 1"):
        as_probability("flip", value)


@pytest.mark.parametrize("value", [0.4, [0.4] * 3, [0.4, 0.4, 0.4, 0.6], [1.4, 0, 0, 0], [-0.1, 0, 0, 0]])
def test_jitters_out_of_range_are_refused(value):
    with pytest.raises(ValueError, match="jitter must be four strengths"):
        as_jitter("jitter", value)
