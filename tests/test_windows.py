"""acorn/data/batches.py: the tokens of each window of an epoch. Every target occurs exactly once."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from helpers import make_tokens

from acorn import UserError
from acorn.data.batches import number_documents, permute, sample_windows, sequential_windows, split_windows

SIZES = [(n, t) for n in (2, 3, 5, 17, 64, 65, 66, 129, 1000) for t in (1, 2, 7, 64, 100)]


@pytest.mark.parametrize(("n_tokens", "block_size"), SIZES)
def test_epoch_has_every_target_once(tmp_path, n_tokens, block_size):
    tokens = make_tokens(tmp_path / "one", np.arange(n_tokens))
    sharded = make_tokens(tmp_path / "many", np.arange(n_tokens), shard_tokens=7 if n_tokens < 200 else 90)
    n = split_windows(tokens, block_size)
    assert n == -(-(n_tokens - 1) // block_size)
    for epoch in range(3):
        x, y = sample_windows(tokens, block_size, epoch * n, n, seed=5)
        assert x.shape == y.shape == (n, block_size) and x.dtype == y.dtype == np.int64
        valid = y >= 0
        assert Counter(y[valid].tolist()) == Counter(range(1, n_tokens))
        assert (x[valid] + 1 == y[valid]).all()  # the tokens are consecutive integers, so each target is its input + 1
        x2, y2 = sample_windows(sharded, block_size, epoch * n, n, seed=5)
        assert (x == x2).all() and (y == y2).all()


def splitmix64(x):
    """The published generator SplitMix64, with Python integers."""
    x = (x + 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


def test_splitmix64_matches_the_published_value():
    assert splitmix64(0) == 0xE220A8397B1DCDAF


def reference_sample(n_tokens, block_size, i, seed):
    """Compute sample i of the stream from its definition, one pair at a time. The tokens are 0, 1, 2, ..."""
    pairs = n_tokens - 1
    n = math.ceil(pairs / block_size)
    key = splitmix64(splitmix64(seed) + i // n)
    offset = splitmix64(2**64 - 1 - key) % pairs
    window = int(permute(np.array([i % n]), n, np.array([key], dtype=np.uint64))[0])
    places = range(window * block_size, (window + 1) * block_size)
    x = [(offset + place) % pairs for place in places]
    return x, [token + 1 if place < pairs else -1 for token, place in zip(x, places, strict=True)]


@pytest.mark.parametrize(("n_tokens", "block_size"), [(50, 7), (50, 49), (30, 64), (29, 7)])
def test_samples_follow_the_definition(tmp_path, n_tokens, block_size):
    tokens = make_tokens(tmp_path, np.arange(n_tokens))
    n = split_windows(tokens, block_size)
    x, y = sample_windows(tokens, block_size, 0, 3 * n, seed=1)
    for i in range(3 * n):
        row, targets = reference_sample(n_tokens, block_size, i, seed=1)
        assert x[i].tolist() == row and y[i].tolist() == targets
    for epoch in range(3):  # the windows of an epoch start block_size apart on the ring of pairs
        starts = np.sort(x[epoch * n : (epoch + 1) * n, 0])
        gaps = Counter(np.diff(np.append(starts, starts[0] + n_tokens - 1)).tolist())
        last = n_tokens - 1 - (n - 1) * block_size
        assert gaps == Counter([block_size] * (n - 1) + [last])


def test_samples_depend_only_on_seed_and_position(tmp_path):
    tokens = make_tokens(tmp_path, np.arange(1000))
    n = split_windows(tokens, 64)
    x, y = sample_windows(tokens, 64, 3, 4 * n, seed=9)
    for i in (0, 1, n - 4, n - 3, 4 * n - 1):
        x1, y1 = sample_windows(tokens, 64, 3 + i, 1, seed=9)
        assert (x[i] == x1[0]).all() and (y[i] == y1[0]).all()
    again = sample_windows(tokens, 64, 3, 4 * n, seed=9)
    assert (again[0] == x).all() and (again[1] == y).all()
    far = sample_windows(tokens, 64, 10**15, 2, seed=9)  # seeking takes constant time
    assert far[0].shape == (2, 64)
    for seed in (10, -1, 2**64 + 3):
        assert (sample_windows(tokens, 64, 3, 4 * n, seed)[0] != x).any()


def test_epochs_differ_in_order_and_offset(tmp_path):
    tokens = make_tokens(tmp_path, np.arange(2000))
    n = split_windows(tokens, 50)
    epochs = [sample_windows(tokens, 50, epoch * n, n, seed=0)[0][:, 0] for epoch in range(20)]
    assert len({int(np.min(starts)) for starts in epochs}) > 10
    orders = {tuple(np.argsort(starts).tolist()) for starts in epochs}
    assert len(orders) == 20


def test_sequential_windows_cover_every_target_in_order(tmp_path):
    for n_tokens, block_size in ((2, 5), (11, 5), (13, 5), (64, 64), (65, 64), (66, 64)):
        tokens = make_tokens(tmp_path / f"{n_tokens}", np.arange(n_tokens), shard_tokens=9)
        n = split_windows(tokens, block_size)
        x, y = sequential_windows(tokens, block_size, 0, n + 2)  # two windows beyond the end
        valid = y >= 0
        assert y[valid].tolist() == list(range(1, n_tokens)) and x[valid].tolist() == list(range(n_tokens - 1))
        assert not x[~valid].any() and (y[~valid] == -1).all() and not valid[n:].any() and valid[n - 1].any()
        for i in range(n):
            xi, yi = sequential_windows(tokens, block_size, i, 1)
            assert (xi[0] == x[i]).all() and (yi[0] == y[i]).all()


def test_documents_begin_at_end_of_text_and_at_the_wraparound(tmp_path):
    ids = [7, 8, 0, 1, 2, 0, 0, 3, 4, 5]  # the stream begins inside a document
    document_of_token = [0, 0, 1, 1, 1, 2, 3, 3, 3, 3]
    tokens = make_tokens(tmp_path, ids)
    place = {tuple(pair): i for i, pair in enumerate(itertools.pairwise(ids))}  # each pair occurs once
    assert len(place) == 9
    x, y = sample_windows(tokens, 4, 0, 300, seed=0)
    documents = number_documents(x, y, eot=0)
    seams = 0
    for row in range(300):
        at = [place[pair] for pair in zip(x[row].tolist(), y[row].tolist(), strict=True) if pair[1] != -1]
        expected = [document_of_token[i] + 10 * (i < at[0]) for i in at]  # after the wraparound it is another document
        numbers = documents[row, : len(at)].tolist()
        same = [[a == b for b in expected] for a in expected]
        assert [[a == b for b in numbers] for a in numbers] == same
        seams += any(i < at[0] for i in at)
    assert seams > 20


@pytest.mark.parametrize("ids", [[], [1]])
def test_too_few_tokens_raise_a_clear_error(tmp_path, ids):
    tokens = make_tokens(tmp_path, ids)
    for windows in (lambda: sample_windows(tokens, 8, 0, 1, 0), lambda: sequential_windows(tokens, 8, 0, 1)):
        with pytest.raises(UserError, match="at least 2"):
            windows()


@pytest.mark.parametrize("seed", [0, 1, 2**64 - 1])
def test_permute_is_a_bijection(seed):
    for n in [*range(1, 201), 1000, 4096, 65537, 99991]:
        out = permute(np.arange(n), n, np.array([seed], dtype=np.uint64))
        assert (np.bincount(out, minlength=n) == 1).all()


def test_permute_decorrelates_the_order():
    n = 100_000
    order = permute(np.arange(n), n, np.array([123], dtype=np.uint64))
    assert abs(np.corrcoef(order, np.arange(n))[0, 1]) < 0.02
    assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.02
    assert (np.diff(order) == 1).sum() < 10
    big = 10**12
    out = permute(np.arange(1000), big, np.array([5], dtype=np.uint64))
    assert len(set(out.tolist())) == 1000 and out.min() >= 0 and out.max() < big
