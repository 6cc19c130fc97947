"""A user's own script: the stock Trainer and Auto classes, nothing of ours but the import that registers them."""

import math

import pytest
import torch
from datasets import Dataset
from tiny import batch, build
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForObjectDetection,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import hf_vlm  # registers the Auto classes

BACKBONE = {"image_size": 16, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def arguments(folder, steps, **changes):
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=8,
        learning_rate=3e-3,
        logging_steps=1,
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        **changes,
    )


def test_simclr_trains_for_20_steps(tmp_path):
    torch.manual_seed(0)
    images = torch.rand(8, 1, 3, 16, 16)
    views = images + 0.05 * torch.randn(8, 2, 3, 16, 16)  # two noisy views of each image
    dataset = Dataset.from_dict({"pixel_values": views.tolist()}).with_format("torch")
    model = AutoModel.from_config(
        AutoConfig.for_model("vlm_simclr", backbone_config=BACKBONE, projection_hidden_size=64)
    )
    trainer = Trainer(model=model, args=arguments(tmp_path, 20), train_dataset=dataset)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 20
    assert losses[-1] < 0.5 * losses[0]


def test_detector_trains_with_a_collator_of_the_user(tmp_path):
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "vlm_vit_detection",
        backbone_config=BACKBONE,
        num_labels=2,
        hidden_size=32,
        intermediate_size=32,
        num_self_attention_heads=4,
        num_cross_attention_heads=4,
    )
    examples = [
        {
            "pixel_values": torch.randn(3, 16, 16),
            "labels": {"class_labels": torch.tensor([i % 2]), "boxes": torch.tensor([[0.5, 0.5, 0.4, 0.4]])},
        }
        for i in range(8)
    ]
    trainer = Trainer(
        model=AutoModelForObjectDetection.from_config(config),
        args=arguments(tmp_path, 20),
        train_dataset=examples,
        data_collator=lambda batch: {
            "pixel_values": torch.stack([example["pixel_values"] for example in batch]),
            "labels": [example["labels"] for example in batch],
        },
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]


class Students(TrainerCallback):
    """Copies of the student's weights at the start and after each step."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.after = [{name: value.clone() for name, value in model.backbone.named_parameters()}]

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.after.append({name: value.clone() for name, value in model.backbone.named_parameters()})


def stock_trainer(name, folder, callbacks):
    """Six steps of two batches each."""
    inputs = batch(name, 16, with_choices=False)
    examples = [{key: value[index] for key, value in inputs.items()} for index in range(16)]
    settings = arguments(folder, 6, gradient_accumulation_steps=2)
    return Trainer(model=build(name), args=settings, train_dataset=examples, callbacks=callbacks)


@pytest.mark.parametrize("name", ["moco_v3", "dinov2", "ijepa", "mae_image_losses"])
def test_teachers_move_in_the_stock_trainer(name, tmp_path):
    students = Students()
    trainer = stock_trainer(name, tmp_path, [hf_vlm.AfterStep(), students])
    trainer.train()
    expected, last = dict(students.after[0]), students.after[-1]
    for step, student in enumerate(students.after[1:], start=1):
        momentum = 1 - (1 - trainer.model.config.momentum) * (1 + math.cos(math.pi * step / 6)) / 2
        expected = {key: momentum * value + (1 - momentum) * student[key] for key, value in expected.items()}
    moved = dict(trainer.model.teacher["backbone"].named_parameters())
    torch.testing.assert_close(moved, expected)
    assert trainer.model.progress == 1
    assert not torch.equal(last["layers.0.mlp.up_projection.weight"], moved["layers.0.mlp.up_projection.weight"])


def test_the_stock_trainer_is_refused_where_teachers_would_not_move(tmp_path):
    trainer = stock_trainer("ijepa", tmp_path, [])
    with pytest.raises(ValueError, match=r"IJEPAForPreTraining is trained without after_step.*hf_vlm.AfterStep\(\)"):
        trainer.train()
    assert trainer.state.global_step == 2
