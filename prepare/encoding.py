"""Which encoding a text file has, by a sample of its bytes; and counts of what is wrong with text that was read.

UTF-8 needs no guess: other text is hardly ever valid UTF-8. Otherwise charset-normalizer decides, but only among
encodings with several bytes a character: there most byte sequences are invalid, so decoding the whole file checks the
guess. In Latin-1 or KOI8-R any bytes are text and a wrong guess would go unnoticed, so the user has to name them.
"""

import codecs
import difflib
import encodings.aliases
import re
import unicodedata
from typing import NamedTuple

from acorn import UserError

SAMPLE = 1 << 16  # bytes that are judged
SEARCHED = 1 << 20  # bytes at the beginning of a file among which those that are not ASCII are looked for
CONFIDENT = 0.9  # of charset-normalizer: 1 minus the share of its mess
MARGIN = 0.1  # by which the next one is less sure
NARROW = 0.2  # the share of half-width katakana among the characters beyond ASCII, at most
EVIDENCE = 10  # characters beyond ASCII, at least
NULS = 0.01  # the share of NUL bytes above which a file is not text
MARKS = {  # the longer ones first
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
ESCAPES = (b"\x1b$B", b"\x1b$@")  # of ISO-2022-JP, whose bytes are all ASCII
DETECTED = {  # by Python's name, each the superset of what charset-normalizer cannot tell apart: how people call it
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
COMMON = ("cp1252", "cp1250", "cp1251", "koi8_r", "cp1253", "cp1254", "cp1255", "cp1256", "tis_620")
FAMILIES = {
    **dict.fromkeys(("gb2312", "gbk"), "gb18030"),
    **dict.fromkeys(("big5", "cp950"), "big5hkscs"),
    **dict.fromkeys(("shift_jis", "shift_jis_2004", "shift_jisx0213"), "cp932"),
    **dict.fromkeys(("euc_jis_2004", "euc_jisx0213"), "euc_jp"),
    "euc_kr": "cp949",
}
NOT_TEXT = {  # first bytes: what it is, and what to do
    b"%PDF-": ("a PDF document", "extract its text first, for example with pdftotext"),
    b"{\\rtf": ("an RTF document", "save its content as plain text"),
    b"PK\x03\x04": ("a zip archive, as .docx, .xlsx and .epub are", "unpack it, or save its content as plain text"),
    b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1": ("an old Office document", "save its content as plain text"),
    b"\x1f\x8b": ("gzip", "give it a name that ends in .gz"),
    b"\x28\xb5\x2f\xfd": ("zstd", "give it a name that ends in .zst"),
    b"BZh": ("bzip2", "unpack it"),
    b"\xfd7zXZ\0": ("xz", "unpack it"),
    b"7z\xbc\xaf\x27\x1c": ("a 7z archive", "unpack it"),
    b"PAR1": ("parquet", "give it a name that ends in .parquet"),
    b"SQLite format 3\0": ("an SQLite database", "export its text as .csv or .jsonl"),
    b"\x89PNG\r\n": ("a picture", "leave it out"),
    b"\xff\xd8\xff": ("a picture", "leave it out"),
    b"GIF8": ("a picture", "leave it out"),
    b"\x7fELF": ("a program", "leave it out"),
}
HTML = re.compile(r"\s*(?:<\?xml[^>]*>\s*)?(?:<!doctype\s+html|<html[\s>])", re.IGNORECASE)


class Detected(NamedTuple):
    encoding: str  # as Python calls it
    confidence: float | None = None  # None where it was no guess

    def __str__(self) -> str:
        label = DETECTED.get(self.encoding, self.encoding)
        return label if label == self.encoding else f"{label} ({self.encoding})"


def check_name(encoding: str) -> str:
    """The encoding as Python calls it. One that Python does not have, or that is not one of text, is a UserError."""
    try:
        name = codecs.lookup(encoding).name
        codecs.getincrementaldecoder(name)()
        "a".encode(name)  # others than those of text refuse
        return name
    except (LookupError, ValueError):
        pass
    names = {*encodings.aliases.aliases, *encodings.aliases.aliases.values(), "utf-8", "utf-16", "shift-jis", "big5"}
    near = difflib.get_close_matches(encoding.lower(), names, 1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise UserError(f"--encoding {encoding!r} is no text encoding; {hint}Give one such as utf-8, gb18030 or cp1252.")


def detect(data: bytes, name: str, errors: str = "strict") -> Detected:
    """The encoding of a text file by its beginning, SEARCHED bytes or all of it. `name` is how messages call the file.

    Raises UserError where it is not clear; with other `errors` than strict it is then UTF-8.
    """
    for mark, encoding in MARKS.items():
        if data.startswith(mark):
            return Detected(encoding)
    if any(escape in data for escape in ESCAPES):
        return Detected("iso2022_jp")
    wrong, nuls = _first_not_utf8(data), data.count(0)
    if wrong is None and not nuls:
        return Detected("utf-8")
    sample = data[:SAMPLE]
    if not nuls and wrong >= SAMPLE:
        start = data.rfind(b"\n", wrong - SAMPLE // 2, wrong) + 1 or wrong  # in the middle of no character
        sample = data[start : start + SAMPLE]
    guesses = [] if wrong is not None and _is_damaged_utf8(sample) else _guesses(sample, bool(nuls))
    if guesses and _is_sure(guesses, sample):
        return Detected(*guesses[0])
    if wrong is None and nuls < NULS * len(data):
        return Detected("utf-8")  # the few are counted
    if nuls >= NULS * len(data):
        raise UserError(
            f"{name} is not text: {nuls:,} of its first {len(data):,} bytes are NUL. Leave it out, or give --encoding "
            "NAME if it is text, such as utf-16-le."
        )
    if errors != "strict":
        return Detected("utf-8")
    line = data.count(b"\n", 0, wrong) + 1
    raise UserError(not_in("utf-8", f"{name} is not UTF-8: byte {wrong}", data[wrong], guesses, line))


def not_in(
    encoding: str | None, where: str, byte: int, guesses: list[tuple[str, float]] = (), line: int | None = None
) -> str:
    """The sentence for a byte that is not text in the encoding, and what to do. None is UTF-8 without an option."""
    likely = ", ".join(f"{name} (confidence {confidence:.2f})" for name, confidence in guesses[:3])
    unclear = f"Its encoding is not clear; the likeliest are {likely}. " if likely else ""
    give = f"give {'--encoding NAME' if encoding == 'utf-8' else 'another --encoding'}, " if encoding else ""
    advice = give + "convert the file, leave it out, or go on with --errors replace"
    in_line = f" (line {line})" if line else ""
    return f"{where} is 0x{byte:02x}{in_line}. {unclear}{advice[0].upper()}{advice[1:]}"


def not_text(data: bytes) -> tuple[str, str] | None:
    """What a file is that is not text, by its first bytes, and what to do; None where it may be text."""
    return next((found for first, found in NOT_TEXT.items() if data.startswith(first)), None)


def is_html(text: str) -> bool:
    """Whether a text begins as HTML does."""
    return HTML.match(text) is not None


def _first_not_utf8(data: bytes) -> int | None:
    try:
        is_whole = len(data) < SEARCHED  # else its end may be in the middle of a character
        codecs.getincrementaldecoder("utf-8")().decode(data, final=is_whole)
        return None
    except UnicodeDecodeError as error:
        return error.start


def _is_damaged_utf8(sample: bytes) -> bool:
    """Whether most of what is not ASCII is UTF-8: then it is UTF-8 with faults, which also looks like GB18030."""
    text = codecs.getincrementaldecoder("utf-8")("replace").decode(sample)
    wrong = text.count("\ufffd")
    return sum(not char.isascii() for char in text) - wrong > 4 * wrong


def _guesses(sample: bytes, has_nuls: bool) -> list[tuple[str, float]]:
    """Encodings that the sample may have and charset-normalizer's confidence in them, the likeliest first."""
    import charset_normalizer

    guesses = {}
    for cut in range(4):  # its end may be in the middle of a character
        matches = charset_normalizer.from_bytes(sample[: len(sample) - cut], steps=20)
        for match in matches:
            names = [match.encoding, *match.could_be_from_charset]
            names = [FAMILIES.get(name, name) for name in names]
            name = next((name for name in DETECTED if name in names), "cp1252" if "cp1252" in names else names[0])
            if not has_nuls or name.startswith(("utf_16", "utf_32")):
                guesses.setdefault(name, 1 - match.chaos)
        if guesses and next(iter(guesses)) in DETECTED:
            break
    order = [*DETECTED, *COMMON]
    return sorted(guesses.items(), key=lambda guess: (-guess[1], order.index(guess[0]) if guess[0] in order else 99))


def _is_sure(guesses: list[tuple[str, float]], sample: bytes) -> bool:
    (name, confidence), *others = guesses
    if name not in DETECTED or confidence < CONFIDENT or (others and confidence - others[0][1] < MARGIN):
        return False
    text = codecs.getincrementaldecoder(name)("replace").decode(sample)
    strange = sum(unicodedata.category(char) in ("Cc", "Cn", "Co", "Cs") and char not in "\t\n\r\f" for char in text)
    narrow = sum("\uff61" <= char <= "\uff9f" for char in text)  # in Shift-JIS one byte each, as the letters of KOI8-R
    evidence = len(text) if name.startswith("utf") else sum(not char.isascii() for char in text)
    return evidence >= EVIDENCE and strange + text.count("\ufffd") < 0.01 * len(text) and narrow < NARROW * evidence


# ---------------------------------------------------------------------------------------------------------------------
# What is wrong with text that was read


class _Replace:
    """As the error handler "replace" of codecs, and counts."""

    count = 0

    def __call__(self, error: UnicodeError) -> tuple[str, int]:
        self.count += 1
        return "\ufffd", error.end


_replace = _Replace()
codecs.register_error("acorn.replace", _replace)


def counted(errors: str) -> str:
    """The name of the error handler that does as `errors` says, and whose replacements `Faults` counts."""
    return "acorn.replace" if errors == "replace" else errors


class Faults:
    """Counts, of the text that goes through `look`, what a model had better not learn."""

    WARN = 0.001  # the share of the characters above which it is likely no accident

    def __init__(self):
        self.chars = self.marks = self.nuls = 0
        self.first = {}  # fault: the name of the first text with it
        self._before = _replace.count

    def look(self, text: str, name: str) -> str:
        """The text itself; `name` is where it comes from."""
        self.chars += len(text)
        if "\0" in text:
            self.nuls += text.count("\0")
            self.first.setdefault("nuls", name)
        if "\ufffd" in text:
            self.marks += text.count("\ufffd")
            self.first.setdefault("marks", name)
        return text

    def notes(self, option: str = "") -> list[str]:
        """A sentence for each fault. `option` names another encoding, where the command has such an option."""
        notes, replaced = [], _replace.count - self._before

        def add(count: int, sentence: str) -> None:
            share = count / max(1, self.chars)
            sentence = sentence.replace("{count}", f"{count:,}").replace("{share}", f"{share:.3%} of the characters")
            notes.append(f"{'warning' if share > self.WARN else 'note'}: {sentence}")

        if replaced:
            hint = f"; if that is not damage, give {option}" if option else ""
            add(
                replaced,
                "replaced undecodable bytes by U+FFFD {count} times ({share}), first in "
                f"{self.first.get('marks', 'a text')}{hint}",
            )
        if self.marks > replaced:
            add(
                self.marks - replaced,
                "the text has {count} U+FFFD of its own ({share}), left by an earlier conversion, first in "
                f"{self.first['marks']}; convert the original again",
            )
        if self.nuls:
            hint = f", or give {option} if it has another encoding" if option else ""
            add(
                self.nuls,
                f"the text has {{count}} NUL characters ({{share}}), first in {self.first['nuls']}; remove them{hint}",
            )
        return notes
