"""A Trainer whose checkpoints and models are committed as one: written aside, synced, renamed."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME

from hf_vlm.data.io.durable import PARTIAL_FOLDER, disk_errors, is_partial
from hf_vlm.training.checkpoints import (
    checkpoint_folder,
    commit_checkpoint,
    commit_model,
    resume_advice,
    rotate_checkpoints,
)

__all__ = ["CommittingTrainer"]


class CommittingTrainer(Trainer):
    """The stock Trainer with other ways to write: a kill leaves checkpoints and models that are whole or absent.

    Checkpoints are counted and deleted by their steps. What cannot be written is a ValueError, which names the last
    checkpoint.
    """

    control: Any
    push_in_progress: Any
    published: Path | None = None  # the checkpoint whose upload, in the background, was begun last

    def _get_output_dir(self, trial: Any) -> str:
        """The folder aside, in which the stock Trainer writes checkpoints and finds none to delete."""
        return str(Path(super()._get_output_dir(trial)) / PARTIAL_FOLDER)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """The stock method, after which the checkpoint is committed, published, and older ones are deleted."""
        partial = checkpoint_folder(Path(self._get_output_dir(trial)), self.state.global_step)
        folder = partial.parents[1]
        with self._saving(f"The checkpoint of step {self.state.global_step}", folder, partial):
            super()._save_checkpoint(model, trial)
            keep = {folder / partial.name}
            if self.state.best_global_step:
                best = checkpoint_folder(folder, self.state.best_global_step)
                if best in keep or best.is_dir():
                    self.state.best_model_checkpoint = str(best)
                    keep.add(best)
            if self.published is not None and not self.push_in_progress.is_done():
                keep.add(self.published)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self.state.save_to_json(str(partial / TRAINER_STATE_NAME))  # with the best one's final name
                commit_checkpoint(partial, folder / partial.name)
                rotate_checkpoints(folder, self.args.save_total_limit, keep=keep)
            self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self.push_checkpoint(folder / partial.name)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Nothing: a checkpoint is published once it is committed."""

    def push_checkpoint(self, checkpoint: Path) -> None:
        """Publishes a committed checkpoint, as the stock Trainer does."""
        super()._push_from_checkpoint(str(checkpoint))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The stock method; the folder holds the earlier model, none or the whole new one whenever it is killed."""
        folder = Path(output_dir or self.args.output_dir)
        if is_partial(folder):
            super().save_model(str(folder), _internal_call=True)
            return
        with self.saving_model(folder) as partial:
            super().save_model(str(partial), _internal_call=True)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save")

    @contextmanager
    def saving_model(self, folder: Path) -> Iterator[Path]:
        """A context that gives the folder to write a model into, which is moved to `folder` at the end."""
        partial = folder / PARTIAL_FOLDER / folder.resolve().name  # the same name, for the card
        with self._saving("The model", folder, partial):
            yield partial
            if partial.is_dir() and self.args.should_save:
                commit_model(partial, folder)

    @contextmanager
    def _saving(self, what: str, folder: Path, partial: Path) -> Iterator[None]:
        """A context that deletes `partial` where it cannot be written, and says so in a ValueError."""
        with disk_errors(what, folder, lambda: resume_advice(folder)):
            try:
                yield
            except Exception:
                shutil.rmtree(partial, ignore_errors=True)
                raise
