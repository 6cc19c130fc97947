"""Every method learns one batch, and what it saved is loaded with all of its state."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from tiny import PRETRAINING, TINY, batch, build, slow_but


@dataclass(frozen=True)
class Overfit:
    """How one batch is learned, and by what one sees that it was.

    Args:
        learned: Whether it was, by the outputs of the first and of the last step.
        fields: Changes of the tiny configuration.
        num_images: Images of the batch.
        learning_rate: Learning rate of AdamW.
        num_steps: Number of steps.
        last_progress: Fraction of training that the model is given after the last step.
    """

    learned: Callable[[Any, Any], bool]
    fields: dict[str, Any] = field(default_factory=dict)
    num_images: int = 2
    learning_rate: float = 3e-3
    num_steps: int = 150
    last_progress: float = 1.0


def loss_falls_to(fraction):
    return lambda first, last: last.loss < fraction * first.loss


def contrast_is_learned(first, last):
    return first.accuracy < 0.5 and last.accuracy == 1 and last.loss < 0.5 * first.loss


def image_losses_fall(first, last):
    return last.loss_pixel < 0.2 * first.loss_pixel and last.loss_perceptual < 0.2 * first.loss_perceptual


def gaussian_is_learned(first, last):
    return last.sigreg < 0.01 * first.sigreg and last.invariance < 0.1 * first.invariance and last.feature_std > 0.5


def dinov2_is_learned(first, last):
    return last.dino < first.dino - 0.5 and last.feature_std > 0.6


def features_are_learned(first, last):
    return last.patch_cosine > 0.9 and last.image_kl < 0.01


def pairs_are_learned(first, last):
    return last.accuracy == 1 and last.loss < 0.1 * first.loss


DINOV2 = {"num_images": 8, "learning_rate": 2e-3, "num_steps": 60, "last_progress": 0.6}
IMAGE_LOSSES = {"perceptual_weight": 1.0, "adversarial_weight": 0.01}
OVERFITS = {
    "simclr": Overfit(
        lambda first, last: last.accuracy == 1 and last.loss < 0.1, {"projection_size": 32}, 8, num_steps=60
    ),
    "moco_v3": Overfit(contrast_is_learned, {"momentum": 0.9}, 8, 1e-3, 100, last_progress=0.5),
    "mae": Overfit(loss_falls_to(0.1)),
    "mae_partial": Overfit(loss_falls_to(0.1), {"prediction_ratio": 1.0}),
    # Equally loaded experts have a balance loss of 1.
    "mae_sparse": Overfit(lambda first, last: last.loss - 1 < 0.2 * (first.loss - 1)),
    "mae_image_losses": Overfit(image_losses_fall, {**IMAGE_LOSSES, "adversarial_start": 0.0}),
    "mae_frozen_encoder": Overfit(loss_falls_to(0.2)),
    "simmim": Overfit(loss_falls_to(0.1)),
    "lejepa": Overfit(gaussian_is_learned, num_images=32, num_steps=100),
    "lejepa_joined": Overfit(gaussian_is_learned, num_images=32, num_steps=100),
    "dinov2": Overfit(dinov2_is_learned, **DINOV2),
    # A centre that starts at zero gives targets of one prototype, which are easy at first.
    "dinov2_centering": Overfit(lambda first, last: last.feature_std > 0.6, **DINOV2),
    "ijepa": Overfit(loss_falls_to(0.5), {"momentum": 0.9}, 8, num_steps=120),
    "distill": Overfit(features_are_learned, num_images=4),
    "image_text": Overfit(pairs_are_learned, num_images=8, num_steps=80),
    "image_text_softmax": Overfit(pairs_are_learned, num_images=8, num_steps=80),
}


def train(model, inputs, case):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=case.learning_rate)
    outputs = []
    for step in range(case.num_steps):
        outputs.append(model(**inputs))
        outputs[-1].loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.after_step(case.last_progress * (step + 1) / case.num_steps)
    return outputs[0], outputs[-1]


@pytest.mark.parametrize("name", slow_but(PRETRAINING, *dict.fromkeys(TINY[name].row for name in PRETRAINING)))
def test_learns_one_batch_and_saves_its_state(name, tmp_path):
    case = OVERFITS[name]
    model = build(name, tmp_path, **case.fields)
    torch.manual_seed(1)
    inputs = batch(name, case.num_images)
    frozen = {key: p.clone() for key, p in model.named_parameters() if key.startswith(f"{TINY[name].frozen}.")}
    first, last = train(model, inputs, case)
    assert all(torch.equal(model.get_parameter(key), value) for key, value in frozen.items())
    assert case.learned(first, last)
    model.save_pretrained(tmp_path / "saved")
    loaded, report = type(model).from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, parameter in loaded.train().named_parameters() if parameter.requires_grad}
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
    assert loaded(**inputs).loss.item() == pytest.approx(model(**inputs).loss.item(), rel=1e-5)
