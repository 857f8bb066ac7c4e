"""Code shared by train.py, sample.py and prepare. Each module can be read on its own."""

import gc
import io
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from acorn import openmp

openmp.load()  # works only before torch is imported, so scripts import acorn first
gc.set_threshold(50_000, 20, 50)  # with Python's thresholds, collections take a fifth of the time of importing torch

CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")  # C0, C1, and bidi overrides
REPO = Path(__file__).resolve().parent.parent  # its config/ and data/ are found from any working directory


def printable(text: str) -> str:
    """Escape control characters and bidirectional overrides as in JSON (\\u001b), except line breaks and tabs.

    Otherwise, text from an untrusted file could control the terminal or look different from what it contains.
    """
    return CONTROL.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def visible(text: str) -> str:
    """Return `text` as one line in which every character is visible: others, such as line breaks, controls and bytes
    that are not UTF-8, are escaped as in Python."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def replace_invalid(stream: TextIO | None) -> None:
    """Let a standard stream replace what it cannot encode or decode, instead of raising UnicodeError."""
    if isinstance(stream, io.TextIOWrapper):  # not if a program replaced the stream
        stream.reconfigure(errors="replace")


class UserError(Exception):
    """Bad input. The message says what is wrong (with the value), where, and what to do."""


def out_of_memory(error: BaseException) -> bool:
    """Return whether `error` is an out-of-memory error of Python, torch (a RuntimeError), its libraries, or numpy."""
    words = ("out of memory", "allocate memory", "not enough memory", "memory object", "alloc_failed")
    is_torchs = type(error).__name__ == "OutOfMemoryError"  # by name, because this file does not import torch
    return isinstance(error, MemoryError) or is_torchs or any(word in str(error).lower() for word in words)


def run(main: Callable[[], int | None]) -> None:
    """Run a script's `main`, and exit with 0 or the code that it returns.

    Characters that stdout cannot encode are replaced.

    Bad input, a failed read or write, and lack of memory print one line and exit with code 2. Other exceptions are
    programming errors and keep their traceback.
    """
    replace_invalid(sys.stdout)
    try:
        code = main()
    except UserError as error:
        print(printable("error: " + " ".join(str(error).split("\n"))), file=sys.stderr)
        code = 2
    except (MemoryError, RuntimeError) as error:  # torch raises RuntimeError
        if not out_of_memory(error):
            raise
        print("error: out of memory. Close other programs, or use a smaller model, batch or file.", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        code = 130  # the shell convention for a program stopped by Ctrl-C
    except BrokenPipeError:  # the reader of the output exited, as in `python sample.py | head`
        sys.stderr.close()
        code = 0
    except OSError as error:  # no permission, a full disk, a file name that is too long
        print(printable(f"error: {error.filename or 'reading or writing'}: {error.strerror or error}"), file=sys.stderr)
        code = 2
    finally:  # also if argparse exits
        gc.freeze()  # otherwise Python searches all objects of the libraries for garbage while it exits: half a second
    sys.exit(code or 0)
