"""Generation: filters on logits, the loop that draws token after token, and text that streams out and stops.

The loop owns the key-value cache: `GPT.forward` writes into it, and only the loop advances it.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from acorn import UserError
from acorn.data.tokenizer import StreamDecoder
from model import GPT, KVCache


@dataclass
class Sampling:
    """How a token is drawn from logits. The filters apply in the order of the fields."""

    repetition_penalty: float = 1.0  # above 1: tokens that the row has already become less likely
    no_repeat_ngram_size: int = 0  # n > 0: no n tokens in a row occur twice
    temperature: float = 1.0  # below 1 sharper, above 1 flatter; 0: always the likeliest token
    top_k: int = 0  # k > 0: only the k likeliest
    top_p: float = 1.0  # below 1: only the likeliest that together have this probability
    min_p: float = 0.0  # above 0: only those at least this fraction as likely as the likeliest


def penalize_repetition(logits: Tensor, row: list[int], penalty: float) -> Tensor:
    """Divide positive and multiply negative logits (V,) of the tokens in `row` by `penalty`, as in CTRL,
    https://arxiv.org/abs/1909.05858. A logit of -inf stays."""
    seen = torch.tensor(sorted({id for id in row if id < len(logits)}), dtype=torch.long, device=logits.device)
    chosen, largest = logits[seen], torch.finfo(logits.dtype).max
    penalized = torch.where(chosen > 0, chosen / penalty, chosen * penalty).clamp(-largest, largest)
    return logits.scatter(0, seen, penalized.where(chosen > -torch.inf, chosen))


def ban_repeated_ngrams(logits: Tensor, row: list[int], n: int) -> Tensor:
    """Rule out each token that would complete an n-gram which `row` already has. Where that leaves no token whose logit
    is above -inf, rule out none. logits: (V,)."""
    if len(row) < n:
        return logits
    prefix = row[len(row) - n + 1 :]
    banned = {row[i + n - 1] for i in range(len(row) - n + 1) if row[i : i + n - 1] == prefix}
    ids = torch.tensor(sorted(id for id in banned if id < len(logits)), dtype=torch.long, device=logits.device)
    left = logits.index_fill(0, ids, -torch.inf)
    return left if left.max() > -torch.inf else logits


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Exactly the `k` highest logits of (V,), the rest -inf; of equal ones at the edge the lowest ids stay."""
    if k >= logits.numel():
        return logits
    threshold = logits.topk(k).values[-1]
    above, equal = logits > threshold, logits == threshold
    keep = above | (equal & (equal.cumsum(0) <= k - above.sum()))
    return logits.masked_fill(~keep, -torch.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """The fewest likeliest tokens of (V,) whose probabilities reach `p` together, at least one, the rest -inf; of
    equal ones the lowest ids come first. Nucleus sampling, https://arxiv.org/abs/1904.09751."""
    descending, order = logits.sort(descending=True, stable=True)
    probs = descending.softmax(0)
    before = probs.cumsum(0) - probs  # the probability of all that are likelier
    drop = before >= p
    drop[0] = False
    return logits.index_fill(0, order[drop], -torch.inf)


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """The tokens of (V,) at least `p` times as likely as the likeliest, https://arxiv.org/abs/2407.01082."""
    probs = logits.softmax(0)
    return logits.masked_fill(probs < p * probs.max(), -torch.inf)


def draw(logits: Tensor, row: list[int], how: Sampling, random: torch.Generator) -> int:
    """The next token for a `row` of ids, from its logits (V,). `random` is a generator on the CPU, so that the same
    seed draws the same on every device. The token's probability after the filters is above 0. Raises UserError where a
    logit is NaN or infinity, or all are -inf."""
    if not logits.max().isfinite():  # the maximum of what has a NaN in it is one
        raise UserError("the model's logits are not numbers: this checkpoint is broken; choose an earlier one")
    logits = logits.double()
    if how.repetition_penalty != 1:
        logits = penalize_repetition(logits, row, how.repetition_penalty)
    if how.no_repeat_ngram_size:
        logits = ban_repeated_ngrams(logits, row, how.no_repeat_ngram_size)
    if how.temperature == 0:
        return int(logits.argmax())
    logits = (logits - logits.max()) / how.temperature  # the difference, so that no temperature makes an infinity
    if how.top_k:
        logits = keep_top_k(logits, how.top_k)
    if how.top_p < 1:
        logits = keep_top_p(logits, how.top_p)
    if how.min_p > 0:
        logits = keep_min_p(logits, how.min_p)
    # Where a uniform number falls among the summed probabilities. Drawn in float32 and multiplied in float64 it stays
    # below the sum, and `right` steps over tokens of probability 0.
    cumulative = logits.softmax(0).cpu().cumsum(0)  # a GPU sums in parts, which may fall where they meet
    at = torch.rand((), generator=random).double() * cumulative[-1]
    return int(torch.searchsorted(cumulative, at, right=True))


