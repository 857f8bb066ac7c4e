"""Import and export Hugging Face checkpoints: GPT-2, and Llama with its relatives (Qwen, Mistral, SmolLM3, Gemma).

Import: python train.py --init_from=gpt2                # or another name on the hub, or a folder
Export: python -m acorn.hub export out/mine hf/mine     # a folder that transformers loads

Weights are read and written as safetensors only, because a pickle can run code.
"""

import dataclasses
import json
import math
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from acorn import UserError, files
from acorn.checkpoint.tensors import LazyTensor, empty_model, lazy_cat, lazy_slice, lazy_transpose
from acorn.data.tokenizer import END_OF_TEXT, Tokenizer
from acorn.data.tokenizer_gpt2 import GPT2Tokenizer, byte_alphabet, gpt2_config
from acorn.data.tokenizer_json import HFTokenizer, is_hf, load_hf, read_ends
from acorn.data.tokenizer_kinds import from_dict, get_tokenizer
from model import GPT, ROPE_SCALING, GPTConfig

# the files to download from the hub; a repository there may hold many others
MODEL_FILES = "config.json model.safetensors model-*-of-*.safetensors model.safetensors.index.json"
TOKENIZER_FILES = """
    config.json tokenizer.json tokenizer_config.json special_tokens_map.json generation_config.json chat_template.jinja
    additional_chat_templates/*.jinja acorn_tokenizer.json vocab.txt tokenizer.model
"""
ACORN_TOKENIZER = (
    "acorn_tokenizer.json"  # acorn's own copy of the tokenizer in an exported folder, for an exact round trip
)
HASHED_FILES = """
    tokenizer.json tokenizer_config.json special_tokens_map.json chat_template.jinja
    additional_chat_templates/tool_use.jinja
""".split()  # an export records their hashes in acorn_tokenizer.json
BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")  # buffers in older files, not parameters
ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu": "relu"}
ACTIVATIONS |= {"relu2": "relu2"}
GATES = {"silu": "swiglu", "swish": "swiglu", "gelu_pytorch_tanh": "geglu", "gelu_new": "geglu"}  # activations of gates
CLASSES = {  # model_type -> the name of transformers' classes, without Config and ForCausalLM
    "gpt2": "GPT2",
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "smollm3": "SmolLM3",
    "gemma": "Gemma",
    "minimind": "Llama",  # transformers does not know it; its configuration has Llama's names
}
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


def open_model(source: str) -> tuple[GPT, dict, Tokenizer | None]:
    """Open a checkpoint by its name on the hub ("gpt2-xl") or its folder.

    Returns the model on the meta device, its parameters, not read yet (see `LazyCheckpoint`), and its tokenizer,
    None if the checkpoint has none. Raises UserError if the checkpoint is missing, broken or not supported.
    """
    folder = Path(source) if Path(source).is_dir() else download(source)
    family, config = read_config(folder)
    prefix, embedding = ("transformer.", "wte") if family == "gpt2" else ("model.", "embed_tokens")
    slices = open_tensors(folder, source, prefix)
    if family == "minimind" and "model.layers.0.self_attn.q_norm.weight" in slices:  # its config.json does not tell
        config = dataclasses.replace(config, qk_norm=True, qk_norm_weight=True)
    embedding = f"{prefix}{embedding}.weight"
    if config.tie_weights and embedding not in slices and "lm_head.weight" in slices:  # tied weights have either name
        slices[embedding] = slices.pop("lm_head.weight")

    model = empty_model(dataclasses.asdict(config), source)
    views = hf_views(model, family)
    shapes = {name: list(view.shape) for name, view in flatten(views).items()}
    if config.tie_weights and "lm_head.weight" in slices:
        shapes["lm_head.weight"] = [config.vocab_size, config.n_embd]
    missing = sorted(shapes.keys() - slices.keys())
    if missing == ["lm_head.weight"]:
        raise UserError(
            f"the checkpoint {source} has no head (lm_head.weight), so it cannot predict tokens. Use a checkpoint of a "
            'language model. If its head is the embedding, set "tie_word_embeddings": true in its config.json.'
        )
    if missing:
        raise UserError(
            f"the checkpoint {source} lacks {len(missing)} tensors, {missing[0]} first. Download the checkpoint again."
        )
    if extra := sorted(slices.keys() - shapes.keys()):
        raise UserError(
            f"the checkpoint {source} has {len(extra)} tensors, {extra[0]} first, that a {family} model with its "
            "config.json does not have: its architecture is not supported. Use a checkpoint without them."
        )
    for name, shape in shapes.items():
        actual, dtype = slices[name].get_shape(), slices[name].get_dtype()
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
        read = lazy_one_more if family == "gemma" and is_norm(name) else lazy_slice
        pieces = [(lazy_transpose if is_transposed(family, part) else read)(slices[part]) for part in parts]
        values[name] = lazy_cat(pieces, " and ".join(parts), source)
    if config.tie_weights and "lm_head.weight" in slices:
        wte = values["transformer.wte.weight"]
        head = lazy_cat([lazy_slice(slices["lm_head.weight"])], "lm_head.weight", source)
        blocks = [slice(row, row + 4096) for row in range(0, config.vocab_size, 4096)]  # saves memory
        if not all(torch.equal(head[rows].float(), wte[rows].float()) for rows in blocks):
            raise UserError(
                f"the checkpoint {source} has a separate head, but its config.json ties the head to the embedding. Set "
                '"tie_word_embeddings": false in its config.json.'
            )
    tokenizer = load_tokenizer(str(folder))
    if tokenizer is None and config.vocab_size == GPT2Tokenizer.n_vocab:
        tokenizer = get_tokenizer("gpt2")
    if tokenizer is None:
        print(f"note: {source} has no tokenizer.json or vocab.txt, so its token ids cannot be decoded", file=sys.stderr)
    return model, values, tokenizer


