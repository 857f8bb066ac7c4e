"""Look inside a model while it reads a text: attention, logit lens, loss per token, and what each head is good for.

`look` runs the unchanged model and watches torch's calls in this thread, so it works for every form of the model, and
in a server beside other threads. `look_inside` turns the result into plain JSON values for the page and the report.
"""

import base64
import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from acorn import UserError, visible
from acorn.inference.generate import check_finite, evaluating
from model import GPT, Block

MOST_TOKENS = 256  # of a text; n tokens have n * n attention weights in each head
LOGITS_AT_ONCE = 2**26  # 256 MB in float32


class Inside(NamedTuple):
    """What a model computes for T tokens. Row i of `residual` enters block i; the last row leaves the last block."""

    logits: Tensor  # (T, V), of the token after each token
    residual: Tensor  # (L + 1, T, C), before the norm of each block, and before the last norm
    attention: Tensor  # (L, H, T, T) in float32: query, key; each row sums to 1


class Watch(TorchFunctionMode):
    """Sees the calls of torch in this thread: keeps the residual stream and the attention weights of each layer.

    `change(layer, y)` may return a changed output (B, H, T, D) of a layer's attention heads.
    """

    def __init__(self, model: GPT, change: Callable[[int, Tensor], Tensor] | None = None, keep: bool = True):
        super().__init__()
        blocks = [module for module in model.modules() if isinstance(module, Block)]  # compiled ones are wrapped
        norms: list = [*(block.ln_1 for block in blocks), model.transformer.ln_f]
        self.norms = {id(norm.weight) for norm in norms}
        self.change, self.keep, self.layer = change, keep, 0
        self.residual: list[Tensor] = []
        self.attention: list[Tensor] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.keep and func in (F.layer_norm, F.rms_norm) and id(kwargs.get("weight")) in self.norms:
            self.residual.append(args[0])
        y = func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            if self.keep:
                self.attention.append(attention_weights(args[0], args[1], args[3], kwargs["is_causal"]))
            if self.change:
                y = self.change(self.layer, y)
            self.layer += 1
        return y


