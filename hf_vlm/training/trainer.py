"""The one trainer: the stock Trainer with a resumable stream, parameter groups and task evaluation."""

from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from torch import Tensor, nn
from transformers import PrinterCallback, ProgressCallback, set_seed
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import HubStrategy
from transformers.utils import PushInProgress

from hf_vlm.data.io.durable import MANIFEST_FILE, PARTIAL_FOLDER
from hf_vlm.data.loader import StreamLoader
from hf_vlm.data.stream import ExampleStream
from hf_vlm.features.device import use_fast_cpu_matmul
from hf_vlm.tasks.task import Evaluation
from hf_vlm.training.arguments import VisionTrainingArguments
from hf_vlm.training.average import LAST_WEIGHTS_FILE
from hf_vlm.training.callbacks import AfterStep, EarlyStopping, LogFile, RunFolder, WeightDecaySchedule
from hf_vlm.training.checkpoints import check_run_folder, last_checkpoint, verify_checkpoint
from hf_vlm.training.console import ConsoleLog
from hf_vlm.training.data_state import has_same_ranks, load_data_state, save_data_state
from hf_vlm.training.finite import check_before_saving, check_metrics
from hf_vlm.training.grouped import GroupedTrainer
from hf_vlm.training.layout import check_layout
from hf_vlm.training.lock import LOCK_FILE
from hf_vlm.training.lora import LORA_FILE
from hf_vlm.training.meters import ThroughputMeter
from hf_vlm.training.signals import outlive_signals

SEEDS_PER_STEP = 100_003  # more than there are ranks
TRAINING_STATE = [
    "*checkpoint-*",  # abandoned ones too
    "round-*",
    "pseudo_labels.*",  # the picture shows training images
    f"{PARTIAL_FOLDER}/*",
    "*.tmp",
    LOCK_FILE,
    MANIFEST_FILE,
    "data_state*",
    LAST_WEIGHTS_FILE,
    LORA_FILE,
    "optimizer*",
    "rng_state*",
    "scaler*",
    "scheduler*",
    "trainer_state.json",
    TRAINING_ARGS_NAME,
]

Evaluator = Callable[[nn.Module, Any], Evaluation]


