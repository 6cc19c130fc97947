import math

import pytest
import torch
import torch.nn.functional as F

from hf_vlm.metrics import feature_std
from hf_vlm.models.modeling_moco_v3 import MoCoV3Config, MoCoV3ForPreTraining, contrastive_loss
from hf_vlm.models.modeling_vlm_vit import VLMViTModel
from hf_vlm.models.ssl_layers import ProjectionHead

BACKBONE = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def build(**options):
    torch.manual_seed(0)
    options = {"projection_hidden_size": 64, "projection_size": 16, **options}
    return MoCoV3ForPreTraining(MoCoV3Config(backbone_config=BACKBONE, **options)).train()


def views(size=8):
    torch.manual_seed(1)
    return torch.randn(size, 2, 3, 32, 32)


def reference_contrastive(queries, keys, temperature):
    """The formula of the paper, equation 1 and the factor of algorithm 1, as a loop in float64."""
    queries, keys = ((rows / rows.norm(dim=1, keepdim=True)).double() for rows in (queries, keys))
    total = 0.0
    for i, query in enumerate(queries):
        similarities = [math.exp(float(query @ key) / temperature) for key in keys]
        total -= math.log(similarities[i] / sum(similarities))
    return 2 * temperature * total / len(queries)


@pytest.mark.parametrize("temperature", [0.07, 0.2, 1.0])
def test_contrastive_loss_equals_the_formula(temperature):
    torch.manual_seed(0)
    queries, keys = torch.randn(9, 6) * 3, torch.randn(9, 6)
    loss, accuracy = contrastive_loss(queries, keys, temperature)
    assert loss.item() == pytest.approx(reference_contrastive(queries, keys, temperature), rel=1e-5)
    cosines = F.cosine_similarity(queries[:, None], keys[None], dim=-1)
    assert accuracy.item() == pytest.approx(sum(int(row.argmax()) == i for i, row in enumerate(cosines)) / 9)


def test_similarities_are_in_float32_under_autocast():
    torch.manual_seed(0)
    queries, keys = torch.randn(64, 16).bfloat16(), torch.randn(64, 16).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = contrastive_loss(queries, keys, 0.1)
        assert build()(views()).loss.dtype == torch.float32
    assert loss.item() == pytest.approx(reference_contrastive(queries.float(), keys.float(), 0.1), rel=1e-5)


def reference_head(head, inputs):
    """Batch norm written out; the last one has neither gain nor bias."""
    for layer in head:
        if isinstance(layer, torch.nn.BatchNorm1d):
            inputs = (inputs - inputs.mean(0)) / (inputs.var(0, unbiased=False) + layer.eps).sqrt()
            inputs = inputs if layer.weight is None else inputs * layer.weight + layer.bias
        else:
            inputs = inputs.clamp(min=0) if isinstance(layer, torch.nn.ReLU) else inputs @ layer.weight.T
            inputs = inputs if getattr(layer, "bias", None) is None else inputs + layer.bias
    return inputs


