"""tokenizer.json files: control tokens, templates, new tokens, ids against transformers, and hostile files."""

import json
import time
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from helpers import TEXT, TEXTS, bpe_tokenizer, llama_tokenizer, sentencepiece, tokenizer_json, write_hf

from acorn import UserError
from acorn.data import chat, records, sandbox
from acorn.data.shards import load_dataset
from acorn.data.tokenizer import END_OF_TEXT, ByteTokenizer, StreamDecoder, tokenizer_hash
from acorn.data.tokenizer_gpt2 import GPT2Tokenizer, gpt2_config
from acorn.data.tokenizer_json import HFTokenizer, add_tokens, extends, is_hf, load_hf
from acorn.data.tokenizer_kinds import from_dict, get_tokenizer
from acorn.inference.generate import TextStream, encode_prompt
from prepare.__main__ import prepare_corpus
from prepare.pipeline import prepare

GPT2, BPE, LLAMA = GPT2Tokenizer(), bpe_tokenizer(), llama_tokenizer()


@pytest.mark.parametrize("prepend", ["normalizer", "first", "always", "never"])
def test_sentencepiece_tokenizer_json_matches_tokenizers(prepend):
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

    # encoded in parts, a text has the same ids as encoded as a whole, including control tokens
    parts = ["<s>take the", " letter", " slowly</s>\n<s>bring", " it"]
    whole = theirs.encode("".join(parts), add_special_tokens=False).ids
    ids = [tokenizer.encode_part(part, i > 0, control=True) for i, part in enumerate(parts)]
    assert np.concatenate(ids).tolist() == whole

    decoder = StreamDecoder(tokenizer)  # the preceding ids are unknown, so the leading space stays
    out = [decoder.push(i) for i in tokenizer.encode("horse 字").tolist()]
    assert "".join(out) == " " * (prepend != "never") + "horse 字"


@pytest.mark.parametrize("prepend", ["normalizer", "first", "always", "ByteLevel", "unmarked"])
def test_cutting_long_documents_does_not_change_ids(prepend, tmp_path, monkeypatch, small_steps):
    """A tokenizer that adds a space before a text adds none where a document is cut."""
    monkeypatch.chdir(tmp_path)
    config = tokenizer_json() if prepend == "ByteLevel" else sentencepiece(prepend.replace("unmarked", "first"))
    if prepend == "ByteLevel":
        config["pre_tokenizer"]["add_prefix_space"] = True
    eos = {} if prepend == "unmarked" else {"eos_token": "</s>"}
    write_hf(Path("t"), config, tokenizer_config=eos)
    text = "take the letter, bring the horse;\n\n    slowly\n" * 30 + "春眠不觉晓，处处闻啼鸟。\n" * 30 + "a1;b" * 300
    texts = [text, "x" + text + "7\n" * 100]
    for name, part in zip("ab", texts, strict=True):
        Path(f"{name}.txt").write_text(part)
    prepare_corpus("text a.txt b.txt --tokenizer t --val_fraction 0.01 --name d".split())
    dataset = load_dataset("d")
    ids = [i for split in (dataset.train, dataset.val) for i in split.read([0], len(split))[0].tolist()]
    if prepend == "unmarked":  # documents are joined by a blank line
        assert dataset.tokenizer.decode(ids) == "\n\n".join(texts)
        return
    mark = dataset.tokenizer.eot
    assert ids == [i for text in texts for i in [mark, *dataset.tokenizer.encode(text).tolist()]]


def test_folder_provides_control_tokens_and_template(tmp_path):
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
def test_broken_folder_raises_user_error(tmp_path, files, message):
    with pytest.raises(UserError, match=message) as error:
        get_tokenizer(str(write_hf(tmp_path, **files)))
    assert str(tmp_path) in str(error.value)


