"""Batches against their examples."""

import torch

from hf_vlm.data.transforms.collate import collate_detection, collate_views, stack


def test_views_are_stacked():
    examples = [
        {"pixel_values": torch.randn(2, 3, 4, 5), "local_pixel_values": torch.randn(6, 3, 2, 2)} for _ in range(3)
    ]
    batch = collate_views(examples)
    assert set(batch) == {"pixel_values", "local_pixel_values"}
    assert batch["pixel_values"].shape == (3, 2, 3, 4, 5)
    for index, example in enumerate(examples):
        assert torch.equal(batch["pixel_values"][index], example["pixel_values"])
        assert torch.equal(batch["local_pixel_values"][index], example["local_pixel_values"])


def test_labels_become_a_tensor():
    batch = collate_views(
        [{"pixel_values": torch.full((3, 2, 2), value), "label": label} for value, label in ((0.5, 4), (1.5, 0))]
    )
    assert batch["labels"].dtype == torch.int64
    assert batch["labels"].tolist() == [4, 0]
    assert batch["pixel_values"][:, 0, 0, 0].tolist() == [0.5, 1.5]


def test_detection_labels_stay_apart():
    examples = [
        {
            "pixel_values": torch.full((3, 2, 2), float(n)),
            "labels": {"boxes": torch.rand(n, 4), "class_labels": torch.arange(n)},
        }
        for n in (2, 0, 1)
    ]
    batch = collate_detection(examples)
    assert batch["pixel_values"].shape == (3, 3, 2, 2)
    assert batch["pixel_values"][:, 0, 0, 0].tolist() == [2, 0, 1]
    assert batch["labels"] == [example["labels"] for example in examples]
    assert [len(labels["boxes"]) for labels in batch["labels"]] == [2, 0, 1]


def test_workers_stack_as_the_process_itself_does():
    tensors = [torch.randn(3, 4, 5), torch.randn(3, 4, 5), torch.randint(0, 255, (3, 4, 5), dtype=torch.uint8)]
    for chosen in (tensors[:2], tensors[2:]):
        (there,) = torch.utils.data.DataLoader(chosen, batch_size=2, num_workers=1, collate_fn=stack)
        assert torch.equal(there, torch.stack(chosen))
        assert there.is_shared()
        here = stack(chosen)
        assert torch.equal(here, there)
        assert not here.is_shared()


def labelled_examples():
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "pixel_values": torch.rand(3, 4, 4, generator=generator),
            "labels": {
                "boxes": torch.rand(n, 4, generator=generator),
                "class_labels": torch.randint(0, 9, (n,), generator=generator),
                "image_id": torch.tensor([n]),
            },
        }
        for n in (2, 0, 1, 3)
    ]


def test_labels_arrive_from_workers_as_the_process_itself_makes_them():
    examples = labelled_examples()
    loaders = [
        torch.utils.data.DataLoader(examples, batch_size=2, num_workers=workers, collate_fn=collate_detection)
        for workers in (0, 2)
    ]
    batches = list(zip(*loaders))
    assert len(batches) == 2
    for index, (here, there) in enumerate(batches):
        assert torch.equal(there["pixel_values"], here["pixel_values"])
        assert type(there["labels"]) is list
        for example, ours, theirs in zip(examples[2 * index :], here["labels"], there["labels"], strict=False):
            assert list(theirs) == list(ours) == list(example["labels"])
            for name, value in example["labels"].items():
                assert torch.equal(ours[name], value)
                assert torch.equal(theirs[name], value)
                assert theirs[name].dtype == value.dtype
                assert not theirs[name].is_shared()  # no file of its own
                theirs[name] += 1  # may be written to


def test_masks_arrive_from_workers_in_shared_memory_and_run_lengths_as_they_are():
    masks = torch.rand(3, 200, 200) < 0.5
    labels = {"masks": masks, "segmentation": [{"size": [2, 2], "counts": "13"}]}
    examples = [{"pixel_values": torch.zeros(3, 4, 4), "labels": labels}]
    (batch,) = torch.utils.data.DataLoader(examples, batch_size=1, num_workers=1, collate_fn=collate_detection)
    assert torch.equal(batch["labels"][0]["masks"], masks)
    assert batch["labels"][0]["masks"].is_shared()
    assert batch["labels"][0]["segmentation"] == labels["segmentation"]
