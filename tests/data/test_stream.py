"""The stream against a plain-python version of its algorithm, and resuming at every position."""

import io
import itertools
import json
import logging

import datasets
import numpy as np
import pytest
from PIL import Image
from torchdata.stateful_dataloader import StatefulDataLoader

from hf_vlm.data.io.decode import BadImageError, decode_image
from hf_vlm.data.stream import ExampleStream

SHARDS = [[0, 1, 2, 3, 4], [5], [6, 7, 8, 9], [10, 11, 12, 13, 14, 15, 16], [17, 18], [19, 20, 21, 22]]  # uneven
ALL = sorted(itertools.chain(*SHARDS))

pytestmark = [
    # One core is enough for these tests, and a warning on machines that have no more.
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),
    # torchdata 0.11 calls what torch 2.13 deprecates.
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated"),
]


def generate(shards):
    for shard in shards:
        for image_id in shard:
            yield {"image": {"bytes": b"%d" % image_id, "path": None}, "image_id": image_id}


def make_source(shards=SHARDS):
    features = datasets.Features({"image": datasets.Image(decode=False), "image_id": datasets.Value("int64")})
    return datasets.IterableDataset.from_generator(generate, features=features, gen_kwargs={"shards": shards})


def sample(example, rng):
    assert example["image"]["bytes"] == b"%d" % example["image_id"]
    return {"id": example["image_id"], "number": rng.random()}


def make_stream(source=None, **options):
    return ExampleStream(source or make_source(), sample, **{"seed": 3, "block_size": 4, **options})


def pairs(examples):
    return [(example["id"], example["number"]) for example in examples]


def ids(examples):
    return [example["id"] for example in examples]


def reference(shards, *, seed, epoch, block_size, index=0, count=1, shuffle=True):
    """The documented algorithm for one consumer and one epoch."""
    first = epoch * sum(map(len, shards))
    shards = list(shards)
    divided = count > 1 and len(shards) % count == 0
    if shuffle:
        np.random.default_rng(int(np.random.default_rng((1, seed, epoch)).integers(1, 2**31))).shuffle(shards)
    examples = list(itertools.chain(*(shards[index::count] if divided else shards)))
    for block, start in enumerate(range(0, len(examples), block_size)):
        block_examples = examples[start : start + block_size]
        order = range(len(block_examples))
        if shuffle:
            key = (2, seed, epoch, block, index if divided else 0)
            order = np.random.default_rng(key).permutation(len(block_examples))
        for offset, chosen in enumerate(order):
            position = start + offset
            if divided:
                position = position * count + index
            elif (first + position) % count != index:
                continue
            yield block_examples[chosen], np.random.default_rng((3, seed, epoch, position)).random()


@pytest.mark.parametrize(("index", "count"), [(0, 1), (0, 2), (1, 2), (2, 3), (3, 4)])  # 6 shards: 4 does not divide
@pytest.mark.parametrize("block_size", [1, 4, 1000])
@pytest.mark.parametrize("shuffle", [True, False])
def test_order_and_random_numbers_follow_the_documented_algorithm(index, count, block_size, shuffle):
    stream = make_stream(block_size=block_size, rank=index, world_size=count, shuffle=shuffle)
    options = {"seed": 3, "block_size": block_size, "index": index, "count": count, "shuffle": shuffle}
    expected = [pair for epoch in range(3) for pair in reference(SHARDS, epoch=epoch, **options)]
    assert pairs(itertools.islice(stream, len(expected))) == expected


def test_epochs_and_seeds_differ():
    stream = make_stream()
    both = ids(itertools.islice(stream, 2 * len(ALL)))
    first, second = both[: len(ALL)], both[len(ALL) :]
    assert sorted(first) == sorted(second) == ALL
    assert first != second
    assert first != ids(itertools.islice(make_stream(seed=4), len(ALL)))
    assert first == ids(itertools.islice(make_stream(), len(ALL)))


@pytest.mark.parametrize("num_workers", [0, 1, 2])
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("shards", [SHARDS, SHARDS[:5]], ids=["6 shards", "5 shards"])
def test_all_consumers_together_see_each_example_once(shards, world_size, num_workers):
    seen = []
    for rank in range(world_size):
        stream = make_stream(make_source(shards), repeat=False, rank=rank, world_size=world_size)
        loader = StatefulDataLoader(stream, batch_size=2, num_workers=num_workers, collate_fn=list)
        seen += ids(itertools.chain(*loader))
    assert sorted(seen) == sorted(itertools.chain(*shards))


def test_without_shuffling_the_order_is_the_sources():
    assert ids(make_stream(shuffle=False, repeat=False)) == ALL
    parts = [
        ids(make_stream(make_source(SHARDS[:5]), shuffle=False, repeat=False, rank=rank, world_size=2))
        for rank in (0, 1)
    ]
    assert parts == [list(range(0, 19, 2)), list(range(1, 19, 2))]


