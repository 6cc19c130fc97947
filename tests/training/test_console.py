"""What a run prints."""

import math
import re

import pytest

from hf_vlm.training.console import format_duration, format_entry
from hf_vlm.training.run import pretrain


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(0.2, "0 s"), (59, "59 s"), (60, "1 min"), (200, "3 min 20 s"), (12000, "3 h 20 min"), (180000, "2 d 2 h")],
)
def test_durations(seconds, expected):
    assert format_duration(seconds) == expected


def test_entries_have_units_and_no_undefined_metric():
    training = {"loss": 1.23456, "learning_rate": 3e-4, "data_wait": 0.07, "images_per_second": 1234.5, "epoch": 1}
    assert format_entry(training) == "loss 1.235     lr 3.00e-04    7% waiting for data   1,234.5 images/s"
    assert format_entry({"eval_ap": 0.25, "eval_ap_large": math.nan}) == "evaluated  ap 0.25"
    assert format_entry({"probe_knn": 0.5, "probe_seconds": 3.0}) == "probed     knn 0.5"


def test_a_run_prints_one_aligned_line_per_entry(make_recipe, capfd):
    pretrain(make_recipe("mae", max_steps=12, logging_steps=3, probe_steps=0))
    printed = capfd.readouterr()
    lines = [line for line in printed.out.splitlines() if line.startswith("step ")]
    assert [line.split("  loss")[0] for line in lines[:-1]] == [f"step {step:>2}/12" for step in (3, 6, 9, 12)]
    assert all(re.search(r"lr \d\.\d\de[-+]\d\d .* \d+ \w+ left$", line) for line in lines[:-1])
    assert re.search(r"in \d+ s", lines[-1])
    assert "{" not in printed.out
    assert "Training" not in printed.err  # no bar without a terminal
