"""transformers' MAE, trained by its own encoder, views and loop as `run_mae.py` does."""

from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, ViTMAEConfig, ViTMAEForPreTraining

from hf_vlm import VLMViTModel
from hf_vlm.data.stream import ExampleStream
from hf_vlm.models.convert_vlm_vit import from_transformers
from hf_vlm.training.arguments import VisionTrainingArguments


class TransformersMAE:
    """Its own encoder and the stock trainer."""

    row = "mae"
    packages = ("torchvision",)

    def __init__(self, config: Any, args: VisionTrainingArguments, normalise: dict[str, Any]):
        from torchvision import transforms as T

        names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        self.args = args
        self.model = ViTMAEForPreTraining(
            ViTMAEConfig(
                image_size=args.image_size,
                patch_size=config.backbone_config.patch_size,
                mask_ratio=config.mask_ratio,
                norm_pix_loss=config.norm_pix_loss,
                **{name: getattr(config.backbone_config, name) for name in names},
                **{f"decoder_{name}": getattr(config.decoder_config, name) for name in names},
            )
        )
        crop = T.RandomResizedCrop(args.image_size, scale=(0.2, 1.0), interpolation=T.InterpolationMode.BICUBIC)
        view = T.Compose([crop, T.RandomHorizontalFlip(), T.ToTensor(), T.Normalize(**normalise)])
        self.transform = lambda image: [view(image)]

    def fit(self, stream: ExampleStream) -> VLMViTModel:
        def collate(examples: list[dict[str, Any]]) -> dict[str, Tensor]:
            return {"pixel_values": torch.stack([example["views"][0] for example in examples])}

        Trainer(self.model, self.args, collate, train_dataset=stream).train()
        return from_transformers(self.model.vit).model
