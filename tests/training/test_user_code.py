"""A user's own script: the stock Trainer and Auto classes, nothing of ours but the import that registers them."""

import torch
from datasets import Dataset
from transformers import AutoConfig, AutoModel, AutoModelForObjectDetection, Trainer, TrainingArguments

import hf_vlm  # noqa: F401  registers the Auto classes

BACKBONE = {"image_size": 16, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def arguments(folder, steps):
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=8,
        learning_rate=3e-3,
        logging_steps=1,
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
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
