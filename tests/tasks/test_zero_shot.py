"""Zero-shot accuracy and retrieval of a model that learned a few scenes, on its folder as a user has it."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from sample_data import png, write_images, write_parquet
from tiny import save_image_text
from transformers import pipeline

from hf_vlm.cli.main import main
from hf_vlm.data.sources import open_source
from hf_vlm.features.texts import embed_classes, embed_texts, load_tokenizer
from hf_vlm.models.image_processing_vlm_vit import VLMViTImageProcessor
from hf_vlm.models.modeling_image_text import ImageTextForPreTraining
from hf_vlm.tasks.evaluation import evaluate_split


@pytest.fixture
def run(tmp_path):
    return save_image_text(tmp_path / "run")


def features(folder, texts):
    model = ImageTextForPreTraining.from_pretrained(folder)
    return model, embed_texts(model, load_tokenizer(model), texts)


def test_texts_are_embedded_alike_in_every_batch_and_classes_by_their_templates(run):
    model, found = features(run, ["a cat", "a black dog", "two cats and a dog"])
    model, alone = features(run, ["a cat"])
    torch.testing.assert_close(found[:1], alone)
    model.config.templates = ["a photo of a {}.", "the {}"]
    classes = embed_classes(model, load_tokenizer(model), ["black_dog", "cat"])
    _, prompts = features(run, ["a photo of a black dog.", "the black dog"])
    torch.testing.assert_close(classes[0], torch.nn.functional.normalize(prompts.mean(0), dim=0))


def test_accuracy_and_recall_of_a_folder(run, tmp_path, capsys):
    captions = [["a cat"], ["two cats", "cats"], ["a cat"], []]
    images = [{"bytes": png(60 * value), "path": None} for value in range(4)]
    rows = {"image": images, "text": captions, "label": ["cat", "black dog", "cat", "black dog"]}
    write_parquet(tmp_path / "data" / "test.parquet", rows)
    arguments = ["evaluate", str(run), "--data", str(tmp_path / "data"), "--save", str(tmp_path / "metrics.json")]
    assert main(arguments) == 0
    found = json.loads((tmp_path / "metrics.json").read_text())

    model = ImageTextForPreTraining.from_pretrained(run)
    processor = VLMViTImageProcessor.from_pretrained(run)
    pictures = [Image.new("RGB", (16, 12), (60 * value % 256, 7, 7)) for value in range(4)]
    with torch.no_grad():
        seen = model.get_image_features(processor(pictures, return_tensors="pt")["pixel_values"])
    tokenizer = load_tokenizer(model)
    nearest = (seen @ embed_classes(model, tokenizer, ["black dog", "cat"]).T).argmax(1)
    assert found["top1"] == pytest.approx((nearest == torch.tensor([1, 0, 1, 0])).double().mean().item())
    assert found["top5"] == 1
    texts = ["a cat", "two cats", "cats"]
    similarities = (seen[:3] @ embed_texts(model, tokenizer, texts).T).argmax(1).tolist()
    assert found["image_to_text_r1"] == pytest.approx(
        np.mean([texts[text] in captions[image] for image, text in enumerate(similarities)])
    )
    assert found["text_to_image_r5"] == found["image_to_text_r10"] == 1
    assert "image_to_text_r1 " in capsys.readouterr().out


def test_data_without_classes_or_without_captions(run, tmp_path):
    source = {"image": [{"bytes": png(value), "path": None} for value in range(3)]}
    write_parquet(tmp_path / "captions.parquet", {**source, "text": ["a cat", "two cats", "dogs"]})
    evaluation = evaluate_split(run, str(tmp_path / "captions.parquet"), "train").evaluation
    assert {name.rpartition("_r")[0] for name in evaluation.metrics} == {"image_to_text", "text_to_image"}
    write_images(tmp_path / "folders", ["cat/0.png", "dog/1.png"])
    evaluation = evaluate_split(run, str(tmp_path / "folders"), "train").evaluation
    assert set(evaluation.metrics) == {"top1", "top5"}  # classes that the model was never told of
    write_parquet(tmp_path / "plain.parquet", source)
    with pytest.raises(ValueError, match=r"plain.parquet has neither class labels nor captions in split 'train'"):
        evaluate_split(run, str(tmp_path / "plain.parquet"), "train")
    assert open_source(tmp_path / "plain.parquet").label_names is None


def test_transformers_pipeline_classifies_by_names(run, caplog):
    classify = pipeline("zero-shot-image-classification", model=str(run))
    image, names = Image.new("RGB", (40, 30), (200, 40, 40)), ["cat", "black dog", "two cats"]
    found = classify(image, candidate_labels=names, hypothesis_template="a photo of a {}.")
    model, texts = features(run, [f"a photo of a {name}." for name in names])
    pixel_values = VLMViTImageProcessor.from_pretrained(run)(image, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = model.cosine_scale(model.get_image_features(pixel_values), texts).softmax(1)[0]
    assert {entry["label"]: pytest.approx(entry["score"], abs=1e-5) for entry in found} == dict(
        zip(names, expected.tolist())
    )
    assert "not supported" not in caplog.text


CLASSIFY = """
from transformers import pipeline
from PIL import Image
classify = pipeline("zero-shot-image-classification", model="run", trust_remote_code=True)
found = classify(Image.new("RGB", (40, 30), (200, 40, 40)), candidate_labels=["cat", "dog"])
print(found[0]["label"], round(found[0]["score"], 4))
"""


@pytest.mark.slow
def test_the_pipeline_runs_where_the_package_is_not_installed(run, tmp_path, run_process):
    image = Image.new("RGB", (40, 30), (200, 40, 40))
    best = pipeline("zero-shot-image-classification", model=str(run))(image, candidate_labels=["cat", "dog"])[0]
    printed = run_process(CLASSIFY, tmp_path, forbid_hf_vlm=True, HF_HUB_OFFLINE="1")
    assert printed.splitlines()[-1] == f"{best['label']} {round(best['score'], 4)}"
