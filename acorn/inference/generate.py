"""Text generation: logit filters, the sampling loop, and streaming text with stop strings.

The loop owns the KV cache: `GPT.forward` writes into it, and only the loop advances it.
"""

import contextlib
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import torch
from torch import Tensor

from acorn import UserError
from acorn.data.tokenizer import StreamDecoder
from acorn.distributed.sharding import is_sharded
from model import GPT, KVCache


@dataclass
class Sampling:
    """Parameters for sampling a token from logits. The filters are applied in the order of the fields."""

    repetition_penalty: float = 1.0  # above 1: tokens that are already in the row become less likely
    no_repeat_ngram_size: int = 0  # n > 0: no n-gram occurs twice
    temperature: float = 1.0  # below 1: sharper; above 1: flatter; 0: greedy
    top_k: int = 0  # k > 0: only the k most likely tokens
    top_p: float = 1.0  # below 1: only the most likely tokens that together reach this probability
    min_p: float = 0.0  # above 0: only tokens at least this fraction as likely as the most likely one


def penalize_repetition(logits: Tensor, row: list[int], penalty: float) -> Tensor:
    """Divide positive and multiply negative logits (V,) of the tokens in `row` by `penalty`; -inf stays.

    CTRL, https://arxiv.org/abs/1909.05858.
    """
    used_ids = torch.tensor(sorted({id for id in row if id < len(logits)}), dtype=torch.long, device=logits.device)
    chosen, largest = logits[used_ids], torch.finfo(logits.dtype).max
    penalized = torch.where(chosen > 0, chosen / penalty, chosen * penalty).clamp(-largest, largest)
    return logits.scatter(0, used_ids, penalized.where(chosen > -torch.inf, chosen))


