"""acorn/checkpoint/gguf_file.py: llama.cpp tokenizes text and decodes greedily as acorn does."""

import json
import sys

import pytest
import torch
from hf_models import MODERN, greedy, ours, saved

from acorn import UserError, checkpoint, hub
from acorn.checkpoint.gguf_file import LLAMA3_PATTERN, QWEN2_PATTERN, export_gguf, pre_tokenizer_name
from acorn.data.tokenizer_json import HFTokenizer
from acorn.data.tokenizer_kinds import get_tokenizer, train_bpe
from acorn.inference.generate import encode_prompt
from acorn.training import lora

gguf = pytest.importorskip("gguf")
xllamacpp = pytest.importorskip("xllamacpp")

TEXT = "Naïve  café, it's 1234\n\n\t今天 😀  x then the them, the 12 or the 3456. IT'S "
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
LLAMA3 |= dict(original_max_position_embeddings=16)
END = "<|endoftext|>"


def complete(path, prompt: str, n: int) -> tuple[list[int], int]:
    """Return the n tokens or fewer that llama.cpp generates greedily, and the number of tokens in the prompt."""
    params = xllamacpp.CommonParams()
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = params.n_parallel = 1
    params.verbosity, params.n_ctx, params.model.path = 0, 128, str(path)
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    server, answers = xllamacpp.Server(params), []
    request = dict(prompt=prompt, max_tokens=n, samplers=["top_k"], top_k=1, return_tokens=True, verbose=True)
    server.handle_completions(request, answers.append)
    (answer,) = answers
    return answer["__verbose"]["tokens"], answer["usage"]["prompt_tokens"]


def assert_alike(source, path, prompt=TEXT, n=12) -> None:
    """Assert that llama.cpp and acorn agree on the number of prompt tokens and on the greedy text up to an end token.

    `source` is an out_dir, and `path` is its GGUF file.
    """
    model, tokenizer, _ = checkpoint.load_model(str(source), whole_context=True)
    ids = encode_prompt(tokenizer, prompt)
    tokens, n_prompt = complete(path, prompt, n)
    expected = greedy(model, ids, n, tokenizer.n_vocab)
    end = next((i for i, token in enumerate(expected) if token in tokenizer.ends), n)
    assert n_prompt == len(ids) and tokens[:end] == expected[:end] and end > 1


FORMS = {
    "gpt2": (dict(), "gpt2"),
    "gpt2 without biases": (dict(bias=False, tie_weights=False, n_hidden=96), "gpt2"),
    "llama": (MODERN | dict(head_dim=10, rope_scaling=LLAMA3), "llama"),
    "llama, linear": (MODERN | dict(rope_scaling=dict(rope_type="linear", factor=3.0), tie_weights=True), "llama"),
    "qwen2": (MODERN | dict(qkv_bias=True), "qwen2"),
    "qwen3": (MODERN | dict(qk_norm=True, qk_norm_weight=True, head_dim=16), "qwen3"),
    "gemma": (MODERN | dict(mlp="geglu", scale_embedding=True, tie_weights=True, head_dim=16), "gemma"),
    "smollm3": (MODERN | dict(nope_every=4, n_layer=5), "smollm3"),
}


@pytest.mark.parametrize("form", FORMS)
def test_llama_cpp_decodes_each_architecture_identically(tmp_path, form):
    changes, arch = FORMS[form]
    saved(tmp_path / "out", ours(**dict(block_size=128, vocab_size=320) | changes), "bpe:300", [TEXT * 20])
    assert export_gguf(str(tmp_path / "out"), tmp_path / "m.gguf") == arch
    assert_alike(tmp_path / "out", tmp_path / "m.gguf")


