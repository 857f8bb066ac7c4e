"""Measure answers and multiple choice at the evaluations of a training run, as `python -m acorn.evaluate` does."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from acorn import UserError
from acorn.data.tokenizer import Tokenizer
from acorn.distributed.runtime import Runtime
from acorn.evaluation import tasks
from acorn.inference.generate import evaluating
from model import GPT

MAX_NEW_TOKENS = 128  # per answer, the default of acorn.evaluate


@dataclass
class Tasks:
    """Records that a run measures at each evaluation, already encoded. The lists are empty if no file was given."""

    choices: list[tuple[str, dict]] = field(default_factory=list)  # with the location of each record in its file
    rows: list[list[tuple[list[int], list[int]]]] = field(default_factory=list)  # of the choices of each record
    lengths: list[int] = field(default_factory=list)  # of the longest row of each record
    prompts: list[list[int]] = field(default_factory=list)
    references: list[str] = field(default_factory=list)  # the answer to each prompt


def read_tasks(
    choices: str, pairs: str, tokenizer: Tokenizer, block_size: int, log: Callable[[str], None] = print
) -> Tasks:
    """Read the files `choices` and `pairs` ("": none). Records that exceed the block size are skipped, with a note.

    Raises UserError for an invalid file, for one without a record that fits, and if a package for `pairs` is missing.
    """
    result = Tasks()
    if choices:
        located = tasks.read_choices(choices)
        rows, lengths = tasks.encode_choices(tokenizer, located)
        report_skipped(choices, located, lengths, block_size, log)
        kept = [each for each in zip(located, rows, lengths, strict=True) if each[2] <= block_size]  # each[2]: length
        result.choices, result.rows, result.lengths = map(list, zip(*kept, strict=True))
    if pairs:
        tasks.check_packages("eval_pairs")
        records = tasks.read_records(pairs, 0)
        encoded = tasks.encode_pairs(tokenizer, records)
        limit = block_size - 1  # leaves room for one token of the answer
        report_skipped(pairs, records, [len(prompt) for prompt, _ in encoded], limit, log)
        fitting = [(prompt, reference) for prompt, reference in encoded if len(prompt) <= limit]
        result.prompts, result.references = map(list, zip(*fitting, strict=True))
    return result


def report_skipped(
    path: str, records: list[tuple[str, dict]], lengths: list[int], limit: int, log: Callable[[str], None]
) -> None:
    """Log how many records exceed `limit` tokens. Raises UserError if all of them do."""
    if min(lengths) > limit:
        raise UserError(f"every record of {path} exceeds {limit} tokens. Use shorter ones, or a larger --block_size.")
    if note := tasks.skipped_note(records, lengths, limit):
        log(f"note: {note}")


def measure_tasks(
    given: Tasks, model: GPT, tokenizer: Tokenizer, dist: Runtime, batch_size: int
) -> dict[str, float | None]:
    """Return the measures of acorn.evaluate in percent: "choices/accuracy", "pairs/exact_match" and so on.

    None is the value of a measure that cannot be computed. The records are divided among the ranks; with FSDP, which
    needs every rank in each forward pass, each rank computes all. Rank 0 has all results. All ranks must call this.
    """
    first, step = (0, 1) if dist.fsdp else (dist.rank, dist.world_size)
    result = {}
    with evaluating(model):
        if given.choices:
            share = given.choices[first::step], given.rows[first::step], given.lengths[first::step]
            figures, _ = tasks.measure_choices(model, *share, dist, batch_size)
            for name, figure in figures.items():
                value = float("nan") if figure.value is None and figure.n else figure.value or 0.0
                total, n = dist.sum(torch.tensor([value * figure.n, figure.n], dtype=torch.float64)).tolist()
                result[f"choices/{key(name)}"] = total / n if total == total else None
        if given.prompts:
            prompts, references = given.prompts[first::step], given.references[first::step]
            failed: list[int] = []  # ranks
            try:
                with dist.autocast():
                    answers = tasks.greedy_answers(model, tokenizer, prompts, [], MAX_NEW_TOKENS, batch_size)
            except UserError:  # non-finite logits must not end a run here
                answers, references, failed = [], [], [dist.rank]
            answers = list(map(tasks.after_thinking, answers, references))
            if not dist.fsdp:
                answers, references = dist.gather_lists(answers), dist.gather_lists(references)
                failed = dist.gather_lists(failed)
            if dist.is_main:
                if failed:
                    answers, references = [], []  # every measure is then None
                for name, figure in tasks.measure_answers(answers, references).items():
                    result[f"pairs/{key(name)}"] = figure.value
    return result


def seconds_to_measure(given: Tasks, model: GPT, tokenizer: Tokenizer, dist: Runtime, batch_size: int) -> float:
    """Return about how long `measure_tasks` takes, from a batch of each kind per rank. All ranks must call this."""
    n, seconds = batch_size * dist.world_size, 0.0
    choices = Tasks(choices=given.choices[:n], rows=given.rows[:n], lengths=given.lengths[:n])
    prompts = Tasks(prompts=given.prompts[:n], references=given.references[:n])
    for few, count in ((choices, len(given.choices)), (prompts, len(given.prompts))):
        clock = time.perf_counter()
        measure_tasks(few, model, tokenizer, dist, batch_size)
        seconds += (time.perf_counter() - clock) * max(1, count / n)
    return seconds


def key(name: str) -> str:
    return name.replace(" ", "_")
