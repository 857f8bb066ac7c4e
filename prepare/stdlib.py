"""the source code of Python's standard library, without its tests; needs no network"""

import argparse
import sysconfig
from pathlib import Path

TOKENIZER = "gpt2"
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test"}


def documents(args: argparse.Namespace) -> list[str]:
    root = Path(sysconfig.get_path("stdlib"))
    sources = []
    for path in sorted(root.rglob("*.py")):
        if SKIPPED_FOLDERS.isdisjoint(path.relative_to(root).parts):
            try:
                sources.append(path.read_bytes().decode())
            except UnicodeDecodeError:  # a few files use other encodings
                continue
    return sources
