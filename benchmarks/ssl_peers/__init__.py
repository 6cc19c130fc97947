"""The peers' own implementations of methods that we have too, as more rows of `ssl_quality.py`.

    pip install lightly stable-pretraining

What differs from our row of the same method is the method's own code: losses, heads, masks, views. Encoder, batches,
steps, optimiser, schedule and sizes of heads are those of our row. lightly's and stable-pretraining's parts run in the
plain loop of lightly's examples, on our encoder; transformers' MAE is trained as its `run_mae.py` does, and its
encoder is converted.

- `lightly_simclr`: NTXentLoss, SimCLRProjectionHead, SimCLRTransform.
- `lightly_dinov2`: DINOLoss, IBOTPatchLoss, KoLeoLoss, DINOv2ProjectionHead, DINOTransform, block masks. As in its
  example the teacher's head is not initialised with the student's weights.
- `lightly_lejepa`: LeJEPALoss, LeJEPAProjectionHead, DINOTransform.
- `stable_pretraining_lejepa`: its LeJEPA model, whose SIGReg treats all views as one sample, and its transforms.
- `stable_pretraining_moco_v3`: MoCov3, and its transforms.
- `stable_pretraining_simmim`: SimMIM, which masks single patches, and its transforms.
- `stable_pretraining_ijepa`: IJEPA, whose mask blocks are the same for the whole batch, and its transforms.
- `transformers_mae`: ViTMAEForPreTraining by the stock Trainer, views by torchvision.

lightly has no MoCo v3, and its masked methods need their own transformers. solo-learn has no row: its package on
PyPI (1.0.2, for torch 1.9) imports lightning-bolts, which does not import beside lightning 2.
"""

import importlib.util
import time
from typing import Any

import numpy as np
from PIL import Image
from transformers import set_seed

from hf_vlm.data.io.decode import decode_image
from hf_vlm.registry import find_model
from hf_vlm.training.build import build_config, build_processor
from hf_vlm.training.data import open_recipe_source, train_stream
from hf_vlm.training.recipe import parse_arguments

from .base import Peer
from .of_lightly import LightlyDINOv2, LightlyLeJEPA, LightlySimCLR
from .of_stable_pretraining import (
    StablePretrainingIJEPA,
    StablePretrainingLeJEPA,
    StablePretrainingMoCoV3,
    StablePretrainingSimMIM,
)
from .of_transformers import TransformersMAE

PEERS: dict[str, type[Peer] | type[TransformersMAE]] = {
    "lightly_simclr": LightlySimCLR,
    "lightly_dinov2": LightlyDINOv2,
    "lightly_lejepa": LightlyLeJEPA,
    "stable_pretraining_lejepa": StablePretrainingLeJEPA,
    "stable_pretraining_moco_v3": StablePretrainingMoCoV3,
    "stable_pretraining_simmim": StablePretrainingSimMIM,
    "stable_pretraining_ijepa": StablePretrainingIJEPA,
    "transformers_mae": TransformersMAE,
}


def missing_packages(name: str) -> str:
    """Packages to install for a peer, separated by spaces; empty where all are installed."""
    return " ".join(p for p in PEERS[name].packages if importlib.util.find_spec(p.replace("-", "_")) is None)


def pretrain(name: str, recipe: dict[str, Any]) -> float:
    """Trains a peer by the recipe of our row, saves encoder and image processor in `output_dir`, returns seconds."""
    args = parse_arguments(recipe)
    set_seed(args.seed)
    entry = find_model(args.method, ["pretraining"])
    processor = build_processor(args, entry.processor_class, 3)
    args.views = {**entry.model_class.default_views, **args.views}
    normalise = {"mean": processor.image_mean, "std": processor.image_std}
    peer = PEERS[name](build_config(args, entry), args, normalise)

    def transform(example: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        return {"views": peer.transform(Image.fromarray(decode_image(example["image"])[0]))}

    stream = train_stream(args, open_recipe_source(args, args.train_split, None).unlabelled(), transform)
    started = time.perf_counter()
    encoder = peer.fit(stream)
    seconds = time.perf_counter() - started
    encoder.save_pretrained(args.output_dir)
    processor.save_pretrained(args.output_dir)
    return seconds