def test_new_tokens_added_by_transformers_are_recognized(tmp_path):
    theirs = tokenizers.Tokenizer.from_str(json.dumps(BPE.config))
    theirs.add_special_tokens(["<|x|>"])
    config = json.loads(theirs.to_str())
    tokenizer = HFTokenizer(config, END_OF_TEXT, None, None)
    assert extends(tokenizer, BPE) and extends(add_tokens(tokenizer, ["<|y|>"]), BPE)
    transformers = pytest.importorskip("transformers")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=theirs, eos_token=END_OF_TEXT)
    fast.save_pretrained(tmp_path)
    assert extends(load_hf(tmp_path), BPE)
    post = processor([(END_OF_TEXT, 339)], [])
    assert not extends(HFTokenizer(config | {"post_processor": post}, END_OF_TEXT, None, None), BPE)
    config["model"]["merges"][-2:] = config["model"]["merges"][:-3:-1]  # swap the last two
    assert not extends(HFTokenizer(config, END_OF_TEXT, None, None), BPE)


def test_invalid_new_tokens_raise_user_error(tmp_path, monkeypatch):
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


def processor(before: list[tuple[str, int]], after: list[tuple[str, int]]) -> dict:
    """Return a post-processor for a tokenizer.json that adds control tokens before and after a text."""
    special = {name: {"id": name, "ids": [i], "tokens": [name]} for name, i in [*before, *after]}
    around = [[{"SpecialToken": {"id": name, "type_id": 0}} for name, _ in side] for side in (before, after)]
    single = [*around[0], {"Sequence": {"id": "A", "type_id": 0}}, *around[1]]
    pair = [*single, {"Sequence": {"id": "B", "type_id": 1}}]
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special}


def with_processor(folder: Path, before: list[str], after: list[str], sequence: bool = False, **files) -> Path:
    """Write the BPE tokenizer with `<s>` (340), `</s>` (341) and a post-processor that adds `before` and `after`."""
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
def test_ids_of_texts_prompts_and_documents_match_transformers(tmp_path, before, after, sequence):
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


GPT2_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
DIGITS = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, GPT2_LEVEL]}


@pytest.mark.parametrize(
    "changes",
    [
        {"post_processor": processor([(END_OF_TEXT, 50256)], [])},
        pytest.param({"post_processor": processor([], [(END_OF_TEXT, 50256)])}, marks=pytest.mark.slow),
        {"normalizer": {"type": "NFC"}},
        pytest.param({"pre_tokenizer": DIGITS}, marks=pytest.mark.slow),
        pytest.param({"pre_tokenizer": GPT2_LEVEL | {"add_prefix_space": True}}, marks=pytest.mark.slow),
        pytest.param({"pre_tokenizer": GPT2_LEVEL | {"use_regex": False}}, marks=pytest.mark.slow),
        pytest.param({"special": False}, marks=pytest.mark.slow),
        {"first_merge": "t h"},
    ],
)
def test_tokenizer_with_gpt2s_vocabulary_but_another_pipeline_is_kept(tmp_path, changes):
    config = gpt2_config()
    if first := changes.get("first_merge"):
        config["model"]["merges"].sort(key=lambda pair: pair != first)
    elif "special" in changes:
        config["added_tokens"][0] |= changes
    else:
        config |= changes
    ours = load_hf(write_hf(tmp_path, config))
    assert ours.kind == "hf"
    theirs = tokenizers.Tokenizer.from_str(json.dumps(config))
    theirs.encode_special_tokens = True
    texts = ("It's 1234 the cafe\u0301  x", "the\n\n'vest", END_OF_TEXT)
    for text in texts:
        ids = theirs.encode(text).ids
        assert [*ours.before_text, *ours.encode(text), *ours.after_text] == ids
        if not ours.after_text:
            assert encode_prompt(ours, text) == ids
    assert any(theirs.encode(text).ids != get_tokenizer("gpt2").encode(text).tolist() for text in texts)


