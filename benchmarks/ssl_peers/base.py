"""What the peers' methods share: our encoder, and a plain loop as in the peers' examples."""

from collections.abc import Callable
from itertools import islice
from typing import Any

from PIL import Image
from torch import Tensor, nn, optim
from torch.utils.data import DataLoader
from transformers import get_cosine_schedule_with_warmup

from hf_vlm import VLMViTModel
from hf_vlm.data.stream import ExampleStream
from hf_vlm.features.device import to_best_device
from hf_vlm.training.arguments import VisionTrainingArguments
from hf_vlm.training.optim import parameter_groups


class Peer(nn.Module):
    """A peer's method on our encoder, trained in a plain loop.

    Args:
        config: Configuration of our method, which gives the encoder and the sizes.
        args: Arguments of the run.
        normalise: The images' `mean` and `std`, one value per channel.

    Attributes:
        row: Name of our method whose settings it shares.
        packages: Names of the packages to `pip install`.
        transform: Function from a Pillow image to its views, each (channels, height, width).
    """

    row: str
    packages: tuple[str, ...] = ("lightly", "torchvision")
    transform: Callable[[Image.Image], list[Tensor]]

    def __init__(self, config: Any, args: VisionTrainingArguments, normalise: dict[str, Any]):
        super().__init__()
        self.config, self.args = config, args
        self.backbone = to_best_device(VLMViTModel(config.backbone_config))
        self.build(config, args.views, normalise)
        self.to(self.backbone.device).train()

    def build(self, config: Any, views: dict[str, Any], normalise: dict[str, Any]) -> None:
        """Builds the peer's modules and `transform`."""

    def forward(self, views: list[Tensor], step: int) -> Tensor:
        """The loss of views (batch, channels, height, width), large ones first."""
        raise NotImplementedError

    def after_step(self, step: int) -> None:
        """Called after each optimiser step."""

    def pooled(self, images: Tensor) -> Tensor:
        """Class tokens (images, hidden_size)."""
        return self.backbone(images, class_token_only=True).pooler_output

    def fit(self, stream: ExampleStream) -> VLMViTModel:
        """Trains on a stream of views and returns the encoder to evaluate."""
        args, num_layers = self.args, self.config.backbone_config.num_hidden_layers
        groups = parameter_groups(
            self, num_layers=num_layers, learning_rate=args.learning_rate, weight_decay=args.weight_decay
        )
        optimizer = optim.AdamW(groups, betas=(args.adam_beta1, args.adam_beta2), fused=True)
        schedule = get_cosine_schedule_with_warmup(optimizer, args.get_warmup_steps(args.max_steps), args.max_steps)
        loader = DataLoader(stream, batch_size=args.train_batch_size)
        for step, batch in enumerate(islice(loader, args.max_steps)):
            loss = self([view.to(self.backbone.device) for view in batch["views"]], step)
            loss.backward()
            nn.utils.clip_grad_norm_(self.parameters(), args.max_grad_norm)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            self.after_step(step)
            if step % args.logging_steps == 0 or step == args.max_steps - 1:
                print(f"step {step}: loss {loss.item():.4f}", flush=True)
        return self.trained_encoder

    @property
    def trained_encoder(self) -> VLMViTModel:
        return self.backbone
