"""acorn/data/shards.py: the format of shard files, reading and writing them, and damaged files."""

import os
import struct
import time

import numpy as np
import pytest
from helpers import fuzz, make_tokens, rounds
from hypothesis import strategies as st

from acorn import UserError
from acorn.data import shards
from acorn.data.batches import sample_windows
from acorn.data.shards import HEADER_BYTES, LAYOUTS, ShardWriter, Tokens, load_dataset, open_shard


@pytest.mark.parametrize(
    ("vocab_size", "magic", "version", "dtype"), [(65536, 20240520, 1, "<u2"), (65537, 20240801, 7, "<u4")]
)
def test_the_shard_format_byte_by_byte(tmp_path, vocab_size, magic, version, dtype):
    ids = np.array([0, 1, vocab_size - 1])
    make_tokens(tmp_path, ids, vocab_size)
    data = (tmp_path / "train_000000.bin").read_bytes()
    header = np.frombuffer(data[:1024], "<i4")
    assert header[:3].tolist() == [magic, version, 3] and not header[3:].any()
    assert np.frombuffer(data[1024:], dtype).tolist() == ids.tolist()


def test_tokens_are_split_into_shards_and_read_across_them(tmp_path):
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
def test_writing_refuses_ids_outside_the_vocabulary(tmp_path, bad):
    with pytest.raises(UserError, match="outside the vocabulary"), ShardWriter(tmp_path, "train", 50257) as writer:
        writer.write(np.array([1, 2, 3]))
        writer.write(np.array([1, bad]))
    assert os.listdir(tmp_path) == []


def test_reading_refuses_ids_outside_the_vocabulary(tmp_path):
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
def test_the_error_for_a_damaged_shard_names_the_file(tmp_path, damage, message):
    make_tokens(tmp_path, np.arange(100))
    path = tmp_path / "train_000000.bin"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=message) as error:
        open_shard(path)
    assert str(path) in str(error.value)


def test_headers_with_wrong_token_counts_are_refused(tmp_path):
    shard = tmp_path / "train_000000.bin"
    for tokens in (-(2**31), -1, 2**31 - 1, 11):
        header = np.zeros(256, "<i4")
        header[:3] = 20240520, 1, tokens
        shard.write_bytes(header.tobytes() + bytes(20))
        with pytest.raises(UserError, match="truncated or damaged"):
            open_shard(shard)


def test_a_thousand_shards_open_fast_and_few_stay_mapped(tmp_path):
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


def test_memory_maps_are_dropped_regularly(tmp_path, monkeypatch):
    monkeypatch.setattr(Tokens, "DROP_AFTER", 100_000)
    tokens = make_tokens(tmp_path, np.arange(1000) % 100)
    held = []
    for i in range(20):
        sample_windows(tokens, 8, i, 1, seed=0)
        held.append(len(tokens._maps))
    assert set(held) == {0, 1}


def test_shards_that_change_during_reading_raise_user_error(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "OPEN_FILES", 1)
    ids = np.arange(5000) % 50257
    for split in ("train", "val"):
        with shards.ShardWriter(tmp_path, split, 50257, shard_tokens=1000) as writer:
            writer.write(ids)
    for file in list(tmp_path.iterdir()):  # names as in llm.c
        file.rename(tmp_path / f"x_{file.name.replace('train_', 'train_00').replace('val_', 'val_00')}")
    tokens = load_dataset(str(tmp_path)).train
    first, second = (shard.path for shard in tokens.shards[:2])

    def read(shard: int) -> list[int]:
        return tokens.read([1000 * shard + 500], 400)[0].tolist()

    kept = first.read_bytes()
    assert read(0) == list(range(500, 900))
    os.truncate(first, 1500)  # reading past the end of a mapped file would kill the process
    with pytest.raises(UserError, match="truncated"):
        read(0)
    first.unlink()
    read(1)
    with pytest.raises(UserError, match="no longer readable"):
        read(0)
    first.write_bytes(kept[::-1])
    with pytest.raises(UserError, match="replaced"):
        read(0)
    assert read(1) == list(range(1500, 1900)) and second.exists()


@st.composite
def shard_bytes(draw) -> bytes:
    """Draw a valid or nearly valid shard: three integers and the rest of the header, then arbitrary bytes."""
    magic = draw(st.sampled_from([*LAYOUTS, 0, -1, 20240521, 2**31 - 1]))
    version = draw(st.sampled_from([1, 7, 0, -1, 2**31 - 1]))
    body = draw(st.binary(max_size=40))
    width = LAYOUTS[magic][1].itemsize if magic in LAYOUTS else 2
    tokens = draw(st.sampled_from([len(body) // width, len(body), 0, -1, -(2**31), 2**31 - 1, 2**30]))
    rest = draw(st.sampled_from([bytes(1012), b"\xff" * 1012, bytes(1011), b"", bytes(1013)]))
    return struct.pack("<iii", magic, version, tokens) + rest + body


@rounds(300, 20000)
def test_random_shards_are_read_correctly_or_refused(tmp_path, rounds):
    path = tmp_path / "x_train_000000.bin"

    def one(data: bytes) -> None:
        path.write_bytes(data)
        magic, version, n = struct.unpack("<iii", data[:12])
        codes = {(20240520, 1): "H", (20240801, 7): "I", (20261122, 1): "B", (20261123, 1): "i"}
        code = codes.get((magic, version))
        right = code is not None and n >= 0 and len(data) == 1024 + n * struct.calcsize(code)
        try:
            shard = open_shard(path)
        except UserError as error:
            assert not right and str(path) in str(error)
            return
        assert right and shard.tokens == n
        expected = struct.unpack(f"<{n}{code}", data[1024:])
        assert tuple(Tokens([shard], 2**32).read([0], n)[0].tolist()) == expected
        if expected and max(expected) >= 300:
            with pytest.raises(UserError, match="outside the vocabulary"):
                Tokens([shard], 300).read([0], n)

    fuzz(one, rounds, shard_bytes())
