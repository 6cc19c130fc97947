"""The arguments of a run: TrainingArguments and what a vision run needs in addition."""

import math
import os
from dataclasses import dataclass, field
from typing import Any

import torch

from hf_vlm.training import scaling
from hf_vlm.training.layout_arguments import LayoutArguments

__all__ = ["VisionTrainingArguments"]


@dataclass
class VisionTrainingArguments(LayoutArguments):
    """TrainingArguments and what a vision run needs in addition: the model, the data and the optimiser's groups.

    Raises:
        ValueError: if a run is given none of a number of steps, a number of images and a budget, or several.
    """

    output_dir: str = field(default="runs/run", metadata={"help": "Folder of the run."})
    overwrite_output_dir: bool = field(
        default=False,
        metadata={"help": "Start from scratch in the folder of another run, whose checkpoints are deleted."},
    )
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "Checkpoint to resume from: a folder, last (of the run), or auto: the last one if there is any, "
            "else a run from the beginning."
        },
    )
    rewind_to: int | None = field(
        default=None,
        metadata={"help": "Step of a checkpoint of the run to resume from; later ones are set aside."},
    )
    restart_schedule: bool = field(
        default=False,
        metadata={"help": "Resume with the recipe's learning rate, weight decay and schedule, not the checkpoint's."},
    )
    method: str = field(
        default="", metadata={"help": "Name of the method in the registry: simclr, mae, detection, ..."}
    )
    encoder_preset: str | None = field(
        default=None, metadata={"help": "Named size of a new encoder: nano, tiny, small (by default), base, ..."}
    )
    encoder_config: dict[str, Any] = field(default_factory=dict, metadata={"help": "VLMViTConfig fields to override."})
    model_config: dict[str, Any] = field(default_factory=dict, metadata={"help": "Fields of the method's config."})
    processor_config: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "Fields of the image processor, such as {do_pad: true}."}
    )
    encoder: str | None = field(
        default=None,
        metadata={"help": "Run, checkpoint or Hub id of an encoder to start from, of transformers too."},
    )
    resize_encoder: bool = field(
        default=False, metadata={"help": "Load the encoder weights that fit and initialise the others."}
    )
    load_head: bool = field(
        default=True,
        metadata={"help": "Load the head too, but for its class layers, where the encoder is part of such a model."},
    )
    text_encoder: str | None = field(
        default=None,
        metadata={
            "help": "Folder or Hub id of a text model of transformers to start from, for methods with texts; by "
            "default a new one, as model_config.text_config says, with a tokeniser made for the texts."
        },
    )
    text_length: int = field(
        default=64, metadata={"help": "Number of tokens that texts are padded and cut to, for methods with texts."}
    )
    data: Any = field(
        default="", metadata={"help": "Source of images: folder, file, URL, Hub id, scenes, or {source: weight, ...}."}
    )
    format: str | None = field(default=None, metadata={"help": "Format of the source; guessed when not given."})
    labels_from: str | None = field(
        default=None,
        metadata={
            "help": "What finds the pseudo-labels that a head is pretrained on: regions (by default), or a detector's "
            "folder or Hub id; in fine-tuning, the detector that labels unlabelled_data."
        },
    )
    labels_per_image: float | None = field(
        default=None,
        metadata={
            "help": "Mean number of a detector's boxes to keep per image, the best over all images; by default as "
            "many as the labelled images have, or in pretraining those with a score of at least 0.25."
        },
    )
    rounds: int = field(
        default=1,
        metadata={
            "help": "Rounds of self-training: how often a head is pretrained, each time from the beginning, on what "
            "the one before finds."
        },
    )
    unlabelled_data: Any = field(
        default=None, metadata={"help": "Source of more images to fine-tune on, with what labels_from finds in them."}
    )
    num_unlabelled_examples: int | None = field(
        default=None, metadata={"help": "Number of images of unlabelled_data, chosen as those of num_train_examples."}
    )
    unlabelled_fraction: float = field(
        default=0.5, metadata={"help": "Fraction of the examples that are of unlabelled_data."}
    )
    allow_outside: bool = field(
        default=False, metadata={"help": "Follow what the data name outside of their own folder or host."}
    )
    train_split: str = field(default="train", metadata={"help": "Split to train on."})
    eval_split: str = field(default="validation", metadata={"help": "Split to evaluate on."})
    holdout: float | None = field(
        default=None,
        metadata={"help": "In place of eval_split: fraction of the training images that fine-tuning holds out."},
    )
    num_train_examples: int | None = field(
        default=None,
        metadata={"help": "Number of images to train on: the first N, or N evenly spread over class folders."},
    )
    num_eval_examples: int | None = field(
        default=None, metadata={"help": "Number of images to evaluate on, chosen in the same way."}
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "sdpa, flash_attention_2, eager, ..."})
    image_size: Any = field(
        default=224, metadata={"help": "Size of the model's input in pixels: a number or [height, width]."}
    )
    views: dict[str, Any] = field(default_factory=dict, metadata={"help": "Changes to the method's default views."})
    views_on: str = field(
        default="auto",
        metadata={"help": "Where views are made: device, workers, or auto (the device if it is an accelerator)."},
    )
    augmentation: dict[str, Any] = field(default_factory=dict, metadata={"help": "Augmentation in fine-tuning."})
    shuffle_block: int = field(
        default=1024, metadata={"help": "Number of encoded examples that are shuffled together."}
    )
    approximate_resume: bool = field(
        default=False,
        metadata={
            "help": "Resume on another number of ranks or workers from the next epoch on, where there is no exact "
            "position for these."
        },
    )
    max_bad_fraction: float = field(
        default=0.01, metadata={"help": "Fraction of unreadable images above which the run stops."}
    )
    layer_decay: float = field(
        default=1.0,
        metadata={
            "help": "Learning rate of a layer relative to that of the next, of the last encoder layer to the head's."
        },
    )
    encoder_lr_multiplier: float = field(
        default=1.0, metadata={"help": "Factor of the encoder's learning rates, beside layer_decay."}
    )
    patch_projection_lr_multiplier: float = field(
        default=1.0,
        metadata={"help": "Learning rate of the patch projection relative to that of the other embeddings."},
    )
    frozen_encoder_steps: float = field(
        default=0,
        metadata={"help": "Steps, or below 1 a fraction of the steps, before the encoder is trained, with a warm-up."},
    )
    images_to_see: Any = field(
        default=None,
        metadata={
            "help": "In place of max_steps: number of images seen in the run, or auto, by the size of the data."
        },
    )
    budget: str | None = field(
        default=None,
        metadata={"help": "In place of max_steps: the time that the run may take, such as 10m or 2h, by a trial."},
    )
    reference_batch_size: int | None = field(
        default=None,
        metadata={"help": "Batch size for which learning rate and momentum are given; they are scaled to others."},
    )
    batch_scaling: str = field(default="sqrt", metadata={"help": "How the learning rate is scaled: sqrt or linear."})
    lora_rank: int = field(
        default=0,
        metadata={
            "help": "Rank of the updates, such as 8, by which fine-tuning adapts the encoder in place of its weights "
            "(LoRA); they are merged into the saved model. 0 trains all weights."
        },
    )
    weight_decay_end: float | None = field(
        default=None, metadata={"help": "Weight decay at the end, reached along a cosine; constant by default."}
    )
    ema_decay: float | None = field(
        default=None,
        metadata={
            "help": "Decay of a moving average of the weights, which is evaluated and saved in their place; in short "
            "runs it is less, so that the average spans at most about a tenth of the steps."
        },
    )
    early_stopping_patience: int | None = field(
        default=None,
        metadata={
            "help": "Number of evaluations in a row without a better metric_for_best_model after which training stops."
        },
    )
    probe_steps: int | None = field(
        default=None,
        metadata={"help": "Steps between probes of the features; 0 for none; at most ten probes by default."},
    )
    probe_data: str | None = field(
        default=None,
        metadata={"help": "Source of images to probe on, labelled or not; eval_split of the data by default."},
    )
    num_probe_examples: int = field(default=256, metadata={"help": "Number of images to probe on."})
    on_collapse: str = field(
        default="warn",
        metadata={"help": "Reaction to a collapse of the features in pretraining: warn, stop or ignore."},
    )

    # Streams have no columns to remove and carry their own position; every parameter is used in every step.
    remove_unused_columns: bool = field(default=False, metadata={"help": "Keep all columns of a batch."})
    ignore_data_skip: bool = field(default=True, metadata={"help": "The stream resumes by its state, not by replay."})
    ddp_find_unused_parameters: bool | None = field(default=False, metadata={"help": "No parameter is ever unused."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Log a loss that is not finite as it is."})

    def __post_init__(self) -> None:
        self._check_choices()
        self._check_weights_kept()
        self._check_lora()
        num_processes = int(os.environ.get("WORLD_SIZE", "1"))
        if num_processes > 1 and not torch.accelerator.is_available():
            self.use_cpu = True  # else accelerate silently lets each process train on its own
        super().__post_init__()
        if self.world_size != num_processes:
            raise ValueError(
                f"The launcher started {num_processes} processes, but training would use {self.world_size}: check the "
                "launcher's configuration."
            )
        if self.images_to_see is not None and self.images_to_see != "auto":
            self._set_steps(self.images_to_see)
        if self.images_to_see != "auto" and self.budget is None:  # else the number of steps is not known yet
            self._settle_steps()

    def _check_choices(self) -> None:
        """ValueError for a setting of ours that is out of its range, or one of transformers that cannot work."""
        if [self.max_steps > 0, self.images_to_see is not None, self.budget is not None].count(True) != 1:
            raise ValueError(
                "A recipe needs max_steps, a positive number of optimiser steps, or images_to_see or budget, and no "
                "two of them."
            )
        if self.batch_scaling not in scaling.SCALING_RULES:
            raise ValueError(f"batch_scaling must be sqrt or linear, but is {self.batch_scaling!r}.")
        if self.views_on not in ("auto", "device", "workers"):
            raise ValueError(f"views_on must be auto, device or workers, but is {self.views_on!r}.")
        if self.on_collapse not in ("warn", "stop", "ignore"):
            raise ValueError(f"on_collapse must be warn, stop or ignore, but is {self.on_collapse!r}.")
        if (self.probe_steps or 0) < 0 or self.num_probe_examples < 2:
            raise ValueError(
                "probe_steps must be 0 or more and num_probe_examples 2 or more, but are "
                f"{self.probe_steps} and {self.num_probe_examples}."
            )
        if self.rewind_to is not None and self.resume_from_checkpoint not in (None, "last", "auto"):
            raise ValueError("rewind_to names a checkpoint of the run: leave out resume_from_checkpoint.")
        if self.restart_schedule and self.rewind_to is None and self.resume_from_checkpoint is None:
            raise ValueError("restart_schedule needs a run to resume: give resume_from_checkpoint or rewind_to.")
        if self.enable_jit_checkpoint:  # it saves within a step, which loses a batch, and ends as if all were trained
            raise ValueError(
                "enable_jit_checkpoint is not supported: a run saves its state at SIGTERM and SIGINT by itself, and "
                "--resume_from_checkpoint auto continues it."
            )
        if self.label_smoothing_factor:  # the Trainer gathers integer labels, which tasks here need not have
            raise ValueError("label_smoothing_factor is not supported: set model_config.label_smoothing instead.")

    def _check_weights_kept(self) -> None:
        """ValueError for settings of the average and of early stopping that cannot work."""
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"ema_decay must be above 0 and below 1, such as 0.999, but is {self.ema_decay:g}.")
        patience = self.early_stopping_patience
        if patience is not None and patience < 1:
            raise ValueError(f"early_stopping_patience must be 1 or more, but is {patience}.")
        if patience is not None and not self.load_best_model_at_end:  # transformers then checks evaluations and metric
            raise ValueError(
                "early_stopping_patience keeps the best model: set load_best_model_at_end to true, and eval_strategy, "
                "save_strategy and metric_for_best_model."
            )

    def _check_lora(self) -> None:
        """ValueError for a rank that is none, or beside settings with which nothing is left to adapt."""
        if self.lora_rank < 0:
            raise ValueError(f"lora_rank must be 0, for none, or more, such as 8, but is {self.lora_rank}.")
        if self.lora_rank and not self.encoder:
            raise ValueError("lora_rank adapts a pretrained encoder: name one with --encoder, or leave lora_rank out.")
        if self.lora_rank and self.model_config.get("freeze_encoder"):
            raise ValueError("lora_rank adapts the encoder, which model_config.freeze_encoder freezes: choose one.")
        if self.lora_rank and self.resize_encoder:
            raise ValueError("lora_rank freezes the weights that resize_encoder initialises: train without it first.")

    def set_steps_for(self, num_images: int | None) -> None:
        """Sets the number of steps by the size of the data, for `images_to_see: auto`.

        Raises:
            ValueError: if the size is not known.
        """
        if self.images_to_see != "auto":
            return
        if num_images is None:
            raise ValueError(
                f"images_to_see: auto needs the number of images, which {self.data} gives only when read. "
                "Give images_to_see as a number, or max_steps."
            )
        self._set_steps(scaling.images_to_see(num_images))
        self._settle_steps()

    def _set_steps(self, num_seen: Any) -> None:
        if isinstance(num_seen, bool) or not isinstance(num_seen, int | float) or num_seen < 1:
            raise ValueError(f"images_to_see must be auto or a positive number, but is {num_seen!r}.")
        self.max_steps = math.ceil(num_seen / self.total_batch_size)

    def _settle_steps(self) -> None:
        """Turns fractions of the run into numbers of steps, and checks `frozen_encoder_steps`."""
        for name in ("logging_steps", "eval_steps", "save_steps"):
            if (steps := getattr(self, name)) is not None and 0 < steps < 1:
                setattr(self, name, math.ceil(self.max_steps * steps))
        if not 0 <= self.frozen_encoder_steps < self.max_steps:
            raise ValueError(
                "frozen_encoder_steps must be a fraction of the steps below 1, or fewer than the run's "
                f"{self.max_steps} steps, but is {self.frozen_encoder_steps:g}."
            )

    @property
    def resumes(self) -> bool:
        """Whether the run continues one that was stopped, where there is a checkpoint of it."""
        return self.resume_from_checkpoint is not None or self.rewind_to is not None

    @property
    def total_batch_size(self) -> int:
        """Images per optimiser step, over all ranks."""
        return self.train_batch_size * self.gradient_accumulation_steps * self.num_data_ranks

    @property
    def scaled_learning_rate(self) -> float:
        """The learning rate for the batch size of this run."""
        if self.reference_batch_size is None:
            return self.learning_rate
        return scaling.scaled_learning_rate(
            self.learning_rate, self.total_batch_size, self.reference_batch_size, self.batch_scaling
        )

    @property
    def image_hw(self) -> tuple[int, int]:
        """Height and width of the images that enter the model."""
        size = self.image_size
        height, width = (size, size) if isinstance(size, int) else size
        return int(height), int(width)

    @property
    def num_frozen_encoder_steps(self) -> int:
        """Optimiser steps in which the encoder is not trained; a fraction of the run is rounded up, as for warm-up."""
        steps = self.frozen_encoder_steps
        return int(steps) if steps >= 1 else math.ceil(self.max_steps * steps)

    @property
    def makes_views_on_device(self) -> bool:
        """Whether views are made in batches on the device rather than one at a time in the data workers."""
        return self.views_on == "device" or (self.views_on == "auto" and self.device.type != "cpu")
