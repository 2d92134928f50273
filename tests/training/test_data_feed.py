import dataclasses
import itertools
import multiprocessing

import numpy as np
import pytest

from jasmine.data.opening import open_dataset
from jasmine.data.sampling import WindowSampler
from jasmine.data.tokens import EncoderInfo, TokenInfo
from jasmine.training.config import TrainConfig
from jasmine.training.data_feed import DataFeed, abstract_batch
from jasmine.training.mesh import MeshConfig, make_mesh
from jasmine.training.sharding import ShardingRules
from jasmine.training.task import DataInfo
from tests import jobs


@pytest.fixture(scope="module")
def dataset(tiny_data):
    return open_dataset(str(tiny_data), "train")


@pytest.mark.parametrize("mesh", [MeshConfig(), MeshConfig(fsdp=2, tensor=2), MeshConfig(data=1, tensor=8)])
def test_batches_on_the_devices_are_those_of_the_step(dataset, mesh):
    config = TrainConfig(data_dir="unused", batch_size=8, seq_len=4)
    feed = DataFeed(dataset, config, make_mesh(mesh), ShardingRules(), seed=3, start_step=5)
    sampler = WindowSampler(dataset.lengths, 4, 3)
    try:
        for step, batch in zip(range(5, 9), itertools.islice(feed, 4), strict=True):
            videos, actions = dataset.read_windows(*sampler.windows(step, 8), 4)
            np.testing.assert_array_equal(batch["videos"], videos)
            np.testing.assert_array_equal(batch["actions"], actions)
            assert batch["videos"].dtype == np.uint8
    finally:
        feed.close()


@dataclasses.dataclass(frozen=True)
class HalfLabelled(TrainConfig):
    def labelled_share(self) -> float:
        return 0.5


@pytest.mark.parametrize("config_class", [TrainConfig, HalfLabelled])
def test_a_batch_is_known_before_there_is_one(dataset, config_class):
    config, mesh, rules = (
        config_class(data_dir="unused", batch_size=8, seq_len=4),
        make_mesh(MeshConfig(fsdp=2)),
        ShardingRules(),
    )
    feed = DataFeed(dataset, config, mesh, rules, seed=0)
    try:
        batch = next(feed)
    finally:
        feed.close()
    expected = abstract_batch(DataInfo.of(dataset), config, mesh, rules)
    assert {name: (x.shape, x.dtype, x.sharding) for name, x in batch.items()} == {
        name: (x.shape, x.dtype, x.sharding) for name, x in expected.items()
    }
    assert ("labelled" in expected) == (config_class is HalfLabelled)


@pytest.mark.parametrize("kind", ["tokens", "latents"])
def test_a_batch_of_tokens_is_known_before_there_is_one(kind):
    maker = EncoderInfo("run", "train_tokenizer_vqvae", 1, "hash", {})
    shape, dtype = ((5,), "uint16") if kind == "tokens" else ((5, 3), "float32")
    tokens = TokenInfo(kind, dtype, shape, 4, 1, (16, 16, 3), (), maker, maker)
    stored = tokens.pack(np.zeros((8, 4, *shape)), np.zeros((8, 3)))
    read = tokens.unpack(stored) | {"actions": np.zeros((8, 4), np.int32)}
    config = TrainConfig(data_dir="unused", batch_size=8, seq_len=4)
    expected = abstract_batch(DataInfo((16, 16, 3), 6, tokens), config, make_mesh(MeshConfig()), ShardingRules())
    assert {name: (x.shape, x.dtype) for name, x in read.items()} == {
        name: (x.shape, x.dtype) for name, x in expected.items()
    }


def test_an_error_of_the_pipeline_reaches_the_loop(dataset, monkeypatch):
    def damaged(*_):
        raise OSError("the disk is gone")

    monkeypatch.setattr(type(dataset), "read_windows", damaged)
    feed = DataFeed(
        dataset,
        TrainConfig(data_dir="unused", batch_size=8, seq_len=4),
        make_mesh(MeshConfig()),
        ShardingRules(),
        seed=0,
    )
    with pytest.raises(OSError, match="the disk is gone"):
        next(feed)
    feed.close()


def test_worker_processes_give_the_same_batches_and_end_with_the_feed(dataset):
    config = TrainConfig(data_dir="unused", batch_size=8, seq_len=4, num_workers=2)
    feed = DataFeed(dataset, config, make_mesh(MeshConfig()), ShardingRules(), seed=3)
    try:
        videos, _ = dataset.read_windows(*WindowSampler(dataset.lengths, 4, 3).windows(0, 8), 4)
        np.testing.assert_array_equal(next(feed)["videos"], videos)
        assert len(multiprocessing.active_children()) >= 2
    finally:
        feed.close()
    jobs.wait_until(lambda: not multiprocessing.active_children(), 30, "the workers to end")
