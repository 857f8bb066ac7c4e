"""prepare/reading.py and text.py: files, folders, globs, stdin and records of every format, and invalid input."""

import argparse
import contextlib
import gzip
import hashlib
import io
import json
import os
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from helpers import FOX, RECORDS, documents_of, fuzz, ids_of, prepare, prepare_fails, rounds, write_records
from hypothesis import strategies as st

import prepare.__main__ as prepare_cli
from acorn import UserError
from acorn.data.shards import load_dataset
from prepare import reading
from prepare import text as text_corpus
from prepare.encoding import binary_type

pytestmark = pytest.mark.usefixtures("in_tmp_path")


def test_file_longer_than_a_block_is_read_exactly(monkeypatch):
    monkeypatch.setattr(reading, "BLOCK_BYTES", 1001)  # splits characters of two and three bytes
    text = "\ufeffcafé €uro 文字 " * 2000
    Path("long.txt").write_text(text, encoding="utf-8")
    prepare("text", "long.txt", "--tokenizer=byte")
    dataset = load_dataset("long")
    ids = ids_of(dataset.train) + ids_of(dataset.val)
    assert dataset.tokenizer.decode_bytes(ids[1:]).decode() == text[1:]
    Path("bad.txt").write_bytes(b"a" * 5000 + "é".encode()[:1])
    prepare_fails("byte 5000 is 0xc3", "text", "bad.txt")


@pytest.mark.parametrize("path", ["r.jsonl", "r.JSONL.GZ", "r.jsonl.zst", "r.parquet", "r.csv"])
def test_each_record_becomes_a_document(path):
    write_records(path, "body")
    meta = prepare("text", path, "--key=body", "--tokenizer=byte")
    assert meta["documents"] == 300 and meta["val_by"] == "document"
    dataset = load_dataset("r")
    texts = {split: set(documents_of(dataset, split)) for split in ("train", "val")}
    assert texts["train"] | texts["val"] == set(RECORDS) and not texts["train"] & texts["val"]
    assert 10 < len(texts["val"]) < 60
    digest = {text: int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) / 2**64 for text in RECORDS}
    assert texts["val"] == {text for text in RECORDS if digest[text] < 0.1}  # the split depends on the text alone


def test_records_in_a_folder_and_invalid_records():
    os.mkdir("d")
    write_records("d/a.jsonl")
    write_records("d/b.parquet")
    Path("d/c.jsonl").write_text('{"name": "no text here"}\n')
    meta = prepare("text", "d", "--tokenizer=byte")
    assert meta["documents"] == 601
    prepare_fails(r"line 1 of d/c\.jsonl has no field 'text'.*--key \(the fields are: name\)", "text", "d/c.jsonl")
    prepare_fails(
        r"b\.parquet has no field 'body'.*the fields are: id, text", "text", "d/b.parquet", "--key=body", "--name=x"
    )
    prepare_fails(r"line 1 of d/a\.jsonl has 0 in its field 'id'", "text", "d/a.jsonl", "--key=id", "--name=x")
    for name, data, match in (
        ("e.jsonl", b'{"text": "x"}\nnot json\n', r"line 2 of e\.jsonl is not valid JSON"),
        ("f.jsonl", b'{"text": "caf\xe9"}\n', r"f\.jsonl is not UTF-8: byte 13 is 0xe9 \(line 1\)"),
        ("g.jsonl", b"[1, 2]\n", r"line 1 of g\.jsonl is \[1, 2\], not an object"),
        ("h.csv", b"a,b\n1,2\n", r"h\.csv has no field 'text'.*a, b"),
        ("k.csv", b'text\na\n"b\nc\n', r"k\.csv is not valid CSV in row 3, which begins in line 3 \(a quote is nev"),
        ("i.parquet", b"PAR1 or not", r"i\.parquet is not a valid parquet file"),
        (
            "j.jsonl.zst",
            pyarrow.compress(FOX.encode(), "zstd", asbytes=True)[:-9],
            r"j\.jsonl\.zst is not a valid zstd",
        ),
    ):
        Path(name).write_bytes(data)
        prepare_fails(match, "text", name)


def test_zstd_file_with_a_large_window_is_rejected_with_advice():
    """`zstd --long=31` writes such files, which are valid, but pyarrow does not read them."""
    window = bytes([(31 - 10) << 3])  # 2**31 bytes
    text = b"some text\n"
    block = (len(text) << 3 | 1).to_bytes(3, "little") + text  # the last block, not compressed
    Path("a.txt.zst").write_bytes(b"\x28\xb5\x2f\xfd\0" + window + block)
    prepare_fails(r"a\.txt\.zst was compressed with a larger window.*`zstd -d --long=31`", "text", "a.txt.zst")


