"""The peers' own code for methods that we have too, as more rows of `ssl_quality.py`.

    pip install lightly stable-pretraining

What differs from our row of the same method is the method's own code: losses, heads, masks, views. Encoder, batches,
steps, optimiser, schedule and sizes of heads are those of our row. lightly's and stable-pretraining's parts are in the
plain loop of lightly's examples, around our encoder; transformers' MAE is trained as its `run_mae.py` does, and its
encoder converted.

- `lightly_simclr`: NTXentLoss, SimCLRProjectionHead, SimCLRTransform.
- `lightly_dinov2`: DINOLoss, IBOTPatchLoss, KoLeoLoss, DINOv2ProjectionHead, DINOTransform, block masks. As in its
  example the teacher's head does not start as the student's.
- `lightly_lejepa`: LeJEPALoss, LeJEPAProjectionHead, DINOTransform.
- `stable_pretraining_lejepa`: its LeJEPA model, whose SIGReg takes all views for one sample, and its transforms.
- `transformers_mae`: ViTMAEForPreTraining by the stock Trainer, views by torchvision.

lightly has no MoCo v3, and its masked methods stand on transformers of its own. solo-learn has no row: its package on
PyPI (1.0.2, for torch 1.9) imports lightning-bolts, which does not import beside lightning 2.
"""

import copy
import importlib.util
import time
from collections.abc import Callable
from itertools import islice
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, ViTMAEConfig, ViTMAEForPreTraining, get_cosine_schedule_with_warmup, set_seed

from hf_vlm import VLMViTModel
from hf_vlm.data.decode import decode_image
from hf_vlm.data.sources import unlabelled
from hf_vlm.data.stream import ExampleStream
from hf_vlm.models.convert_vlm_vit import from_transformers
from hf_vlm.models.vit_layers import patch_grid
from hf_vlm.registry import find_model
from hf_vlm.training.arguments import VisionTrainingArguments, parse_arguments
from hf_vlm.training.build import build_config, build_processor
from hf_vlm.training.device import place
from hf_vlm.training.optim import parameter_groups
from hf_vlm.training.run import open_source, train_stream


class Peer(nn.Module):
    """A peer's method around our encoder, trained in a plain loop.

    Args:
        config: Our configuration of the method, which gives the encoder and the sizes.
        args: Our arguments of the run.
        normalise: `mean` and `std` of images.

    Attributes:
        row: The method of ours whose settings it shares.
        packages: What it imports, as `pip install` has to bring it.
        transform: An image of Pillow to its views, each (channels, height, width).
    """

    row: str
    packages: tuple[str, ...] = ("lightly", "torchvision")
    transform: Callable[[Image.Image], list[Tensor]]

    def __init__(self, config: Any, args: VisionTrainingArguments, normalise: dict[str, Any]):
        super().__init__()
        self.config, self.args = config, args
        self.backbone = place(VLMViTModel(config.backbone_config))
        self.build(config, args.views, normalise)
        self.to(self.backbone.device).train()

    def build(self, config: Any, views: dict[str, Any], normalise: dict[str, Any]) -> None:
        """Makes the peer's parts and `transform`."""

    def forward(self, views: list[Tensor], step: int) -> Tensor:
        """The loss of views (batch, channels, height, width), large ones first."""
        raise NotImplementedError

    def after_step(self, step: int) -> None:
        """What follows an optimiser's step."""

    def pooled(self, images: Tensor) -> Tensor:
        """Class tokens (images, hidden_size)."""
        return self.backbone(images, class_token_only=True).pooler_output

    def fit(self, stream: ExampleStream) -> VLMViTModel:
        """Trains on a stream of views and returns the encoder to judge."""
        args, num_layers = self.args, self.config.backbone_config.num_hidden_layers
        groups = parameter_groups(
            self, num_layers=num_layers, learning_rate=args.learning_rate, weight_decay=args.weight_decay
        )
        optimizer = torch.optim.AdamW(groups, betas=(args.adam_beta1, args.adam_beta2), fused=True)
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


def lightly_colors(views: dict[str, Any], strength: float) -> dict[str, float]:
    """Our colours as arguments of lightly's transforms, which multiply them by a strength."""
    names = ("cj_bright", "cj_contrast", "cj_sat", "cj_hue")
    colors = {name: value / strength for name, value in zip(names, views["jitter"])}
    colors |= {"cj_strength": strength, "cj_prob": views["jitter_probability"]}
    return colors | {"random_gray_scale": views["grey"], "hf_prob": views["flip"]}


