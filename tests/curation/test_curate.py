"""`hf-vlm curate` as a user types it: what is dropped and why, what is written, and what a killed run leaves."""

import contextlib
import io
import json
import sys
import tarfile

import numpy as np
import pyarrow.parquet as pq
import pytest
from curated_data import REASONS, encoded, picture
from PIL import Image
from sample_data import png

from hf_vlm.cli.main import main
from hf_vlm.curation import work as work_module
from hf_vlm.curation.run import datatrove_executors, run_locally
from hf_vlm.curation.selection import reasons_of
from hf_vlm.curation.stages import STAGES, steps_of
from hf_vlm.curation.work import CurationOptions, open_work
from hf_vlm.data.io.decode import decode_image
from hf_vlm.data.sources import open_source
from hf_vlm.data.stream import ExampleStream
from hf_vlm.features.embedding import embed_images
from hf_vlm.models.configuration_vlm_vit import VLMViTConfig
from hf_vlm.models.image_processing_vlm_vit import VLMViTImageProcessor
from hf_vlm.models.modeling_vlm_vit import VLMViTModel

OPTIONS = CurationOptions(min_sharpness=20, images_per_shard=10)
KEPT = [row for row in range(36) if row not in REASONS]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.glob("train-*")}


def test_each_image_is_dropped_for_its_reason(shards, tmp_path, capsys):
    output = tmp_path / "out"
    command = ["curate", str(shards), str(output), "--min_sharpness", "20", "--images_per_shard", "10"]
    assert main(command) == 0
    assert f"{len(KEPT)} of 36 images are kept" in capsys.readouterr().out
    work = open_work(str(shards), output, options=OPTIONS)
    reasons = np.concatenate([reasons_of(work, shard) for shard in range(3)])
    assert {row: int(reasons[row]) for row in np.flatnonzero(reasons)} == REASONS
    rows = [row for path in sorted(output.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]
    before = [row for path in sorted(shards.iterdir()) for row in pq.read_table(path).to_pylist()]
    assert rows == [before[row] for row in KEPT]
    values = json.loads((output / "report.json").read_text())
    assert values["num_kept"] == len(KEPT)
    assert values["dropped"]["near duplicate"] == 4
    pairs = [
        [12 * int(image["shard"][-len("0.parquet")]) + image["row"] for image in pair]
        for pair in values["examples"]["near duplicate"]
    ]
    assert pairs == [[9, 31], [20, 1], [21, 2], [30, 4]]
    page = (output / "report.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 2 * 6 + 4  # of the unreadable image there is none
    # Stopped or ended, the same command continues, and others are refused.
    assert main(command) == 0
    assert main([*command[:-1], "9"]) == 2
    assert "images_per_shard 10 (now 9)" in capsys.readouterr().err
    assert main(["curate", str(shards), str(shards)]) == 2
    assert "holds something else" in capsys.readouterr().err


def test_shards_stream_exactly(shards, tmp_path):
    run_locally(open_work(str(shards), tmp_path / "out", options=OPTIONS))
    source = open_source(tmp_path / "out")
    assert (source.num_examples, source.label_names) == (len(KEPT), ["a", "b"])

    def number(example, rng):
        return {"sum": int(decode_image(example["image"])[0].sum(dtype=np.int64)), "label": example["label"]}

    def read(state=None, **options):
        stream = ExampleStream(source.dataset, number, repeat=False, block_size=4, **options)
        if state is not None:
            stream.load_state_dict(state)
        return stream

    images = [decode_image(encoded(picture(row)))[0].sum(dtype=np.int64) for row in KEPT if row not in (3, 31)]
    alone = [example["sum"] for example in read()]
    assert len(set(alone)) == len(KEPT)
    assert set(images) <= set(alone)
    assert sorted(alone) == sorted(example["sum"] for rank in (0, 1) for example in read(rank=rank, world_size=2))
    begun = read()
    first = [example["sum"] for _, example in zip(range(7), begun)]
    assert first + [example["sum"] for example in read(begun.state_dict())] == alone


def test_killed_at_every_file_it_writes_what_ranks_of_a_cluster_do(shards, tmp_path, monkeypatch):
    options = CurationOptions(min_sharpness=20, images_per_shard=10, num_images=13)
    ranks = open_work(str(shards), tmp_path / "ranks", options=options)
    with pytest.raises(ValueError, match="3 units of the stage 'measure' are not done"):
        steps_of(ranks)[1]()
    for step in steps_of(ranks)[:-1]:  # all but the report
        for rank in (2, 0, 1):
            step(None, rank, 3)
    assert sum(pq.read_metadata(path).num_rows for path in ranks.folder.glob("*.parquet")) == 13
    monkeypatch.setattr("hf_vlm.curation.run.STAGES", STAGES[:-1])
    written, begun = work_module.replaced_file, []

    @contextlib.contextmanager
    def killed_once(path):
        if path not in begun:
            begun.append(path)
            path.with_name(f"{path.name}.tmp").write_bytes(b"half")
            raise KeyboardInterrupt
        with written(path) as file:
            yield file

    monkeypatch.setattr("hf_vlm.curation.work.replaced_file", killed_once)
    monkeypatch.setattr("hf_vlm.curation.writing.replaced_file", killed_once)
    is_killed = True
    while is_killed:
        work = open_work(str(shards), tmp_path / "killed", options=options)
        try:
            run_locally(work)
            is_killed = False
        except KeyboardInterrupt:
            pass
    assert len(begun) == sum(stage.num_units(work) for stage in STAGES[:-1])
    assert contents(work.folder) == contents(ranks.folder)


def test_all_files_of_a_sample_stay_together(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "classes.txt").write_text("cat\ndog\n")
    for shard in range(2):
        with tarfile.open(tmp_path / "data" / f"train-{shard}.tar", "w") as tar:
            for row in range(6):
                seed = 0 if row == 3 else 6 * shard + row
                files = {"png": encoded(picture(seed)), "cls": b"%d" % (row % 2), "notes.md": b"%d" % seed}
                for extension, data in ({"alone.md": b""} if row == 4 else files).items():
                    member = tarfile.TarInfo(f"{row:03d}.{extension}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    work = open_work(str(tmp_path / "data"), tmp_path / "out", options=CurationOptions(images_per_shard=4))
    run_locally(work)
    source = open_source(tmp_path / "out")
    examples = list(source)
    seeds = [0, 1, 2, 5, 6, 7, 8, 11]
    assert len({example["image_id"] for example in examples}) == len(seeds)
    for seed, example in zip(seeds, examples, strict=True):
        np.testing.assert_array_equal(decode_image(example["image"])[0], picture(seed))
        assert example["label"] == seed % 6 % 2
    assert source.label_names == ["cat", "dog"]
    with tarfile.open(tmp_path / "out" / "train-00001-of-00002.tar") as tar:
        names = [name for name in tar.getnames() if name.endswith("notes.md")]
        assert [int(tar.extractfile(name).read()) for name in names] == seeds[4:]


def test_an_encoder_gives_the_features(shards, tmp_path):
    config = VLMViTConfig(image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    encoder, processor = VLMViTModel(config), VLMViTImageProcessor(size={"height": 32, "width": 32})
    encoder.save_pretrained(tmp_path / "encoder")
    processor.save_pretrained(tmp_path / "encoder")
    options = CurationOptions(encoder=str(tmp_path / "encoder"), similarity=0.9999)
    work = open_work(str(shards), tmp_path / "out", options=options)
    STAGES[0].run(work, 0)
    features, reason = work.load("measure", 0, "features", "reason")
    expected = embed_images(encoder, [picture(row) for row in (1, 2)], processor)
    expected /= expected.norm(dim=1, keepdim=True)
    np.testing.assert_allclose(features[[1, 2]], expected, atol=1e-3)
    assert reason[5] == REASONS[5]
    assert not features[5].any()


def test_what_cannot_be_curated(tmp_path, capsys):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(png(0))
    Image.new("RGB", (9, 9)).save(tmp_path / "b.png")
    for data, message in {
        tmp_path / "images": "neither Parquet files nor tars",
        tmp_path / "b.png": "give Parquet files or WebDataset tars",
        tmp_path / "none.tar": "does not exist",
    }.items():
        assert main(["curate", str(data), str(tmp_path / "out")]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_shards_of_other_columns_are_found_before_the_work(shards, tmp_path):
    pq.write_table(pq.read_table(shards / "train-1.parquet").drop_columns("label"), shards / "train-1.parquet")
    with pytest.raises(ValueError, match=r"train-1\.parquet and .*train-0\.parquet differ in their columns"):
        STAGES[0].run(open_work(str(shards), tmp_path / "out", options=OPTIONS), 1)


def test_clusters_that_are_not_there(shards, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "datatrove.executor", None)
    command = ["curate", str(shards), str(tmp_path / "out"), "--executor", "slurm"]
    assert main(command) == 2
    assert 'pip install "hf_vlm[curate]"' in capsys.readouterr().err
    assert main([*command, "--executor_options", "[1]"]) == 2
    assert "--executor_options [1]: give an object" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_and_datatrove_write_what_one_does(shards, tmp_path):
    names = ("alone", "processes", "datatrove")
    alone, processes, cluster = (open_work(str(shards), tmp_path / name, options=OPTIONS) for name in names)
    run_locally(alone)
    run_locally(processes, num_workers=2)
    assert contents(processes.folder) == contents(alone.folder)
    pytest.importorskip("datatrove")
    executors = datatrove_executors(cluster, "local", num_tasks=2, options={"workers": 1})
    executors[-1].run()
    assert contents(cluster.folder) == contents(alone.folder)
