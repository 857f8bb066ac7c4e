"""acorn/data/tokenizer_kinds.py: tokenizers by name, BPE training, and broken saved tokenizers."""

import json
import random

import pytest
import tokenizers
from helpers import TEXT, TEXTS, bpe_tokenizer, sentencepiece, write_hf

from acorn import UserError
from acorn.data.shards import load_dataset
from acorn.data.tokenizer import END_OF_TEXT
from acorn.data.tokenizer_gpt2 import gpt2_config
from acorn.data.tokenizer_kinds import cut_long_words, from_dict, get_tokenizer, sample_pieces, train_bpe
from prepare.__main__ import prepare_corpus

BPE = bpe_tokenizer()


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
        {"kind": "byte", "chat_template": 1},
        {"kind": "hf", "config": {}},
        {"kind": "hf", "config": [], "eot": None},
        {"kind": "bpe", "config": BPE.config, "eot": 3},
        {
            "kind": "bpe",
            "config": BPE.config | {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}},
            "eot": None,
        },
        {"kind": "bpe", "config": BPE.config | {"normalizer": {"type": "Lowercase"}}, "eot": None},
        {"kind": "hf", "config": sentencepiece() | {"model": sentencepiece()["model"] | {"byte_fallback": False}}},
    ],
)
def test_from_dict_refuses_broken_data(saved):
    with pytest.raises(UserError, match=r"broken|differ|neither|changes text"):
        from_dict(saved)


def test_unknown_kind_is_refused():
    with pytest.raises(UserError, match="no tokenizer 'word'\\. Choose char"):
        get_tokenizer("word")


def test_bpe_training_is_deterministic():
    assert BPE.n_vocab == 340 and BPE.eot == 339 and BPE.kind == "bpe"
    assert train_bpe([TEXT], 340).to_dict() == BPE.to_dict()
    assert len(BPE.encode(TEXT)) < len(TEXT) / 3 and BPE.decode(BPE.encode(TEXT)) == TEXT
    assert BPE.encode("it slowly").tolist() == [BPE._vocab["it"], BPE._vocab["\u0120slowly"]]
    theirs = tokenizers.Tokenizer.from_str(json.dumps(BPE.config))
    for text in TEXTS[:-4]:
        assert theirs.decode(theirs.encode(text).ids, skip_special_tokens=False) == text
        if END_OF_TEXT not in text:
            assert BPE.encode(text).tolist() == theirs.encode(text).ids


def test_bpe_of_a_small_text_has_fewer_tokens_and_empty_text_is_refused(capsys):
    n_vocab = get_tokenizer("bpe:8192", ["abab abab"]).n_vocab
    assert 257 <= n_vocab < 270 and f"only {n_vocab} tokens" in capsys.readouterr().err
    with pytest.raises(UserError, match="no text"):
        get_tokenizer("bpe:8192", [""])
    for wrong in ("bpe:", "bpe:100", "bpe:8k", "bpe:99999999", "bpe:-300", "bpe:300:x:0", "bpe:300:1"):
        with pytest.raises(UserError, match="257 or more tokens, such as bpe:8192"):
            get_tokenizer(wrong, ["text"])


def words(tokenizer, text: str) -> list[str]:
    """Return the words into which the pre-tokenizer splits a text."""
    return [text[start:end] for _, (start, end) in tokenizer._backend.pre_tokenizer.pre_tokenize_str(text)]


def test_chinese_words_end_at_punctuation_spaces_and_digits():
    text = "床前明月光，疑是地上霜。\n举头 Python3代码2026年！？"
    expected = ["床前明月光", "，", "疑是地上霜", "。", "\n", "举头", " Python", "3", "代码", "2026", "年", "！？"]
    assert words(BPE, text) == expected