def test_records_above_the_size_limit_are_rejected(monkeypatch):
    """Otherwise, an unclosed quote would read all of a large file into memory."""
    monkeypatch.setattr(reading, "MAX_RECORD", 500)
    Path("a.csv").write_text('text\n"a\na"\n"' + 200 * "b,\n")
    prepare_fails(r"row 3, which begins in line 4 \(a field has more than 500 characters", "text", "a.csv")
    Path("b.jsonl").write_text('{"text": "a"}\n{"text": "' + 600 * "b" + '"}\n')
    prepare_fails(r"line 2 of b\.jsonl has more than 500 bytes", "text", "b.jsonl")


def test_csv_text_with_unquoted_commas_is_rejected():
    """Otherwise, the part before the first comma would be taken for the whole text."""
    row = r"row 3 of t/a\.csv has 3 fields, but the header has 2\. Put texts that contain commas in double quotes"
    os.mkdir("t")
    Path("t/a.csv").write_text('text,label\n"One, two",a,,\nThree, four,b\n')
    prepare_fails(row, "text", "t/a.csv", "--tokenizer=byte")
    prepare_fails(row, "text", "t", "--tokenizer=byte")
    Path("t/a.csv").write_text("text\nOne, two\n")
    prepare_fails(r"row 2 of t/a\.csv has 2 fields, but the header has 1", "text", "t", "--tokenizer=byte")


def test_lone_surrogate_in_json_is_replaced():
    Path("s.jsonl").write_text('{"text": "a\\ud800b' + FOX.replace("\n", " ") + '"}\n' * 1)
    prepare("text", "s.jsonl", "--tokenizer=byte", "--val_by=end")
    dataset = load_dataset("s")
    assert dataset.tokenizer.decode(ids_of(dataset.train)[:6]) == "<|endoftext|>a\ufffdb"


def test_text_reads_folders_gzip_files_and_stdin(monkeypatch, capsys):
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


def test_globs_and_overlapping_paths_read_each_file_once():
    os.makedirs("d/sub")
    for name in ("d/a.txt", "d/sub/b.txt"):
        Path(name).write_text(name * 100)
    assert prepare("text", "d/**", "--tokenizer", "byte", "--name", "t")["documents"] == 2
    words = "text", "d", "d/a.txt", "d/sub", "d/sub/b.txt"  # as some shells expand d/**
    assert prepare(*words, "--tokenizer", "byte", "--name", "t", "--overwrite")["documents"] == 2


def test_symlinked_folder_is_skipped_unless_named(capsys):
    os.makedirs("d")
    os.makedirs("other")
    for name in ("d/a.txt", "other/b.txt"):
        Path(name).write_text(name * 100)
    os.symlink(os.path.abspath("other"), "d/linked")
    assert prepare("text", "d", "--tokenizer", "byte", "--val_by", "end", "--name", "t")["documents"] == 1
    assert "d/linked is left out" in capsys.readouterr().err
    assert prepare("text", "d", "d/linked", "--tokenizer", "byte", "--name", "t", "--overwrite")["documents"] == 2


def test_key_missing_from_every_file_is_an_error():
    os.makedirs("d")
    Path("d/a.jsonl").write_text('{"content": "a"}\n')
    prepare_fails("no .jsonl or .csv file has the field 'contnt'", "text", "d", "--key=contnt", "--name=t")


def test_dataset_in_the_folder_of_its_text_is_not_read_as_text():
    os.makedirs("data/mine")
    for name in "ab":
        Path(f"data/mine/{name}.txt").write_text(name * 500)
    meta = prepare("text", "data/mine", "--tokenizer", "char")
    assert prepare("text", "data/mine", "--tokenizer", "char", "--overwrite")["documents"] == meta["documents"] == 2


def test_records_are_read_from_stdin(monkeypatch):
    lines = "".join(json.dumps({"body": f"text {i}"}) + "\n" for i in range(200))
    Path("x.jsonl").write_text(lines)
    monkeypatch.setattr(sys, "stdin", argparse.Namespace(buffer=open("x.jsonl", "rb")))  # noqa: SIM115
    assert prepare("text", "-", "--key", "body", "--tokenizer", "byte", "--name", "t")["documents"] == 200
    Path("a.txt").write_text("no records" * 100)
    prepare_fails("--key body.*jsonl", "text", "a.txt", "--key", "body")


