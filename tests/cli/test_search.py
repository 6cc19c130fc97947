"""`hf-vlm search` as a user types it, on what `hf-vlm embed` has written."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import save_image_text

from hf_vlm.cli.main import main
from hf_vlm.data.images import images_at
from hf_vlm.data.sources import open_source
from hf_vlm.features.loading import load_model
from hf_vlm.features.search import FeatureIndex
from hf_vlm.features.texts import embed_texts, load_tokenizer
from hf_vlm.models.modeling_vlm_vit import VLMViTModel
from hf_vlm.viz.search_sheet import search_sheet

EMBED = ("--data", "scenes:easy", "--split", "test", "--num_examples", "12")


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder with a model in `run`, and with the features of twelve scenes."""
    monkeypatch.chdir(tmp_path)
    save_image_text(tmp_path / "run")
    assert main(["embed", "run", *EMBED, "--save", "features.parquet"]) == 0
    return tmp_path


def pictures():
    return images_at(open_source("scenes:easy", "test", num_samples=12), range(12))


def expected_order(queries):
    """Images by falling cosine similarity to each query (n, dim), and the similarities, by a full sort."""
    loaded = load_model("run")
    pixel_values = loaded.processor(pictures(), return_tensors="pt", input_data_format="channels_last")
    with torch.no_grad():
        images = loaded.model.get_image_features(pixel_values["pixel_values"])
    return (queries(loaded, images) @ images.T).sort(dim=1, descending=True)


def test_words_find_the_nearest_images(index, capsys):
    words = ["two cats", "a black dog"]
    arguments = ["search", *words, "--index", "features.parquet", "--num_results", "3"]
    assert main([*arguments, "--json", "out/found.json", "--save", "out/found.png"]) == 0
    printed = capsys.readouterr().out
    found = json.loads((index / "out" / "found.json").read_text())
    expected = expected_order(lambda loaded, _: embed_texts(loaded.model, load_tokenizer(loaded.model), words))
    for query, order, values in zip(words, expected.indices, expected.values):
        assert [result["index"] for result in found[query]] == order[:3].tolist()
        assert [result["similarity"] for result in found[query]] == pytest.approx(values[:3].tolist(), abs=1e-5)
        assert f"{query}\n  {found[query][0]['similarity']:7.4f}  #{order[0]}\n" in printed
    assert "12 images were searched in " in printed
    stored = FeatureIndex(index / "features.parquet")
    results = stored.search(embed_texts(load_model("run").model, load_tokenizer(load_model("run").model), words), 3)
    with Image.open(index / "out" / "found.png") as picture:
        np.testing.assert_array_equal(picture, search_sheet(words, results, dict(enumerate(pictures()))))


def test_an_image_finds_itself_first(index, capsys):
    Image.fromarray(pictures()[7]).save(index / "photo.png")
    assert main(["search", "photo.png", "--index", "features.parquet", "--json", "found.json"]) == 0
    found = json.loads((index / "found.json").read_text())["photo.png"]
    order = expected_order(lambda _, images: images[7:8])
    assert [result["index"] for result in found] == order.indices[0, :10].tolist()
    assert (found[0]["index"], found[0]["similarity"]) == (7, pytest.approx(1, abs=1e-4))


def test_an_encoder_alone_is_searched_by_images_alone(index, capsys):
    Image.fromarray(pictures()[2]).save(index / "photo.png")
    assert main(["embed", "run", *EMBED, "--save", "plain.parquet", "--pooling", "both"]) == 0
    assert "12 images, 64 features each" in capsys.readouterr().out
    assert main(["search", "photo.png", "--index", "plain.parquet", "--num_results", "1"]) == 0
    assert "  1.0000  #2\n" in capsys.readouterr().out
    assert main(["search", "a cat", "--index", "plain.parquet"]) == 2
    assert "an encoder that knows no words (run): search it by an image" in capsys.readouterr().err


def test_what_a_user_mistypes_is_said_in_a_line(index, capsys):
    def refuse(message, *words):
        assert main(["search", *words]) == 2
        assert message in capsys.readouterr().err

    refuse("--index features.parket: there is no such file", "a cat", "--index", "features.parket")
    refuse("--num_results 0: at least 1", "a cat", "--index", "features.parquet", "--num_results", "0")
    refuse("found: name a picture file", "a cat", "--index", "features.parquet", "--save", "found")
    (index / "text.parquet").write_text("no table")
    refuse("text.parquet is no file of features", "a cat", "--index", "text.parquet")
    refuse("run/config.json is no file of features", "a cat", "--index", "run/config.json")
    encoder = VLMViTModel.from_pretrained("run")
    encoder.save_pretrained("encoder")
    load_model("run").processor.save_pretrained("encoder")
    refuse("other weights than those in encoder now", "a cat", "--index", "features.parquet", "--model", "encoder")
    save_image_text(index / "run")
    model = load_model("run").model
    torch.nn.init.zeros_(model.image_projection.weight)
    model.save_pretrained("run")
    refuse("holds features of other weights than those in run now", "a cat", "--index", "features.parquet")