def ban_repeated_ngrams(logits: Tensor, row: list[int], n: int) -> Tensor:
    """Set the logits (V,) of tokens that would repeat an n-gram of `row` to -inf.

    If this would set all logits to -inf, return them unchanged.
    """
    if len(row) < n:
        return logits
    prefix = row[len(row) - n + 1 :]
    banned = {row[i + n - 1] for i in range(len(row) - n + 1) if row[i : i + n - 1] == prefix}
    ids = torch.tensor(sorted(id for id in banned if id < len(logits)), dtype=torch.long, device=logits.device)
    allowed = logits.index_fill(0, ids, -torch.inf)
    return allowed if allowed.max() > -torch.inf else logits


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Keep exactly the `k` highest logits of each row of (..., V), and set the rest to -inf. Ties: the lowest ids."""
    if k >= logits.size(-1):
        return logits
    threshold = logits.topk(k).values[..., -1:]
    above, equal = logits > threshold, logits == threshold
    keep = above | (equal & (equal.cumsum(-1) <= k - above.sum(-1, keepdim=True)))
    return logits.masked_fill(~keep, -torch.inf)


def keep_top_p(logits: Tensor, p: float, share: Tensor | float = 1.0) -> Tensor:
    """Keep the smallest set of most likely tokens of each row of (..., V) whose probabilities sum to at least `p`.

    The rest is set to -inf. At least one token stays, and ties go to the lowest ids. If the row lists only some of the
    tokens, `share` (..., 1) is the sum of their probabilities. Nucleus sampling, https://arxiv.org/abs/1904.09751.
    """
    descending, order = logits.sort(descending=True, stable=True)
    probs = descending.softmax(-1) * share
    mass_before = probs.cumsum(-1) - probs  # total probability of the more likely tokens
    drop = mass_before >= p
    drop[..., 0] = False
    return logits.masked_fill(drop.scatter(-1, order, drop), -torch.inf)


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """Set the tokens of (..., V) that are less than `p` times as likely as the row's most likely one to -inf.

    https://arxiv.org/abs/2407.01082
    """
    probs = logits.softmax(-1)
    return logits.masked_fill(probs < p * probs.amax(-1, keepdim=True), -torch.inf)


SHORTLIST = 1024  # tokens to which the filters usually reduce a vocabulary


def shortlist(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor] | None:
    """Find the tokens of logits (B, V) that the filters of `sampling` may keep, without sorting the vocabulary.

    Returns ids (B, n), ascending, and the sum of their probabilities (B, 1). The latter is 1 with top_k, which comes
    before the filters that depend on it. Returns None if that does not pay, or if n tokens may not be enough in some
    row. On a CPU, filters of the whole vocabulary take longer than a step of a small model.
    """
    n = sampling.top_k or SHORTLIST
    filters = sampling.top_k > 0 or sampling.top_p < 1 or sampling.min_p > 0
    if not filters or n >= logits.size(-1) or logits.device.type != "cpu":
        return None
    values, ids = logits.topk(n + 1)  # descending
    if sampling.top_k:
        certain, share = values[:, n - 1] > values[:, n], values.new_ones(len(values), 1)
    else:
        total = scale(logits, sampling.temperature).logsumexp(-1, keepdim=True)
        values = scale(values, sampling.temperature)
        probs = (values - total).exp()
        share = probs[:, :n].sum(-1, keepdim=True)
        above = values[:, :n] > values[:, n:]  # not tied with an unlisted token
        enough = (probs[:, :n] * above).sum(-1) > sampling.top_p
        certain = ((sampling.top_p < 1) & enough) | (probs[:, n] < sampling.min_p * probs[:, 0])
    return (ids[:, :n].sort(-1).values, share) if certain.all() else None


def scale(logits: Tensor, temperature: float) -> Tensor:
    """Divide logits (..., V) by `temperature`, relative to their maximum, so that none becomes +inf."""
    return (logits - logits.amax(-1, keepdim=True)) / temperature


NON_FINITE = "the model's logits are non-finite. This checkpoint is broken, so choose an earlier one."


def check_finite(logits: Tensor) -> None:
    """Raise UserError if a row of the logits (..., V) has NaN or +inf, or only -inf."""
    if not logits.amax(-1).isfinite().all():  # the maximum propagates NaN
        raise UserError(NON_FINITE)


def draw(logits: Tensor, rows: list[list[int]], sampling: Sampling, random: list[torch.Generator]) -> Tensor:
    """Sample the tokens (B,) that follow `rows` (ids) from their logits (B, V).

    `random` are the rows' generators on the CPU, so that a seed gives the same tokens on every device. A token's
    probability after the filters is above 0. The token is -1 if a logit of its row is NaN or +inf, or if all are -inf.

    The host waits for a GPU a few times, and once more per row if a repetition filter is on.
    """
    finite = logits.amax(-1).isfinite()  # the maximum propagates NaN
    logits = logits.double()
    if sampling.repetition_penalty != 1:
        pairs = zip(logits, rows, strict=True)
        logits = torch.stack([penalize_repetition(each, row, sampling.repetition_penalty) for each, row in pairs])
    if sampling.no_repeat_ngram_size:
        pairs = zip(logits, rows, strict=True)
        logits = torch.stack([ban_repeated_ngrams(each, row, sampling.no_repeat_ngram_size) for each, row in pairs])
    if sampling.temperature == 0:
        ids = logits.argmax(-1)
    else:
        listed, share = shortlist(logits, sampling) or (None, 1.0)
        logits = logits if listed is None else logits.gather(-1, listed)
        if sampling.top_k:
            logits = keep_top_k(logits, sampling.top_k)
        logits = scale(logits, sampling.temperature)  # after top_k, because it may make different logits equal
        if sampling.top_p < 1:
            logits = keep_top_p(logits, sampling.top_p, share)
        if sampling.min_p > 0:
            logits = keep_min_p(logits, sampling.min_p)
        uniform = torch.stack([torch.rand(1, generator=each) for each in random]).double()  # (B, 1)
        ids = inverse_transform(logits.softmax(-1), uniform.to(logits.device), in_order=logits.device.type == "cpu")
        ids = ids if listed is None else listed.gather(-1, ids[:, None])[:, 0]
    return torch.where(finite, ids, -1)


def checked(ids: list[int]) -> list[int]:
    """Return ids from `draw`. Raises UserError if a row had non-finite logits."""
    if -1 in ids:
        raise UserError(NON_FINITE)
    return ids


def inverse_transform(probs: Tensor, uniform: Tensor, in_order: bool) -> Tensor:
    """Return the ids (B,) at which the cumulative sums of probs (B, V) exceed the share uniform (B, 1) of their total.

    No token of probability 0 is returned. `in_order` says that the device sums in order, as CPUs do. A GPU's parallel
    sums may decrease by a rounding error. `uniform` is float64 with float32's precision, so that its product with the
    total is below the total.
    """
    cumulative = probs.cumsum(-1)
    if in_order:  # right=True skips tokens of probability 0
        return torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)[:, 0]
    cumulative = cumulative.masked_fill(probs == 0, -1.0)
    threshold = uniform * cumulative.amax(-1, keepdim=True)
    return (cumulative > threshold).int().argmax(-1)  # the first of them


def context(row: list[int], block_size: int) -> list[int]:
    """Return the part of a row that the model sees: all of it, or its end if it exceeds the block size.

    The window slides by half a block at a time, so the cache is refilled only once every block_size / 2 tokens.
    """
    if len(row) <= block_size:
        return row
    stride = max(1, block_size // 2)
    return row[stride * math.ceil((len(row) - block_size) / stride) :]


@torch.no_grad()
def generate(
    model: GPT,
    prompts: list[list[int]],
    max_new_tokens: int,
    sampling: Sampling,
    seeds: list[int],
    on_token: Callable[[int, int, float], bool],
    n_vocab: int | None = None,
    compile: bool = False,
    finished: Callable[[bool], bool] = bool,
) -> list[list[int]]:
    """Continue a batch of prompts (ids, of any lengths) by up to `max_new_tokens`; return prompts with continuations.

    `on_token(row, id, logprob)` is called for each token, with its log-probability in nats under the unfiltered model,
    and ends the row by returning True. Row i samples from its own generator, seeded with seeds[i], so its tokens do not
    depend on the other rows. Ids from `n_vocab` on (vocabulary padding) are never sampled. `compile` compiles the
    one-token step, which is worthwhile for many tokens. `finished(True)` is asked whether to return once all rows have
    ended, and `finished(False)` before: ranks that share a model must take part in each other's forward passes.
    """
    check_prompts(model, prompts)
    rows = [list(prompt) for prompt in prompts]
    random = [torch.Generator().manual_seed(seed) for seed in seeds]
    active = [True] * len(rows)
    decoder = Decoder(model, max_new_tokens, compile)
    with evaluating(model):
        for _ in range(max_new_tokens):
            logits = decoder.logits(rows, active)[:, :n_vocab].float()  # (B, V)
            running = [i for i in range(len(rows)) if active[i]]
            if running:
                logits = logits if len(running) == len(rows) else logits[running]
                ids = draw(logits, [rows[i] for i in running], sampling, [random[i] for i in running])
                logprobs = logits.log_softmax(-1).gather(-1, ids.clamp(min=0)[:, None])[:, 0]
                drawn, values = torch.stack((ids.double(), logprobs.double())).tolist()  # in one transfer
                for i, token, logprob in zip(running, checked([int(id) for id in drawn]), values, strict=True):
                    rows[i].append(token)
                    active[i] = not on_token(i, token, logprob)
            if finished(not any(active)):
                break
    return rows


def check_prompts(model: GPT, prompts: list[list[int]]) -> None:
    """Raise UserError if a prompt contains a token that the model does not know."""
    if not all(prompts):
        raise ValueError("every prompt needs at least one token")
    if (largest := max(map(max, prompts), default=0)) >= model.config.vocab_size:
        raise UserError(
            f"the prompt contains token {largest}, but the model's vocabulary has {model.config.vocab_size} tokens. "
            "The tokenizer has tokens that the model does not know; leave them out."
        )


@contextlib.contextmanager
def evaluating(model: GPT):
    """Context in which the model is in evaluation mode."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


