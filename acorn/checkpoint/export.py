"""Write a model as a folder that transformers loads."""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from acorn import UserError, files
from acorn.checkpoint.huggingface import (
    ACORN_TOKENIZER,
    ACTIVATIONS,
    CLASSES,
    GATES,
    NAMES,
    flatten,
    hf_views,
    is_norm,
    tokenizer_json,
)
from acorn.checkpoint.load import load_model
from acorn.checkpoint.tensors import empty_model
from acorn.data import chat
from acorn.data.tokenizer import Tokenizer
from acorn.distributed.runtime import dtype_name
from model import GPT, GPTConfig, attention_dropout


def tokenizer_files(tokenizer: Tokenizer, block_size: int) -> dict[str, str]:
    """Return the content of a tokenizer's files by file name, for transformers and for `load_tokenizer`."""
    text = tokenizer_json(tokenizer)
    if text is None:
        print(
            f"note: transformers has no equivalent of the {tokenizer.kind} tokenizer; no tokenizer.json is written",
            file=sys.stderr,
        )
        return {ACORN_TOKENIZER: json.dumps(tokenizer.to_dict())}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # loads any tokenizer.json as it is
        "model_max_length": block_size,
        "clean_up_tokenization_spaces": False,
    }
    eot = next((name for name, i in tokenizer.control.items() if i == tokenizer.eot), None)
    extras = {"bos_token": tokenizer.bos, "eos_token": tokenizer.eos, "chat_template": tokenizer.chat_template}
    # padding a batch needs pad_token, and CTranslate2 needs unk_token to read GPT-2
    extras |= {"pad_token": tokenizer.pad or eot, "unk_token": tokenizer.unk or eot}
    config |= {name: value for name, value in extras.items() if value}
    contents = {"tokenizer.json": text, "tokenizer_config.json": json.dumps(config, indent=2)}
    hashes = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in contents.items()}
    return contents | {ACORN_TOKENIZER: json.dumps(tokenizer.to_dict() | {"files": hashes})}


def export(source: str, target: Path, choice: str = "best", dtype: torch.dtype = torch.float32) -> str:
    """Export a model as a folder `target` that transformers loads: weights, configuration and tokenizer.

    `source` is anything that `checkpoint.load_model` accepts. A run of adapters gets its base's context length. The
    folder is written atomically. Returns the name of the transformers class. Raises UserError if transformers has no
    equivalent model, or if `target` exists."""
    check_new(target)
    model, tokenizer, _ = load_model(source, choice, whole_context=True)
    cfg = model.config
    family = choose_family(cfg, source)
    if family == "gpt2" and cfg.mlp in ("relu", "relu2"):
        print(
            f"warning: mlp={cfg.mlp!r} works in transformers, but llama.cpp assumes GELU for every GPT-2 and would "
            "generate wrong text without an error. Do not convert this export for llama.cpp.",
            file=sys.stderr,
        )
    import transformers

    name = class_name(family)
    if tokenizer:  # rows after its last id only pad the vocabulary
        cfg.vocab_size = min(cfg.vocab_size, tokenizer.n_vocab)
    tensors = {name: in_dtype(name, t, dtype).contiguous() for name, t in hf_tensors(model, family).items()}
    control = tokenizer.control if tokenizer else {}
    ids: dict = {f"{name}_token_id": control.get(getattr(tokenizer, name, "")) for name in ("bos", "eos")}
    # without ids, transformers warns of GPT-2's
    config = to_gpt2(cfg, **ids) if family == "gpt2" else to_llama(cfg, family, **ids)
    config.update(dict(architectures=[name], dtype=dtype_name(dtype)))
    ends = [ids["eos_token_id"], *sorted(tokenizer.ends if tokenizer else ())]  # ends of texts and of turns
    if tokenizer and tokenizer.chat_template:
        with contextlib.suppress(UserError):  # the template ends a turn without a control token
            ends += sorted(chat.stop_ids(tokenizer))
    ends = list(dict.fromkeys(i for i in ends if i is not None))
    ids["eos_token_id"] = ends if len(ends) > 1 else next(iter(ends), None)

    tmp_dir = target.with_name(f".writing-{target.name}")
    files.remove(tmp_dir, ignore_errors=True)
    try:
        tmp_dir.mkdir(parents=True)
        config.save_pretrained(tmp_dir)
        transformers.GenerationConfig(**ids).save_pretrained(tmp_dir)
        save_file(tensors, tmp_dir / "model.safetensors", metadata={"format": "pt"})
        shutil.copymode(tmp_dir / "config.json", tmp_dir / "model.safetensors")  # safetensors makes it private
        for file_name, text in (tokenizer_files(tokenizer, cfg.block_size) if tokenizer else {}).items():
            (tmp_dir / file_name).write_bytes(text.encode())  # its hash is recorded, so no line ends are converted
        for file in [*tmp_dir.iterdir(), tmp_dir]:
            files.sync(file)
        os.rename(tmp_dir, target)
        files.sync(target.parent)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise UserError(f"{target} could not be written ({reason}). The incomplete export was removed.") from error
    finally:
        shutil.rmtree(tmp_dir, ignore_errors=True)
    return name


def check_new(target: Path) -> None:
    """Raise UserError if `target` exists."""
    if os.path.lexists(target):
        raise UserError(f"{target} already exists. Choose another name, or remove it.")


