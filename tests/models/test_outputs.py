"""What `forward` takes and returns, by transformers' conventions: options, hidden states, the batch as first axis."""

import pytest
import torch
from tiny import BACKBONE, PRETRAINING, TINY, batch, build
from torch import Tensor

from hf_vlm.models.modeling_vlm_vit import VLMViTModel

INFERENCE = [name for name in TINY if name not in PRETRAINING]
ENCODED = [
    name for name in INFERENCE if name != "mask_query_segmentation"
]  # whose queries are in the encoder's layers


def inputs_of(name, num_images=3):
    return {key: value for key, value in batch(name, num_images).items() if key != "labels"}


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("unknown", ["bool_masked_pos", "pixel_mask", "interpolate_pos_encoding"])
def test_unknown_arguments_are_named(name, unknown):
    with pytest.raises(TypeError, match=unknown):
        build(name)(**batch(name), **{unknown: torch.ones(1)})


@pytest.mark.parametrize("name", PRETRAINING)
def test_a_method_which_encodes_several_times_refuses_to_give_hidden_states(name):
    with pytest.raises(TypeError, match="output_hidden_states"):
        build(name)(**batch(name), output_hidden_states=True)


@torch.no_grad()
@pytest.mark.parametrize("name", ENCODED)
def test_hidden_states_and_attentions_are_the_encoders(name):
    model = build(name).eval()
    model.set_attn_implementation("eager")
    inputs, encoder = inputs_of(name), model if name in ("encoder", "backbone") else model.backbone
    reference = VLMViTModel(encoder.config).eval()
    reference.load_state_dict(encoder.state_dict())
    states = [reference.embeddings(inputs["pixel_values"])]
    for layer in reference.layers:
        states.append(layer(states[-1]))

    output = model(**inputs, output_hidden_states=True, output_attentions=True)
    torch.testing.assert_close(output.hidden_states, tuple(states))
    assert [tuple(weights.shape) for weights in output.attentions] == [(3, 2, 17, 17)] * BACKBONE["num_hidden_layers"]
    torch.testing.assert_close(output.attentions[0].sum(-1), torch.ones(3, 2, 17))

    plain = model(**inputs)
    assert (plain.hidden_states, plain.attentions) == (None, None)
    assert len(model(**inputs, output_hidden_states=True, return_dict=False)) == len(plain.to_tuple()) + 1


@torch.no_grad()
@pytest.mark.parametrize("name", ENCODED)
def test_hidden_states_and_attentions_by_configuration(name):
    model, inputs = build(name).eval(), inputs_of(name)
    model.set_attn_implementation("eager")
    for config in {id(c): c for c in (model.config, getattr(model.config, "backbone_config", model.config))}.values():
        config.output_hidden_states = config.output_attentions = True
        output = model(**inputs)
        assert len(output.hidden_states) - 1 == len(output.attentions) == BACKBONE["num_hidden_layers"]
        assert model(**inputs, output_hidden_states=False).hidden_states is None
        config.output_hidden_states = config.output_attentions = False


@torch.no_grad()
@pytest.mark.parametrize("name", INFERENCE)
def test_every_output_has_the_batch_as_first_axis(name):
    """Pipelines take the outputs of a batch apart by it; tuples they take apart tensor by tensor."""
    model = build(name).eval()
    model.set_attn_implementation("eager")
    output = model(**inputs_of(name), output_hidden_states=True, output_attentions=True)
    for key, value in output.items():
        tensors = value if key in ("hidden_states", "attentions", "feature_maps") else [value]
        assert all(isinstance(tensor, Tensor) and tensor.shape[0] == 3 for tensor in tensors), key


@torch.no_grad()
def test_feature_maps_are_the_patches_of_all_tokens():
    backbone = {"num_register_tokens": 2, "image_size": [32, 48]}
    tokens = build("backbone", backbone=backbone, reshape_hidden_states=False).eval()
    maps, encoder = build("backbone", backbone=backbone).eval(), build("encoder", backbone=backbone).eval()
    images = torch.randn(3, 3, 32, 48)
    (sequence,), (feature_map,) = tokens(images).feature_maps, maps(images).feature_maps
    torch.testing.assert_close(sequence, encoder(images).last_hidden_state)
    torch.testing.assert_close(feature_map, sequence[:, 3:].mT.reshape(3, 32, 4, 6))


@torch.no_grad()
def test_a_detector_reads_maps_whatever_its_encoder_was_saved_with():
    plain, other = build("detection"), build("detection", backbone={"reshape_hidden_states": False})
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(plain.eval()(images).logits, other.eval()(images).logits)
