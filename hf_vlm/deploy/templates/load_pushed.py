"""Outputs of a pushed model on one image, in a process that has no hf_vlm, as users of the model have none.

python load_pushed.py AUTO_CLASS REPOSITORY REVISION IMAGE.npy OUTPUTS.npz
"""

import sys
from typing import Any

import numpy as np


def compute_outputs(auto_class: str, source: str, image: np.ndarray[Any, Any], **options: Any) -> dict[str, Any]:
    """The tensors that a model returns, as arrays of float32.

    Args:
        auto_class: Name of the Auto class of transformers that loads it.
        source: Folder, or name on the Hub.
        image: (height, width, channels) uint8.
        options: Arguments of `from_pretrained`.
    """
    import torch
    import transformers

    processor = transformers.AutoImageProcessor.from_pretrained(source, **options)
    model = getattr(transformers, auto_class).from_pretrained(source, **options).eval()
    inputs = processor(images=[image], return_tensors="pt", input_data_format="channels_last")
    with torch.inference_mode():
        outputs = model(**inputs)
    return {name: value.float().numpy() for name, value in outputs.items() if isinstance(value, torch.Tensor)}


if __name__ == "__main__":
    sys.modules["hf_vlm"] = None  # type: ignore[assignment]  # whoever imports it fails
    name, repository, revision, path, output = sys.argv[1:]
    np.savez(output, **compute_outputs(name, repository, np.load(path), revision=revision, trust_remote_code=True))