def test_two_ranks_see_together_what_one_rank_sees_in_double_batches():
    source, num_batches, batch_size = make_source(SHARDS[:5]), 12, 3
    alone = pairs(itertools.islice(make_stream(source), num_batches * 2 * batch_size))
    ranks = [
        pairs(itertools.islice(make_stream(source, rank=rank, world_size=2), num_batches * batch_size))
        for rank in (0, 1)
    ]
    for batch in range(num_batches):
        together = [pair for rank in ranks for pair in rank[batch * batch_size : (batch + 1) * batch_size]]
        assert sorted(together) == sorted(alone[batch * 2 * batch_size : (batch + 1) * 2 * batch_size])


@pytest.mark.parametrize(("before", "after"), [(4, 1), (4, 2), (2, 4), (1, 3), (3, 4)])
@pytest.mark.parametrize("steps", [1, 2, 3])  # within the first epoch of 19 examples, and beyond it
def test_other_ranks_continue_where_ranks_stopped(before, after, steps):
    source, batch = make_source(SHARDS[:5]), 12
    alone = pairs(itertools.islice(make_stream(source), (steps + 3) * batch))
    states = []
    for rank in range(before):
        stream = make_stream(source, rank=rank, world_size=before)
        list(itertools.islice(stream, steps * batch // before))
        states.append(json.loads(json.dumps(stream.state_dict())))
    ranks = [make_stream(source, rank=rank, world_size=after) for rank in range(after)]
    assert all(stream.start_after(states, num_workers=0) for stream in ranks)
    iterators = [iter(stream) for stream in ranks]
    for step in range(steps, steps + 3):
        together = [pair for each in iterators for pair in pairs(itertools.islice(each, batch // after))]
        assert sorted(together) == sorted(alone[step * batch : (step + 1) * batch])


def test_ranks_that_came_to_no_one_position_cannot_be_followed():
    def states(count, source, num_read):
        streams = [make_stream(source, rank=rank, world_size=count) for rank in range(count)]
        for stream, number in zip(streams, num_read):
            list(itertools.islice(stream, number))
        return [stream.state_dict() for stream in streams]

    source = make_source(SHARDS[:5])
    even = states(2, source, [3, 3])
    alone = make_stream(source)
    assert alone.start_after(even, num_workers=0)
    assert not alone.start_after(states(2, source, [4, 2]), num_workers=0)  # two bad images more on one of them
    assert not alone.start_after(even[:1], num_workers=0)
    assert not make_stream(source, seed=4).start_after(even, num_workers=0)
    assert not alone.start_after(even, num_workers=5)  # which would divide the shards
    divided = make_source(SHARDS[:4])
    assert not make_stream(divided).start_after(states(2, divided, [3, 3]), num_workers=0)


@pytest.mark.parametrize(("world_size", "num_shards"), [(1, 6), (2, 6), (2, 5)])
def test_streams_over_one_source_do_not_disturb_each_other(world_size, num_shards):
    source = make_source(SHARDS[:num_shards])
    streams = [make_stream(source, rank=rank, world_size=world_size) for rank in range(world_size)]
    streams.append(make_stream(source, seed=8, shuffle=False))
    expected = [pairs(itertools.islice(stream, 30)) for stream in streams]
    iterators = [iter(stream) for stream in streams]
    rounds = [[next(iterator) for iterator in iterators] for _ in range(30)]
    assert [pairs(column) for column in zip(*rounds)] == expected


def arrow_source():
    table = {"image": [{"bytes": b"%d" % i, "path": None} for i in ALL], "image_id": ALL}
    features = datasets.Features({"image": datasets.Image(decode=False), "image_id": datasets.Value("int64")})
    return datasets.Dataset.from_dict(table, features=features).to_iterable_dataset(num_shards=5)


def is_not_every_fifth(image_id):
    return image_id % 5 != 0


def same(example):
    return example


SOURCES = {
    "generator": make_source,
    "arrow": arrow_source,
    "map": lambda: make_source().map(same, features=make_source().features),
    "filter": lambda: make_source().filter(is_not_every_fifth, input_columns="image_id"),
    "arrow, filter, map": lambda: arrow_source().filter(is_not_every_fifth, input_columns="image_id").map(same),
    "take": lambda: arrow_source().take(17),
    "batched map": lambda: arrow_source().map(same, batched=True, batch_size=3),
    "columns": lambda: arrow_source().select_columns(["image_id", "image"]),
}


@pytest.mark.parametrize(("name", "step"), [(name, 1 if name in ("generator", "take") else 3) for name in SOURCES])
def test_resumes_at_every_position_twice_in_a_row(name, step):
    length = 32  # one epoch and a part of the next
    whole = pairs(itertools.islice(make_stream(SOURCES[name]()), length))
    for position in range(0, length - 6, step):
        stream = make_stream(SOURCES[name]())
        pairs(itertools.islice(stream, position))
        for start in (position, position + 3):
            state = json.loads(json.dumps(stream.state_dict()))
            stream = make_stream(SOURCES[name]())
            stream.load_state_dict(state)
            assert stream.state_dict() == state  # also before the first example
            assert pairs(itertools.islice(stream, 3)) == whole[start : start + 3]
        stream.load_state_dict(state)
        assert pairs(itertools.islice(stream, length - start)) == whole[start:]


def test_an_ended_stream_stays_ended_when_resumed_and_starts_anew_otherwise():
    stream = make_stream(repeat=False)
    first = pairs(stream)
    state = stream.state_dict()
    resumed = make_stream(repeat=False)
    resumed.load_state_dict(state)
    assert pairs(resumed) == []
    assert pairs(resumed) == first


@pytest.mark.parametrize(("name", "num_workers"), [("generator", 0), ("arrow", 0), ("arrow", 2)])
def test_loader_resumes_twice_in_a_row(name, num_workers):
    def loader():
        return StatefulDataLoader(make_stream(SOURCES[name]()), batch_size=3, num_workers=num_workers, collate_fn=list)

    whole = [pairs(batch) for batch in itertools.islice(loader(), 24)]
    for first, second in ((0, 5), (1, 1), (7, 10)):
        current = loader()
        batches = iter(current)
        seen = [pairs(next(batches)) for _ in range(first)]
        for length in (second, 24 - first - second):
            state = json.loads(json.dumps(current.state_dict()))
            current = loader()
            current.load_state_dict(state)
            batches = iter(current)
            seen += [pairs(next(batches)) for _ in range(length)]
        assert seen == whole


def test_loader_over_one_epoch_can_be_iterated_again():
    stream = make_stream(repeat=False)
    for persistent in (True, False):
        loader = StatefulDataLoader(
            stream, batch_size=4, num_workers=1, collate_fn=list, persistent_workers=persistent
        )
        first = pairs(itertools.chain(*loader))
        assert sorted(example_id for example_id, _ in first) == ALL
        assert pairs(itertools.chain(*loader)) == first


def test_state_is_small_however_long_the_stream():
    shards = [list(range(start, start + 100)) for start in range(0, 3000, 100)]
    stream = make_stream(make_source(shards), block_size=256)
    iterator = iter(stream)
    sizes = []
    for _ in range(4):
        pairs(itertools.islice(iterator, 1000))
        sizes.append(len(json.dumps(stream.state_dict())))
    assert max(sizes) < 1000


def test_resuming_reads_one_block_again_and_no_more():
    read = []

    def generate_counted(shards):
        for image_id in shards:
            read.append(image_id)
            yield {"image_id": image_id}

    def source():
        features = datasets.Features({"image_id": datasets.Value("int64")})
        return datasets.IterableDataset.from_generator(
            generate_counted, features=features, gen_kwargs={"shards": list(range(60))}
        )

    def take_id(example, rng):
        return {"id": example["image_id"]}

    stream = ExampleStream(source(), take_id, block_size=10)
    expected = ids(itertools.islice(stream, 46))[45:]
    stream = ExampleStream(source(), take_id, block_size=10)
    ids(itertools.islice(stream, 45))
    state = stream.state_dict()
    resumed = ExampleStream(source(), take_id, block_size=10)
    resumed.load_state_dict(state)
    read.clear()
    assert ids(itertools.islice(resumed, 1)) == expected
    assert len(read) <= 11  # and the one example of the shard that the block before ended in


def test_a_taken_subset_does_not_depend_on_the_number_of_consumers():
    seen = []
    for rank in (0, 1):
        seen += ids(make_stream(make_source().take(7), repeat=False, rank=rank, world_size=2))
    assert sorted(seen) == ALL[:7]
    seen = []
    for rank in (0, 1):
        skipped = make_source().skip(7).select_columns(["image", "image_id"])
        seen += ids(make_stream(skipped, repeat=False, rank=rank, world_size=2))
    assert sorted(seen) == ALL[7:]


@pytest.mark.parametrize("repeat", [True, False])
def test_empty_source_is_an_error(repeat):
    with pytest.raises(ValueError, match="gives no example"):
        next(iter(make_stream(make_source([[], []]), repeat=repeat)))


def test_a_consumer_that_would_wait_forever_is_an_error():
    stream = make_stream(make_source([[0], [1], []]), shuffle=False, rank=2, world_size=3)
    with pytest.raises(ValueError, match="consumer 2 of 3"):
        next(iter(stream))


def test_fewer_examples_than_consumers():
    source = make_source([[0, 1]])
    ranks = [make_stream(source, shuffle=False, rank=rank, world_size=3) for rank in range(3)]
    assert [ids(itertools.islice(stream, 4)) for stream in ranks] == [[0, 1, 0, 1], [1, 0, 1, 0], [0, 1, 0, 1]]
    ends = [make_stream(source, shuffle=False, repeat=False, rank=rank, world_size=3) for rank in range(3)]
    assert [ids(stream) for stream in ends] == [[0], [1], []]


@pytest.mark.parametrize(
    ("options", "named"),
    [({"block_size": 5}, "block_size 4"), ({"seed": 9}, "seed 3"), ({"world_size": 2}, "num_consumers 1")],
)
def test_a_state_of_another_layout_is_an_error(options, named):
    stream = make_stream()
    next(iter(stream))
    other = make_stream(**options)
    other.load_state_dict(stream.state_dict())
    with pytest.raises(ValueError, match=named):
        iter(other)


@pytest.mark.parametrize(
    "options",
    [{"seed": -1}, {"block_size": 0}, {"rank": 2, "world_size": 2}, {"rank": -1}, {"max_bad_fraction": 1.5}],
)
def test_options_out_of_range_are_errors(options):
    with pytest.raises(ValueError, match=r"seed|block_size|rank|max_bad_fraction"):
        make_stream(**options)


def bad_every(n):
    def transform(example, rng):
        if example["image_id"] % n == 0:
            raise BadImageError("broken")
        return sample(example, rng)

    return transform


def test_bad_images_are_skipped_counted_and_named(caplog):
    shards = [list(range(start, start + 100)) for start in (0, 100)]
    stream = ExampleStream(make_source(shards), bad_every(10), repeat=False, max_bad_fraction=0.2)
    with caplog.at_level(logging.WARNING):
        seen = ids(stream)
    assert sorted(seen) == [image_id for image_id in range(200) if image_id % 10]
    assert len(caplog.records) == 10  # of 20
    assert all("broken" in record.getMessage() and "image_id" in record.getMessage() for record in caplog.records)
    progress = stream.state_dict()["progress"]
    assert (progress["num_seen"], progress["num_bad"]) == (200, 20)


def test_others_keep_their_random_numbers_when_an_image_is_bad():
    whole = dict(pairs(make_stream(repeat=False)))
    stream = ExampleStream(make_source(), bad_every(4), seed=3, block_size=4, repeat=False, max_bad_fraction=1.0)
    assert dict(pairs(stream)) == {image_id: sampled for image_id, sampled in whole.items() if image_id % 4}


def test_too_many_bad_images_stop_the_stream():
    shards = [list(range(200))]
    stream = ExampleStream(make_source(shards), bad_every(20), shuffle=False, max_bad_fraction=0.02)
    seen = []
    with pytest.raises(ValueError, match=r"of 101 images.*image_id 0, image_id 20.*max_bad_fraction") as error:
        seen.extend(stream)
    assert isinstance(error.value, ValueError)
    assert not isinstance(error.value, BadImageError)
    assert len(seen) == 95  # the first hundred are given a chance
    # With few images the fraction is checked at the end of the epoch.
    few = ExampleStream(make_source([list(range(1, 41))]), bad_every(20), max_bad_fraction=0.02)
    with pytest.raises(ValueError, match="2 of 40 images"):
        list(few)


def test_nothing_but_bad_images_is_an_error_even_where_all_may_be_bad():
    with pytest.raises(ValueError, match="none of their images can be decoded"):
        next(iter(ExampleStream(make_source(), bad_every(1), max_bad_fraction=1.0)))


def test_truncated_jpeg_is_skipped(caplog):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(buffer, "JPEG")
    good = buffer.getvalue()
    rows = [
        {"bytes": good, "path": "a.jpg"},
        {"bytes": good[:20], "path": "broken.jpg"},
        {"bytes": good, "path": "c.jpg"},
    ]
    features = datasets.Features({"image": datasets.Image(decode=False), "image_id": datasets.Value("int64")})
    source = datasets.Dataset.from_dict(
        {"image": rows, "image_id": [0, 1, 2]}, features=features
    ).to_iterable_dataset()

    def transform(example, rng):
        return {"id": example["image_id"], "shape": decode_image(example["image"])[0].shape}

    stream = ExampleStream(source, transform, shuffle=False, repeat=False, max_bad_fraction=0.5)
    assert [(example["id"], example["shape"]) for example in stream] == [(0, (16, 16, 3)), (2, (16, 16, 3))]
    assert "broken.jpg" in caplog.text
    strict = ExampleStream(source, transform, shuffle=False, repeat=False)
    with pytest.raises(ValueError, match=r"1 of 3 images.*broken\.jpg"):
        list(strict)
