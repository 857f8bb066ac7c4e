"""Rollouts: completions that the model samples itself, and their rewards. https://arxiv.org/abs/2402.03300

The prompts come from conversations (`python prepare chat`): everything before the last reply, rendered by the chat
template. The reply is the `answer` with which the reward compares a completion. The rollouts of an update are a pure
function of the weights, the seed and the position, like the batches of the other objectives.
"""

import math
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import torch

from acorn import UserError
from acorn.data import batches, chat
from acorn.data.loader import Batch
from acorn.data.mixture import Mixture, origins
from acorn.data.shards import Tokens
from acorn.distributed.runtime import Runtime
from acorn.evaluation.loss import WINDOW_SEED
from acorn.inference.generate import Continuation, Sampling, continue_texts
from acorn.training.losses import advantages
from acorn.training.rewards import Reward, call_reward
from model import GPT

if TYPE_CHECKING:
    from train import TrainSettings


class Task(NamedTuple):
    """A prompt, and what the reward gets besides the completion."""

    ids: list[int]
    prompt: str
    answer: str


class Rollouts:
    """Samples completions from the model, in batches, and rewards them. The ranks divide the prompts among them."""

    def __init__(self, s: "TrainSettings", data: Mixture, policy: GPT, dist: Runtime, reward: Reward):
        self.s, self.data, self.policy, self.dist, self.reward = s, data, policy, dist, reward
        self.tokenizer = data.tokenizer
        self.ends = chat.stop_ids(self.tokenizer)
        self.sampling = Sampling(temperature=s.rollout_temperature)
        self.usable = {  # for each split and dataset, the conversations whose prompt leaves room for a completion
            split: [self._usable(getattr(dataset, split)) for dataset in data.datasets] for split in ("train", "val")
        }

    def _usable(self, tokens: Tokens) -> np.ndarray:
        """Return the indices of the conversations of a split whose prompt and max_new_tokens fit into block_size."""
        assert tokens.conversations is not None
        room = self.s.block_size + 1 - self.s.max_new_tokens
        fits = [len(self._split(tokens, i)[0]) <= room for i in range(len(tokens.conversations))]
        if not any(fits):
            raise UserError(
                f"no prompt of the {tokens.name} split leaves room for max_new_tokens={self.s.max_new_tokens} in "
                f"block_size={self.s.block_size}. Reduce --max_new_tokens, or use a larger --block_size."
            )
        return np.flatnonzero(fits)

    def _split(self, tokens: Tokens, conversation: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids before the last reply of a conversation, and those of the reply."""
        conversations = tokens.conversations
        assert conversations is not None
        form = conversations.first[conversation]
        ids, targets = conversations.read_form(form, int(conversations.lengths[form]))
        learned = targets != -1
        start = np.flatnonzero(np.diff(learned, prepend=False) & learned)[-1]  # of the last run of learned tokens
        return ids[:start], ids[start:][learned[start:]]

    def task(self, split: Literal["train", "val"], dataset: int, conversation: int) -> Task:
        """Return the task that a conversation of a split is."""
        tokens = getattr(self.data.datasets[dataset], split)
        ids, reply = self._split(tokens, int(self.usable[split][dataset][conversation]))
        answer = self.tokenizer.decode([id for id in reply.tolist() if id not in self.ends])
        return Task(ids.tolist(), self.tokenizer.decode(ids), chat.as_content(self.tokenizer, answer))

    def tasks(self, split: Literal["train", "val"], first: int, count: int, seed: int) -> list[Task]:
        """Return tasks first, ..., first + count - 1 of the endless shuffled stream of a split."""
        tasks = []
        for dataset, position in origins(first, count, self.data.shares):
            n = len(self.usable[split][dataset])
            tasks.append(self.task(split, dataset, int(batches.shuffled(position, 1, n, seed)[0])))
        return tasks

    def complete(
        self, tasks: list[Task], sampling: Sampling, seeds: list[int], batch_size: int
    ) -> list[tuple[Continuation, float]]:
        """Return a completion of each task and its reward. All ranks must call it with the same number of tasks."""
        results = []
        # with FSDP, every rank takes part in each forward pass, until the last rank has finished its completions
        finished = self.dist.agree if self.dist.fsdp else bool
        for first in range(0, len(tasks), batch_size):
            rows = slice(first, first + batch_size)
            with self.dist.autocast():
                completions = continue_texts(
                    self.policy,
                    self.tokenizer,
                    [task.ids for task in tasks[rows]],
                    self.s.max_new_tokens,
                    sampling,
                    seeds[rows],
                    ends=self.ends,
                    finished=finished,
                )
            for task, completion in zip(tasks[rows], completions, strict=True):
                text = chat.as_content(self.tokenizer, completion.text)
                results.append((completion, call_reward(self.reward, self.s.reward, task.prompt, text, task.answer)))
        return results

    def update(self, position: int, n_sequences: int, batch_size: int) -> tuple[list[Batch], int, dict[str, tuple]]:
        """Return this rank's micro-batches of the update at `position`, the number of their targets, and figures.

        An update consists of `n_sequences` completions in groups of group_size with the same prompt.
        """
        s, dist = self.s, self.dist
        groups = range(position // s.group_size, (position + n_sequences) // s.group_size)[dist.rank :: dist.world_size]
        group_tasks = [self.tasks("train", group, 1, s.seed)[0] for group in groups]
        tasks = [task for task in group_tasks for _ in range(s.group_size)]
        seeds = [
            (s.seed * 1_000_003 + group * s.group_size + i) % 2**63 for group in groups for i in range(s.group_size)
        ]
        results = self.complete(tasks, self.sampling, seeds, batch_size)
        rewards = torch.tensor([reward for _, reward in results], dtype=torch.float32).view(-1, s.group_size)
        weights = advantages(rewards, s.advantage_std).flatten().tolist()
        completions = [completion for completion, _ in results]
        rows = [(task.ids, each.ids, weight) for task, each, weight in zip(tasks, completions, weights, strict=True)]
        n, lengths = len(rows), [len(ids) for _, ids, _ in rows]
        figures = {
            "reward": (rewards.sum(), n),
            "clipped": (sum(each.stopped_by is None for each in completions), n),
            "no_signal": ((rewards == rewards[:, :1]).all(1).sum(), len(rewards)),
            "length": (sum(lengths), n),
        }
        micro_batches = [self.batch(rows[first : first + batch_size]) for first in range(0, n, batch_size)]
        return micro_batches, sum(lengths), figures

    def batch(self, rows: list[tuple[list[int], list[int], float]]) -> Batch:
        """Return a batch of rows (prompt, completion, advantage), in which the completions are the targets.

        It is as wide as its longest row, rounded up to a multiple of 64 so that compiled code sees few shapes.
        """
        width = max(len(prompt) + len(completion) - 1 for prompt, completion, _ in rows)
        width = min(64 * math.ceil(width / 64), self.s.block_size)
        x = torch.zeros(len(rows), width, dtype=torch.long)
        y, weights = torch.full_like(x, -1), torch.zeros(len(rows), width)
        for i, (prompt, completion, advantage) in enumerate(rows):
            ids, start = torch.tensor(prompt + completion), len(prompt) - 1
            x[i, : len(ids) - 1], y[i, start : len(ids) - 1] = ids[:-1], ids[len(prompt) :]
            weights[i, start : len(ids) - 1] = advantage
        return Batch(x, y, None, weights)

    def evaluate(self, split: Literal["train", "val"], batch_size: int, max_tasks: int) -> dict[str, tuple]:
        """Return sums and counts over this rank's part of an evaluation, in which the model completes greedily.

        Each dataset contributes `max_tasks` different tasks of a split, or, if that is 0, as many as its val split has.
        The shares weight the datasets.
        """
        drawn: list[tuple[int, int, float]] = []  # dataset, task, weight
        for k, share in enumerate(self.data.shares):
            usable = len(self.usable[split][k])
            n = min(max_tasks or len(self.usable["val"][k]), usable)
            drawn += [(k, int(i), float(share) / n) for i in batches.shuffled(0, n, usable, WINDOW_SEED)]
        total = len(drawn)
        drawn += [(*drawn[0][:2], 0.0)] * (-total % self.dist.world_size)  # the same number of tasks on all ranks
        own = drawn[self.dist.rank :: self.dist.world_size]
        tasks = [self.task(split, k, i) for k, i, _ in own]
        results = self.complete(tasks, Sampling(temperature=0.0), [0] * len(tasks), batch_size)
        values = {
            "reward": [reward for _, reward in results],
            "clipped": [completion.stopped_by is None for completion, _ in results],
            "length": [len(completion.ids) for completion, _ in results],
        }
        weights = np.array([total * weight for _, _, weight in own])
        sums = {name: float(weights @ np.array(each, dtype=float)) for name, each in values.items()}
        sums = {"loss": 0.0 - sums["reward"]} | sums  # not -sums["reward"], which would be -0.0 for 0
        return {name: (value, float(weights.sum())) for name, value in sums.items()}
