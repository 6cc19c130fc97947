"""Two gloo processes under DDP have the gradients of one process with the joined batch, for every objective."""

import sys
from datetime import timedelta
from pathlib import Path

import tiny
import torch
import torch.distributed as dist
from tiny import PRETRAINING, batch, build
from torch.nn.parallel import DistributedDataParallel

from hf_vlm.models.modeling_lejepa import sample_slices
from hf_vlm.models.ranks import gather_with_gradient
from hf_vlm.models.ssl_layers import SyncedBatchNorm1d

BATCH = 6
NAMES = [
    *PRETRAINING,
    *("detection", "instance_segmentation", "semantic_segmentation", "mask_query_segmentation"),
]


def objective(name):
    """(model, batch of six) of a method, the same in every process."""
    model = build(name)
    torch.manual_seed(1)
    inputs = batch(name, BATCH)
    inputs.pop("slices", None)  # those of the first rank serve all of them
    if name != "moco_v3":
        return model, inputs
    # In double: five batch norms of a fresh encoder's outputs, which hardly differ, are noisy in float32.
    return model.double(), {key: value.double() for key, value in inputs.items()}


def half(name, value, rank):
    """A rank's half of the batch; masks are of all first views, then of all second views."""
    rows = slice(rank * BATCH // 2, (rank + 1) * BATCH // 2)
    return value.unflatten(0, (-1, BATCH))[:, rows].flatten(0, 1) if name == "masked" else value[rows]


def run(model, inputs):
    torch.manual_seed(3)  # what the first rank samples for all is what one process samples
    return model(**inputs)


def gradients_of_rank(rank, store):
    """Gradients after DDP's averaging, and running statistics, of each objective on this rank's half of the batch.

    And LeJEPA's slices of two steps, those of both ranks (12, 4) each.
    """
    objectives = {name: objective(name) for name in NAMES}  # before there are ranks: only the first saves an encoder
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timedelta(seconds=120)
    )
    try:
        found = {}
        for name, (model, inputs) in objectives.items():
            wrapped = DistributedDataParallel(model)  # held until the backward pass, whose gradients it averages
            run(wrapped, {key: half(key, value, rank) for key, value in inputs.items()}).loss.backward()
            found[name] = state_of(model)
        torch.manual_seed(rank)  # ranks sample different masks
        found["slices"] = [gather_with_gradient(sample_slices(6, 4, torch.device("cpu"))) for _ in range(2)]
        dist.barrier()
        return found
    finally:
        dist.destroy_process_group()


def state_of(model):
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return gradients | {
        name: buffer
        for name, buffer in model.named_buffers()
        if any(part in name for part in ("running", "center", "targets", "queue"))
    }


def test_two_ranks_have_the_gradients_of_one_process(tmp_path, fork_server):
    store = str(tmp_path / "store")
    code = "import runpy, sys; runpy.run_path(sys.argv[1])['gradients_of_rank'](1, sys.argv[2])"
    tests = Path(tiny.__file__).parent  # what is imported from there
    other = fork_server.popen([sys.executable, "-c", code, __file__, store], cwd=tests)
    found = gradients_of_rank(0, store)
    assert other.wait(timeout=120) == 0
    for slices in found["slices"]:
        assert torch.equal(*slices.chunk(2))
    assert not torch.equal(*found["slices"])
    for method in NAMES:
        model, inputs = objective(method)
        run(model, inputs).loss.backward()
        for name, expected in state_of(model).items():
            torch.testing.assert_close(
                found[method][name], expected, rtol=1e-3, atol=1e-4, msg=lambda m, n=name, o=method: f"{o} {n}: {m}"
            )


def test_batch_norm_equals_torchs_in_one_process():
    torch.manual_seed(0)
    ours, theirs = SyncedBatchNorm1d(4), torch.nn.BatchNorm1d(4)
    inputs = torch.randn(8, 4)
    assert torch.equal(ours(inputs), theirs(inputs))
    assert torch.equal(ours.running_var, theirs.running_var)