GRAPH_TOKENS = 8  # capturing a CUDA graph takes as long as a few steps


class Decoder:
    """Computes the logits after rows of tokens, with a KV cache that is refilled whenever the window of a row slides.

    The cache has room for `max_new_tokens` calls of `logits`.
    """

    def __init__(self, model: GPT, max_new_tokens: int, compile: bool = False):
        self.model, self.n_left = model, max_new_tokens
        self.one_token = torch.compile(model) if compile else model
        weight = model.transformer.wte.weight
        self.uses_graphs = weight.is_cuda and not is_sharded(weight)  # sharded weights are gathered in each pass
        self.graph: GraphedStep | None = None
        self.cache: KVCache | None = None
        self.window_starts: list[int] = []  # of each row in the cache

    def logits(self, rows: list[list[int]], active: list[bool]) -> Tensor:
        """Return the logits (B, V) of the token after each row: all ids so far. Each call adds one id per active row.

        The cache does not advance in rows that are not `active`.
        """
        windows = [context(row, self.model.config.block_size) for row in rows]
        start = [len(row) - len(window) for row, window in zip(rows, windows, strict=True)]
        if self.cache is None or start != self.window_starts:  # initially, and whenever a window slides
            self.window_starts = start
            size = min(self.model.config.block_size, max(map(len, windows)) + self.n_left)
            if self.cache is not None and self.cache.size == size and len(self.cache.length) == len(rows):
                self.cache.length.zero_()  # keeps the graph, which writes to this cache
            else:
                self.cache = self.graph = None  # frees their memory first
                self.cache = self.new_cache(len(rows), size)
            logits = prefill(self.model, self.cache, windows)
            ended = torch.tensor([not each for each in active], device=self.cache.length.device)
            self.cache.length -= ended.long()  # `decode` writes the last token of ended rows again, not behind the end
        else:
            if self.graph is not None and self.graph.cache is not self.cache:
                self.graph = None
            if self.graph is None and self.uses_graphs and self.n_left >= GRAPH_TOKENS:
                self.graph = GraphedStep(self.one_token, self.cache)
            logits = decode(self.graph or self.one_token, self.cache, [row[-1] for row in rows], active)
        self.n_left -= 1
        return logits

    def select_rows(self, rows: list[int]) -> None:
        """Continue with these rows of the cache, in this order. A row may be given several times, or left out."""
        if rows == list(range(len(self.window_starts))):
            return
        source = self.cache
        assert source is not None, "`logits` fills it first"
        target = source if len(rows) == len(self.window_starts) else self.new_cache(len(rows), source.size)
        target.copy_rows(source, torch.tensor(rows, device=source.length.device))
        self.cache = target
        self.window_starts = [self.window_starts[row] for row in rows]

    def new_cache(self, n_rows: int, size: int) -> KVCache:
        device = self.model.transformer.wte.weight.device
        return KVCache(self.model.config, n_rows, size, device, cache_dtype(self.model))