@pytest.mark.parametrize("predictor_norm", [True, False])
def test_loss_and_gradients_equal_a_slow_reference(predictor_norm):
    """Each view in a pass of its own, all tokens computed, the teacher unlike the student."""
    model, pixel_values = build(predictor_norm=predictor_norm).double(), views().double()
    assert isinstance(model.predictor[-1], torch.nn.BatchNorm1d) == predictor_norm
    with torch.no_grad():
        for parameter in model.teacher.parameters():
            parameter.mul_(1.1)
    output = model(pixel_values)
    queries, keys = [], []
    for view in pixel_values.unbind(1):
        pooled = model.backbone(view).last_hidden_state[:, 0]
        queries.append(reference_head(model.predictor, reference_head(model.projector, pooled)))
        of_teacher = model.teacher["backbone"](view).last_hidden_state[:, 0]
        keys.append(reference_head(model.teacher["projector"], of_teacher))
    temperature = model.config.temperature
    expected = 0
    for query, key in zip(queries, reversed(keys), strict=True):
        logits = F.normalize(query, dim=1) @ F.normalize(key, dim=1).T / temperature
        expected = expected - 2 * temperature * logits.log_softmax(1).diagonal().mean()
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    learned = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert not [name for name in learned if name.startswith(("teacher", "backbone.embeddings.patch_projection"))]
    ours = torch.autograd.grad(output.loss, learned.values())
    theirs = torch.autograd.grad(expected, learned.values())
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_heads_end_in_batch_norm_without_gain():
    torch.manual_seed(0)
    head = ProjectionHead(6, 12, 4, num_layers=3, last_norm=True)
    outputs = head(torch.randn(50, 6) * 5 + 2)
    torch.testing.assert_close(outputs.mean(0), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(outputs.std(0, unbiased=False), torch.ones(4), atol=1e-3, rtol=0)
    assert {name for name, _ in head.named_parameters() if name.startswith(("6", "7"))} == {"6.weight"}


def test_nothing_is_computed_that_is_not_read(monkeypatch):
    lengths = []
    forward = VLMViTModel.forward

    def kept(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        lengths.append((output.last_hidden_state.shape[:2], output.pooler_output.requires_grad))
        return output

    monkeypatch.setattr(VLMViTModel, "forward", kept)
    build()(views())
    assert lengths == [((16, 1), True), ((16, 1), False)]


def test_weights_are_initialised_as_in_the_official_code():
    model = build()
    limits = {
        "backbone.embeddings.patch_projection": math.sqrt(6 / (3 * 8 * 8 + 32)),
        "backbone.layers.1.attention.query": math.sqrt(6 / (32 + 32)),  # a matrix of its own, not a third of one
        "backbone.layers.0.attention.projection": math.sqrt(6 / (32 + 32)),
        "backbone.layers.1.mlp.up_projection": math.sqrt(6 / (32 + 128)),
        "projector.0": 1 / math.sqrt(32),
        "projector.6": 1 / math.sqrt(64),
        "predictor.0": 1 / math.sqrt(16),
    }
    for name, limit in limits.items():
        layer = model.get_submodule(name)
        assert layer.weight.abs().max().item() == pytest.approx(limit, rel=0.01), name
        assert layer.weight.std().item() == pytest.approx(limit / math.sqrt(3), rel=0.05), name
        assert layer.bias is None or not layer.bias.any(), name
    assert 0 < model.backbone.embeddings.class_token.abs().max() < 1e-5
    weights = model.backbone.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in model.teacher["backbone"].state_dict().items())


def test_an_encoder_whose_patch_projection_learns_is_initialised_as_in_every_method():
    model = build(freeze_patch_projection=False)
    alone = VLMViTModel(model.config.backbone_config)
    for name in ("embeddings.patch_projection", "layers.1.attention.query", "layers.0.mlp.down_projection"):
        spread = alone.get_submodule(name).weight.std().item()
        assert model.backbone.get_submodule(name).weight.std().item() == pytest.approx(spread, rel=0.05), name


def test_a_frozen_patch_projection_stays_frozen(tmp_path):
    model = build()
    weight = model.backbone.embeddings.patch_projection.weight
    assert torch.equal(model.teacher["backbone"].embeddings.patch_projection.weight, weight)
    train(model, 2)
    model.save_pretrained(tmp_path)
    loaded = MoCoV3ForPreTraining.from_pretrained(tmp_path).train()
    kept = loaded.backbone.embeddings.patch_projection
    assert torch.equal(kept.weight, weight)
    assert not any(parameter.requires_grad for parameter in kept.parameters())
    assert loaded.backbone.embeddings.class_token.requires_grad
    learning = build(freeze_patch_projection=False)
    learning(views()).loss.backward()
    assert learning.backbone.embeddings.patch_projection.weight.grad.abs().sum() > 0


def test_positions_are_sin_cos_by_default():
    assert MoCoV3Config().backbone_config.position_embedding_type == "sincos"
    rotary = MoCoV3Config(backbone_config={"position_embedding_type": "rope"})
    assert rotary.backbone_config.position_embedding_type == "rope"


def train(model, num_steps):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for step in range(num_steps):
        output = model(views())
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.after_step(step / 200)
    return output


def test_a_collapse_is_seen():
    model = build()
    output = model(views())
    pooled = model.backbone(views().transpose(0, 1).flatten(0, 1)).pooler_output
    spread = feature_std(pooled) * math.sqrt(16 / 15)  # of a sample: 16 views
    assert output.feature_std.item() == pytest.approx(spread, rel=1e-3)
    assert output.feature_std > 0.01
    torch.nn.init.zeros_(model.backbone.norm.weight)
    torch.nn.init.ones_(model.backbone.norm.bias)  # the same output for every image
    collapsed = model(views())
    assert collapsed.feature_std < 1e-6
    assert collapsed.accuracy <= 1 / 4


def test_the_students_encoder_is_what_users_get():
    model = build()
    assert model.trained_encoder is model.backbone
    with pytest.raises(ValueError, match="temperature"):
        MoCoV3Config(temperature=0)
    with pytest.raises(ValueError, match="2 views"):
        model(torch.randn(4, 1, 3, 32, 32))
