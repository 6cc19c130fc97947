"""Runs with a sparse encoder: started from a dense one, logged, watched."""

import copy

import pytest
import torch
from tiny import build
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainingArguments

from hf_vlm.features.loading import load_model
from hf_vlm.models.configuration_vlm_vit import VLMViTConfig
from hf_vlm.models.image_processing_vlm_vit import VLMViTImageProcessor
from hf_vlm.models.modeling_vlm_vit import VLMViTModel
from hf_vlm.training.build import load_encoder
from hf_vlm.training.callbacks import read_log
from hf_vlm.training.recipe import parse_arguments
from hf_vlm.training.run import pretrain

ENCODER = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
ROUTING = {"router_entropy", "expert_load_max", "expert_load_min", "expert_load_entropy", "dropped_tokens"}


@pytest.fixture
def dense(tmp_path):
    encoder = VLMViTModel(VLMViTConfig(**ENCODER, image_size=32)).eval()
    encoder.save_pretrained(tmp_path / "dense")
    VLMViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "dense")
    return encoder


def test_a_recipe_that_asks_for_experts_upcycles_a_dense_encoder(make_recipe, dense, tmp_path, caplog):
    recipe = make_recipe("mae", encoder=str(tmp_path / "dense"), gradient_accumulation_steps=2, max_steps=2)
    recipe["encoder_config"] = {**EXPERTS, "sparse_layers": [-1], "router_noise": 0.5}
    with caplog.at_level("INFO"):
        encoder = load_encoder(parse_arguments(recipe)).eval()
    assert "The MLPs of layers 1 became 4 experts each" in caplog.text
    assert encoder.config.router_noise == 0.5
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        found, expected = (model(images).last_hidden_state for model in (encoder, dense))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)

    pretrain(recipe)
    entries = [entry for entry in read_log(tmp_path / "mae" / "log.jsonl") if "loss" in entry]
    for entry in entries:
        assert entry.keys() > ROUTING | {"router_balance_loss", "router_z_loss"}
        assert 0 < entry["expert_load_min"] <= 1 <= entry["expert_load_max"] <= 2  # two of four, so at most a half
        assert 0 < entry["expert_load_entropy"] <= 1
    trained = load_model(tmp_path / "mae").model
    assert trained.config.num_experts == 4
    experts = trained.layers[-1].mlp.experts.up_proj
    assert not torch.equal(experts[0], experts[1])  # they differ by what they were given

    again = make_recipe("mae", encoder=str(tmp_path / "mae"), encoder_config={"num_experts": 8})
    with pytest.raises(ValueError, match="num_experts: its weights have 4, the recipe asks for 8"):
        load_encoder(parse_arguments(again))


class InOrder(Trainer):
    def _get_train_sampler(self, *args):
        return SequentialSampler(self.train_dataset)


def test_the_stock_trainer_takes_the_loss_of_routers_with_gradient_accumulation(tmp_path):
    model = build("mae_sparse")
    expected = copy.deepcopy(model)
    torch.manual_seed(0)
    images, noise = torch.randn(8, 1, 3, 32, 32), torch.rand(8, 16)
    options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 1, "logging_steps": 1}
    plain = {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    args = TrainingArguments(tmp_path, **options, **plain, use_cpu=True, save_strategy="no", disable_tqdm=True)
    data = [{"pixel_values": image, "noise": value} for image, value in zip(images, noise)]
    trainer = InOrder(model=model, args=args, train_dataset=data)
    trainer.train()
    losses = [expected(pixel_values=x, noise=y).loss / 2 for x, y in zip(images.split(4), noise.split(4))]
    sum(losses).backward()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(sum(losses).item(), rel=1e-5)
    for parameter, other in zip(model.parameters(), expected.parameters()):
        torch.testing.assert_close(parameter, other - 0.1 * other.grad)


@pytest.mark.slow
@pytest.mark.parametrize("balances", [True, False])
def test_collapsed_routing_raises_the_alarm(make_recipe, caplog, balances):
    fields = {"num_experts": 8} | ({} if balances else {"router_aux_loss_coef": 0.0, "router_z_loss_coef": 0.0})
    longer = {"max_steps": 80, "per_device_train_batch_size": 8, "learning_rate": 3e-3, "warmup_steps": 0.1}
    encoder = ENCODER | {"position_embedding_type": "sincos"} | fields
    pretrain(make_recipe("simclr", **longer, encoder_config=encoder, num_train_examples=64, logging_steps=8))
    assert ("a router sends nearly all tokens to few experts" in caplog.text) != balances
