"""acorn/data/tokenizer.py: what holds for every tokenizer, such as round trips."""

import json
import subprocess
import sys

import pytest
import tokenizers
from helpers import bpe_tokenizer, fuzz, llama_tokenizer, rounds
from hypothesis import given, settings
from hypothesis import strategies as st

from acorn import UserError
from acorn.data.tokenizer import (
    END_OF_TEXT,
    ByteTokenizer,
    CharTokenizer,
    StreamDecoder,
    split_text,
    tokenizer_hash,
    train_char,
)
from acorn.data.tokenizer_gpt2 import GPT2Tokenizer, _gpt2_encoding
from acorn.data.tokenizer_json import add_tokens, load_hf
from acorn.data.tokenizer_kinds import from_dict, get_tokenizer

GPT2, BPE, LLAMA = GPT2Tokenizer(), bpe_tokenizer(), llama_tokenizer()


def test_split_text_keeps_ids_of_chinese_with_qwens_pattern():
    pattern = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    text = "春眠不觉晓，处处闻啼鸟。\n夜来风雨声，花落知多少？\n\n" * 40
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, byte_level])
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=400, initial_alphabet=byte_level.alphabet())
    backend.train_from_iterator([text], trainer)
    parts = list(split_text(text, 50))
    assert len(parts) > 10 and "".join(parts) == text
    assert [i for part in parts for i in backend.encode(part).ids] == backend.encode(text).ids


@pytest.mark.parametrize("fixed", [None, ByteTokenizer(), GPT2, BPE], ids=["char", "byte", "gpt2", "bpe"])
def test_text_round_trips(fixed):
    fixed_sizes = None if fixed is None else fixed.token_bytes()

    @given(st.text(max_size=50))
    @settings(max_examples=100, deadline=None)
    def round_trip(text):
        tokenizer = fixed or train_char([text, "x"])
        sizes = tokenizer.token_bytes() if fixed is None else fixed_sizes
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode_bytes(ids) == text.encode()
        assert sizes[ids].sum() == len(text.encode())

    round_trip()


def test_char_ids_match_nanogpt():
    text = "To be, or not to be: that is the question.\nÉ😀"
    tokenizer = get_tokenizer("char", [text[:20], text[20:]])
    stoi = {char: i for i, char in enumerate(sorted(set(text)))}
    assert tokenizer.n_vocab == len(stoi) and tokenizer.eot is None
    assert tokenizer.encode(text).tolist() == [stoi[char] for char in text]


def test_char_error_names_the_unknown_character():
    tokenizer = train_char(["abcdef"])
    with pytest.raises(UserError, match=r"character '€' \(U\+20AC\) at position 3 is not among the 6 .* gpt2"):
        tokenizer.encode("abc€")
    with pytest.raises(UserError, match=r"'\\n' \(U\+000A\) at position 0"):
        tokenizer.encode("\nabc")
    with pytest.raises(UserError, match="no text"):
        train_char([""])


def test_surrogates_are_kept_or_replaced():
    text = "a\ud800b\udc00"
    tokenizer = from_dict(json.loads(json.dumps(train_char([text]).to_dict())))
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert get_tokenizer("byte").decode(get_tokenizer("byte").encode(text)) == "a\ufffdb\ufffd"
    assert get_tokenizer("gpt2").encode(text).tolist() == _gpt2_encoding().encode_ordinary(text)


@pytest.mark.parametrize("tokenizer", [train_char(["abc"]), ByteTokenizer(), GPT2, BPE, LLAMA], ids=lambda t: t.kind)
def test_ids_outside_the_vocabulary_are_rejected(tokenizer):
    assert tokenizer.decode([]) == ""
    for bad in ([-1], [tokenizer.n_vocab], [0, 10**12], [0.5]):
        with pytest.raises(ValueError, match="token ids"):
            tokenizer.decode(bad)


def test_control_tokens():
    tokenizer = ByteTokenizer()
    assert (tokenizer.n_vocab, tokenizer.eot) == (257, 256)
    assert tokenizer.decode([256, 104, 105, 256, 256]) == "<|endoftext|>hi<|endoftext|><|endoftext|>"
    for tokenizer in (ByteTokenizer(), GPT2, BPE):
        sizes = tokenizer.token_bytes()
        assert sizes.shape == (tokenizer.n_vocab,) and sizes[tokenizer.eot] == 0 and (sizes > 0).sum() == len(sizes) - 1
        assert tokenizer.eot not in tokenizer.encode("<|endoftext|>")
        part = tokenizer.encode_part("a<|endoftext|><|endoftext|>b", continues=True, control=True).tolist()
        a, b = tokenizer.encode("a").tolist(), tokenizer.encode("b").tolist()
        assert part == [*a, tokenizer.eot, tokenizer.eot, *b]
        assert (
            tokenizer.encode_part(END_OF_TEXT, True, control=False).tolist() == tokenizer.encode(END_OF_TEXT).tolist()
        )


