"""Batches: windows of a text stream, or rows of whole conversations.

A batch is (x, y, documents), all int64 of shape (count, block_size): inputs, targets, and for each token the number of
its document within the row. A target of -1 is masked. `documents` is None if attention crosses document boundaries. A
batch is a pure function of (seed, position), so a run's position is one integer for any number of processes.
"""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from acorn import UserError

if TYPE_CHECKING:
    from acorn.data.shards import Tokens

# ---------------------------------------------------------------------------------------------------------------------
# Windows
#
# N tokens make N - 1 pairs: pair p has input token p and target token p + 1. Each epoch treats the pairs as a ring,
# starts at its own offset o, and cuts n = ceil((N - 1) / T) windows of T pairs; window j holds the pairs
# o + j T, ..., o + j T + T - 1 (mod N - 1). The last window overlaps the first; its repeated targets are masked. An
# epoch therefore contains every pair exactly once. A seeded permutation orders the windows.


def split_windows(tokens: "Tokens", block_size: int) -> int:
    """Return the number of windows of `block_size` (token, next token) pairs in one epoch of the split."""
    if len(tokens) < 2:
        raise UserError(f"the {tokens.name} split has {len(tokens)} tokens, but needs at least 2. Add text to it.")
    return -(-(len(tokens) - 1) // block_size)


def sample_windows(
    tokens: "Tokens", block_size: int, first: int, count: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return samples first, ..., first + count - 1 of the endless shuffled stream: inputs x and targets y.

    Both are int64 of shape (count, block_size); a target of -1 is masked. The result depends on the arguments only. The
    first epoch is samples 0, ..., n - 1 (n from `split_windows`), the next epoch follows; a batch may span both.
    """
    n = split_windows(tokens, block_size)
    pairs = len(tokens) - 1
    windows, keys = _shuffled(first, count, n, seed)
    offsets = (_mix(~keys) % np.uint64(pairs)).astype(np.int64)
    starts = (offsets + windows * block_size) % pairs

    x = np.empty((count, block_size), dtype=np.int64)
    y = np.empty((count, block_size), dtype=np.int64)
    whole = starts + block_size <= pairs  # does not wrap around the end of the ring
    x[whole], y[whole] = tokens.read_pairs(starts[whole], block_size)
    for row in np.flatnonzero(~whole):
        inputs, targets = tokens.read_pairs((starts[row] + np.arange(block_size)) % pairs, 1)
        x[row], y[row] = inputs[:, 0], targets[:, 0]
    y[windows == n - 1, pairs - (n - 1) * block_size :] = -1
    return x, y


def sequential_windows(tokens: "Tokens", block_size: int, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return windows first, ..., first + count - 1 of the split in order, for evaluation: x, y as in `sample_windows`.

    The last window is padded after the end of the split, x with 0 and y with -1. Windows after it are all padding.
    """
    split_windows(tokens, block_size)  # raises UserError if the split is too short
    pairs = len(tokens) - 1
    x = np.zeros((count, block_size), dtype=np.int64)
    y = np.full((count, block_size), -1, dtype=np.int64)
    starts = np.arange(first, first + count) * block_size
    whole = int((starts + block_size <= pairs).sum())
    x[:whole], y[:whole] = tokens.read_pairs(starts[:whole], block_size)
    if whole < count and starts[whole] < pairs:
        rest = pairs - starts[whole]
        x[whole, :rest], y[whole, :rest] = tokens.read_pairs(starts[whole : whole + 1], rest)
    return x, y


def number_documents(x: np.ndarray, y: np.ndarray, eot: int) -> np.ndarray:
    """Number the documents in windows with inputs x and targets y, from 0 in each row: int64, (count, block_size).

    A document begins at each end-of-text token. One also begins where x differs from the preceding target: there the
    window wraps from the end of the split to its start.
    """
    begins = x == eot
    begins[:, 1:] |= (y[:, :-1] != -1) & (x[:, 1:] != y[:, :-1])
    return begins.cumsum(axis=1)


# ---------------------------------------------------------------------------------------------------------------------
# Rows of whole conversations
#
# A conversation of L tokens has L - 1 pairs, contiguous in one row of T. The rest of a row is padding: masked targets
# and a separate document. Each epoch has the same rows in a different order.

FORM = ("dropped", "head", "middle", "tail", "prompt")  # the columns of an index


class Rows(NamedTuple):
    """Conversations packed into rows of one block size: row r holds the forms members[starts[r] : starts[r + 1]]."""

    starts: np.ndarray  # (rows + 1,)
    members: np.ndarray  # indices of forms
    padding: float  # the fraction of the rows' tokens that is padding
    dropped: int  # conversations without their oldest turns
    cut: int  # conversations whose last reply is truncated
    left_out: int  # conversations whose last question alone fills a row


class Conversations:
    """The conversations of one split, each in one or more forms; the block size decides which form is read.

    Form 0 is the whole conversation; form k is the template's rendering without the k oldest turns. `index`, of shape
    (forms, 5), has the columns FORM: `dropped` is k. The tokens of form k are the first `head` tokens of form 0, then
    `middle` tokens stored for this form, then the last `tail` tokens of form 0; the stream stores the middles of all
    forms in order. `prompt` counts the tokens before the first learned one. With `pairs`, conversations 2i and 2i + 1
    are the same prompt with the chosen and the rejected answer. Raises ValueError for an invalid index.
    """

    def __init__(self, tokens: "Tokens", index: np.ndarray, pairs: bool = False):
        self.tokens, self.pairs = tokens, pairs
        self.dropped, self.head, self.middle, self.tail, self.prompt = index.T
        self.starts = np.cumsum(self.middle) - self.middle  # where each form's middle starts in the stream
        self.lengths = self.head + self.middle + self.tail
        is_whole = self.dropped == 0
        self.first = np.flatnonzero(is_whole)  # form 0 of each conversation
        self.whole = self.first[np.cumsum(is_whole) - 1] if len(self.first) else self.first  # form 0, per form
        sizes = self.middle[self.whole] if len(self.first) else self.middle  # of the whole conversation, per form
        broken = (index < 0).any() or self.middle.sum() != len(tokens) or (len(index) and not is_whole[0])
        broken = broken or (self.head[is_whole] + self.tail[is_whole]).any()
        broken = broken or (pairs and (len(index) % 2 or not is_whole.all()))
        if broken or (np.maximum(self.head, self.tail) > sizes).any() or (self.prompt >= self.lengths).any():
            raise ValueError("the index does not match the tokens")
        self._rows: dict[int, Rows] = {}

    def __len__(self) -> int:
        return len(self.first)

    def spans(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the start in the stream and the number of tokens of each whole conversation."""
        return self.starts[self.first], self.middle[self.first]

    def rows(self, block_size: int) -> Rows:
        """Pack the conversations into rows of `block_size`, each in its longest form that fits.

        If no form fits, the last form is truncated. If no learned token would remain, the conversation is left out.
        """
        if block_size not in self._rows and self.pairs:
            self._rows[block_size] = self._rows_of_pairs(block_size)
        if block_size not in self._rows:
            n = len(self.lengths)
            fitting_forms = np.where(self.lengths - 1 <= block_size, np.arange(n), n)
            # the first form of each conversation that fits, or n if none fits
            chosen = np.minimum.reduceat(fitting_forms, self.first) if n else self.first
            too_long = chosen == n
            last_forms = np.append(self.first[1:], n) - 1  # of each conversation
            chosen = np.where(too_long, last_forms, chosen)
            learns = self.prompt[chosen] <= block_size
            kept = chosen[learns]
            needs = np.clip(self.lengths[kept] - 1, 1, block_size)
            starts, members = pack(needs, block_size)
            used = needs.sum() / (max(len(starts) - 1, 1) * block_size)
            self._rows[block_size] = Rows(
                starts,
                kept[members],
                padding=1 - float(used),
                dropped=int((learns & (self.dropped[chosen] > 0)).sum()),
                cut=int((learns & too_long).sum()),
                left_out=int((~learns).sum()),
            )
        return self._rows[block_size]

    def _rows_of_pairs(self, block_size: int) -> Rows:
        """Pack the pairs into rows, both conversations of a pair side by side. Longer pairs are left out."""
        needs = (self.lengths - 1).reshape(-1, 2).sum(1)
        fitting = np.flatnonzero(needs <= block_size)
        starts, members = pack(needs[fitting], block_size)
        forms = (2 * fitting[members][:, None] + np.arange(2)).ravel()
        used = needs[fitting].sum() / (max(len(starts) - 1, 1) * block_size)
        return Rows(2 * starts, forms, 1 - float(used), dropped=0, cut=0, left_out=len(needs) - len(fitting))

    def read_form(self, form: int, max_tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the first `max_tokens` ids of a form, and their targets: the ids, or -1 where they are not learned."""
        begin = self.starts[self.whole[form]]
        end = begin + self.middle[self.whole[form]]
        head, middle, tail = int(self.head[form]), int(self.middle[form]), int(self.tail[form])
        pieces, learned = [], []
        mask = self.tokens.mask
        assert mask is not None, "conversations have a mask"
        for start, length in ((begin, head), (self.starts[form], middle), (end - tail, tail)):
            if length := min(length, max_tokens):
                max_tokens -= length
                pieces.append(self.tokens.read([start], length)[0])
                learned.append(mask.read([start], length)[0])
        ids = np.concatenate(pieces)
        return ids, np.where(np.concatenate(learned), ids, -1)

    def read_rows(self, rows: np.ndarray, block_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return x, y and documents of these rows of `block_size`; a row after the last one is all padding."""
        packed = self.rows(block_size)
        x = np.zeros((len(rows), block_size), dtype=np.int64)
        y = np.full((len(rows), block_size), -1, dtype=np.int64)
        documents = np.zeros((len(rows), block_size), dtype=np.int64)
        for i, row in enumerate(rows.tolist()):
            start = 0
            if row >= len(packed.starts) - 1:  # after the last row
                continue
            for form in packed.members[packed.starts[row] : packed.starts[row + 1]]:
                ids, targets = self.read_form(form, block_size + 1)
                end = start + len(ids) - 1
                x[i, start:end], y[i, start:end] = ids[:-1], targets[1:]
                documents[i, end:] += 1
                start = end
        return x, y, documents


def pack(needs: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Pack items of length 1 to `size` (`needs`) into rows of `size` by best fit, the longest item first.

    Returns (starts, members): row r holds the items members[starts[r] : starts[r + 1]].
    """
    rows: list[list[int]] = []
    free: list[list[int]] = [[] for _ in range(size + 1)]  # free[n]: the rows with n places left
    open_sizes = 0  # bit n is set if free[n] is not empty
    for item in np.argsort(-needs, kind="stable").tolist():
        need = int(needs[item])
        row, left = len(rows), size
        if fitting := open_sizes >> need:
            lowest_bit = fitting & -fitting  # best fit: the row with the fewest places left
            left = need + lowest_bit.bit_length() - 1
            row = free[left].pop()
            if not free[left]:
                open_sizes ^= 1 << left
        else:
            rows.append([])
        rows[row].append(item)
        if left := left - need:
            free[left].append(row)
            open_sizes |= 1 << left
    starts = np.cumsum([0, *map(len, rows)])
    return starts, np.array([item for row in rows for item in row], dtype=np.int64)


# ---------------------------------------------------------------------------------------------------------------------
# Either kind


def samples_per_epoch(tokens: "Tokens", block_size: int) -> int:
    """Return the number of windows, or rows of conversations, of `block_size` tokens in one epoch of the split."""
    if tokens.conversations is None:
        return split_windows(tokens, block_size)
    if n := len(tokens.conversations.rows(block_size).starts) - 1:
        return n
    if tokens.conversations.pairs:
        raise UserError(
            f"block_size={block_size} is too small for every pair of the {tokens.name} split: a row holds the prompt "
            "with the chosen answer and the prompt with the rejected one. Use a larger --block_size."
        )
    raise UserError(
        f"block_size={block_size} leaves no room for a reply: every question of the {tokens.name} split fills it. "
        "Use a larger --block_size, or conversations with shorter questions."
    )


def sample(tokens: "Tokens", block_size: int, first: int, count: int, seed: int) -> tuple:
    """Return samples first, ..., first + count - 1 of the endless shuffled stream as a batch (x, y, documents)."""
    n = samples_per_epoch(tokens, block_size)
    if tokens.conversations is not None:
        return tokens.conversations.read_rows(_shuffled(first, count, n, seed)[0], block_size)
    return _numbered(tokens, *sample_windows(tokens, block_size, first, count, seed))


def in_order(tokens: "Tokens", block_size: int, first: int, count: int) -> tuple:
    """Return windows or rows first, ..., first + count - 1 of the split in order as a batch (x, y, documents).

    Windows or rows after the last one are all padding."""
    if tokens.conversations is not None:
        return tokens.conversations.read_rows(np.arange(first, first + count), block_size)
    return _numbered(tokens, *sequential_windows(tokens, block_size, first, count))


def count_targets(y: np.ndarray, documents: np.ndarray | None, pairs: bool) -> int:
    """Return by how many the loss of a batch is divided: its unmasked targets, or its pairs of conversations."""
    rows, columns = np.nonzero(y != -1)
    if not pairs or documents is None:
        return len(rows)
    return len(np.unique(rows * (y.shape[1] + 1) + documents[rows, columns])) // 2


def _numbered(tokens: "Tokens", x: np.ndarray, y: np.ndarray) -> tuple:
    mark = tokens.document_mark
    return x, y, None if mark is None else number_documents(x, y, mark)


def shuffled(first: int, count: int, n: int, seed: int) -> np.ndarray:
    """Return items first, ..., first + count - 1 of the endless stream of n items, shuffled anew in each epoch."""
    return _shuffled(first, count, n, seed)[0]


def _shuffled(first: int, count: int, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return, for samples first, ..., first + count - 1, their index among the epoch's n windows or rows, and the key
    of their epoch."""
    epochs, ranks = np.divmod(np.arange(first, first + count), n)
    keys = _mix(_mix(np.array([seed & 0xFFFFFFFFFFFFFFFF], np.uint64)) + epochs.astype(np.uint64))
    return permute(ranks, n, keys), keys


def permute(index: np.ndarray, n: int, keys: np.ndarray) -> np.ndarray:
    """Apply a pseudo-random permutation of [0, n), one for each uint64 key, to `index`, without storing a table.

    A Feistel network over pairs (left, right) in a x b >= n: each round adds a hash of one half to the other. Rounds
    are invertible, so the network permutes the a x b pairs. A result outside [0, n) goes through the network again
    (cycle walking), which is rare because a x b is close to n.
    """
    a = np.uint64(np.ceil(np.sqrt(n)))
    b = np.uint64(-(-n // int(a)))
    result = index.astype(np.uint64)
    keys = np.broadcast_to(keys, result.shape)
    pending = np.arange(len(result))
    while len(pending):
        left, right = np.divmod(result[pending], b)
        key = keys[pending]
        for _ in range(3):
            key = key + _GOLDEN_GAMMA
            left = (left + _mix(right + key)) % a
            right = (right + _mix(left ^ key)) % b
        result[pending] = left * b + right
        pending = pending[result[pending] >= n]
    return result.astype(np.int64)


_GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: np.ndarray) -> np.ndarray:
    """Hash uint64 to uint64: one step of the splitmix64 generator."""
    x = x + _GOLDEN_GAMMA
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
