"""Losses are computed in float32 whatever the precision of the network: from the same features, the same loss."""

import pytest
import torch
from tiny import PRETRAINING, batch, build
from torch import nn

from hf_vlm.models.modeling_distill import RunningStandardizer
from hf_vlm.models.ssl_prototypes import Centering, PrototypeHead

HEADS = (
    *("classification", "detection", "instance_segmentation"),
    *("semantic_segmentation", "mask_query_segmentation"),
)
LOSSES = (PrototypeHead, Centering, RunningStandardizer)  # modules that compare features, beside the model itself


def keep_network_in_float32(model: nn.Module) -> None:
    """Autocast applies to what the model does with the outputs of its modules, and to no module of the network."""
    for module in model.modules():
        if module is not model and not isinstance(module, LOSSES):
            module.forward = torch.autocast("cpu", enabled=False)(module.forward)


def loss_and_gradients(model, inputs, *, autocast):
    """All outputs of the loss, such as its parts, and the gradients; the backward pass is never under autocast."""
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = model(**inputs)
    gradients = torch.autograd.grad(output.loss, [p for p in model.parameters() if p.requires_grad])
    outputs = {**output, **(output.get("loss_dict") or {})}
    return {name: value for name, value in outputs.items() if torch.is_tensor(value)}, gradients


@pytest.mark.parametrize("name", [*PRETRAINING, *HEADS])
def test_the_loss_under_autocast_is_that_in_float32(name):
    model = build(name)
    keep_network_in_float32(model)
    inputs, state = batch(name), {key: value.clone() for key, value in model.state_dict().items()}
    plain = loss_and_gradients(model, inputs, autocast=False)
    model.load_state_dict(state)  # running statistics of targets have moved
    found = loss_and_gradients(model, inputs, autocast=True)
    torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-7)


def test_a_network_in_bfloat16_shows_in_the_loss():
    """What the test above leaves to the losses alone would be seen there."""
    model, inputs = build("dinov2"), batch("dinov2")
    plain, found = (loss_and_gradients(model, inputs, autocast=autocast)[0]["loss"] for autocast in (False, True))
    assert abs(found - plain) > 1e-5
