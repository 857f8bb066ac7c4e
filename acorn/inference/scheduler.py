"""Continuous batching: sequences of unequal length join and leave a running batch.

    scheduler = Scheduler(prepare(model))
    scheduler.submit([Sequence(prompt, 100, Sampling(), seed, on_token, on_end)])

One thread owns the model and its KV cache. Each of its steps admits waiting sequences (a prefill each) and then decodes
one token of every running sequence. A sequence's tokens do not depend on the others: it has its own prefill and random
generator, and only batch shapes are used that compute the same logits, to the bit (`equal_shapes`).
"""

import collections
import contextlib
import math
import sys
import threading
import time
import traceback
from array import array
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from acorn import UserError
from acorn.inference.cpu_decode import prepare_for_decoding
from acorn.inference.generate import Sampling, cache_dtype, checked, context, decode, draw, prefill
from model import GPT, KVCache

SIZE_STEP = 128  # tokens per row of the smallest cache
SCORED_AT_ONCE = 64  # prompt tokens whose logits are in memory at the same time
TTFT_BUCKETS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)  # seconds to the first token, for the histogram
RATE_WINDOW = 10.0  # seconds over which tokens per second are averaged


class QueueFull(Exception):
    """Too many sequences are waiting. `retry_after`: seconds, from the time that the oldest has waited."""

    def __init__(self, retry_after: int):
        super().__init__(f"the queue is full; try again in {retry_after} s")
        self.retry_after = retry_after


class Scored(NamedTuple):
    """A token with log-probabilities in nats under the unfiltered model.

    The most likely tokens at its place are in arrays, which with 20 tokens take an eighth of the memory of a list of
    pairs: a client that reads slowly can have thousands of tokens waiting for it.
    """

    id: int
    logprob: float | None = None  # None if it was not asked for, and for the first token of a prompt
    top_ids: Iterable[int] = ()
    top_logprobs: Iterable[float] = ()

    @property
    def top(self) -> list[tuple[int, float]]:
        return list(zip(self.top_ids, self.top_logprobs, strict=True))


@dataclass(eq=False)
class Sequence:
    """A prompt to continue. The scheduler's thread calls the three functions, so they must return quickly."""

    prompt: list[int]
    max_new_tokens: int
    sampling: Sampling
    seed: int
    on_token: Callable[[Scored], bool]  # called for each new token; returning True ends the sequence
    on_end: Callable[[Exception | None], None]  # called once, after the last token; not called after `cancel`
    on_prompt: Callable[[list[Scored]], None] | None = None  # called with the scored prompt, before the first token
    n_top: int | None = None  # score the tokens, with this many alternatives

    ids: list[int] = field(init=False)  # the prompt and the tokens so far
    start: int = field(init=False, default=0)  # index in `ids` of the first token that the model sees
    cache: KVCache | None = field(init=False, default=None)  # holds keys and values of this sequence in row `row`
    row: int = field(init=False, default=0)
    cancelled: bool = field(init=False, default=False)
    submitted: float = field(init=False, default=0.0)

    def __post_init__(self):
        self.ids = list(self.prompt)
        self.random = torch.Generator().manual_seed(self.seed)

    def cancel(self) -> None:
        """End the sequence before the next step. Any thread may call this."""
        self.cancelled = True