def test_errors_in_stdin_name_standard_input(monkeypatch):
    for data, match, *options in (
        (b'{"text": "a"}\n{bad\n', "line 2 of standard input is not valid JSON", "--key=text"),
        (gzip.compress(FOX.encode())[:50], "standard input is not a valid gzip file"),
        (b"caf\xe9 and more text", "standard input is not UTF-8"),
    ):
        monkeypatch.setattr(sys, "stdin", argparse.Namespace(buffer=io.BytesIO(data)))
        prepare_fails(f"^{match}", "text", "-", *options)
    monkeypatch.setattr(sys, "stdin", None)
    prepare_fails("standard input is closed", "text", "-")


def test_default_name_is_the_stem_of_the_first_path():
    Path("book[1].txt").write_text("")
    assert text_corpus.default_name(argparse.Namespace(files=["book[1].txt"])) == "book[1]"
    for first, name in (("~/x/mine.txt.gz", "mine"), ("mine/", "mine"), ("mine/**/*.txt", "mine"), ("-", "stdin")):
        assert text_corpus.default_name(argparse.Namespace(files=[first])) == name


def test_invalid_files_are_rejected():
    os.mkdir("empty_folder")
    Path("empty.txt").write_text("")
    Path("latin.txt").write_bytes(b"caf\xe9 and more text")
    Path("bad.gz").write_bytes(gzip.compress(FOX.encode())[:50])
    Path("fake.gz").write_bytes(b"no gzip")
    Path("short.txt").write_text("abc")
    prepare_fails(r"no file or folder nope\.txt", "text", "nope.txt")
    prepare_fails(r"no file matches .*\.zzz", "text", "*.zzz")
    prepare_fails("empty_folder holds no text", "text", "empty_folder")
    prepare_fails(r"empty\.txt is empty", "text", "empty.txt")
    prepare_fails("corpus is empty", "text", "empt*.txt")
    prepare_fails(r"latin\.txt is not UTF-8: byte 3 is 0xe9.*--errors replace", "text", "latin.txt")
    prepare_fails(r"bad\.gz is not a valid gzip file", "text", "bad.gz")
    prepare_fails(r"fake\.gz is not a valid gzip file", "text", "fake.gz")
    Path("magic.parquet").write_bytes(b"PAR1PAR1")
    write_records("whole.parquet")
    data = Path("whole.parquet").read_bytes()
    Path("middle.parquet").write_bytes(data[:100] + bytes(500) + data[600:])
    Path("footer.parquet").write_bytes(data[:-60] + bytes(52) + data[-8:])
    for name in ("magic", "middle", "footer"):
        prepare_fails(rf"{name}\.parquet is not a valid parquet file", "text", f"{name}.parquet")
    prepare_fails("too short to split", "text", "short.txt", "--tokenizer", "char")
    assert not list(Path("data").iterdir())
    prepare("text", "latin.txt", "--errors", "replace", "--tokenizer", "char")
    assert "\ufffd" in load_dataset("latin").tokenizer.to_dict()["vocab"]


@rounds(18, 1500)
def test_any_bytes_are_prepared_exactly_or_rejected_with_an_error(tmp_path, monkeypatch, capsys, rounds):
    monkeypatch.chdir(tmp_path)

    def one(data: bytes, errors: str) -> None:
        Path("t.txt").write_bytes(data)
        argv = ["text", "t.txt", "--tokenizer=byte", "--overwrite", "--val_fraction=0.5", f"--errors={errors}"]
        with contextlib.suppress(UserError):
            prepare_cli.prepare_corpus(argv)  # with whatever encoding is detected
        argv.append("--encoding=utf-8")
        if binary_type(data):
            with pytest.raises(UserError, match="not text"):
                prepare_cli.prepare_corpus(argv)
            return
        try:
            text = data.decode("utf-8", errors).removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
        except UnicodeDecodeError:
            with pytest.raises(UserError, match="not UTF-8"):
                prepare_cli.prepare_corpus(argv)
            return
        try:
            prepare_cli.prepare_corpus(argv)
        except UserError as error:
            assert len(text) < 4 and ("too short" in str(error) or "empty" in str(error))
            return
        loaded = load_dataset("t")
        ids = np.concatenate([split.read([0], len(split))[0] for split in (loaded.train, loaded.val)])
        assert ids[0] == 256 and bytes(ids[1:].tolist()).decode() == text

    data = st.binary(max_size=30) | st.text(max_size=20).map(lambda text: text.encode("utf-8", "replace"))
    fuzz(one, rounds, data, st.sampled_from(["strict", "replace"]))
