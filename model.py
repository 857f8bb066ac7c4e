"""The whole model: a decoder-only Transformer (GPT), its configuration and its KV cache.

The defaults of GPTConfig are exactly GPT-2. Other settings give the Llama family, or the recipe of the speedruns.
Shapes in comments: B sequences (rows) of T tokens, C = n_embd channels, H heads of D channels, V tokens in the
vocabulary, S slots in the cache.

References:
- GPT-2: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"
- Transformer: Vaswani et al. 2017, https://arxiv.org/abs/1706.03762
"""

import functools
import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint


@dataclass
class GPTConfig:
    block_size: int = 1024  # longest sequence, in tokens
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    attn_dropout: float = -1.0  # dropout of attention weights; -1: same as dropout; 0 keeps the fast attention kernels
    bias: bool = True  # biases in Linear and LayerNorm, as in GPT-2; False is slightly faster, and no worse
    pos: str = "learned"  # learned | sinusoidal | rope
    norm: str = "layernorm"  # layernorm | rmsnorm
    mlp: str = "gelu_tanh"  # gelu_tanh (GPT-2's) | gelu (nanoGPT's) | relu | relu2 | swiglu | geglu
    n_kv_head: int = 0  # key/value heads, each shared by a group of query heads; 0: n_head
    head_dim: int = 0  # channels of a head; 0: n_embd / n_head
    n_hidden: int = 0  # width of the MLP; 0: 4 * n_embd, with gates 8/3 * n_embd rounded up to a multiple of 64
    qk_norm: bool = False  # normalize queries and keys, which keeps attention logits bounded
    qk_norm_weight: bool = False  # qk_norm has a weight for each channel of a head, as in Qwen3
    qkv_bias: bool = False  # biases of queries, keys and values even with bias=False, as in Qwen2
    tie_weights: bool = True  # the head shares its matrix with the token embedding
    logit_softcap: float = 0.0  # c > 0: logits are c * tanh(logits / c)
    zero_init: bool = False  # every block, and an untied head, initially outputs zero
    embedding_std: float = 0.02  # standard deviation of the initial token embedding
    ngram: int = 1  # n > 1: add hashed embeddings of the last 2, 3, ..., n tokens to the token embedding
    ngram_rows: int = 16384  # maximum rows per n-gram table; if there are more n-grams, they share rows
    ngram_dropout: float = 0.0  # dropout of whole n-gram embeddings, against memorizing a small dataset
    ngram_vocab: int = 0  # vocabulary size by which n-grams are numbered, kept when tokens are added; 0: vocab_size
    embedding_skip: bool = False  # each block's input is a learned mix of its usual input and the embedding
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: dict = field(default_factory=dict)  # how rope is stretched for long texts, see `rope_frequencies`
    nope_every: int = 0  # n > 0: every n-th block has no rope, as in SmolLM3
    scale_embedding: bool = False  # multiply the token embedding by sqrt(n_embd), as in Gemma

    def __post_init__(self):
        """Replace the default 0 of some settings. Raises ValueError if a setting is invalid."""
        self.n_kv_head = self.n_kv_head or self.n_head
        self.ngram_vocab = self.ngram_vocab or self.vocab_size
        if not self.head_dim and self.n_head > 0 and self.n_embd % self.n_head == 0:
            self.head_dim = self.n_embd // self.n_head
        if self.mlp in GATED:
            self.n_hidden = self.n_hidden or 64 * math.ceil(self.n_embd * 8 / 3 / 64)
        self.n_hidden = self.n_hidden or 4 * self.n_embd
        check_config(self)


GATED = ("swiglu", "geglu")  # MLPs whose hidden channels are multiplied by gates
DROPOUTS = ("dropout", "attn_dropout", "ngram_dropout")  # settings that may change when training continues
INITIALIZATION = ("zero_init", "embedding_std")  # settings that matter only for a new model


class Linear(nn.Linear):
    def reset_parameters(self) -> None:
        """Leave the initialization to `GPT.init_weights`, so that it alone draws random numbers."""


class Embedding(nn.Embedding):
    def reset_parameters(self) -> None:
        """As in Linear."""


class Norm(nn.Module):
    """LayerNorm (with optional bias) or RMSNorm (https://arxiv.org/abs/1910.07467)."""

    def __init__(self, config: GPTConfig, size: int):
        super().__init__()
        self.kind, self.eps = config.norm, config.norm_eps
        self.weight = nn.Parameter(torch.empty(size))
        has_bias = config.bias and config.norm == "layernorm"
        self.bias = nn.Parameter(torch.empty(size)) if has_bias else None

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "rmsnorm":
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        if self.kind == "layernorm":
            return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)
        raise NotImplementedError(f"norm={self.kind!r} has no branch in Norm.forward")


