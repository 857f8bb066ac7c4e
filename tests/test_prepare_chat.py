"""prepare/chat.py: tokens and masks of prepared conversations, and bad input, which leaves no dataset."""

import datetime
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from chat_templates import TEMPLATES
from helpers import CALLING, TALK, TEXT, TOOL, TWO, conversation, spans, with_control

from acorn import UserError
from acorn.data import batches, chat
from acorn.data.shards import load_dataset
from acorn.data.tokenizer_json import load_hf
from prepare.__main__ import prepare_corpus
from prepare.chat import limited


def test_limit_drops_the_oldest_turns_then_the_end_of_the_reply():
    forms = [(np.arange(n), np.arange(n) >= 3) for n in (10, 8, 5)]

    def lengths(limit):
        return [len(ids) for ids, _ in limited(forms, limit)]

    assert lengths(None) == lengths(10) == [10, 8, 5]
    assert lengths(9) == lengths(8) == [8, 5] and lengths(7) == [5]
    assert lengths(4) == [4] and lengths(3) == []  # a limit of 3 leaves no reply of 0 1 2 | 3 4
    assert limited([(np.arange(2), np.array([True, False]))], None) == []  # the first token is never a target


@pytest.fixture
def pairs(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    lines = [{"prompt": f"{i} or {i + 1}?", "response": str(i % 7) * (i % 4)} for i in range(200)]
    lines += [{"messages": TALK}, {"prompt": "Once more?", "response": "No, never again." * 2}]
    Path("pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return tmp_path


def targets(tokens, block_size) -> list[int]:
    """Return the learned tokens of a split, sorted."""
    y = batches.in_order(tokens, block_size, 0, batches.samples_per_epoch(tokens, block_size))[1]
    return sorted(y[y >= 0].tolist())


def test_prepared_tokens_and_masks_match_the_records(pairs, capsys):
    prepare_corpus("chat pairs.jsonl --tokenizer byte --shard_tokens 1000".split())
    dataset = load_dataset("pairs")
    assert len(dataset.train.mask.shards) == len(dataset.train.shards) > 3
    want = {"train": [], "val": []}
    learn = {"train": [], "val": []}
    tokenizer = dataset.tokenizer
    val_text = tokenizer.decode(dataset.val.read([0], len(dataset.val))[0])
    for line in Path("pairs.jsonl").read_text().splitlines():
        record = json.loads(line)
        if "messages" in record:
            ids, mask = chat.render_to_learn(tokenizer, TALK)  # tested in test_chat.py
        else:
            prompt = [256, *f"User:\n{record['prompt']}\n\nAssistant:\n".encode()]
            reply = [*record["response"].encode(), 256]
            ids, mask = np.array(prompt + reply), np.array([0] * len(prompt) + [1] * len(reply), dtype=bool)
        split = "val" if tokenizer.decode(ids) in val_text else "train"
        want[split] += ids.tolist()
        learn[split] += ids[mask].tolist()
    for name, tokens in (("train", dataset.train), ("val", dataset.val)):
        assert tokens.read([0], len(tokens))[0].tolist() == want[name]
        assert targets(tokens, 200) == targets(tokens, 1000) == sorted(learn[name])
        assert dataset.meta[name]["learned"] == len(learn[name]) > 0
    assert dataset.meta["documents"] == 202 and len(dataset.val) < len(dataset.train) / 4

    # an epoch of random windows contains each of these targets once, and no others
    n = batches.samples_per_epoch(dataset.train, 200)
    x, y, documents = batches.sample(dataset.train, 200, 0, n, seed=1)
    assert Counter(y[y >= 0].tolist()) == Counter(learn["train"])
    inside = (y[:, :-1] >= 0) & (documents[:, :-1] == documents[:, 1:]) & (x[:, 1:] != 0)
    assert inside.any() and (y[:, :-1][inside] == x[:, 1:][inside]).all()
    assert f"learned          {len(learn['train'] + learn['val']):,}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("record", "messages"),
    [
        ({"messages": CALLING, "tools": [TOOL]}, CALLING),
        ({"messages": [TWO[0] | {"content": [{"type": "text", "text": "Say "}, {"text": "hi"}]}, TWO[1]]}, TWO),
        ({"conversations": [{"from": "human", "value": "Say hi"}, {"from": "gpt", "value": "hi"}]}, TWO),
        ({"instruction": "Say", "input": "hi", "output": "hi"}, [TWO[0] | {"content": "Say\n\nhi"}, TWO[1]]),
    ],
)
def test_prepared_ids_match_transformers(tmp_path, monkeypatch, record, messages):
    transformers = pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(with_control(tmp_path / "t", *TEMPLATES["qwen2.5"]))
    expected = theirs.apply_chat_template(messages, tools=record.get("tools"), return_dict=False)
    Path("a.jsonl").write_text((json.dumps(record) + "\n") * 20)
    prepare_corpus(["chat", "a.jsonl", "--tokenizer", "t"])
    train = load_dataset("a").train
    n = len(train) // 18
    assert train.read([0], n)[0].tolist() == expected[:n] and theirs.decode(expected[n:]) == "\n"
    learned = train.mask.read([0], n)[0].astype(bool)
    replies = [m["content"] for m in messages if m["role"] == "assistant"]
    found = spans(load_hf(tmp_path / "t"), np.array(expected[:n]), learned)
    assert len(found) == len(replies) and found[-1] == replies[-1] + "<|im_end|>"
    if "tools" in record:
        assert found[0] == '\n<tool_call>\n{"name": "weather", "arguments": {"city": "Lima"}}\n</tool_call><|im_end|>'


def test_names_of_control_tokens_in_prepared_records_stay_text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with_control(tmp_path / "t", *TEMPLATES["chatml"])
    record = {"prompt": "What ends a turn?", "response": "<|im_end|> does, <|endoftext|> ends a text."}
    Path("a.jsonl").write_text((json.dumps(record) + "\n") * 20)
    prepare_corpus(["chat", "a.jsonl", "--tokenizer", "t"])
    dataset = load_dataset("a")
    n, control = len(dataset.train) // 18, dataset.tokenizer.control
    ids = dataset.train.read([0], n)[0]
    counts = Counter(ids.tolist())
    assert [counts[control[name]] for name in ("<|im_start|>", "<|im_end|>", "<|endoftext|>")] == [2, 2, 0]
    assert dataset.tokenizer.decode(ids).count("<|im_end|>") == 3 and record["response"] in dataset.tokenizer.decode(
        ids
    )


def test_template_is_saved_and_overlong_conversations_are_counted(pairs, chatml):
    prepare_corpus(f"chat pairs.jsonl --tokenizer {chatml} --max_tokens 64 --val_tokens 400".split())
    dataset = load_dataset("pairs")
    assert "Help." in dataset.tokenizer.chat_template and chat.stop_ids(dataset.tokenizer) == {299, 301}
    assert dataset.meta["chat"] == {"examples": 202, "cut": 2, "left_out": 0, "max_tokens": 64, "skipped": 0}
    assert len(dataset.val) <= 400
    prepare_corpus("chat pairs.jsonl --name again --tokenizer pairs --template chatml --max_tokens 25".split())
    again = load_dataset("again")
    assert again.tokenizer.chat_template == chat.CHATML and again.identity() != dataset.identity()
    left_out = again.meta["chat"]["left_out"]
    assert left_out > 0 and again.meta["documents"] == 202 - left_out


def test_trained_tokenizer_with_a_custom_template(pairs):
    template = "\ufeff{% for m in messages %}{{ m.role }} {{ m.content }}{{ eos_token }}{% endfor %}"
    Path("t.jinja").write_text(template, encoding="utf-8")  # Windows editors write a byte order mark
    prepare_corpus("chat pairs.jsonl --tokenizer bpe:300 --template t.jinja".split())
    dataset = load_dataset("pairs")
    text = dataset.tokenizer.decode(dataset.train.read([0], len(dataset.train))[0])
    assert dataset.tokenizer.kind == "bpe" and text.startswith("user 0 or 1?<|endoftext|>assistant <|endo")


@pytest.mark.parametrize(
    ("line", "options", "message"),
    [
        ('{"prompt": "a"}', "", "line 203 of bad.jsonl has the fields prompt"),
        ("{", "", "line 203 of bad.jsonl is not valid JSON"),
        ("", "--template nothing.txt", "neither plain, chatml nor"),
        ("", "--template chatml", "without a control token"),
        ("", "--tokenizer char", "char tokenizer has no end-of-text"),
        ("", "--val_by end", "by their hash"),
        ("", "--max_tokens 0", "8 or more"),
        ("", "--val_tokens 5", "val_tokens=5, val has none .*change .*--val_tokens"),
    ],
)
def test_bad_input_leaves_no_dataset(pairs, line, options, message):
    Path("bad.jsonl").write_text(Path("pairs.jsonl").read_text() + "\n" + line)
    with pytest.raises(UserError, match=message):
        prepare_corpus(["chat", "bad.jsonl", *options.split()])
    assert not Path("data/bad").exists()


def test_every_file_format_gives_the_same_dataset(tmp_path, monkeypatch):
    import pyarrow
    import pyarrow.parquet

    monkeypatch.chdir(tmp_path)
    records = [{"messages": [*conversation(1 + i % 3, True)]} for i in range(40)]
    for i, record in enumerate(records):
        record["messages"][0] = {"role": "system", "content": f"You are number {i}."}
    Path("a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    Path("a.json").write_text(json.dumps(records, indent=1))
    rows = [[m | {"name": "Ann" if m["role"] == "tool" else None} for m in record["messages"]] for record in records]
    pyarrow.parquet.write_table(pyarrow.table({"messages": rows, "id": list(range(40))}), "a.parquet")
    texts = [json.dumps(record["messages"]).replace('"', '""') for record in records]
    Path("a.csv").write_text("messages\n" + "".join(f'"{text}"\n' for text in texts))
    written = set()
    for kind in ("jsonl", "json", "parquet", "csv"):
        prepare_corpus(f"chat a.{kind} --name {kind} --tokenizer byte".split())
        written.add(load_dataset(kind).identity())
    assert len(written) == 1


def test_flags_in_csv_are_read_as_numbers_and_booleans(tmp_path, monkeypatch):
    """CSV fields are strings, and the strings "0" and "false" would count as true."""
    monkeypatch.chdir(tmp_path)
    template = "{% if think is false %}!{% endif %}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    Path("t.jinja").write_text(template)
    learned, left = ("1", "1.0", "true", "TRUE", " 1 ", ""), ("0", "0.0", "false", "False")
    rows = [f'{i},"yes,\n{i}",{flag},False' for i, flag in enumerate([*learned, *left] * 5)]
    Path("a.csv").write_text("\n".join(["prompt,response,weight,think", *rows]))
    options = "chat a.csv --tokenizer byte --template t.jinja".split()
    prepare_corpus([*options, "--skip_bad"])
    dataset = load_dataset("a")
    assert dataset.meta["chat"]["skipped"] == 20 and dataset.meta["documents"] == 30
    assert dataset.tokenizer.decode(dataset.train.read([0], 1)[0]) == "!"
    rows[3] = rows[3].replace("TRUE", "perhaps")
    Path("a.csv").write_text("\n".join(["prompt,response,weight,think", *rows]))
    with pytest.raises(UserError, match=r'row 5 of a.csv \(line 8\) has "weight": "perhaps", which is neither'):
        prepare_corpus([*options, "--overwrite"])


def test_identical_conversations_are_split_by_position(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("same.jsonl").write_text('{"instruction": "Add", "input": "2 and 3", "output": "5"}\n' * 40)
    prepare_corpus("chat same.jsonl --tokenizer byte".split())
    dataset = load_dataset("same")
    assert len(dataset.val) * 9 == len(dataset.train) and "last 4 are" in capsys.readouterr().err


def test_skip_bad_skips_and_counts_bad_records(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    good = [json.dumps({"prompt": f"{i}?", "response": "yes", "weight": 1}) for i in range(40)]
    calling = json.dumps({"messages": CALLING})  # the plain template does not render tool calls
    bad = ["{", "[1]", '{"a": 1}', calling, '{"prompt": "a", "response": "b", "weight": 0.5}']
    Path("bad.jsonl").write_text("\n".join([*good[:20], *bad, *good[20:]]))
    Path("good.jsonl").write_text("\n".join(good))
    with pytest.raises(UserError, match=r"line 21 of bad.jsonl is not valid JSON"):
        prepare_corpus("chat bad.jsonl --tokenizer byte".split())
    capsys.readouterr()
    prepare_corpus("chat bad.jsonl --tokenizer byte --skip_bad".split())
    assert "skipped 5 bad records; the first: line 21 of bad.jsonl is not valid JSON" in capsys.readouterr().err
    prepare_corpus("chat good.jsonl --tokenizer byte".split())
    assert load_dataset("bad").identity() == load_dataset("good").identity()
    assert load_dataset("bad").meta["chat"]["skipped"] == 5
    prepare_corpus("chat bad.jsonl --name learned --tokenizer bpe:300 --skip_bad".split())
    Path("none.jsonl").write_text("\n".join(bad))
    with pytest.raises(UserError, match=r"no conversation in none.jsonl.*All 5 records are bad; the first: line 1 of"):
        prepare_corpus("chat none.jsonl --tokenizer byte --skip_bad".split())
    rows = ["prompt,response", *(f"{i}?,yes" for i in range(20)), "Is it 1,5?,no"]
    Path("rows.csv").write_text("\n".join(rows))
    with pytest.raises(UserError, match=r"row 22 of rows.csv has 3 fields, but the header has 2"):
        prepare_corpus("chat rows.csv --tokenizer byte".split())
    prepare_corpus("chat rows.csv --tokenizer byte --skip_bad".split())
    assert load_dataset("rows").meta["documents"] == 20


def test_input_without_conversations_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path, kind in ((".", "a folder"), ("-", "standard input")):
        with pytest.raises(UserError, match=f"{path} is {kind}, but prepare chat reads only files. Name the files"):
            prepare_corpus(["chat", path, "--tokenizer", "byte"])
    Path("empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match=r"no conversation in empty.jsonl"):
        prepare_corpus(["chat", "empty.jsonl", "--tokenizer", "byte"])
    assert not Path("data/empty").exists()


def test_mismatched_or_missing_masks_are_refused(pairs):
    prepare_corpus("chat pairs.jsonl --tokenizer byte".split())
    meta = json.loads(Path("data/pairs/meta.json").read_text())
    del meta["sha256"]  # older versions did not write it

    def refused(change, message):
        changed = json.loads(json.dumps(meta))
        change(changed)
        Path("data/pairs/meta.json").write_text(json.dumps(changed))
        with pytest.raises(UserError, match=message):
            load_dataset("pairs")

    refused(lambda m: m["train"]["masks"].clear() or m["train"].update(masks=m["val"]["masks"]), "differ in length")
    refused(lambda m: m["train"].update(masks=m["train"]["shards"]), "not the name of a shard")
    refused(lambda m: m["train"].update(masks=[5]), "damaged")
    mask = Path("data/pairs/train_000000.mask")
    whole = mask.read_bytes()
    mask.write_bytes(whole[:-1] + bytes([1 - whole[-1]]))
    refused(lambda m: None, "not the shard")
    mask.unlink()
    refused(lambda m: None, "missing")
    mask.write_bytes(whole)
    Path("a.txt").write_text(TEXT)  # overwriting with a dataset without masks removes the old masks
    prepare_corpus("text a.txt --name pairs --tokenizer byte --overwrite".split())
    assert load_dataset("pairs").train.mask is None and not list(Path("data/pairs").glob("*.mask"))


def test_dates_and_escape_sequences_in_messages(tmp_path, monkeypatch, capsys):
    """WildChat's Parquet files contain dates. Field names in an untrusted file may contain escape sequences."""
    monkeypatch.chdir(tmp_path)
    day = datetime.datetime(2024, 1, 2)
    turns = [{"role": role, "content": f"{role} says so", "\x1b[2J": day} for role in ("user", "assistant")]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"conversation": turns}] * 50), "c.parquet")
    Path("bad.jsonl").write_text('{"\\u001b]0;evil": 1}\n')
    prepare_corpus("chat c.parquet bad.jsonl --tokenizer byte --skip_bad --name d".split())
    assert load_dataset("d").train is not None and "\x1b" not in capsys.readouterr().err
