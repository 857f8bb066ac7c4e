"""Write a model as a GGUF file, the format of llama.cpp and of programs built on it, such as Ollama."""

import contextlib
import json
import os
import sys
from pathlib import Path

import torch
from torch import Tensor

from acorn import UserError, files
from acorn.checkpoint.export import check_new, choose_family, hf_tensors, in_dtype
from acorn.checkpoint.huggingface import is_transposed
from acorn.checkpoint.load import load_model
from acorn.data import chat
from acorn.data.tokenizer import Tokenizer
from acorn.data.tokenizer_gpt2 import byte_alphabet, gpt2_config
from model import GPT, GPTConfig, rope_frequencies

TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}  # of matrices; the rest is float32
LLAMA3_PATTERN = (  # how Llama 3 splits a text into words; Qwen's differs in its single digits
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_PATTERN = LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")


def export_gguf(source: str, target: Path, which: str = "best", dtype: str = "float32") -> str:
    """Export a model as the GGUF file `target`, with its tokenizer and chat template. Returns llama.cpp's name of the
    architecture.

    `source` is anything that `checkpoint.load_model` accepts. `dtype`, one of TYPES, is that of the matrices; q8_0 has
    8 bits and a scale for every 32 weights, and matrices of other widths stay float16. The file is written atomically.
    Raises UserError if llama.cpp has no equivalent model or tokenizer, or if `target` exists."""
    try:
        import gguf
    except ImportError as error:
        raise UserError("--gguf needs the package gguf. Run pip install gguf.") from error
    check_new(target)
    model, tokenizer, _ = load_model(source, which, whole_context=True)
    family = choose_family(model.config, source)
    check_model(model.config, family, source)
    if tokenizer is None:
        raise UserError(f"{source} has no tokenizer, which a GGUF file needs. Use a run or a folder with a tokenizer.")
    vocabulary = tokenizer_fields(tokenizer, source)
    cfg = model.config
    cfg.vocab_size = min(cfg.vocab_size, tokenizer.n_vocab)  # the rows after the last id only pad the vocabulary

    tmp = target.with_name(f".writing-{target.name}")
    writer = gguf.GGUFWriter(tmp, "llama" if family == "mistral" else family)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        add_shape(writer, cfg, family, dtype)
        add_tokenizer(writer, tokenizer, cfg.vocab_size, vocabulary)
        for name, tensor in gguf_tensors(model, family).items():
            kind = tensor_type(name, tensor, dtype)
            if kind == gguf.GGMLQuantizationType.F16:
                tensor = in_dtype(name, tensor, torch.float16)
            writer.add_tensor(name, gguf.quantize(tensor.detach().float().contiguous().numpy(), kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        files.sync(tmp)
        os.rename(tmp, target)
        files.sync(target.parent)
    except OSError as error:
        raise UserError(
            f"{target} could not be written ({error.strerror}). The incomplete file was removed."
        ) from error
    finally:
        with contextlib.suppress(OSError):
            writer.close()
            tmp.unlink(missing_ok=True)
    return writer.arch


def check_model(cfg: GPTConfig, family: str, source: str) -> None:
    """Raise UserError if llama.cpp computes something else for this architecture. Its activations, for example, are
    fixed."""
    activations = {"gpt2": ("gelu_tanh", "gelu"), "gemma": ("geglu",)}.get(family, ("swiglu",))
    scaling = cfg.rope_scaling
    wrong = []
    if cfg.mlp not in activations:
        wrong.append(f"mlp={cfg.mlp!r}")
    if family == "gemma" and not cfg.tie_weights:
        wrong.append("tie_weights=False")
    if family == "qwen2" and cfg.n_head * cfg.head_dim != cfg.n_embd:
        wrong.append(f"head_dim={cfg.head_dim}")
    if family == "smollm3" and cfg.nope_every != 4:
        wrong.append(f"nope_every={cfg.nope_every}")
    if scaling and (
        scaling["rope_type"] == "yarn" or (scaling["rope_type"] == "llama3" and family not in ("llama", "mistral"))
    ):
        wrong.append(f"rope_scaling of type {scaling['rope_type']}")
    if wrong:
        raise UserError(
            f"{source} cannot be written as GGUF: it has {', '.join(wrong)}, which llama.cpp's {family} does not "
            "support. Export it for transformers instead, without --gguf."
        )
    if cfg.mlp == "gelu":
        print(
            "note: llama.cpp computes GELU's tanh form, which differs from this model's by up to 5e-4", file=sys.stderr
        )


def add_shape(writer, cfg: GPTConfig, family: str, dtype: str) -> None:
    """Write the shape of the model into the header."""
    import gguf

    writer.add_context_length(cfg.block_size)
    writer.add_embedding_length(cfg.n_embd)
    writer.add_feed_forward_length(cfg.n_hidden)
    writer.add_block_count(cfg.n_layer)
    writer.add_head_count(cfg.n_head)
    writer.add_vocab_size(cfg.vocab_size)
    kinds = {"F32": "ALL_F32", "F16": "MOSTLY_F16", "BF16": "MOSTLY_BF16", "Q8_0": "MOSTLY_Q8_0"}
    writer.add_file_type(gguf.LlamaFileType[kinds[TYPES[dtype]]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    if family == "gpt2":
        writer.add_layer_norm_eps(cfg.norm_eps)
        return
    writer.add_layer_norm_rms_eps(cfg.norm_eps)
    writer.add_head_count_kv(cfg.n_kv_head)
    writer.add_key_length(cfg.head_dim)
    writer.add_value_length(cfg.head_dim)
    writer.add_rope_dimension_count(cfg.head_dim)
    writer.add_rope_freq_base(cfg.rope_theta)
    if cfg.rope_scaling.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(cfg.rope_scaling["factor"])


def gguf_tensors(model: GPT, family: str) -> dict[str, Tensor]:
    """Return the parameters of a model by their names in GGUF, each with one row per output."""
    import gguf

    cfg = model.config
    form = "gpt2" if family == "gpt2" else "llama"  # gemma's norm weights, too, are stored as they are applied
    arch = gguf.MODEL_ARCH["LLAMA" if family == "mistral" else family.upper()]
    names = gguf.get_tensor_name_map(arch, cfg.n_layer)
    tensors = {}
    for name, tensor in hf_tensors(model, form).items():
        tensor = tensor.t() if is_transposed(form, name) else tensor
        if family in ("llama", "mistral", "smollm3") and name.endswith(("q_proj.weight", "k_proj.weight")):
            # there rope rotates neighbouring channels as pairs, here the channels i and i + D/2
            tensor = tensor.reshape(-1, 2, cfg.head_dim // 2, cfg.n_embd).transpose(1, 2).reshape(tensor.shape)
        gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert gguf_name is not None, name
        tensors[gguf_name] = tensor
    if cfg.rope_scaling.get("rope_type") == "llama3":
        plain = rope_frequencies(cfg.head_dim, cfg.rope_theta, {})[0]
        tensors["rope_freqs.weight"] = plain / rope_frequencies(cfg.head_dim, cfg.rope_theta, cfg.rope_scaling)[0]
    return tensors


def tensor_type(name: str, tensor: Tensor, dtype: str):
    """Return the GGML type in which a tensor is stored."""
    import gguf

    kind = TYPES[dtype]
    if tensor.dim() == 1 or name == "position_embd.weight":  # as llama.cpp's own converter does
        kind = "F32"
    elif kind == "Q8_0" and tensor.size(1) % 32:
        kind = "F16"
    return gguf.GGMLQuantizationType[kind]


def tokenizer_fields(tokenizer: Tokenizer, source: str) -> tuple[str, dict[str, int], list[str]]:
    """Return llama.cpp's name of a tokenizer's way of splitting words, its vocabulary, and its merges. Raises UserError
    if llama.cpp has no equivalent."""
    advice = "Export it for transformers instead, without --gguf."
    if tokenizer.kind == "byte":  # a merge is required, so there is one whose result is not in the vocabulary
        return "gpt-2", {char: byte[0] for char, byte in byte_alphabet().items()}, ["t h"]
    config = gpt2_config() if tokenizer.kind == "gpt2" else getattr(tokenizer, "config", None)
    model = (config or {}).get("model", {})
    if config is None or '"ByteLevel"' not in json.dumps(config.get("decoder")) or model.get("type") != "BPE":
        raise UserError(f"llama.cpp has no equivalent of the tokenizer of {source} ({tokenizer.kind}). {advice}")
    name = pre_tokenizer_name(config)
    marks = model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
    if name is None or marks or bool(model.get("ignore_merges")) != (name == "llama-bpe"):
        raise UserError(
            f"llama.cpp has no name for the pre-tokenizer of {source}, so it would split words differently. {advice}"
        )
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return name, model["vocab"], merges or ["t h"]


def pre_tokenizer_name(config: dict) -> str | None:
    """Return llama.cpp's name of the pre-tokenizer of a parsed tokenizer.json, None if it has none."""
    pre, normalizer = config.get("pre_tokenizer") or {}, config.get("normalizer")
    steps = pre.get("pretokenizers", []) if pre.get("type") == "Sequence" else [pre]
    shapes = []
    for step in steps:
        if step.get("type") == "ByteLevel" and not step.get("add_prefix_space", True):
            shapes.append("words" if step.get("use_regex", True) else "bytes")
        elif step.get("type") == "Digits" and step.get("individual_digits"):
            shapes.append("digits")
        elif step.get("type") == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
            shapes.append((step.get("pattern") or {}).get("Regex", ""))
        else:
            return None
    plain = {("words",): "gpt-2", ("digits", "words"): "smollm", (LLAMA3_PATTERN, "bytes"): "llama-bpe"}
    plain[(QWEN2_PATTERN, "bytes")] = "qwen2"
    if normalizer is not None and not (normalizer.get("type") == "NFC" and shapes[0] == QWEN2_PATTERN):
        return None
    return plain.get(tuple(shapes))


def add_tokenizer(writer, tokenizer: Tokenizer, n_vocab: int, fields: tuple) -> None:
    """Write the tokenizer and its chat template into the header."""
    import gguf

    pre, vocab, merges = fields
    control = tokenizer.control
    names = [f"[unused{i}]" for i in range(n_vocab)]
    kinds = [gguf.TokenType.UNUSED] * n_vocab
    added = {token["content"]: token["id"] for token in getattr(tokenizer, "config", {}).get("added_tokens") or ()}
    for ids, kind in ((vocab, "NORMAL"), (added, "USER_DEFINED"), (control, "CONTROL")):
        for name, i in ids.items():
            if i < n_vocab:
                names[i], kinds[i] = name, gguf.TokenType[kind]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(names)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    writer.add_add_bos_token(bool(tokenizer.before_text))
    writer.add_add_space_prefix(False)
    bos = next(iter(tokenizer.before_text), control.get(tokenizer.bos or ""))
    eos = control.get(tokenizer.eos or "", tokenizer.eot)
    ends = {*tokenizer.ends}
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)
        with contextlib.suppress(UserError):  # the template ends a turn without a control token
            ends |= chat.stop_ids(tokenizer)
    if bos is not None:
        writer.add_bos_token_id(bos)
    if eos is not None:
        writer.add_eos_token_id(eos)
    if ends - {eos}:  # llama.cpp has one more, for the end of a turn
        writer.add_eot_token_id(max(ends - {eos}))
    if tokenizer.pad in control:
        writer.add_pad_token_id(control[tokenizer.pad])
