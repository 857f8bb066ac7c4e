"""Shards: what is written is read; every broken file is a sentence; and an epoch is exactly an epoch."""

import itertools
import json
import math
import os
import pickle
import time
from collections import Counter

import numpy as np
import pytest

from acorn import UserError
from acorn.data.batches import number_documents, permute, sample_windows, sequential_windows, split_windows
from acorn.data.shards import HEADER_BYTES, Dataset, ShardWriter, Tokens, load_dataset, open_shard, write_meta
from acorn.data.tokenizer import ByteTokenizer, tokenizer_hash, train_bpe, train_char


def make_tokens(folder, ids, vocab_size=2000, shard_tokens=10**8) -> Tokens:
    folder.mkdir(parents=True, exist_ok=True)
    with ShardWriter(folder, "train", vocab_size, shard_tokens) as writer:
        writer.write(np.asarray(ids))
    return Tokens([open_shard(folder / shard["file"]) for shard in writer.shards], vocab_size)


def make_dataset(folder, tokenizer=None, text="hello world " * 50):
    tokenizer = tokenizer or train_char([text])
    folder.mkdir(parents=True)
    ids = tokenizer.encode(text)
    meta = {
        "format": 1,
        "name": folder.name,
        "tokenizer": tokenizer.to_dict(),
        "tokenizer_hash": tokenizer_hash(tokenizer),
        "vocab_size": tokenizer.n_vocab,
        "documents": 1,
    }
    for split, part in (("train", ids[:-50]), ("val", ids[-50:])):
        with ShardWriter(folder, split, tokenizer.n_vocab) as writer:
            writer.write(part)
        meta[split] = {"tokens": len(part), "bytes": len(part), "shards": writer.shards}
    write_meta(folder, meta)
    return meta


# ---------------------------------------------------------------------------------------------------------------------
# Files


@pytest.mark.parametrize(
    ("vocab_size", "magic", "version", "dtype"), [(65536, 20240520, 1, "<u2"), (65537, 20240801, 7, "<u4")]
)
def test_the_format_byte_by_byte(tmp_path, vocab_size, magic, version, dtype):
    ids = np.array([0, 1, vocab_size - 1])
    make_tokens(tmp_path, ids, vocab_size)
    data = (tmp_path / "train_000000.bin").read_bytes()
    header = np.frombuffer(data[:1024], "<i4")
    assert header[:3].tolist() == [magic, version, 3] and not header[3:].any()
    assert np.frombuffer(data[1024:], dtype).tolist() == ids.tolist()


def test_shards_split_and_join(tmp_path):
    with ShardWriter(tmp_path, "val", 1000, shard_tokens=10) as writer:
        for part in np.split(np.arange(35), [3, 3, 20]):
            writer.write(part)
    assert [shard["tokens"] for shard in writer.shards] == [10, 10, 10, 5] and writer.tokens == 35
    assert sorted(os.listdir(tmp_path)) == [f"val_{i:06d}.bin" for i in range(4)]
    tokens = Tokens([open_shard(tmp_path / shard["file"]) for shard in writer.shards], 1000)
    assert len(tokens) == 35
    assert (tokens.read([0, 9, 5, 0], 26) == np.arange(26) + np.array([[0], [9], [5], [0]])).all()
    for start, length in ((-1, 2), (34, 2), (0, 36)):
        with pytest.raises(IndexError):
            tokens.read([start], length)


@pytest.mark.parametrize("bad", [-1, 50257, 65536, 10**6])
def test_an_id_outside_the_vocabulary_is_never_wrapped(tmp_path, bad):
    with pytest.raises(UserError, match="outside the vocabulary"), ShardWriter(tmp_path, "train", 50257) as writer:
        writer.write(np.array([1, 2, 3]))
        writer.write(np.array([1, bad]))
    assert os.listdir(tmp_path) == []


