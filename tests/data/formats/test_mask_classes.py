"""A text file beside the data names the values of their masks."""

import datasets
import pytest

from hf_vlm.data.sources import open_source

NAMES = ("background", *"01234")


@pytest.fixture
def folder(tmp_path):
    scenes = open_source("scenes:easy", num_samples=2)
    dataset = datasets.Dataset.from_list(list(scenes), features=scenes.features)
    dataset.select_columns(["image", "mask"]).to_parquet(tmp_path / "train.parquet")
    return tmp_path


def test_names_are_read_for_a_folder_and_for_a_file_in_it(folder):
    assert open_source(folder).mask_names is None
    (folder / "mask_classes.txt").write_text("\n".join(NAMES) + "\n\n")
    for source in (folder, folder / "train.parquet", f"file://{folder}"):
        assert open_source(source).mask_names == list(NAMES)


def test_names_of_data_without_masks_are_not_read(folder):
    (folder / "mask_classes.txt").write_text("")
    datasets.load_dataset("parquet", data_files=str(folder / "train.parquet"), split="train").remove_columns(
        "mask"
    ).to_parquet(folder / "train.parquet")
    assert open_source(folder).mask_class_names is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("sky\n\nroad\n", r"mask_classes.txt: line 2 is empty"),
        ("\n", r"mask_classes.txt: line 1 is empty"),
        ("sky\nroad\nsky\n", r"mask_classes.txt names sky more than once"),
    ],
)
def test_files_that_do_not_name_each_value_once_are_refused(folder, text, words):
    (folder / "mask_classes.txt").write_text(text)
    with pytest.raises(ValueError, match=words):
        open_source(folder)