def context(row: list[int], block_size: int) -> list[int]:
    """What the model sees of a row: all of it, or, where it has outgrown the block, its end. The window moves by half
    a block at a time, so that the cache has to be filled anew only once in block_size / 2 tokens."""
    if len(row) <= block_size:
        return row
    stride = max(1, block_size // 2)
    return row[-(-(len(row) - block_size) // stride) * stride :]


@torch.no_grad()
def generate(
    model: GPT,
    prompts: list[list[int]],
    max_new_tokens: int,
    how: Sampling,
    seeds: list[int],
    on_token: Callable[[int, int, float], bool],
    n_vocab: int | None = None,
    compile: bool = False,
) -> list[list[int]]:
    """Continue a batch of prompts (token ids, of any lengths) by up to `max_new_tokens` each; returns prompts and
    continuations.

    Each token goes to `on_token(row, id, logprob)`, logprob under the unfiltered model, in nats; the row ends where
    this returns True. Row i draws from its own generator, seeded with seeds[i], so what runs beside it does not
    matter. Ids from `n_vocab` on, the padding of a vocabulary, are never drawn. `compile` compiles the step of one
    token, which pays where many follow.
    """
    if not all(prompts):
        raise ValueError("every prompt needs at least one token")
    if (largest := max(map(max, prompts))) >= model.config.vocab_size:
        raise UserError(
            f"the prompt has the token {largest}, which is beyond the model's vocabulary of {model.config.vocab_size}: "
            "its tokenizer has control tokens that it was not made for; leave them out"
        )
    was_training = model.training
    model.eval()
    try:
        return _generate(model, prompts, max_new_tokens, how, seeds, on_token, n_vocab, compile)
    finally:
        model.train(was_training)


def _generate(model, prompts, max_new_tokens, how, seeds, on_token, n_vocab, compile) -> list[list[int]]:
    # on CUDA as a graph of kernels, replayed by one call
    one_token = torch.compile(model, mode="reduce-overhead") if compile else model
    block_size, embedding = model.config.block_size, model.transformer.wte.weight
    # a CPU's attention over bfloat16 keys and values takes several times as long
    kept_in = torch.float32 if embedding.device.type == "cpu" else embedding.dtype
    rows = [list(prompt) for prompt in prompts]
    random = [torch.Generator().manual_seed(seed) for seed in seeds]
    going = [True] * len(rows)
    cache, windows_start = None, None
    for n in range(max_new_tokens):
        windows = [context(row, block_size) for row in rows]
        start = [len(row) - len(window) for row, window in zip(rows, windows, strict=True)]
        if start != windows_start:  # at first, and whenever a window slides
            windows_start = start
            size = min(block_size, max(map(len, windows)) + max_new_tokens - n)
            cache = KVCache(model.config, len(rows), size, embedding.device, kept_in)
            if compile:  # a CUDA graph writes into the memory that it was recorded with
                for tensor in (cache.idx, cache.length, *(t for layer in cache.layers for t in layer)):
                    torch._dynamo.mark_static_address(tensor)
            logits = prefill(model, cache, windows)
        else:
            logits = decode(one_token, cache, [row[-1] for row in rows], going)
        logits = logits[:, :n_vocab].float()  # (B, V)
        logprobs = logits.log_softmax(-1)
        for i, row in enumerate(rows):
            if going[i]:
                token = draw(logits[i], row, how, random[i])
                row.append(token)
                going[i] = not on_token(i, token, float(logprobs[i, token]))
        if not any(going):
            break
    return rows


def prefill(model: GPT, cache: KVCache, windows: list[list[int]]) -> Tensor:
    """Read whole windows (B of any lengths) into an empty cache in one pass; returns the logits (B, V) behind each.
    They are padded on the right, where the padding comes after everything that counts and so is never seen."""
    device = cache.length.device
    lengths = torch.tensor([len(window) for window in windows], device=device)
    idx = torch.zeros(len(windows), int(lengths.max()), dtype=torch.long)
    for i, window in enumerate(windows):
        idx[i, : len(window)] = torch.tensor(window)
    logits, _ = model(idx.to(device), cache=cache, last=lengths - 1)
    cache.length += lengths
    return logits[:, 0]


def decode(model: GPT, cache: KVCache, tokens: list[int], going: list[bool]) -> Tensor:
    """Read one more token in each row; returns the logits (B, V) behind it. A row that is not `going` stays."""
    device = cache.length.device
    logits, _ = model(torch.tensor(tokens, device=device)[:, None], cache=cache)
    cache.length += torch.tensor(going, device=device)
    return logits[:, 0]


class TextStream:
    """The text of one row while its tokens arrive: whole characters only, and nothing of a stop string or after it.
    Besides the tokens that end a text, the control tokens `ends` end it too, such as those that end a turn."""

    def __init__(self, tokenizer, stop: list[str] = (), ends: set[int] = frozenset()):
        self.decoder = StreamDecoder(tokenizer)
        self.ends, self.stop = ends, [s for s in stop if s]
        self.text_ends = tokenizer.ends | set(tokenizer.before_document[:1])  # or the beginning of the next document
        self.pending = ""  # decoded, but perhaps the beginning of a stop string
        self.stopped_by: str | None = None

    def push(self, token: int) -> str:
        """The text that can be shown now that `token` is there; sets `stopped_by` at end-of-text or a stop string."""
        if token in self.text_ends or token in self.ends:
            self.stopped_by = "end of turn" if token in self.ends else "end of text"
            return self.finish()
        self.pending += self.decoder.push(token)
        found = [(self.pending.find(s), s) for s in self.stop if s in self.pending]
        if found:
            at, self.stopped_by = min(found)
            shown, self.pending = self.pending[:at], ""
            return shown
        held = max((n for s in self.stop for n in range(1, len(s)) if self.pending.endswith(s[:n])), default=0)
        cut = len(self.pending) - held
        shown, self.pending = self.pending[:cut], self.pending[cut:]
        return shown

    def finish(self) -> str:
        """The text still held back; an incomplete last character is dropped."""
        shown, self.pending = self.pending + self.decoder.finish(), ""
        return shown


def sample_text(model: GPT, tokenizer, max_new_tokens: int, seed: int, how: Sampling | None = None) -> str:
    """One text from the model alone, from the beginning of a document or, where no token marks it, from token 0."""
    text = TextStream(tokenizer)
    pieces = []

    def on_token(row: int, token: int, logprob: float) -> bool:
        pieces.append(text.push(token))
        return text.stopped_by is not None

    start = list(tokenizer.before_document) or [0 if tokenizer.eot is None else tokenizer.eot]
    generate(
        model, [start], max_new_tokens, how or Sampling(temperature=0.8, top_k=200), [seed], on_token, tokenizer.n_vocab
    )
    return "".join([*pieces, text.finish()])


def encode_prompt(tokenizer, text: str, control: bool = False) -> list[int]:
    """The ids of a prompt, after those that the tokenizer puts before a text, such as a BOS. Names of control tokens,
    such as `<|endoftext|>`, are text in it; with `control` they are those tokens. An empty prompt is the beginning of a
    document. Raises UserError for an empty prompt where no token marks that, and for text that cannot be encoded."""
    ids, before = tokenizer.encode_part(text, continues=False, control=control).tolist(), list(tokenizer.before_text)
    if control and ids[: len(before)] == before:
        before = []  # the prompt has them
    if not ids and not before and tokenizer.eot is None:
        raise UserError("the prompt is empty, and this tokenizer has no end-of-text token to start from; give --start")
    return before + ids or [tokenizer.eot]
