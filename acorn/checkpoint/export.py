"""Write a model as a folder that transformers loads."""

import contextlib
import dataclasses
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
from acorn.checkpoint.huggingface import ACTIVATIONS, CLASSES, HAS, NAMES, OWN, flat, their_views
from acorn.checkpoint.load import load_model
from acorn.checkpoint.tensors import empty_model
from acorn.data import chat
from acorn.data import tokenizer as tokenizers
from model import GPT, GPTConfig


def tokenizer_files(tokenizer: tokenizers.Tokenizer, block_size: int) -> dict[str, str]:
    """What says it all of a tokenizer, by file name: to transformers, and to `load_tokenizer`."""
    own = {OWN: json.dumps(tokenizer.to_dict())}
    text = tokenizer_json(tokenizer)
    if text is None:
        print(f"note: {tokenizer.kind} has no form that transformers reads: no tokenizer is written", file=sys.stderr)
        return own
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # whatever tokenizer.json says
        "model_max_length": block_size,
        "clean_up_tokenization_spaces": False,
    }
    eot = next((name for name, i in tokenizer.control.items() if i == tokenizer.eot), None)
    extras = {"bos_token": tokenizer.bos, "eos_token": tokenizer.eos, "chat_template": tokenizer.chat_template}
    # a batch cannot be padded without the one, and CTranslate2 does not read GPT-2 without the other
    extras |= {"pad_token": tokenizer.pad or eot, "unk_token": tokenizer.unk or eot}
    config |= {name: value for name, value in extras.items() if value}
    return own | {"tokenizer.json": text, "tokenizer_config.json": json.dumps(config, indent=2)}


