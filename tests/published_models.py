"""Table of published models that load or are refused, for test_huggingface.py and docs/published-models.md.

After changing the table, run `python tests/published_models.py` to regenerate the page.
"""

import sys
from pathlib import Path
from typing import NamedTuple

PAGE = Path(__file__).resolve().parent.parent / "docs" / "published-models.md"


class Supported(NamedTuple):
    models: str  # names of published models with these features
    feature: str  # what distinguishes them, in the terms of their config.json
    kind: str  # prefix of transformers' class names, or MiniMind
    changes: dict  # to the configuration of the tiny model that the tests load, run and export
    exported: str = ""  # model type of the export, if it differs from `kind`


class Refused(NamedTuple):
    models: str
    config: dict  # fields of their config.json that cause the refusal
    words: str  # part of the error message: the field and its value


ODD = dict(hidden_size=36, num_attention_heads=6, num_key_value_heads=3)
FREE = dict(hidden_size=35, num_attention_heads=3, num_key_value_heads=1, head_dim=14)
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
LLAMA3 |= dict(original_max_position_embeddings=12, rope_theta=500.0)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=4, rope_theta=100.0)
MSCALE = YARN | dict(mscale=1.0, mscale_all_dim=0.5, beta_fast=4, beta_slow=0.5, truncate=False)

SUPPORTED = [
    Supported("GPT-2 in all sizes, DistilGPT-2, Chinese GPT-2s", "", "GPT2", {}),
    Supported("GPT-2s trained with ReLU", "`activation_function: relu`", "GPT2", dict(activation_function="relu")),
    Supported("Llama 1 and 2, TinyLlama, SmolLM 1 and 2, Yi", "", "Llama", ODD),
    Supported("Llama 3.1, 3.2 and 3.3", "rope scaling `llama3`", "Llama", ODD | dict(rope_parameters=LLAMA3)),
    Supported(
        "long-context variants of Llama",
        "rope scaling `linear`",
        "Llama",
        ODD | dict(rope_parameters=dict(rope_type="linear", factor=3.0, rope_theta=70.0)),
    ),
    Supported(
        "long-context variants of Llama, up to `max_position_embeddings`",
        "rope scaling `dynamic`",
        "Llama",
        ODD | dict(rope_parameters=dict(rope_type="dynamic", factor=3.0, rope_theta=70.0)),
    ),
    Supported("Mistral 7B v0.2 and v0.3", "no `sliding_window`", "Mistral", ODD | dict(sliding_window=None), "llama"),
    Supported("Mistral Nemo", "its own `head_dim`", "Mistral", FREE | dict(sliding_window=None)),
    Supported(
        "Mistral 7B v0.1 with `max_position_embeddings` set to 4096",
        "`sliding_window` of at least `max_position_embeddings`",
        "Mistral",
        ODD | dict(sliding_window=16),
        "llama",
    ),
    Supported("Qwen1.5, Qwen2, Qwen2.5, DeepSeek-R1-Distill-Qwen", "biases of q, k and v", "Qwen2", ODD),
    Supported("Qwen2.5 with YaRN for long texts", "rope scaling `yarn`", "Qwen2", ODD | dict(rope_parameters=YARN)),
    Supported("Qwen3 (dense)", "`q_norm` and `k_norm`, its own `head_dim`", "Qwen3", FREE | dict(head_dim=10)),
    Supported("Qwen3 with YaRN", "rope scaling `yarn` with `mscale`", "Qwen3", ODD | dict(rope_parameters=MSCALE)),
    Supported("SmolLM3", "`no_rope_layers`: every 4th", "SmolLM3", ODD | dict(no_rope_layer_interval=2)),
    Supported("Gemma 1, 2B and 7B", "scaled embeddings, GeGLU", "Gemma", ODD | dict(head_dim=10)),
    Supported("MiniMind2", "`model_type: minimind`", "MiniMind", dict(ODD), "llama"),
    Supported("MiniMind-3", "`model_type: minimind` with `q_norm`", "MiniMind", ODD | dict(head_dim=10), "qwen3"),
]

