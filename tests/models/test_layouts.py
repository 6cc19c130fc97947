"""However ranks divide images and weights, they train what one process trains on the joined batch.

Compared are all gradients, all weights after three steps, and the state that training advances.
"""

import itertools
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import tiny
import torch
import torch.distributed as dist
from tiny import TINY, batch, build
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers.distributed import DistributedConfig

from hf_vlm.models.ranks import data_group
from hf_vlm.training.layout import divide

BATCH = 4
# Layouts by the number of ranks. With both sizes, pairs of ranks divide the layers, and the pairs share out the rest.
LAYOUTS = {
    2: {"ddp": {}, "fsdp": {"fsdp_size": 2}, "tp": {"tp_size": 2}, "ep": {"fsdp_size": 2, "ep_size": 2}},
    4: {
        "ddp": {},
        "fsdp": {"fsdp_size": 4},
        "hsdp": {"fsdp_size": 2, "dp_replicate_size": 2},
        "tp": {"tp_size": 4},
        "fsdp x tp": {"fsdp_size": 2, "tp_size": 2},
        "ep": {"fsdp_size": 4, "ep_size": 4},
        "ep x tp": {"fsdp_size": 2, "tp_size": 2, "ep_size": 4},
    },
}
FULL = {
    "use_qk_norm": True,
    "layerscale_value": 0.1,
    "position_embedding_type": "rope",
    "num_register_tokens": 2,
    "use_gated_mlp": True,
    "hidden_act": "silu",
    "norm_type": "rmsnorm",
    "intermediate_size": 64,
}
CASES = {name: (name, {}) for name in TINY if name not in ("encoder", "backbone")}
CASES |= {"simclr_full": ("simclr", FULL), "ijepa_full": ("ijepa", FULL), "detection_full": ("detection", FULL)}

IN_FLOAT32 = ("mae_sparse", "dinov2_centering")  # for grouped products, and for a centre that is kept so


def start(case):
    """(model, batch) of a case in float64, the same in every process."""
    name, backbone = CASES[case]
    heads = {"num_attention_heads": 4}
    parts = {
        key: value | heads for key, value in TINY[name].fields.items() if key in ("decoder_config", "predictor_config")
    }
    model = build(name, backbone=heads | backbone, **parts)
    tiny.perturb(model, 0.05)  # gains of 1 and biases of 0 hide what is wrong
    if hasattr(model, "teacher"):
        model.after_encoder_loaded()
    torch.manual_seed(1)
    inputs = batch(name, BATCH)
    inputs.pop("slices", None)  # those of the first rank serve all of them
    if case in IN_FLOAT32:
        return model, inputs
    return model.double(), as_double(inputs)


def as_double(value):
    if isinstance(value, dict):
        return {key: as_double(each) for key, each in value.items()}
    if isinstance(value, list):
        return [as_double(each) for each in value]
    return value.double() if value.is_floating_point() else value


def part(key, value, index, count):
    """What one of `count` ranks has of a batch; masks are of all first views, then of all second views."""
    rows = slice(index * BATCH // count, (index + 1) * BATCH // count)
    return value.unflatten(0, (-1, BATCH))[:, rows].flatten(0, 1) if key == "masked" else value[rows]


def train(model, inputs, wrapped=None):
    """Whole gradients of the first of three steps, and what the model then holds."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1, momentum=0.9, foreach=False)
    gradients = {}
    for step in range(3):
        torch.manual_seed(step)  # what the first rank samples for all is what one process samples
        (wrapped or model)(**inputs).loss.backward()
        gradients = gradients or {n: whole(p.grad) for n, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        optimizer.zero_grad()
        model.after_step((step + 1) / 10)
    return gradients, {name: whole(value) for name, value in model.state_dict().items()}


def whole(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def run_rank(rank, world, case, layouts, folder):
    """Trains a case in layouts of that many ranks; the first rank saves what it finds."""
    started = {layout: start(case) for layout in layouts}  # before there are ranks
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world, timeout=timedelta(seconds=200)
    )
    found = {}
    for layout, (model, inputs) in started.items():
        if sizes := LAYOUTS[world][layout]:
            divide(model, DistributedConfig(**sizes))
        wrapped = model if sizes else DistributedDataParallel(model)
        group = data_group(model)
        own = {
            key: part(key, value, dist.get_rank(group), dist.get_world_size(group)) for key, value in inputs.items()
        }
        found[layout] = train(model, own, wrapped)
    if rank == 0:
        torch.save(found, f"{folder}/found.pt")
    dist.barrier()
    dist.destroy_process_group()


def check(world, case, layouts, folder, popen):
    code = "import runpy, sys; run = runpy.run_path(sys.argv[1])['run_rank']\n"
    code += "run(int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[6:], sys.argv[5])"
    words = [sys.executable, "-c", code, __file__]
    tests = Path(tiny.__file__).parent  # what is imported from there
    ranks = [popen([*words, str(rank), str(world), case, str(folder), *layouts], cwd=tests) for rank in range(world)]
    expected = train(*start(case))
    assert [process.wait(timeout=500) for process in ranks] == [0] * world
    found = torch.load(folder / "found.pt")
    wrong = []
    for layout, what in itertools.product(layouts, (0, 1)):
        values, wanted = found[layout][what], expected[what]
        assert values.keys() == wanted.keys(), layout
        largest = max(value.abs().max() for value in wanted.values())
        for name, value in wanted.items():
            error = (values[name] - value).abs().max() / max(value.abs().max(), 1e-2 * largest)
            if not error < 1e-4:  # losses compute in float32
                wrong.append(f"{layout} {('gradient', 'weight')[what]} {name}: {error:.1e}")
    assert not wrong, "\n" + "\n".join(wrong)


def test_two_ranks_divide_weights_or_layers(tmp_path, fork_server):
    check(2, "simclr_full", ["fsdp", "tp"], tmp_path, fork_server.popen)


@pytest.mark.slow
@pytest.mark.parametrize("world", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
def test_all_cases(world, case, tmp_path, fork_server):
    is_sparse = "num_experts" in TINY[CASES[case][0]].backbone
    layouts = [name for name, sizes in LAYOUTS[world].items() if is_sparse or "ep_size" not in sizes]
    check(world, case, layouts, tmp_path, fork_server.popen)
