"""Continuous batching: each sequence gets the tokens that it gets alone, whatever runs, joins and leaves beside it."""

import threading

import pytest
import torch

from acorn import UserError
from acorn.inference import scheduler as schedulers
from acorn.inference.generate import Sampling, generate
from acorn.inference.scheduler import QueueFull, Scheduler, Sequence, prepare
from model import GPT, GPTConfig

SHAPES = [
    dict(),
    dict(pos="rope", mlp="swiglu", norm="rmsnorm", n_kv_head=1, bias=False, tie_weights=False),
    dict(ngram=3, pos="sinusoidal"),
]


def make_model(**changes) -> GPT:
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**dict(block_size=48, vocab_size=61, n_layer=2, n_head=2, n_embd=32), **changes}))
    for p in model.parameters():
        p.data += 0.3 * torch.randn_like(p)  # confident logits
    return model.eval()


class Job:
    """A sequence that collects what it gets."""

    def __init__(self, prompt, n_new, sampling=None, seed=0, n_top=2, at_token=None, **more):
        self.scored, self.error, self.ended, self.at_token = [], None, threading.Event(), at_token or {}
        sampling = sampling or Sampling(temperature=0)
        self.sequence = Sequence(prompt, n_new, sampling, seed, self.on_token, self.on_end, n_top=n_top, **more)

    def on_token(self, scored) -> bool:
        self.scored.append(scored)
        return bool(self.at_token.get(len(self.scored), lambda: False)())

    def on_end(self, error) -> None:
        self.error = error
        self.ended.set()

    def result(self):
        assert self.ended.wait(30)
        return self.scored

    def ids(self) -> list[int]:
        return [scored.id for scored in self.result()]


def jobs_of_unequal_length() -> list[dict]:
    greedy, warm = Sampling(temperature=0), Sampling(temperature=1.3, top_k=30, top_p=0.95)
    lengths = [(1, 20), (45, 25), (7, 5), (33, 1), (2, 60), (30, 9), (48, 8), (5, 30), (12, 12), (3, 17), (20, 22)]
    return [
        dict(prompt=[(7 * i + 3 * j) % 61 for j in range(n)], n_new=n_new, sampling=warm if i % 2 else greedy, seed=i)
        for i, (n, n_new) in enumerate(lengths)
    ]


