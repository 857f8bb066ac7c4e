"""Batches of conversations: rows match transformers' rendering, isolate conversations, and show each once per epoch."""

import itertools
import json
import random
import string
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import TEXT, script_here

from acorn import UserError
from acorn.data import batches, chat
from acorn.data.mixture import load_mixture
from acorn.data.shards import load_dataset
from acorn.data.tokenizer_json import load_hf
from acorn.data.tokenizer_kinds import train_bpe
from acorn.distributed import runtime
from acorn.evaluation.loss import evaluate
from acorn.inference.console import fit_conversation
from model import GPT, GPTConfig
from prepare.__main__ import prepare_corpus

ZEPHYR = (  # eos also ends the user's turns
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
LLAMA_2 = (  # the system message is inside the first question; a BOS precedes each question
    "{% set system = messages[0].content if messages[0].role == 'system' else none %}"
    "{% for m in (messages if system is none else messages[1:]) %}{% if m.role == 'user' %}"
    "{{ bos_token + '[INST] ' + ('<<SYS>>\n' + system + '\n<</SYS>>\n\n' if loop.first and system is not none else '')"
    " + m.content | trim + ' [/INST]' }}{% else %}{{ ' ' + m.content | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
VICUNA = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{{ 'ASSISTANT: ' + m.content + eos_token }}"
    "{% else %}{{ m.role | upper + ': ' + m.content + ' ' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
MISTRAL = (  # the system message is inside the last question, so each turn rewrites history
    "{% set system = messages[0].content + '\n\n' if messages[0].role == 'system' else '' %}"
    "{% for m in messages if m.role != 'system' %}{% if m.role == 'user' %}"
    "{{ '[INST] ' + (system if loop.revindex <= (1 if add_generation_prompt else 2) else '') + m.content + '[/INST]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
LAST_THINKS = (  # only the last reply has an empty thought, as in hybrid reasoning models
    "{% for m in messages %}{{ '<|' + m.role + '|>' }}{% if m.role == 'assistant' and loop.last %}"
    "{{ '(thought)' }}{% endif %}{{ m.content + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
TEMPLATES = {
    "zephyr": ZEPHYR,
    "chatml": chat.CHATML,
    "plain": chat.PLAIN,
    "llama_2": LLAMA_2,
    "vicuna": VICUNA,
    "mistral": MISTRAL,
    "last_thinks": LAST_THINKS,
}


def write_tokenizer(folder: Path, template: str) -> Path:
    """Write a Hugging Face tokenizer without <|endoftext|>, whose eos also marks the end of a text."""
    folder.mkdir()
    config = train_bpe([TEXT], 300).config
    added = config["added_tokens"][0]
    names = ["</s>", "<s>", "<|im_start|>", "<|im_end|>"]
    config["added_tokens"] = [added | {"id": 299 + i, "content": name} for i, name in enumerate(names)]
    config["model"]["vocab"].pop("<|endoftext|>", None)
    (folder / "tokenizer.json").write_text(json.dumps(config))
    end = "<|im_end|>" if template == chat.CHATML else "</s>"
    settings = {"bos_token": "<s>", "eos_token": end, "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"tokenizer_class": "PreTrainedTokenizerFast"}))
    return folder


def turns(*texts: str, system: str | None = None) -> list[dict]:
    messages = [{"role": "system", "content": system}] if system else []
    return messages + [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(texts)]


def talks(n: int) -> list[list[dict]]:
    """Return conversations of one to four turns with different words; some have a system message."""
    chance, words, made = random.Random(0), TEXT.split(), []
    for i in range(n):
        says = [" ".join(chance.sample(words, chance.randint(2, 25))) + f" {i}.{k}" for k in range(2 * (i % 4 + 1))]
        made.append(turns(*says, system=f"Be kind to {i}." if i % 3 == 0 else None))
    return made


def write_talks(path: Path, conversations: list[list[dict]]) -> None:
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in conversations))


def whole_split(tokens, block_size: int) -> tuple:
    return batches.in_order(tokens, block_size, 0, batches.samples_per_epoch(tokens, block_size))


def documents_of(x, y, documents) -> list[tuple]:
    """Return the inputs and targets of each document in the rows, without padding."""
    found = []
    for row in range(len(x)):
        for n in range(documents[row].max() + 1):
            here = documents[row] == n
            if (y[row][here] >= 0).any():
                found.append((tuple(x[row][here].tolist()), tuple(y[row][here].tolist())))
    return sorted(found)


# ---------------------------------------------------------------------------------------------------------------------
# Comparison with transformers


def expected_documents(theirs, messages: list[dict], block_size: int, rewrites: bool, ends: set[int]) -> list[tuple]:
    """Return the documents that rows should hold for a conversation, computed with transformers."""

    def ids_of(messages: list[dict], prompt: bool) -> list[int]:
        return theirs.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=False)

    def example(messages: list[dict], replies: list[int]) -> tuple[list[int], list[int]]:
        whole = ids_of(messages, False)
        learned = []
        for i in replies:
            prompt, so_far = ids_of(messages[:i], True), ids_of(messages[: i + 1], False)
            assert so_far[: len(prompt)] == prompt and (i != replies[-1] or so_far == whole)
            learned += range(len(prompt), max(j for j, token in enumerate(so_far) if token in ends) + 1)
        ids = whole[: learned[-1] + 1]
        return ids, [token if i in set(learned) else -1 for i, token in enumerate(ids)]

    found = []
    at = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    for last in at if rewrites else at[-1:]:
        for kept in range((last + 1) // 2, 0, -1):  # number of turns to keep
            system = [message for message in messages[:1] if message["role"] == "system"]
            shown = system + messages[last + 1 - 2 * kept : last + 1]
            replies = [i for i, message in enumerate(shown) if message["role"] == "assistant"]
            ids, targets = example(shown, replies[-1:] if rewrites else replies)
            if len(ids) <= block_size + 1:
                break
        ids, targets = ids[: block_size + 1], targets[: block_size + 1]
        if max(targets[1:]) >= 0:
            found.append((tuple(ids[:-1]), tuple(targets[1:])))
    return found


@pytest.mark.parametrize("name", TEMPLATES)
def test_rows_match_the_rendering_of_transformers(tmp_path, monkeypatch, name):
    transformers = pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    folder = write_tokenizer(tmp_path / "hf", TEMPLATES[name])
    theirs, ours = transformers.AutoTokenizer.from_pretrained(str(folder)), load_hf(folder)
    conversations = talks(24)
    write_talks(tmp_path / "talks.jsonl", conversations)
    prepare_corpus(f"chat talks.jsonl --tokenizer {folder} --val_fraction 0.2".split())
    dataset = load_dataset("talks")
    rewrites = {"last_thinks": lambda messages: True, "mistral": lambda messages: messages[0]["role"] == "system"}
    rewrites = rewrites.get(name, lambda messages: False)
    for block_size in (50, 64, 100, 200, 1000):
        found = [doc for split in (dataset.train, dataset.val) for doc in documents_of(*whole_split(split, block_size))]
        ends = {theirs.eos_token_id}
        expected = [expected_documents(theirs, each, block_size, rewrites(each), ends) for each in conversations]
        assert sorted(found) == sorted(itertools.chain(*expected))

    # the ids before each learned reply are those that sample.py gives the model
    for messages in conversations[:8]:
        for end in range(2, len(messages) + 1):
            if messages[end - 1]["role"] == "assistant":
                shown = fit_conversation(ours, messages[: end - 1], 10**6, 0)
                forms = [form for example in chat.forms_to_learn(ours, messages[:end]) for form in example]
                assert any(
                    ids[: len(shown)].tolist() == shown and learned[len(shown) :].all() for ids, learned in forms
                )


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_sampled_reply_is_rendered_as_in_training(tmp_path, name):
    tokenizer = load_hf(write_tokenizer(tmp_path / "hf", TEMPLATES[name]))
    messages = turns("Who goes there", "take the key", "Why")
    [[(ids, learned)]] = chat.forms_to_learn(tokenizer, messages[:2])
    reply = tokenizer.decode(ids[learned][:-1])  # what sampling shows: the reply without its end token
    content = chat.as_content(tokenizer, reply)
    again = [messages[0], {"role": "assistant", "content": content}, messages[2]]
    assert content.strip() == "take the key"
    assert chat.render(tokenizer, again).tolist() == chat.render(tokenizer, messages).tolist()


@pytest.mark.parametrize("name, most", [("zephyr", 6), ("llama_2", 6), ("last_thinks", 120)])
def test_long_conversations_need_few_template_renderings(tmp_path, monkeypatch, name, most):
    tokenizer = load_hf(write_tokenizer(tmp_path / "hf", TEMPLATES[name]))
    calls, fill_in = [], chat._fill_in
    monkeypatch.setattr(chat, "_fill_in", lambda *arguments: calls.append(1) or fill_in(*arguments))
    messages = turns(*map(str, range(40)), system="Be kind.")
    examples = chat.forms_to_learn(tokenizer, messages)
    assert sum(map(len, examples)) == (210 if name == "last_thinks" else 20)
    assert len(calls) < most * 20


# ---------------------------------------------------------------------------------------------------------------------
# Rows


@pytest.fixture
def zephyr(tmp_path, monkeypatch):
    """Prepare a dataset of conversations whose template ends every turn with eos."""
    monkeypatch.chdir(tmp_path)
    folder = write_tokenizer(tmp_path / "hf", ZEPHYR)
    write_talks(tmp_path / "talks.jsonl", talks(120))
    prepare_corpus(f"chat talks.jsonl --tokenizer {folder} --shard_tokens 1000".split())
    return load_dataset("talks")


@pytest.mark.parametrize("size", [1, 7, 64, 1000])
def test_packing_is_best_fit_and_uses_each_item_once(size):
    needs = np.random.default_rng(size).integers(1, size + 1, 300)
    rows = []  # a naive best fit, straight from the definition
    for item in sorted(range(300), key=lambda item: -needs[item]):
        room = [size - sum(needs[other] for other in row) for row in rows]
        fitting = [(left, k) for k, left in enumerate(room) if left >= needs[item]]
        rows[min(fitting)[1]].append(item) if fitting else rows.append([item])
    starts, members = batches.pack(needs, size)
    packed = [members[a:b].tolist() for a, b in itertools.pairwise(starts)]
    assert sorted(members.tolist()) == list(range(300))
    sums = [sum(needs[item] for item in row) for row in packed]
    assert max(sums) <= size and sorted(sums) == sorted(sum(needs[item] for item in row) for row in rows)


def test_each_epoch_has_every_conversation_once(zephyr):
    for block_size in (64, 256):
        n = batches.samples_per_epoch(zephyr.train, block_size)
        whole = documents_of(*whole_split(zephyr.train, block_size))
        epochs = [batches.sample(zephyr.train, block_size, epoch * n, n, seed=3) for epoch in range(3)]
        assert all(documents_of(*epoch) == whole for epoch in epochs)
        assert len({epoch[0].tobytes() for epoch in epochs}) == 3
        stream = [np.concatenate(parts) for parts in zip(*epochs, strict=True)]
        for first, count in ((0, 1), (n - 2, 5), (2 * n + 1, 3)):  # any range gives the same rows, also across epochs
            for part, all_ in zip(batches.sample(zephyr.train, block_size, first, count, 3), stream, strict=True):
                assert (part == all_[first : first + count]).all()
        other = batches.sample(zephyr.train, block_size, 0, n, seed=4)[0]
        assert (other != epochs[0][0]).any()
    x, y, documents = batches.in_order(zephyr.train, 64, n + 10**6, 2)  # after the last row
    assert (y == -1).all() and not x.any() and not documents.any()


@pytest.mark.parametrize("block_size", [64, 128, 256, 512, 1024])
def test_no_reply_is_learned_without_its_question(zephyr, block_size):
    """Questions and replies are numbered, so the question of each reply can be identified."""
    tokenizer = zephyr.tokenizer
    n_replies = 0
    for x, y in documents_of(*whole_split(zephyr.train, block_size)):
        text = tokenizer.decode(x)
        learned = np.flatnonzero(np.array(y) >= 0)
        for run in np.split(learned, np.flatnonzero(np.diff(learned) > 1) + 1):
            before = tokenizer.decode(x[: run[0] + 1])
            question = before.rsplit("<|user|>\n", 1)[1]
            number = question.split("</s>")[0].rsplit(" ", 1)[1]  # such as 17.2, whose reply is 17.3
            reply = tokenizer.decode([token for token in y[run[0] : run[-1] + 1]])
            conversation, k = number.split(".")
            assert question.endswith("</s>\n<|assistant|>\n")
            if reply.endswith("</s>"):
                assert reply.rstrip("</s>").endswith(f" {conversation}.{int(k) + 1}")
            n_replies += 1
        if int(conversation) % 3 == 0:
            assert text.startswith(f"<|system|>\nBe kind to {conversation}.</s>\n")
    rows = zephyr.train.conversations.rows(block_size)
    assert n_replies > 20 and (rows.dropped > 0) == (block_size < 1024)


def test_notes_report_padding_and_dropped_turns(zephyr):
    def only_note(block_size: int) -> str:
        [note] = zephyr.notes(block_size)
        return note

    y, documents = whole_split(zephyr.train, 64)[1:]
    padding = sum((documents[row] == documents[row].max()).sum() for row in range(len(y)) if y[row, -1] == -1)
    assert f"{padding / y.size:.1%} of them padding" in only_note(64)
    assert "oldest turns" in only_note(64) and "oldest" not in only_note(1024)
    with pytest.raises(UserError, match="block_size=2"):
        batches.samples_per_epoch(zephyr.train, 2)


def test_attention_and_positions_stay_inside_a_conversation(zephyr):
    torch.manual_seed(0)
    for pos in ("learned", "rope"):
        model = GPT(GPTConfig(block_size=256, vocab_size=304, n_layer=2, n_head=2, n_embd=32, pos=pos)).eval()
        nats, count = 0.0, 0
        for x, y in documents_of(*whole_split(zephyr.val, 256)):
            with torch.no_grad():
                nats += model(torch.tensor([x]), torch.tensor([y]), reduction="sum")[1].item()
            count += sum(token >= 0 for token in y)
        found = evaluate(model, zephyr.val, runtime.setup("cpu", "float32", False), 3, 256)
        assert found["loss"] == pytest.approx(nats / count, rel=1e-5)


def test_mixture_of_conversations_and_text(zephyr, tmp_path):
    for i in range(120):
        (tmp_path / f"{i}.txt").write_text(TEXT[50 * i : 50 * i + 90] + "</s> is text here")
    prepare_corpus(f"text {' '.join(f'{i}.txt' for i in range(120))} --name t --tokenizer talks".split())
    masked, plain = (load_mixture("talks:0.5,t:0.5", document_mask=mask) for mask in (True, False))
    eos = zephyr.tokenizer.eot
    assert eos == 299
    for mixture in (masked, plain):
        x, y, documents = mixture.sample(64, 0, 40, seed=1)
        is_text = (y >= 0).sum(1) == 64
        assert 15 < is_text.sum() <= 20
        rows = documents_of(x[~is_text], y[~is_text], documents[~is_text])
        assert set(rows) <= set(documents_of(*whole_split(zephyr.train, 64)))
        begins = np.diff(documents[is_text], prepend=0) > 0
        if mixture is masked:  # one more document may begin where a window wraps around the end of the stream
            assert (begins >= (x[is_text] == eos))[:, 1:].all() and begins.sum() <= (x[is_text] == eos).sum() + 2
        else:
            assert not documents[is_text].any()
    assert load_mixture("t").sample(64, 0, 4, 1)[2] is None


def test_conversations_without_an_index_still_load(zephyr):
    meta = json.loads(Path("data/talks/meta.json").read_text())
    for split in ("train", "val"):
        del meta[split]["index"]
    Path("data/talks/meta.json").write_text(json.dumps({name: meta[name] for name in meta if name != "sha256"}))
    mixture = load_mixture("talks", document_mask=True)
    x, y, documents = mixture.sample(64, 0, 10, 1)
    assert x.shape == (10, 64) and (y >= 0).any() and documents is None
    assert any("older version" in note for note in mixture.datasets[0].notes(64))


def test_an_index_that_does_not_match_the_tokens_is_refused(zephyr):
    table = zephyr.train.conversations
    index = np.stack([table.dropped, table.head, table.middle, table.tail, table.prompt], axis=1)
    batches.Conversations(zephyr.train, index)
    for row, column, value in ((0, 0, 1), (0, 2, 10**6), (0, 1, 3), (3, 4, 10**6), (5, 3, -1)):
        broken = index.copy()
        broken[row, column] = value
        with pytest.raises(ValueError, match="does not match"):
            batches.Conversations(zephyr.train, broken)


# ---------------------------------------------------------------------------------------------------------------------
# End to end


def test_max_tokens_drops_the_oldest_question_with_its_reply(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_talks(tmp_path / "cut.jsonl", [turns("u" * 26, "A" * 20, "vvv", "B" * 10)] * 30 + [turns("w", "C")] * 30)
    write_talks(tmp_path / "one.jsonl", [turns(f"{i}", "C") for i in range(60)])  # so that neither split is empty
    prepare_corpus("chat cut.jsonl one.jsonl --tokenizer byte --max_tokens 60".split())
    dataset = load_dataset("cut")
    learned = Counter()
    for split in (dataset.train, dataset.val):
        y = whole_split(split, 64)[1]
        learned.update(y[y >= 0].tolist())
    assert learned[ord("A")] == 0 and learned[ord("B")] == 300 and learned[ord("C")] == 90
    assert dataset.meta["chat"]["cut"] == 30


def letters(n: int, alphabet: str = string.ascii_lowercase) -> list[dict]:
    """Return n examples whose reply is the letter in the question, so only the question predicts it."""
    chance = random.Random(1)
    said = [(chance.randrange(100_000), chance.choice(alphabet)) for _ in range(n)]
    return [{"prompt": f"{number} {letter}", "response": letter} for number, letter in said]


def test_a_model_sees_a_question_that_ends_with_eos(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokenizer = write_tokenizer(tmp_path / "hf", ZEPHYR)
    Path("letters.jsonl").write_text("".join(json.dumps(record) + "\n" for record in letters(1000, "abcd")))
    prepare_corpus(f"chat letters.jsonl --tokenizer {tokenizer} --out d".split())
    data = load_mixture("d", document_mask=True)
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=64, vocab_size=304, n_layer=2, n_head=2, n_embd=32, pos="rope"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95))
    for step in range(130):
        x, y, documents = map(torch.from_numpy, data.sample(64, 8 * step, 8, seed=1))
        model(x, y, documents=documents)[1].backward()
        optimizer.step()
        optimizer.zero_grad()
    found = evaluate(model, data.datasets[0].val, runtime.setup("cpu", "float32", False), 8, 64)
    assert found["loss"] < 0.4  # ln 4 / 2 = 0.693 without the question


def letters_loss(folder: Path, n: int, updates: int) -> float:
    tokenizer = write_tokenizer(folder / "hf", ZEPHYR)
    (folder / "letters.jsonl").write_text("".join(json.dumps(record) + "\n" for record in letters(n)))
    made = script_here("prepare", "chat", "letters.jsonl", f"--tokenizer={tokenizer}", "--out=d", cwd=folder)
    assert made.returncode == 0, made.stderr
    words = (
        f"--init_from=scratch --dataset=d --out_dir=o --max_iters={updates} --eval_interval={updates} --n_layer=2 "
        "--n_head=2 --n_embd=64 --learning_rate=3e-3 --min_lr=3e-4 --device=cpu --dtype=float32 --compile=False"
    )
    config = Path(__file__).parent.parent / "config" / "finetune_chat.py"
    trained = script_here("train.py", config, *words.split(), "--document_mask=True", cwd=folder)
    assert trained.returncode == 0, trained.stderr
    lines = [json.loads(line) for line in (folder / "o" / "metrics.jsonl").read_text().splitlines()]
    return [line["val_loss"] for line in lines if "val_loss" in line][-1]


@pytest.mark.slow
def test_fine_tuning_learns_replies_that_depend_on_the_question(tmp_path):
    assert letters_loss(tmp_path, 2000, 500) < 0.3  # ln 26 / 2 = 1.629 without the question