def in_dtype(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert a tensor. Raises UserError if a value is too large for `dtype`, and so would become infinite."""
    converted = tensor.detach().to(dtype)
    if not converted.isfinite().all():
        raise UserError(
            f"{name} has values up to {tensor.abs().max():.3g}, too large for {dtype_name(dtype)}. "
            "Use --dtype bfloat16."
        )
    return converted


def choose_family(cfg: GPTConfig, source: str) -> str:
    """Return the model_type of transformers that has the features of a model. Raises UserError if none has them all."""
    if cfg.pos != "rope":
        family = "gpt2"
    elif cfg.scale_embedding:
        family = "gemma"
    elif cfg.qk_norm_weight:
        family = "qwen3"
    elif cfg.qkv_bias:
        family = "qwen2"
    elif cfg.nope_every:
        family = "smollm3"
    else:
        family = "llama" if cfg.n_embd % cfg.n_head == 0 else "mistral"  # Llama's check of hidden_size is stricter
    weighted = family == "qwen3"
    supported: dict[str, list] = {
        "qk_norm": [weighted],
        "qk_norm_weight": [weighted],
        "logit_softcap": [0.0],
        "ngram": [1],
        "embedding_skip": [False],
    }
    if family == "gpt2":
        supported |= dict(pos=["learned"], norm=["layernorm"], mlp=list(ACTIVATIONS.values()), scale_embedding=[False])
        supported |= dict(n_kv_head=[cfg.n_head], head_dim=[cfg.n_embd // cfg.n_head])
    else:
        supported |= dict(norm=["rmsnorm"], mlp=list(GATES.values()), bias=[False], qkv_bias=[family == "qwen2"])
        supported |= dict(
            nope_every=[cfg.nope_every if family == "smollm3" else 0], scale_embedding=[family == "gemma"]
        )
    if refused := [f"{name}={getattr(cfg, name)!r}" for name in supported if getattr(cfg, name) not in supported[name]]:
        raise UserError(
            f"{source} cannot be exported: it has {', '.join(refused)}, which {class_name(family)} of transformers "
            "does not support. Train a model without that."
        )
    return family


def class_name(family: str) -> str:
    return "GPT2LMHeadModel" if family == "gpt2" else f"{CLASSES[family]}ForCausalLM"


def hf_tensors(model: GPT, family: str) -> dict[str, Tensor]:
    """Return the tensors of `hf_views` for export, with the configuration's vocabulary size and with all biases."""
    views = hf_views(model, family)
    tensors = flatten(views)
    if family == "gemma":  # stores the difference of norm weights from 1
        tensors |= flatten(
            {name: {k: p - 1 for k, p in parts.items()} for name, parts in views.items() if is_norm(name)}
        )
    for name in ("transformer.wte.weight", "model.embed_tokens.weight", "lm_head.weight"):
        if name in tensors:
            tensors[name] = tensors[name][: model.config.vocab_size]
    if family == "gpt2" and not model.config.bias:  # transformers' GPT-2 always has biases; zeros have no effect
        full = empty_model({**dataclasses.asdict(model.config), "bias": True}, family)
        zeros = {name: torch.zeros(view.shape) for name, view in flatten(hf_views(full, family)).items()}
        tensors = zeros | tensors
    return tensors


def to_gpt2(cfg: GPTConfig, **ids: int | None):
    """Return a transformers GPT2Config with the `ids` of control tokens."""
    from transformers import GPT2Config

    fields = {hf_name: getattr(cfg, name) for name, hf_name in NAMES["gpt2"].items()}
    fields |= dict(resid_pdrop=cfg.dropout, embd_pdrop=cfg.dropout, attn_pdrop=attention_dropout(cfg))
    fields["activation_function"] = next(hf_name for hf_name, mlp in ACTIVATIONS.items() if mlp == cfg.mlp)
    fields["n_ctx"] = cfg.block_size  # an older name of n_positions, which llama.cpp's converter reads
    return GPT2Config(**fields | ids)


def to_llama(cfg: GPTConfig, family: str, **ids: int | None):
    """Return a transformers configuration of Llama or its relative `family` with the `ids` of control tokens."""
    import transformers

    values = {hf_name: getattr(cfg, name) for name, hf_name in NAMES["llama"].items()}
    values |= {"head_dim": cfg.head_dim, "pad_token_id": None}  # SmolLM3's default may exceed the vocabulary
    values["hidden_act"] = next(hf_name for hf_name, mlp in GATES.items() if mlp == cfg.mlp)
    if family == "smollm3":
        values["no_rope_layers"] = [int((layer + 1) % cfg.nope_every != 0) for layer in range(cfg.n_layer)]
        values["no_rope_layer_interval"] = cfg.nope_every
    if family == "mistral":
        values["sliding_window"] = None
    rope = {"rope_type": "default", "rope_theta": cfg.rope_theta, **cfg.rope_scaling}
    # transformers before version 5 and tools made for it read rope_theta and rope_scaling
    old = {"rope_scaling": cfg.rope_scaling} if cfg.rope_scaling else {}
    kind = getattr(transformers, f"{CLASSES[family]}Config")
    return kind(**values, **ids, rope_parameters=rope, rope_theta=cfg.rope_theta, **old)