def attention_weights(q: Tensor, k: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
    """Return softmax(q k^T / sqrt(D)) in float32: (B, H, T, S). q (B, H, T, D), k (B, H_kv, S, D).

    `mask`, true where a query may attend to a key, and `is_causal` are arguments of scaled_dot_product_attention.
    """
    q, k = q.float(), k.float().repeat_interleave(q.size(1) // k.size(1), dim=1)  # one key head for each query head
    scores = q @ k.transpose(-2, -1) / q.size(-1) ** 0.5  # (B, H, T, S)
    allowed = torch.ones_like(scores[0, 0], dtype=torch.bool).tril() if is_causal else mask
    return (scores if allowed is None else scores.masked_fill(~allowed, -torch.inf)).softmax(-1)


@torch.no_grad()
def look(model: GPT, ids: list[int]) -> Inside:
    """Run the model on a text of at least two tokens, and return what it computed. The model is in evaluation mode.

    Raises UserError if its logits are non-finite.
    """
    idx = torch.tensor([ids], device=model.transformer.wte.weight.device)
    with Watch(model) as watch:
        logits, _ = model(idx, idx)  # any targets: with them, the model returns the logits of all tokens
    check_finite(logits)
    attention = torch.stack([weights[0] for weights in watch.attention])
    return Inside(logits[0], torch.stack([x[0] for x in watch.residual]), attention)


@torch.no_grad()
def logit_lens(model: GPT, x: Tensor) -> Tensor:
    """Return the logits (T, V) that the residual stream x (T, C) would give if the remaining blocks were left out.

    https://www.lesswrong.com/posts/AcKRB8wDpdaN6v6ru/interpreting-gpt-the-logit-lens
    """
    return model.logits(model.transformer.ln_f(x[None]))[0]


def token_losses(logits: Tensor, ids: list[int]) -> Tensor:
    """Return the loss in nats of the tokens after the first: (T - 1,). logits: (T, V)."""
    return F.cross_entropy(logits[:-1].float(), torch.tensor(ids[1:], device=logits.device), reduction="none")


@torch.no_grad()
def head_ablation(model: GPT, ids: list[int], progress: Callable = iter) -> Tensor:
    """Return by how much the mean loss of the text grows, in nats, if the output of one head is zero: (L, H).

    `progress` wraps the iterator over layers, such as tqdm.
    """
    cfg = model.config
    idx = torch.tensor([ids], device=model.transformer.wte.weight.device)
    at_once = max(1, LOGITS_AT_ONCE // (len(ids) * cfg.vocab_size))

    def losses(zeroed: int | None, heads: range) -> Tensor:
        """Return the mean loss (len(heads),) without each of these heads of the layer `zeroed`."""

        def change(layer: int, y: Tensor) -> Tensor:  # row i of the batch loses head heads[i]
            if layer == zeroed:
                y = y.clone()
                y[range(len(heads)), list(heads)] = 0
            return y

        with Watch(model, change, keep=False):
            batch = idx.expand(len(heads), -1)
            return model(batch[:, :-1], batch[:, 1:], reduction="none")[1].mean(1)

    base = losses(None, range(1))
    rows = []
    for layer in progress(range(cfg.n_layer)):
        parts = [range(i, min(i + at_once, cfg.n_head)) for i in range(0, cfg.n_head, at_once)]
        rows.append(torch.cat([losses(layer, heads) for heads in parts]) - base)
    return torch.stack(rows)


@torch.no_grad()
def neighbours(model: GPT, ids: list[int], n_vocab: int, n: int = 6) -> tuple[Tensor, Tensor]:
    """Return the cosine similarities and ids of the tokens with the most similar embeddings: both (len(ids), n)."""
    table = F.normalize(model.transformer.wte.weight[:n_vocab].float(), dim=1)  # (V, C)
    own = torch.tensor(ids, device=table.device)
    similar = table[own] @ table.T  # (len(ids), V)
    similar[range(len(ids)), own] = -2  # a token is not its own neighbour
    found = similar.topk(min(n, n_vocab - 1))
    return found.values, found.indices


# -------------------- as plain values


def label(tokenizer, token: int) -> str:
    """Return one token as text for people: control characters are escaped, and bytes that are not UTF-8 are shown in
    hexadecimal, such as ⟨E4 BD⟩."""
    data = tokenizer.decode_bytes([token])
    try:
        return escaped(data.decode())
    except UnicodeDecodeError:
        return f"⟨{data.hex(' ').upper()}⟩"


def escaped(text: str) -> str:
    """Escape what is invisible, except spaces. A line break becomes ⏎: code may contain a backslash and an n."""
    return "⏎".join(map(visible, text.split("\n")))


def labels(tokenizer, ids: list[int]) -> list[str]:
    """Return `label` of each token of a text. The token that completes a character of several tokens shows it, as in
    "⟨E4 BD⟩", "…你"."""
    shown, pending = [], b""  # pending: the first bytes of a character
    for token in ids:
        data = tokenizer.decode_bytes([token])
        for before in (pending, b"")[not pending :]:  # first as the rest of a character, then without what precedes
            pending = b""
            try:
                shown.append("…" * bool(before) + escaped((before + data).decode()))
                break
            except UnicodeDecodeError as error:
                if error.reason == "unexpected end of data":
                    shown.append(label(tokenizer, token))
                    pending = (before + data)[error.start :]
                    break
        else:
            shown.append(label(tokenizer, token))
    return shown


def label_after(tokenizer, before: list[int], token: int) -> str:
    """Return the label of a token that may follow the tokens `before`, as in `labels`."""
    return labels(tokenizer, [*before[-3:], token])[-1]  # a character has at most 4 bytes


def check_text(ids: list[int], n_vocab: int, block_size: int, most: int = MOST_TOKENS) -> None:
    """Raise UserError if a text has too few or too many tokens to look at, or ids that are not below `n_vocab`."""
    most = min(most, block_size)
    if not 2 <= len(ids) <= most:
        problem = "Write a longer text" if len(ids) < 2 else "Shorten the text"
        raise UserError(f"the text has {len(ids)} tokens, but needs 2 to {most}. {problem}.")
    for token in ids:
        if not 0 <= token < n_vocab:
            raise UserError(f"the text has token {token}, but the model knows only 0 to {n_vocab - 1}. Leave it out.")


def look_inside(model: GPT, tokenizer, ids: list[int], n_top: int = 6) -> dict:
    """Return what the model computes for a text as JSON values.

    "tokens" and "ids"; "loss" of each token in nats (None for the first); "next": the most likely tokens after each
    token; "lens": for each layer and token, the most likely next token and the probability of the real next one;
    "attention": base64 of bytes, for each layer and head the lower triangle of weights * 255, row by row; "neighbours"
    of each different token, with cosine similarities. Tokens with a number are [id, label, number].
    """
    T, n_vocab = len(ids), min(tokenizer.n_vocab, model.config.vocab_size)
    n_top = min(n_top, n_vocab)

    @functools.cache
    def named(i: int, token: int) -> str:
        return label_after(tokenizer, ids[: i + 1], token)

    def lens_row(logits: Tensor) -> list[list]:
        p = logits[:, :n_vocab].float().softmax(-1)
        best = p.max(-1)
        real = [round(float(p[i, token]), 4) for i, token in enumerate(ids[1:])] + [None]
        values, tokens = best.values.tolist(), best.indices.tolist()
        rows = enumerate(zip(tokens, values, real, strict=True))
        return [[t, named(i, t), round(v, 4), r] for i, (t, v, r) in rows]

    with evaluating(model):
        inside = look(model, ids)
        # one row after the other, because the probabilities of all layers may be gigabytes
        lens = [lens_row(logit_lens(model, x)) for x in inside.residual[:-1]] + [lens_row(inside.logits)]
        distinct = list(dict.fromkeys(ids))
        similar, nearest = neighbours(model, distinct, n_vocab)

    top = inside.logits[:, :n_vocab].float().softmax(-1).topk(n_top)
    triangle = torch.ones(T, T, dtype=torch.bool).tril()
    attention = (inside.attention.cpu() * 255).round().to(torch.uint8)[..., triangle]  # (L, H, T * (T + 1) / 2)
    pairs = zip(distinct, nearest.tolist(), similar.tolist(), strict=True)
    return {
        "n_layer": inside.attention.size(0),
        "n_head": inside.attention.size(1),
        "ids": list(ids),
        "tokens": labels(tokenizer, ids),
        "loss": [None, *(round(x, 4) for x in token_losses(inside.logits, ids).tolist())],
        "next": [
            [[t, named(i, t), round(p, 5)] for t, p in zip(tokens, values, strict=True)]
            for i, (tokens, values) in enumerate(zip(top.indices.tolist(), top.values.tolist(), strict=True))
        ],
        "lens": lens,
        "attention": base64.b64encode(attention.contiguous().numpy().tobytes()).decode(),
        "neighbours": [
            [
                label(tokenizer, token),
                [[t, label(tokenizer, t), round(s, 3)] for t, s in zip(tokens, values, strict=True)],
            ]
            for token, tokens, values in pairs
        ],
    }
