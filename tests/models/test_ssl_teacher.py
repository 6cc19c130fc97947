"""Teachers follow the student by the formula, and schedules are those of the papers."""

import copy
import gc
import math
import weakref

import pytest
import torch
from tiny import batch, build
from torch import nn

from hf_vlm.models.ssl_teacher import TeacherMixin, cosine, warm_up


class Student(TeacherMixin, nn.Module):
    is_pretraining = False

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


def take_steps(optimizer, count, model):
    for _ in range(count):
        model.is_pretraining = True  # as `forward` of a method sets it
        optimizer.step()


def test_training_without_after_step_is_refused_in_its_third_step():
    model = Student()
    optimizer = torch.optim.SGD(model.head.parameters(), lr=0.1)
    another = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1)
    for step in range(5):
        another.step()  # of another model
        take_steps(optimizer, 1, model)
        if step % 2:  # one step that was interrupted does no harm
            model.after_step(0.1)
    with pytest.raises(ValueError, match=r"Student is trained without after_step.*callbacks=\[hf_vlm.AfterStep\(\)\]"):
        take_steps(optimizer, 2, model)
    copied = copy.deepcopy(model).train()
    optimizer = torch.optim.SGD(copied.head.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="without after_step"):
        take_steps(optimizer, 3, copied)


def test_the_encoder_of_a_method_can_be_trained_for_another_aim():
    model, inputs = build("ijepa"), batch("ijepa")
    optimizer = torch.optim.SGD(model.backbone.parameters(), lr=1e-3)
    for _ in range(5):
        model.backbone(inputs["pixel_values"][:, 0]).last_hidden_state.mean().backward()
        optimizer.step()
    for _ in range(2):
        model(**inputs).loss.backward()
        optimizer.step()
    model(**inputs).loss.backward()
    with pytest.raises(ValueError, match="IJEPAForPreTraining is trained without after_step"):
        optimizer.step()


def test_a_model_is_forgotten_when_it_is_deleted():
    model = Student()
    forgotten = weakref.ref(model)
    del model
    gc.collect()
    assert forgotten() is None


EXACT = 0.996**200  # what is left of a distance after 200 steps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_teacher_of_a_model_of_few_bits_moves_as_it_should(dtype):
    model = Student().to(dtype)
    start = model.teacher["head"][0].weight.clone()
    with torch.no_grad():
        model.head[0].weight.fill_(3.0)
    for _ in range(200):
        model.update_teacher(0.996)
    left = (3.0 - model.teacher["head"][0].weight) / (3.0 - start)
    torch.testing.assert_close(left, torch.full_like(left, EXACT), rtol=1e-4, atol=0)
    model.after_step(0.70001)
    assert model.progress == torch.tensor(0.70001)


def test_state_stays_in_float32_whatever_the_model_is_cast_to(tmp_path):
    """Also when it is built or loaded in bfloat16; the values are those before the cast, not rounded ones."""
    state = ("teacher.", "progress", "view_targets.", "patch_targets.")
    model = build("dinov2_centering")
    with torch.no_grad():
        for value in model.state_dict().values():
            value.uniform_()
    model.save_pretrained(tmp_path)
    with torch.random.fork_rng(devices=[]):
        loaded = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
        built = type(model)._from_config(model.config, dtype=torch.bfloat16)
    for cast in (copy.deepcopy(model).bfloat16(), copy.deepcopy(model).to(torch.float16).half(), loaded):
        for name, value in cast.state_dict().items():
            expected = model.state_dict()[name]
            assert (value.dtype == torch.float32) == name.startswith(state), name
            assert torch.equal(value, expected.to(value.dtype)), name
    assert {name for name, value in built.state_dict().items() if value.dtype == torch.float32} == {
        name for name in built.state_dict() if name.startswith(state)
    }
    assert all(value.dtype == torch.float64 for value in model.double().state_dict().values())


@pytest.mark.parametrize("name", ["moco_v3", "mae_image_losses", "dinov2", "dinov2_centering", "ijepa"])
def test_a_model_in_bfloat16_has_the_loss_and_the_speed_of_bfloat16(name):
    """The teacher's weights are float32, its products are not."""
    model, inputs, losses, outputs = build(name), batch(name), [], []
    teacher = model.teacher["backbone"].layers[0].mlp.up_projection
    teacher.register_forward_hook(lambda _, __, output: outputs.append(output.dtype))
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        losses.append(model.to(dtype)(**inputs).loss)
        losses[-1].backward()
        assert outputs[-1] == dtype
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=0.05)
    model.after_step(0.5)


class LoRALinear(nn.Module):
    """A layer as peft wraps it: the weights that it adapts in `base_layer`, and adapters by name."""

    def __init__(self, base_layer, *names):
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        down = (nn.Linear(base_layer.in_features, 2, bias=False) for _ in names)
        self.lora_A = nn.ModuleDict(zip(names, down))
        self.lora_B = nn.ModuleDict({name: nn.Linear(2, base_layer.out_features, bias=False) for name in names})
        self.lora_variant, self.lora_bias = {}, dict.fromkeys(names, False)
        self.active_adapters, self.merged_adapters, self.disable_adapters = ["one"], [], False

    def get_delta_weight(self, name):
        return 0.5 * self.lora_B[name].weight @ self.lora_A[name].weight


def test_a_teacher_follows_a_student_with_adapters_as_it_computes():
    """By names: of the active adapters those that are not merged are added, whatever order the parameters have."""
    model = Student()
    before = {name: value.clone() for name, value in model.teacher["head"].named_parameters()}
    layer = model.head[0] = LoRALinear(model.head[0], "one", "two")
    effective = layer.base_layer.weight + 0.5 * layer.lora_B["one"].weight @ layer.lora_A["one"].weight
    with torch.no_grad():
        layer.base_layer.bias.add_(1.0)
        model.head[1].bias.fill_(4.0)
    model.update_teacher(0.9)
    moved = dict(model.teacher["head"].named_parameters())
    torch.testing.assert_close(moved["0.weight"], 0.9 * before["0.weight"] + 0.1 * effective)
    torch.testing.assert_close(moved["0.bias"], before["0.bias"] + 0.1)
    torch.testing.assert_close(moved["1.bias"], torch.full((3,), 0.4))
    for changes in ({"merged_adapters": ["one"]}, {"disable_adapters": True}, {"active_adapters": ["elsewhere"]}):
        vars(layer).update({"merged_adapters": [], "disable_adapters": False, "active_adapters": ["one"], **changes})
        model.update_teacher(0.0)
        torch.testing.assert_close(model.teacher["head"][0].weight, layer.base_layer.weight)


@pytest.mark.parametrize("field", ["lora_variant", "lora_bias", None])
def test_adapters_that_a_teacher_cannot_follow_are_refused(field):
    model = Student()
    model.head[0] = LoRALinear(model.head[0], "one")
    if field is None:  # both have adapters
        model.teacher["head"][0] = LoRALinear(model.teacher["head"][0], "one")
    else:  # DoRA, a bias of its own
        setattr(model.head[0], field, {"one": True})
    with pytest.raises(ValueError, match=r"cannot follow the student.*head\.0\..*exclude_modules=r'teacher\\..*'"):
        model.after_step(0.5)
