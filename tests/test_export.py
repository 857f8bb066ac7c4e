"""acorn/checkpoint/export.py: an export has the same logits and ids in transformers and CTranslate2."""

import subprocess
import sys

import pytest
import torch
from helpers import REPO, refused, run_here
from hf_models import MODERN, assert_same_logits, greedy, ours, saved, tokens, transformers
from safetensors.torch import load_file

from acorn import UserError, checkpoint, hub
from acorn.checkpoint import export
from acorn.data.tokenizer_kinds import get_tokenizer
from acorn.inference.generate import Sampling, generate
from acorn.training import lora

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
def test_exported_models_match_in_transformers(tmp_path, kind, changes):
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


def test_ctranslate2_decodes_an_export_identically(tmp_path):
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


def test_export_warns_if_llama_cpp_would_be_wrong(tmp_path, capsys):
    for mlp in ("gelu_tanh", "relu2"):
        hub.export(str(saved(tmp_path / mlp, ours(mlp=mlp))), tmp_path / f"{mlp}-hf")
        assert ("llama.cpp" in capsys.readouterr().err) == (mlp == "relu2")


def test_exported_adapters_have_the_context_of_their_base(tmp_path, monkeypatch):
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
        writer.save(model, [], state)
        assert writer.wait() and checkpoint.load_model(f"{name}-lora")[0].config.block_size == 16
        hub.export(f"{name}-lora", tmp_path / f"{name}-hf")
        exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / f"{name}-hf").eval()
        assert exported.config.max_position_embeddings == 64
        with torch.no_grad():
            assert torch.allclose(exported(tokens(257)).logits, expected, atol=1e-5)
        assert transformers.AutoTokenizer.from_pretrained(tmp_path / f"{name}-hf").model_max_length == 64


def test_the_export_command(tmp_path, trained):
    command = [sys.executable, "-m", "acorn.hub", "export", trained, tmp_path / "new" / "hf", "--dtype=bfloat16"]
    result = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "GPT2LMHeadModel" in result.stdout
    assert load_file(tmp_path / "new" / "hf" / "model.safetensors")["transformer.wte.weight"].dtype == torch.bfloat16
    assert [f.name for f in (tmp_path / "new").iterdir()] == ["hf"]
    refused(run_here(hub.main, "export", trained, tmp_path / "new" / "hf", cwd=REPO), "already exists")
    (tmp_path / "a.gguf").touch()
    both = "export", trained, tmp_path / "second", "--gguf", tmp_path / "a.gguf"
    refused(run_here(hub.main, *both, cwd=REPO), "a.gguf already exists")
    assert not (tmp_path / "second").exists()


def test_unsupported_and_failed_exports_leave_no_files(tmp_path, monkeypatch):
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
    model = ours()
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight[0, 0] = -7e4
    saved(tmp_path / "out", model)
    with pytest.raises(UserError, match=r"c_fc.weight has values up to 7e\+04, too large for float16. Use --dtype"):
        hub.export(str(tmp_path / "out"), tmp_path / "hf", dtype=torch.float16)
    saved(tmp_path / "out", ours())

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "save_file", full)
    with pytest.raises(UserError, match="No space left"):
        hub.export(str(tmp_path / "out"), tmp_path / "hf")
    assert [f.name for f in tmp_path.iterdir()] == ["out"]
