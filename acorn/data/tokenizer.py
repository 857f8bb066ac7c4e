"""Text to token ids and back: the interface of all tokenizers, the simplest two, and decoding of a stream.

    ids = tokenizer.encode("hello")             # int32 array
    text = tokenizer.decode(ids)

`tokenizer_kinds.get_tokenizer` returns a tokenizer by name. Text is always encoded as ordinary text: a `<|endoftext|>`
inside a document never becomes the control token. Only `encode_part`, which chat templates use, can encode control
tokens.
"""

import codecs
import functools
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from acorn import UserError, visible

END_OF_TEXT = "<|endoftext|>"


class Tokenizer:
    """The interface of all tokenizers."""

    kind: str
    n_vocab: int
    eot: int | None  # the id of the end-of-text token
    chat_template: str | None = None  # turns a conversation into text, see acorn/data/chat.py; saved with the tokenizer
    more_ends: tuple[int, ...] = ()  # ids besides `eot` and `eos` that end a text, from generation_config.json
    pad: str | None = None  # names of the padding token and of the unknown token; only exports use them
    unk: str | None = None
    unk_id: int | None = None  # the id that replaces words with unknown characters; None if there are no such words
    before_text: tuple[int, ...] = ()  # ids that the tokenizer puts before a text, such as a BOS
    after_text: tuple[int, ...] = ()  # ids that it puts after a text, such as an EOS
    prepends_space = False  # whether encoding adds a space before a text

    def encode(self, text: str) -> np.ndarray:
        """Return the ids of `text`: int32, one dimension."""
        raise NotImplementedError

    def unknown(self, text: str) -> list[str]:
        """Return the words of a text that `unk_id` replaces."""
        return []

    def encode_batch(self, texts: Sequence[str], continues: Sequence[bool] = ()) -> list[np.ndarray]:
        """Return `encode` of each text; faster than single calls for many texts. `continues[i]` is True if text i
        continues an earlier one; the tokenizer then adds no space before it. Empty: no text does."""
        return [self.encode(text) for text in texts]

    def encode_part(self, text: str, continues: bool, control: bool) -> np.ndarray:
        """Return the ids of a part of a text: int32, one dimension. `continues` says that text precedes the part,
        `control` that names of control tokens in it become control tokens."""
        names = "|".join(re.escape(name) for name in sorted(self.control, key=len, reverse=True))
        parts = re.split(f"({names})", text) if control and names else [text]  # every second part is a name
        ids = [[self.control[part]] if i % 2 else self.encode(part) for i, part in enumerate(parts)]
        return np.concatenate(ids).astype(np.int32)

    @property
    def control(self) -> dict[str, int]:
        """The control tokens, name -> id. Ordinary text is never encoded as one."""
        return {} if self.eot is None else {END_OF_TEXT: self.eot}

    @property
    def ends(self) -> set[int]:
        """The ids that end a text."""
        eos = self.control.get(self.eos) if self.eos else None
        return {i for i in (self.eot, eos, *self.more_ends) if i is not None}

    @property
    def before_document(self) -> tuple[int, ...]:
        """The ids before each document of a dataset: `before_text`, else the end-of-text token, but nothing if the
        tokenizer puts ids after each text."""
        return self.before_text or (() if self.eot is None or self.after_text else (self.eot,))

    @property
    def marks_documents(self) -> bool:
        """Whether tokens mark the document boundaries of a dataset."""
        return bool(self.before_document or self.after_text)

    @property
    def bos(self) -> str | None:
        """The name of the control token that chat templates call bos_token, None if there is none."""
        return None if self.eot is None else END_OF_TEXT

    @property
    def eos(self) -> str | None:
        """The name of the control token that chat templates call eos_token, None if there is none."""
        return None if self.eot is None else END_OF_TEXT

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """Return the bytes of the ids, joined. Raises ValueError for an id outside the vocabulary."""
        table = self._table
        return b"".join([table[i] for i in self._check_ids(ids).tolist()])

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Return the text of the ids; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def token_bytes(self) -> np.ndarray:
        """Return the number of bytes of text per token: int32, shape (n_vocab,); 0 for control tokens."""
        lengths = np.array([len(token) for token in self._table], dtype=np.int32)
        lengths[list(self.control.values())] = 0
        return lengths

    @functools.cached_property
    def _table(self) -> list[bytes]:
        """The bytes of each id: the name of a control token, b"" for an unused id."""
        raise NotImplementedError

    def to_dict(self) -> dict:
        """Return the complete tokenizer as a JSON-serializable dict, for `from_dict`."""
        optional = {name: getattr(self, name) for name in ("chat_template", "more_ends", "pad", "unk")}
        return self._saved() | {name: value for name, value in optional.items() if value}

    def add_ends(self, ids: Iterable[int]) -> None:
        """Add ids that end a text; ids outside the vocabulary are ignored."""
        new = {i for i in ids if 0 <= i < self.n_vocab} - self.ends
        self.more_ends = tuple(sorted(new.union(self.more_ends)))

    def _saved(self) -> dict:
        return {"kind": self.kind}

    def _check_ids(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        ids = np.asarray(ids).reshape(-1)
        if ids.size == 0:
            return ids.astype(np.int64)
        if ids.dtype.kind not in "iu":
            raise ValueError(f"token ids must be integers, not {ids.dtype}")
        if ids.min() < 0 or ids.max() >= self.n_vocab:
            raise ValueError(f"token ids must be in [0, {self.n_vocab}), but range from {ids.min()} to {ids.max()}")
        return ids


class CharTokenizer(Tokenizer):
    """One id per character; `vocab` lists the characters in id order."""

    kind = "char"
    eot = None

    def __init__(self, vocab: Sequence[str]):
        self.n_vocab = len(vocab)
        self._code_points = np.array([ord(char) for char in vocab], dtype="<u4")  # id -> code point
        self._ids = np.full(int(self._code_points.max()) + 2, -1, dtype=np.int32)  # code point -> id; -1 is unknown
        self._ids[self._code_points] = np.arange(self.n_vocab, dtype=np.int32)

    def encode(self, text: str) -> np.ndarray:
        ids = self._ids.take(_code_points(text), mode="clip")  # larger code points get the last entry: unknown
        if ids.size and ids.min() < 0:
            position = int(np.argmin(ids))
            char = text[position]
            raise UserError(
                f"the character '{visible(char)}' (U+{ord(char):04X}) at position {position} is not among the "
                f"{self.n_vocab} characters of this tokenizer. Remove it, or prepare the data with --tokenizer gpt2."
            )
        return ids

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._code_points[self._check_ids(ids)].tobytes().decode("utf-32-le", "surrogatepass")

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        return self.decode(ids).encode("utf-8", "surrogatepass")

    @functools.cached_property
    def _table(self) -> list[bytes]:
        return [chr(c).encode("utf-8", "surrogatepass") for c in self._code_points]

    def _saved(self) -> dict:
        return {"kind": "char", "vocab": [chr(c) for c in self._code_points]}


class ByteTokenizer(Tokenizer):
    """One id per UTF-8 byte, and 256 for end of text. It encodes any text and needs no training."""

    kind = "byte"
    n_vocab = 257
    eot = 256

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(well_formed(text).encode(), dtype=np.uint8).astype(np.int32)

    @functools.cached_property
    def _table(self) -> list[bytes]:
        return [bytes([b]) for b in range(256)] + [END_OF_TEXT.encode()]


def train_char(texts: Iterable[str]) -> CharTokenizer:
    """Return the char tokenizer of a corpus. Ids are ranks in the sorted set of its characters, as in nanoGPT."""
    is_present = np.zeros(0x110000, dtype=bool)
    for text in texts:
        is_present[_code_points(text)] = True
    if not is_present.any():
        raise UserError("there is no text to learn characters from. Use a corpus that is not empty.")
    return CharTokenizer([chr(c) for c in np.flatnonzero(is_present)])


class StreamDecoder:
    """Decodes ids one by one. A character whose bytes span several tokens is returned once it is complete.

    `before` holds the ids that precede the stream, and may end inside a character. If it is empty or ends where a text
    begins, such as at a BOS, the space that the tokenizer adds there is dropped. None: the preceding ids are unknown;
    nothing is dropped.
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] | None = None):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._drops_space = False
        if before is not None:
            begins = not len(before) or before[-1] in tokenizer.ends.union(tokenizer.before_document)
            self._drops_space = tokenizer.prepends_space and begins
            self._decoder.decode(tokenizer.decode_bytes(before[-3:]))  # a character has at most 4 bytes

    def push(self, token: int) -> str:
        """Return the text that this token completes: often a word, sometimes the empty string."""
        data = self._tokenizer.decode_bytes([token])
        if self._drops_space and data:
            data, self._drops_space = data.removeprefix(b" "), False
        return self._decoder.decode(data)

    def finish(self) -> str:
        """End the stream: drop an incomplete character and return the empty string."""
        self._decoder.reset()
        return ""


def tokenizer_hash(tokenizer: Tokenizer) -> str:
    """Return a SHA-256 (hex) that is equal for two tokenizers that encode text alike."""
    saved = tokenizer.to_dict()
    for name in ("chat_template", "bos", "eos", "more_ends", "pad", "unk"):
        saved.pop(name, None)  # these affect conversations and the end of samples, not the encoding of text
    canonical = json.dumps(saved, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


_SPACE = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"  # Unicode White_Space, tiktoken's \s
_BOUNDARY = re.compile(f"[{_SPACE}](?=[^{_SPACE}])")
# a space between two letters, or the position between a letter and Chinese punctuation
_CUTS = re.compile(r"(?<=[^\W\d_])(?: (?=[^\W\d_])|(?=[，。、；：？！]))")


def split_text(text: str, size: int = 1 << 17) -> Iterator[str]:
    """Cut `text` into pieces of about `size` characters or more whose concatenated ids are those of the whole text.

    Cuts are before a single space between two words, or between a letter and Chinese punctuation, where nearly every
    tokenizer has a boundary. Other text is cut before the last whitespace character of a run that is followed by more
    text. That is exact for GPT-2: its pattern never extends from a word into whitespace (` ?word`). It matches a run of
    spaces before a word except the last space, and it matches a run at the end of a text, as the cut makes it,
    completely.
    """
    start = 0
    while len(text) - start > size:
        earliest = start + size
        boundary = _CUTS.search(text, earliest, earliest + size) or _BOUNDARY.search(text, earliest)
        if boundary is None:
            break
        yield text[start : boundary.start()]
        start = boundary.start()
    yield text[start:]


def _code_points(text: str) -> np.ndarray:
    if text.isascii():
        return np.frombuffer(text.encode(), dtype=np.uint8)
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


def well_formed(text: str) -> str:
    """Replace lone surrogates, which UTF-8 cannot encode, by U+FFFD, like tiktoken."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
