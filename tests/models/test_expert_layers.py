"""Sparse layers: experts and routers against plain loops, losses of routers in every model, upcycling."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from tiny import BACKBONE, PRETRAINING, SPARSE, batch, build, slow_but

from hf_vlm.models.configuration_vlm_vit import VLMViTConfig
from hf_vlm.models.expert_layers import VLMViTRouter, VLMViTSparseMLP, collect_routings, within_capacity
from hf_vlm.models.modeling_vlm_vit import VLMViTModel
from hf_vlm.models.router_loss import router_loss
from hf_vlm.models.upcycling import upcycle

GATED = {"use_gated_mlp": True, "hidden_act": "silu"}
LABELLED = ["detection", "instance_segmentation", "classification", "semantic_segmentation"]


def sparse_mlp(**fields):
    """A sparse MLP whose weights differ between experts, in float64, of which grouped products have no kernel."""
    config = VLMViTConfig(**{**BACKBONE, **SPARSE, **fields})
    config._experts_implementation = "eager"
    mlp = VLMViTSparseMLP(config).double()
    torch.manual_seed(0)
    for parameter in mlp.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return mlp.train()


def sparse_encoder(**fields):
    torch.manual_seed(0)
    return VLMViTModel(VLMViTConfig(**{**BACKBONE, **fields}))


def slow_mlp(mlp, tokens):
    """Each token by itself, through each of its experts."""
    experts, config = mlp.experts, mlp.router.config
    rows = []
    for token in tokens:
        probabilities = (mlp.router.weight @ token).softmax(0)
        chosen = sorted(range(config.num_experts), key=lambda e: -probabilities[e])[: config.num_experts_per_tok]
        total = sum(probabilities[e] for e in chosen).detach()
        row = torch.zeros_like(token)
        for e in chosen:
            inner = experts.get_parameter(experts.first)[e] @ token + experts.get_parameter(f"{experts.first}_bias")[e]
            inner = F.silu(inner[:128]) * inner[128:] if config.use_gated_mlp else F.gelu(inner)
            output = experts.down_proj[e] @ inner + experts.down_proj_bias[e]
            row = row + output * probabilities[e] / (total if config.norm_topk_prob else 1)
        rows.append(row)
    return torch.stack(rows)


def values_and_gradients(mlp, function, tokens):
    mlp.zero_grad()
    tokens = tokens.clone().requires_grad_()
    output = function(tokens)
    (output * torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)).sum().backward()
    return [output.detach(), tokens.grad, *(p.grad.clone() for p in mlp.parameters())]


@pytest.mark.parametrize("gate", [{}, GATED])
@pytest.mark.parametrize("choices", [{"num_experts_per_tok": 1}, {"norm_topk_prob": False}])
def test_experts_of_every_implementation_equal_a_loop_over_tokens(gate, choices):
    mlp = sparse_mlp(**gate, **choices)
    tokens = torch.randn(3, 7, 32, dtype=torch.float64)
    expected = values_and_gradients(mlp, lambda x: slow_mlp(mlp, x.flatten(0, 1)).view_as(x), tokens)
    for implementation in ("eager", "batched_mm", "grouped_mm"):
        mlp.experts.config._experts_implementation = implementation
        dtype = torch.float32 if implementation == "grouped_mm" else torch.float64
        found = values_and_gradients(mlp.to(dtype), mlp, tokens.to(dtype))
        tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {}
        torch.testing.assert_close(found, [value.to(dtype) for value in expected], **tolerance)
    assert all(gradient.abs().sum() > 0 for gradient in expected)  # the router's too, with one choice


def test_models_take_grouped_products_and_can_change_that():
    model = build("simclr", backbone=SPARSE)
    assert model.backbone.config._experts_implementation == "grouped_mm"
    model.set_experts_implementation("eager")
    assert model.backbone.layers[-1].mlp.experts.config._experts_implementation == "eager"


@pytest.mark.parametrize("fields", [{}, {"sparse_layers": [0, -1]}, {"num_hidden_layers": 5}])
def test_sparse_layers(fields):
    encoder = sparse_encoder(**SPARSE, **fields)
    sparse = [index for index, layer in enumerate(encoder.layers) if isinstance(layer.mlp, VLMViTSparseMLP)]
    assert sparse == {"sparse_layers": [0, 1], "num_hidden_layers": [0, 2, 4]}.get(next(iter(fields), ""), [1])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sparse_layers": [0]}, "num_experts is 0: name the number"),
        ({"num_experts": 2, "num_experts_per_tok": 3}, r"in 1 to num_experts \(2\), but is 3"),
        ({"num_experts": 2, "sparse_layers": [2]}, "names layer 2, but there are 2"),
        ({"num_experts": 2, "expert_capacity_factor": 0.0}, "must be positive"),
        ({"router_z_loss_coef": -1.0}, "router_z_loss_coef must be at least 0"),
    ],
)
def test_configurations_that_cannot_be_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        VLMViTConfig(**BACKBONE, **fields)


# --- initialisation, weight decay


@pytest.mark.parametrize("std", [None, 0.05])
def test_experts_begin_as_dense_layers_do(std):
    encoder = sparse_encoder(num_experts=8, hidden_size=64, initializer_range=std)
    dense, sparse = (layer.mlp for layer in encoder.layers)
    experts = sparse.experts
    for linear, weight in (dense.up_projection, experts.up_proj), (dense.down_projection, experts.down_proj):
        assert weight.std().item() == pytest.approx(linear.weight.std().item(), rel=0.03)
        assert weight.std(dim=(1, 2)).min() > 0.9 * weight.std()  # of each expert
    assert experts.up_proj_bias.abs().max() == experts.down_proj_bias.abs().max() == 0


def test_biases_of_experts_do_not_decay():
    encoder = sparse_encoder(**SPARSE)
    kept = {name for name in encoder.no_weight_decay() if "mlp" in name}
    assert kept == {f"layers.1.mlp.experts.{name}_bias" for name in ("up_proj", "down_proj")}


# --- upcycling


@torch.no_grad()
@pytest.mark.parametrize("gate", [{}, GATED])
@pytest.mark.parametrize("fields", [{"num_experts": 1}, {"num_experts": 4}, SPARSE | {"sparse_layers": [0, 1]}])
def test_an_upcycled_encoder_has_the_outputs_of_the_dense_one(gate, fields):
    dense, images = sparse_encoder(**gate).eval(), torch.randn(2, 3, 32, 32)
    for bias in (parameter for name, parameter in dense.named_parameters() if "bias" in name):
        torch.nn.init.normal_(bias)
    found, expected = upcycle(dense, **fields)(images), dense(images)
    torch.testing.assert_close(found.last_hidden_state, expected.last_hidden_state, atol=1e-5, rtol=1e-5)


def test_upcycling_of_what_is_sparse_or_stays_dense_is_refused():
    for encoder, fields in (sparse_encoder(**SPARSE), SPARSE), (sparse_encoder(), {}):
        with pytest.raises(ValueError, match="give a dense encoder and num_experts"):
            upcycle(encoder, **fields)


# --- capacity


def slow_capacity(weights, index, capacity):
    kept, used = torch.zeros_like(index, dtype=torch.bool), dict.fromkeys(range(8), 0)
    for position in sorted(range(index.numel()), key=lambda p: -weights.flatten()[p]):
        expert = index.flatten()[position].item()
        kept.view(-1)[position] = used[expert] < capacity
        used[expert] += 1
    return kept


def test_an_expert_keeps_its_most_probable_choices():
    weights, index = torch.rand(20, 8).softmax(-1).topk(2)
    for capacity in (1, 4, 40):
        kept = within_capacity(weights, index, capacity, 8)
        assert torch.equal(kept, slow_capacity(weights, index, capacity))


def test_what_is_dropped_is_counted_and_passes_by_in_training_alone():
    mlp = sparse_mlp(num_experts_per_tok=1, expert_capacity_factor=0.5)
    tokens = torch.randn(1, 40, 32, dtype=torch.float64)
    with collect_routings() as routings:
        output = mlp(tokens)
    dropped = (output == 0).all(-1).sum().item()
    most = math.ceil(0.5 * 40 / 4)
    assert dropped == (routings[0].load * 40 - most).clamp(min=0).sum().round()
    assert routings[0].dropped.item() == pytest.approx(dropped / 40)
    assert 20 <= dropped < 40
    assert not (mlp.eval()(tokens) == 0).all(-1).any()


# --- the routers' loss


def test_the_loss_of_routers_equals_a_loop():
    mlps = [sparse_mlp(router_z_loss_coef=0.1), sparse_mlp(num_experts_per_tok=1, num_experts=3)]
    batches = [torch.randn(1, 30, 32, dtype=torch.float64) for _ in mlps]
    with collect_routings() as routings:
        for mlp, tokens in zip(mlps, batches):
            mlp(tokens)
    loss, metrics = router_loss(routings)
    losses, balances, z_losses = [], [], []
    for mlp, tokens in zip(mlps, batches):
        experts, choices = mlp.router.weight.shape[0], mlp.router.config.num_experts_per_tok
        counts, sums, z_loss = [0] * experts, [0.0] * experts, 0.0
        for token in tokens[0]:
            logits = (mlp.router.weight @ token).tolist()
            exponentials = [math.exp(value) for value in logits]
            z_loss += math.log(sum(exponentials)) ** 2 / 30
            for e in range(experts):
                sums[e] += exponentials[e] / sum(exponentials) / 30
            for e in sorted(range(experts), key=lambda e: -logits[e])[:choices]:
                counts[e] += 1
        balances.append(experts * sum(c / (30 * choices) * p for c, p in zip(counts, sums)))
        z_losses.append(z_loss)
        config = mlp.router.config
        losses.append(config.router_aux_loss_coef * balances[-1] + config.router_z_loss_coef * z_loss)
    assert loss.item() == pytest.approx(sum(losses) / 2)
    assert metrics["router_balance_loss"].item() == pytest.approx(sum(balances) / 2)
    assert metrics["router_z_loss"].item() == pytest.approx(sum(z_losses) / 2)


def test_metrics_tell_equal_loads_from_collapsed_ones():
    mlp = sparse_mlp(num_experts_per_tok=1, num_experts=2)
    tokens = torch.randn(1, 64, 32, dtype=torch.float64)
    tokens = torch.cat([tokens, -tokens], dim=1)
    found = []
    for second in (-1, 0):  # the opposite of the first expert's logits; all of the positive half to the first expert
        mlp.router.weight.data[1] = second * mlp.router.weight.data[0]
        with collect_routings() as routings:
            mlp(tokens if second else tokens[:, (mlp.router(tokens[0])[1] == 0)[:, 0]])
        found.append(router_loss(routings)[1])
    balanced, collapsed = found
    assert balanced["router_balance_loss"].item() == pytest.approx(1)
    assert balanced["expert_load_entropy"].item() == pytest.approx(1)
    assert (collapsed["expert_load_max"].item(), collapsed["expert_load_min"].item()) == (2, 0)
    assert collapsed["expert_load_entropy"].item() == pytest.approx(0)
    assert collapsed["router_balance_loss"].item() > 1


@pytest.mark.parametrize("name", slow_but([*PRETRAINING, *LABELLED], "dinov2", "detection"))
def test_every_model_adds_the_loss_of_its_routers_once(name, tmp_path):
    """Twice the coefficients add it twice; a teacher, which is of the same shape, adds nothing and drops nothing."""
    fields = SPARSE | {"router_z_loss_coef": 1.0, "expert_capacity_factor": 1.0}
    model, inputs = build(name, tmp_path, fields), batch(name)
    trained = {router for router in model.backbone.modules() if isinstance(router, VLMViTRouter)}
    records = []

    def watch(router, args, output):
        assert (output[2] is not None) == (router in trained)
        records.extend([output[2]] if router in trained else [])

    for router in (module for module in model.modules() if isinstance(module, VLMViTRouter)):
        router.register_forward_hook(watch)
    losses, state = [], copy.deepcopy(model.state_dict())
    for factor in (0.0, 1.0, 2.0):
        model.load_state_dict(state)  # running statistics
        for router in trained:
            router.config.router_aux_loss_coef = router.config.router_z_loss_coef = factor
        torch.manual_seed(1)
        records.clear()
        losses.append(model(**inputs).loss)
    expected = sum(4 * (r.load * r.probabilities).sum() + r.z_loss for r in records) / len(records)
    torch.testing.assert_close(losses[1] - losses[0], expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(losses[2] - losses[0], 2 * expected, rtol=1e-4, atol=1e-4)
    assert model.router_metrics["dropped_tokens"].item() == pytest.approx(
        sum(r.dropped.item() for r in records) / len(records)
    )
    losses[2].backward()
    for name, parameter in model.backbone.named_parameters():
        assert ".mlp." not in name or parameter.grad.isfinite().all(), name
    torch.manual_seed(1)
    model.load_state_dict(state)
    values = model(**inputs, return_dict=False)
    torch.testing.assert_close(values[0], losses[2])


@torch.no_grad()
def test_an_evaluation_has_the_loss_of_the_model_alone():
    model, inputs = build("mae_sparse").eval(), batch("mae_sparse")
    before, other = model(**inputs).loss, copy.deepcopy(model)
    for router in (module for module in other.modules() if isinstance(module, VLMViTRouter)):
        router.config.router_aux_loss_coef = 100.0
    assert torch.equal(before, other(**inputs).loss)
    assert not model.router_metrics
