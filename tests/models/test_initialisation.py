"""All state is set where transformers sets it: missing weights come out as those of a new model, never as garbage.

The ideas are those of transformers' own tests `test_can_init_all_missing_weights` and
`test_init_weights_can_init_buffers`.
"""

import copy
import math

import pytest
import torch
from tiny import TINY, batch, build, perturb
from transformers.modeling_utils import PreTrainedModel

from hf_vlm.models.configuration_vlm_vit import VLMViTConfig
from hf_vlm.models.modeling_detection import VLMViTDetectionConfig, VLMViTForObjectDetection
from hf_vlm.models.modeling_simclr import SimCLRConfig, SimCLRForPreTraining

WITH_TEACHER = ("moco_v3", "mae_image_losses", "dinov2", "dinov2_centering", "ijepa")


@pytest.fixture
def seeded(monkeypatch):
    """The weights of a module depend on nothing that was initialised before it."""
    initialize = PreTrainedModel._initialize_weights

    def seed_and_initialize(*args):
        torch.manual_seed(42)
        initialize(*args)

    monkeypatch.setattr(PreTrainedModel, "_initialize_weights", seed_and_initialize)


@pytest.fixture
def garbage(monkeypatch):
    """Memory that is allocated and not set is full of NaN, or of large integers."""

    def full_of_garbage(tensor, **options):
        return torch.full_like(tensor, float("nan") if tensor.is_floating_point() else 12345, **options)

    monkeypatch.setattr(torch, "empty_like", full_of_garbage)


def assert_same_state(model, expected):
    state, wanted = model.state_dict(), expected.state_dict()
    assert state.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(state[name], wanted[name])] == []


def new_pair(name, folder, state_dict):
    """A new model, and one of the same configuration that is given these weights, all others being missing."""
    new = build(name, folder, {"layerscale_value": 1e-5, "num_register_tokens": 1})
    return new, type(new).from_pretrained(None, config=copy.deepcopy(new.config), state_dict=state_dict)


def standard_deviation(linear):
    return linear.weight.std().item()


def test_heads_and_their_encoders_are_initialised_by_width():
    """Xavier's rule: a deviation of 0.02 leaves narrow layers without a signal, and detectors hardly learn."""
    encoder = VLMViTConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=32)
    detector = VLMViTForObjectDetection(VLMViTDetectionConfig(backbone_config=encoder, hidden_size=64))
    fan = math.sqrt(2 / (64 + 256))
    assert standard_deviation(detector.backbone.layers[0].mlp.up_projection) == pytest.approx(fan, rel=0.05)
    decoder = detector.decoder.layers[0]
    assert standard_deviation(decoder.value) == pytest.approx(math.sqrt(2 / 128), rel=0.05)
    assert standard_deviation(detector.class_head) == pytest.approx(0.02, rel=0.2)  # all scores about the prior


def test_methods_keep_small_initial_weights_unless_told_otherwise():
    fields = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32}
    encoder = VLMViTConfig(**fields)
    model = SimCLRForPreTraining(SimCLRConfig(backbone_config=encoder))
    assert standard_deviation(model.backbone.layers[0].attention.value) == pytest.approx(0.02, rel=0.05)
    assert encoder.initializer_range is None  # the caller's is left as it is
    model = SimCLRForPreTraining(SimCLRConfig(backbone_config=VLMViTConfig(**fields, initializer_range=0.08)))
    assert standard_deviation(model.backbone.layers[0].attention.value) == pytest.approx(0.08, rel=0.05)


@pytest.mark.usefixtures("seeded", "garbage")
@pytest.mark.parametrize("name", TINY)
def test_missing_weights_are_those_of_a_new_model(name, tmp_path):
    assert_same_state(*reversed(new_pair(name, tmp_path, {})))


@pytest.mark.usefixtures("garbage")
@pytest.mark.parametrize("name", TINY)
def test_buffers_of_a_model_made_without_memory_are_those_of_a_new_one(name, tmp_path, monkeypatch):
    new = build(name, tmp_path)
    with torch.device("meta"):
        made = type(new)(copy.deepcopy(new.config))
    made.to_empty(device="cpu").init_weights()
    expected = dict(new.named_buffers())
    assert dict(made.named_buffers()).keys() == expected.keys()
    assert [key for key, value in made.named_buffers() if not torch.equal(value, expected[key])] == []


@pytest.mark.usefixtures("garbage")
@pytest.mark.parametrize("name", WITH_TEACHER)
def test_the_teacher_of_a_loaded_encoder_is_that_encoder(name, tmp_path):
    """A checkpoint of an encoder, or of a model without its teacher, in place of one of the whole model."""
    encoder = build(name, tmp_path, {"layerscale_value": 1e-5, "num_register_tokens": 1}).backbone
    perturb(encoder)
    new, loaded = new_pair(name, tmp_path, encoder.state_dict())
    assert_same_state(loaded.backbone, encoder)
    for key, module in loaded.teacher.items():
        assert_same_state(module, getattr(loaded, key))
    assert loaded.progress == 0
    without_teacher = {key: value for key, value in new.state_dict().items() if not key.startswith("teacher.")}
    _, loaded = new_pair(name, tmp_path, without_teacher | {"progress": torch.tensor(0.25)})
    assert_same_state(loaded.teacher["backbone"], new.backbone)
    assert loaded.progress == 0.25
    loaded.init_weights()  # what is there already is neither initialised nor changed again
    assert_same_state(loaded.backbone, new.backbone)


@pytest.mark.usefixtures("garbage")
def test_weights_of_a_teacher_that_are_there_are_kept():
    trained = build("ijepa")
    with torch.no_grad():
        for parameter in trained.teacher.parameters():
            parameter.add_(1.0)
    missing = "teacher.backbone.norm.weight"
    weights = {key: value for key, value in trained.state_dict().items() if key != missing}
    loaded = type(trained).from_pretrained(None, config=trained.config, state_dict=weights)
    with torch.no_grad():
        trained.get_parameter(missing).copy_(trained.backbone.norm.weight)
    assert_same_state(loaded, trained)


@pytest.mark.usefixtures("garbage")
def test_distillation_from_the_folder_of_an_encoder_starts_with_finite_statistics(tmp_path):
    _, loaded = new_pair("distill", tmp_path, build("encoder").state_dict())
    assert loaded.train()(**batch("distill")).loss.isfinite()