def split_by(name: str) -> HFTokenizer:
    """Train a BPE tokenizer with the pre-tokenizer that llama.cpp calls `name`."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    if name == "smollm":
        return train_bpe([TEXT * 20], 300, digits=1, reserved=2)
    pattern = {"llama-bpe": LLAMA3_PATTERN, "qwen2": QWEN2_PATTERN}[name]
    steps = [pre_tokenizers.Split(Regex(pattern), "isolated")]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC() if name == "qwen2" else None
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Sequence(steps), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator([TEXT * 20], trainer)
    backend.add_special_tokens([END])
    config = json.loads(backend.to_str())
    config["model"]["ignore_merges"] = name == "llama-bpe"
    return HFTokenizer(config, END, END, END)


@pytest.mark.parametrize("kind", ["byte", "smollm", "llama-bpe", "qwen2"])
def test_llama_cpp_tokenizes_text_identically(tmp_path, monkeypatch, kind):
    tokenizer = get_tokenizer("byte") if kind == "byte" else split_by(kind)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<|endoftext|>{% endfor %}"
    monkeypatch.setattr("hf_models.get_tokenizer", lambda *_: tokenizer)
    saved(tmp_path / "out", ours(**MODERN | dict(block_size=128, vocab_size=tokenizer.n_vocab)))
    export_gguf(str(tmp_path / "out"), tmp_path / "m.gguf")
    assert_alike(tmp_path / "out", tmp_path / "m.gguf")
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    assert fields["tokenizer.chat_template"].contents() == tokenizer.chat_template
    assert fields["tokenizer.ggml.eos_token_id"].contents() == tokenizer.eot


def test_export_of_merged_adapters_in_each_dtype(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    saved(tmp_path / "base", ours(**MODERN | dict(block_size=128)))
    base = checkpoint.open_model("base")
    adapters = dict(rank=2, alpha=4.0, base=str(tmp_path / "base"), sha256=lora.fingerprint(base.model, base.values))
    model, _, _ = checkpoint.load_model("base")
    model.crop_block_size(16)
    lora.add_adapters(model, lora.choose_targets(model, ""), 2, 4.0)
    torch.manual_seed(0)
    for parameter in lora.adapters(model).values():
        torch.nn.init.normal_(parameter, std=0.3)
    state = {"settings": {}, "tokenizer": get_tokenizer("byte").to_dict(), "step": 1, "lora": adapters}
    writer = checkpoint.Writer(tmp_path / "lora", keep=1)
    writer.save(model, [], state)
    assert writer.wait()
    for dtype, kind in (("float32", "F32"), ("float16", "F16"), ("q8_0", "Q8_0")):
        monkeypatch.setattr(sys, "argv", ["hub", "export", "lora", "--gguf", f"new/{dtype}.gguf", "--dtype", dtype])
        hub.main()
        assert f"wrote llama in {dtype}" in capsys.readouterr().out
        tensors = {t.name: t for t in gguf.GGUFReader(f"new/{dtype}.gguf").tensors}
        assert tensors["blk.0.attn_q.weight"].tensor_type.name == kind
        assert tensors["blk.0.attn_norm.weight"].tensor_type.name == "F32"
    assert_alike("lora", "new/float32.gguf", "To be")
    merged = checkpoint.load_model("lora")[0].transformer.h[0].mlp.c_proj.weight
    stored = gguf.dequantize(tensors["blk.0.ffn_down.weight"].data, tensors["blk.0.ffn_down.weight"].tensor_type)
    assert 0 < (torch.from_numpy(stored) - merged).abs().max() < 0.01 * merged.abs().max()


def test_refused_or_failed_exports_leave_no_file(tmp_path, monkeypatch):
    yarn = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=4, beta_fast=32, beta_slow=1)
    yarn |= dict(truncate=True, attention_factor=1.1)
    for kind, changes, words in (
        ("byte", dict(mlp="relu2"), "mlp='relu2'.*gpt2"),
        ("byte", MODERN | dict(mlp="geglu"), "mlp='geglu'.*llama"),
        ("byte", MODERN | dict(rope_scaling=yarn), "rope_scaling of type yarn"),
        ("byte", MODERN | dict(qkv_bias=True, head_dim=16), "head_dim=16.*qwen2"),
        ("byte", dict(logit_softcap=15.0), "logit_softcap"),
        ("char", dict(), r"no equivalent of the tokenizer of .*\(char\)"),
    ):
        saved(tmp_path / "out", ours(**changes), kind, [TEXT])
        with pytest.raises(UserError, match=words):
            export_gguf(str(tmp_path / "out"), tmp_path / "m.gguf")
    assert pre_tokenizer_name(train_bpe([TEXT * 20], 300, digits=3).config) is None
    model = ours()
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight[0, 0] = -7e4
    saved(tmp_path / "out", model)
    with pytest.raises(UserError, match=r"too large for float16. Use --dtype bfloat16"):
        export_gguf(str(tmp_path / "out"), tmp_path / "m.gguf", dtype="float16")
    saved(tmp_path / "out", ours())
    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", lambda self: tmp_path.read_bytes())
    with pytest.raises(UserError, match="could not be written"):
        export_gguf(str(tmp_path / "out"), tmp_path / "m.gguf")
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
    (tmp_path / "m.gguf").write_text("x")
    with pytest.raises(UserError, match="already exists"):
        export_gguf(str(tmp_path / "out"), tmp_path / "m.gguf")
    with pytest.raises(UserError, match=r"m.gguf.m.gguf could not be written"):
        export_gguf(str(tmp_path / "out"), tmp_path / "m.gguf" / "m.gguf")
    for words, message in ((["out"], "nothing to write"), (["out", "hf", "--dtype=q8_0"], "only for GGUF")):
        monkeypatch.setattr(sys, "argv", ["hub", "export", *words])
        with pytest.raises(UserError, match=message):
            hub.main()
