"""Teachers follow the student by the formula, and schedules are those of the papers."""

import math

import pytest
import torch
from torch import nn

from hf_vlm.models.ssl_teacher import TeacherMixin, cosine, warm_up


class Student(TeacherMixin, nn.Module):
    def __init__(self):
        super().__init__()
        self.config = type("Config", (), {"momentum": 0.9})()
        self.head = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
        self.build_teacher("head")


def test_teacher_is_a_moving_average_with_rising_momentum():
    torch.manual_seed(0)
    model = Student()
    before = model.teacher["head"][0].weight.clone()
    with torch.no_grad():
        model.head[0].weight.add_(1.0)
        model.head[1].running_mean.fill_(5.0)
    model.after_step(0.5)
    momentum = 1 - (1 - 0.9) * (math.cos(math.pi * 0.5) + 1) / 2
    torch.testing.assert_close(model.teacher["head"][0].weight, before + (1 - momentum))
    assert model.teacher["head"][1].running_mean.tolist() == [5.0] * 3
    assert model.progress == 0.5
    assert not any(parameter.requires_grad for parameter in model.teacher.parameters())
    model.after_step(1.0)  # the momentum is 1: nothing moves
    torch.testing.assert_close(model.teacher["head"][0].weight, before + (1 - momentum))
    model.after_encoder_loaded()
    assert torch.equal(model.teacher["head"][0].weight, model.head[0].weight)


def test_the_teacher_stays_frozen_where_loading_lets_all_parameters_learn():
    model = Student()
    model.requires_grad_(True)
    model.eval()
    assert not any(parameter.requires_grad for parameter in model.teacher.parameters())
    assert all(parameter.requires_grad for parameter in model.head.parameters())
    assert not model.teacher.training
    assert model.train().teacher.training


def test_teacher_and_progress_are_saved():
    assert {"progress", "teacher.head.0.weight"} <= set(Student().state_dict())


@pytest.mark.parametrize(("progress", "value"), [(0.0, 0.04), (0.5, 0.22), (1.0, 0.4), (1.5, 0.4)])
def test_cosine(progress, value):
    assert cosine(0.04, 0.4, progress) == pytest.approx(value)


def test_warm_up():
    values = [warm_up(0.04, 0.07, torch.tensor(progress), 0.3).item() for progress in (0.0, 0.15, 0.3, 0.9)]
    assert values == pytest.approx([0.04, 0.055, 0.07, 0.07])
    assert warm_up(0.04, 0.07, torch.tensor(0.5), 0.0).item() == pytest.approx(0.07)
