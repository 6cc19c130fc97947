"""Pretraining on images with texts: where texts and text models come from, and what is saved."""

import json

import numpy as np
import pytest
import torch
from sample_data import png, write_images, write_parquet
from transformers import AutoTokenizer, BertConfig, BertModel

from hf_vlm.data.captions import with_texts
from hf_vlm.data.io.decode import BadImageError
from hf_vlm.data.sources import open_source
from hf_vlm.data.transforms.captions import CaptionCollate, CaptionTransform, tokenize
from hf_vlm.models.modeling_image_text import ImageTextForPreTraining
from hf_vlm.models.modeling_vlm_vit import VLMViTModel
from hf_vlm.training import run
from hf_vlm.training.alarms import SIGNS, CollapseAlarm
from hf_vlm.training.callbacks import read_log
from hf_vlm.training.run import pretrain
from hf_vlm.training.texts import train_tokenizer

TEMPLATES = ("a photo of a {}.", "the {}")
TEXTS = ["a red seven", "two blue threes", "a red three left of a blue seven"]


def test_a_tokeniser_knows_every_text_and_pads_to_one_length():
    tokenizer = train_tokenizer(TEXTS * 4)
    tokenizer.model_max_length = 12
    tokens = tokenize(tokenizer, [*TEXTS, "Größe 日本"], padding="max_length")
    assert tokens["input_ids"].shape == (4, 12)
    assert (tokens["input_ids"] == 0).equal(tokens["attention_mask"] == 0)  # padding has the index 0
    texts = tokenizer.batch_decode(tokenizer([*TEXTS, "Größe 日本"])["input_ids"], skip_special_tokens=True)
    assert [text.strip() for text in texts] == [*TEXTS, "größe 日本"]
    assert tokens["input_ids"][0].tolist()[:5] == [1, *tokenizer.convert_tokens_to_ids(["Ġa", "Ġred", "Ġseven"]), 2]
    assert tokenize(tokenizer, TEXTS)["input_ids"].shape == (3, max(len(text.split()) for text in TEXTS) + 2)


def test_a_caption_is_sampled_by_the_generator_of_the_example():
    views = CaptionTransform(lambda example, rng: {"noise": rng.random()})
    captions = {"text": TEXTS}
    found = [views(captions, np.random.default_rng((3, seed))) for seed in range(20)]
    assert {example["text"] for example in found} == set(TEXTS)
    assert found == [views(captions, np.random.default_rng((3, seed))) for seed in range(20)]
    assert found[0]["noise"] == np.random.default_rng((3, 0)).random()  # views are those without texts
    with pytest.raises(BadImageError, match="it has no caption"):
        views({"text": []}, np.random.default_rng(0))
    tokenizer = train_tokenizer(TEXTS)
    tokenizer.model_max_length = 8
    batch = CaptionCollate(lambda examples: {"noise": [example["noise"] for example in examples]}, tokenizer)(found)
    assert batch["noise"] == [example["noise"] for example in found]
    assert batch["input_ids"].equal(
        tokenize(tokenizer, [example["text"] for example in found], padding="max_length")["input_ids"]
    )


def test_classes_are_texts_where_there_are_no_captions(tmp_path):
    write_images(tmp_path, ["Granny_Smith/0.png", "red-pepper/1.png"])
    source = with_texts(open_source(tmp_path), TEMPLATES)
    assert [example["text"] for example in source] == [
        ["a photo of a Granny Smith.", "the Granny Smith"],
        ["a photo of a red pepper.", "the red pepper"],
    ]
    assert source.features["text"] == with_texts(open_source("scenes", num_samples=1), TEMPLATES).features["text"]
    write_images(tmp_path / "plain", ["0.png", "1.png"])
    with pytest.raises(ValueError, match=r"plain has no texts in split 'train': neither captions .* nor classes"):
        with_texts(open_source(tmp_path / "plain"), TEMPLATES)


def test_what_is_saved_is_the_whole_model_with_its_tokeniser(make_recipe, tmp_path, monkeypatch):
    alarms = []
    monkeypatch.setattr(run, "CollapseAlarm", lambda **options: alarms.append(options) or CollapseAlarm(**options))
    pretrain(make_recipe("image_text", data="scenes:captions", max_steps=2, save_strategy="steps", save_steps=1))
    for folder in (tmp_path / "image_text", tmp_path / "image_text" / "checkpoint-1"):
        model, report = ImageTextForPreTraining.from_pretrained(folder, output_loading_info=True)
        assert not report["missing_keys"]
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert tokenizer.model_max_length == 16
        assert len(tokenizer) == model.config.text_config.vocab_size
        encoder = VLMViTModel.from_pretrained(folder)
        assert all(torch.equal(value, model.backbone.state_dict()[key]) for key, value in encoder.state_dict().items())
    assert not (tmp_path / "image_text" / "pretraining_model").exists()
    watched = {sign.metric for sign in alarms[0]["signs"]}
    assert {sign.metric for sign in SIGNS} - watched == {"loss"}  # which may vanish when all pairs are learned
    entries = [entry for entry in read_log(tmp_path / "image_text" / "log.jsonl") if "loss" in entry]
    assert all({"accuracy", "feature_std", "text_std"} <= entry.keys() for entry in entries)
    assert json.loads((tmp_path / "image_text" / "run.json").read_text())["finished"]


def test_a_text_model_to_start_from_and_a_locked_encoder(make_recipe, tmp_path):
    tokenizer = train_tokenizer(TEXTS)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    text_model = BertModel(config)
    text_model.save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    pretrain(make_recipe("mae", max_steps=1, probe_steps=0))
    options = {"text_encoder": str(tmp_path / "bert"), "encoder": str(tmp_path / "mae"), "probe_steps": 0}
    settings = {"projection_size": 16, "lock_encoder": True}
    pretrain(make_recipe("image_text", **options, model_config=settings, max_steps=2, learning_rate=1e-6))
    model = ImageTextForPreTraining.from_pretrained(tmp_path / "image_text")
    encoder = VLMViTModel.from_pretrained(tmp_path / "mae").state_dict()
    assert all(torch.equal(value, encoder[key]) for key, value in model.backbone.state_dict().items())
    assert model.text_model.pooler is None
    for key, value in model.text_model.state_dict().items():
        torch.testing.assert_close(value, text_model.state_dict()[key], atol=1e-5, rtol=0)
    assert json.loads((tmp_path / "image_text" / "run.json").read_text())["finished"]


def test_settings_that_cannot_work_are_refused(make_recipe, tmp_path):
    def refuse(match, **changes):
        with pytest.raises(ValueError, match=match):
            pretrain(make_recipe("image_text", **changes))

    refuse("lock_encoder keeps the encoder as it is, which would be random", model_config={"lock_encoder": True})
    refuse("text_config: BertConfig has no field 'hiden_size'", model_config={"text_config": {"hiden_size": 8}})
    refuse("text_encoder: .*nothing holds no text model of transformers", text_encoder=str(tmp_path / "nothing"))
    refuse("text_length is 600, but the text model reads 512 tokens", text_length=600)
    refuse(r"templates need one \{\} each, but are \['a photo'\]", model_config={"templates": ["a photo"]})
    write_parquet(tmp_path / "plain.parquet", {"image": [{"bytes": png(0), "path": None}] * 8})
    refuse("plain.parquet has no texts in split 'train'", data=str(tmp_path / "plain.parquet"))