class Scheduler:
    """Runs sequences on a model in a thread of its own, which starts with the first `submit`.

    At most `max_batch` sequences run, and only as many as fit into `cache_bytes` (0: enough for max_batch whole blocks)
    if each reaches its full length. The others wait in order of arrival; with `max_queue` waiting, `submit` raises
    QueueFull. Ids from `n_vocab` on (vocabulary padding) are never sampled.

    Raises UserError if cache_bytes holds less than one block.
    """

    def __init__(
        self, model: GPT, max_batch: int = 8, max_queue: int = 64, cache_bytes: int = 0, n_vocab: int | None = None
    ):
        self.model, self.max_batch, self.max_queue, self.n_vocab = model.eval(), max_batch, max_queue, n_vocab
        cfg = model.config
        self.device = model.transformer.wte.weight.device
        self.dtype = cache_dtype(model)
        self.token_bytes = 2 * cfg.n_layer * cfg.n_kv_head * cfg.head_dim * self.dtype.itemsize
        self.row_counts, self.sizes = equal_shapes(model, max_batch, self.dtype)
        block_bytes = self.sizes[-1] * self.token_bytes
        self.cache_bytes = cache_bytes or max_batch * block_bytes
        if self.row_counts[0] * block_bytes > self.cache_bytes:
            raise UserError(
                f"a KV cache of {self.cache_bytes / 2**20:.0f} MB is too small for a block of {cfg.block_size} tokens. "
                f"Use --cache_mb={math.ceil(self.row_counts[0] * block_bytes / 2**20)} or more."
            )
        self.cache: KVCache | None = None
        self.waiting: collections.deque[Sequence] = collections.deque()
        self.running: list[Sequence] = []
        self.calls: collections.deque[tuple[Future, Callable]] = collections.deque()
        self.changed = threading.Condition()  # guards waiting, calls, thread and closing
        self.thread: threading.Thread | None = None
        self.closing = False
        # counters for `metrics`
        self.n_prompt_tokens = self.n_tokens = self.n_finished = self.n_cancelled = self.n_refused = self.n_failed = 0
        self.first_token_seconds: collections.Counter[float] = collections.Counter()  # by bucket
        self.first_token_total = 0.0
        self.recent: collections.deque[tuple[float, int]] = collections.deque()  # (time, tokens) of the last steps

    # ---- for any thread

    def submit(self, sequences: list[Sequence]) -> None:
        """Queue all sequences. Raises QueueFull if too many wait, or after `close`."""
        now = time.monotonic()
        with self.changed:
            if self.closing or len(self.waiting) >= self.max_queue:
                self.n_refused += 1
                raise QueueFull(max(1, math.ceil(now - self.waiting[0].submitted)) if self.waiting else 1)
            for sequence in sequences:
                sequence.submitted = now
            self.waiting.extend(sequences)
            self._wake()

    def call(self, function: Callable[[], object]) -> Future:
        """Call `function` between two steps, when it may use the model alone. Returns a future of its result.

        Raises QueueFull after `close`.
        """
        future: Future = Future()
        with self.changed:
            if self.closing:
                raise QueueFull(1)
            self.calls.append((future, function))
            self._wake()
        return future

    def close(self, finish: bool = True) -> None:
        """Finish all sequences, or without `finish` cancel them, and end the thread."""
        with self.changed:
            self.closing = True
            for sequence in [] if finish else [*self.waiting, *self.running]:
                sequence.cancel()
            self.changed.notify()
        if self.thread:
            self.thread.join()

    def _wake(self) -> None:
        if self.thread is None:
            self.thread = threading.Thread(target=self._run, name="scheduler", daemon=True)
            self.thread.start()
        self.changed.notify()

    # ---- the scheduler's thread

    def _run(self) -> None:
        while True:
            with self.changed:
                while not (self.waiting or self.running or self.calls or self.closing):
                    self.cache = None  # idle: free the memory
                    self.changed.wait()
                if self.closing and not (self.waiting or self.running or self.calls):
                    return
            try:
                self.step()
            except Exception as error:  # report it to the running sequences, and keep serving
                traceback.print_exc()
                for sequence in self.running:
                    self._end(sequence, error)
                self.running, self.cache = [], None

    @torch.no_grad()
    def step(self) -> None:
        """Admit sequences, and compute the next token of each running one."""
        while self.calls:
            future, function = self.calls.popleft()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(function())
            except Exception as error:
                future.set_exception(error)
        n_before = self.n_tokens
        self._admit()
        decoding = []
        for sequence in self.running:
            if not self._slide_window(sequence):
                decoding.append(sequence)
        if decoding:
            cache = self._fit_cache(decoding)
            tokens, active = [0] * len(cache.length), [False] * len(cache.length)
            for sequence in decoding:
                tokens[sequence.row], active[sequence.row] = sequence.ids[-1], True
            with row_independent_attention(self.device):
                logits = self._usable(decode(self.model, cache, tokens, active))
            for sequence in decoding:
                self._sample(sequence, logits[sequence.row])
        self._record_rate(self.n_tokens - n_before)

    def _drop_cancelled(self) -> None:
        """Drop cancelled sequences, waiting ones too, which would take places in the queue and memory."""
        with self.changed:
            running = [s for s in self.running if not s.cancelled]
            waiting = collections.deque(s for s in self.waiting if not s.cancelled)
            self.n_cancelled += len(self.running) - len(running) + len(self.waiting) - len(waiting)
            self.running, self.waiting = running, waiting

    def _admit(self) -> None:
        """Drop cancelled sequences, and start waiting ones in their order while they fit.

        Each prefill gives the first new token. While sequences run, at most one prefill is made per step. Otherwise a
        stream of new sequences could stall the running ones.
        """
        max_prefills, n_prefills, last_key = (1 if self.running else self.max_batch), 0, None
        while True:
            self._drop_cancelled()  # each time, because a prefill takes a while
            with self.changed:
                if not self.waiting or not self._has_room(self.waiting[0]):
                    return
                sequence = self.waiting[0]
                # sequences with the same prompt, such as the n choices of a request, share its prefill
                key = (tuple(sequence.prompt), sequence.on_prompt and sequence.n_top)
                if key != last_key and n_prefills == max_prefills:
                    return
                self.running.append(self.waiting.popleft())
            self.n_prompt_tokens += len(sequence.prompt)
            if key != last_key:
                prefilled, last_key, n_prefills = self._prefill(sequence), key, n_prefills + 1
            sequence.cache, logits, scores = prefilled
            if sequence.on_prompt:
                sequence.on_prompt(scores)
            if sequence.max_new_tokens == 0:
                self._end(sequence, None)
            else:
                self._sample(sequence, logits)

    def _has_room(self, sequence: Sequence) -> bool:
        """Return whether the cache has room for one more sequence if all running ones reach their full length."""
        if len(self.running) >= self.max_batch:
            return False
        longest = max(self._size(len(s.prompt) + s.max_new_tokens) for s in [*self.running, sequence])
        return self._count(len(self.running) + 1) * longest * self.token_bytes <= self.cache_bytes

    def _size(self, length: int) -> int:
        """Return the smallest size of a cache that has room for `length` tokens, or for a block."""
        return next((size for size in self.sizes if size >= length), self.sizes[-1])

    def _count(self, n_rows: int) -> int:
        """Return the smallest row count of a cache that has room for `n_rows` rows."""
        return next(count for count in self.row_counts if count >= n_rows)

    def _prefill(self, sequence: Sequence) -> tuple[KVCache, Tensor, list[Scored]]:
        """Return a cache of one row with the sequence's window, the last logits (V,), and the prompt's scores."""
        window = sequence.ids[sequence.start :]
        cache = KVCache(self.model.config, 1, len(window), self.device, self.dtype)
        if sequence.on_prompt is None or sequence.n_top is None or len(sequence.ids) > len(sequence.prompt):
            return cache, self._usable(prefill(self.model, cache, [window]))[0], []
        hidden = []  # the input of the head, for all tokens; the model itself computes only the last logits
        own_thread = threading.get_ident()  # others, such as the page's, may run the model at the same time

        def keep(module, x, y: Tensor) -> None:
            if threading.get_ident() == own_thread:
                hidden.append(y)

        hook = self.model.transformer.ln_f.register_forward_hook(keep)
        try:
            logits = self._usable(prefill(self.model, cache, [window]))[0]
        finally:
            hook.remove()
        scores = [Scored(window[0])]
        for first in range(0, len(window) - 1, SCORED_AT_ONCE):
            last = min(first + SCORED_AT_ONCE, len(window) - 1)
            logprobs = self._usable(self.model.logits(hidden[0][:, first:last])[0]).log_softmax(-1)
            scores += [score(p, id, sequence.n_top) for p, id in zip(logprobs, window[first + 1 :], strict=False)]
        return cache, logits, scores

    def _slide_window(self, sequence: Sequence) -> bool:
        """If the text no longer fits into the block, move the window, and sample from a new prefill.

        Returns whether it did so.
        """
        start = len(sequence.ids) - len(context(sequence.ids, self.model.config.block_size))
        if start == sequence.start:
            return False
        sequence.start, sequence.row = start, 0
        sequence.cache, logits, _ = self._prefill(sequence)
        self._sample(sequence, logits)
        return True

    def _fit_cache(self, sequences: list[Sequence]) -> KVCache:
        """Gather sequences in one cache with the smallest row count and with room for one more token of each."""
        n_rows = self._count(len(sequences))
        size = max(self._size(len(s.ids) - s.start) for s in sequences)
        cache = self.cache
        if cache is None or n_rows != len(cache.length) or size > cache.size:
            cache = KVCache(self.model.config, n_rows, size, self.device, self.dtype)
        free = set(range(n_rows)) - {s.row for s in sequences if s.cache is cache}
        for sequence in sequences:
            if sequence.cache is not cache:
                assert sequence.cache is not None  # it has been prefilled
                row = free.pop()
                copy_row(sequence.cache, sequence.row, cache, row)
                sequence.cache, sequence.row = cache, row
        cache.length[list(free)] = 0  # an idle row must not write behind the end of the cache
        self.cache = cache
        return cache

    def _usable(self, logits: Tensor) -> Tensor:
        return logits[:, : self.n_vocab].float()

    def _sample(self, sequence: Sequence, logits: Tensor) -> None:
        """Draw the next token from its logits (V,), report it, and end the sequence if this was the last."""
        if sequence.cancelled:
            return
        try:
            [token] = checked(draw(logits[None], [sequence.ids], sequence.sampling, [sequence.random]).tolist())
        except UserError as error:  # non-finite logits
            return self._end(sequence, error)
        if len(sequence.ids) == len(sequence.prompt):
            seconds = time.monotonic() - sequence.submitted
            self.first_token_total += seconds
            self.first_token_seconds[next((b for b in TTFT_BUCKETS if seconds <= b), math.inf)] += 1
        sequence.ids.append(token)
        self.n_tokens += 1
        scored = Scored(token)
        if sequence.n_top is not None:
            scored = score(logits.log_softmax(-1), token, sequence.n_top)
        if sequence.on_token(scored) or len(sequence.ids) == len(sequence.prompt) + sequence.max_new_tokens:
            self._end(sequence, None)

    def _end(self, sequence: Sequence, error: Exception | None) -> None:
        self.running = [s for s in self.running if s is not sequence]
        self.n_finished, self.n_failed = self.n_finished + (error is None), self.n_failed + (error is not None)
        sequence.cache = None
        sequence.on_end(error)

    # ---- figures

    def _record_rate(self, n_tokens: int) -> None:
        now = time.monotonic()
        self.recent.append((now, n_tokens))
        while self.recent[0][0] < now - RATE_WINDOW:
            self.recent.popleft()

    def metrics(self) -> str:
        """Return the figures in the text format of Prometheus."""
        now = time.monotonic()
        rate = sum(n for at, n in list(self.recent) if at >= now - RATE_WINDOW) / RATE_WINDOW
        lines = []
        for name, kind, value in (
            ("sequences_waiting", "gauge", len(self.waiting)),
            ("sequences_running", "gauge", len(self.running)),
            ("sequences_finished_total", "counter", self.n_finished),
            ("sequences_cancelled_total", "counter", self.n_cancelled),
            ("sequences_failed_total", "counter", self.n_failed),
            ("requests_refused_total", "counter", self.n_refused),
            ("prompt_tokens_total", "counter", self.n_prompt_tokens),
            ("generated_tokens_total", "counter", self.n_tokens),
            ("tokens_per_second", "gauge", rate),
        ):
            lines += [f"# TYPE acorn_{name} {kind}", f"acorn_{name} {value:.10g}"]
        name, counts, total = "acorn_time_to_first_token_seconds", dict(self.first_token_seconds), 0
        lines.append(f"# TYPE {name} histogram")
        for bucket in (*TTFT_BUCKETS, math.inf):
            total += counts.get(bucket, 0)
            lines.append(f'{name}_bucket{{le="{"+Inf" if bucket == math.inf else f"{bucket:g}"}"}} {total}')
        return "\n".join([*lines, f"{name}_sum {self.first_token_total:.10g}", f"{name}_count {total}", ""])


