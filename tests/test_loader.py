"""acorn/data/loader.py: the micro-batches of an update on each rank, and the prefetch thread."""

import os
import threading

import numpy as np
import pytest
import torch

from acorn import UserError
from acorn.data.batches import number_documents
from acorn.data.loader import make_batch, prefetch, updates
from acorn.data.mixture import Mixture
from acorn.data.shards import MaskWriter, ShardWriter, Tokens, open_shard
from acorn.distributed.runtime import Runtime

EOT, VOCAB, BLOCK, SEED = 0, 50, 8, 5
GPU = torch.device("meta")  # prefetching uses a thread for any device except a CPU


class OneStream:
    """A fake mixture: 900 tokens in shards in `folder`, with about a third of the targets masked."""

    has_pairs = False

    def __init__(self, folder):
        chance = np.random.default_rng(0)
        for writer, top in ((ShardWriter(folder, "train", VOCAB), VOCAB), (MaskWriter(folder, "train"), 3)):
            with writer:
                writer.write(np.minimum(chance.integers(0, top, 900), 1 if top == 3 else VOCAB))
        self.path = folder / "train_000000.bin"
        self.train = Tokens([open_shard(self.path)], VOCAB)
        self.train.mask = Tokens([open_shard(folder / "train_000000.mask")], 2)
        self.train.document_mark = EOT
        self.datasets, self.shares = [self], [1]

    sample, has_documents = Mixture.sample, Mixture.has_documents


def rank_of(rank, world_size):
    return Runtime(torch.device("cpu"), torch.float32, False, [], rank, world_size)


@pytest.mark.parametrize("world_size, micro_batch", [(1, 12), (1, 1), (2, 3), (3, 4), (4, 3)])
def test_ranks_and_micro_batches_divide_the_batch_exactly(tmp_path, world_size, micro_batch):
    data, position = OneStream(tmp_path), 24
    data.train.document_mark = EOT
    streams = [
        updates(data, rank_of(rank, world_size), BLOCK, SEED, 12, micro_batch, position) for rank in range(world_size)
    ]
    for update in range(3):
        x, y, documents = data.sample(BLOCK, position + 12 * update, 12, SEED)
        assert (documents == number_documents(x, y, EOT)).all()
        parts = [next(stream) for stream in streams]
        in_order = [batch for turn in zip(*(batches for batches, _ in parts), strict=True) for batch in turn]
        assert all(batch.x.shape == (micro_batch, BLOCK) for batch in in_order)
        for k, expected in enumerate((x, y, documents)):
            assert torch.equal(torch.cat([batch[k] for batch in in_order]), torch.from_numpy(expected))
        assert sum(n_targets for _, n_targets in parts) == (y != -1).sum() < y.size


def test_make_batch_keeps_optional_document_numbers():
    x = np.array([[4, 0, 3, 0, 0, 6]])
    cpu = torch.device("cpu")
    assert make_batch((x, x, x + 1), cpu).to(cpu).documents.tolist() == [[5, 1, 4, 1, 1, 7]]
    batch = make_batch((x, x, None), cpu).to(torch.device("meta"))
    assert batch.documents is None and batch.x.is_meta and batch.y.is_meta


def test_prefetch_computes_the_next_item_in_a_thread():
    began = [threading.Event() for _ in range(5)]
    threads = set()

    def items():
        for i in range(4):
            began[i].set()
            threads.add(threading.get_ident())
            yield i

    ahead = prefetch(items(), GPU)
    assert next(ahead) == 0
    assert began[1].wait(10)  # before it is requested
    assert not began[2].wait(0.05)  # only one item is prefetched
    assert list(ahead) == [1, 2, 3]
    assert len(threads) == 1 and threading.get_ident() not in threads

    threads.clear()
    assert list(prefetch(items(), torch.device("cpu"))) == [0, 1, 2, 3]
    assert threads == {threading.get_ident()}


@pytest.mark.parametrize("device", [GPU, torch.device("cpu")])
def test_a_truncated_shard_raises_at_its_batch(tmp_path, device):
    data = OneStream(tmp_path)
    stream = prefetch(updates(data, rank_of(0, 1), BLOCK, SEED, 4, 4, 0), device)
    whole = prefetch(updates(data, rank_of(0, 1), BLOCK, SEED, 4, 4, 0), torch.device("cpu"))
    good = [next(whole)[0][0].x for _ in range(4)]
    before = threading.active_count()
    assert torch.equal(next(stream)[0][0].x, good[0])
    os.truncate(data.path, 1500)
    with pytest.raises(UserError, match="truncated"):
        for expected in good[1:]:  # one may have been prefetched already
            assert torch.equal(next(stream)[0][0].x, expected)
    assert threading.active_count() == before  # the thread has ended


def test_truncation_during_a_read_raises_user_error(tmp_path, monkeypatch):
    tokens = OneStream(tmp_path).train
    map_shard = tokens._map

    def then_truncate(shard):
        mapped = map_shard(shard)
        os.truncate(tmp_path / "train_000000.bin", 1500)
        return mapped

    monkeypatch.setattr(tokens, "_map", then_truncate)
    with pytest.raises(UserError, match="truncated"):
        tokens.read([800], 8)


def test_an_abandoned_stream_leaves_no_thread(tmp_path):
    """The accumulator abandons a stream when it retries an update with smaller micro-batches."""
    before = threading.active_count()
    data = OneStream(tmp_path)
    stream = prefetch(updates(data, rank_of(0, 1), BLOCK, SEED, 4, 4, 0), GPU)
    first = next(stream)[0][0].x
    stream = prefetch(updates(data, rank_of(0, 1), BLOCK, SEED, 4, 2, 0), GPU)
    pieces = next(stream)[0]
    assert torch.equal(torch.cat([batch.x for batch in pieces]), first)
    stream.close()
    assert threading.active_count() == before
