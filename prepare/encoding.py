"""Detect the encoding of a text file from a sample of its bytes, and count problems in text that was read.

UTF-8 needs no guessing, because text in other encodings is hardly ever valid UTF-8. Otherwise charset-normalizer
decides, but only among multi-byte encodings: most byte sequences are invalid in them, so decoding the whole file
verifies the guess. In Latin-1 or KOI8-R all bytes are valid and a wrong guess would go unnoticed, so the user has to
name them.
"""

import codecs
import difflib
import encodings.aliases
import re
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

from acorn import UserError

SAMPLE_BYTES = 1 << 16  # bytes that charset-normalizer examines
SEARCHED_BYTES = 1 << 20  # bytes at the start of a file that are searched for non-ASCII bytes
MIN_CONFIDENCE = 0.9  # minimum confidence of a guess: 1 minus charset-normalizer's `chaos`
MIN_LEAD = 0.1  # minimum lead in confidence over the next guess
MAX_NARROW = 0.2  # maximum fraction of half-width katakana among non-ASCII characters
MIN_NON_ASCII = 10  # minimum number of non-ASCII characters
MAX_NUL_FRACTION = 0.01  # fraction of NUL bytes above which a file is not text
BYTE_ORDER_MARKS = {  # byte order marks, longer ones before their prefixes
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
JIS_ESCAPES = (b"\x1b$B", b"\x1b$@")  # escape sequences of ISO-2022-JP, whose bytes are all ASCII
DETECTED = {  # Python's name (of the superset of encodings that look alike) -> common name
    "gb18030": "GB18030",
    "big5hkscs": "Big5",
    "cp932": "Shift-JIS",
    "euc_jp": "EUC-JP",
    "cp949": "EUC-KR",
    "utf_16_le": "UTF-16 without a byte order mark",
    "utf_16_be": "UTF-16 without a byte order mark",
    "utf_32_le": "UTF-32 without a byte order mark",
    "utf_32_be": "UTF-32 without a byte order mark",
}
COMMON_ENCODINGS = ("cp1252", "cp1250", "cp1251", "koi8_r", "cp1253", "cp1254", "cp1255", "cp1256", "tis_620")
FAMILIES = {
    **dict.fromkeys(("gb2312", "gbk"), "gb18030"),
    **dict.fromkeys(("big5", "cp950"), "big5hkscs"),
    **dict.fromkeys(("shift_jis", "shift_jis_2004", "shift_jisx0213"), "cp932"),
    **dict.fromkeys(("euc_jis_2004", "euc_jisx0213"), "euc_jp"),
    "euc_kr": "cp949",
}
BINARY_SIGNATURES = {  # first bytes: (type of the file, what to do)
    b"%PDF-": ("a PDF document", "Extract its text first, for example with pdftotext"),
    b"{\\rtf": ("an RTF document", "Save its content as plain text"),
    b"PK\x03\x04": ("a zip archive, like .docx, .xlsx and .epub", "Unpack it, or save its content as plain text"),
    b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1": ("an old Office document", "Save its content as plain text"),
    b"\x1f\x8b": ("gzip", "Rename it so that its name ends in .gz"),
    b"\x28\xb5\x2f\xfd": ("zstd", "Rename it so that its name ends in .zst"),
    b"BZh": ("bzip2", "Unpack it"),
    b"\xfd7zXZ\0": ("xz", "Unpack it"),
    b"7z\xbc\xaf\x27\x1c": ("a 7z archive", "Unpack it"),
    b"PAR1": ("parquet", "Rename it so that its name ends in .parquet"),
    b"SQLite format 3\0": ("an SQLite database", "Export its text as .csv or .jsonl"),
    b"\x89PNG\r\n": ("an image", "Leave it out"),
    b"\xff\xd8\xff": ("an image", "Leave it out"),
    b"GIF8": ("an image", "Leave it out"),
    b"\x7fELF": ("a program", "Leave it out"),
}
LONE_SURROGATE = re.compile("[\ud800-\udfff]")
HTML = re.compile(r"\s*(?:<\?xml[^>]*>\s*)?(?:<!doctype\s+html|<html[\s>])", re.IGNORECASE)


class Detected(NamedTuple):
    encoding: str  # Python's name
    confidence: float | None = None  # None if the encoding is certain

    def __str__(self) -> str:
        label = DETECTED.get(self.encoding, self.encoding)
        return label if label == self.encoding else f"{label} ({self.encoding})"


def check_name(encoding: str) -> str:
    """Return Python's name of an encoding. Raises UserError if Python has no text encoding of that name."""
    if name := _text_encoding(encoding):
        return name
    names = {*encodings.aliases.aliases, *encodings.aliases.aliases.values(), "utf-8", "utf-16", "shift-jis", "big5"}
    near = [name for name in difflib.get_close_matches(encoding.lower(), names) if _text_encoding(name)]
    hint = f"Did you mean {near[0]}? " if near else ""
    raise UserError(f"--encoding {encoding!r} is not a text encoding. {hint}Use one such as utf-8, gb18030 or cp1252.")


def _text_encoding(encoding: str) -> str | None:
    """Python's name of an encoding, or None if it has no text encoding of that name."""
    try:
        name = codecs.lookup(encoding).name
        codecs.getincrementaldecoder(name)()
        "a".encode(name)  # fails for codecs that are not text encodings
        return name
    except (LookupError, ValueError):
        return None


def detect(data: bytes, name: str, errors: str = "strict") -> Detected:
    """Detect the encoding of a text file from its first SEARCHED_BYTES, or all of it. Messages call the file `name`.

    If the encoding is unclear, raises UserError, or returns UTF-8 if `errors` is not "strict".
    """
    for mark, encoding in BYTE_ORDER_MARKS.items():
        if data.startswith(mark):
            return Detected(encoding)
    if any(escape in data for escape in JIS_ESCAPES):
        return Detected("iso2022_jp")
    n_invalid, nuls = _first_not_utf8(data), data.count(0)
    if n_invalid is None and not nuls:
        return Detected("utf-8")
    sample = data[:SAMPLE_BYTES]
    if not nuls and n_invalid is not None and n_invalid >= SAMPLE_BYTES:
        start = data.rfind(b"\n", n_invalid - SAMPLE_BYTES // 2, n_invalid) + 1 or n_invalid  # not inside a character
        sample = data[start : start + SAMPLE_BYTES]
    guesses = [] if n_invalid is not None and _is_damaged_utf8(sample) else _guesses(sample, bool(nuls))
    if guesses and _is_sure(guesses, sample):
        return Detected(*guesses[0])
    if nuls >= MAX_NUL_FRACTION * len(data):
        raise UserError(
            f"{name} is not text: {nuls:,} of its first {len(data):,} bytes are NUL. Leave it out. If it is text, use "
            "--encoding NAME, such as utf-16-le."
        )
    if n_invalid is None or errors != "strict":
        return Detected("utf-8")  # `Faults` counts the few NUL characters
    line = data.count(b"\n", 0, n_invalid) + 1
    raise UserError(byte_error("utf-8", f"{name} is not UTF-8: byte {n_invalid}", data[n_invalid], guesses, line))


def encoding_of(data: bytes, name: str, encoding: str | None = None, errors: str = "strict") -> Detected:
    """Return `encoding` if it is given, else what `detect` returns for these arguments. Raises UserError if the file is
    not text, or cannot be decoded with `encoding`."""
    if found := binary_type(data):
        raise UserError(f"{name} is {found[0]}, not text. {found[1]}.")
    if not encoding:
        return detect(data, name, errors)
    try:
        codecs.getincrementaldecoder(encoding)("replace").decode(data)
    except UnicodeError as error:
        hint = "another --encoding, or leave it out"
        if encoding in ("utf-16", "utf-32"):  # without a byte order mark
            hint = f"--encoding {encoding}-le or --encoding {encoding}-be"
        raise UserError(f"{name} cannot be read with --encoding {encoding} ({error}). Use {hint}.") from error
    return Detected(encoding)


def detection_notes(detected: dict[str, Detected]) -> list[str]:
    """Return a note per detected encoding other than UTF-8, for the user to check. `detected` has the files by name."""
    files: dict[str, list[str]] = {}
    for name, found in detected.items():
        if found.encoding != "utf-8":
            files.setdefault(str(found), []).append(name)
    notes = []
    for encoding, names in files.items():
        confidences = [c for c in (detected[name].confidence for name in names) if c is not None]
        basis = f"detected with confidence {min(confidences):.2f}" if confidences else "from its byte order mark"
        notes.append(f"note: {subject(names)} read as {encoding}, {basis}; --encoding NAME overrides it")
    return notes


def subject(names: list[str]) -> str:
    """Return the subject of a sentence about these files, with its verb."""
    others = {1: "", 2: " and another file"}.get(len(names), f" and {len(names) - 1:,} other files")
    return f"{names[0]}{others} {'is' if len(names) == 1 else 'are'}"


def byte_error(
    encoding: str | None, where: str, byte: int, guesses: Sequence[tuple[str, float]] = (), line: int | None = None
) -> str:
    """Return the message for a byte that is invalid in the encoding. An `encoding` of None means UTF-8 in a command
    without the option --encoding."""
    likely = ", ".join(f"{name} (confidence {confidence:.2f})" for name, confidence in guesses[:3])
    unclear = f"Its encoding is not clear; the most likely are {likely}. " if likely else ""
    option = f"use {'--encoding NAME' if encoding == 'utf-8' else 'another --encoding'}, " if encoding else ""
    advice = option + "convert the file, leave it out, or use --errors replace"
    in_line = f" (line {line})" if line else ""
    return f"{where} is 0x{byte:02x}{in_line}. {unclear}{advice[0].upper()}{advice[1:]}"


def binary_type(data: bytes) -> tuple[str, str] | None:
    """Return the type of a file that is not text, by its first bytes, and what to do; None if it may be text."""
    return next((description for first, description in BINARY_SIGNATURES.items() if data.startswith(first)), None)


def is_html(text: str) -> bool:
    """Whether a text begins like HTML."""
    return HTML.match(text) is not None


def _first_not_utf8(data: bytes) -> int | None:
    try:
        is_whole = len(data) < SEARCHED_BYTES  # otherwise the data may end inside a character
        codecs.getincrementaldecoder("utf-8")().decode(data, final=is_whole)
        return None
    except UnicodeDecodeError as error:
        return error.start


def _is_damaged_utf8(sample: bytes) -> bool:
    """Whether most non-ASCII characters are valid UTF-8. Damaged UTF-8 would otherwise be taken for GB18030."""
    text = codecs.getincrementaldecoder("utf-8")("replace").decode(sample)
    n_invalid = text.count("\ufffd")
    return sum(not char.isascii() for char in text) - n_invalid > 4 * n_invalid


def _guesses(sample: bytes, has_nuls: bool) -> list[tuple[str, float]]:
    """Return possible encodings of the sample with charset-normalizer's confidence, the most likely first."""
    import charset_normalizer

    guesses: dict[str, float] = {}
    for cut in range(4):  # the sample may end inside a character
        matches = charset_normalizer.from_bytes(sample[: len(sample) - cut], steps=20)
        for match in matches:
            names = [match.encoding, *match.could_be_from_charset]
            names = [FAMILIES.get(name, name) for name in names]
            name = next((name for name in DETECTED if name in names), "cp1252" if "cp1252" in names else names[0])
            if not has_nuls or name.startswith(("utf_16", "utf_32")):
                guesses.setdefault(name, 1 - match.chaos)
        if guesses and next(iter(guesses)) in DETECTED:
            break
    order = [*DETECTED, *COMMON_ENCODINGS]
    return sorted(guesses.items(), key=lambda guess: (-guess[1], order.index(guess[0]) if guess[0] in order else 99))


def _is_sure(guesses: list[tuple[str, float]], sample: bytes) -> bool:
    (name, confidence), *others = guesses
    if name not in DETECTED or confidence < MIN_CONFIDENCE or (others and confidence - others[0][1] < MIN_LEAD):
        return False
    text = codecs.getincrementaldecoder(name)("replace").decode(sample)
    strange = sum(unicodedata.category(char) in ("Cc", "Cn", "Co", "Cs") and char not in "\t\n\r\f" for char in text)
    narrow = sum("\uff61" <= char <= "\uff9f" for char in text)  # 1 byte in Shift-JIS, like KOI8-R
    evidence = len(text) if name.startswith("utf") else sum(not char.isascii() for char in text)
    strange += text.count("\ufffd")
    return evidence >= MIN_NON_ASCII and strange < 0.01 * len(text) and narrow < MAX_NARROW * evidence


# ---------------------------------------------------------------------------------------------------------------------
# Problems in text that was read


class _Replace:
    """The error handler "replace" of codecs, with a counter."""

    count = 0

    def __call__(self, error: UnicodeError) -> tuple[str, int]:
        assert isinstance(error, UnicodeDecodeError), "acorn only decodes with it"
        self.count += 1
        return "\ufffd", error.end


_replace = _Replace()
codecs.register_error("acorn.replace", _replace)


def counting_handler(errors: str) -> str:
    """Return the name of the error handler for `errors` whose replacements `Faults` counts."""
    return "acorn.replace" if errors == "replace" else errors


class Faults:
    """Counts characters that a model should not learn in the text that passes through `look`."""

    WARN = 0.001  # fraction of the characters above which the note becomes a warning

    def __init__(self):
        self.chars = self.marks = self.nuls = self.surrogates = 0
        self.first = {}  # fault -> the name of the first text with it
        self._before = _replace.count

    def look(self, text: str, name: str) -> str:
        """Examine a text that comes from `name`, and return it unchanged."""
        self.chars += len(text)
        if "\0" in text:
            self.nuls += text.count("\0")
            self.first.setdefault("nuls", name)
        if "\ufffd" in text:
            self.marks += text.count("\ufffd")
            self.first.setdefault("marks", name)
        try:
            text.encode()
        except UnicodeEncodeError:
            self.surrogates += len(LONE_SURROGATE.findall(text))
            self.first.setdefault("surrogates", name)
        return text

    def notes(self, option: str = "") -> list[str]:
        """Return a sentence per fault. `option` is the command's option for the encoding, "" if it has none."""
        notes, replaced = [], _replace.count - self._before

        def add(count: int, sentence: str) -> None:
            share = count / max(1, self.chars)
            sentence = sentence.replace("{count}", f"{count:,}").replace("{share}", f"{share:.3%} of the characters")
            notes.append(f"{'warning' if share > self.WARN else 'note'}: {sentence}")

        if replaced:
            hint = f"; if the file is not damaged, use {option}" if option else ""
            add(
                replaced,
                "undecodable bytes were replaced by U+FFFD {count} times ({share}), first in "
                f"{self.first.get('marks', 'a text')}{hint}",
            )
        if self.marks > replaced:
            add(
                self.marks - replaced,
                "the text already contains {count} U+FFFD ({share}) from an earlier conversion, first in "
                f"{self.first['marks']}; convert the original again",
            )
        if self.surrogates:
            add(
                self.surrogates,
                f"the text contains {{count}} lone surrogates ({{share}}), halves of a character such as an emoji, "
                f"first in {self.first['surrogates']}; tokenizers replace them by U+FFFD",
            )
        if self.nuls:
            hint = f", or use {option} if the file has another encoding" if option else ""
            add(
                self.nuls,
                f"the text contains {{count}} NUL characters ({{share}}), first in {self.first['nuls']}; remove "
                f"them{hint}",
            )
        return notes
