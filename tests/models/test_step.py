"""What keeps a step fast, counted rather than timed: no graph break, no recompilation, no wait for the device."""

from collections import Counter

import pytest
import torch
from tiny import PRETRAINING, TINY, batch, build, slow_but
from torch.utils._python_dispatch import TorchDispatchMode

# Their results have sizes or values that the host must know before it can continue.
WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "repeat_interleave", "is_nonzero", "equal")


class Operators(TorchDispatchMode):
    """Counts what a device would be asked to run."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        has_mask = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if not function.is_view:
            self.counts["index of a mask" if has_mask else name] += 1
        return function(*args, **(kwargs or {}))


def operators_of_a_step(name, num_layers=2):
    model = build(name, backbone={"num_hidden_layers": num_layers})
    inputs = batch(name, with_choices=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    with Operators() as operators:
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for state in ("zeros", "zeros_like"):  # made by the optimiser in its first step
        operators.counts.pop(state)
    return operators.counts


def operators_of_a_layer(name):
    counts = operators_of_a_step(name, 5)
    counts.subtract(operators_of_a_step(name, 4))
    return counts


@pytest.mark.parametrize("name", PRETRAINING)
def test_a_step_never_waits_for_the_device(name):
    counts = operators_of_a_step(name)
    assert counts["_fused_adamw_"] == 1
    if TINY[name].row == "image_text":  # transformers asks whether any token of the texts is padding
        counts["_local_scalar_dense"] -= 1
        counts = +counts
    assert not {operator for operator in counts if operator in (*WAITING, "index of a mask")}


@pytest.mark.parametrize(
    ("name", "has_teacher"),
    [
        *(("mae", 0), ("mae_partial", 0), ("simclr", 0), ("simmim", 0)),
        *(("ijepa", 1), ("distill", 1), ("moco_v3", 1)),
    ],
)
def test_a_layer_needs_few_operators(name, has_teacher):
    """Forward and backward: 2 norms, 6 products with their biases, attention, GELU, 2 sums, and no copies between.

    A teacher's layer runs forward alone.
    """
    counts = operators_of_a_layer(name)
    assert counts["copy_"] == counts["clone"] == counts["cat"] == 0
    assert counts["mm"] + counts["addmm"] + counts["bmm"] == 18 + 6 * has_teacher
    assert sum(counts.values()) <= 38 + 12 * has_teacher


@pytest.mark.parametrize(("name", "has_teacher"), [("dinov2", 1), ("lejepa", 0)])
def test_packed_crops_share_a_layers_products(name, has_teacher):
    """As many as crops of one size need, 18, and a teacher's 6; attention alone is computed for each size."""
    counts = operators_of_a_layer(name)
    assert counts["mm"] + counts["addmm"] + counts["bmm"] == 18 + 6 * has_teacher
    assert counts["_scaled_dot_product_flash_attention_for_cpu"] == 2 + has_teacher
    assert counts["cat"] == 1 + 3  # the outputs, and backwards the gradients of queries, keys and values
    assert sum(counts.values()) <= 48 + 12 * has_teacher


@pytest.mark.parametrize("name", ["mae_image_losses", "mae_frozen_encoder"])
def test_a_perceptual_loss_computes_no_gradient_of_weights(name):
    """18 products of the model's own layer; of the perceptual encoder 6 for the original, then 6 + 6."""
    counts = operators_of_a_layer(name)
    assert counts["copy_"] == counts["clone"] == counts["cat"] == 0
    assert counts["mm"] + counts["addmm"] + counts["bmm"] == 18 + 6 + 12


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by dynamo itself
@pytest.mark.parametrize(
    "name", slow_but([*dict.fromkeys(TINY[name].row for name in PRETRAINING), "mae_partial", "mae_sparse"], "mae")
)
def test_compiles_whole_and_once(name):
    """As small as possible: each operator is traced. LeJEPA has a second layer, for packed crops, and three knots."""
    torch._dynamo.reset()
    options = {"num_knots": 3} if name == "lejepa" else {}
    model = build(name, backbone={"num_hidden_layers": 2 if name == "lejepa" else 1}, **options)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    inputs = batch(name, 2, with_choices=name == "ijepa")  # its masks vary in size, and are sampled outside its graph
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(2):
            losses, before = [], [buffer.clone() for buffer in model.buffers()]
            for run in (model, compiled):
                torch.manual_seed(seed)  # of masks that are sampled within
                for buffer, value in zip(model.buffers(), before, strict=True):  # which a step may change
                    buffer.copy_(value)
                losses.append(run(**inputs).loss)
            torch.testing.assert_close(*losses)
            losses[1].backward()
            inputs = {key: value + 1 if value.is_floating_point() else value for key, value in inputs.items()}
    torch._dynamo.reset()
