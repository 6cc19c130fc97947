"""Cards say what the run's files say, and nothing where they say nothing."""

import json
import math
import re

import pytest
import yaml
from huggingface_hub import ModelCard
from tiny import build
from transformers.pipelines import PIPELINE_REGISTRY

from hf_vlm.deploy.model_card import CARD_MARKER, write_model_card
from hf_vlm.deploy.push import push
from hf_vlm.registry import MODELS
from hf_vlm.tasks import TASKS


def change(run, **values):
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(record | values))


def check_form(text):
    """No unfilled variable, no default text, no heading without content, no broken spacing."""
    assert not re.search(r"\{\{|\}\}|\{%|\bNone\b|nan\b|More Information Needed", text)
    assert not re.search(r"^#+ .*\n+(?=##? |\Z)", text, re.MULTILINE)
    assert "\n\n\n" not in text
    for line in text.splitlines():
        assert line == line.rstrip()
    for heading in re.findall(r"\n(.*)\n## ", text):
        assert heading == ""  # a blank line before every heading


def sections(text):
    return re.findall(r"^## (.*)$", text, re.MULTILINE)


def test_detector_card(detector_run):
    path = write_model_card(detector_run, repo_id="me/my-detector")
    assert path == detector_run / "README.md"
    text = path.read_text()
    check_form(text)
    assert sections(text) == [
        "How to use",
        "Results",
        "Training data",
        "Model",
        "Training procedure",
        "Versions",
        "Limitations",
        "Licence and provenance",
    ]
    assert "finds objects of 3 classes" in text
    assert "Classes: cat, dog, bird." in text
    assert text.count('"me/my-detector"') == 3
    assert "| AP (IoU 0.50:0.95) | 0.512 |\n| AP50 | 0.800 |\n" in text
    assert "On the split `test` of the built-in scenes of hf_vlm (`scenes:easy`)" in text
    assert "split `train`: 400 annotated images. Fingerprint of the data: `abc123`." in text
    assert "1,200 optimiser steps, 19,200 images seen, 90 seconds, on 2 CPU cores, mean training loss 1.25" in text
    assert "code at commit `0123abc`." in text
    assert "| encoder | 2 layers, width 16, 2 heads, patches of 8 x 8 |" in text
    assert "| input | 32 x 48 pixels, 3 channels |" in text
    assert "- torch 2.13.0\n- transformers 5.23.0\n" in text
    assert "training started from random values" in text
    assert CARD_MARKER in text
    block = re.search(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert yaml.safe_load(block[1]) == yaml.safe_load((detector_run / "recipe.yaml").read_text())


@pytest.mark.parametrize(
    ("recipe", "data", "told"),
    [
        ({}, {}, "400 annotated images. Fingerprint"),
        (
            {"rounds": 2},
            {"labels_found": True},
            "400 images without annotations. Their boxes were found by `regions`, and in 1 more round by the detector",
        ),
        (
            {"labels_from": "runs/a"},
            {"labels_found": True},
            "400 images without annotations. Their boxes were found by",
        ),
        (
            {"labels_from": "runs/a", "unlabelled_data": "photos"},
            {"labels_found": False},
            "400 annotated images. Other images without annotations were added, whose boxes were found by",
        ),
    ],
)
def test_labels_that_nobody_annotated_are_told(detector_run, recipe, data, told):
    change(detector_run, data=json.loads((detector_run / "run.json").read_text())["data"] | data)
    path = detector_run / "recipe.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | recipe))
    assert told in " ".join(write_model_card(detector_run).read_text().split())


def test_the_last_probe_is_told(detector_run):
    change(detector_run, probe={"probe_effective_rank": 35.16, "step": 1200})
    assert (
        "mean training loss 1.25, effective rank of the features 35.2," in write_model_card(detector_run).read_text()
    )
    change(detector_run, probe={"probe_effective_rank": None})
    assert "effective rank" not in write_model_card(detector_run).read_text()


def test_number_of_parameters_is_counted(detector_run):
    from hf_vlm.models.modeling_detection import VLMViTForObjectDetection

    model = VLMViTForObjectDetection.from_pretrained(detector_run)
    count = sum(p.numel() for p in model.state_dict().values())
    assert f"| parameters | {count:,} |" in write_model_card(detector_run).read_text()


def test_detector_metadata(detector_run):
    change(detector_run, encoder="org/encoder")
    data = ModelCard.load(write_model_card(detector_run, repo_id="me/my-detector", license="cc-by-4.0")).data
    assert data.library_name == "transformers"
    assert data.pipeline_tag == "object-detection"
    assert data.license == "cc-by-4.0"
    assert data.base_model == "org/encoder"
    assert data.datasets is None
    assert "hf_vlm" in data.tags
    results = {
        r.metric_type: (r.metric_value, r.task_type, r.dataset_name, r.dataset_split) for r in data.eval_results
    }
    assert results == {
        "ap": (0.5123, "object-detection", "scenes:easy", "test"),
        "ap50": (0.8, "object-detection", "scenes:easy", "test"),
    }


@pytest.mark.parametrize(
    ("name", "how", "limit"),
    [
        (
            "semantic_segmentation",
            "with a linear head on its patches",
            "each patch of 8 x 8 pixels is classified as one",
        ),
        (
            "mask_query_segmentation",
            "with 5 queries in the last 1 of its 2 layers, each of which finds a class and its mask",
            "masks have about a fourth of that size",
        ),
    ],
)
def test_segmenter_card(name, how, limit, tmp_path):
    build(name).save_pretrained(tmp_path)
    text = write_model_card(tmp_path, repo_id="me/my-segmenter").read_text()
    check_form(text)
    assert f"gives each pixel of an image one of 3 classes: a plain Vision Transformer {how}" in text
    assert limit in text


def test_encoder_card(encoder_run):
    text = write_model_card(encoder_run, repo_id="me/my-encoder").read_text()
    check_form(text)
    data = ModelCard(text).data
    assert data.pipeline_tag == "image-feature-extraction"
    assert data.datasets == ["org/pictures"]
    assert [(r.metric_type, r.metric_value, r.dataset_type) for r in data.eval_results] == [
        ("knn", 0.75, "org/pictures")
    ]
    assert "It was pretrained with MAE on images without labels" in text
    assert 'encoder = AutoModel.from_pretrained("me/my-encoder", trust_remote_code=True).eval()\n' in text
    assert "| kNN accuracy on its features | 0.750 |" in text
    assert "--encoder me/my-encoder" in text
    assert (
        "The data set [org/pictures](https://huggingface.co/datasets/org/pictures), split `train`. No labels" in text
    )


def test_a_whole_pretraining_model_offers_its_encoder(tmp_path):
    import hf_vlm.registry  # noqa: F401
    from hf_vlm.models.modeling_simclr import SimCLRConfig, SimCLRForPreTraining

    encoder = {"image_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    SimCLRForPreTraining(SimCLRConfig(backbone_config=encoder)).save_pretrained(tmp_path)
    text = write_model_card(tmp_path, repo_id="me/whole").read_text()
    check_form(text)
    assert 'AutoModelForPreTraining.from_pretrained("me/whole", trust_remote_code=True).backbone.eval()' in text
    assert "| input | 32 x 32 pixels, 3 channels |" in text


def test_the_recipe_may_name_the_repository(detector_run):
    with (detector_run / "recipe.yaml").open("a") as recipe:
        recipe.write("hub_model_id: me/by-trainer\n")
    assert write_model_card(detector_run).read_text().count('"me/by-trainer"') == 3
    assert write_model_card(detector_run, repo_id="me/other").read_text().count('"me/other"') == 3


def test_figures_of_classes_are_named(detector_run):
    change(detector_run, metrics={"ap": 0.5, "ap/cat": 0.25, "ap/dog": math.nan})
    text = write_model_card(detector_run).read_text()
    assert "| AP (IoU 0.50:0.95) | 0.500 |\n| AP of cat | 0.250 |\n\n" in text


def test_what_is_unknown_is_left_out(detector_run):
    (detector_run / "run.json").unlink()
    (detector_run / "recipe.yaml").unlink()
    (detector_run / "model.safetensors").unlink()
    text = write_model_card(detector_run).read_text()
    check_form(text)
    assert sections(text) == ["How to use", "Model", "Limitations", "Licence and provenance"]
    assert "random values" not in text
    assert "parameters" not in text
    assert '"./tiny-detector"' in text
    assert ModelCard(text).data.eval_results is None


@pytest.mark.parametrize("run", ["detector_run", "encoder_run"])
@pytest.mark.parametrize(
    "values",
    [
        {"metrics": {}},
        {"data": {}},
        {"data": {"source": "scenes"}, "metrics": {"ap": 0.5}},
        {"encoder": "org/encoder", "versions": {}},
        {"seconds": 4000, "num_steps": None, "num_images_seen": None, "machine": None, "git": {}},
        {
            "seconds": None,
            "num_steps": None,
            "num_images_seen": None,
            "machine": None,
            "git": None,
            "train_loss": None,
        },
    ],
)
def test_any_part_may_be_missing(run, values, request):
    run = request.getfixturevalue(run)
    change(run, **values)
    check_form(write_model_card(run).read_text())
    (run / "recipe.yaml").unlink()
    check_form(write_model_card(run).read_text())


def test_settings_of_the_optimiser_that_changed_on_the_way_are_told(detector_run):
    change(detector_run, changes=[{"step": 1100, "learning_rate": [0.001, 0.0005], "save_steps": [50, 100]}])
    card = write_model_card(detector_run).read_text()
    assert "19,200 images seen, from step 1,100 with learning_rate 0.0005 in place of 0.001, 90 seconds" in card


def test_folders_of_the_publisher_are_not_told(detector_run, tmp_path):
    source, encoder = tmp_path / "private" / "parts", tmp_path / "private" / "pretrain"
    source.mkdir(parents=True)
    change(detector_run, data={"source": str(source)}, encoder=str(encoder))
    text = write_model_card(detector_run).read_text()
    assert "A data set of the publisher (`parts`)" in text
    assert "started from the publisher's own pretrained encoder (`pretrain`)" in text
    assert "private" not in text
    assert ModelCard(text).data.base_model is None


def test_weights_of_others_are_named_and_their_terms_decide(encoder_run):
    change(encoder_run, encoder="runs/dinov2", origins=["org/dinov2", "siglip"])
    text = write_model_card(encoder_run).read_text()
    assert "Training used weights of [org/dinov2](https://huggingface.co/org/dinov2) and `siglip`" in text
    assert "No weights of others" not in text
    assert "apache-2.0" not in text
    assert ModelCard(text).data.base_model == "org/dinov2"
    assert "published under cc-by-nc-4.0" in write_model_card(encoder_run, license="cc-by-nc-4.0").read_text()
    with pytest.raises(ValueError, match=r"trained with weights of org/dinov2 and siglip: .*--license"):
        push(encoder_run, "me/my-encoder")


@pytest.mark.parametrize(
    "row", [row for row in MODELS if row.task in TASKS and row.name != "backbone"], ids=lambda row: row.name
)
def test_the_metadata_of_every_task_are_what_the_hub_takes(row, encoder_run, tmp_path):
    """The rules of https://huggingface.co/docs/hub/model-cards, which the Hub applies when a card is sent."""
    build(row.name).save_pretrained(tmp_path)
    row.processor_class().save_pretrained(tmp_path)
    for name in ("recipe.yaml", "run.json"):
        (tmp_path / name).write_text((encoder_run / name).read_text())
    task = TASKS[row.task]
    change(tmp_path, metrics={**dict.fromkeys(task.headline, 0.5), "ap/cat": 0.25, "other": math.nan})
    text = write_model_card(tmp_path, repo_id="me/model").read_text()
    check_form(text)
    assert sections(text)[-1] == "Licence and provenance"
    metadata = yaml.safe_load(text.split("---\n")[1])
    assert metadata["pipeline_tag"] in PIPELINE_REGISTRY.get_supported_tasks()
    assert metadata["library_name"] == "transformers"
    assert metadata["license"] == "apache-2.0"
    assert metadata["datasets"] == ["org/pictures"]
    assert all(isinstance(tag, str) for tag in metadata["tags"])
    (index,) = metadata["model-index"]
    for result in index["results"]:
        assert result["task"]["type"] == metadata["pipeline_tag"]
        assert result["dataset"]["type"] == "org/pictures"
        for metric in result["metrics"]:
            assert (type(metric["type"]), type(metric["value"])) == (str, float)
    found = {result.metric_type for result in ModelCard(text).data.eval_results}
    assert found == {*task.headline, "ap/cat"}


def test_not_a_model(tmp_path):
    with pytest.raises(ValueError, match=r"it has no config\.json"):
        write_model_card(tmp_path)


def test_a_broken_record_is_named(detector_run):
    (detector_run / "run.json").write_text("{")
    with pytest.raises(ValueError, match=r"run\.json cannot be read"):
        write_model_card(detector_run)
    (detector_run / "run.json").write_text("[]")
    with pytest.raises(ValueError, match=r"run\.json must hold a mapping, but holds a list"):
        write_model_card(detector_run)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("scenes", "(`scenes`), composed from handwritten digits that scikit-learn ships and photographs"),
        ("scenes:hard", "(`scenes:hard`), composed from handwritten digits that scikit-learn ships and photographs"),
        ("scenes:symbols", "(`scenes:symbols`), composed from symbols of DejaVu Sans, which matplotlib ships, and "),
        ({"scenes:easy": 0.5, "scenes:symbols": 0.5}, "(`scenes:easy, scenes:symbols`)"),
    ],
)
def test_the_card_says_what_scenes_are_composed_from(encoder_run, source, text):
    change(encoder_run, data={"source": source, "split": "train"})
    card = " ".join(write_model_card(encoder_run).read_text().split())
    assert f"the built-in scenes of hf_vlm {text}" in card
    check_form(write_model_card(encoder_run).read_text())