def test_reading_refuses_ids_of_another_tokenizer(tmp_path):
    make_tokens(tmp_path, [1, 2, 300], 1000)
    tokens = Tokens([open_shard(tmp_path / "train_000000.bin")], 65)
    with pytest.raises(UserError, match="token id 300 is outside the vocabulary of 65 in the train split"):
        tokens.read([0], 3)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: b"", "not a token shard. Run `python prepare"),
        (lambda data: data[:1000], "not a token shard"),
        (lambda data: b"text" * 600, "not a token shard"),
        (lambda data: data[:-1], "truncated"),
        (lambda data: data[:HEADER_BYTES], "truncated"),
        (lambda data: data + b"xx", "the file holds 101"),
        (lambda data: data[:4] + b"\x09" + data[5:], "version 9"),
        (lambda data: data[:8] + b"\xff" * 4 + data[12:], "-1 tokens"),
        (lambda data: data[:8] + b"\xff\xff\xff\x7f" + data[12:], "2147483647 tokens"),
    ],
)
def test_a_damaged_shard_is_named(tmp_path, damage, message):
    make_tokens(tmp_path, np.arange(100))
    path = tmp_path / "train_000000.bin"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=message) as error:
        open_shard(path)
    assert str(path) in str(error.value)


def test_a_thousand_shards_open_fast_and_few_stay_open(tmp_path):
    for i in range(1000):
        make = np.zeros(256, "<i4")
        make[:3] = 20240520, 1, 4
        (tmp_path / f"x_train_{i:06d}.bin").write_bytes(make.tobytes() + np.full(4, i, "<u2").tobytes())
    start = time.perf_counter()
    dataset = load_dataset(str(tmp_path))
    assert time.perf_counter() - start < 1
    assert len(dataset.train) == 4000 and dataset.val is None
    assert (dataset.train.read([0], 4000)[0] == np.arange(1000).repeat(4)).all()
    assert len(dataset.train._maps) <= 256


# ---------------------------------------------------------------------------------------------------------------------
# Datasets


def test_load_dataset_finds_it_by_path_and_by_name(tmp_path, monkeypatch):
    meta = make_dataset(tmp_path / "data" / "mine")
    monkeypatch.chdir(tmp_path)
    for name in ("mine", "data/mine", str(tmp_path / "data" / "mine")):
        dataset = load_dataset(name)
        assert isinstance(dataset, Dataset) and dataset.meta == meta and dataset.vocab_size == 8
        text = dataset.tokenizer.decode(dataset.train.read([0], len(dataset.train))[0])
        assert text + dataset.tokenizer.decode(dataset.val.read([0], 50)[0]) == "hello world " * 50


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("shakespeare_char", "python prepare tinyshakespeare --name shakespeare_char`"),
        ("shakespeare", "python prepare tinyshakespeare --tokenizer gpt2 --name shakespeare`"),
        ("plays", "python prepare shakespeare`"),
        ("stdlib", "python prepare stdlib`"),
        ("novel", "python prepare text FILES --name novel`"),
        ("../../etc", "python prepare text FILES"),
        ("", "python prepare text FILES"),
    ],
)
def test_a_missing_dataset_says_what_makes_it(tmp_path, monkeypatch, name, command):
    make_dataset(tmp_path / "data" / "other")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("acorn.data.shards.REPO", tmp_path)
    with pytest.raises(UserError) as error:
        load_dataset(name)
    assert command in str(error.value) and "existing datasets: other" in str(error.value)


@pytest.mark.parametrize(
    ("name", "offered"),
    [
        ("othre", "--dataset=other"),  # an existing dataset
        ("data/othre", "--dataset=other"),
        ("shakspeare", "`python prepare shakespeare` makes --dataset=plays"),
        ("shakespeare", "`python prepare shakespeare` makes --dataset=plays"),
        ("tinystory", "`python prepare tinystories`"),
        ("play", "`python prepare shakespeare`"),
    ],
)
def test_a_misspelt_dataset_offers_the_nearest_one(tmp_path, monkeypatch, name, offered):
    make_dataset(tmp_path / "data" / "other")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("acorn.data.shards.REPO", tmp_path)
    with pytest.raises(UserError) as error:
        load_dataset(name)
    assert offered in str(error.value) and "prepare text" not in str(error.value)


def test_an_interrupted_preparation(tmp_path):
    make_dataset(tmp_path / "mine")
    (tmp_path / "mine" / "meta.json").unlink()
    with pytest.raises(UserError, match=r"interrupted\. Run it again"):
        load_dataset(str(tmp_path / "mine"))


