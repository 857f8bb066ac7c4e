"""load_dataset: lookup by name or path, the formats of nanoGPT and llm.c, and damaged datasets."""

import contextlib
import json
import os
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
from helpers import TINY, chat_dataset, damaged, fuzz, make_dataset, make_tokens, on_linux, read_all, rounds, train_here
from hypothesis import strategies as st

import prepare.__main__ as prepare_cli
from acorn import UserError
from acorn.data import shards
from acorn.data.batches import sequential_windows, split_windows
from acorn.data.mixture import load_mixture
from acorn.data.shards import Dataset, load_dataset
from acorn.data.tokenizer import ByteTokenizer
from acorn.data.tokenizer_kinds import train_bpe


def test_dataset_is_found_by_path_and_by_name(tmp_path, monkeypatch):
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
        ("sums", "python -m acorn.examples data/examples && python prepare chat data/examples/sums.jsonl"),
        ("novel", "python prepare text FILES --name novel`"),
        ("../../etc", "python prepare text FILES --out ../../etc`"),
        ("", "python prepare text FILES"),
    ],
)
def test_error_for_a_missing_dataset_suggests_the_prepare_command(tmp_path, monkeypatch, name, command):
    make_dataset(tmp_path / "data" / "other")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("acorn.data.shards.REPO", tmp_path)
    with pytest.raises(UserError) as error:
        load_dataset(name)
    assert command in str(error.value) and "existing datasets: other" in str(error.value)


def test_error_for_a_missing_dataset_with_a_corpus_file_that_is_not_utf8(tmp_path, monkeypatch):
    (tmp_path / "prepare").mkdir()
    (tmp_path / "prepare" / "mine.py").write_bytes(b"\xff\xfe")
    monkeypatch.chdir(tmp_path)
    for module in ("shards", "corpora"):
        monkeypatch.setattr(f"acorn.data.{module}.REPO", tmp_path)
    with pytest.raises(UserError, match="there is no dataset 'novel'"):
        load_dataset("novel")


@pytest.mark.parametrize(
    ("name", "offered"),
    [
        ("othre", "--dataset=other"),  # an existing dataset
        ("data/othre", "--dataset=data/other"),
        ("./data/othre/", "--dataset=data/other"),
        ("shakspeare", "`python prepare shakespeare` makes --dataset=plays"),
        ("shakespeare", "`python prepare shakespeare` makes --dataset=plays"),
        ("tinystory", "`python prepare tinystories`"),
        ("play", "`python prepare shakespeare`"),
    ],
)
def test_error_for_a_misspelled_dataset_suggests_the_closest_name(tmp_path, monkeypatch, name, offered):
    make_dataset(tmp_path / "data" / "other")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("acorn.data.shards.REPO", tmp_path)
    with pytest.raises(UserError) as error:
        load_dataset(name)
    assert offered in str(error.value) and "prepare text" not in str(error.value)


def test_incomplete_dataset_is_refused(tmp_path):
    make_dataset(tmp_path / "mine")
    (tmp_path / "mine" / "meta.json").unlink()
    with pytest.raises(UserError, match=r"interrupted\. Run the same `python prepare` command again"):
        load_dataset(str(tmp_path / "mine"))


def test_meta_json_of_another_dataset_is_refused(tmp_path):
    make_dataset(tmp_path / "a")
    make_dataset(tmp_path / "b", text="xyz " * 500)
    make_dataset(tmp_path / "c", text="olleh dlrow " * 50)  # as long as a, with the same characters
    for other in ("b", "c"):
        (tmp_path / "a" / "meta.json").write_bytes((tmp_path / other / "meta.json").read_bytes())
        with pytest.raises(UserError, match="belongs to another dataset"):
            load_dataset(str(tmp_path / "a"))


def test_shards_from_another_tokenizer_are_refused(tmp_path):
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
def test_inconsistent_meta_json_is_refused(tmp_path, change, message):
    meta = make_dataset(tmp_path / "a")
    (tmp_path / "a" / "meta.json").write_text(json.dumps(meta | change))
    with pytest.raises(UserError, match=message):
        load_dataset(str(tmp_path / "a"))


def test_truncated_meta_json_is_refused(tmp_path):
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


def test_nanogpt_dataset(tmp_path):
    text = "hello world"
    chars = sorted(set(text))
    stoi = {char: i for i, char in enumerate(chars)}
    np.array([stoi[char] for char in text], dtype=np.uint16).tofile(tmp_path / "train.bin")
    dataset = load_dataset(str(tmp_path))
    assert dataset.vocab_size == 50257 and dataset.val is None  # without meta.pkl, nanoGPT assumes GPT-2's vocabulary
    (tmp_path / "val.bin").write_bytes((tmp_path / "train.bin").read_bytes())
    itos = dict(enumerate(chars))
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": len(chars), "itos": itos, "stoi": stoi}))
    dataset = load_dataset(str(tmp_path))
    assert dataset.vocab_size == len(chars) and dataset.meta == {}
    assert dataset.tokenizer.decode(dataset.val.read([0], 11)[0]) == text
    (tmp_path / "train.bin").write_bytes(b"abc")
    with pytest.raises(UserError, match=r"train\.bin is truncated"):
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


