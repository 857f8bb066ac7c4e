"""prepare/pipeline.py: token ids, pieces, splits and size limits of a prepared dataset."""

import hashlib
import itertools
import json
import os
from pathlib import Path

import numpy as np
import pytest
from helpers import FOX, RECORDS, documents_of, hub_folder, ids_of, prepare, prepare_fails, write_records

from acorn import UserError, files
from acorn.data.shards import load_dataset
from acorn.data.tokenizer_gpt2 import _gpt2_encoding
from prepare import __main__ as cli
from prepare import pipeline
from prepare import text as text_corpus

pytestmark = pytest.mark.usefixtures("in_tmp_path")


def test_char_ids_and_split_match_nanogpt(capsys):
    Path("mine.txt").write_text(FOX + "é")
    meta = prepare("text", "mine.txt", "--tokenizer", "char")
    data = FOX + "é"
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
    texts = [f"<|endoftext|> {i} " + FOX[: 100 * i] for i in range(1, 6)]
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


def test_documents_that_are_not_text_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"documents\(args\) of the corpus returns 7, which is not text"):
        pipeline.prepare(["text", 7], tmp_path / "d", name="d", tokenizer="byte", source={})


def test_char_documents_are_joined_by_a_blank_line():
    Path("a.txt").write_text("aaaa")
    Path("b.txt").write_text("bbbb")
    Path("c.txt").write_text("")
    prepare("text", "*.txt", "--tokenizer", "char", "--name", "x", "--val_fraction", "0.5")
    dataset = load_dataset("x")
    assert dataset.tokenizer.decode(ids_of(dataset.train) + ids_of(dataset.val)) == "aaaa\n\nbbbb"