def test_meta_of_another_dataset(tmp_path):
    make_dataset(tmp_path / "a")
    make_dataset(tmp_path / "b", text="xyz " * 500)
    make_dataset(tmp_path / "c", text="olleh dlrow " * 50)  # as long as a, with the same characters
    for other in ("b", "c"):
        (tmp_path / "a" / "meta.json").write_bytes((tmp_path / other / "meta.json").read_bytes())
        with pytest.raises(UserError, match="belongs to another dataset"):
            load_dataset(str(tmp_path / "a"))


def test_shards_of_another_tokenizer(tmp_path):
    make_dataset(tmp_path / "a")
    make_dataset(tmp_path / "b", tokenizer=ByteTokenizer())
    for split in ("train", "val"):
        (tmp_path / "a" / f"{split}_000000.bin").write_bytes((tmp_path / "b" / f"{split}_000000.bin").read_bytes())
    with pytest.raises(UserError, match="belongs to another dataset"):
        load_dataset(str(tmp_path / "a"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "format 2"),
        ({"tokenizer": ByteTokenizer().to_dict()}, "not the one that made the shards"),
        ({"tokenizer": {"kind": "char", "vocab": ["a"]}}, "not the one"),
        ({"tokenizer": 3}, "broken"),
        ({"vocab_size": 9}, "not the one"),
        ({"train": {}}, "damaged"),
        (
            {"train": {"shards": [{"file": "../b/train_000000.bin", "tokens": 5, "sha256": ""}]}},
            "not the name of a shard",
        ),
        ({"train": {"shards": [{"file": "train_000000.bin", "tokens": float("inf"), "sha256": ""}]}}, "damaged"),
        ({"train": {"shards": [{"file": "train_000007.bin", "tokens": 5, "sha256": ""}]}}, "is missing"),
    ],
)
def test_a_wrong_meta_json(tmp_path, change, message):
    meta = make_dataset(tmp_path / "a")
    (tmp_path / "a" / "meta.json").write_text(json.dumps(meta | change))
    with pytest.raises(UserError, match=message):
        load_dataset(str(tmp_path / "a"))