def test_llmc_single_file_shards_and_another_tokenizer(tmp_path):
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
    with pytest.raises(UserError, match="vocabulary"):  # an id that the tokenizer lacks
        tokens = load_dataset(str(tmp_path)).train
        sequential_windows(tokens, 8, 0, split_windows(tokens, 8))


@rounds(60, 600)
def test_damaged_dataset_is_refused_or_read_unchanged(tmp_path, rounds):
    folder = chat_dataset(tmp_path)
    expected, targets, refused = read_all(load_dataset(str(folder))), sorted(folder.iterdir()), 0
    chance = random.Random(0)
    for i in range(rounds):
        target = targets[i % len(targets)]
        data = target.read_bytes()
        target.write_bytes(damaged(data, chance))
        try:
            assert read_all(load_dataset(str(folder))) == expected  # e.g. if a space in meta.json became a line break
        except UserError as error:
            assert str(folder) in str(error)
            refused += 1
        target.write_bytes(data)
    assert refused > 0.8 * rounds
    print(f"{rounds} damages of a dataset, {refused} refused")


def test_hashing_is_limited_and_starts_with_val(tmp_path, monkeypatch):
    folder = chat_dataset(tmp_path)
    assert load_dataset(str(folder)).unhashed == 0
    monkeypatch.setattr(shards, "HASH_LIMIT", 5000)
    sizes = sum(
        f.stat().st_size - shards.HEADER_BYTES for f in folder.iterdir() if f.suffix in (".bin", ".mask", ".index")
    )
    assert sizes - 5000 <= load_dataset(str(folder)).unhashed < sizes
    first_val = next(f for f in sorted(folder.iterdir()) if f.name.startswith("val"))  # hashed first
    first_val.write_bytes(damaged(first_val.read_bytes(), random.Random(1)))
    with pytest.raises(UserError, match="damaged"):
        load_dataset(str(folder))


TRICKS = [
    "../outside",
    "..",
    "/etc",
    "/dev/null",
    "/dev/stdin",
    "loop",
    "a\x00b",
    "a\nb",
    "x" * 5000,
    "\udcff\udcfe",
    "~root",
    "-rf",
    "a:1,../b:2",
    " ",
    "..\\..\\x",
    "%2e%2e",
]


@on_linux
@pytest.mark.parametrize("name", TRICKS, ids=range(len(TRICKS)))
def test_unsafe_names_are_refused_and_write_nothing_outside(tmp_path, monkeypatch, dataset, name):
    work = tmp_path / "a" / "b"
    work.mkdir(parents=True)
    monkeypatch.chdir(work)
    os.symlink("loop", "loop")
    Path("c.txt").write_text("to be or not to be, " * 50)
    before = {*tmp_path.rglob("*")}
    with pytest.raises(UserError) as error:
        load_mixture(name)
    assert len(str(error.value)) < 1000
    with pytest.raises(UserError):
        train_here(monkeypatch, *TINY, f"--dataset={name}", "--out_dir=o")
    assert not Path("o").exists()
    with contextlib.suppress(UserError, OSError, ValueError):
        prepare_cli.prepare_corpus(["text", "c.txt", "--tokenizer=byte", f"--name={name}"])
    assert all((work / "data") in path.parents or path == work / "data" for path in {*tmp_path.rglob("*")} - before)
    Path("config.py").write_text(f"out_dir = {name!r}\nmax_iters = 0\n")
    with contextlib.suppress(UserError, OSError):
        train_here(monkeypatch, *TINY, "config.py", f"--dataset={dataset}", "--dry_run=True")


@rounds(100, 3000)
def test_arbitrary_nanogpt_files_are_read_or_refused(tmp_path, rounds):
    def one(train_bin: bytes, meta_pkl: bytes | None) -> None:
        (tmp_path / "train.bin").write_bytes(train_bin)
        (tmp_path / "meta.pkl").unlink(missing_ok=True)
        if meta_pkl is not None:
            (tmp_path / "meta.pkl").write_bytes(meta_pkl)
        try:
            tokens = load_dataset(str(tmp_path)).train
            ids = tokens.read([0], len(tokens))[0]
        except UserError:
            return
        assert ids.tolist() == np.frombuffer(train_bin, "<u2").tolist()

    opcodes = st.lists(
        st.sampled_from([bytes([b]) for b in b"}])(.NKaqhjrtsuebRcoiX\x8c\x80\x94\x00\x02\n"]), max_size=30
    )
    fuzz(one, rounds, st.binary(max_size=9), st.none() | st.binary(max_size=30) | opcodes.map(b"".join))
