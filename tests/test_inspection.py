"""`python prepare inspect`: its counts against plain Python, and the changes that --verify finds."""

import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from helpers import make_dataset, make_tokens, refused, script_here
from tqdm import tqdm

from acorn import UserError
from acorn.data.shards import load_dataset
from acorn.data.tokenizer import ByteTokenizer, train_char
from acorn.data.tokenizer_gpt2 import GPT2Tokenizer
from prepare import __main__ as cli
from prepare import inspection

BYTE = ByteTokenizer()


def inspect(capsys, *words) -> str:
    cli.prepare_corpus(["inspect", *map(str, words)])
    return capsys.readouterr().out


@pytest.mark.parametrize("piece", [1, 7, 1000])
@pytest.mark.parametrize("begins, ends", [("eot", "text"), ("text", "eot")])
def test_survey_matches_counts_in_plain_python(tmp_path, monkeypatch, piece, begins, ends):
    """End-of-text precedes each document, or follows it as in nanoGPT's files. Some documents are empty."""
    monkeypatch.setattr(inspection, "PIECE_TOKENS", piece)
    draw = random.Random(0)
    texts = ["x" * draw.choice([0, 1, 2, 3, 5, 30]) for _ in range(40)] + ["last"]
    ids = []
    for text in texts:
        ids += [BYTE.eot] * (begins == "eot") + list(text.encode()) + [BYTE.eot] * (ends == "eot")
    found = inspection.survey(make_tokens(tmp_path, ids, 257, shard_tokens=11), BYTE, tqdm(disable=True), BYTE.eot)
    lengths = [len(text) for text in texts]
    if begins == "text" and not lengths[0]:
        del lengths[0]  # an empty first document is not detectable
    assert found.lengths == Counter(lengths) and found.bytes == sum(lengths)
    assert [length for length, _ in found.longest] == sorted(lengths)[-1:-4:-1]
    assert [length for length, _ in found.shortest] == sorted(lengths)[:3]
    for length, start in found.longest + found.shortest:
        assert BYTE.eot not in ids[start : start + length]
        assert ids[start - 1 : start] in ([], [BYTE.eot]) and ids[start + length : start + length + 1] in (
            [],
            [BYTE.eot],
        )
    assert found.length_at(0.5) == sorted(lengths)[-(-len(lengths) // 2) - 1]


def test_inspect_describes_a_dataset(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("texts").mkdir()
    for i, text in enumerate(["short", "some text of middle length", "the longest text. " * 50]):
        Path(f"texts/{i}.txt").write_text(text)
    cli.prepare_corpus(["text", "texts", "--tokenizer=gpt2", "--val_fraction=0.2"])
    out = inspect(capsys, "texts", "--verify", "--samples=1")
    assert "data/texts, made by `python prepare text`" in out
    assert "gpt2, vocabulary of 50,257" in out
    assert "3                   1" in out  # documents
    assert "1 tokens, train 'short'" in out
    assert "│ longest│ text│.│" in out
    assert "2 shards match" in out
    assert Path("data/texts/lengths.png").read_bytes().startswith(b"\x89PNG")
    inspect(capsys, "texts", "--picture=here.png")
    assert Path("here.png").exists()


def test_read_only_dataset_is_described_without_a_histogram(tmp_path, capsys, monkeypatch):
    path = tmp_path / "texts"
    make_dataset(path, BYTE)

    def refuse(*arguments):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(inspection.report, "save_picture", refuse)
    out = inspect(capsys, path, "--verify")
    assert "lengths.png cannot be written (Permission denied). Use --picture FILE.png" in out and "hashes of" in out
    with pytest.raises(UserError, match=r"cannot write here.png: Permission denied. Choose another --picture"):
        inspect(capsys, path, "--picture=here.png")


def test_bars_separate_tokens():
    ids = np.array([GPT2Tokenizer.eot, *GPT2Tokenizer().encode("to be\n\x1b")])
    assert inspection.with_bars(GPT2Tokenizer(), ids) == r"<|endoftext|>│to│ be│\n│\x1b"
    assert inspection.with_bars(BYTE, BYTE.encode("né")) == r"n│\xc3│\xa9"


def test_histogram_titles_are_drawn_literally(tmp_path):
    for title in ("data/a$b_^$", "data/a\nb\x1b", "data/\udcff"):
        inspection.draw_lengths({"train": Counter({3: 2})}, title, tmp_path / "lengths.png")
    inspection.draw_lengths({}, "x", tmp_path / "here")  # a PNG file even without the extension
    assert {path.name for path in tmp_path.iterdir()} == {"lengths.png", "here"}
    assert (tmp_path / "here").read_bytes().startswith(b"\x89PNG")


def test_nanogpt_and_llmc_datasets_are_described(tmp_path, capsys):
    for name, words in (("nanogpt", "in the layout of nanoGPT"), ("llmc", "in the layout of llm.c")):
        make_tokens(tmp_path / name, [50256, 1, 2, 3, 50256, 4], 50257)
        shard = tmp_path / name / "train_000000.bin"
        if name == "nanogpt":
            (tmp_path / name / "train.bin").write_bytes(shard.read_bytes()[1024:])
            shard.unlink()
        else:
            shard.rename(tmp_path / name / "fineweb_train_000001.bin")
        out = inspect(capsys, tmp_path / name, "--verify")
        assert words in out and "3 tokens" in out and "no hashes to verify" in out
        assert "val" not in out


def test_dataset_without_end_of_text_has_no_documents(tmp_path, capsys):
    make_dataset(tmp_path / "a", train_char(["hello world"]))
    out = inspect(capsys, tmp_path / "a")
    assert "document boundaries are unknown" in out and "h│e│l│l│o" in out
    assert not (tmp_path / "a" / "lengths.png").exists()


def test_verify_finds_a_changed_shard(tmp_path):
    make_dataset(tmp_path / "a", BYTE)
    dataset = load_dataset(str(tmp_path / "a"))
    shard = tmp_path / "a" / "val_000000.bin"
    data = bytearray(shard.read_bytes())
    data[1030] ^= 1
    shard.write_bytes(data)
    with pytest.raises(UserError, match=r"val_000000\.bin does not match"):
        inspection.verify(dataset)


def test_verify_rereads_the_source_text_if_it_exists(tmp_path):
    (tmp_path / "book.txt").write_text("A line of some length.\n" * 200)
    assert script_here("prepare", "text", "book.txt", "--name=book", "--tokenizer=byte", cwd=tmp_path).returncode == 0
    verify = ("prepare", "inspect", "book", "--verify", "--samples=0")
    assert "source text is unchanged" in script_here(*verify, cwd=tmp_path).stdout
    (tmp_path / "book.txt").write_text("A line of some lenght.\n" * 200)
    refused(script_here(*verify, cwd=tmp_path), "has changed since")
    (tmp_path / "book.txt").unlink()
    assert "can no longer be read (there is no file" in script_here(*verify, cwd=tmp_path).stdout


def test_masked_tokens_are_counted(tmp_path):
    records = [{"prompt": f"Number {i}?", "response": "Yes."} for i in range(30)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    result = script_here("prepare", "chat", "pairs.jsonl", "--name=pairs", "--tokenizer=byte", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    meta = json.loads((tmp_path / "data" / "pairs" / "meta.json").read_text())
    output = script_here("prepare", "inspect", "pairs", cwd=tmp_path).stdout
    shares = [f"{1 - meta[split]['learned'] / meta[split]['tokens']:.1%}" for split in ("train", "val")]
    assert next(line.split() for line in output.splitlines() if line.startswith("masked")) == ["masked", *shares]


def test_token_id_outside_the_vocabulary_is_found(tmp_path, capsys):
    (tmp_path / "train.bin").write_bytes(np.full(100, 60000, dtype="<u2").tobytes())
    with pytest.raises(UserError, match="token id 60000 is outside the vocabulary of 50257"):
        inspect(capsys, tmp_path)