def test_gpt2_is_recognized_in_all_saved_formats(tmp_path):
    transformers = pytest.importorskip("transformers")
    published = gpt2_config() | {
        "post_processor": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False}
    }
    del published["model"]["type"], published["pre_tokenizer"]["use_regex"]  # older versions did not write these
    names = {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "unk_token": END_OF_TEXT}
    write_hf(tmp_path / "published", published, tokenizer_config=names)
    without_end = gpt2_config() | {"added_tokens": []}
    write_hf(tmp_path / "without_end", without_end, tokenizer_config=names)
    (tmp_path / "old").mkdir()
    tokenizers.Tokenizer.from_str(json.dumps(published)).model.save(str(tmp_path / "old"))  # vocab.json and merges.txt
    transformers.GPT2Tokenizer.from_pretrained(tmp_path / "old").save_pretrained(tmp_path / "gpt2")
    generic = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "published")
    generic.save_pretrained(tmp_path / "generic")
    for name in ("published", "without_end", "gpt2", "generic"):
        assert load_hf(tmp_path / name).kind == "gpt2", name
    added = transformers.GPT2Tokenizer.from_pretrained(tmp_path / "old", add_bos_token=True)
    added.save_pretrained(tmp_path / "bos")
    assert encode_prompt(load_hf(tmp_path / "bos"), "It's") == added("It's")["input_ids"] == [50256, 1026, 338]


@pytest.mark.parametrize("where", ["tokenizer_config", "special_tokens_map"])
@pytest.mark.parametrize("role", ["eos_token", "bos_token", "pad_token", "unk_token", "additional_special_tokens"])
def test_named_tokens_are_special_as_in_transformers(tmp_path, role, where):
    transformers = pytest.importorskip("transformers")
    ordinary = {"special": False, "normalized": True}
    names = [END_OF_TEXT, "</s>", "<plain>"]
    added = [BPE.config["added_tokens"][0] | ordinary | {"id": i, "content": name} for i, name in enumerate(names, 339)]
    named = {role: ["</s>"] if role.startswith("additional") else "</s>"}
    files = {"tokenizer_config": {"tokenizer_class": "PreTrainedTokenizerFast"}}
    files.setdefault(where, {}).update(named)
    folder = write_hf(tmp_path / "t", BPE.config | {"added_tokens": added}, **files)
    theirs, ours = transformers.AutoTokenizer.from_pretrained(folder), get_tokenizer(str(folder))
    assert theirs.all_special_ids == [340] and ours.control == {"</s>": 340}
    # transformers lists additional tokens as special, but its backend treats them as special only after this call
    theirs.add_tokens(theirs.all_special_tokens, special_tokens=True)
    assert ours.eot == (340 if role == "eos_token" else None)
    for tokenizer in (ours, from_dict(json.loads(json.dumps(ours.to_dict())))):
        for text in ("a</s>b", "take</s> <plain> the", f"{END_OF_TEXT}</s>"):
            assert tokenizer.encode(text).tolist() == theirs(text, split_special_tokens=True)["input_ids"]
            assert tokenizer.encode_part(text, False, control=True).tolist() == theirs(text)["input_ids"]


def test_documents_are_separated_by_an_eos_from_tokenizer_config(tmp_path):
    config = json.loads(json.dumps(BPE.config))
    end = config["added_tokens"][0]
    config["added_tokens"] = [end | {"special": False}, end | {"id": 340, "content": "</s>", "special": False}]
    tokenizer = load_hf(write_hf(tmp_path / "t", config, tokenizer_config={"eos_token": "</s>"}))
    documents = ["take</s> the letter", "bring it"] * 9
    prepare(documents, tmp_path / "d", name="d", tokenizer=tokenizer, source={}, val_by="end", val_fraction=0.2)
    dataset = load_dataset(str(tmp_path / "d"))
    ids = [i for split in (dataset.train, dataset.val) for i in split.read([0], len(split))[0].tolist()]
    assert ids == [i for text in documents for i in (340, *tokenizer.encode(text).tolist())]
    assert ids.count(340) == len(documents)