REFUSED = [
    Refused("Gemma 2", dict(model_type="gemma2"), "model_type 'gemma2'"),
    Refused("Gemma 3", dict(model_type="gemma3_text"), "model_type 'gemma3_text'"),
    Refused("Phi-3 and Phi-4", dict(model_type="phi3"), "model_type 'phi3'"),
    Refused("Pythia, GPT-NeoX", dict(model_type="gpt_neox"), "model_type 'gpt_neox'"),
    Refused("GPT-J", dict(model_type="gptj"), "model_type 'gptj'"),
    Refused("OPT", dict(model_type="opt"), "model_type 'opt'"),
    Refused("BLOOM", dict(model_type="bloom"), "model_type 'bloom'"),
    Refused("Mixtral", dict(model_type="mixtral"), "model_type 'mixtral'"),
    Refused("Qwen3 with experts", dict(model_type="qwen3_moe"), "model_type 'qwen3_moe'"),
    Refused("DeepSeek-V2 and V3", dict(model_type="deepseek_v3"), "model_type 'deepseek_v3'"),
    Refused("gpt-oss", dict(model_type="gpt_oss"), "model_type 'gpt_oss'"),
    Refused("ChatGLM", dict(model_type="chatglm"), "model_type 'chatglm'"),
    Refused("MiniMind with experts", dict(model_type="minimind", use_moe=True), "use_moe"),
    Refused(
        "MiniMind that stretches its rope",
        dict(model_type="minimind", inference_rope_scaling=True),
        "inference_rope_scaling",
    ),
    Refused(
        "Mistral 7B v0.1 as published",
        dict(model_type="mistral", sliding_window=4096, max_position_embeddings=32768),
        "sliding_window = 4096",
    ),
    Refused(
        "Qwen2 with its sliding window switched on",
        dict(model_type="qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=1),
        "sliding_window = 8",
    ),
    Refused(
        "models with LongRoPE",
        dict(
            rope_parameters=dict(
                rope_type="longrope", rope_theta=1e4, short_factor=[1.0] * 4, long_factor=[1.0] * 4, factor=2.0
            )
        ),
        "rope scaling 'longrope'",
    ),
    Refused("Llamas with biases in attention", dict(attention_bias=True), "attention_bias"),
    Refused("Llamas with biases in the MLP", dict(mlp_bias=True), "mlp_bias"),
    Refused("text encoders made from Llamas", dict(is_causal=False), "is_causal = false"),
    Refused("models with part of the channels rotated", dict(partial_rotary_factor=0.5), "partial_rotary_factor"),
    Refused("Llamas with another activation", dict(hidden_act="relu"), "hidden_act = relu"),
    Refused("GPTQ, AWQ and other quantized checkpoints", dict(quantization_config={"bits": 4}), "quantized weights"),
    Refused(
        "SmolLM3 with other layers without rope",
        dict(model_type="smollm3", no_rope_layers=[0, 1, 1], pad_token_id=None),
        "no_rope_layers that are not every n-th",
    ),
    Refused(
        "GPT-2s that scale attention by layer (stanford-crfm)",
        dict(model_type="gpt2", scale_attn_by_inverse_layer_idx=True),
        "scale_attn_by_inverse_layer_idx",
    ),
]

HEAD = """\
# Published models

<!-- Written by `python tests/published_models.py` from the table that the tests run. -->

`--init_from=NAME` loads a checkpoint of the Hugging Face hub, or a folder with its files. The weights must be
safetensors; a checkpoint that has only `pytorch_model.bin` is refused, with a command that converts it. If a checkpoint
needs a feature that model.py lacks, loading fails with an error that names the feature. A model that loads computes the
same logits as transformers.

The tests build a tiny random model of each row in transformers, with odd sizes, and compare the logits in float32: all
are within 1e-4. `python -m acorn.hub export` writes a model back as the type in the last column.

## Models that load

| models | what their `config.json` has | `model_type` | exported as |
|---|---|---|---|
"""

MIDDLE = """
## Models that are refused

| models | the field that the message names |
|---|---|
"""

TAIL = """
Rope scaled by `longrope`, sliding windows and parallel blocks would each need more than a few lines in model.py.

## Tokenizers

| files | |
|---|---|
| `tokenizer.json` with byte-level BPE (GPT-2, Llama 3, Qwen) | exact |
| `tokenizer.json` converted from SentencePiece, with a token for each byte (Llama 2, Mistral, Gemma) | exact |
| `vocab.txt` or `tokenizer.json` of WordPiece (Chinese GPT-2s with BertTokenizer) | loses case and spaces; see below |
| SentencePiece `tokenizer.model` alone | refused, with a command that converts it to `tokenizer.json` |
| `tokenizer.json` without a token for each byte (T5, XLM) | refused: it cannot represent all text |

A WordPiece tokenizer does not keep everything: it drops line breaks and repeated spaces, may lower the case, and
replaces words with unknown characters by `[UNK]` (in Chinese, a word is one character). `prepare` counts them and
prints the most frequent ones. Generated text has no spaces between Chinese characters, and single spaces between words.
"""


def page() -> str:
    """Return the content of docs/published-models.md."""
    rows = ""
    for row in SUPPORTED:
        kind = row.kind.lower()
        rows += f"| {row.models} | {row.feature} | {kind} | {row.exported or kind} |\n"
    refused = "".join(f"| {row.models} | `{row.words}` |\n" for row in REFUSED)
    return HEAD + rows + MIDDLE + refused + TAIL


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}", file=sys.stderr)
