"""Beam search: find likely texts, instead of sampling them.

A search keeps the `num_beams` most likely beginnings (beams) of a text. Each step extends them by every token, and
keeps the most likely results. Ids and scores equal those of transformers' beam search. Length normalization is
discussed in https://arxiv.org/abs/1609.08144, section 7.
"""

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from acorn import UserError
from acorn.inference.generate import (
    Decoder,
    TextStream,
    ban_repeated_ngrams,
    check_finite,
    check_prompts,
    encode_prompt,
    evaluating,
    penalize_repetition,
)
from model import GPT

if TYPE_CHECKING:
    from sample import SampleSettings


class Beam(NamedTuple):
    """A continuation of a prompt."""

    ids: list[int]  # the new tokens, with the end token if there is one
    logprobs: list[float]  # log-probability of each token, in nats, under the model alone
    total: float  # sum of the log-probabilities after the repetition filters; -inf marks an unused row
    score: float = -math.inf  # of a finished beam: total / len(ids) ** length_penalty


@dataclass
class Rules:
    """What ends a beam, and what ends a search.

    A beam is finished by a token in `ends`, by `is_stopped` (called with its new ids), or by `max_new_tokens`. Once
    there are num_beams finished beams, `early_stopping` decides when the search ends. True: at once. False: when the
    score that the best running beam would have now does not exceed the lowest one of the finished beams. "never": when
    no longer beam can exceed it.
    """

    num_beams: int
    max_new_tokens: int
    length_penalty: float = 1.0  # above 0: favors long texts; 0: no normalization; below 0: favors short texts
    early_stopping: Literal[True, False, "never"] = False
    ends: Collection[int] = ()
    is_stopped: Callable[[list[int]], bool] = lambda ids: False


@dataclass
class Search:
    """The search for continuations of one prompt."""

    running: list[Beam] = field(default_factory=lambda: [Beam([], [], 0.0, 0.0)])  # the most likely first
    finished: list[Beam] = field(default_factory=list)  # the highest score first
    done: bool = False

    def extend(self, candidates: list[tuple[Beam, int]], rules: Rules) -> list[int]:
        """Take the beams of the next step from the candidates, the most likely first.

        Each candidate is a beam with the index of its parent in `running`. There will be `num_beams` running beams.
        Returns the index of each one's parent.
        """
        n = len(candidates[0][0].ids)
        kept: list[tuple[Beam, int]] = []
        for rank, (beam, parent) in enumerate(candidates):
            if n == rules.max_new_tokens or beam.ids[-1] in rules.ends or rules.is_stopped(beam.ids):
                if rank < rules.num_beams:  # a less likely one has num_beams better rivals
                    self.finished.append(beam._replace(score=beam.total / n**rules.length_penalty))
            elif len(kept) < rules.num_beams:
                kept.append((beam, parent))
        self.finished = sorted(self.finished, key=lambda beam: -beam.score)[: rules.num_beams]
        self.done = not kept
        if kept and len(self.finished) == rules.num_beams:
            longest = rules.early_stopping == "never" and rules.length_penalty > 0
            best = kept[0][0].total / (rules.max_new_tokens if longest else n) ** rules.length_penalty
            self.done = rules.early_stopping is True or best <= self.finished[-1].score
        kept = kept or candidates[:1]
        unused = kept[0][0]._replace(total=-math.inf), kept[0][1]
        kept += [unused] * (rules.num_beams - len(kept))  # all prompts need the same number of rows
        self.running = [beam for beam, _ in kept]
        return [parent for _, parent in kept]


@torch.no_grad()
def beam_search(
    model: GPT,
    prompts: list[list[int]],
    rules: Rules,
    repetition_penalty: float = 1.0,
    no_repeat_ngram_size: int = 0,
    n_vocab: int | None = None,
    compile: bool = False,
) -> list[list[Beam]]:
    """Return up to `num_beams` finished continuations of each prompt (ids, of any lengths), the highest score first.

    The results do not depend on the other prompts. The filters are those of `Sampling`, applied to log-probabilities;
    `n_vocab` and `compile` are those of `generate`.
    """
    check_prompts(model, prompts)
    searches = [Search() for _ in prompts]
    decoder = Decoder(model, rules.max_new_tokens, compile)
    n_candidates = rules.num_beams * max(2, 1 + len(rules.ends))  # at least num_beams do not end with an end token
    for _ in range(rules.max_new_tokens):
        n_rows = len(searches[0].running)  # of each prompt: 1 in the first step, num_beams later
        beams = [beam for search in searches for beam in search.running]
        rows = [prompt + beam.ids for prompt, search in zip(prompts, searches, strict=True) for beam in search.running]
        active = [not search.done for search in searches for _ in range(n_rows)]
        with evaluating(model):
            logits = decoder.logits(rows, active)[:, :n_vocab].float()  # (prompts * n_rows, V)
        check_finite(logits)
        logprobs = logits.log_softmax(-1)
        filtered = filter_repetition(logprobs, rows, repetition_penalty, no_repeat_ngram_size)
        totals = filtered + torch.tensor([beam.total for beam in beams], device=logits.device)[:, None]
        totals = totals.view(len(prompts), -1)  # (prompts, n_rows * V)
        best, places = totals.topk(min(n_candidates, totals.size(1)))  # (prompts, candidates)
        best_logprobs = logprobs.view(len(prompts), -1).gather(1, places)

        parents: list[int] = []  # for each row of the next step, the row of this step that it extends
        for i, search in enumerate(searches):
            if search.done:
                parents += range(i * n_rows, (i + 1) * n_rows)
                continue
            candidates = []
            for total, place, logprob in zip(*(x[i].tolist() for x in (best, places, best_logprobs)), strict=True):
                parent, token = divmod(place, logits.size(1))
                beam = search.running[parent]
                if total > -math.inf:
                    candidates.append((Beam([*beam.ids, token], [*beam.logprobs, logprob], total), parent))
            parents += [i * n_rows + parent for parent in search.extend(candidates, rules)]
        if all(search.done for search in searches):
            break
        decoder.select_rows(parents)
    return [search.finished if rules.max_new_tokens else search.running for search in searches]