class VisionTrainer(GroupedTrainer):
    """Trains on an [`ExampleStream`] and resumes it exactly; evaluates by the function of a task.

    Args:
        train_dataset: An `ExampleStream` (other datasets are handled by the stock Trainer).
        evaluator: Function of the model and `eval_dataset`, whose metrics `evaluate()` logs as `eval_<name>`.
        on_save: Function called with each folder with a saved model, to add recipe, record and card.
        render: Function from a batch on the device to the inputs of the model (see `DeviceViews`).
        args, kwargs: Other arguments of `transformers.Trainer`.
    """

    args: VisionTrainingArguments

    def __init__(
        self,
        *args: Any,
        evaluator: Evaluator | None = None,
        on_save: Callable[[Path], None] | None = None,
        render: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        check_layout(self.model, self.accelerator)
        self.evaluator = evaluator
        self.on_save = on_save
        self.render = render
        if self.args.device.type == "cpu" and self.args.attn_implementation is None:
            use_fast_cpu_matmul(self.model)
        for stock in (ProgressCallback, PrinterCallback):
            self.remove_callback(stock)
        self.add_callback(ConsoleLog())
        self.add_callback(AfterStep())
        if self.args.weight_decay_end is not None:
            self.add_callback(WeightDecaySchedule(self.args.weight_decay, self.args.weight_decay_end))
        if self.args.early_stopping_patience is not None:
            self.add_callback(EarlyStopping(self.args.early_stopping_patience))
        self._run_folder = RunFolder()
        self.add_callback(self._run_folder)
        self.add_callback(LogFile())
        self._part_sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=self.args.device))
        self._num_parts = 0
        self._throughput = ThroughputMeter(self.args)

    # ---- data

    def get_train_dataloader(self) -> Any:
        """A loader whose state is the stream's; not prepared by accelerate, which would prefetch one batch."""
        if not isinstance(self.train_dataset, ExampleStream):
            return super().get_train_dataloader()
        num_workers = self.args.dataloader_num_workers
        self._stream_loader = StreamLoader(
            self.train_dataset,
            batch_size=self._train_batch_size,
            collate_fn=self.data_collator,
            num_workers=num_workers,
            pin_memory=self.args.dataloader_pin_memory and self.args.device.type == "cuda",
            prefetch_factor=self.args.dataloader_prefetch_factor if num_workers else None,
            drop_last=True,
            worker_init_fn=outlive_signals,
            generator=torch.Generator().manual_seed(self.args.seed),  # else it would use the model's random state
        )
        if self._data_state is not None:
            self._stream_loader.load_state_dict(self._data_state)
            self._data_state = None
        return self._stream_loader

    _data_state: dict[str, Any] | None = None
    _stream_loader: StreamLoader | None = None

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The batch on the device, rendered there where views are made on the device."""
        inputs = super()._prepare_inputs(inputs)
        return inputs if self.render is None else self.render(inputs)

    def _prepare_input(self, data: Any) -> Any:
        """The stock method without its wait for the device's pending work before pinned memory is copied."""
        if isinstance(data, Tensor) and not self.is_deepspeed_enabled:
            return data.to(self.args.device, non_blocking=True)
        return super()._prepare_input(data)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """The stock method, timed as waiting for data."""
        with self._throughput.waiting():
            return super().get_batch_samples(*args, **kwargs)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Trains; `resume_from_checkpoint` is a checkpoint folder, or True for the last one of the run.

        Raises:
            ValueError: if the checkpoint is damaged (`verify_checkpoint`) or does not hold this rank's position in the
                data (`load_data_state`), the run's folder holds another run, or the disk cannot be written to.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(self.args.output_dir)
        self._run_folder.continues = _is_in(resume_from_checkpoint, self.args.output_dir)
        if not self._run_folder.continues:
            check_run_folder(self.args)
        if resume_from_checkpoint:
            self._verify(Path(resume_from_checkpoint))
            if isinstance(self.train_dataset, ExampleStream):
                self._data_state = load_data_state(Path(resume_from_checkpoint), self.train_dataset, self.args)
        if self.args.world_size > 1:  # ranks with other images should sample other masks
            set_seed(self.args.seed + self.args.data_rank)
        try:
            return super().train(resume_from_checkpoint=resume_from_checkpoint or None, **kwargs)
        finally:
            if self._stream_loader is not None:
                self._stream_loader.stop_workers()

    def _verify(self, checkpoint: Path) -> None:
        """ValueError for a damaged checkpoint; one process reads it all, while the others wait."""
        verify_checkpoint(checkpoint, checksums=False)
        with self.args.main_process_first(local=self.args.save_on_each_node, desc="verifying the checkpoint"):
            if self.args.should_save:
                verify_checkpoint(checkpoint)

    def _save_rng_state(self, output_dir: str) -> None:
        """The stock method, called last on every rank before the trainer state is written; adds the data position."""
        super()._save_rng_state(output_dir)
        if self._stream_loader is not None:
            save_data_state(Path(output_dir), self._stream_loader, self.args)
        self.accelerator.wait_for_everyone()

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """The stock method; in another layout ranks are seeded by the step, those with the same images alike."""
        if checkpoint is None or has_same_ranks(Path(checkpoint), self.args):
            super()._load_rng_state(checkpoint)
        else:
            seed = self.args.seed + self.args.data_rank + SEEDS_PER_STEP * self.state.global_step
            set_seed(seed % 2**32)

    def _init_training_state(self, max_steps: int, *args: Any) -> Any:
        """The stock method, whose state keeps a checkpoint's intervals of logs, evaluations and saves."""
        result = super()._init_training_state(max_steps, *args)
        self.state.compute_steps(self.args, max_steps)
        return result

    def _run_epoch(self, **kwargs: Any) -> None:
        """The stock method, which trains a step before it looks whether there is one left."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(**kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The method that every save of weights comes through.

        Raises:
            ValueError: on all ranks, if a weight or a loss since the last log entry is not finite.
        """
        loss = self._tr_loss if self.is_in_train else torch.zeros(())
        check_before_saving(self.model, loss, self.accelerator, **self._position)
        super().save_model(output_dir, _internal_call)

    @property
    def _position(self) -> dict[str, Any]:
        return {"step": self.state.global_step, "folder": self.args.output_dir}

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        folder = Path(output_dir or self.args.output_dir)
        if self.args.should_save:
            (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)  # a pickle that may hold the Hub token
            if self.on_save is not None:
                self.on_save(folder)

    # ---- Hub

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Creates the repository; ValueError where the Hub refuses, before any step is trained."""
        try:
            super().init_hf_repo(token, private)
        except HfHubHTTPError as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"push_to_hub: {self.args.hub_model_id} cannot be written to: {reason}") from error

    def upload(self, folder: str | Path, message: str, *, blocking: bool = True) -> Any:
        """Publishes the folder of a saved model without the training state.

        The stock upload includes the pickled arguments with their token, and leaves out the model's code.
        """
        send: Any = HfApi().upload_folder
        return send(
            repo_id=self.hub_model_id,
            folder_path=str(folder),
            commit_message=message,
            token=self.args.hub_token,
            revision=self.args.hub_revision,
            ignore_patterns=TRAINING_STATE,
            run_as_future=not blocking,
        )

    def push_to_hub(self, commit_message: str | None = "End of training", blocking: bool = True, **kwargs: Any) -> Any:
        """Saves the model and publishes the run's folder in the repository that the arguments name."""
        if self.hub_model_id is None:
            self.init_hf_repo()
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self._finish_current_push()
        return self.upload(self.args.output_dir, commit_message or "End of training", blocking=blocking)

    def push_checkpoint(self, checkpoint: Path) -> None:
        """Publishes a checkpoint without its training state, while training continues."""
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        if self.push_in_progress is not None and not self.push_in_progress.is_done():
            if not self.args.hub_always_push:
                return  # the next checkpoint will be sent
            self._finish_current_push()
        message = f"Training in progress, step {self.state.global_step}"
        self.published = checkpoint
        self.push_in_progress = PushInProgress([self.upload(checkpoint, message, blocking=False)])

    # ---- logs and evaluation

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        """The model's loss; scalar parts of its output, and how its routers route, are logged as means."""
        if not self.is_deepspeed_enabled:  # it takes every backward pass for one of the step
            self._throughput.count(self.model, inputs)  # here, where inputs are ready and autocast is on
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        parts = {name: value for name, value in outputs.items() if name != "loss" and _is_scalar(value)}
        parts |= {**(outputs.get("loss_dict") or {}), **getattr(self.model, "router_metrics", {})}
        for name, value in parts.items():
            self._part_sums[name] += value.detach()
        self._num_parts += 1
        return (loss, outputs) if return_outputs else loss

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Counted FLOPs of a batch, for `total_flos`; the stock estimate takes pixels for tokens and ignores views."""
        return self._throughput.num_flops

    def excluded_from_timing(self) -> AbstractContextManager[None]:
        """A context for work that is not training, which the throughput leaves out."""
        return self._throughput.paused()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the means of the loss parts and the metrics of the [`ThroughputMeter`] to a training log entry."""
        if "loss" in logs:
            logs.update(self._mean_parts())
            logs.update(self._throughput.metrics(self.state.global_step))
            self._tr_loss.zero_()  # the stock Trainer subtracts the sum from itself, and so would keep a NaN
        super().log(logs, start_time)
        check_metrics(logs, **self._position)

    def _mean_parts(self) -> dict[str, float]:
        """Means of the loss parts since the last log entry, over steps and ranks."""
        if not self._part_sums:
            return {}
        means: Any = self.accelerator.reduce(torch.stack(list(self._part_sums.values())), "mean")
        parts = dict(zip(self._part_sums, (means / self._num_parts).tolist()))
        self._part_sums.clear()
        self._num_parts = 0
        return parts

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Runs the evaluator and logs its metrics; without one, the stock evaluation."""
        if self.evaluator is None:
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        evaluation = self.evaluator(self.model, self.eval_dataset if eval_dataset is None else eval_dataset)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in evaluation.metrics.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def _is_in(checkpoint: str | bool | None, folder: str) -> bool:
    return bool(checkpoint) and Path(str(checkpoint)).resolve().parent == Path(folder).resolve()


def _is_scalar(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 0


__all__ = ["Evaluator", "VisionTrainer"]
