"""Hugging Face checkpoints of the GPT-2 and Llama families, in and out.

In:  python train.py --init_from=gpt2                # or another name on the hub, or a folder
Out: python -m acorn.hub export out/mine hf/mine     # a folder that transformers loads

Weights are read and written as safetensors only: a pickle could run code.
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

from acorn import UserError, checkpoint, files, run
from acorn.data import chat
from acorn.data import tokenizer as tokenizers
from model import GPT, GPTConfig

# of a folder on the hub, which may hold much else
MODEL_FILES = "config.json model.safetensors model-*-of-*.safetensors model.safetensors.index.json"
TOKENIZER_FILES = """
    config.json tokenizer.json tokenizer_config.json special_tokens_map.json generation_config.json chat_template.jinja
    additional_chat_templates/*.jinja acorn_tokenizer.json
"""
OWN = "acorn_tokenizer.json"  # in an exported folder, so that it comes back with the tokenizer that it had
PREFIX = {"gpt2": "transformer.", "llama": "model."}  # of all names but the head's; some files leave it out
EMBEDDING = {"gpt2": "wte", "llama": "embed_tokens"}
CONSTANTS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")  # that older files hold beside the parameters
ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu2": "relu2"}
CLASSES = {"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM"}  # of transformers
NAMES = {  # of GPTConfig, in their configurations
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
HAS = {  # the switches of GPTConfig that each of them has
    "gpt2": dict(pos=["learned"], norm=["layernorm"], mlp=list(ACTIVATIONS.values())),
    "llama": dict(pos=["rope"], norm=["rmsnorm"], mlp=["swiglu"], bias=[False]),
}


def open_model(source: str) -> tuple[GPT, dict, tokenizers.Tokenizer | None]:
    """The model of a checkpoint, by its name on the hub ("gpt2-xl") or its folder, on the meta device; its parameters,
    unread (see `checkpoint.Opened`); and its tokenizer, None where it comes without. Raises UserError where it cannot
    be had, or is no model that acorn has."""
    folder = Path(source) if Path(source).is_dir() else download(source)
    family, config = read_config(folder)
    there = open_tensors(folder, source, PREFIX[family])
    embedding = f"{PREFIX[family]}{EMBEDDING[family]}.weight"
    if config.tie_weights and embedding not in there and "lm_head.weight" in there:  # of tied ones either name does
        there[embedding] = there.pop("lm_head.weight")

    model = checkpoint.empty_model(dataclasses.asdict(config), source)
    views = their_views(model, family)
    shapes = {name: list(view.shape) for name, view in flat(views).items()}
    if config.tie_weights and "lm_head.weight" in there:
        shapes["lm_head.weight"] = [config.vocab_size, config.n_embd]
    if missing := sorted(shapes.keys() - there.keys()):
        raise UserError(f"the checkpoint {source} lacks {len(missing)} tensors, {missing[0]} first; get it again")
    if extra := sorted(there.keys() - shapes.keys()):
        raise UserError(
            f"the checkpoint {source} has {len(extra)} tensors, {extra[0]} first, that a {family} model with its "
            "config.json does not have; it is of another architecture"
        )
    for name, shape in shapes.items():
        found, dtype = there[name].get_shape(), there[name].get_dtype()
        if found != shape:
            raise UserError(f"{name} of the checkpoint {source} is {found} instead of the {shape} of its config.json")
        if dtype not in ("F64", "F32", "F16", "BF16"):
            raise UserError(f"{name} of the checkpoint {source} is {dtype}; quantized weights are not loaded")
    values = {}
    for name, parts in views.items():
        pieces = [Turned(there[part]) if turned(family, part) else there[part] for part in parts]
        values[name] = checkpoint.Stored(" and ".join(parts), source, pieces)
    if config.tie_weights and "lm_head.weight" in there:
        wte = values["transformer.wte.weight"]
        head = checkpoint.Stored("lm_head.weight", source, [there["lm_head.weight"]])
        blocks = [slice(row, row + 4096) for row in range(0, config.vocab_size, 4096)]  # not both of them whole
        if not all(torch.equal(head[rows].float(), wte[rows].float()) for rows in blocks):
            raise UserError(
                f"the checkpoint {source} has a head of its own, but its config.json ties it to the embedding; "
                'put "tie_word_embeddings": false there'
            )
    tokenizer = load_tokenizer(str(folder))
    if tokenizer is None and config.vocab_size == tokenizers.GPT2Tokenizer.n_vocab:
        tokenizer = tokenizers.get_tokenizer("gpt2")
    if tokenizer is None:
        print(f"note: {source} has no tokenizer.json, so what its tokens mean is not known", file=sys.stderr)
    return model, values, tokenizer


def download(name: str, wanted: str = MODEL_FILES + TOKENIZER_FILES) -> Path:
    """The folder in which a model of the hub lies on this machine, after it was downloaded where needed."""
    try:
        from huggingface_hub import errors, snapshot_download
    except ImportError as error:
        raise UserError(f"{name} is on the Hugging Face hub: pip install transformers to have it") from error
    page = f"https://huggingface.co/{name}"
    try:
        return Path(snapshot_download(name, allow_patterns=wanted.split()))
    except errors.GatedRepoError as error:
        raise UserError(f"{name} is gated: accept its terms at {page}, then `hf auth login`") from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise UserError(
            f"there is no folder {name}, and no such model on the Hugging Face hub; if it is private, `hf auth login`"
        ) from error
    except (errors.HTTPError, errors.LocalEntryNotFoundError, ConnectionError) as error:
        raise UserError(
            f"there is no folder {name}, and the Hugging Face hub cannot be reached for the model of that name; "
            f"without network, give the folder of a copy of {page}"
        ) from error


def read_json(path: Path) -> dict:
    try:
        value = files.read_json(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not there, or is no JSON; get the checkpoint again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} is no JSON object; get the checkpoint again")
    return value


def read_config(folder: Path) -> tuple[str, GPTConfig]:
    """The family, gpt2 or llama, and the configuration of a checkpoint. A feature that acorn's model does not have is
    a UserError that names it."""
    path = folder / "config.json"
    raw = read_json(path)
    family = raw.get("model_type")
    if family not in PREFIX:
        raise UserError(f"{path} is of the family {family!r:.40}, which cannot be loaded; gpt2 and llama can")
    try:
        import transformers
    except ImportError as error:
        raise UserError(f"{folder} is a Hugging Face checkpoint: pip install transformers to load it") from error
    try:
        # the library knows the defaults of what is left out, and the forms that older versions wrote
        if family == "gpt2":
            return family, from_gpt2(transformers.GPT2Config.from_dict(raw), path)
        return family, from_llama(transformers.LlamaConfig.from_dict(raw), path)
    except UserError:
        raise
    except Exception as error:  # a broken file fails there in many ways
        raise UserError(f"{path} describes no {family} model ({str(error).splitlines()[-1].strip()})") from error


def from_gpt2(c, path: Path) -> GPTConfig:
    """Of a transformers GPT2Config, which was read from `path`."""
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
    """Of a transformers LlamaConfig, which was read from `path`."""
    rope = c.rope_parameters
    refuse(
        path,
        {
            f"rope scaling {rope['rope_type']!r}": rope["rope_type"] != "default",
            "partial_rotary_factor": rope.get("partial_rotary_factor", 1.0) != 1.0,
            "sliding_window": getattr(c, "sliding_window", None),
            f"hidden_act = {c.hidden_act}": c.hidden_act not in ("silu", "swish"),  # two names of one
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
    """Raise UserError for the first feature that is there, by its name."""
    for feature, present in unsupported.items():
        if present:
            raise UserError(f"{path} has {feature}, which acorn's model does not; it is not loaded")


def open_tensors(folder: Path, source: str, prefix: str) -> dict:
    """The tensors of a checkpoint, by their full names, unread: slices as safetensors makes them."""
    names, index = ["model.safetensors"], folder / "model.safetensors.index.json"
    if not (folder / names[0]).exists():
        if not index.exists():
            classes = "(t.AutoModelForCausalLM, t.AutoTokenizer)"
            convert = f"[c.from_pretrained({source!r}).save_pretrained('converted') for c in {classes}]"
            raise UserError(
                f"{source} has no model.safetensors; a pickle such as pytorch_model.bin could run code and is not "
                "loaded; where you trust it, this makes safetensors of it: "
                f'python -c "import transformers as t; {convert}"'
            )
        where = read_json(index).get("weight_map")
        if not isinstance(where, dict) or not where or not all(isinstance(name, str) for name in where.values()):
            raise UserError(f"{index} has no weight_map from tensors to file names; get the checkpoint again")
        names = sorted(set(where.values()))
    there = {}
    for path in (folder / name for name in names):
        if path.parent != folder:
            raise UserError(f"{index} names {path}, which is not in its folder; get the checkpoint again")
        if not path.is_file():
            raise UserError(f"{path} is missing; get the checkpoint again")
        try:
            file = safe_open(path, framework="pt", backend="pread")  # a memory map would count as memory in use
            stored = list(file.keys())
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} is not whole ({error}); get the checkpoint again") from error
        for name in stored:
            if not name.endswith(CONSTANTS):
                there[name if name.startswith((prefix, "lm_head.")) else prefix + name] = file.get_slice(name)
    return there


class Turned:
    """A stored matrix with rows and columns exchanged, of which rows can be asked for."""

    def __init__(self, stored):
        self.stored = stored

    def get_shape(self) -> list[int]:
        return self.stored.get_shape()[::-1]

    def __getitem__(self, rows) -> Tensor:
        return self.stored[:, rows].t()


def turned(family: str, name: str) -> bool:
    """Whether transformers multiplies with this tensor from the other side."""
    return family == "gpt2" and name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))


def their_views(model: GPT, family: str) -> dict[str, dict[str, Tensor]]:
    """For each parameter of a model, by name: the tensors, by name, that transformers has instead, as views of it. If
    several, they are its rows, one's after the other's."""
    own = dict(model.named_parameters())
    if family == "gpt2":
        return {name: {name: p.t() if turned(family, name) else p} for name, p in own.items()}
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
    return {name: view.detach() for parts in views.values() for name, view in parts.items()}


def load_tokenizer(source: str) -> tokenizers.Tokenizer | None:
    """The tokenizer of a checkpoint, by its name on the hub or its folder; None where it comes without."""
    folder = Path(source) if Path(source).is_dir() else download(source, TOKENIZER_FILES)
    if (folder / OWN).exists():
        tokenizer = tokenizers.from_dict(read_json(folder / OWN))
        tokenizer.add_ends(tokenizers.read_ends(folder, tokenizer.control.values()))  # a person may have changed them
        return tokenizer
    return tokenizers.load_hf(folder) if tokenizers.is_hf(folder) else None


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
    model, tokenizer, _ = checkpoint.load_model(source, which, whole_context=True)
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
        full = checkpoint.empty_model({**dataclasses.asdict(model.config), "bias": True}, family)
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


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m acorn.hub", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    sub = commands.add_parser("export", help="write a run as a folder that transformers loads", allow_abbrev=False)
    sub.add_argument("source", help="an out_dir, a nanoGPT ckpt.pt, or whatever else init_from takes")
    sub.add_argument("target", type=Path, help="the folder to write, which must not be there yet")
    sub.add_argument("--checkpoint", default="best", help="of an out_dir: best (default), latest, or step_002000")
    dtypes = ("float32", "bfloat16", "float16")
    sub.add_argument("--dtype", default="float32", choices=dtypes, help="of the weights; default: %(default)s")
    args = parser.parse_args()
    name = export(args.source, args.target, args.checkpoint, getattr(torch, args.dtype))
    print(f"written to {args.target}: {name}, in {args.dtype}")


if __name__ == "__main__":
    run(main)