@pytest.mark.parametrize(("digits", "groups"), [(0, ["12345678"]), (1, list("12345678")), (3, ["123", "456", "78"])])
def test_digits_are_split_into_groups(digits, groups):
    tokenizer = train_bpe([TEXT + "12345678 " * 9], 340, digits)
    assert words(tokenizer, "in 12345678") == ["in", *([" ", *groups] if digits else [" 12345678"])]
    assert max(len(tokenizer.decode([i])) for i in tokenizer.encode("12345678")) <= (digits or 8)
    for text in TEXTS[:-4]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.encode(text).tolist() == tokenizer._reference(text).tolist()
    assert from_dict(tokenizer.to_dict()).encode("a 12345678").tolist() == tokenizer.encode("a 12345678").tolist()


def test_reserved_ids_are_control_tokens_after_end_of_text():
    tokenizer = train_bpe([TEXT], 340, reserved=3)
    assert (tokenizer.n_vocab, tokenizer.eot) == (340, 336)
    assert tokenizer.control == {END_OF_TEXT: 336} | {f"<|reserved_{i}|>": 337 + i for i in range(3)}
    assert max(tokenizer.encode("<|reserved_0|> is text")) < 336
    assert tokenizer.encode_part("<|reserved_1|>", False, True).tolist() == [338]
    assert get_tokenizer("bpe:340:0:3", [TEXT]).to_dict() == tokenizer.to_dict()
    with pytest.raises(UserError, match="Reserve between 0 and 83"):
        get_tokenizer("bpe:340:0:84", [TEXT])


def test_training_cuts_long_words():
    source = random.Random(0)
    word = "".join(chr(0x4E00 + min(int(source.expovariate(0.01)), 900)) for _ in range(20_000))
    parts = list(cut_long_words([word, "short words", "=" * 130]))
    assert "".join(parts) == word + "short words" + "=" * 130 and max(map(len, parts)) <= 75
    tokenizer = train_bpe([word], 600)
    assert tokenizer.decode(tokenizer.encode(word)) == word


def test_training_sample_is_bounded_and_evenly_spread():
    texts = [f"{i:03d}" for i in range(100)]
    assert sample_pieces(texts, 300) == texts
    assert sample_pieces(texts, 299) == texts[::2]
    assert sample_pieces(iter(texts), 40) == texts[::8]


def test_prepare_trains_and_reuses_tokenizers(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text(TEXT)
    folder = write_hf(tmp_path / "hf", gpt2_config())
    for name, spec in (("learned", "bpe:300"), ("reused", "learned"), ("hf", str(folder))):
        prepare_corpus(["text", "a.txt", "--name", name, "--tokenizer", spec])
    learned, reused, hf = (load_dataset(name) for name in ("learned", "reused", "hf"))
    assert learned.tokenizer.n_vocab == 300 and hf.tokenizer.kind == "gpt2"
    assert learned.tokenizer.to_dict() == reused.tokenizer.to_dict()
    ids = reused.train.read([0], len(reused.train))[0]
    assert ids[0] == 299 and TEXT.startswith(learned.tokenizer.decode(ids[1:]))
    assert "300 (bpe)" in capsys.readouterr().out
    prepare_corpus(["text", "a.txt", "--name", "more", "--tokenizer", "bpe:300", "--digits", "1", "--reserve", "2"])
    more = load_dataset("more").tokenizer
    assert (more.n_vocab, more.eot, len(more.control)) == (300, 297, 3) and words(more, "12") == ["1", "2"]
    for option in ("--digits", "--reserve"):
        with pytest.raises(UserError, match=f"{option} applies only.*bpe:8192"):
            prepare_corpus(["text", "a.txt", "--name", "new", "--tokenizer", "gpt2", option, "3"])
    for spec, message in (
        ("bpe:99", "257 or more"),
        ("bpe", r"size.*--tokenizer bpe:\d+"),
        ("nothing", "neither char"),
        ("gtp2", "Did you mean gpt2"),
        ("a.json", "neither char"),
    ):
        with pytest.raises(UserError, match=message):
            prepare_corpus(["text", "a.txt", "--name", "new", "--tokenizer", spec])