@pytest.mark.parametrize("kind", ["byte", "gpt2", "char", "bpe:300"])
def test_stream_decoder_never_splits_a_character(kind):
    text = "今天天气很好。 naïve 😀 ok"
    tokenizer = get_tokenizer(kind, [text])
    decoder = StreamDecoder(tokenizer)
    out = [decoder.push(int(i)) for i in tokenizer.encode(text)]
    assert "".join(out) == text and not any("\ufffd" in part for part in out)
    assert decoder.finish() == ""


def test_stream_decoder_drops_an_incomplete_tail_and_replaces_invalid_bytes():
    decoder = StreamDecoder(ByteTokenizer())
    assert [decoder.push(b) for b in "é".encode()[:1]] == [""] and decoder.finish() == ""
    assert [decoder.push(b) for b in b"\xffa"] == ["\ufffd", "a"]


def test_hash_differs_between_tokenizers():
    different = [train_char(["ab"]), train_char(["abc"]), CharTokenizer(["b", "a"]), ByteTokenizer(), GPT2, BPE, LLAMA]
    assert len({tokenizer_hash(t) for t in different}) == 7
    for tokenizer in different:
        saved = tokenizer.to_dict() | {"chat_template": "{{ messages[0].content }}"}
        again = from_dict(json.loads(json.dumps(saved)))
        assert again.to_dict() == saved and again.n_vocab == tokenizer.n_vocab
        assert tokenizer_hash(again) == tokenizer_hash(tokenizer)  # the chat template does not affect the hash


def test_import_loads_no_heavy_packages():
    heavy = {"tiktoken", "tokenizers", "fastokens", "torch", "transformers"}
    code = f"import sys, acorn.data.tokenizer_kinds; sys.exit(not {heavy}.isdisjoint(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


texts = st.text(max_size=40) | st.lists(
    st.sampled_from(
        ["<|endoftext|>", "</s>", "\u2581", " ", "\ufeff", "\r\n", "\ud800", "é", "字", "\U0001f600", "\x00"]
    ),
    max_size=12,
).map("".join)


@pytest.fixture(scope="module")
def gpt2_hf(tmp_path_factory):
    """GPT-2's tokenizer.json with one extra token, so that it is not recognized as GPT-2's."""
    folder = tmp_path_factory.mktemp("hf")
    (folder / "tokenizer.json").write_text(json.dumps(add_tokens(GPT2, ["<|note|>"]).config))
    return load_hf(folder)


@pytest.mark.parametrize("kind", ["char", "byte", "gpt2", "bpe", "hf", "sentencepiece"])
@rounds(40, 4000)
def test_any_text_round_trips_in_each_tokenizer(kind, gpt2_hf, rounds):
    fixed = {"byte": ByteTokenizer(), "gpt2": GPT2, "bpe": BPE, "hf": gpt2_hf, "sentencepiece": LLAMA}.get(kind)
    again = None if fixed is None else from_dict(json.loads(json.dumps(fixed.to_dict())))
    assert again is None or tokenizer_hash(again) == tokenizer_hash(fixed)

    def one(text: str) -> None:
        tokenizer = fixed or train_char([text, "x"])
        copy = again or from_dict(json.loads(json.dumps(tokenizer.to_dict())))
        ids = tokenizer.encode(text)
        expected = text if kind == "char" else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        if kind == "sentencepiece":  # writes a space as U+2581, and adds a leading one unless there is one
            expected = expected.replace("\u2581", " ").removeprefix(" ")
        assert tokenizer.decode(ids) == expected
        assert copy.encode(text).tolist() == ids.tolist()
        assert not set(ids.tolist()) & set(tokenizer.control.values())  # text never becomes a control token
        assert [each.tolist() for each in tokenizer.encode_batch([text, "", text])][::2] == [ids.tolist()] * 2
        assert tokenizer.token_bytes()[ids].sum() == len(tokenizer.decode_bytes(ids))

    fuzz(one, rounds, texts)


@pytest.mark.parametrize("kind", ["byte", "gpt2", "bpe", "hf", "sentencepiece"])
@rounds(40, 4000)
def test_any_ids_decode_equally_at_once_and_one_by_one(kind, gpt2_hf, rounds):
    tokenizer = {"byte": ByteTokenizer(), "gpt2": GPT2, "bpe": BPE, "hf": gpt2_hf, "sentencepiece": LLAMA}[kind]

    def one(numbers: list[int]) -> None:
        ids = [i % tokenizer.n_vocab for i in numbers]
        joined = b"".join(tokenizer.decode_bytes([i]) for i in ids)
        assert tokenizer.decode_bytes(ids) == joined
        stream = StreamDecoder(tokenizer)
        pieces = "".join(stream.push(i) for i in ids) + stream.finish()
        whole = joined.decode("utf-8", "replace")
        # the stream omits an incomplete last character, which has at most three bytes
        assert whole.startswith(pieces) and whole.removeprefix(pieces) in ("", *("\ufffd" * n for n in (1, 2, 3)))

    fuzz(one, rounds, st.lists(st.integers(0, 2**20), max_size=20))