def test_named_vocabulary_tokens_become_special(tmp_path):
    """As in transformers, this applies to control tokens that the vocabulary lists as ordinary tokens."""
    transformers = pytest.importorskip("transformers")
    config = sentencepiece() | {"added_tokens": []}
    names = {"bos_token": "<s>", "eos_token": {"content": "</s>", "__type": "AddedToken"}, "pad_token": "<missing>"}
    folder = write_hf(tmp_path, config, tokenizer_config=names | {"tokenizer_class": "PreTrainedTokenizerFast"})
    theirs, ours = transformers.AutoTokenizer.from_pretrained(folder), load_hf(folder)
    assert ours.control == {"<s>": 1, "</s>": 2} and ours.eot == 2
    for text in ("a</s>b", "<s>take the</s>"):
        assert ours.encode(text).tolist() == theirs(text, split_special_tokens=True)["input_ids"]
        assert ours.encode_part(text, False, control=True).tolist() == theirs(text)["input_ids"]


def test_every_end_token_of_a_checkpoint_ends_a_text(tmp_path):
    ends = {"generation_config": {"eos_token_id": [341, 300]}, "config": {"eos_token_id": 301}}
    tokenizer = get_tokenizer(str(with_processor(tmp_path / "t", ["<s>"], [], **ends)))
    assert tokenizer.ends == {339, 341, 300, 301}
    again = from_dict(json.loads(json.dumps(tokenizer.to_dict())))
    assert again.ends == tokenizer.ends and tokenizer_hash(again) == tokenizer_hash(tokenizer)
    assert tokenizer_hash(get_tokenizer(str(with_processor(tmp_path / "u", ["<s>"], [])))) == tokenizer_hash(tokenizer)
    assert add_tokens(tokenizer, ["<|note|>"]).ends == tokenizer.ends
    for end in (*tokenizer.ends, 340):  # 340 is the BOS of the next document
        stream = TextStream(tokenizer)
        assert stream.push(65) and stream.stopped_by is None
        assert stream.push(end) == "" and stream.stopped_by == "end of text"
    old = {
        name: value for name, value in tokenizer.to_dict().items() if name in ("kind", "config", "eot", "bos", "eos")
    }
    assert from_dict(old).ends == {339, 341}
    with pytest.raises(UserError, match="more_ends"):
        from_dict(old | {"more_ends": ["</s>"]})


def test_tool_template_is_used_only_with_tools(tmp_path):
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


def pattern(regex: str) -> dict:
    split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {"type": "Sequence", "pretokenizers": [split, byte_level]}


EMPTY = dict.fromkeys(("type", "vocab", "merges"), None)


@pytest.mark.usefixtures("alarm")
@pytest.mark.parametrize(
    "changes",
    [
        {"model": {}},
        {"model": EMPTY},
        {"model": {"type": "BPE", "vocab": {}, "merges": []}},
        {"model": {"type": "WordLevel", "vocab": {}, "unk_token": "x"}},
        {"model": {"type": "Unigram", "vocab": [], "unk_id": None}},
        {"pre_tokenizer": pattern("(a+)+$")},
        {"pre_tokenizer": pattern(r"[\s\S]*[\x00\x01]|.")},  # quadratic time
        {"pre_tokenizer": {"type": []}},
        {"normalizer": {"type": "Replace", "pattern": {"String": "a"}, "content": "b" * 10**6}},  # expands to 64 GB
        {"normalizer": []},
        {"added_tokens": [{"id": 2**40, "content": "x"}]},
        {"added_tokens": {}},
        {"decoder": {"type": "Replace", "pattern": {"Regex": "((("}, "content": ""}},
    ],
)
def test_hostile_tokenizers_raise_user_error(tmp_path, changes, monkeypatch):
    monkeypatch.setattr(sandbox, "CPU_SECONDS", 1)
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer_json(**changes)))
    began = time.process_time()
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        load_hf(tmp_path)
    assert time.process_time() - began < 5  # CPU time of the worker process does not count