def lightly_crops(views: dict[str, Any], image_size: int, **options: Any) -> Any:
    """lightly's two large views and many small ones."""
    from lightly.transforms import DINOTransform

    local = views["local"]
    return DINOTransform(
        global_crop_size=image_size,
        global_crop_scale=tuple(views["crop_scale"]),
        local_crop_size=local["size"],
        local_crop_scale=tuple(local["crop_scale"]),
        n_local_views=local["num_views"],
        gaussian_blur=(views["blur"],) * 3,
        **lightly_colors(views, strength=0.5),  # the second large view takes no other
        **options,
    )


class LightlySimCLR(Peer):
    row = "simclr"

    def build(self, config: Any, views: dict[str, Any], normalise: dict[str, Any]) -> None:
        from lightly.loss import NTXentLoss
        from lightly.models.modules import SimCLRProjectionHead
        from lightly.transforms import SimCLRTransform

        sizes = config.projection_hidden_size, config.projection_size, config.num_projection_layers
        self.head = SimCLRProjectionHead(config.backbone_config.hidden_size, *sizes)
        self.loss = NTXentLoss(temperature=config.temperature)
        self.transform = SimCLRTransform(
            input_size=self.args.image_size,
            min_scale=views["crop_scale"][0],
            gaussian_blur=views["blur"],
            normalize=normalise,
            **lightly_colors(views, strength=1.0),
        )

    def forward(self, views: list[Tensor], step: int) -> Tensor:
        first, second = (self.head(self.pooled(view)) for view in views)
        return self.loss(first, second)


class LightlyLeJEPA(Peer):
    row = "lejepa"

    def build(self, config: Any, views: dict[str, Any], normalise: dict[str, Any]) -> None:
        from lightly.loss import LeJEPALoss
        from lightly.models.modules import LeJEPAProjectionHead

        self.head = LeJEPAProjectionHead(
            config.backbone_config.hidden_size, config.projection_hidden_size, config.projection_size
        )
        self.loss = LeJEPALoss(config.sigreg_weight, sigreg_num_vectors=config.num_slices)
        self.transform = lightly_crops(views, self.args.image_size, solarization_prob=0.0, normalize=normalise)

    def forward(self, views: list[Tensor], step: int) -> Tensor:
        large, small = (self.head(self.pooled(torch.cat(group))) for group in (views[:2], views[2:]))
        large, small = (projected.unflatten(0, (-1, len(views[0]))) for projected in (large, small))
        return self.loss(global_proj=large, local_proj=small)


class LightlyDINOv2(Peer):
    row = "dinov2"

    def build(self, config: Any, views: dict[str, Any], normalise: dict[str, Any]) -> None:
        from lightly.loss import DINOLoss, IBOTPatchLoss, KoLeoLoss
        from lightly.models.modules import DINOv2ProjectionHead

        size = config.backbone_config.hidden_size
        sizes = size, config.head_hidden_size, config.bottleneck_size, config.num_prototypes
        self.head, teacher_head = DINOv2ProjectionHead(*sizes), DINOv2ProjectionHead(*sizes)
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, size))
        self.teacher = nn.ModuleDict({"backbone": copy.deepcopy(self.backbone), "head": teacher_head})
        self.teacher.requires_grad_(False)
        self.of_views = DINOLoss(config.num_prototypes, student_temp=config.student_temperature)
        self.of_patches = IBOTPatchLoss(config.num_prototypes, student_temp=config.student_temperature)
        self.koleo = KoLeoLoss()
        self.transform = lightly_crops(
            views, self.args.image_size, solarization_prob=views["views"][1]["solarize"], normalize=normalise
        )

    def forward(self, views: list[Tensor], step: int) -> Tensor:
        from lightly.models.utils import random_block_mask
        from lightly.utils.scheduler import linear_warmup_schedule

        config, large = self.config, torch.cat(views[:2])
        mask = random_block_mask(
            (len(large), *patch_grid(large, config.backbone_config.patch_hw)),
            min_num_masks_per_block=1,  # its default of 4 is more than a tenth of a small image
            device=large.device,
        )
        masked = mask.flatten(1)  # (2 * batch, patches)
        with torch.no_grad():
            tokens = self.teacher["backbone"](large).last_hidden_state
            targets = self.teacher["head"](tokens[:, 0])
            patch_targets = self.teacher["head"](tokens[:, 1:][masked])
        tokens = self.backbone(large, masked=masked, mask_token=self.mask_token).last_hidden_state
        logits = torch.cat([self.head(tokens[:, 0]), self.head(self.pooled(torch.cat(views[2:])))])
        num_warmup = int(config.teacher_temperature_warmup * self.args.max_steps)
        bounds = config.warmup_teacher_temperature, config.teacher_temperature
        temperature = linear_warmup_schedule(step, num_warmup, *bounds)
        dino = self.of_views(targets.chunk(2), logits.chunk(len(views)), teacher_temp=temperature)
        ibot = self.of_patches(patch_targets, self.head(tokens[:, 1:][masked]), mask, teacher_temp=temperature)
        koleo = sum(self.koleo(view) for view in tokens[:, 0].chunk(2))
        return dino + config.ibot_weight * ibot + config.koleo_weight * koleo

    def after_step(self, step: int) -> None:
        from lightly.models.utils import update_momentum
        from lightly.utils.scheduler import cosine_schedule

        momentum = cosine_schedule(step, self.args.max_steps, self.config.momentum, 1.0)
        update_momentum(self.backbone, self.teacher["backbone"], m=momentum)
        update_momentum(self.head, self.teacher["head"], m=momentum)

    @property
    def trained_encoder(self) -> VLMViTModel:
        return self.teacher["backbone"]


