"""What keeps a step fast, counted rather than timed: no graph break, no recompilation, no wait for the device."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hf_vlm.models.modeling_mae import MAEConfig, MAEForPreTraining
from hf_vlm.models.modeling_simclr import SimCLRConfig, SimCLRForPreTraining

DECODER = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
# Their results have sizes or values that the host must know before it can go on.
WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "repeat_interleave", "is_nonzero", "equal")


def build(name, num_layers=2):
    torch.manual_seed(0)
    backbone = {
        "image_size": 32,
        "patch_size": 8,
        "hidden_size": 32,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "position_embedding_type": "sincos",
    }
    if name == "simclr":
        return SimCLRForPreTraining(SimCLRConfig(backbone_config=backbone, projection_hidden_size=32)).train()
    options = {"use_cross_attention": True, "prediction_ratio": 0.5} if name == "mae_partial" else {}
    return MAEForPreTraining(MAEConfig(backbone_config=backbone, decoder_config=DECODER, **options)).train()


def images(name):
    return torch.randn(4, 2 if name == "simclr" else 1, 3, 32, 32)


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
    model, batch = build(name, num_layers), images(name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    with Operators() as operators:
        model(batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for state in ("zeros", "zeros_like"):  # made by the optimiser in its first step
        operators.counts.pop(state)
    return operators.counts


METHODS = pytest.mark.parametrize("name", ["mae", "mae_partial", "simclr"])


@METHODS
def test_a_step_never_waits_for_the_device(name):
    counts = operators_of_a_step(name)
    assert counts["_fused_adamw_"] == 1
    assert not {operator for operator in counts if operator in (*WAITING, "index of a mask")}


@METHODS
def test_a_layer_asks_for_few_operators(name):
    """Forward and backward: 2 norms, 6 products with their biases, attention, GELU, 2 sums, and no copies between."""
    counts = operators_of_a_step(name, 5)
    counts.subtract(operators_of_a_step(name, 4))
    assert counts["copy_"] == counts["clone"] == counts["cat"] == 0
    assert counts["mm"] + counts["addmm"] + counts["bmm"] == 18
    assert sum(counts.values()) <= 38


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by dynamo itself
@METHODS
def test_compiles_whole_and_once(name):
    torch._dynamo.reset()
    model = build(name)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    noise = {} if name == "simclr" else {"noise": torch.rand(4, 16)}
    batch = images(name)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            expected, loss = model(batch, **noise).loss, compiled(batch, **noise).loss
            torch.testing.assert_close(loss, expected)
            loss.backward()
            batch = batch + 1
    torch._dynamo.reset()