def download(name: str, patterns: str = MODEL_FILES + TOKENIZER_FILES) -> Path:
    """Return the local folder of a model on the hub; files that are not cached yet are downloaded."""
    try:
        from huggingface_hub import errors, snapshot_download
        from huggingface_hub.utils import disable_progress_bars
    except ImportError as error:
        raise UserError(f"{name} is on the Hugging Face hub. To load it, pip install transformers.") from error
    if not sys.stderr.isatty():
        disable_progress_bars()
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
            "Set the environment variable HF_ENDPOINT to the address of a mirror, or give the folder of a local copy "
            f"of {page}."
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
    """Return the model_type of a checkpoint, one of CLASSES, and its configuration. Raises UserError for a feature that
    acorn's model does not support."""
    path = folder / "config.json"
    raw = read_json(path)
    family = raw.get("model_type")
    if not isinstance(family, str) or family not in CLASSES:
        raise UserError(
            f"{path} has model_type {family!r:.40}, which is not supported. Use a model of type {', '.join(CLASSES)}."
        )
    try:
        import transformers
    except ImportError as error:
        raise UserError(f"{folder} is a Hugging Face checkpoint. To load it, pip install transformers.") from error
    try:
        # the library knows the defaults of missing fields, and the formats of older versions
        kind = getattr(transformers, f"{CLASSES[family]}Config")
        config = kind.from_dict(raw | {"model_type": kind.model_type})
        return family, from_gpt2(config, path) if family == "gpt2" else from_llama(config, path)
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
            "is_causal = false": not getattr(c, "is_causal", True),
            "quantized weights": getattr(c, "quantization_config", None),
        },
    )
    fields = {name: getattr(c, hf_name) for name, hf_name in NAMES["gpt2"].items()}
    fields["n_hidden"] = c.n_inner or 0
    return GPTConfig(**fields, mlp=ACTIVATIONS[c.activation_function])


def from_llama(c, path: Path) -> GPTConfig:
    """Convert a transformers configuration of Llama or one of its relatives that was read from `path`."""
    c.standardize_rope_params()  # again, as transformers' model does: the class set unknown fields after the first time
    rope, window = c.rope_parameters, shortest_window(c)
    if window and window < c.max_position_embeddings:
        raise UserError(
            f"{path} has sliding_window = {window}, which acorn's model does not support unless it is at least "
            f"max_position_embeddings = {c.max_position_embeddings}. For texts that fit the window, set "
            f'"max_position_embeddings": {window} there.'
        )
    ropes = (getattr(c, "no_rope_layers", None) or [])[: c.num_hidden_layers]  # 0 for a layer without rope
    nope_every = ropes.index(0) + 1 if 0 in ropes else 0
    refuse(
        path,
        {
            f"rope scaling {rope['rope_type']!r}": rope["rope_type"] not in ("default", "dynamic", *ROPE_SCALING),
            "partial_rotary_factor": rope.get("partial_rotary_factor", 1.0) != 1.0,
            "no_rope_layers that are not every n-th": any(
                ropes[i] != bool((i + 1) % nope_every) for i in range(len(ropes)) if nope_every
            ),
            f"hidden_act = {c.hidden_act}": c.hidden_act not in GATES,
            "attention_bias": getattr(c, "attention_bias", False),
            "mlp_bias": getattr(c, "mlp_bias", False),
            "use_bidirectional_attention": getattr(c, "use_bidirectional_attention", False),
            "is_causal = false": not getattr(c, "is_causal", True),
            "use_moe": getattr(c, "use_moe", False),  # this and the next are MiniMind's
            "inference_rope_scaling": getattr(c, "inference_rope_scaling", False),
            "quantized weights": getattr(c, "quantization_config", None),
        },
    )
    fields = {name: getattr(c, hf_name) for name, hf_name in NAMES["llama"].items()}
    weighted = c.model_type == "qwen3"
    return GPTConfig(
        **fields,
        pos="rope",
        norm="rmsnorm",
        mlp=GATES[c.hidden_act],
        bias=False,
        head_dim=getattr(c, "head_dim", None) or 0,
        qkv_bias=c.model_type == "qwen2",
        qk_norm=weighted,
        qk_norm_weight=weighted,
        nope_every=nope_every,
        scale_embedding=c.model_type == "gemma",
        rope_theta=rope["rope_theta"],
        rope_scaling=rope_scaling(rope, c.max_position_embeddings),
    )


