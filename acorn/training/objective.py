"""What a run minimizes: the loss of a batch with its figures, and the frozen model that some losses compare with."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from acorn import UserError, checkpoint
from acorn.data.loader import Batch
from acorn.data.mixture import Mixture
from acorn.distributed import sharding
from acorn.distributed.runtime import Runtime
from acorn.evaluation.loss import evaluate_mixture, read_batches
from acorn.training import lora, losses
from acorn.training.start import materialize
from model import GPT

if TYPE_CHECKING:
    from train import TrainSettings

FIGURES = {  # what is reported for each objective, besides the loss
    "tokens": (),
    "dpo": ("accuracy", "margin", "chosen_reward", "rejected_reward"),
}


class Objective:
    """The loss of a run, chosen by the setting `objective`.

    `policy` is the model that is trained, without DDP's wrapper. `frozen` is the reference of preferences, which is
    None if it is the policy without its adapters. `sha256` identifies the frozen model.
    """

    def __init__(self, s: "TrainSettings", policy: GPT, dist: Runtime, frozen: GPT | None = None, sha256: str = ""):
        self.s, self.kind, self.policy, self.dist = s, s.objective, policy, dist
        self.frozen, self.sha256 = frozen, sha256
        self.names = ("loss", *FIGURES[self.kind]) if FIGURES[self.kind] else ()

    def loss(self, model: torch.nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the loss of a batch, summed over its targets or pairs, and its figures.

        `model` is the policy, possibly compiled or wrapped by DDP. The figures (K, 2) are a sum and a count for each of
        `names`: they can be added up over batches and ranks.
        """
        x, y, documents, _ = batch
        if self.kind == "tokens":
            return model(x, y, reduction="sum", documents=documents)[1], self.no_figures()
        assert self.kind == "dpo"
        options = dict(per_token=losses.log_probability, given=(y,), documents=documents)
        reference = None if self.s.preference_loss == "simpo" else self.reference(x, options)
        logp = model(x, **options)[1][..., 0]
        return self.of_pairs(logp, reference, y, documents)

    def of_pairs(self, logp: Tensor, reference: Tensor | None, y: Tensor, documents: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sum of the preference loss over all pairs, and its figures, from log-probabilities (B, T)."""
        s = self.s
        options = (s.preference_loss, s.dpo_beta, s.label_smoothing, s.simpo_gamma)
        loss, rewards, is_pair = losses.preference_loss(logp, reference, y, documents, *options)
        rewards, n = rewards[is_pair], is_pair.sum()  # (pairs, 2)
        margins = rewards[:, 0] - rewards[:, 1]
        sums = (loss.detach().sum(), (margins > 0).sum(), margins.sum(), *rewards.sum(0))
        return loss.sum(), torch.stack([torch.stack((each.float(), n.float())) for each in sums])

    @torch.no_grad()
    def reference(self, x: Tensor, options: dict) -> Tensor:
        """Return the first of the values of `GPT.in_chunks` under the reference: (B, T)."""
        if self.frozen is not None:
            return self.frozen(x, **options)[1][..., 0]
        was_training = self.policy.training
        self.policy.eval()
        with lora.adapters_off(self.policy):
            values = self.policy(x, **options)[1][..., 0]
        self.policy.train(was_training)
        return values

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
            options = (self.dist, batch_size, block_size, max_windows, token_bytes)
            return evaluate_mixture(self.policy, data, split, *options)
        was_training, result = self.policy.training, dict.fromkeys(self.names, 0.0)
        self.policy.eval()
        for dataset, share in zip(data.datasets, data.shares, strict=True):
            figures = self.no_figures()
            for batch, n_rows in read_batches(getattr(dataset, split), self.dist, batch_size, block_size, max_windows):
                if not n_rows:  # a dummy row
                    batch.y.fill_(-1)
                with self.dist.autocast():
                    figures += self.loss(self.policy, batch.to(self.dist.device))[1]
            for name, mean in self.means(figures).items():
                result[name] += float(share) * mean
        self.policy.train(was_training)
        return result

    def trial_batch(self, batch_size: int, block_size: int, has_documents: bool) -> Batch:
        """Return a batch of zeros, for which the loss takes as much memory as for any other."""
        x = torch.zeros(batch_size, block_size, dtype=torch.long, device=self.dist.device)
        documents = x.clone() if has_documents else None
        if self.kind == "dpo":
            documents[:, block_size // 2 :] = 1
        return Batch(x, x.clone(), documents)

    def frozen_bytes(self) -> int:
        """Return the bytes of the frozen model on this rank."""
        return 0 if self.frozen is None else sum(sharding.local(p).nbytes for p in self.frozen.parameters())

    def saved(self) -> dict | None:
        """Return what state.json says about the objective, or None if there is nothing to check on resuming."""
        return {"sha256": self.sha256} if self.sha256 else None


def start_objective(s: "TrainSettings", data: Mixture, policy: GPT, saved: dict, dist: Runtime) -> Objective:
    """Return the objective of a run, and open its frozen model.

    `saved` is the state.json of a resumed run. The setting that names the frozen model becomes its absolute path.
    Raises UserError if data or models do not fit the objective, or if the frozen model is not the one of the run.
    """
    check_data(s, data)
    if s.objective == "dpo" and s.preference_loss != "simpo" and not s.lora_rank:
        s.reference, frozen, sha256 = open_frozen(s, s.reference or s.init_from, "reference", data, saved, dist)
        return Objective(s, policy, dist, frozen, sha256)
    return Objective(s, policy, dist)


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
                f"{dataset.path} holds pairs of a chosen and a rejected answer, which objective={s.objective} would "
                "learn alike. Use --objective=dpo."
            )


def open_frozen(
    s: "TrainSettings", source: str, setting: str, data: Mixture, saved: dict, dist: Runtime
) -> tuple[str, GPT, str]:
    """Open the frozen model that the `setting` names. Returns its absolute name, the model, and its SHA-256."""
    try:
        opened = checkpoint.open_model(source, r=dist)
    except UserError as error:
        raise UserError(f"the {setting} cannot be loaded: {error}") from error
    if opened.model.config.vocab_size < data.vocab_size:
        raise UserError(
            f"{data.path} has {data.vocab_size} token ids, but the {setting} {source} has only "
            f"{opened.model.config.vocab_size}. First fine-tune a model with this tokenizer, and use it."
        )
    sha256 = dist.broadcast(lora.fingerprint(opened.model, opened.values) if dist.is_main else None)
    if saved.get("objective") and saved["objective"]["sha256"] != sha256:
        raise UserError(
            f"the weights of {source} differ from those of the {setting} with which this run started. Give the "
            f"original ones with --{setting}=CHECKPOINT."
        )
    if s.overwrite and Path(opened.name).resolve().parent == Path(s.out_dir).resolve():
        raise UserError(f"overwrite would remove {opened.name}, the {setting} of this run. Give another --out_dir.")
    model = materialize(opened.model.requires_grad_(False), opened.values, dist)
    return opened.name, model.eval(), sha256
