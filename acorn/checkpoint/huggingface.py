"""Hugging Face checkpoints of the GPT-2 and Llama families, in and out.

In:  python train.py --init_from=gpt2                # or another name on the hub, or a folder
Out: python -m acorn.hub export out/mine hf/mine     # a folder that transformers loads

Weights are read and written as safetensors only: a pickle could run code.
"""

import dataclasses
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from acorn import UserError, files
from acorn.checkpoint.tensors import Stored, empty_model
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

    model = empty_model(dataclasses.asdict(config), source)
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
        values[name] = Stored(" and ".join(parts), source, pieces)
    if config.tie_weights and "lm_head.weight" in there:
        wte = values["transformer.wte.weight"]
        head = Stored("lm_head.weight", source, [there["lm_head.weight"]])
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
