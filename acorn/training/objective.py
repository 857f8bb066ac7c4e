"""What a run minimizes: the loss of a batch with its figures, and the frozen model that some losses compare with."""

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from acorn import UserError, checkpoint
from acorn.data.loader import Batch
from acorn.data.mixture import Mixture
from acorn.data.tokenizer import tokenizer_hash
from acorn.distributed import sharding
from acorn.distributed.runtime import Runtime
from acorn.evaluation.loss import evaluate_mixture, read_batches, windows_to_read
from acorn.inference.generate import evaluating
from acorn.training import lora, losses
from acorn.training.rewards import call_reward, load_reward
from acorn.training.rollouts import Rollouts
from acorn.training.start import has_reference, materialize
from model import GPT

if TYPE_CHECKING:
    from train import TrainSettings

FIGURES = {  # what each objective reports, besides the loss
    "tokens": (),
    "dpo": ("accuracy", "margin", "chosen_reward", "rejected_reward"),
    "distill": ("kl", "token_loss"),
    "grpo": ("reward", "clipped", "no_signal", "length", "entropy"),
}


class Objective:
    """The loss of a run, chosen by the setting `objective`.

    `policy` is the model that is trained, without DDP's wrapper. `frozen` is the teacher, or the reference of
    preferences and rewards, which is None if it is the policy without its adapters. `hashes` identifies the frozen
    model and the reward, for resuming. `rollouts` samples the completions of GRPO.
    """

    def __init__(
        self,
        s: "TrainSettings",
        data: Mixture,
        policy: GPT,
        dist: Runtime,
        frozen: GPT | None = None,
        rollouts: Rollouts | None = None,
        hashes: dict[str, str] | None = None,
    ):
        self.s, self.data, self.kind, self.policy, self.dist = s, data, s.objective, policy, dist
        self.frozen, self.rollouts, self.hashes = frozen, rollouts, hashes or {}
        if self.kind not in FIGURES:
            raise UserError(f"objective={self.kind!r} has no entry in FIGURES (acorn/training/objective.py). Add one.")
        self.names = ("loss", *FIGURES[self.kind]) if FIGURES[self.kind] else ()

    def loss(self, model: torch.nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the loss of a batch, summed over its targets or pairs, and its figures.

        `model` is the policy, possibly compiled or wrapped by DDP. The figures (K, 2) are a sum and a count for each of
        `names`: they can be added up over batches and ranks.
        """
        x, y, documents, advantage = batch
        if self.kind == "tokens":
            return model(x, y, reduction="sum", documents=documents)[1], self.no_figures()
        if self.kind == "dpo":
            return self.preference_loss(model, x, y, documents)
        if self.kind == "distill":
            return self.distillation_loss(model, x, y, documents)
        if self.kind == "grpo":
            return self.policy_gradient_loss(model, x, y, advantage)
        raise UserError(
            f"objective={self.kind!r} has no branch in Objective.loss (acorn/training/objective.py). Add one."
        )

    def preference_loss(
        self, model: torch.nn.Module, x: Tensor, y: Tensor, documents: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return the sum of the preference loss over pairs, and its figures."""
        assert documents is not None, "rows of pairs number them"
        s, options = self.s, dict(per_token=losses.log_probability, per_token_args=(y,), documents=documents)
        reference = None if s.preference_loss == "simpo" else self.reference_logp(x, options)
        logp = model(x, **options)[1][..., 0]  # (B, T)
        loss, rewards, is_pair = losses.preference_loss(
            logp, reference, y, documents, s.preference_loss, s.dpo_beta, s.label_smoothing, s.simpo_gamma
        )
        chosen, rejected = (rewards * is_pair[..., None]).unbind(-1)
        figures = {"accuracy": chosen > rejected, "margin": chosen - rejected}
        figures |= {"loss": loss, "chosen_reward": chosen, "rejected_reward": rejected}
        return loss.sum(), self.figures({name: (values.sum(), is_pair.sum()) for name, values in figures.items()})

    def distillation_loss(self, model: torch.nn.Module, x: Tensor, y: Tensor, documents) -> tuple[Tensor, Tensor]:
        """Return the sum of token loss and divergence from the teacher over targets, weighted, and their figures."""
        weight, temperature = self.s.distill_weight, self.s.distill_temperature
        assert self.frozen is not None
        with torch.no_grad():
            hidden = self.frozen(x, per_token=losses.hidden, documents=documents)[1]  # (B, T, C)
        per_token = functools.partial(losses.divergence, self.frozen, self.data.vocab_size, temperature)
        kl, nats = model(x, per_token=per_token, per_token_args=(hidden, y), documents=documents)[1].sum((0, 1))
        # the gradient of the divergence is proportional to 1 / temperature^2
        loss, n = (1 - weight) * nats + weight * temperature**2 * kl, (y != -1).sum()
        return loss, self.figures({"loss": (loss, n), "kl": (kl, n), "token_loss": (nats, n)})

    def policy_gradient_loss(
        self, model: torch.nn.Module, x: Tensor, y: Tensor, advantage: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return the sum of GRPO's loss over the tokens of completions, and its figures."""
        assert advantage is not None, "Rollouts.batch sets it"
        n_vocab, temperature = self.data.tokenizer.n_vocab, self.s.rollout_temperature
        per_token = functools.partial(losses.log_probability_and_entropy, n_vocab, temperature)
        options = dict(per_token=per_token, per_token_args=(y,))
        reference = self.reference_logp(x, options) if self.s.kl_beta else None
        logp, entropy = model(x, **options)[1].unbind(-1)  # (B, T)
        loss, n = losses.grpo_loss(logp, advantage, reference, self.s.kl_beta).sum(), (y != -1).sum()
        return loss, self.figures({"loss": (loss, n), "entropy": (entropy.sum(), n)})

    def figures(self, values: dict[str, tuple]) -> Tensor:
        """Return figures from a sum and a count for some of the `names`."""
        result = self.no_figures()
        for name, pair in values.items():
            for column, value in enumerate(pair):
                result[self.names.index(name), column] = value.detach() if isinstance(value, Tensor) else value
        return result

    @torch.no_grad()
    def reference_logp(self, x: Tensor, options: dict) -> Tensor:
        """Return the log-probabilities (B, T) of the targets under the reference.

        `options` are those of the policy's forward pass. The first value of their `per_token` is the log-probability.
        """
        if self.frozen is not None:
            return self.frozen(x, **options)[1][..., 0]
        with evaluating(self.policy), lora.adapters_off(self.policy):
            return self.policy(x, **options)[1][..., 0]

    def no_figures(self) -> Tensor:
        """Return the figures of no batch: zeros (K, 2)."""
        return torch.zeros(len(self.names), 2, device=self.dist.device)

    def means(self, figures: Tensor) -> dict[str, float]:
        """Return the mean of each figure over all ranks, by name. All ranks must call it."""
        if not self.names:
            return {}
        sums, counts = self.dist.sum(figures.clone()).double().cpu().unbind(1)
        return dict(zip(self.names, (sums / counts.clamp(min=1)).tolist(), strict=True))

    @torch.no_grad()
    def evaluate(
        self,
        data: Mixture,
        split: Literal["train", "val"],
        batch_size: int,
        block_size: int,
        max_windows: int,
        token_bytes: np.ndarray,
    ) -> dict[str, float]:
        """Return the "loss" of a split and further figures by name. For the arguments see `evaluate_mixture`."""
        if self.kind == "tokens":
            return evaluate_mixture(
                self.policy, data, split, self.dist, batch_size, block_size, max_windows, token_bytes
            )
        if self.rollouts is not None:
            values = self.rollouts.evaluate(split, batch_size, max_windows)
            means = self.means(self.figures(values))
            return {name: means[name] for name in values}
        weighted = self.no_figures().double().cpu()
        with evaluating(self.policy):
            for dataset, share in zip(data.datasets, data.shares, strict=True):
                n = windows_to_read(dataset, split, block_size, max_windows)
                figures, total = self.no_figures(), torch.zeros((), dtype=torch.float64)
                for batch, n_rows in read_batches(getattr(dataset, split), self.dist, batch_size, block_size, n):
                    if not n_rows:  # a dummy row
                        batch.y.fill_(-1)
                    total += n_rows
                    with self.dist.autocast():
                        figures += self.loss(self.policy, batch.to(self.dist.device))[1]
                # the shares are those of rows, as in training
                weighted += float(share) / self.dist.sum(total) * self.dist.sum(figures).double().cpu()
        sums, counts = weighted.unbind(1)
        return dict(zip(self.names, torch.where(counts > 0, sums / counts, 0).tolist(), strict=True))

    def trial_batch(self, batch_size: int, block_size: int, has_documents: bool) -> Batch:
        """Return a batch of zeros, for which the loss takes as much memory as for any other."""
        x = torch.zeros(batch_size, block_size, dtype=torch.long, device=self.dist.device)
        documents = x.clone() if has_documents and self.kind != "grpo" else None
        if self.kind == "dpo" and documents is not None:
            documents[:, block_size // 2 :] = 1
        return Batch(x, x.clone(), documents, x.float() if self.kind == "grpo" else None)

    def frozen_bytes(self) -> int:
        """Return the bytes of the frozen model on this rank."""
        return 0 if self.frozen is None else sum(sharding.local(p).nbytes for p in self.frozen.parameters())


def start_objective(s: "TrainSettings", data: Mixture, policy: GPT, saved: dict, dist: Runtime) -> Objective:
    """Return the objective of a run, and open its frozen model.

    `saved` is the state.json of a resumed run. The setting that names the frozen model becomes its absolute path.
    Raises UserError if data or models do not fit the objective, or if the frozen model is not the one of the run.
    """
    check_data(s, data)
    hashes, frozen, rollouts = {}, None, None
    if has_reference(s) and not s.lora_rank:
        s.reference, frozen, hashes["reference"] = open_frozen(s, s.reference or s.init_from, "reference", data, dist)
    if s.objective == "distill":
        s.teacher, frozen, hashes["teacher"] = open_frozen(s, s.teacher, "teacher", data, dist)
    if s.objective == "grpo":
        n_groups = s.gradient_accumulation_steps * s.batch_size // s.group_size
        if n_groups % dist.world_size:
            more = s.gradient_accumulation_steps * dist.world_size
            raise UserError(
                f"an update has {n_groups} groups of {s.group_size} completions, which {dist.world_size} processes "
                f"cannot share evenly. Use --gradient_accumulation_steps={more}."
            )
        reward, hashes["reward"] = load_reward(s.reward, vars(s))
        rollouts = Rollouts(s, data, policy, dist, reward)
        task = rollouts.task("train", 0, 0)
        call_reward(reward, s.reward, task.prompt, task.answer, task.answer)  # fails before the run writes anything
    for setting, sha256 in hashes.items():
        if (saved.get("objective") or {}).get(setting, sha256) != sha256:
            raise UserError(
                f"{setting}={getattr(s, setting)} differs in content from the {setting} with which this run started. "
                f"Give the original with --{setting}=..., or start a new run with --init_from={s.out_dir}."
            )
    return Objective(s, data, policy, dist, frozen, rollouts, hashes)


def check_data(s: "TrainSettings", data: Mixture) -> None:
    """Raise UserError if the data does not have the form that the objective needs."""
    for dataset in data.datasets:
        pairs = dataset.train.conversations is not None and dataset.train.conversations.pairs
        if s.objective == "dpo" and not pairs:
            raise UserError(
                f"objective=dpo needs pairs of answers, but {dataset.path} has none. Prepare some: python prepare "
                "preferences FILES --tokenizer CHECKPOINT"
            )
        if s.objective != "dpo" and pairs:
            raise UserError(
                f"{dataset.path} holds pairs of a chosen and a rejected answer, and objective={s.objective} would "
                "learn both. Use --objective=dpo."
            )
        if s.objective == "grpo" and dataset.train.conversations is None:
            raise UserError(
                f"objective=grpo needs prompts with answers, rendered by a chat template, but {dataset.path} is text. "
                "Prepare some: python prepare chat FILES --tokenizer CHECKPOINT"
            )


def open_frozen(s: "TrainSettings", source: str, setting: str, data: Mixture, dist: Runtime) -> tuple[str, GPT, str]:
    """Open the frozen model that the `setting` names. Returns its absolute name, the model, and its SHA-256."""
    try:
        opened = checkpoint.open_model(source, dist=dist)
    except UserError as error:
        raise UserError(f"the {setting} cannot be loaded: {error}") from error
    if opened.model.config.vocab_size < data.vocab_size:
        raise UserError(
            f"{data.path} has {data.vocab_size} token ids, but the {setting} {source} has only "
            f"{opened.model.config.vocab_size}. First fine-tune a model with this tokenizer, and use it."
        )
    if opened.tokenizer is not None and tokenizer_hash(opened.tokenizer) != tokenizer_hash(data.tokenizer):
        raise UserError(
            f"the {setting} {source} has another tokenizer ({opened.tokenizer.kind}, {opened.tokenizer.n_vocab} "
            f"tokens) than {data.path} ({data.tokenizer.kind}, {data.tokenizer.n_vocab} tokens). Choose one with the "
            "same tokenizer."
        )
    if opened.model.config.block_size < s.block_size:
        raise UserError(
            f"block_size={s.block_size} exceeds the {opened.model.config.block_size} of the {setting} {source}. Use "
            f"--block_size={opened.model.config.block_size} or less."
        )
    sha256 = dist.broadcast(lora.fingerprint(opened.model, opened.values) if dist.is_main else None)
    if s.overwrite and Path(opened.name).resolve().parent == Path(s.out_dir).resolve():
        raise UserError(f"overwrite would remove {opened.name}, the {setting} of this run. Give another --out_dir.")
    model = opened.model.requires_grad_(False).eval()
    if setting == "teacher":  # whole on every rank, because its head is used outside its forward pass
        return opened.name, checkpoint.fill(model, opened.values).to(dist.device), sha256
    return opened.name, materialize(model, opened.values, dist), sha256