def cache_dtype(model: GPT) -> torch.dtype:
    """Return the dtype of keys and values in a cache: that of the model, but float32 on a CPU.

    There, attention over bfloat16 keys and values takes several times as long.
    """
    weight = model.transformer.wte.weight
    return torch.float32 if weight.device.type == "cpu" else weight.dtype


class GraphedStep:
    """A CUDA graph of the model's step by one token per row, for one particular cache.

    A replay launches all kernels at once. Launching them one by one takes longer than the kernels of a small model run.
    """

    def __init__(self, model: Callable, cache: KVCache):
        self.cache = cache
        device = cache.length.device
        self.idx = torch.zeros(len(cache.length), 1, dtype=torch.long, device=device)
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(3):  # compiles, and lets libraries allocate; what this writes into the cache is overwritten
                model(self.idx, cache=cache)
        torch.cuda.current_stream(device).wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        # thread_local: in a training run, the loader's thread may use the GPU at the same time
        with torch.cuda.device(device), torch.cuda.graph(self.graph, None, stream, "thread_local"):
            self.logits, _ = model(self.idx, cache=cache)

    def __call__(self, idx: Tensor, cache: KVCache) -> tuple[Tensor, None]:
        """Return the logits (B, 1, V) after idx (B, 1), like the model, and None."""
        assert cache is self.cache, "a graph writes to the addresses with which it was captured"
        self.idx.copy_(idx)
        self.graph.replay()
        return self.logits.clone(), None


def prefill(model: GPT, cache: KVCache, windows: list[list[int]]) -> Tensor:
    """Run B windows of any lengths into an empty cache in one forward pass; return the last logits (B, V) of each.

    Windows are padded on the right. Because attention is causal, no real token sees the padding.
    """
    device = cache.length.device
    lengths = torch.tensor([len(window) for window in windows], device=device)
    idx = torch.zeros(len(windows), int(lengths.max()), dtype=torch.long)
    for i, window in enumerate(windows):
        idx[i, : len(window)] = torch.tensor(window)
    logits, _ = model(idx.to(device), cache=cache, last=lengths - 1)
    cache.length += lengths
    return logits[:, 0]


def decode(model: Callable, cache: KVCache, tokens: list[int], active: list[bool]) -> Tensor:
    """Run one more token of each row through the model; return its logits (B, V). Only `active` rows advance."""
    device = cache.length.device
    logits, _ = model(torch.tensor(tokens, device=device)[:, None], cache=cache)
    cache.length += torch.tensor(active, device=device)
    return logits[:, 0]


