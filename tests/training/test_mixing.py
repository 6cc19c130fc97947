"""Batches are mixed in the first part of training alone, and in a resumed run as in one without interruption."""

import pytest
import torch
from killed_run import KillAt, KilledError
from safetensors.torch import load_file

from hf_vlm.data.transforms.detection_mixing import DetectionMixing
from hf_vlm.training.run import finetune
from hf_vlm.training.trainer import VisionTrainer


@pytest.fixture
def mixed(monkeypatch):
    """The first random number of each batch that is mixed."""
    original, found = DetectionMixing.__call__, []

    def call(self, batch, rng):
        state = rng.bit_generator.state
        found.append(rng.random())
        rng.bit_generator.state = state
        return original(self, batch, rng)

    monkeypatch.setattr(DetectionMixing, "__call__", call)
    return found


def test_a_resumed_run_mixes_the_same_batches_in_the_same_way(make_recipe, monkeypatch, mixed):
    augmentation = {"mosaic_probability": 0.7, "copy_paste_probability": 0.7, "mixed_fraction": 0.6}
    options = {"max_steps": 5, "gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 1}
    recipe = make_recipe("detection", augmentation=augmentation, **options)
    whole, resumed = ({**recipe, "output_dir": f"{recipe['output_dir']}-{name}"} for name in ("whole", "resumed"))
    finetune(whole)
    assert len(set(mixed)) == 6  # 3 steps of 2 batches
    expected = mixed.copy()
    mixed.clear()
    original = VisionTrainer.__init__
    with monkeypatch.context() as patch:

        def init(self, *args, **kwargs):
            original(self, *args, **kwargs)
            self.add_callback(KillAt(2))

        patch.setattr(VisionTrainer, "__init__", init)
        with pytest.raises(KilledError):
            finetune(resumed)
    finetune({**resumed, "resume_from_checkpoint": "last"})
    assert mixed == [*expected[:4], *expected[2:]]  # killed before step 2 was saved
    weights = [load_file(f"{run['output_dir']}/model.safetensors") for run in (whole, resumed)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_objects_with_masks_are_not_mixed(make_recipe):
    with pytest.raises(ValueError, match="mosaic_probability and copy_paste_probability are for detection"):
        finetune(make_recipe("instance_segmentation", augmentation={"mosaic_probability": 0.5}))