class StablePretrainingLeJEPA(Peer):
    row = "lejepa"
    packages = ("stable-pretraining",)

    def build(self, config: Any, views: dict[str, Any], normalise: dict[str, Any]) -> None:
        from stable_pretraining.backbone import MLP
        from stable_pretraining.methods.lejepa import LeJEPA

        hidden = config.projection_hidden_size
        projector = MLP(config.backbone_config.hidden_size, [hidden, hidden, config.projection_size], "batch_norm")
        self.model = LeJEPA(
            "vit_tiny_patch16_224", projector=projector, n_slices=config.num_slices, lamb=config.sigreg_weight
        )
        del self.model.backbone  # it takes no other than timm's, by name
        self.model.backbone = self.pooled
        self.transform = self.make_transform(views, normalise)

    def make_transform(self, views: dict[str, Any], normalise: dict[str, Any]) -> Any:
        """Its transforms take and give samples, dictionaries of an image."""
        from stable_pretraining.data import transforms

        def crop(size: int, scale: list[float]) -> Any:
            return transforms.Compose(
                transforms.RandomResizedCrop((size, size), scale=tuple(scale)),
                transforms.RandomHorizontalFlip(views["flip"]),
                transforms.ColorJitter(*views["jitter"], p=views["jitter_probability"]),
                transforms.RandomGrayscale(views["grey"]),
                transforms.ToImage(**normalise),
            )

        local = views["local"]
        large, small = crop(self.args.image_size, views["crop_scale"]), crop(local["size"], local["crop_scale"])
        all_views = transforms.MultiViewTransform([large] * 2 + [small] * local["num_views"])
        return lambda image: [view["image"] for view in all_views({"image": image})["views"]]

    def forward(self, views: list[Tensor], step: int) -> Tensor:
        return self.model(global_views=views[:2], local_views=views[2:]).loss


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


PEERS: dict[str, type[Peer] | type[TransformersMAE]] = {
    "lightly_simclr": LightlySimCLR,
    "lightly_dinov2": LightlyDINOv2,
    "lightly_lejepa": LightlyLeJEPA,
    "stable_pretraining_lejepa": StablePretrainingLeJEPA,
    "transformers_mae": TransformersMAE,
}


def missing_packages(name: str) -> str:
    """What has to be installed for a peer, with spaces between; empty where all is there."""
    return " ".join(p for p in PEERS[name].packages if importlib.util.find_spec(p.replace("-", "_")) is None)


def pretrain(name: str, recipe: dict[str, Any]) -> float:
    """Trains a peer by the recipe of our row, leaves encoder and image processor in `output_dir`, returns seconds."""
    args = parse_arguments(recipe)
    set_seed(args.seed)
    processor = build_processor(args, 3)
    config = build_config(args, find_model(args.method, "pretraining"))
    peer = PEERS[name](config, args, {"mean": processor.image_mean, "std": processor.image_std})

    def transform(example: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        return {"views": peer.transform(Image.fromarray(decode_image(example["image"])[0]))}

    stream = train_stream(args, unlabelled(open_source(args, args.train_split, None)), transform)
    started = time.perf_counter()
    encoder = peer.fit(stream)
    seconds = time.perf_counter() - started
    encoder.save_pretrained(args.output_dir)
    processor.save_pretrained(args.output_dir)
    return seconds