class TextStream:
    """Decodes one row while its tokens arrive, in whole characters, and stops before a stop string.

    End-of-text tokens end the text, and so do the control tokens `ends`, such as the end of a turn. `before`: the ids
    of the prompt, see StreamDecoder.
    """

    def __init__(
        self, tokenizer, stop: Collection[str] = (), ends: Collection[int] = (), before: list[int] | None = None
    ):
        self.decoder = StreamDecoder(tokenizer, before)
        self.ends, self.stop = ends, [s for s in stop if s]
        # the start of another document ends the text too
        self.text_ends = tokenizer.ends | set(tokenizer.before_document[:1])
        self.pending = ""  # decoded text that may be the start of a stop string
        self.stopped_by: str | None = None

    def push(self, token: int) -> str:
        """Add `token`, and return the text that can be shown now. Sets `stopped_by` at the end of the text."""
        if token in self.text_ends or token in self.ends:
            self.stopped_by = "end of turn" if token in self.ends else "end of text"
            return self.finish()
        self.pending += self.decoder.push(token)
        matches = [(self.pending.find(s), s) for s in self.stop if s in self.pending]
        if matches:
            cut, self.stopped_by = min(matches)
            visible_text, self.pending = self.pending[:cut], ""
            return visible_text
        n_held = max((n for s in self.stop for n in range(1, len(s)) if self.pending.endswith(s[:n])), default=0)
        cut = len(self.pending) - n_held
        visible_text, self.pending = self.pending[:cut], self.pending[cut:]
        return visible_text

    def finish(self) -> str:
        """Return the text that was held back, without an incomplete last character."""
        visible_text, self.pending = self.pending + self.decoder.finish(), ""
        return visible_text


@dataclass
class Continuation:
    """The text that the model generated after a prompt."""

    text: str = ""
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)  # of each token, in nats
    stopped_by: str | None = None  # a stop string, "end of text" or "end of turn"; None: the limit of new tokens


def continue_texts(
    model: GPT,
    tokenizer,
    prompts: list[list[int]],
    max_new_tokens: int,
    sampling: Sampling,
    seeds: list[int],
    stop: Collection[str] = (),
    ends: Collection[int] = (),
    on_text: Callable[[int, str], None] = lambda row, piece: None,
    compile: bool = False,
    finished: Callable[[bool], bool] = bool,
    slide: bool = True,
) -> list[Continuation]:
    """Continue each prompt (token ids) with text, as one batch; see `generate` and `TextStream`.

    `on_text(row, piece)` is called with each piece of text when it is complete. Without `slide`, a row ends where the
    model would no longer see its first token.
    """
    streams = [TextStream(tokenizer, stop, ends, prompt) for prompt in prompts]
    results = [Continuation() for _ in prompts]

    def add(row: int, piece: str) -> None:
        results[row].text += piece
        on_text(row, piece)

    def on_token(row: int, token: int, logprob: float) -> bool:
        results[row].ids.append(token)
        results[row].logprobs.append(logprob)
        add(row, streams[row].push(token))
        is_full = not slide and len(prompts[row]) + len(results[row].ids) >= model.config.block_size
        return is_full or streams[row].stopped_by is not None

    generate(model, prompts, max_new_tokens, sampling, seeds, on_token, tokenizer.n_vocab, compile, finished)
    for row, stream in enumerate(streams):
        add(row, stream.finish())
        results[row].stopped_by = stream.stopped_by
    return results


def sample_text(model: GPT, tokenizer, max_new_tokens: int, seed: int, sampling: Sampling | None = None) -> str:
    """Sample a text without a prompt: from the start-of-document tokens, or from token 0 if there are none."""
    start = list(tokenizer.before_document) or [0 if tokenizer.eot is None else tokenizer.eot]
    sampling = sampling or Sampling(temperature=0.8, top_k=200)
    return continue_texts(model, tokenizer, [start], max_new_tokens, sampling, [seed])[0].text


def encode_prompt(tokenizer, text: str, control: bool = False) -> list[int]:
    """Return the ids of a prompt, with the ids that the tokenizer puts before a text, such as a BOS.

    Names of control tokens, such as `<|endoftext|>`, are encoded as text, or with `control` as these tokens. An empty
    prompt becomes an end-of-text token, which starts a document. Raises UserError for an empty prompt if the tokenizer
    has no such token, and for text that cannot be encoded.
    """
    ids, prefix = tokenizer.encode_part(text, continues=False, control=control).tolist(), list(tokenizer.before_text)
    if control and ids[: len(prefix)] == prefix:
        prefix = []  # the prompt already contains it
    if not ids and not prefix and tokenizer.eot is None:
        raise UserError("the prompt is empty, and this tokenizer has no end-of-text token to start from. Write text.")
    return prefix + ids or [tokenizer.eot]
