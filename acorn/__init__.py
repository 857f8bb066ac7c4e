"""The parts that train.py, sample.py and prepare share; each module can be read alone."""

import re
import sys
from collections.abc import Callable
from pathlib import Path

from acorn import openmp

openmp.load()  # takes effect only before torch is imported, so scripts import acorn first

CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")  # C0, C1, and bidi overrides
REPO = Path(__file__).resolve().parent.parent  # whose config/ and data/ are found from anywhere


def printable(text: str) -> str:
    """The text with control characters and bidirectional overrides escaped as in JSON (\\u001b), except line breaks and
    tabs. Text from a stranger's file could otherwise control the terminal or display other words than it contains."""
    return CONTROL.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


class UserError(Exception):
    """Bad input. The message is one clear sentence: what was wrong, where, and what to do next."""


def run(main: Callable[[], int | None]) -> None:
    """Run a script's `main` and exit: 0, or the code it returns; after bad input, one sentence and exit code 2.

    Any other exception is a programming error and keeps its traceback.
    """
    try:
        code = main()
    except UserError as error:
        print(printable("error: " + " ".join(str(error).split("\n"))), file=sys.stderr)
        code = 2
    except MemoryError:
        print("error: out of memory; close other programs, or use a smaller model or file", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        code = 130  # what a shell reports for a program that Ctrl-C ended
    except BrokenPipeError:  # the reader of our output went away, as in `python sample.py | head`
        sys.stderr.close()
        code = 0
    except OSError as error:  # no permission, a full disk, a name that is too long
        print(printable(f"error: {error.filename or 'reading or writing'}: {error.strerror or error}"), file=sys.stderr)
        code = 2
    sys.exit(code or 0)
