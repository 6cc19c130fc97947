"""The gate lets through what is the same, and names what is not."""

import itertools
from types import SimpleNamespace

import pytest
import torch

from hf_vlm.deploy.gate import Comparison, Metric, agreement, difference, failures, time_interleaved
from hf_vlm.tasks.task import ServedOutput

QUERIES = ServedOutput(output_class="", fields=("logits", "pred_boxes"), is_set=True)


def comparison(**changes):
    values = {"num_images": 4, "max_difference": 1e-6, "agreement": 1.0, "ms_before": 2.0, "ms_after": 1.0}
    return Comparison(**{**values, "speed_up": 2.0, **changes})


def metric(before, after):
    return Metric("ap", before, after, "data", "test")


@pytest.mark.parametrize(
    ("precision", "changes", "reason"),
    [
        ("fp32", {}, None),
        ("fp32", {"max_difference": 2e-4}, "outputs differ by 0.0002"),
        ("fp32", {"max_difference": float("nan")}, "outputs are not finite"),
        ("int8", {"max_difference": float("inf")}, "outputs are not finite"),
        ("int8", {"max_difference": 5.0, "agreement": 0.85}, None),
        ("int8", {"max_difference": 5.0, "agreement": 0.5}, "agrees with the model in 0.500"),
        ("int8", {"agreement": float("nan")}, "agrees with the model in nan"),
        ("int8", {"metric": metric(0.50, 0.491)}, None),
        ("int8", {"metric": metric(0.50, 0.60)}, None),
        ("int8", {"metric": metric(0.50, 0.489)}, "ap falls from 0.5000 to 0.4890"),
        ("fp32", {"metric": metric(0.50, 0.497)}, "ap falls from 0.5000 to 0.4970"),
    ],
)
def test_what_passes(precision, changes, reason):
    found = failures(comparison(**changes), precision)
    assert (found == []) if reason is None else (len(found) == 1 and reason in found[0])


def test_queries_are_compared_in_any_order():
    torch.manual_seed(0)
    logits, boxes = torch.randn(2, 6, 3), torch.rand(2, 6, 4)
    order = torch.randperm(6)
    one = {"logits": logits, "pred_boxes": boxes}
    assert difference(one, {"logits": logits[:, order], "pred_boxes": boxes[:, order]}, QUERIES) == 0
    moved = boxes.clone()
    moved[1, 2, 3] += 0.25
    assert difference(one, {"logits": logits, "pred_boxes": moved}, QUERIES) == pytest.approx(0.25)
    # One query in place of another is no permutation.
    assert difference(one, {"logits": logits[:, [0, 0, 2, 3, 4, 5]], "pred_boxes": boxes}, QUERIES) > 0.1


def test_large_values_are_compared_relative_to_them():
    maps = ServedOutput(output_class="", fields=("logits",))
    one = SimpleNamespace(logits=torch.tensor([0.5, 200.0]))
    other = SimpleNamespace(logits=torch.tensor([0.5, 201.0]))
    assert difference(vars(one), vars(other), maps) == pytest.approx(0.005)


def iou(one, other):
    sides = [min(one[i + 2], other[i + 2]) - max(one[i], other[i]) for i in (0, 1)]
    common = max(sides[0], 0) * max(sides[1], 0)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    return common / (sum(areas) - common)


def test_matched_detections_equal_a_loop():
    torch.manual_seed(0)
    low = 100 * torch.rand(40, 2)
    one = {"boxes": torch.cat([low, low + 30], 1), "scores": torch.rand(40), "labels": torch.randint(2, (40,))}
    shift = 2 * torch.rand(40, 1)
    other = {
        "boxes": one["boxes"] + shift,
        "scores": one["scores"] + 0.04 * torch.rand(40) - 0.02,
        "labels": torch.where(torch.rand(40) < 0.9, one["labels"], 1 - one["labels"]),
    }

    def has_match(i, first, second):
        return any(
            first["labels"][i] == second["labels"][j]
            and abs(first["scores"][i] - second["scores"][j]) <= 0.02
            and iou(first["boxes"][i].tolist(), second["boxes"][j].tolist()) >= 0.9
            for j in range(40)
        )

    sides = [(one, other), (other, one)]
    counted = [has_match(i, *side) for side in sides for i in range(40) if side[0]["scores"][i] > 0.3]
    assert agreement(one, other) == (sum(counted), len(counted))
    assert 0 < sum(counted) < len(counted)


def test_agreement_of_other_results():
    classes = [{"scores": torch.ones(1), "labels": torch.tensor([label])} for label in (1, 2)]
    assert agreement(classes[0], classes[0]) == (1, 1)
    assert agreement(*classes) == (0, 1)
    maps = [{**classes[0], "segmentation": torch.tensor([[0, 1], [label, 1]])} for label in (1, 2)]
    assert agreement(*maps) == (3, 4)
    features = [{"features": torch.tensor(values)} for values in ([1.0, 0.0], [1.0, 1.0])]
    assert agreement(*features) == (pytest.approx(0.5**0.5), 1)
    nothing = {"boxes": torch.zeros(0, 4), "scores": torch.zeros(0), "labels": torch.zeros(0)}
    assert agreement(nothing, nothing) == (0, 0)


def test_calls_are_timed_in_turn():
    calls, now = [], itertools.count()
    times = time_interleaved(
        lambda: calls.append("before"), lambda: calls.append("after"), repetitions=3, clock=lambda: float(next(now))
    )
    assert calls == ["before", "after"] * 5  # two of each warm up
    assert times == [(1000.0, 1000.0)] * 3
