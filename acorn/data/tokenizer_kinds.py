"""All kinds of tokenizers: get one by its name, train one, or read one that a dataset or a checkpoint has saved.

tokenizer = get_tokenizer("gpt2")           # or "bpe:8192" and texts to train it on, or a tokenizer.json
same = from_dict(tokenizer.to_dict())       # datasets and checkpoints store a tokenizer as JSON
"""

import json
import re
import sys
from collections.abc import Iterable, Iterator

from acorn import UserError
from acorn.data.tokenizer import (
    END_OF_TEXT,
    ByteTokenizer,
    CharTokenizer,
    Tokenizer,
    split_text,
    train_char,
    well_formed,
)
from acorn.data.tokenizer_gpt2 import GPT2_FILES, TIKTOKEN_KINDS, GPT2Tokenizer, TiktokenTokenizer, byte_alphabet
from acorn.data.tokenizer_json import MAX_VOCAB, HFTokenizer, is_hf, load_hf

KINDS = ("char", "byte", "gpt2", "cl100k_base", "o200k_base")  # besides bpe:SIZE and the path of a tokenizer.json
BPE_SAMPLE = 50_000_000  # the most characters that a BPE is trained on


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
    backend.train_from_iterator(map(well_formed, cut_long_words(sample)), trainer)
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