def score(logprobs: Tensor, token: int, n_top: int) -> Scored:
    """Return a token with its log-probability and the `n_top` most likely tokens. logprobs: (V,)"""
    if n_top == 0:
        return Scored(token, float(logprobs[token]))
    top = logprobs.topk(min(n_top, len(logprobs)))
    return Scored(token, float(logprobs[token]), array("i", top.indices.tolist()), array("f", top.values.tolist()))


def copy_row(source: KVCache, i: int, target: KVCache, j: int) -> None:
    """Copy row i of a cache into row j of another one. The rest of that row becomes zero: nothing of a sequence that
    had it before stays, not even a NaN, which a mask would let through."""
    n = int(source.length[i])
    pairs = [pair for old, new in zip(source.layers, target.layers, strict=True) for pair in zip(old, new, strict=True)]
    for old, new in pairs:  # (B, H_kv, S, D)
        new[j, :, :n] = old[i, :, :n]
        new[j, :, n:] = 0
    target.idx[j, :n], target.idx[j, n:], target.length[j] = source.idx[i, :n], 0, n


def row_independent_attention(device: torch.device) -> contextlib.AbstractContextManager:
    """Return a context in which a row's attention does not depend on its place in the batch.

    On a CPU, torch's flash attention gives each thread a buffer whose alignment decides how its products add up, so the
    last bits depend on the thread. Explicit matrix products do not, and take the same time for single tokens.
    """
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else contextlib.nullcontext()