def staggered(scheduler: Scheduler, arguments: list[dict]) -> list[Job]:
    """Run jobs, each started after an earlier one has made some tokens, so that they join and leave a running batch."""
    jobs = [Job(**each) for each in arguments]
    for i, job in enumerate(jobs[1:], 1):
        before = jobs[(i - 1) // 2]  # two start with each
        at = max(1, (i % 2) * (before.sequence.max_new_tokens // 2))
        earlier = before.at_token.get(at, lambda: None)
        before.at_token[at] = lambda job=job, earlier=earlier: scheduler.submit([job.sequence]) or earlier()
    scheduler.submit([jobs[0].sequence])
    for job in jobs:
        job.result()
    return jobs


@pytest.mark.parametrize("changes", SHAPES, ids=["gpt2", "llama", "ngram"])
def test_each_sequence_gets_the_tokens_and_logprobs_that_it_gets_alone(changes, monkeypatch):
    """Alone: to the bit. The sampling loop of sample.py: the same tokens."""
    monkeypatch.setattr("acorn.inference.scheduler.SIZE_STEP", 16)  # the cache grows several times
    model = prepare(make_model(**changes))
    scheduler = Scheduler(model, n_vocab=60)
    together = staggered(scheduler, jobs_of_unequal_length())
    for arguments, job in zip(jobs_of_unequal_length(), together, strict=True):
        alone = Job(**arguments)
        scheduler.submit([alone.sequence])
        assert alone.result() == job.result() and len(job.scored) == arguments["n_new"]
        prompt, n_new, sampling, seed = arguments.values()
        (row,) = generate(model, [prompt], n_new, sampling, [seed], lambda *_: False, 60)
        assert row == prompt + job.ids()
    scheduler.close()


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.parametrize("compile", [True, False])
@pytest.mark.parametrize(("dtype", "quantize"), [("float32", "none"), ("bfloat16", "none"), ("float32", "int8")])
def test_two_threads_too(dtype, quantize, compile, two_threads):
    """Threads share the rows of a batch."""
    torch._dynamo.reset()  # what earlier tests compiled counts towards a limit
    model = make_model(n_embd=256, n_head=4).to(getattr(torch, dtype))
    scheduler = Scheduler(prepare(model, 8, quantize, compile))
    assert len(scheduler.row_counts) > 1 or not compile  # compiled kernels add in the same order for several rows
    together = staggered(scheduler, jobs_of_unequal_length())
    for arguments, job in zip(jobs_of_unequal_length(), together, strict=True):
        alone = Job(**arguments)
        scheduler.submit([alone.sequence])
        assert alone.result() == job.result()
    scheduler.close()


def test_batches_smaller_than_one_with_other_bits_are_not_used(monkeypatch):
    """Fewer rows would differ too, although rounding may hide it from the few tokens that are compared."""

    def other_bits_for_two(model, cache, tokens, *rest):
        for tensor in (tensor for layer in cache.layers for tensor in layer):
            tensor.zero_()  # the new keys and values
        return torch.full((len(tokens), 61), float(len(tokens) == 2))

    monkeypatch.setattr(schedulers, "decode", other_bits_for_two)
    assert schedulers.equal_shapes(make_model(), 8, torch.float32)[0] == [4, 8]


def test_prompt_scores_are_the_models():
    model = make_model()
    scheduler, prompt, scores = Scheduler(model), [(5 * i) % 61 for i in range(48)], []
    job = Job(prompt, 1, on_prompt=scores.extend)
    scheduler.submit([job.sequence])
    job.result()
    idx = torch.tensor([prompt + job.ids()])  # one token more than the block, the last target
    logprobs = model.double()(idx[:, :-1], idx[:, 1:])[0][0].log_softmax(-1)
    expected = logprobs.gather(1, idx[0, 1:, None])[:, 0].tolist()
    assert [s.id for s in scores] == prompt and scores[0].logprob is None and scores[0].top == []
    assert [s.logprob for s in scores[1:] + job.scored] == pytest.approx(expected, abs=1e-4)
    for scored, row in zip(scores[1:] + job.scored, logprobs, strict=True):
        assert [i for i, _ in scored.top] == row.topk(2).indices.tolist()
    scheduler.close()


def test_prompt_scores_are_those_of_the_prompt_while_another_thread_runs_the_model():
    """As the page's /inside does."""
    model = make_model()
    scheduler, scores = Scheduler(model), []

    def look(module, x, y) -> None:
        if threading.current_thread() is scheduler.thread:
            other = threading.Thread(target=model, args=(torch.tensor([[5, 6, 7]]),))
            other.start()
            other.join()

    for interrupted in (False, True):
        hook = model.transformer.h[0].register_forward_hook(look) if interrupted else None
        scores.append([])
        job = Job([3, 1, 4, 1, 5], 1, on_prompt=scores[-1].extend)
        scheduler.submit([job.sequence])
        job.result()
    hook.remove()
    assert len(scores[0]) == 5 and scores[0] == scores[1]
    scheduler.close()


def test_a_cancelled_sequence_gives_its_row_to_the_next_at_once():
    scheduler = Scheduler(make_model(), max_batch=1)
    first, second = Job([1], 10**6), Job([2], 3)
    waiting = Job([3], 10**6)
    first.at_token[5] = lambda: scheduler.submit([waiting.sequence, second.sequence])
    first.at_token[9] = lambda: first.sequence.cancel() or waiting.sequence.cancel()
    scheduler.submit([first.sequence])
    assert len(second.result()) == 3 and len(first.scored) == 9 and not waiting.scored
    assert not first.ended.is_set() and scheduler.n_cancelled == 2
    scheduler.close()


def test_short_sequences_that_arrive_do_not_hold_up_one_that_runs():
    scheduler, order = Scheduler(make_model(), max_batch=8), []
    note = lambda name: {i: lambda: order.append(name) for i in range(1, 50)}  # noqa: E731
    short = [Job([2, i], 1, at_token=note("short")) for i in range(20)]
    long = Job([1], 40, at_token=note("long") | {2: lambda: scheduler.submit([job.sequence for job in short])})
    scheduler.submit([long.sequence])
    assert len(long.result()) == 40 and all(len(job.result()) == 1 for job in short)
    assert order == ["long", *["short", "long"] * 20, *["long"] * 18]
    scheduler.close()


def test_a_full_queue_refuses_and_what_was_accepted_ends():
    scheduler = Scheduler(make_model(), max_batch=2, max_queue=3)
    go = threading.Event()
    running = [Job([1], 4, at_token={1: lambda: not go.wait(30)}) for _ in range(2)]
    scheduler.submit([running[0].sequence])
    scheduler.submit([running[1].sequence])
    accepted = [Job([i], 5) for i in range(3)]
    scheduler.submit([job.sequence for job in accepted])
    with pytest.raises(QueueFull) as full:
        scheduler.submit([Job([1], 1).sequence])
    assert full.value.retry_after >= 1
    go.set()
    scheduler.close()  # finishes what was accepted
    assert [len(job.scored) for job in running + accepted] == [4, 4, 5, 5, 5]
    with pytest.raises(QueueFull):
        scheduler.submit([Job([1], 1).sequence])


def test_closing_without_finishing_cancels_what_runs_and_waits():
    scheduler = Scheduler(make_model(), max_batch=1)
    running, waiting = Job([1], 10**6), Job([2], 10**6)
    started = threading.Event()
    running.at_token[3] = started.set
    scheduler.submit([running.sequence, waiting.sequence])
    assert started.wait(30)
    scheduler.close(finish=False)
    assert scheduler.n_cancelled == 2 and not scheduler.thread.is_alive()
    assert not running.ended.is_set() and not waiting.scored


def test_only_as_many_sequences_run_as_the_cache_holds():
    model = make_model(block_size=256)
    token_bytes = 2 * 2 * 32 * 4  # keys and values, layers, channels, float32
    scheduler = Scheduler(model, max_batch=8, cache_bytes=8 * 128 * token_bytes)
    peak = {}

    def watch(kind):
        def note():
            peak[kind] = max(peak.get(kind, 0), len(scheduler.running))
            if scheduler.cache:
                taken = sum(t.nbytes for layer in scheduler.cache.layers for t in layer)
                assert taken <= scheduler.cache_bytes

        return dict.fromkeys(range(1, 200), note)

    for kind, n_new in ("short", 60), ("long", 140):
        jobs = [Job([1], n_new, at_token=watch(kind)) for _ in range(8)]
        scheduler.submit([job.sequence for job in jobs])
        for job in jobs:
            assert len(job.result()) == n_new
    assert peak["short"] == 8 and 1 <= peak["long"] <= 4
    scheduler.close()
    with pytest.raises(UserError, match="cache_mb"):
        Scheduler(model, cache_bytes=1000)


def test_a_broken_row_ends_alone():
    """A token whose embedding is NaN ends its own sequence; rows beside it, and those after it in its place, go on."""
    model = make_model()
    expected = generate(model, [[1, 2]], 30, Sampling(temperature=0), [0], lambda *_: False)[0][2:]
    with torch.no_grad():
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())  # untied
        model.transformer.wte.weight[7] = torch.nan
    scheduler = Scheduler(model, max_batch=2)
    if 7 in expected:
        pytest.skip("the greedy text contains the broken token")
    jobs = [Job([1, 2], 30), Job([1, 7], 30), Job([1, 2], 30), Job([7], 30), Job([1, 2], 30)]
    scheduler.submit([job.sequence for job in jobs])
    assert [job.ids() for job in jobs] == [expected, [], expected, [], expected]
    assert [isinstance(job.error, UserError) for job in jobs] == [False, True, False, True, False]
    scheduler.close()


def test_a_call_has_the_model_for_itself_and_a_bug_in_it_reaches_the_caller():
    scheduler = Scheduler(make_model())
    assert scheduler.call(lambda: scheduler.model.num_params()).result(10) == scheduler.model.num_params()
    with pytest.raises(ZeroDivisionError):
        scheduler.call(lambda: 1 / 0).result(10)
    started, go = threading.Event(), threading.Event()
    scheduler.call(lambda: (started.set(), go.wait(30)))
    assert started.wait(30)
    job, call = Job([1], 3), scheduler.call(lambda: 1)
    assert call.cancel()
    scheduler.submit([job.sequence])
    go.set()
    assert len(job.result()) == 3 and job.error is None
    scheduler.close()
    with pytest.raises(QueueFull):
        scheduler.call(lambda: 1)