def filter_repetition(logprobs: Tensor, rows: list[list[int]], penalty: float, n: int) -> Tensor:
    """Apply `penalize_repetition` and `ban_repeated_ngrams` to log-probabilities (B, V) of the tokens after `rows`."""
    if penalty == 1 and not n:
        return logprobs
    filtered = []
    for each, row in zip(logprobs, rows, strict=True):
        each = penalize_repetition(each, row, penalty) if penalty != 1 else each
        filtered.append(ban_repeated_ngrams(each, row, n) if n else each)
    return torch.stack(filtered)


def check(s: "SampleSettings", given: dict) -> None:
    """Raise UserError for settings of beam search that exclude settings which the user gave."""
    if s.num_beams == 1:
        for name in ("length_penalty", "early_stopping"):
            if name in given:
                raise UserError(f"{name} belongs to beam search. Add --num_beams=4, or leave {name} out.")
        return
    for name in ("temperature", "top_k", "top_p", "min_p", "seed"):
        if name in given and not (name == "temperature" and s.temperature == 0):
            raise UserError(f"num_beams = {s.num_beams} searches, and does not sample. Leave out {name} or num_beams.")
    if s.chat:
        raise UserError("chat samples its replies. Leave out num_beams or chat.")
    if s.stream is True:
        raise UserError("beam search knows its text only at the end. Leave out stream or num_beams.")
    if "num_samples" in given and s.num_samples > s.num_beams:
        raise UserError(
            f"num_samples = {s.num_samples} exceeds num_beams = {s.num_beams}. Use --num_beams={s.num_samples}."
        )


def continue_prompts(
    model: GPT, tokenizer, prompts: list[str], control: bool, num_samples: int, s: "SampleSettings", compile: bool
) -> list[dict]:
    """Search for the `num_samples` best continuations of each prompt, in one batch, the best of a prompt first.

    `control`: names of control tokens in the prompts are these tokens. Returns a dict for each: prompt, text, score,
    number of tokens, why it stopped, and, if asked for, the tokens with their log-probabilities.
    """

    def read(ids: list[int], before: list[int] | None = None) -> tuple[str, str | None]:
        """Return the text of the ids after the prompt `before`, and what stopped it."""
        stream = TextStream(tokenizer, s.stop, before=before)
        text = "".join(stream.push(token) for token in ids)
        return text + stream.finish(), stream.stopped_by

    ends = TextStream(tokenizer).text_ends
    rules = Rules(s.num_beams, s.max_new_tokens, s.length_penalty, s.early_stopping, ends)
    if s.stop:
        rules.is_stopped = lambda ids: read(ids)[1] is not None
    encoded = [encode_prompt(tokenizer, prompt, control) for prompt in prompts]
    filters = s.repetition_penalty, s.no_repeat_ngram_size
    found = beam_search(model, encoded, rules, *filters, tokenizer.n_vocab, compile)
    samples = []
    for prompt, before, beams in zip(prompts, encoded, found, strict=True):
        for beam in beams[:num_samples]:
            text, stopped_by = read(beam.ids, before)
            sample = dict(prompt=prompt, text=text, score=round(beam.score, 5), n_tokens=len(beam.ids))
            sample["stopped_by"] = stopped_by or "max_new_tokens"
            if s.logprobs:
                sample["ids"] = beam.ids
                sample["tokens"] = [tokenizer.decode_bytes([token]).decode(errors="replace") for token in beam.ids]
                sample["logprobs"] = [round(logprob, 5) for logprob in beam.logprobs]
            samples.append(sample)
    return samples