def test_long_documents_have_the_same_ids_as_encoded_whole(tmp_path):
    text = "".join(f"line {i}\n\n    indented {i * i}  \n" for i in range(20_000))
    source = {"corpus": "test"}
    meta = pipeline.prepare([text], tmp_path / "d", name="d", tokenizer="gpt2", source=source, shard_tokens=50_000)
    dataset = load_dataset(str(tmp_path / "d"))
    encode, cut = _gpt2_encoding().encode_ordinary, int(len(text) * 0.9)
    assert ids_of(dataset.train) == [50256, *encode(text[:cut])] and ids_of(dataset.val) == encode(text[cut:])
    assert len(meta["train"]["shards"]) == -(-meta["train"]["tokens"] // 50_000)


def test_pieces_do_not_depend_on_block_boundaries(monkeypatch):
    monkeypatch.setattr(pipeline, "MAX_PIECE_CHARS", 300_000)
    rng = np.random.default_rng(0)
    words = rng.choice(["word", "  \n", " ", "x" * 30, "é", "\u3000", "\n\n", "naïve"], 400_000)
    text = " ".join(words) + "y" * (pipeline.MAX_PIECE_CHARS + 5)
    whole = list(pipeline.cut_pieces([text]))
    ends = np.sort(rng.integers(0, len(text), 40)).tolist()
    blocks = [text[start:end] for start, end in zip([0, *ends], [*ends, None], strict=True)]
    assert list(pipeline.cut_pieces(blocks)) == whole and "".join(whole) == text
    assert len(whole) > 10 and max(map(len, whole)) <= pipeline.MAX_PIECE_CHARS


def test_val_tokens_keeps_documents_whole_and_in_order(small_steps):
    write_records("r.jsonl")
    options = "text", "r.jsonl", "--tokenizer=byte", "--name=r", "--overwrite"
    whole = prepare(*options)
    candidates = documents_of(load_dataset("r"), "val")
    meta = prepare(*options, "--val_tokens=500")
    val, room = [], 500
    for text in candidates:
        if len(text) < room:  # the end-of-text token takes one more
            val.append(text)
            room -= len(text) + 1
    dataset = load_dataset("r")
    assert documents_of(dataset, "val") == val and len(dataset.val) == 500 - room
    assert documents_of(dataset, "train") == [text for text in RECORDS if text not in val]
    for count in ("tokens", "bytes"):
        assert sum(meta[split][count] for split in ("train", "val")) == sum(
            whole[split][count] for split in ("train", "val")
        )
    assert meta["val"]["bytes"] == sum(map(len, val))


@pytest.mark.parametrize("val_tokens", [50, 500, 5000])
def test_val_tokens_takes_the_end_of_the_corpus(val_tokens, small_steps):
    for i in range(3):
        Path(f"{i}.txt").write_text(FOX + "é" * i)
    options = "text", "0.txt", "1.txt", "2.txt", "--tokenizer=byte", "--name=r", "--val_fraction=0.5", "--overwrite"
    prepare(*options)
    whole = ids_of(load_dataset("r").train) + ids_of(load_dataset("r").val)
    meta = prepare(*options, f"--val_tokens={val_tokens}")
    dataset = load_dataset("r")
    assert ids_of(dataset.train) + ids_of(dataset.val) == whole
    assert len(dataset.val) == min(val_tokens, 2706)  # half of the corpus
    for split in ("train", "val"):
        assert meta[split]["bytes"] == sum(token != 256 for token in ids_of(getattr(dataset, split)))


def test_error_for_an_empty_split_says_what_to_do():
    Path("few.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    prepare_fails("for val .documents read: 2.* or --val_by end", "text", "few.jsonl", "--val_by=document")
    prepare_fails("val_tokens = 1", "text", "few.jsonl", "--val_tokens=1")


def test_text_without_whitespace_is_cut_between_tokens(monkeypatch):
    monkeypatch.setattr(pipeline, "MAX_PIECE_CHARS", 5000)
    rng = np.random.default_rng(0)
    text = "".join(rng.choice(list("abcXYZ0123,;)'/+\""), 60_000)) + " the end"
    pieces = list(pipeline.cut_pieces([text[:9000], text[9000:]]))
    encode = _gpt2_encoding().encode_ordinary
    assert len(pieces) > 10 and [token for piece in pieces for token in encode(piece)] == encode(text)


def test_max_tokens_keeps_the_start_of_the_corpus():
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
    # each document has 31 tokens, so 1000 tokens are 32 documents and part of the next
    assert len(cut.train) + len(cut.val) == 1000 and meta["documents"] == 33
    for split in ("train", "val"):
        ids = ids_of(getattr(cut, split))
        assert ids == ids_of(getattr(whole, split))[: len(ids)]
        assert meta[split]["bytes"] == sum(token != 256 for token in ids)
    kept = bytes(token for token in ids_of(cut.train) + ids_of(cut.val) if token != 256).decode()
    assert all(f"{i:03d}" * 10 in kept for i in range(32))


@pytest.mark.parametrize("tokenizer", ["char", "bpe:300"])
def test_max_tokens_limits_the_text_for_tokenizer_training(tokenizer, small_steps, monkeypatch):
    monkeypatch.setattr(pipeline, "MAX_PIECE_CHARS", 300)

    class Endless:
        def __iter__(self):
            for i in itertools.count():
                assert i < 2000, "this much is not needed"
                yield f"record {i} " + chr(0x4E00 + i)

    meta = pipeline.prepare(Endless(), Path("d"), name="d", tokenizer=tokenizer, source={}, max_tokens=500)
    assert meta["train"]["tokens"] + meta["val"]["tokens"] == 500


def test_error_for_a_limit_that_empties_a_split_says_what_to_do():
    hub_folder()
    options = "hub", "hubset", "--tokenizer=byte", "--max_tokens=50"
    prepare_fails("--max_tokens 50 leaves .* for val .* a larger --max_tokens, or a larger --val_fraction", *options)
    prepare_fails("for train .*. Use .*, or a smaller --val_fraction", *options, "--val_fraction=0.99")
    options = "text", "hubset", "--tokenizer=byte", "--val_by=document", "--val_tokens=2"
    prepare_fails("--val_tokens 2 leaves .* for val .*. Use a larger --val_tokens, or --val_by end", *options)


def test_corpus_that_changes_while_being_read_is_refused(tmp_path):
    class Changing:
        times = 0

        def __iter__(self):
            self.times += 1
            yield FOX * self.times

    with pytest.raises(UserError, match="changed while it was being read"):
        pipeline.prepare(Changing(), tmp_path / "d", name="d", tokenizer="byte", source={}, val_by="end")
    assert not (tmp_path / "d").exists()


def test_few_records_are_split_by_position(capsys):
    """The number of records is unknown before reading, and their hashes may leave a split empty."""
    lines = [json.dumps({"text": f"record {i} of few, with some text"}) for i in range(3)]
    Path("few.jsonl").write_text("\n".join(lines))
    meta = prepare("text", "few.jsonl", "--tokenizer=byte", "--val_fraction=0.05")
    assert meta["val_by"] == "end" and "3 documents" in capsys.readouterr().err
    with pytest.raises(UserError, match="--val_by document"):
        prepare("text", "few.jsonl", "--tokenizer=byte", "--val_fraction=0.05", "--val_by=document", "--name=other")


def test_preparation_of_few_records_resumes(monkeypatch, capsys):
    replace = files.replace

    def stop(path, text):
        replace(path, text)
        if path.name == pipeline.PROGRESS_FILE and json.loads(text)["command"]["val_by"] == "end":
            raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "BATCH_CHARS", 1000)
    lines = [json.dumps({"text": f"record {i} of few, with some text. " * 200}) for i in range(3)]
    Path("few.jsonl").write_text("\n".join(lines))
    argv = ["text", "few.jsonl", "--tokenizer=byte", "--val_fraction=0.05", "--shard_tokens=2000"]
    whole = prepare(*argv)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(files, "replace", stop)
        prepare(*argv, "--overwrite")
    capsys.readouterr()
    assert prepare(*argv, "--overwrite") == whole
    assert "resuming after" in capsys.readouterr().err