def shortest_window(c) -> int | None:
    """Return the sliding window of attention in any layer of a transformers configuration, None if there is none."""
    slides = "sliding_attention" in (getattr(c, "layer_types", None) or ["sliding_attention"])
    return getattr(c, "sliding_window", None) if slides else None


def rope_scaling(rope: dict, max_positions: int) -> dict:
    """Return GPTConfig's rope_scaling for the rope_parameters and max_position_embeddings of a transformers config."""
    kind = rope["rope_type"]
    if kind not in ROPE_SCALING:  # "dynamic" scales only texts longer than max_position_embeddings, the block size
        return {}
    given = {name: value for name, value in rope.items() if value is not None}
    if kind == "yarn":
        given = {"factor": max_positions / given["original_max_position_embeddings"]} | given
        scales = [
            0.1 * given.get(name, 0) * math.log(max(given["factor"], 1)) + 1 for name in ("mscale", "mscale_all_dim")
        ]
        plain = 0.1 * math.log(max(given["factor"], 1)) + 1
        scale = scales[0] / scales[1] if given.get("mscale") and given.get("mscale_all_dim") else plain
        given = {"beta_fast": 32, "beta_slow": 1, "truncate": True, "attention_factor": scale} | given
    return {name: given[name] for name in ("rope_type", *ROPE_SCALING[kind].split())}


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
            code = ", trust_remote_code=True" if "auto_map" in read_json(folder / "config.json") else ""  # MiniMind
            convert = f"[c.from_pretrained({source!r}{code}).save_pretrained('converted') for c in {classes}]"
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
            if not name.endswith(BUFFERS):
                tensors[name if name.startswith((prefix, "lm_head.")) else prefix + name] = file.get_slice(name)
    return tensors


def lazy_one_more(piece) -> LazyTensor:
    """Return the tensor of `piece` plus 1: Gemma stores the difference of norm weights from 1."""
    return LazyTensor(piece.get_shape(), lambda rows: piece[rows].float() + 1)


def is_norm(name: str) -> bool:
    """Whether a parameter of our model is the weight of a norm."""
    return name.endswith(("ln_1.weight", "ln_2.weight", "ln_f.weight"))


def is_transposed(family: str, name: str) -> bool:
    """Whether transformers stores this tensor transposed (its Conv1D)."""
    return family == "gpt2" and name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))


def hf_views(model: GPT, family: str) -> dict[str, dict[str, Tensor]]:
    """Return, for each parameter of a model, the tensors that transformers has instead, as views of the parameter.

    Both are keyed by name. If there are several, they are the rows of the parameter, in order."""
    parameters = dict(model.named_parameters())
    if family == "gpt2":
        return {name: {name: p.t() if is_transposed(family, name) else p} for name, p in parameters.items()}
    cfg = model.config
    views: dict[str, dict[str, Tensor]] = {
        "transformer.wte.weight": {"model.embed_tokens.weight": parameters["transformer.wte.weight"]},
        "transformer.ln_f.weight": {"model.norm.weight": parameters["transformer.ln_f.weight"]},
    }
    if not cfg.tie_weights:
        views["lm_head.weight"] = {"lm_head.weight": parameters["lm_head.weight"]}
    split = [n * cfg.head_dim for n in (cfg.n_head, cfg.n_kv_head, cfg.n_kv_head)]
    qkv, gated = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")
    for i in range(cfg.n_layer):
        block = f"transformer.h.{i}."
        layer: dict[str, dict[str, Tensor]] = {
            "ln_1.weight": {"input_layernorm.weight": parameters[f"{block}ln_1.weight"]},
            "attn.c_attn.weight": names_of(qkv, "weight", parameters[f"{block}attn.c_attn.weight"].split(split)),
            "attn.c_proj.weight": {"self_attn.o_proj.weight": parameters[f"{block}attn.c_proj.weight"]},
            "ln_2.weight": {"post_attention_layernorm.weight": parameters[f"{block}ln_2.weight"]},
            "mlp.c_fc.weight": names_of(gated, "weight", parameters[f"{block}mlp.c_fc.weight"].chunk(2)),
            "mlp.c_proj.weight": {"mlp.down_proj.weight": parameters[f"{block}mlp.c_proj.weight"]},
        }
        if cfg.qkv_bias:
            layer["attn.c_attn.bias"] = names_of(qkv, "bias", parameters[f"{block}attn.c_attn.bias"].split(split))
        if cfg.qk_norm_weight:
            layer["attn.q_norm.weight"] = {"self_attn.q_norm.weight": parameters[f"{block}attn.q_norm.weight"]}
            layer["attn.k_norm.weight"] = {"self_attn.k_norm.weight": parameters[f"{block}attn.k_norm.weight"]}
        for name, parts in layer.items():
            views[f"{block}{name}"] = {f"model.layers.{i}.{part}": view for part, view in parts.items()}
    return views


