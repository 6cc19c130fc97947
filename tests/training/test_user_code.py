"""A user's own script: the stock Trainer and Auto classes, nothing of ours but the import that registers them."""

import math

import pytest
import torch
from datasets import Dataset
from tiny import TINY, batch, build
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


TRAINED = sorted({tiny.row for tiny in TINY.values()} - {"encoder", "backbone"})


def arguments(folder, steps, **changes):
    settings = {"per_device_train_batch_size": 8, "learning_rate": 3e-3, "save_strategy": "no"} | changes
    return TrainingArguments(
        output_dir=str(folder), max_steps=steps, logging_steps=1, use_cpu=True, disable_tqdm=True, **settings
    )


def collate(examples):
    """Tensors in batches; what differs in size from image to image in lists."""
    columns = {key: [example[key] for example in examples] for key in examples[0]}
    return {key: values if isinstance(values[0], dict) else torch.stack(values) for key, values in columns.items()}


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
        data_collator=collate,
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]


def examples_of(name, num_images):
    inputs = batch(name, num_images, with_choices=False)
    return [{key: value[index] for key, value in inputs.items()} for index in range(num_images)]


@pytest.mark.parametrize("name", TRAINED)
def test_the_stock_evaluation_has_a_loss(name, tmp_path):
    model, inputs = build(name, tmp_path), batch(name, 4)
    trainer = Trainer(
        model, arguments(tmp_path, 1), eval_dataset=examples_of(name, 4), data_collator=lambda _: dict(inputs)
    )
    evaluated = trainer.evaluate()["eval_loss"]
    with torch.no_grad():
        assert evaluated == pytest.approx(model.eval()(**inputs).loss.item(), rel=1e-4)


@pytest.mark.parametrize(
    "name", ["simmim", "classification", "detection", "instance_segmentation", "semantic_segmentation"]
)
def test_the_stock_trainer_loads_the_best_model(name, tmp_path):
    settings = {"save_strategy": "steps", "eval_strategy": "steps", "save_steps": 1, "eval_steps": 1}
    examples = examples_of(name, 4)
    trainer = Trainer(
        build(name),
        arguments(tmp_path, 2, load_best_model_at_end=True, save_only_model=True, **settings),
        train_dataset=examples,
        eval_dataset=examples,
        data_collator=collate,
    )
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert trainer.state.best_metric == min(losses)
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{1 + losses.index(min(losses))}")


def test_a_method_without_its_loss():
    model, inputs = build("simmim"), batch("simmim")
    with_loss, without = model(**inputs), model(**inputs, return_loss=False)
    assert without.loss is None
    torch.testing.assert_close(without.predictions, with_loss.predictions)


class Students(TrainerCallback):
    """Copies of the student's weights at the start and after each step."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.after = [{name: value.clone() for name, value in model.backbone.named_parameters()}]

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.after.append({name: value.clone() for name, value in model.backbone.named_parameters()})


def stock_trainer(name, folder, callbacks):
    """Six steps of two batches each."""
    examples = examples_of(name, 16)
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
