"""Two gloo processes, each with half of the experts, compute what one process does."""

import sys
from datetime import timedelta
from pathlib import Path

import pytest
import tiny
import torch
import torch.distributed as dist
from tiny import SPARSE, build
from torch.distributed.tensor import DTensor
from transformers.distributed import DistributedConfig

from hf_vlm.models.modeling_vlm_vit import VLMViTModel


def check_rank(rank, folder):
    """Compares outputs, gradients and saved weights on this rank with those of a model that is whole."""
    options = {"init_method": f"file://{folder}/store", "timeout": timedelta(seconds=120)}
    dist.init_process_group("gloo", rank=rank, world_size=2, **options)
    try:
        parallel = DistributedConfig(fsdp_size=2, ep_size=2)
        model = VLMViTModel.from_pretrained(f"{folder}/whole", distributed_config=parallel).train()
        whole = VLMViTModel.from_pretrained(f"{folder}/whole").train()
        torch.manual_seed(5)
        images = torch.randn(4, 3, 32, 32)
        found = model(images[2 * rank : 2 * rank + 2]).last_hidden_state
        expected = whole(images).last_hidden_state
        torch.testing.assert_close(found, expected[2 * rank : 2 * rank + 2])
        found.square().sum().backward()
        expected.square().sum().backward()
        experts = 0
        for (name, parameter), other in zip(model.named_parameters(), whole.parameters()):
            assert isinstance(parameter, DTensor)
            experts += parameter.to_local().shape[0] == 2 < parameter.shape[0] == 4 and ".experts." in name
            gradient = 2 * parameter.grad.full_tensor()  # the mean over ranks of sums over their images
            torch.testing.assert_close(gradient, other.grad, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
        assert experts == 4  # tensors of which each rank has two experts
        model.save_pretrained(f"{folder}/saved")
        dist.barrier()
        saved = VLMViTModel.from_pretrained(f"{folder}/saved").state_dict()
        assert all(torch.equal(value, saved[name]) for name, value in whole.state_dict().items())
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("gate", [{}, {"use_gated_mlp": True, "hidden_act": "silu"}])
def test_two_ranks_with_half_of_the_experts_each_equal_one(gate, tmp_path, fork_server):
    build("encoder", backbone=SPARSE | gate).save_pretrained(tmp_path / "whole")
    code = "import runpy, sys; runpy.run_path(sys.argv[1])['check_rank'](int(sys.argv[2]), sys.argv[3])"
    ranks = [
        fork_server.popen(
            [sys.executable, "-c", code, __file__, str(rank), str(tmp_path)], cwd=Path(tiny.__file__).parent
        )
        for rank in (0, 1)
    ]
    assert [process.wait(timeout=240) for process in ranks] == [0, 0]
