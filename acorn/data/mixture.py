"""The training data: one dataset, or a mixture in fixed proportions, such as `dataset = 'fineweb:0.8,mycode:0.2'`.

Like a dataset's, a mixture's stream of samples is a pure function of (seed, position): sample i comes from one of the
datasets and is the next sample of that dataset's own shuffled stream (`batches.sample`).
"""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from acorn import UserError
from acorn.data import batches
from acorn.data.shards import Dataset, load_dataset
from acorn.data.tokenizer import Tokenizer, tokenizer_hash

PROPORTION = re.compile(r"\s*(.+):([0-9]{1,9}|[0-9]{0,9}\.[0-9]{1,9})\s*")  # NAME:PROPORTION


@dataclass
class Mixture:
    datasets: list[Dataset]
    shares: list[Fraction]  # fraction of the samples from each dataset; the sum is 1

    @property
    def path(self) -> str:
        return ", ".join(str(dataset.path) for dataset in self.datasets)

    @property
    def tokenizer(self) -> Tokenizer:
        return self.datasets[0].tokenizer

    @property
    def vocab_size(self) -> int:
        return self.datasets[0].vocab_size

    def identity(self) -> str:
        """Return a SHA-256 (hex) of the datasets and their shares; for a single dataset, its own identity."""
        if len(self.datasets) == 1:
            return self.datasets[0].identity()
        parts = [(dataset.identity(), str(share)) for dataset, share in zip(self.datasets, self.shares, strict=True)]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    @property
    def has_documents(self) -> bool:
        """Whether samples include document numbers."""
        tokens = [dataset.train for dataset in self.datasets]
        return any(each.conversations is not None or each.document_mark is not None for each in tokens)

    @property
    def has_conversations(self) -> bool:
        """Whether any dataset masks its targets, as conversations do: only their replies are learned."""
        return any(dataset.train.mask is not None for dataset in self.datasets)

    @property
    def has_pairs(self) -> bool:
        """Whether the datasets hold pairs of a chosen and a rejected answer."""
        return any(dataset.train.conversations and dataset.train.conversations.pairs for dataset in self.datasets)

    def sample(self, block_size: int, first: int, count: int, seed: int) -> tuple:
        """Return samples first, ..., first + count - 1 of the endless stream as a batch (x, y, documents): see
        acorn/data/batches.py. If only some datasets number documents, a window of the others counts as one document.
        """
        x = np.empty((count, block_size), dtype=np.int64)
        y = np.empty((count, block_size), dtype=np.int64)
        documents = np.zeros((count, block_size), dtype=np.int64) if self.has_documents else None
        drawn = np.array(list(origins(first, count, self.shares))).reshape(count, 2)
        for k, dataset in enumerate(self.datasets):
            rows = np.flatnonzero(drawn[:, 0] == k)
            if len(rows):  # these samples are consecutive in the dataset's own stream
                batch = batches.sample(dataset.train, block_size, int(drawn[rows[0], 1]), len(rows), seed)
                x[rows], y[rows] = batch[:2]
                if documents is not None and batch[2] is not None:
                    documents[rows] = batch[2]
        return x, y, documents


def origins(first: int, count: int, shares: list[Fraction]) -> Iterator[tuple[int, int]]:
    """Yield, for samples first, ..., first + count - 1, the index of their dataset and their position in its stream.

    The first dataset gets its share at even distances: round(n * share) of the first n samples. The next dataset gets
    its part of the remaining samples in the same way, and so on. At any position, each dataset's count therefore
    deviates from its share by at most half the number of datasets. It is computed from the position, without state.
    """
    parts, left = [], Fraction(1)
    for share in shares:
        parts.append(share / left)
        left -= share
    for i in range(first, first + count):
        for k, part in enumerate(parts):
            taken, taken_next = _rounded(i, part), _rounded(i + 1, part)
            if taken_next > taken:  # always true for the last dataset, whose part is 1
                yield k, taken
                break
            i -= taken


def _rounded(n: int, part: Fraction) -> int:
    return (2 * n * part.numerator + part.denominator) // (2 * part.denominator)


def load_mixture(spec: str, hashed: bool = True, document_mask: bool = False) -> Mixture:
    """Open the datasets of 'NAME:PROPORTION,NAME:PROPORTION,...', or the single dataset `spec`.

    Proportions are relative to their sum. Only a comma makes a mixture, and the last colon of a part ends its name, so
    C:\\data\\mine and data/12:30 are plain names. Raises UserError if a dataset is missing or invalid, or if tokenizers
    differ. For `hashed` see `load_dataset`, for `document_mask` see `Dataset.mask_documents`.
    """
    mixture = _load(spec, hashed)
    for dataset in mixture.datasets if document_mask else ():
        dataset.mask_documents()
    return mixture


def _load(spec: str, hashed: bool) -> Mixture:
    texts = spec.split(",")
    parts = [PROPORTION.fullmatch(text) for text in texts]
    if len(parts) == 1 or not any(parts):
        return Mixture([load_dataset(spec, hashed)], [Fraction(1)])
    names, weights = [], []
    for text, part in zip(texts, parts, strict=True):
        if not part or not Fraction(part[2]):
            raise UserError(
                f"dataset={spec!r}: {text.strip()!r} should be NAME:PROPORTION with a proportion above 0, such as "
                "mine:0.2"
            )
        names.append(part[1])
        weights.append(Fraction(part[2]))
    datasets = [load_dataset(name, hashed) for name in names]
    for i, dataset in enumerate(datasets):
        if dataset.path in [other.path for other in datasets[:i]]:
            raise UserError(f"dataset={spec!r} names {dataset.path} twice. Give it one proportion.")
    first, *remaining = datasets
    for other in remaining:
        if tokenizer_hash(other.tokenizer) != tokenizer_hash(first.tokenizer):
            raise UserError(
                f"the datasets of a mixture need the same tokenizer, but {first.path} has {_describe(first)} and "
                f"{other.path} has {_describe(other)}. Prepare {other.path} again with --tokenizer {first.path}."
            )
    return Mixture(datasets, [weight / sum(weights) for weight in weights])


def _describe(dataset: Dataset) -> str:
    kind, n_vocab = dataset.tokenizer.kind, dataset.tokenizer.n_vocab
    return f"{kind} ({n_vocab} tokens, {tokenizer_hash(dataset.tokenizer)[:8]})"
