"""Output and gradients of an encoder that two processes divide, beside those of each process alone.

torchrun --nproc_per_node 2 tensor_parallel_run.py FOLDER     (with one folder of an encoder for each case in it)
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers.distributed import DistributedConfig

from hf_vlm.models.modeling_vlm_vit import VLMViTModel


def run(model, images):
    """Output and gradients, whole."""
    output = model(images).last_hidden_state
    (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
    grads = {name: weight.grad for name, weight in model.named_parameters()}
    return output, {name: grad.full_tensor() if isinstance(grad, DTensor) else grad for name, grad in grads.items()}


def main(folder):
    dist.init_process_group("gloo")
    found = {}
    for case in sorted(path for path in folder.iterdir() if path.is_dir()):
        images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        divided = VLMViTModel.from_pretrained(case, distributed_config=DistributedConfig(tp_size=2, tp_plan="auto"))
        query = divided.layers[0].attention.query.weight
        whole = VLMViTModel.from_pretrained(case)
        (output, grads), (expected, expected_grads) = run(divided, images), run(whole, images)
        found[case.name] = {
            "shard": list((query.to_local() if isinstance(query, DTensor) else query).shape),
            "output": (output - expected).abs().max().item(),
            "gradients": {
                name: ((grads[name] - grad).norm() / grad.norm().clamp(min=0.01)).item()  # biases of keys have none
                for name, grad in expected_grads.items()
            },
        }
    if dist.get_rank() == 0:
        (folder / "found.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