def test_common_patterns_are_accepted():
    gpt2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    llama3 = r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    for regex in (gpt2, llama3):
        tokenizer = from_dict({"kind": "hf", "config": tokenizer_json(pre_tokenizer=pattern(regex))})
        assert tokenizer.decode(tokenizer.encode("to be, or 12 not")) == "to be, or 12 not"


@pytest.mark.usefixtures("alarm")
def test_pattern_that_fails_on_a_text_raises_user_error(monkeypatch):
    """The pattern passes the check at load time, but fails on another text."""
    tokenizer = from_dict({"kind": "hf", "config": tokenizer_json(pre_tokenizer=pattern("(?=(q+)+$)."))})
    assert len(tokenizer.encode("to be")) > 0
    for encode in (tokenizer.encode, lambda text: tokenizer.encode_part(text, True, True)):
        with pytest.raises(UserError, match="fails on the text"):
            encode("q" * 50 + "!")


WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] \u5e8a \u524d \u660e \u6708 \u5149 \uff0c \u3002".split()
WORDS += "the moon ##s ##light is 20 ##26 \u5e74 !".split()
POEM = "\u5e8a\u524d\u660e\u6708\u5149\uff0c\n2026\u5e74  The moonlight IS \u7591 ! moons\u3002"


@pytest.mark.parametrize("as_json", [False, True])
def test_word_piece_matches_transformers_and_reports_losses(tmp_path, monkeypatch, capsys, as_json):
    transformers = pytest.importorskip("transformers")
    folder = tmp_path / "bert"
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    theirs = transformers.BertTokenizer(str(folder / "vocab.txt"))
    if as_json:
        theirs.save_pretrained(folder)
        (folder / "vocab.txt").unlink(missing_ok=True)
    tokenizer = load_hf(folder)
    ids = tokenizer.encode(POEM)
    assert ids.tolist() == theirs(POEM, add_special_tokens=False)["input_ids"] and tokenizer.n_vocab == len(WORDS)
    assert [*tokenizer.before_text, *ids, *tokenizer.after_text] == theirs(POEM)["input_ids"]
    assert (tokenizer.bos, tokenizer.eos, tokenizer.eot) == ("[CLS]", "[SEP]", 3)
    text = "\u5e8a\u524d\u660e\u6708\u5149\uff0c 2026\u5e74 the moonlight is[UNK]! moons\u3002"
    assert tokenizer.decode(ids) == text and tokenizer.unknown(POEM) == ["\u7591"]
    stream = StreamDecoder(tokenizer)
    assert "".join(stream.push(i) for i in ids.tolist()) == text
    again = from_dict(json.loads(json.dumps(tokenizer.to_dict())))
    assert again.encode(POEM).tolist() == ids.tolist() and again.unk_id == 1

    monkeypatch.chdir(tmp_path)
    (tmp_path / "poem.txt").write_text(POEM * 20, encoding="utf-8")
    prepare_corpus(["text", "poem.txt", "--tokenizer", str(folder)])
    said = capsys.readouterr().out
    assert "the case of letters" in said and "20 words became [UNK], most often \u7591 (20)" in said
    meta = json.loads((tmp_path / "data" / "poem" / "meta.json").read_text())
    assert meta["unknown"] == {"tokens": 20, "words": {"\u7591": 20}}


def test_unsupported_tokenizer_files_are_refused_with_advice(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a")
    with pytest.raises(UserError, match=r"SentencePiece.*AutoTokenizer\.from_pretrained"):
        load_hf(tmp_path) if is_hf(tmp_path) else None
    (tmp_path / "vocab.txt").write_text("a\nb\n")
    with pytest.raises(UserError, match=r"lacks \[UNK\].*bpe:8192"):
        load_hf(tmp_path)


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