def names_of(modules: Iterable[str], kind: str, tensors: Iterable[Tensor]) -> dict[str, Tensor]:
    return {f"{module}.{kind}": tensor for module, tensor in zip(modules, tensors, strict=True)}


def flatten(views: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return all tensors of `hf_views` in one dict."""
    return {name: view.detach() for parts in views.values() for name, view in parts.items()}


def load_tokenizer(source: str) -> Tokenizer | None:
    """Load the tokenizer of a checkpoint by its name on the hub or its folder; None if it has none."""
    folder = Path(source) if Path(source).is_dir() else download(source, TOKENIZER_FILES)
    if not (folder / ACORN_TOKENIZER).exists():
        return load_hf(folder) if is_hf(folder) else None
    saved = read_json(folder / ACORN_TOKENIZER)
    tokenizer = from_dict(saved)
    # older exports have no hashes
    if "files" in saved and (folder / "tokenizer.json").is_file() and saved["files"] != hash_files(folder):
        tokenizer = reload_tokenizer(folder, tokenizer)
    tokenizer.add_ends(read_ends(folder, tokenizer.control.values()))  # the user may have edited them
    return tokenizer


def reload_tokenizer(folder: Path, exported: Tokenizer) -> Tokenizer:
    """Return the tokenizer of an exported folder whose tokenizer files were changed later, for example by transformers'
    save_pretrained. If the ids of a text are still those of the `exported` tokenizer, the result has its kind and its
    hash, so that its datasets stay usable."""
    if exported.kind == "char":
        print(
            f"note: the tokenizer files in {folder} changed since the export, but a char tokenizer cannot be read from "
            f"them; using {ACORN_TOKENIZER}",
            file=sys.stderr,
        )
        return exported
    print(
        f"note: the tokenizer files in {folder} changed since the export; using tokenizer.json instead of "
        f"{ACORN_TOKENIZER}",
        file=sys.stderr,
    )
    loaded = load_hf(folder)
    config = tokenizer_json(exported)
    if config is None or pipeline(config) != pipeline(json.dumps(read_json(folder / "tokenizer.json"))):
        return loaded
    encoding = {name: value for name, value in exported.to_dict().items() if name in ("kind", "config", "sha256")}
    return from_dict(loaded.to_dict() | encoding)


def pipeline(config: str) -> dict:
    """Return a tokenizer.json (its text) in the library's canonical format, without parts that have no effect."""
    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(config)
    backend.no_padding()
    backend.no_truncation()
    steps = json.loads(backend.to_str())
    if not backend.num_special_tokens_to_add(False):  # the post-processor puts nothing before or after a text
        del steps["post_processor"]
    return steps


def tokenizer_json(tokenizer: Tokenizer) -> str | None:
    """Return the tokenizer in the format of Hugging Face's library `tokenizers`; None if that is not possible."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    if isinstance(tokenizer, HFTokenizer):
        return json.dumps(tokenizer.config, ensure_ascii=False)
    if tokenizer.kind == "gpt2":
        config = gpt2_config()
        return json.dumps(config, ensure_ascii=False) if config else None
    if tokenizer.kind == "char":  # each character is a word
        ids = {char: i for i, char in enumerate(tokenizer.to_dict()["vocab"])}
        backend = Tokenizer(models.WordLevel(ids, unk_token=""))  # no unknown token: an unknown character is an error
        backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        backend.decoder = decoders.Fuse()
        return backend.to_str()
    if tokenizer.kind == "byte":  # BPE without merges
        ids = {char: byte[0] for char, byte in byte_alphabet().items()}
        backend = Tokenizer(models.BPE(ids, []))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens([END_OF_TEXT])
        return backend.to_str()
    return None


def hash_files(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each of HASHED_FILES in a folder, by file name."""
    return {name: files.sha256(folder / name) for name in HASHED_FILES if (folder / name).is_file()}