class CausalSelfAttention(nn.Module):
    """Causal multi-head self-attention. With n_kv_head < n_head, groups of query heads share a key/value head
    (grouped-query attention, https://arxiv.org/abs/2305.13245)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.plain = False  # train with `plain_attention`
        self.split = [n * config.head_dim for n in (config.n_head, config.n_kv_head, config.n_kv_head)]  # of c_attn
        self.c_attn = Linear(config.n_embd, sum(self.split), bias=config.bias or config.qkv_bias)  # q, k, v in one
        self.c_proj = Linear(config.n_head * config.head_dim, config.n_embd, bias=config.bias)
        if config.qk_norm_weight:
            self.q_norm, self.k_norm = Norm(config, config.head_dim), Norm(config, config.head_dim)

    def forward(self, x: Tensor, rotary=None, cache=None, positions=None, mask=None) -> Tensor:
        """x (B, T, C) -> (B, T, C). `cache`: this layer's keys and values (B, H_kv, S, D), written at `positions`."""
        B, T, _ = x.shape
        cfg = self.config
        q, k, v = self.c_attn(x).split(self.split, dim=2)
        q = q.view(B, T, cfg.n_head, cfg.head_dim).transpose(1, 2)  # (B, H, T, D)
        k = k.view(B, T, cfg.n_kv_head, cfg.head_dim).transpose(1, 2)  # (B, H_kv, T, D)
        v = v.view(B, T, cfg.n_kv_head, cfg.head_dim).transpose(1, 2)  # (B, H_kv, T, D)
        if cfg.qk_norm_weight:
            q, k = self.q_norm(q), self.k_norm(k)
        elif cfg.qk_norm:  # the model's type of norm, without weights
            norm = F.rms_norm if cfg.norm == "rmsnorm" else F.layer_norm
            q, k = norm(q, (cfg.head_dim,)), norm(k, (cfg.head_dim,))
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        if cache is not None:
            rows = torch.arange(B, device=x.device)[:, None]
            for cached, new in zip(cache, (k, v), strict=True):
                cached[rows, :, positions] = new.transpose(1, 2).to(cached.dtype)
            k, v = cache  # (B, H_kv, S, D)
            q = q.to(k.dtype)
        p = attention_dropout(cfg) if self.training else 0.0
        y = attend(q, k, v, mask, p, self.plain)  # (B, H, T, D)
        y = y.transpose(1, 2).flatten(2)  # heads side by side: (B, T, H * D)
        if cache is not None:
            y = y.to(x.dtype)  # the cache may have another dtype, and FSDP has no autocast
        return dropout(self.c_proj(y), cfg.dropout, self.training)


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        gates = 2 if config.mlp in GATED else 1  # gates and values come from one matrix
        self.c_fc = Linear(config.n_embd, gates * config.n_hidden, bias=config.bias)
        self.c_proj = Linear(config.n_hidden, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        kind, x = self.config.mlp, self.c_fc(x)
        if kind == "gelu_tanh":
            x = F.gelu(x, approximate="tanh")
        elif kind == "gelu":
            x = F.gelu(x)
        elif kind == "relu":
            x = F.relu(x)
        elif kind == "relu2":  # https://arxiv.org/abs/2109.08668
            x = F.relu(x).square()
        elif kind in GATED:  # https://arxiv.org/abs/2002.05202
            gate, value = x.chunk(2, dim=-1)
            x = (F.silu(gate) if kind == "swiglu" else F.gelu(gate, approximate="tanh")) * value
        else:
            raise NotImplementedError(f"mlp={kind!r} has no branch in MLP.forward")
        return dropout(self.c_proj(x), self.config.dropout, self.training)


class Block(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = Norm(config, config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = Norm(config, config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rotary=None, cache=None, positions=None, mask=None) -> Tensor:
        x = x + self.attn(self.ln_1(x), rotary, cache, positions, mask)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """The layers of a GPT below its head, by GPT-2's names. `GPT.forward` runs them."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.wte = Embedding(config.vocab_size, config.n_embd)
        if config.pos == "learned":
            self.wpe = Embedding(config.block_size, config.n_embd)
        if config.ngram > 1:
            self.ngram = NgramEmbedding(config)
        if config.embedding_skip:  # the factors of each block's mix
            self.residual_scale = nn.Parameter(torch.empty(config.n_layer))
            self.embedding_scale = nn.Parameter(torch.empty(config.n_layer))
            if config.ngram > 1:
                self.ngram_scale = nn.Parameter(torch.empty(config.n_layer))
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = Norm(config, config.n_embd)


class GPT(nn.Module):
    """The model. Parameter names are GPT-2's, such as `transformer.h.0.attn.c_attn.weight`."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.activation_checkpointing = False  # recompute each block in the backward pass, to save memory
        self.transformer = Transformer(config)
        self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_weights:
            self.lm_head.weight = self.transformer.wte.weight
        if self.lm_head.weight.device.type != "meta":  # which has shapes only
            self.init_weights()

    def init_weights(self) -> None:
        for name, p in self.named_parameters():
            self.init_parameter(name, p)

    @torch.no_grad()
    def init_parameter(self, name: str, p: Tensor) -> None:
        """Initialize one parameter as in GPT-2: normal with std 0.02, except for the token embedding's embedding_std.

        The std of the projections into the residual stream is divided by sqrt(2 * n_layer), with 2 * n_layer the number
        of these projections, so that the variance does not grow with depth.
        """
        if name.endswith(("bias", "embedding_scale", "ngram_scale")):
            p.zero_()
        elif p.dim() == 1:  # the scale of a norm, or of the residual stream
            p.fill_(1.0)
        elif name.startswith("transformer.ngram."):
            p.zero_()  # so that an n-gram unseen in training adds nothing
        elif self.config.zero_init and name.endswith(("c_proj.weight", "lm_head.weight")):
            p.zero_()  # only an untied head has a name of its own
        elif name.endswith("c_proj.weight"):
            p.normal_(std=0.02 / math.sqrt(2 * self.config.n_layer))
        else:
            p.normal_(std=self.config.embedding_std if name == "transformer.wte.weight" else 0.02)

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        *,
        documents: Tensor | None = None,
        reduction: str = "mean",
        cache: "KVCache | None" = None,
        last: Tensor | None = None,
        per_token: Callable | None = None,
        per_token_args: tuple[Tensor, ...] = (),
    ) -> tuple[Tensor | None, Tensor | None]:
        """Predict the token after each token of `idx` (B, T). Returns (logits, loss).

        With `targets` (B, T), in which -1 is masked: logits (B, T, V), or None, and the loss in nats. `reduction`:
        "mean" (0 if all targets are masked) returns the logits too. "sum" (training) and "none" (evaluation; losses
        (B, T), 0 at masked targets) return None for the logits, which saves memory and time.

        Without targets: logits (B, 1, V) at position `last` (B,) of each row, by default the final one, and None. With
        a function `per_token` instead: None, and its values (B, T, K) for the head's input and `per_token_args` (see
        `in_chunks`).

        `documents` (B, T) numbers the documents in each row; attention stays within a document, and positions restart
        in it. With a `cache`, idx continues the cached rows: row b starts at position cache.length[b]. These two cannot
        be combined.
        """
        B, T = idx.shape
        positions, mask = self.positions_and_mask(idx, documents, cache)
        x, ngrams, rotary = self.embed(idx, positions, cache)  # (B, T, C)
        x = embedding = dropout(x, self.config.dropout, self.training)
        for layer, block in enumerate(self.transformer.h):
            if self.config.embedding_skip:
                x = self.mix(layer, x, embedding, ngrams)
            angles = None if self.config.nope_every and (layer + 1) % self.config.nope_every == 0 else rotary
            if self.activation_checkpointing and torch.is_grad_enabled() and cache is None:
                x = checkpoint(block, x, angles, mask=mask, use_reentrant=False)
            else:
                x = block(x, angles, None if cache is None else cache.layers[layer], positions, mask)
        x = self.transformer.ln_f(x)

        if per_token is not None:
            return None, self.in_chunks(per_token, x, per_token_args)
        if targets is None:  # compute only the logits that predict the next token
            x = x[:, -1:] if last is None else x[torch.arange(B, device=x.device), last][:, None]
            return self.logits(x), None
        if reduction == "sum" and self.uses_head_loss(x):
            softcap = self.config.logit_softcap
            return None, HeadLoss.apply(x.flatten(0, 1), self.lm_head.weight, targets.flatten(), softcap)
        if reduction == "none" and not torch.compiler.is_compiling():  # the compiler would unroll the loop over chunks
            return None, self.in_chunks(token_loss, x, (targets,))[..., 0]
        logits = self.logits(x)  # (B, T, V)
        flat = logits.view(B * T, -1).float()
        # torch's own mean is NaN if all targets are masked
        torch_reduction = "sum" if reduction == "mean" else reduction
        loss = F.cross_entropy(flat, targets.reshape(-1), ignore_index=-1, reduction=torch_reduction)
        if reduction == "mean":
            return logits, loss / (targets != -1).sum().clamp(min=1)
        return None, loss.view(B, T) if reduction == "none" else loss

    def embed(
        self, idx: Tensor, positions: Tensor, cache: "KVCache | None"
    ) -> tuple[Tensor, Tensor | None, tuple | None]:
        """Embed tokens idx (B, T) at `positions` (T,) or (B, T).

        Returns x (B, T, C), the n-gram embeddings in it (B, T, C) or None, and rope's cos and sin or None.
        """
        cfg, ngrams, rotary = self.config, None, None
        x = self.transformer.wte(idx)  # (B, T, C)
        if cfg.scale_embedding:
            x = x * math.sqrt(cfg.n_embd)
        if cfg.ngram > 1:
            ngrams = self.transformer.ngram(idx, positions, cache)
            x = x + ngrams
        if cfg.pos == "learned":
            x = x + self.transformer.wpe(positions)
        elif cfg.pos == "sinusoidal":  # the embedding is scaled as in section 3.4 of the paper
            x = x * math.sqrt(cfg.n_embd) + sinusoidal_positions(positions, cfg.n_embd).to(x.dtype)
        elif cfg.pos == "rope":
            rope = (cfg.head_dim, cfg.rope_theta, cfg.rope_scaling)
            if cache is None:
                tables = rotary_tables(cfg.block_size, *rope, idx.device)
                cos, sin = (table[positions] for table in tables)  # ([B,] T, D/2)
            else:
                cos, sin = rotary_angles(positions, *rope)  # (B, T, D/2)
            rotary = (cos, sin) if positions.dim() == 1 else (cos[:, None], sin[:, None])
        else:
            raise NotImplementedError(f"pos={cfg.pos!r} has no branch in GPT.embed")
        return x, ngrams, rotary

    def mix(self, layer: int, x: Tensor, embedding: Tensor, ngrams: Tensor | None) -> Tensor:
        """Return the input of a block: a learned mix of its usual input x, the embedding and the n-gram embeddings."""
        t = self.transformer
        x = t.residual_scale[layer] * x + t.embedding_scale[layer] * embedding  # (B, T, C)
        return x if ngrams is None else x + t.ngram_scale[layer] * ngrams

    def positions_and_mask(
        self, idx: Tensor, documents: Tensor | None, cache: "KVCache | None"
    ) -> tuple[Tensor, "Tensor | BlockMask | None"]:
        """Return the position of each token, (T,) or (B, T), and the attention mask, or None for plain causality."""
        T, cfg = idx.size(1), self.config
        index = torch.arange(T, device=idx.device)
        if cache is not None:
            if documents is not None:
                raise ValueError("documents and cache cannot be combined")
            positions = cache.length[:, None] + index  # (B, T)
            return positions, torch.arange(cache.size, device=idx.device) <= positions[:, None, :, None]  # (B, 1, T, S)
        if T > cfg.block_size:
            raise ValueError(f"a sequence of {T} tokens exceeds the block size of {cfg.block_size}")
        if documents is None:
            return index, None
        drops = self.training and attention_dropout(cfg) > 0  # flex attention has no dropout
        flex = idx.is_cuda and HAS_TRITON and not drops and cfg.head_dim >= 16
        return document_positions(documents), document_mask(documents, flex)

    def logits(self, x: Tensor) -> Tensor:
        """Return the logits (B, T, V) of the tokens after x (B, T, C)."""
        logits = self.lm_head(x)  # (B, T, V)
        if softcap := self.config.logit_softcap:
            logits = softcap * torch.tanh(logits.float() / softcap)
        return logits

    def uses_head_loss(self, x: Tensor) -> bool:
        """Return whether `HeadLoss` should compute the loss of x (B, T, C): it pays in eager mode on CPUs only."""
        eager_cpu = x.device.type == "cpu" and not torch.compiler.is_compiling()
        large = x.size(0) * x.size(1) * self.config.vocab_size > LOGITS_AT_ONCE
        return large and eager_cpu and torch.is_grad_enabled()

    def in_chunks(self, per_token: Callable, x: Tensor, args: tuple[Tensor, ...]) -> Tensor:
        """Return `per_token`(model, x (n, C), *args (n, ...)) -> (n, K) for all tokens of x (B, T, C): (B, T, K).

        The function may compute logits: it gets chunks of n tokens, and the backward pass computes each chunk again,
        so the logits of all tokens never exist at once. `args` are tensors (B, T, ...).
        """
        n = math.ceil(LOGITS_AT_ONCE / self.config.vocab_size)  # tokens per chunk
        chunks = list(zip(*(tensor.flatten(0, 1).split(n) for tensor in (x, *args)), strict=True))
        if len(chunks) == 1 or not torch.is_grad_enabled():
            values = [per_token(self, *chunk) for chunk in chunks]
        else:
            again = functools.partial(checkpoint, per_token, self, use_reentrant=False, preserve_rng_state=False)
            values = [again(*chunk) for chunk in chunks]
        return torch.cat(values).view(*x.shape[:2], -1)

    def num_params(self, non_embedding: bool = False) -> int:
        """Count the parameters, tied ones once. `non_embedding` excludes those that are only looked up."""
        n = sum(p.numel() for p in self.parameters())
        if non_embedding:
            if self.config.pos == "learned":
                n -= self.transformer.wpe.weight.numel()
            if not self.config.tie_weights:
                n -= self.transformer.wte.weight.numel()
            if self.config.ngram > 1:
                n -= sum(p.numel() for p in self.transformer.ngram.parameters())
        return n

    def crop_block_size(self, block_size: int) -> None:
        """Reduce the block size, for example of a GPT-2 checkpoint, to `block_size` tokens."""
        if block_size > self.config.block_size:
            raise ValueError(f"block_size = {block_size} exceeds the model's {self.config.block_size}")
        self.config.block_size = block_size
        if self.config.pos == "learned":
            wpe = self.transformer.wpe
            wpe.weight = nn.Parameter(wpe.weight[:block_size].detach().clone())
            wpe.num_embeddings = block_size

    @torch.no_grad()
    def grow_vocab(self, n_vocab: int, size: int) -> None:
        """Add the new tokens n_vocab, ..., size - 1 to the embedding and the head, as in `grown_rows`.

        The logits of the old tokens do not change.
        """
        wte, head = self.transformer.wte, self.lm_head
        wte.weight = nn.Parameter(grown_rows(wte.weight, n_vocab, size))
        if self.config.tie_weights:
            head.weight = wte.weight
        else:
            head.weight = nn.Parameter(grown_rows(head.weight, n_vocab, size))
        self.config.vocab_size = wte.num_embeddings = head.out_features = wte.weight.size(0)

    def configure_optimizers(
        self, weight_decay, learning_rate, betas, device_type, params=None, kind=torch.optim.AdamW
    ) -> torch.optim.AdamW:
        """Create AdamW, fused if supported, with weight decay on matrices and embeddings, not on biases and norms.

        `params` are the parameters to update; the default is all. `kind` is the class of the optimizer.
        """
        params = [p for p in (self.parameters() if params is None else params) if p.requires_grad]
        groups = [
            {"params": [p for p in params if p.dim() >= 2], "weight_decay": weight_decay},
            {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
        ]
        return kind(groups, lr=learning_rate, betas=betas, fused=device_type in ("cuda", "cpu", "mps"))

    def flops_per_token(self) -> int:
        """Return the FLOPs of one token's forward and backward pass.

        6 per parameter, and 12 * n_layer * n_head * head_dim * block_size for attention: appendix B of PaLM,
        https://arxiv.org/abs/2204.02311.
        """
        cfg = self.config
        attention = 12 * cfg.n_layer * cfg.n_head * cfg.head_dim * cfg.block_size
        return 6 * self.num_params(non_embedding=True) + attention

    def estimate_mfu(self, fwdbwd_per_iter: float, dt: float, peak_flops: float | None) -> float | None:
        """Return the model FLOPs utilization of `fwdbwd_per_iter` sequences of block_size tokens in `dt` seconds.

        It is the fraction of `peak_flops`, the FLOPs per second of all devices together, or None if that is unknown.
        """
        if not peak_flops:
            return None
        return self.flops_per_token() * self.config.block_size * fwdbwd_per_iter / dt / peak_flops


# -------------------- positions


def sinusoidal_positions(positions: Tensor, n_embd: int) -> Tensor:
    """Section 3.5 of https://arxiv.org/abs/1706.03762. positions: (...) -> (..., C), in float32."""
    frequency = 10000.0 ** (-torch.arange(0, n_embd, 2, device=positions.device, dtype=torch.float32) / n_embd)
    angle = positions[..., None] * frequency  # (..., C/2)
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(-2)  # sin and cos alternate: (..., C)


def rotary_angles(positions: Tensor, head_dim: int, theta: float, scaling: dict | None = None) -> tuple[Tensor, Tensor]:
    """Rotary position embedding, https://arxiv.org/abs/2104.09864. positions: (...) -> cos, sin: (..., D/2)."""
    frequency, scale = rope_frequencies(head_dim, theta, scaling or {}, positions.device)
    angle = positions[..., None] * frequency
    return angle.cos() * scale, angle.sin() * scale


def rotary_tables(block_size: int, head_dim: int, theta: float, scaling: dict, device) -> tuple[Tensor, Tensor]:
    """Return cos and sin of all positions, both (block_size, D/2).

    A second compiled model whose theta or scaling differs breaks the graph here; its results are right.
    """
    return _rotary_tables(block_size, head_dim, theta, tuple(scaling.items()), device)


# Otherwise each compiled kernel would compute cos and sin again. This is what torch.compiler.assume_constant_result
# does, which imports the compiler: for a second, also in runs that do not compile.
rotary_tables._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.lru_cache(maxsize=8)
def _rotary_tables(block_size: int, head_dim: int, theta: float, scaling: tuple, device) -> tuple[Tensor, Tensor]:
    return rotary_angles(torch.arange(block_size, device=device), head_dim, theta, dict(scaling))


# The settings of each kind of rope scaling, named as in transformers. original_max_position_embeddings is the context
# length of the model before its rope was stretched by `factor`.
ROPE_SCALING = {
    "linear": "factor",
    "llama3": "factor original_max_position_embeddings low_freq_factor high_freq_factor",
    "yarn": "factor original_max_position_embeddings beta_fast beta_slow truncate attention_factor",
}


def rope_frequencies(head_dim: int, theta: float, scaling: dict, device=None) -> tuple[Tensor, float]:
    """Return the angle (D/2,) by which rope rotates each pair of channels per position, and a scale for cos and sin.

    `scaling` is empty, or has a "rope_type" and its settings in ROPE_SCALING. "linear" divides all angles by `factor`,
    https://arxiv.org/abs/2306.15595. "llama3" (https://arxiv.org/abs/2407.21783) and "yarn"
    (https://arxiv.org/abs/2309.00071) divide only those that make few full turns within the original context.
    """
    frequency = theta ** (-torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim)
    if not scaling:
        return frequency, 1.0
    kind, factor = scaling["rope_type"], scaling["factor"]
    if kind == "linear":
        return frequency / factor, 1.0
    context = scaling["original_max_position_embeddings"]
    if kind == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        kept = ((context * frequency / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
        return frequency * (kept + (1 - kept) / factor), 1.0
    if kind == "yarn":  # linear from the pair that makes beta_fast turns to the pair that makes beta_slow turns
        turns = (scaling["beta_fast"], scaling["beta_slow"])
        first, last = (head_dim * math.log(context / (n * 2 * math.pi)) / (2 * math.log(theta)) for n in turns)
        if scaling["truncate"]:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, head_dim - 1)
        width = last - first if last != first else 0.001
        divided = ((torch.arange(head_dim // 2, device=device) - first) / width).clamp(0, 1)
        return frequency * (1 - divided + divided / factor), scaling["attention_factor"]
    raise NotImplementedError(f"rope scaling {kind!r} has no branch in rope_frequencies")


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate channels i and i + D/2 of x (..., T, D) as pairs, the pairing of Llama's checkpoints."""
    a, b = x.chunk(2, dim=-1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class NgramEmbedding(nn.Module):
    """Embeddings of the last 2, 3, ..., n tokens, with one hashed table for each length.

    A small model looks up what it would otherwise have to compute in its first layer. Over-encoding,
    https://arxiv.org/abs/2501.16975.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        V = config.ngram_vocab
        self.possible = [V * (V + 1) ** back for back in range(1, config.ngram)]  # number of (back + 1)-grams
        self.tables = nn.ModuleList(Embedding(min(config.ngram_rows, n), config.n_embd) for n in self.possible)

    def forward(self, idx: Tensor, positions: Tensor, cache: "KVCache | None" = None) -> Tensor:
        """Return the sum of the embeddings (B, T, C) of the n-grams that end at each token of idx (B, T).

        `positions` (T,) or (B, T): those of the tokens in their documents. Tokens before a document do not count.
        """
        positions, index = positions.expand_as(idx), torch.arange(idx.size(1), device=idx.device).expand_as(idx)
        if cache is not None:  # earlier tokens are in the cache
            cache.idx.scatter_(1, positions, idx)
            idx, index = cache.idx, positions
        key, embedded = idx.gather(1, index), torch.zeros((), device=idx.device)
        for back, (table, possible) in enumerate(zip(self.tables, self.possible, strict=True), start=1):
            # the id plus 1 of the token this far back, or 0 if it is before the document
            earlier = torch.where(positions >= back, idx.gather(1, (index - back).clamp(min=0)) + 1, 0)
            key = key * (self.config.ngram_vocab + 1) + earlier  # int64; overflow wraps around
            # Fibonacci hashing if there are fewer rows than n-grams: the upper half of a product with 2**64 / 1.618
            n_rows = min(self.config.ngram_rows, possible)
            row = key if n_rows == possible else key * -7046029254386353131 >> 32
            row = row % n_rows  # tokens added later share rows with other n-grams
            # dropout1d drops all C channels of an n-gram or none
            embedded = embedded + F.dropout1d(table(row), self.config.ngram_dropout, self.training)  # (B, T, C)
        return embedded


# -------------------- generation


class KVCache:
    """Preallocated keys and values of every layer, for B rows of at most `size` tokens.

    `GPT.forward` writes new keys and values after the first `length` ones of each row, but does not change `length`.
    The caller advances it, per row, so rows may have different lengths.

    layers: keys and values of each layer, both (B, n_kv_head, size, head_dim); idx: (B, size), the tokens; length:
    (B,), the number of tokens in each row.
    """

    def __init__(self, config: GPTConfig, batch_size: int, size: int, device=None, dtype=torch.float32):
        shape = (batch_size, config.n_kv_head, size, config.head_dim)
        self.size = size
        self.layers = []
        for _ in range(config.n_layer):  # zeros: a masked slot must not hold a NaN
            k, v = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
            self.layers.append((k, v))
        self.idx = torch.zeros(batch_size, size, device=device, dtype=torch.long)
        self.length = torch.zeros(batch_size, device=device, dtype=torch.long)

    def copy_rows(self, source: "KVCache", rows: Tensor) -> None:
        """Make row b a copy of row rows[b] of `source`, a cache of the same size, which may be this cache itself."""
        for layer, other in zip(self.layers, source.layers, strict=True):
            for own, tensor in zip(layer, other, strict=True):
                own.copy_(tensor[rows])
        self.idx.copy_(source.idx[rows])
        self.length.copy_(source.length[rows])


# -------------------- documents: several in one row


def document_positions(documents: Tensor) -> Tensor:
    """Return each token's position in its document. documents: document numbers (B, T) -> (B, T)."""
    index = torch.arange(documents.size(1), device=documents.device)  # (T,)
    begins = F.pad(documents.diff(dim=1) != 0, (1, 0), value=True)
    return index - torch.where(begins, index, 0).cummax(dim=1).values


def document_mask(documents: Tensor, flex: bool) -> Tensor | BlockMask:
    """Return a causal mask within documents: a token attends to its own document up to itself. documents: (B, T).

    It is a boolean (B, 1, T, T) for scaled_dot_product_attention, or with `flex` a BlockMask for flex attention, which
    skips fully masked blocks: https://arxiv.org/abs/2412.05496
    """
    if not flex:
        return (documents[:, :, None] == documents[:, None, :]).tril()[:, None]

    def attends(b, h, query, key):
        return (query >= key) & (documents[b, query] == documents[b, key])

    B, T = documents.shape
    return compiled(create_block_mask)(attends, B, None, T, T, device=documents.device)


# -------------------- faster ways to compute the same

LOGITS_AT_ONCE = 2**25  # number of logits, 128 MB in float32
HAS_TRITON = importlib.util.find_spec("triton") is not None  # flex attention on a GPU is compiled to Triton


def attend(q: Tensor, k: Tensor, v: Tensor, mask: "Tensor | BlockMask | None", p: float, plain: bool = False) -> Tensor:
    """softmax(q k^T / sqrt(D)) v. q (B, H, T, D), k and v (B, H_kv, S, D) -> the shape of q.

    Causal if there is no mask. p is the dropout of the attention weights. With `plain`, training uses
    `plain_attention` if it applies (no mask, no grouped heads).
    """
    grouped = q.size(1) != k.size(1)
    if isinstance(mask, BlockMask):
        q, k = q.to(v.dtype), k.to(v.dtype)  # autocast does not cover flex attention
        return compiled(flex_attention)(q, k, v, block_mask=mask, enable_gqa=grouped)
    if plain and torch.is_grad_enabled() and mask is None and not grouped:
        return plain_attention(q, k, v, p)
    if q.size(2) == 1 and mask is not None and p == 0 and q.device.type == "cpu" and torch.compiler.is_compiling():
        return one_token_attention(q, k, v, mask)
    return F.scaled_dot_product_attention(q, k, v, mask, p, is_causal=mask is None, enable_gqa=grouped)


def plain_attention(q: Tensor, k: Tensor, v: Tensor, p: float) -> Tensor:
    """Causal attention with explicit matrix products. q, k, v: (B, H, T, D) -> (B, H, T, D).

    It keeps all T * T weights for the backward pass. On a CPU, in bfloat16 or with dropout, this is often faster for
    short sequences than the fused kernel, which needs less memory.
    """
    B, H, T, D = q.shape
    future = torch.full((T, T), -math.inf, device=q.device, dtype=v.dtype).triu(1)
    q, k = (x.to(v.dtype).reshape(B * H, T, D) for x in (q, k))
    weights = torch.baddbmm(future, q, k.transpose(1, 2), alpha=1 / math.sqrt(D)).softmax(-1)  # (B * H, T, T)
    return (dropout(weights, p, True).to(v.dtype) @ v.reshape(B * H, T, D)).view(B, H, T, D)


def one_token_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attention of one query per row, written for torch.compile, which fuses it with the operations around it.

    q (B, H, 1, D), k and v (B, H_kv, S, D), mask (B, 1, 1, S) -> (B, H, 1, D). torch's own kernel is designed
    for many queries; for a single one, its overhead dominates.
    """
    q = (q / math.sqrt(q.size(3))).view(len(q), k.size(1), -1, 1, q.size(3))  # (B, H_kv, H / H_kv, 1, D)
    q = q.as_strided(q.shape, q.stride())  # keeps q in memory; otherwise it would be recomputed for each key
    scores = (q * k[:, :, None]).sum(-1).masked_fill(~mask, -math.inf)  # (B, H_kv, H / H_kv, S)
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    y = (weights[..., None] * v[:, :, None]).sum(-2) / weights.sum(-1, keepdim=True)  # (B, H_kv, H / H_kv, D)
    return y.view(len(q), -1, 1, y.size(3))


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """F.dropout, but faster on a CPU: one 64-bit random draw serves four elements."""
    if not training or p == 0 or x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(x, p, training)
    draws = torch.empty(math.ceil(x.numel() / 4), dtype=torch.int64).random_(-(2**63), None)
    # each int16, from -2**15 to 2**15 - 1, is below the threshold with probability p
    keep = draws.view(torch.int16)[: x.numel()].view(x.shape) >= round(p * 2**16) - 2**15
    return x * (keep.to(x.dtype) / (1 - p))


def token_loss(model: GPT, x: Tensor, y: Tensor) -> Tensor:
    """Return the loss (n, 1) in nats of each target y (n,) after x (n, C); 0 if masked. For `in_chunks`."""
    return F.cross_entropy(model.logits(x).float(), y, ignore_index=-1, reduction="none")[:, None]


class HeadLoss(torch.autograd.Function):
    """The head fused with its cross-entropy, in nats, summed over the targets that are not masked (-1).

    With a large vocabulary, logits are the largest tensor in training, and cross-entropy needs two more of their size.
    Here, logits are computed for a chunk of rows at a time. The forward pass also computes the gradients, and keeps
    only those of the head's input and weight. As in Liger Kernel, https://arxiv.org/abs/2410.10989.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, targets: Tensor, softcap: float) -> Tensor:
        """x (N, C), weight (V, C), targets (N,) -> ()"""
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        head, loss = weight.to(dtype), torch.zeros(())
        dx, dweight = torch.empty_like(x), torch.zeros_like(weight, dtype=torch.float32)
        n = math.ceil(LOGITS_AT_ONCE / len(weight))  # rows per chunk
        for x_chunk, dx_chunk, y in zip(x.to(dtype).split(n), dx.split(n), targets.split(n), strict=True):
            logits = (x_chunk @ head.T).float()  # (n, V)
            if softcap:
                logits = softcap * torch.tanh(logits / softcap)
            logp = logits.log_softmax(-1)
            loss += F.nll_loss(logp, y, ignore_index=-1, reduction="sum")
            dlogits = logp.exp_()  # softmax - one-hot
            dlogits[torch.arange(len(y)), y.clamp(min=0)] -= 1
            dlogits[y == -1] = 0
            if softcap:
                dlogits *= 1 - (logits / softcap).square()
            dlogits = dlogits.to(dtype)
            dx_chunk.copy_(dlogits @ head)
            if not ctx.needs_input_grad[1]:  # the head is frozen
                continue
            if dtype == torch.float32:
                dweight.addmm_(dlogits.T, x_chunk)
            else:
                dweight += dlogits.T @ x_chunk
        ctx.save_for_backward(dx, dweight.to(weight.dtype))
        return loss

    @staticmethod
    def backward(ctx, gradient: Tensor):
        dx, dweight = ctx.saved_tensors
        return dx.mul_(gradient), dweight.mul_(gradient) if ctx.needs_input_grad[1] else None, None, None


def compiled(function: Callable) -> Callable:
    """Compile `function`, unless the whole model is being compiled. Flex attention is slow without compilation."""
    return function if torch.compiler.is_compiling() else _compiled(function)


_compiled = functools.cache(torch.compile)


# -------------------- settings and vocabulary


def attention_dropout(config: GPTConfig) -> float:
    return config.dropout if config.attn_dropout < 0 else config.attn_dropout


def grown_rows(weight: Tensor, n_vocab: int, size: int) -> Tensor:
    """Add rows for the new tokens n_vocab, ..., size - 1 to an embedding or head of n_vocab tokens.

    A new row is the mean of the old ones, so that no new token starts out more likely than an average token:
    https://nlp.stanford.edu/~johnhew/vocab-expansion.html. Rows from n_vocab on that only pad the vocabulary are used
    first.
    """
    old, padding = weight[:n_vocab], weight[size:]
    return torch.cat((old, old.mean(0).expand(size - n_vocab, -1), padding))


def check_config(config: GPTConfig) -> None:
    """Raise ValueError if a setting is invalid, or if settings do not fit together."""
    choices = {
        "pos": ("learned", "sinusoidal", "rope"),
        "norm": ("layernorm", "rmsnorm"),
        "mlp": ("gelu_tanh", "gelu", "relu", "relu2", "swiglu", "geglu"),
    }
    for name, allowed in choices.items():
        if getattr(config, name) not in allowed:
            raise ValueError(
                f"{name} = {getattr(config, name)!r} is not one of {', '.join(allowed)} (GPTConfig in model.py)"
            )
    for name in "block_size vocab_size n_layer n_head n_embd n_kv_head n_hidden ngram ngram_rows ngram_vocab".split():
        if getattr(config, name) < 1:
            raise ValueError(f"{name} = {getattr(config, name)} must be at least 1")
        if getattr(config, name) > {"n_layer": 10_000, "ngram": 100}.get(name, 1_000_000_000):
            raise ValueError(f"{name} = {getattr(config, name)} is too large for any machine. Use a smaller value.")
    if not 0 <= config.embedding_std < math.inf:
        raise ValueError(f"embedding_std = {config.embedding_std} must be a finite number and not negative")
    for name in ("dropout", "ngram_dropout"):
        if not 0 <= getattr(config, name) < 1:
            raise ValueError(f"{name} = {getattr(config, name)} must be at least 0 and below 1")
    if not (0 <= config.attn_dropout < 1 or config.attn_dropout == -1):
        raise ValueError(
            f"attn_dropout = {config.attn_dropout} must be at least 0 and below 1, or -1 for the same as dropout"
        )
    if not 1 <= config.rope_theta < math.inf:
        raise ValueError(f"rope_theta = {config.rope_theta} must be a finite number of at least 1")
    if config.head_dim == 0:
        raise ValueError(
            f"n_embd = {config.n_embd} must be a multiple of n_head = {config.n_head}, or head_dim must be given"
        )
    if not 0 < config.head_dim <= 1_000_000:
        raise ValueError(f"head_dim = {config.head_dim} must be from 1 to 1000000, or 0 for n_embd / n_head")
    if config.n_head % config.n_kv_head:
        raise ValueError(f"n_head = {config.n_head} must be a multiple of n_kv_head = {config.n_kv_head}")
    if config.pos == "rope" and config.head_dim % 2:
        raise ValueError(f"pos = 'rope' needs an even head_dim, by default n_embd / n_head, which is {config.head_dim}")
    if config.pos == "sinusoidal" and config.n_embd % 2:
        raise ValueError(f"pos = 'sinusoidal' needs an even n_embd, which is {config.n_embd}")
    if config.nope_every < 0:
        raise ValueError(f"nope_every = {config.nope_every} must not be negative")
    if config.pos != "rope" and (config.nope_every or config.rope_scaling):
        name = "nope_every" if config.nope_every else "rope_scaling"
        raise ValueError(f"{name} = {getattr(config, name)} needs pos = 'rope'")
    if config.qk_norm_weight and not config.qk_norm:
        raise ValueError("qk_norm_weight = True needs qk_norm = True")
    check_rope_scaling(config.rope_scaling, config.rope_theta)


def check_rope_scaling(scaling: dict, theta: float) -> None:
    """Raise ValueError if `scaling` is not a valid argument of `rope_frequencies`."""
    if scaling == {}:
        return
    kind = scaling.get("rope_type") if isinstance(scaling, dict) else None
    names = ROPE_SCALING[kind].split() if isinstance(kind, str) and kind in ROPE_SCALING else []
    numbers = [scaling[name] for name in names if name in scaling]
    if not names or set(scaling) != {"rope_type", *names} or not all(isinstance(x, int | float) for x in numbers):
        raise ValueError(
            f"rope_scaling = {scaling!r:.200} is not a rope_type of {', '.join(ROPE_SCALING)} and numbers for its "
            f"settings, such as {ROPE_SCALING['linear']!r} for linear"
        )
    if not all(0 < scaling[name] < math.inf for name in names if name != "truncate"):
        raise ValueError(f"rope_scaling = {scaling} must have finite numbers above 0")
    if kind == "llama3" and scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
        raise ValueError(f"rope_scaling = {scaling} must have a low_freq_factor below high_freq_factor")
    if kind == "yarn" and theta == 1:
        raise ValueError("rope_scaling of type yarn needs rope_theta above 1")
