"""Linear layers whose weights are packed integers: nothing takes the type or the device of images from them."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from tiny import batch, build, perturb
from torch import nn


class PackedLinear(nn.Linear):
    """Weights of 8 bits per row as bitsandbytes and others store them: `weight` is no matrix of floats."""

    @classmethod
    def of(cls, linear):
        packed = copy.copy(linear)
        packed.__class__ = cls
        packed._parameters = dict(linear._parameters)
        weight = linear.weight.detach()
        low, high = weight.amin(), weight.amax()
        packed.scale, packed.low = (high - low).item() / 255, low.item()
        codes = ((weight - low) / packed.scale).round().to(torch.uint8)
        packed.weight = nn.Parameter(codes.reshape(-1, 1), requires_grad=False)
        return packed

    def values(self):
        return self.weight.reshape(self.out_features, self.in_features) * self.scale + self.low

    def forward(self, inputs):
        return F.linear(inputs, self.values().to(inputs.dtype), None if self.bias is None else self.bias)


def packed_and_unpacked(model):
    """The model with packed layers in its encoder, and one with the same values as matrices of floats."""
    packed, unpacked = copy.deepcopy(model), copy.deepcopy(model)
    encoder = getattr(packed, "backbone", packed)
    for name, module in list(encoder.named_modules()):
        if type(module) is nn.Linear:
            parent, _, child = name.rpartition(".")
            quantised = PackedLinear.of(module)
            setattr(encoder.get_submodule(parent), child, quantised)
            with torch.no_grad():
                getattr(unpacked, "backbone", unpacked).get_submodule(name).weight.copy_(quantised.values())
    assert encoder.embeddings.patch_projection.weight.dtype == torch.uint8
    return packed.eval(), unpacked.eval()


@pytest.mark.parametrize(
    ("name", "positions", "dtype"),
    [
        *itertools.product(["encoder"], ["learned", "sincos", "rope"], [torch.float32, torch.bfloat16]),
        *itertools.product(["backbone", "classification", "detection", "mae", "dinov2"], ["learned"], [torch.float32]),
    ],
)
def test_an_encoder_of_packed_weights_computes_what_they_stand_for(name, positions, dtype):
    model = build(name, backbone={"position_embedding_type": positions}).to(dtype)
    perturb(model, 0.05)
    packed, unpacked = packed_and_unpacked(model)
    inputs = batch(name, 2)
    with torch.no_grad():
        found, expected = (torch.manual_seed(0) and part(**inputs).to_tuple()[0] for part in (packed, unpacked))
    found, expected = (part[0] if isinstance(part, tuple) else part for part in (found, expected))
    torch.testing.assert_close(found, expected)
