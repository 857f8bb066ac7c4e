"""Hugging Face checkpoints of the GPT-2 and Llama families, as acorn models."""

import dataclasses

import torch
from safetensors import SafetensorError

from acorn import UserError
from acorn import tokenizer as tokenizers
from acorn.checkpoint import fill
from model import GPT, GPTConfig


def load(source: str) -> tuple[GPT, object]:
    """The model of a published checkpoint, by its name on the hub ("gpt2-xl") or its folder, and its tokenizer where
    that is GPT-2's, else None. Raises UserError where it cannot be had or is of another family."""
    try:
        import transformers
    except ImportError as error:
        raise UserError(f"{source} is a Hugging Face checkpoint: pip install transformers to load it") from error
    transformers.logging.set_verbosity_error()
    try:
        theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
            source, dtype=torch.float32, output_loading_info=True
        )
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"the checkpoint {source} cannot be had ({reason}); without network, give the folder of a copy"
        ) from error
    wrong = [*info["missing_keys"], *info["mismatched_keys"]]
    if wrong:  # transformers would go on with random numbers there
        raise UserError(f"the checkpoint {source} lacks {wrong[0]}; get it again")
    model = from_hf(theirs)
    return model, tokenizers.get_tokenizer("gpt2") if model.config.vocab_size == 50257 else None


def from_hf(theirs) -> GPT:
    """The acorn model with the configuration and the weights of a transformers GPT2LMHeadModel or LlamaForCausalLM."""
    family = theirs.config.model_type
    if family == "gpt2":
        config, tensors = from_gpt2(theirs.config, theirs.state_dict())
    elif family == "llama":
        config, tensors = from_llama(theirs.config, theirs.state_dict())
    else:
        raise UserError(f"a checkpoint of the family {family!r} cannot be loaded; gpt2 and llama can")
    return fill(dataclasses.asdict(config), tensors, f"the {family} checkpoint")


def from_gpt2(c, tensors: dict[str, torch.Tensor]) -> tuple[GPTConfig, dict[str, torch.Tensor]]:
    activations = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
    refuse(
        {
            f"activation_function = {c.activation_function}": c.activation_function not in activations,
            "scale_attn_by_inverse_layer_idx": c.scale_attn_by_inverse_layer_idx,
            "add_cross_attention": c.add_cross_attention,
        }
    )
    config = GPTConfig(
        block_size=c.n_positions,
        vocab_size=c.vocab_size,
        n_layer=c.n_layer,
        n_head=c.n_head,
        n_embd=c.n_embd,
        n_hidden=c.n_inner or 0,
        mlp=activations[c.activation_function],
        norm_eps=c.layer_norm_epsilon,
        tie_weights=c.tie_word_embeddings,
    )
    matrices = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # theirs multiply from the other side
    return config, {name: t.t() if name.endswith(matrices) else t for name, t in tensors.items()}


def from_llama(c, tensors: dict[str, torch.Tensor]) -> tuple[GPTConfig, dict[str, torch.Tensor]]:
    rope = c.rope_parameters
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    refuse(
        {
            f"rope scaling {rope.get('rope_type')!r}": rope.get("rope_type", "default") != "default",
            f"hidden_act = {c.hidden_act}": c.hidden_act != "silu",
            "attention_bias": c.attention_bias,
            "mlp_bias": c.mlp_bias,
            f"head_dim = {head_dim}": head_dim * c.num_attention_heads != c.hidden_size,
        }
    )
    config = GPTConfig(
        block_size=c.max_position_embeddings,
        vocab_size=c.vocab_size,
        n_layer=c.num_hidden_layers,
        n_head=c.num_attention_heads,
        n_kv_head=c.num_key_value_heads,
        n_embd=c.hidden_size,
        n_hidden=c.intermediate_size,
        bias=False,
        pos="rope",
        norm="rmsnorm",
        mlp="swiglu",
        norm_eps=c.rms_norm_eps,
        rope_theta=rope["rope_theta"],
        tie_weights=c.tie_word_embeddings,
    )
    ours = {
        "transformer.wte.weight": tensors["model.embed_tokens.weight"],
        "transformer.ln_f.weight": tensors["model.norm.weight"],
        "lm_head.weight": tensors["lm_head.weight"],
    }
    for i in range(config.n_layer):
        a, b = f"model.layers.{i}.", f"transformer.h.{i}."
        ours[b + "ln_1.weight"] = tensors[a + "input_layernorm.weight"]
        ours[b + "ln_2.weight"] = tensors[a + "post_attention_layernorm.weight"]
        ours[b + "attn.c_attn.weight"] = torch.cat([tensors[a + f"self_attn.{x}_proj.weight"] for x in "qkv"])
        ours[b + "attn.c_proj.weight"] = tensors[a + "self_attn.o_proj.weight"]
        ours[b + "mlp.c_fc.weight"] = torch.cat([tensors[a + f"mlp.{x}_proj.weight"] for x in ("gate", "up")])
        ours[b + "mlp.c_proj.weight"] = tensors[a + "mlp.down_proj.weight"]
    return config, ours


def refuse(unsupported: dict[str, bool]) -> None:
    """Raise UserError, naming it, for the first feature of a checkpoint that acorn's model does not have."""
    for feature, present in unsupported.items():
        if present:
            raise UserError(f"this checkpoint has {feature}, which acorn's model does not; it is not loaded")
