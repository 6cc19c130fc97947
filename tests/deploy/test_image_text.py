"""A model of images and texts is published with its tokeniser, and its card says how it is used."""

import json

from huggingface_hub import ModelCard
from tiny import save_image_text

from hf_vlm.deploy.model_card import write_model_card
from hf_vlm.deploy.push import model_files


def test_the_tokeniser_is_published_and_the_card_shows_the_pipeline(tmp_path):
    folder = save_image_text(tmp_path / "run")
    metrics = {"top1": 0.5, "image_to_text_r1": 0.25}
    record = {"method": "image_text", "metrics": metrics, "data": {"source": "scenes:captions", "num_examples": 9}}
    (folder / "run.json").write_text(json.dumps(record))
    (folder / "recipe.yaml").write_text("method: image_text")
    files = model_files(folder)
    assert {"tokenizer.json", "tokenizer_config.json", "modeling_image_text.py", "modeling_vlm_vit.py"} <= set(files)
    text = write_model_card(folder, repo_id="me/my-search").read_text()
    assert 'pipeline("zero-shot-image-classification", model="me/my-search", trust_remote_code=True)' in text
    assert "| zero-shot accuracy | 0.500 |\n| captions found by an image (R@1) | 0.250 |" in text
    assert "9 images with their texts" in text
    assert "\n\n\n" not in text
    assert "None" not in text
    assert ModelCard(text).data.pipeline_tag == "zero-shot-image-classification"