def test_a_truncated_meta_json(tmp_path):
    make_dataset(tmp_path / "a")
    path = tmp_path / "a" / "meta.json"
    whole = path.read_bytes()
    for keep in (0, 1, len(whole) // 2, len(whole) - 2):
        path.write_bytes(whole[:keep])
        with pytest.raises(UserError, match="truncated or damaged"):
            load_dataset(str(tmp_path / "a"))
    path.write_bytes(b"[" * 100_000)
    with pytest.raises(UserError, match="truncated or damaged"):
        load_dataset(str(tmp_path / "a"))


def test_a_nanogpt_folder(tmp_path):
    text = "hello world"
    chars = sorted(set(text))
    stoi = {char: i for i, char in enumerate(chars)}
    np.array([stoi[char] for char in text], dtype=np.uint16).tofile(tmp_path / "train.bin")
    dataset = load_dataset(str(tmp_path))
    assert dataset.vocab_size == 50257 and dataset.val is None  # without meta.pkl nanoGPT takes GPT-2's vocabulary
    (tmp_path / "val.bin").write_bytes((tmp_path / "train.bin").read_bytes())
    itos = dict(enumerate(chars))
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": len(chars), "itos": itos, "stoi": stoi}))
    dataset = load_dataset(str(tmp_path))
    assert dataset.vocab_size == len(chars) and dataset.meta == {}
    assert dataset.tokenizer.decode(dataset.val.read([0], 11)[0]) == text
    (tmp_path / "train.bin").write_bytes(b"abc")
    with pytest.raises(UserError, match=r"train\.bin is truncated"):
        load_dataset(str(tmp_path))


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_malicious_pickle_runs_nothing(tmp_path):
    np.zeros(10, dtype=np.uint16).tofile(tmp_path / "train.bin")
    for payload in ({"itos": Malicious(tmp_path / "owned")}, Malicious(tmp_path / "owned"), [1], {"itos": {0: "ab"}}):
        (tmp_path / "meta.pkl").write_bytes(pickle.dumps(payload))
        with pytest.raises(UserError, match="No code in it was run"):
            load_dataset(str(tmp_path))
    assert not (tmp_path / "owned").exists()
    (tmp_path / "meta.pkl").write_bytes(b"\x80\x04garbage")
    with pytest.raises(UserError, match=r"meta\.pkl"):
        load_dataset(str(tmp_path))


def test_llmc_shards(tmp_path):
    for split in ("train", "val"):
        make_tokens(tmp_path, np.arange(100), 50257)
        (tmp_path / "train_000000.bin").rename(tmp_path / f"fineweb_{split}_000001.bin")
    dataset = load_dataset(str(tmp_path))
    assert dataset.tokenizer.kind == "gpt2" and len(dataset.train) == len(dataset.val) == 100
    make_tokens(tmp_path, np.arange(100), 100_000)
    (tmp_path / "train_000000.bin").rename(tmp_path / "fineweb_train_000002.bin")
    with pytest.raises(UserError, match="unknown tokenizer"):
        load_dataset(str(tmp_path))


def test_llmc_shards_of_one_file_and_of_another_tokenizer(tmp_path):
    for split in ("train", "val"):
        make_tokens(tmp_path, np.arange(100), 50257)
        (tmp_path / "train_000000.bin").rename(tmp_path / f"tiny_shakespeare_{split}.bin")
    dataset = load_dataset(str(tmp_path))
    assert dataset.tokenizer.kind == "gpt2" and len(dataset.train) == len(dataset.val) == 100
    (tmp_path / "tiny_shakespeare_val.bin").unlink()
    make_tokens(tmp_path, np.arange(100), 100_000)  # uint32
    (tmp_path / "train_000000.bin").rename(tmp_path / "tiny_shakespeare_train.bin")
    (tmp_path / "tokenizer.json").write_text(json.dumps(train_bpe(["the other one"], 270).config))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    dataset = load_dataset(str(tmp_path))
    assert dataset.tokenizer.kind == "hf" and dataset.val is None
    dataset.mask_documents()
    assert dataset.train.document_mark == dataset.tokenizer.eot == dataset.vocab_size - 1
    make_tokens(tmp_path, np.arange(300), 100_000)
    (tmp_path / "train_000000.bin").rename(tmp_path / "tiny_shakespeare_train.bin")
    with pytest.raises(UserError, match="vocabulary"):  # an id that the tokenizer does not have
        tokens = load_dataset(str(tmp_path)).train
        sequential_windows(tokens, 8, 0, split_windows(tokens, 8))


# ---------------------------------------------------------------------------------------------------------------------
# Batches

SIZES = [(n, t) for n in (2, 3, 5, 17, 64, 65, 66, 129, 1000) for t in (1, 2, 7, 64, 100)]


@pytest.mark.parametrize(("n_tokens", "block_size"), SIZES)
def test_an_epoch_has_every_target_once(tmp_path, n_tokens, block_size):
    tokens = make_tokens(tmp_path / "one", np.arange(n_tokens))
    sharded = make_tokens(tmp_path / "many", np.arange(n_tokens), shard_tokens=7 if n_tokens < 200 else 90)
    n = split_windows(tokens, block_size)
    assert n == -(-(n_tokens - 1) // block_size)
    for epoch in range(3):
        x, y = sample_windows(tokens, block_size, epoch * n, n, seed=5)
        assert x.shape == y.shape == (n, block_size) and x.dtype == y.dtype == np.int64
        valid = y >= 0
        assert Counter(y[valid].tolist()) == Counter(range(1, n_tokens))
        assert (x[valid] + 1 == y[valid]).all()  # the tokens count up, so each target follows its input
        x2, y2 = sample_windows(sharded, block_size, epoch * n, n, seed=5)
        assert (x == x2).all() and (y == y2).all()


def splitmix64(x):
    """The published generator, on Python integers."""
    x = (x + 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


def test_splitmix64_is_the_published_one():
    assert splitmix64(0) == 0xE220A8397B1DCDAF


def reference_sample(n_tokens, block_size, i, seed):
    """Sample i of the stream, from the definition, one pair at a time. The tokens are 0, 1, 2, ..."""
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


def test_samples_are_pure_and_may_straddle_epochs(tmp_path):
    tokens = make_tokens(tmp_path, np.arange(1000))
    n = split_windows(tokens, 64)
    x, y = sample_windows(tokens, 64, 3, 4 * n, seed=9)
    for i in (0, 1, n - 4, n - 3, 4 * n - 1):
        x1, y1 = sample_windows(tokens, 64, 3 + i, 1, seed=9)
        assert (x[i] == x1[0]).all() and (y[i] == y1[0]).all()
    again = sample_windows(tokens, 64, 3, 4 * n, seed=9)
    assert (again[0] == x).all() and (again[1] == y).all()
    far = sample_windows(tokens, 64, 10**15, 2, seed=9)  # seeking costs nothing
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


def test_sequential_windows(tmp_path):
    for n_tokens, block_size in ((2, 5), (11, 5), (13, 5), (64, 64), (65, 64), (66, 64)):
        tokens = make_tokens(tmp_path / f"{n_tokens}", np.arange(n_tokens), shard_tokens=9)
        n = split_windows(tokens, block_size)
        x, y = sequential_windows(tokens, block_size, 0, n + 2)  # two beyond the end
        valid = y >= 0
        assert y[valid].tolist() == list(range(1, n_tokens)) and x[valid].tolist() == list(range(n_tokens - 1))
        assert not x[~valid].any() and (y[~valid] == -1).all() and not valid[n:].any() and valid[n - 1].any()
        for i in range(n):
            xi, yi = sequential_windows(tokens, block_size, i, 1)
            assert (xi[0] == x[i]).all() and (yi[0] == y[i]).all()


def test_documents_are_numbered_from_end_of_text_and_from_the_seam_of_an_epoch(tmp_path):
    ids = [7, 8, 0, 1, 2, 0, 0, 3, 4, 5]  # the stream begins inside a document
    document_of_token = [0, 0, 1, 1, 1, 2, 3, 3, 3, 3]
    tokens = make_tokens(tmp_path, ids)
    place = {tuple(pair): i for i, pair in enumerate(itertools.pairwise(ids))}  # each pair stands there once
    assert len(place) == 9
    x, y = sample_windows(tokens, 4, 0, 300, seed=0)
    documents = number_documents(x, y, eot=0)
    seams = 0
    for row in range(300):
        at = [place[pair] for pair in zip(x[row].tolist(), y[row].tolist(), strict=True) if pair[1] != -1]
        expected = [document_of_token[i] + 10 * (i < at[0]) for i in at]  # beyond the seam it is another document
        numbers = documents[row, : len(at)].tolist()
        same = [[a == b for b in expected] for a in expected]
        assert [[a == b for b in numbers] for a in numbers] == same
        seams += any(i < at[0] for i in at)
    assert seams > 20


@pytest.mark.parametrize("ids", [[], [1]])
def test_too_few_tokens(tmp_path, ids):
    tokens = make_tokens(tmp_path, ids)
    for windows in (lambda: sample_windows(tokens, 8, 0, 1, 0), lambda: sequential_windows(tokens, 8, 0, 1)):
        with pytest.raises(UserError, match="at least 2"):
            windows()


@pytest.mark.parametrize("seed", [0, 1, 2**64 - 1])
def test_permute_is_a_bijection(seed):
    for n in [*range(1, 201), 1000, 4096, 65537, 99991]:
        out = permute(np.arange(n), n, np.array([seed], dtype=np.uint64))
        assert (np.bincount(out, minlength=n) == 1).all()


def test_permute_mixes():
    n = 100_000
    order = permute(np.arange(n), n, np.array([123], dtype=np.uint64))
    assert abs(np.corrcoef(order, np.arange(n))[0, 1]) < 0.02
    assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.02
    assert (np.diff(order) == 1).sum() < 10
    big = 10**12
    out = permute(np.arange(1000), big, np.array([5], dtype=np.uint64))
    assert len(set(out.tolist())) == 1000 and out.min() >= 0 and out.max() < big


def test_maps_are_dropped(tmp_path, monkeypatch):
    monkeypatch.setattr(Tokens, "DROP_AFTER", 100_000)
    tokens = make_tokens(tmp_path, np.arange(1000) % 100)
    held = []
    for i in range(20):
        sample_windows(tokens, 8, i, 1, seed=0)
        held.append(len(tokens._maps))
    assert set(held) == {0, 1}