def tokenizer_json(tokenizer: tokenizers.Tokenizer) -> str | None:
    """The tokenizer as Hugging Face's library `tokenizers` writes it; None where it has no such form."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    if tokenizer.kind in ("bpe", "hf"):
        return json.dumps(tokenizer.config, ensure_ascii=False)
    if tokenizer.kind == "gpt2":
        config = tokenizers.gpt2_config()
        return config and json.dumps(config, ensure_ascii=False)
    if tokenizer.kind == "char":  # a word is a character
        ids = {char: i for i, char in enumerate(tokenizer.to_dict()["vocab"])}
        theirs = Tokenizer(models.WordLevel(ids, unk_token=""))  # there is none: an unknown character is an error
        theirs.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        theirs.decoder = decoders.Fuse()
        return theirs.to_str()
    if tokenizer.kind == "byte":  # nothing is merged
        ids = {char: byte[0] for char, byte in tokenizers.byte_alphabet().items()}
        theirs = Tokenizer(models.BPE(ids, []))
        theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        theirs.decoder = decoders.ByteLevel()
        theirs.add_special_tokens([tokenizers.END_OF_TEXT])
        return theirs.to_str()
    return None


def export(source: str, target: Path, which: str = "best", dtype: torch.dtype = torch.float32) -> str:
    """Write a model, from anything that `checkpoint.load_model` takes, as the folder `target` that transformers loads:
    weights, configuration, tokenizer. A run of adapters goes out with the context length of its base. Returns the name
    of its class there. Raises UserError where transformers has no such model, and where `target` is there; a folder
    that is there is whole."""
    if os.path.lexists(target):
        raise UserError(f"{target} is there already; give another folder, or remove it")
    model, tokenizer, _ = load_model(source, which, whole_context=True)
    cfg = model.config
    family = "llama" if cfg.pos == "rope" else "gpt2"
    has = {"qk_norm": [False], "logit_softcap": [0.0], "ngram": [1], **HAS[family]}
    if family == "gpt2":
        has["n_kv_head"] = [cfg.n_head]
    if wrong := [f"{name} = {getattr(cfg, name)!r}" for name in has if getattr(cfg, name) not in has[name]]:
        raise UserError(
            f"{source} cannot be exported: it has {', '.join(wrong)}, which {CLASSES[family]} of transformers does not"
        )
    if family == "gpt2" and cfg.mlp == "relu2":
        print(
            "warning: mlp = 'relu2' is right in transformers, but llama.cpp takes every GPT-2 for one with GELU, and "
            "gives wrong text without an error. Do not convert this export for it.",
            file=sys.stderr,
        )
    import transformers

    if tokenizer:  # rows beyond its ids pad the vocabulary, and stand for nothing
        cfg.vocab_size = min(cfg.vocab_size, tokenizer.n_vocab)
    tensors = {name: t.to(dtype).contiguous() for name, t in their_tensors(model, family).items()}
    control = tokenizer.control if tokenizer else {}
    ids = {f"{name}_token_id": control.get(getattr(tokenizer, name, None)) for name in ("bos", "eos")}
    config = (to_gpt2 if family == "gpt2" else to_llama)(cfg, **ids)  # which without ids would warn of GPT-2's
    config.update(dict(architectures=[CLASSES[family]], dtype=str(dtype)[6:]))
    ends = [ids["eos_token_id"], *sorted(tokenizer.ends if tokenizer else ())]  # of a text, and of a turn
    if tokenizer and tokenizer.chat_template:
        with contextlib.suppress(UserError):  # it ends a turn without a control token
            ends += sorted(chat.stop_ids(tokenizer))
    ends = list(dict.fromkeys(i for i in ends if i is not None))
    ids["eos_token_id"] = ends if len(ends) > 1 else next(iter(ends), None)

    beside = target.with_name(f".writing-{target.name}")
    files.remove(beside, ignore_errors=True)
    try:
        beside.mkdir(parents=True)
        config.save_pretrained(beside)
        transformers.GenerationConfig(**ids).save_pretrained(beside)
        save_file(tensors, beside / "model.safetensors", metadata={"format": "pt"})
        shutil.copymode(beside / "config.json", beside / "model.safetensors")  # which is made for this user alone
        for name, text in (tokenizer_files(tokenizer, cfg.block_size) if tokenizer else {}).items():
            (beside / name).write_text(text, encoding="utf-8")
        for file in [*beside.iterdir(), beside]:
            files.sync(file)
        os.rename(beside, target)
        files.sync(target.parent)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise UserError(f"{target} could not be written ({reason}); nothing of it is left") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return CLASSES[family]


def their_tensors(model: GPT, family: str) -> dict[str, Tensor]:
    """`their_views` for export: as many rows of the vocabulary as the model's configuration says, and every bias."""
    tensors = flat(their_views(model, family))
    for name in ("transformer.wte.weight", "model.embed_tokens.weight", "lm_head.weight"):
        if name in tensors:
            tensors[name] = tensors[name][: model.config.vocab_size]
    if family == "gpt2" and not model.config.bias:  # GPT-2 has biases everywhere; zeros do nothing
        full = empty_model({**dataclasses.asdict(model.config), "bias": True}, family)
        zeros = {name: torch.zeros(view.shape) for name, view in flat(their_views(full, family)).items()}
        tensors = zeros | tensors
    return tensors


def to_gpt2(cfg: GPTConfig, **ids: int | None):
    """A transformers GPT2Config, with the `ids` of control tokens."""
    from transformers import GPT2Config

    same = {theirs: getattr(cfg, name) for name, theirs in NAMES["gpt2"].items()}
    activation = next(theirs for theirs, ours in ACTIVATIONS.items() if ours == cfg.mlp)
    dropouts = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), cfg.dropout)
    # n_ctx, an older name of n_positions, is where llama.cpp's converter looks
    return GPT2Config(**same, **ids, **dropouts, activation_function=activation, n_ctx=cfg.block_size)


def to_llama(cfg: GPTConfig, **ids: int | None):
    """A transformers LlamaConfig, with the `ids` of control tokens."""
    from transformers import LlamaConfig

    same = {theirs: getattr(cfg, name) for name, theirs in NAMES["llama"].items()}
    rope = {"rope_type": "default", "rope_theta": cfg.rope_theta}
    # rope_theta apart is where transformers before 5, and what was made for it, look
    return LlamaConfig(**same, **ids, rope_parameters=rope, rope_theta=cfg.rope_theta)
