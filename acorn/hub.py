"""Import and export Hugging Face checkpoints of the GPT-2 and Llama families.

Import: python train.py --init_from=gpt2                # or another name on the hub, or a folder
Export: python -m acorn.hub export out/mine hf/mine     # a folder that transformers loads

Weights are read and written as safetensors only, because a pickle can run code.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import shutil
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from acorn import UserError, chat, checkpoint, files, run
from acorn import tokenizer as tokenizers
from model import GPT, GPTConfig

# the files to download from the hub; a repository there may hold many others
MODEL_FILES = "config.json model.safetensors model-*-of-*.safetensors model.safetensors.index.json"
TOKENIZER_FILES = """
    config.json tokenizer.json tokenizer_config.json special_tokens_map.json generation_config.json chat_template.jinja
    additional_chat_templates/*.jinja acorn_tokenizer.json
"""
OWN = "acorn_tokenizer.json"  # acorn's own copy of the tokenizer in an exported folder, for an exact round trip
PREFIX = {"gpt2": "transformer.", "llama": "model."}  # of all parameter names except the head's; some files omit it
EMBEDDING = {"gpt2": "wte", "llama": "embed_tokens"}
CONSTANTS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")  # buffers in older files, not parameters
ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu2": "relu2"}
CLASSES = {"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM"}  # of transformers
NAMES = {  # field of GPTConfig -> field of transformers' configuration
    "gpt2": {
        "block_size": "n_positions",
        "vocab_size": "vocab_size",
        "n_layer": "n_layer",
        "n_head": "n_head",
        "n_embd": "n_embd",
        "n_hidden": "n_inner",
        "norm_eps": "layer_norm_epsilon",
        "tie_weights": "tie_word_embeddings",
    },
    "llama": {
        "block_size": "max_position_embeddings",
        "vocab_size": "vocab_size",
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "n_kv_head": "num_key_value_heads",
        "n_embd": "hidden_size",
        "n_hidden": "intermediate_size",
        "norm_eps": "rms_norm_eps",
        "tie_weights": "tie_word_embeddings",
    },
}
HAS = {  # the values of GPTConfig's switches that each family supports
    "gpt2": dict(pos=["learned"], norm=["layernorm"], mlp=list(ACTIVATIONS.values())),
    "llama": dict(pos=["rope"], norm=["rmsnorm"], mlp=["swiglu"], bias=[False]),
}


def open_model(source: str) -> tuple[GPT, dict, tokenizers.Tokenizer | None]:
    """Open a checkpoint by its name on the hub ("gpt2-xl") or its folder.

    Returns the model on the meta device, its parameters, not read yet (see `checkpoint.Opened`), and its tokenizer,
    None if the checkpoint has none. Raises UserError if the checkpoint is missing, broken or not supported.
    """
    folder = Path(source) if Path(source).is_dir() else download(source)
    family, config = read_config(folder)
    stored = open_tensors(folder, source, PREFIX[family])
    embedding = f"{PREFIX[family]}{EMBEDDING[family]}.weight"
    if config.tie_weights and embedding not in stored and "lm_head.weight" in stored:  # tied weights have either name
        stored[embedding] = stored.pop("lm_head.weight")

    model = checkpoint.empty_model(dataclasses.asdict(config), source)
    views = their_views(model, family)
    shapes = {name: list(view.shape) for name, view in flat(views).items()}
    if config.tie_weights and "lm_head.weight" in stored:
        shapes["lm_head.weight"] = [config.vocab_size, config.n_embd]
    if missing := sorted(shapes.keys() - stored.keys()):
        raise UserError(
            f"the checkpoint {source} lacks {len(missing)} tensors, {missing[0]} first. Download the checkpoint again."
        )
    if extra := sorted(stored.keys() - shapes.keys()):
        raise UserError(
            f"the checkpoint {source} has {len(extra)} tensors, {extra[0]} first, that a {family} model with its "
            "config.json does not have: its architecture is not supported. Use a plain gpt2 or llama checkpoint."
        )
    for name, shape in shapes.items():
        actual, dtype = stored[name].get_shape(), stored[name].get_dtype()
        if actual != shape:
            raise UserError(
                f"{name} of the checkpoint {source} has the shape {actual}, but its config.json says {shape}. Download "
                "the checkpoint again."
            )
        if dtype not in ("F64", "F32", "F16", "BF16"):
            raise UserError(
                f"{name} of the checkpoint {source} is {dtype}, and quantized weights are not supported. Use a "
                "checkpoint in float32, float16 or bfloat16."
            )
    values = {}
    for name, parts in views.items():
        pieces = [Turned(stored[part]) if turned(family, part) else stored[part] for part in parts]
        values[name] = checkpoint.Stored(" and ".join(parts), source, pieces)
    if config.tie_weights and "lm_head.weight" in stored:
        wte = values["transformer.wte.weight"]
        head = checkpoint.Stored("lm_head.weight", source, [stored["lm_head.weight"]])
        blocks = [slice(row, row + 4096) for row in range(0, config.vocab_size, 4096)]  # saves memory
        if not all(torch.equal(head[rows].float(), wte[rows].float()) for rows in blocks):
            raise UserError(
                f"the checkpoint {source} has a separate head, but its config.json ties the head to the embedding. Set "
                '"tie_word_embeddings": false in its config.json.'
            )
    tokenizer = load_tokenizer(str(folder))
    if tokenizer is None and config.vocab_size == tokenizers.GPT2Tokenizer.n_vocab:
        tokenizer = tokenizers.get_tokenizer("gpt2")
    if tokenizer is None:
        print(f"note: {source} has no tokenizer.json, so its token ids cannot be decoded", file=sys.stderr)
    return model, values, tokenizer


def download(name: str, patterns: str = MODEL_FILES + TOKENIZER_FILES) -> Path:
    """Return the local folder of a model on the hub; files that are not cached yet are downloaded."""
    try:
        from huggingface_hub import errors, snapshot_download
    except ImportError as error:
        raise UserError(f"{name} is on the Hugging Face hub. To load it, pip install transformers.") from error
    page = f"https://huggingface.co/{name}"
    try:
        return Path(snapshot_download(name, allow_patterns=patterns.split()))
    except errors.GatedRepoError as error:
        raise UserError(f"{name} is gated. Accept its terms at {page}, then run `hf auth login`.") from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise UserError(
            f"there is no folder {name}, and no such model on the Hugging Face hub. If it is private, run "
            "`hf auth login`."
        ) from error
    except (errors.HTTPError, errors.LocalEntryNotFoundError, ConnectionError) as error:
        raise UserError(
            f"there is no folder {name}, and the Hugging Face hub cannot be reached to look for a model of this name. "
            f"Without a network, give the folder of a local copy of {page}."
        ) from error


def read_json(path: Path) -> dict:
    try:
        value = files.read_json(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is missing or not valid JSON. Download the checkpoint again.") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} is not a JSON object. Download the checkpoint again.")
    return value


def read_config(folder: Path) -> tuple[str, GPTConfig]:
    """Return the family of a checkpoint, gpt2 or llama, and its configuration. Raises UserError for a feature that
    acorn's model does not support."""
    path = folder / "config.json"
    raw = read_json(path)
    family = raw.get("model_type")
    if family not in PREFIX:
        raise UserError(f"{path} has model_type {family!r:.40}, which is not supported. Use a gpt2 or llama model.")
    try:
        import transformers
    except ImportError as error:
        raise UserError(f"{folder} is a Hugging Face checkpoint. To load it, pip install transformers.") from error
    try:
        # the library knows the defaults of missing fields, and the formats of older versions
        if family == "gpt2":
            return family, from_gpt2(transformers.GPT2Config.from_dict(raw), path)
        return family, from_llama(transformers.LlamaConfig.from_dict(raw), path)
    except UserError:
        raise
    except Exception as error:  # transformers raises many types for a broken file
        reason = (str(error).splitlines() or [type(error).__name__])[-1].strip()
        raise UserError(f"{path} does not describe a {family} model ({reason}). Download it again.") from error


def from_gpt2(c, path: Path) -> GPTConfig:
    """Convert a transformers GPT2Config that was read from `path`."""
    refuse(
        path,
        {
            f"activation_function = {c.activation_function}": c.activation_function not in ACTIVATIONS,
            "scale_attn_weights = false": not c.scale_attn_weights,
            "scale_attn_by_inverse_layer_idx": c.scale_attn_by_inverse_layer_idx,
            "add_cross_attention": c.add_cross_attention,
            "quantized weights": getattr(c, "quantization_config", None),
        },
    )
    same = {name: getattr(c, theirs) for name, theirs in NAMES["gpt2"].items()}
    same["n_hidden"] = c.n_inner or 0
    return GPTConfig(**same, mlp=ACTIVATIONS[c.activation_function])


def from_llama(c, path: Path) -> GPTConfig:
    """Convert a transformers LlamaConfig that was read from `path`."""
    rope = c.rope_parameters
    refuse(
        path,
        {
            f"rope scaling {rope['rope_type']!r}": rope["rope_type"] != "default",
            "partial_rotary_factor": rope.get("partial_rotary_factor", 1.0) != 1.0,
            "sliding_window": getattr(c, "sliding_window", None),
            f"hidden_act = {c.hidden_act}": c.hidden_act not in ("silu", "swish"),  # synonyms
            "attention_bias": c.attention_bias,
            "mlp_bias": c.mlp_bias,
            f"head_dim = {c.head_dim}": c.head_dim * c.num_attention_heads != c.hidden_size,
            "quantized weights": getattr(c, "quantization_config", None),
        },
    )
    same = {name: getattr(c, theirs) for name, theirs in NAMES["llama"].items()}
    form = dict(pos="rope", norm="rmsnorm", mlp="swiglu", bias=False)
    return GPTConfig(**same, **form, rope_theta=rope["rope_theta"])


def refuse(path: Path, unsupported: dict[str, object]) -> None:
    """Raise UserError for the first feature whose value is true."""
    for feature, present in unsupported.items():
        if present:
            raise UserError(f"{path} has {feature}, which acorn's model does not support. Use another checkpoint.")


def open_tensors(folder: Path, source: str, prefix: str) -> dict:
    """Return the tensors of a checkpoint by their full names, as slices of safetensors that are not read yet."""
    names, index = ["model.safetensors"], folder / "model.safetensors.index.json"
    if not (folder / names[0]).exists():
        if not index.exists():
            classes = "(t.AutoModelForCausalLM, t.AutoTokenizer)"
            convert = f"[c.from_pretrained({source!r}).save_pretrained('converted') for c in {classes}]"
            raise UserError(
                f"{source} has no model.safetensors. A pickle such as pytorch_model.bin is not loaded, because it can "
                "run code. If you trust it, convert it with "
                f'python -c "import transformers as t; {convert}"'
            )
        weight_map = read_json(index).get("weight_map")
        if (
            not isinstance(weight_map, dict)
            or not weight_map
            or not all(isinstance(name, str) for name in weight_map.values())
        ):
            raise UserError(f"{index} has no weight_map from tensors to file names. Download the checkpoint again.")
        names = sorted(set(weight_map.values()))
    tensors = {}
    for path in (folder / name for name in names):
        if path.parent != folder:
            raise UserError(f"{index} names {path}, which is not in its folder. Download the checkpoint again.")
        if not path.is_file():
            raise UserError(f"{path} is missing. Download the checkpoint again.")
        try:
            file = safe_open(path, framework="pt", backend="pread")  # a memory map would count as resident memory
            keys = list(file.keys())
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} is incomplete or damaged ({error}). Download the checkpoint again.") from error
        for name in keys:
            if not name.endswith(CONSTANTS):
                tensors[name if name.startswith((prefix, "lm_head.")) else prefix + name] = file.get_slice(name)
    return tensors


class Turned:
    """A stored matrix, transposed, whose rows are read on demand."""

    def __init__(self, stored):
        self.stored = stored

    def get_shape(self) -> list[int]:
        return self.stored.get_shape()[::-1]

    def __getitem__(self, rows) -> Tensor:
        return self.stored[:, rows].t()


def turned(family: str, name: str) -> bool:
    """Whether transformers stores this tensor transposed (its Conv1D)."""
    return family == "gpt2" and name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))


def their_views(model: GPT, family: str) -> dict[str, dict[str, Tensor]]:
    """Return, for each parameter of a model, the tensors that transformers has instead, as views of the parameter.

    Both are keyed by name. If there are several, they are the rows of the parameter, in order."""
    parameters = dict(model.named_parameters())
    if family == "gpt2":
        return {name: {name: p.t() if turned(family, name) else p} for name, p in parameters.items()}
    cfg = model.config
    views = {
        "transformer.wte.weight": {"model.embed_tokens.weight": model.transformer.wte.weight},
        "transformer.ln_f.weight": {"model.norm.weight": model.transformer.ln_f.weight},
    }
    if not cfg.tie_weights:
        views["lm_head.weight"] = {"lm_head.weight": model.lm_head.weight}
    for i, block in enumerate(model.transformer.h):
        kv_channels = cfg.n_kv_head * cfg.head_dim
        q, k, v = block.attn.c_attn.weight.split((cfg.n_embd, kv_channels, kv_channels))
        gate, up = block.mlp.c_fc.weight.chunk(2)
        layer = {
            "ln_1": {"input_layernorm": block.ln_1.weight},
            "attn.c_attn": {"self_attn.q_proj": q, "self_attn.k_proj": k, "self_attn.v_proj": v},
            "attn.c_proj": {"self_attn.o_proj": block.attn.c_proj.weight},
            "ln_2": {"post_attention_layernorm": block.ln_2.weight},
            "mlp.c_fc": {"mlp.gate_proj": gate, "mlp.up_proj": up},
            "mlp.c_proj": {"mlp.down_proj": block.mlp.c_proj.weight},
        }
        for name, parts in layer.items():
            theirs = {f"model.layers.{i}.{part}.weight": view for part, view in parts.items()}
            views[f"transformer.h.{i}.{name}.weight"] = theirs
    return views


def flat(views: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return all tensors of `their_views` in one dict."""
    return {name: view.detach() for parts in views.values() for name, view in parts.items()}


def load_tokenizer(source: str) -> tokenizers.Tokenizer | None:
    """Load the tokenizer of a checkpoint by its name on the hub or its folder; None if it has none."""
    folder = Path(source) if Path(source).is_dir() else download(source, TOKENIZER_FILES)
    if (folder / OWN).exists():
        tokenizer = tokenizers.from_dict(read_json(folder / OWN))
        tokenizer.add_ends(tokenizers.read_ends(folder, tokenizer.control.values()))  # the user may have edited them
        return tokenizer
    return tokenizers.load_hf(folder) if tokenizers.is_hf(folder) else None


def tokenizer_files(tokenizer: tokenizers.Tokenizer, block_size: int) -> dict[str, str]:
    """Return the content of a tokenizer's files by file name, for transformers and for `load_tokenizer`."""
    own = {OWN: json.dumps(tokenizer.to_dict())}
    text = tokenizer_json(tokenizer)
    if text is None:
        print(
            f"note: transformers has no equivalent of the {tokenizer.kind} tokenizer; no tokenizer.json is written",
            file=sys.stderr,
        )
        return own
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
    return own | {"tokenizer.json": text, "tokenizer_config.json": json.dumps(config, indent=2)}


def tokenizer_json(tokenizer: tokenizers.Tokenizer) -> str | None:
    """Return the tokenizer in the format of Hugging Face's library `tokenizers`; None if that is not possible."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    if tokenizer.kind in ("bpe", "hf"):
        return json.dumps(tokenizer.config, ensure_ascii=False)
    if tokenizer.kind == "gpt2":
        config = tokenizers.gpt2_config()
        return config and json.dumps(config, ensure_ascii=False)
    if tokenizer.kind == "char":  # each character is a word
        ids = {char: i for i, char in enumerate(tokenizer.to_dict()["vocab"])}
        backend = Tokenizer(models.WordLevel(ids, unk_token=""))  # no unknown token: an unknown character is an error
        backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        backend.decoder = decoders.Fuse()
        return backend.to_str()
    if tokenizer.kind == "byte":  # BPE without merges
        ids = {char: byte[0] for char, byte in tokenizers.byte_alphabet().items()}
        backend = Tokenizer(models.BPE(ids, []))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens([tokenizers.END_OF_TEXT])
        return backend.to_str()
    return None


def export(source: str, target: Path, which: str = "best", dtype: torch.dtype = torch.float32) -> str:
    """Export a model as a folder `target` that transformers loads: weights, configuration and tokenizer.

    `source` is anything that `checkpoint.load_model` accepts. A run of adapters gets its base's context length. The
    folder is written atomically. Returns the name of the transformers class. Raises UserError if transformers has no
    equivalent model, or if `target` exists."""
    if os.path.lexists(target):
        raise UserError(f"{target} already exists. Choose another folder, or remove it.")
    model, tokenizer, _ = checkpoint.load_model(source, which, whole_context=True)
    cfg = model.config
    family = "llama" if cfg.pos == "rope" else "gpt2"
    supported = {"qk_norm": [False], "logit_softcap": [0.0], "ngram": [1], **HAS[family]}
    if family == "gpt2":
        supported["n_kv_head"] = [cfg.n_head]
    if wrong := [f"{name}={getattr(cfg, name)!r}" for name in supported if getattr(cfg, name) not in supported[name]]:
        raise UserError(
            f"{source} cannot be exported: it has {', '.join(wrong)}, which {CLASSES[family]} of transformers does not "
            "support. Train a model without that."
        )
    if family == "gpt2" and cfg.mlp == "relu2":
        print(
            "warning: mlp='relu2' works in transformers, but llama.cpp assumes GELU for every GPT-2 and would generate "
            "wrong text without an error. Do not convert this export for llama.cpp.",
            file=sys.stderr,
        )
    import transformers

    if tokenizer:  # rows after its last id only pad the vocabulary
        cfg.vocab_size = min(cfg.vocab_size, tokenizer.n_vocab)
    tensors = {name: t.to(dtype).contiguous() for name, t in their_tensors(model, family).items()}
    control = tokenizer.control if tokenizer else {}
    ids = {f"{name}_token_id": control.get(getattr(tokenizer, name, None)) for name in ("bos", "eos")}
    config = (to_gpt2 if family == "gpt2" else to_llama)(cfg, **ids)  # without ids, transformers warns of GPT-2's
    config.update(dict(architectures=[CLASSES[family]], dtype=str(dtype)[6:]))
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
        for name, text in (tokenizer_files(tokenizer, cfg.block_size) if tokenizer else {}).items():
            (tmp_dir / name).write_text(text, encoding="utf-8")
        for file in [*tmp_dir.iterdir(), tmp_dir]:
            files.sync(file)
        os.rename(tmp_dir, target)
        files.sync(target.parent)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise UserError(f"{target} could not be written ({reason}). The incomplete export was removed.") from error
    finally:
        shutil.rmtree(tmp_dir, ignore_errors=True)
    return CLASSES[family]


def their_tensors(model: GPT, family: str) -> dict[str, Tensor]:
    """Return the tensors of `their_views` for export, with the configuration's vocabulary size and with all biases."""
    tensors = flat(their_views(model, family))
    for name in ("transformer.wte.weight", "model.embed_tokens.weight", "lm_head.weight"):
        if name in tensors:
            tensors[name] = tensors[name][: model.config.vocab_size]
    if family == "gpt2" and not model.config.bias:  # transformers' GPT-2 always has biases; zeros have no effect
        full = checkpoint.empty_model({**dataclasses.asdict(model.config), "bias": True}, family)
        zeros = {name: torch.zeros(view.shape) for name, view in flat(their_views(full, family)).items()}
        tensors = zeros | tensors
    return tensors


def to_gpt2(cfg: GPTConfig, **ids: int | None):
    """Return a transformers GPT2Config with the `ids` of control tokens."""
    from transformers import GPT2Config

    same = {theirs: getattr(cfg, name) for name, theirs in NAMES["gpt2"].items()}
    activation = next(theirs for theirs, ours in ACTIVATIONS.items() if ours == cfg.mlp)
    dropouts = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), cfg.dropout)
    # llama.cpp's converter reads n_ctx, an older name of n_positions
    return GPT2Config(**same, **ids, **dropouts, activation_function=activation, n_ctx=cfg.block_size)


def to_llama(cfg: GPTConfig, **ids: int | None):
    """Return a transformers LlamaConfig with the `ids` of control tokens."""
    from transformers import LlamaConfig

    same = {theirs: getattr(cfg, name) for name, theirs in NAMES["llama"].items()}
    rope = {"rope_type": "default", "rope_theta": cfg.rope_theta}
    # transformers before version 5 and tools made for it read the separate rope_theta
    return LlamaConfig(**same, **ids, rope_parameters=rope, rope_theta=cfg.rope_theta)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m acorn.hub", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    sub = commands.add_parser("export", help="write a run as a folder that transformers loads", allow_abbrev=False)
    sub.add_argument("source", help="an out_dir, a nanoGPT ckpt.pt, or any other value of init_from")
    sub.add_argument("target", type=Path, help="the folder to write, which must not exist")
    sub.add_argument(
        "--checkpoint", default="best", help="checkpoint of an out_dir: best (default), latest, or step_002000"
    )
    dtypes = ("float32", "bfloat16", "float16")
    sub.add_argument(
        "--dtype", default="float32", choices=dtypes, help="data type of the weights; default: %(default)s"
    )
    args = parser.parse_args()
    name = export(args.source, args.target, args.checkpoint, getattr(torch, args.dtype))
    print(f"wrote {name} in {args.dtype} to {args.target}")


if __name__ == "__main__":
    run(main)