def prepare(
    model: GPT, max_batch: int = 8, quantize: str = "none", compile: bool | str = False, n_tokens: int = 0
) -> GPT:
    """Return a model for a Scheduler with `max_batch` rows. On a CPU, `prepare_for_decoding` compiles it for batches of
    max_batch and of each smaller power of two."""
    device = model.transformer.wte.weight.device
    if device.type != "cpu":
        return model
    with row_independent_attention(device):
        return prepare_for_decoding(model, quantize, compile, max_batch, n_tokens, smaller_powers(max_batch))


def smaller_powers(n: int) -> tuple[int, ...]:
    return tuple(2**k for k in range(n.bit_length()) if 2**k < n)


def cache_sizes(block_size: int) -> list[int]:
    """Return the sizes of a growing cache: SIZE_STEP, doubled until a block fits, whose size is a multiple of the step
    too, so that the rows' memory stays aligned."""
    largest = SIZE_STEP * math.ceil(block_size / SIZE_STEP)
    return [SIZE_STEP * n for n in smaller_powers(largest // SIZE_STEP)] + [largest]


@torch.no_grad()
def equal_shapes(model: GPT, max_batch: int, dtype: torch.dtype) -> tuple[list[int], list[int]]:
    """Return the row counts and the sizes of a cache with which a row gets the same results, to the bit, as with the
    largest ones, which are always in the lists.

    Whether they agree depends on the kernels: a product with one row, for example, often adds in another order than one
    with several. So this decodes the same tokens with each shape, and in different rows. It compares logits, and the
    new keys and values of all layers, because rounding to bfloat16 hides most differences from the logits.
    """
    cfg, device = model.config, model.transformer.wte.weight.device
    prompt = [(7 * i) % cfg.vocab_size for i in range(min(40, cfg.block_size, SIZE_STEP) - 1)] or [0]
    alone = KVCache(cfg, 1, len(prompt), device, dtype)
    prefill(model, alone, [prompt])

    def results(count: int, size: int, shift: int = 0) -> list[Tensor]:
        """Return the results of max_batch tokens, with `count` at once. `shift` changes their rows."""
        cache, found = KVCache(cfg, count, size, device, dtype), [torch.empty(0)] * max_batch
        for row in range(count):
            copy_row(alone, 0, cache, row)
        for first in range(shift, max_batch + shift, count):
            tokens = [(first + row) % max_batch for row in range(count)]
            with row_independent_attention(device):
                logits = decode(model, cache, [token % cfg.vocab_size for token in tokens], [False] * count)
            new = [tensor[:, :, len(prompt)].flatten(1) for layer in cache.layers for tensor in layer]
            for row, result in enumerate(torch.cat([logits.float(), *(tensor.float() for tensor in new)], dim=1)):
                found[tokens[row]] = result
        return found

    def is_equal(count: int, size: int, shift: int = 0) -> bool:
        return all(torch.equal(*pair) for pair in zip(results(count, size, shift), expected, strict=True))

    *smaller, largest = cache_sizes(cfg.block_size)
    expected = results(max_batch, largest)
    if not is_equal(max_batch, largest, shift=max_batch // 2):
        print("note: on this device, the last bits of a row's logits depend on its place in the batch", file=sys.stderr)
    sizes = [size for size in smaller if is_equal(max_batch, size)] + [largest]
    counts = [max_batch]
    for n in sorted(smaller_powers(max_batch), reverse=True):
        if not all(is_equal(n, size) for size in sizes):
            break  # fewer rows would differ as well, even if rounding hides it from these few tokens
        counts.insert(0, n)
    return counts, sizes
