"""What transformers' common tests ask of a model, in few words, of every row of the registry.

Its own `ModelTesterMixin` does not run here: it needs packages that are no dependencies, and minutes.
"""

import copy
import inspect

import pytest
import torch
from tiny import PRETRAINING, TINY, batch, build
from torch.utils import _pytree as pytree

from hf_vlm.registry import find_model

INFERENCE = [name for name in TINY if name not in PRETRAINING]


def leaves(output):
    return [value for value in pytree.tree_leaves(output) if isinstance(value, torch.Tensor)]


def test_images_are_the_first_argument():
    for tiny in TINY.values():
        model_class = find_model(tiny.row).model_class
        names = list(inspect.signature(model_class.forward).parameters)
        assert names[:2] == ["self", model_class.main_input_name]


@torch.no_grad()
@pytest.mark.parametrize("name", TINY)
def test_tuples_are_the_outputs_in_their_order(name):
    model, inputs = build(name).eval(), batch(name)
    output, values = model(**inputs), model(**inputs, return_dict=False)
    assert isinstance(values, tuple)
    torch.testing.assert_close(leaves(values), leaves(output.to_tuple()))
    model.config.return_dict = False
    torch.testing.assert_close(leaves(model(**inputs)), leaves(values))  # and evaluation is deterministic


@torch.no_grad()
@pytest.mark.parametrize("name", TINY)
def test_implementations_of_attention_agree(name):
    model, inputs = build(name).eval(), batch(name)
    outputs = []
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        outputs.append(leaves(model(**inputs)))
    torch.testing.assert_close(*outputs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", PRETRAINING)
def test_activation_checkpointing_changes_no_gradient(name):
    plain, inputs = build(name), batch(name)
    checkpointed = copy.deepcopy(plain)
    checkpointed.activation_checkpointing_enable()
    assert all(layer.gradient_checkpointing for layer in checkpointed.backbone.layers)
    for model in (plain, checkpointed):
        model(**inputs).loss.backward()
    for (key, parameter), other in zip(plain.named_parameters(), checkpointed.parameters()):
        torch.testing.assert_close(other.grad, parameter.grad, msg=key)


@torch.no_grad()
@pytest.mark.parametrize("name", INFERENCE)
def test_an_image_is_encoded_alike_in_every_batch(name):
    model, images = build(name).eval(), batch(name)["pixel_values"]
    together = leaves(model(images))
    for index in range(len(images)):
        alone = leaves(model(images[index : index + 1]))
        torch.testing.assert_close([value[index : index + 1] for value in together], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", TINY)
def test_configurations_come_back_as_they_were_saved(name, tmp_path):
    config = build(name, tmp_path).config
    config.save_pretrained(tmp_path / "saved")
    loaded = type(config).from_pretrained(tmp_path / "saved")
    assert loaded.to_dict() == config.to_dict()
    assert type(config).from_dict(config.to_dict()).to_dict() == config.to_dict()
