"""Tiny random models of transformers and of this repo, and helpers to save and compare them."""

import json
from pathlib import Path

import pytest
import torch

from acorn import checkpoint
from acorn.data.tokenizer_kinds import get_tokenizer
from acorn.distributed import runtime
from acorn.inference.generate import Sampling, generate
from model import GPT, GPTConfig

transformers = pytest.importorskip("transformers")

GPT2 = dict(vocab_size=37, n_positions=16, n_embd=32, n_layer=3, n_head=4)
LLAMA = dict(vocab_size=37, max_position_embeddings=16, hidden_size=32, intermediate_size=48, num_hidden_layers=3)
LLAMA |= dict(num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-6)
MODERN = dict(pos="rope", norm="rmsnorm", mlp="swiglu", bias=False, n_kv_head=2, tie_weights=False, rope_theta=500.0)
ALONE = runtime.Runtime(torch.device("cpu"), torch.float32, compile=False, notes=[])


def theirs(family: str, **changes):
    """Return a transformers model with every parameter random, including biases and norms, so that none is missed."""
    if family.lower() == "gpt2":
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2 | changes))
    elif family == "llama":
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA | changes))
    else:
        if family == "MiniMind":  # the same computation under other names
            family = "Qwen3" if "head_dim" in changes else "Llama"
        config = getattr(transformers, f"{family}Config")(**LLAMA | dict(pad_token_id=None) | changes)
        model = getattr(transformers, f"{family}ForCausalLM")(config)
    return randomize(model)


def as_minimind(folder: Path) -> None:
    """Rewrite the config.json of a saved Llama or Qwen3 as that of a MiniMind model."""
    config = json.loads((folder / "config.json").read_text())
    rope = config.pop("rope_parameters")
    for name in (
        "architectures",
        "layer_types",
        "use_sliding_window",
        "max_window_layers",
        "attention_bias",
        "mlp_bias",
    ):
        config.pop(name, None)
    config |= dict(model_type="minimind", use_moe=False, inference_rope_scaling=False, rope_theta=rope["rope_theta"])
    (folder / "config.json").write_text(json.dumps(config | dict(rope_scaling=None, flash_attn=True)))


def ours(**changes) -> GPT:
    """Return a small random model of this repo."""
    shape = dict(block_size=16, vocab_size=257, n_layer=2, n_head=4, n_embd=32)
    return randomize(GPT(GPTConfig(**shape | changes)))


def randomize(model):
    """Make every parameter random, with the weights of norms around 1, and return the model."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.2).add_(1.0 if p.dim() == 1 else 0.0)
    return model.eval()


def tokens(vocab_size=37) -> torch.Tensor:
    """Return random token ids of shape (2, 12)."""
    return torch.randint(vocab_size, (2, 12), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def assert_same_logits(model: GPT, other, vocab_size=37) -> None:
    """Assert that a transformers model gives the same logits as our model."""
    idx = tokens(vocab_size)
    expected = other(idx).logits.float()
    logits = model(idx, idx)[0][..., : expected.size(-1)]
    assert (logits - expected).abs().max() < 1e-5 * expected.abs().max()


def saved(folder: Path, model: GPT, kind="byte", texts=()) -> Path:
    """Save a checkpoint of the model and return the out_dir."""
    state = {"settings": {}, "tokenizer": get_tokenizer(kind, texts).to_dict(), "step": 1, "best_step": 1}
    writer = checkpoint.Writer(folder, keep=1)
    writer.save(model, [], state)
    assert writer.wait()
    return folder


def greedy(model: GPT, prompt: list[int], n: int, n_vocab: int) -> list[int]:
    """Return the n tokens that greedy decoding appends to a prompt."""
    return generate(model, [prompt], n, Sampling(temperature=0), [0], lambda *_: False, n_vocab)[0][len(prompt) :]


def write_tokenizer(folder: Path) -> None:
    """Write a byte-level tokenizer of 262 ids, like that of a Llama chat checkpoint."""
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
    """Add a post-processor to a tokenizer.json that prepends <|im_start|> to a text."""
    config = json.loads((folder / "tokenizer.json").read_text())
    bos = {"id": "<|im_start|>", "ids": [260], "tokens": ["<|im_start|>"]}
    single = [{"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    pair = [*single, {"Sequence": {"id": "B", "type_id": 1}}]
    post = {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": {"<|im_start|>": bos}}
    (folder / "tokenizer.json").write_text(json.dumps(config | {"post_processor": post}))
