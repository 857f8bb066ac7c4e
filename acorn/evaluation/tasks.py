"""Measure a checkpoint on text, answers and multiple choice. Each result comes with its standard error.

    python -m acorn.evaluate out/x                        # the validation split of the run's dataset
    python -m acorn.evaluate out/x --dataset NAME --split val
    python -m acorn.evaluate out/x --text FILE            # perplexity and bits per byte of a text file
    python -m acorn.evaluate out/x --pairs FILE.jsonl     # {"prompt", "response"}: exact match, BLEU, chrF, ROUGE
    python -m acorn.evaluate out/x --choices FILE.jsonl   # {"prompt", "choices", "answer"}: accuracy by likelihood

If the checkpoint has a chat template, a prompt is a user's message; otherwise it is text to be continued. A metric that
cannot be computed is n/a (null with --json), with the reason. Records of --pairs and --choices that exceed the model's
block size are skipped and counted.
"""

import argparse
import importlib.util
import json
import math
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from acorn import UserError, checkpoint, files, printable, settings
from acorn.data import chat
from acorn.data.mixture import load_mixture
from acorn.data.records import read_messages
from acorn.data.shards import ShardWriter, Tokens, open_shard
from acorn.data.tokenizer import Tokenizer, tokenizer_hash
from acorn.distributed import runtime
from acorn.evaluation.loss import check_targets, window_sums
from acorn.inference.generate import Sampling, check_prompts, continue_texts, encode_prompt
from model import GPT

# Scripts without spaces between words, as character classes of the `regex` package; the keys are printed.
UNSPACED_SCRIPTS = {
    "Chinese": r"\p{Han}\p{Bopomofo}々〆",
    "Japanese": r"\p{Hiragana}\p{Katakana}ー",
    "Korean": r"\p{Hangul}",  # has spaces between words, but not before suffixes
    "Thai and other scripts without spaces": r"\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}\p{Javanese}"
    r"\p{Balinese}\p{Tai_Le}\p{New_Tai_Lue}\p{Tai_Tham}\p{Tai_Viet}",
}
# sacrebleu's tokenizers for these scripts, best first; MeCab is used if its package is installed
BLEU_TOKENIZERS = {"Chinese": ["zh"], "Japanese": ["ja-mecab", "char"], "Korean": ["ko-mecab", "char"]}
BLEU_TOKENIZERS["Thai and other scripts without spaces"] = ["char"]


class Figure(NamedTuple):
    """A measured value with its standard error. A value that cannot be computed is None, and `note` says why."""

    value: float | None
    error: float | None  # standard error; None if a single example does not allow an estimate
    n: int  # number of tokens, bytes or examples
    method: str = ""  # how it was computed, such as sacrebleu's signature
    note: str = ""


def figure(value: float, error: float, n: int, method: str = "", note: str = "") -> Figure:
    """Return the `Figure` of a computed value, with None for a non-finite value or error."""
    if not math.isfinite(value):
        note = note or ("no examples to measure" if n == 0 else f"the result is non-finite ({value})")
        return Figure(None, None, n, method, note)
    return Figure(value, error if math.isfinite(error) else None, n, method, note)


def mean_and_error(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Return the mean of n values and its standard error, std / sqrt(n). NaN if there are too few values."""
    array = np.asarray(values, dtype=np.float64)
    if not len(array):
        return math.nan, math.nan
    error = array.std(ddof=1) / math.sqrt(len(array)) if len(array) > 1 else math.nan
    return float(array.mean()), float(error)


def ratio_and_error(numerators: np.ndarray, denominators: np.ndarray) -> tuple[float, float]:
    """Return sum(numerators) / sum(denominators) and its standard error by linearization.

    Tokens within a window depend on each other; windows are assumed to be independent. Cochran, Sampling Techniques,
    1977, section 6.4.
    """
    ratio, n = numerators.sum() / denominators.sum(), len(numerators)
    _, error = mean_and_error((numerators - ratio * denominators) * n / denominators.sum())
    return float(ratio), error


def measure_tokens(
    model: GPT, tokenizer: Tokenizer, tokens: Tokens, dist: runtime.Runtime, batch_size: int, block_size: int
) -> dict[str, Figure]:
    """Measure loss (nats per token), perplexity and bits per byte over adjacent windows of `block_size` tokens."""
    sums = window_sums(model, tokens, dist, batch_size, block_size, 0, tokenizer.token_bytes()).numpy()
    n_tokens, n_bytes = int(sums[:, 0].sum()), int(sums[:, 3].sum())
    check_targets(n_tokens, tokens)
    loss, error = ratio_and_error(sums[:, 1], sums[:, 0])
    perplexity = math.exp(loss) if loss < 700 else math.inf
    result = {"loss": figure(loss, error, n_tokens), "perplexity": figure(perplexity, perplexity * error, n_tokens)}
    if n_bytes:
        result["bits per byte"] = figure(*ratio_and_error(sums[:, 2] / math.log(2), sums[:, 3]), n_bytes)
    else:
        result["bits per byte"] = Figure(None, None, 0, note="all tokens are control tokens, which have no bytes")
    return result


def measure_text(
    model: GPT, tokenizer: Tokenizer, path: str, dist: runtime.Runtime, batch_size: int, block_size: int
) -> dict[str, Figure]:
    """Apply `measure_tokens` to a UTF-8 text file, as one document of a dataset."""
    text = files.read_text(path)
    try:
        encoded = tokenizer.encode(text)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    ids = np.array([*tokenizer.before_document, *encoded, *tokenizer.after_text], dtype=np.int32)
    if len(ids) < 2:
        raise UserError(f"{path} has no token to predict. Use a file with more text.")
    check_prompts(model, [ids.tolist()])
    with tempfile.TemporaryDirectory() as folder:  # `window_sums` reads shards
        with ShardWriter(folder, "val", tokenizer.n_vocab) as writer:
            writer.write(ids)
        shards = [open_shard(shard) for shard in sorted(Path(folder).glob("*.bin"))]
        tokens = Tokens(shards, tokenizer.n_vocab, "val")
        return measure_tokens(model, tokenizer, tokens, dist, batch_size, block_size)


def prompt_ids(tokenizer: Tokenizer, messages: list[dict]) -> list[int]:
    """Return the ids of the model's input: the messages in its chat template, or the plain prompt without one."""
    if tokenizer.chat_template:
        return chat.render(tokenizer, messages).tolist()
    if len(messages) > 1:
        raise UserError(
            "this conversation has several messages, but the checkpoint has no chat template. Use records with a "
            '"prompt" and a "response".'
        )
    return encode_prompt(tokenizer, messages[0]["content"], control=False)


def greedy_answers(
    model: GPT, tokenizer: Tokenizer, prompts: list[list[int]], stop: list[str], max_new_tokens: int, batch_size: int
) -> list[str]:
    """Decode an answer to each prompt greedily, up to the end of the turn or text, a stop string, or the end of the
    block: a sliding window would lose the question."""
    ends = chat.stop_ids(tokenizer) if tokenizer.chat_template else set()
    answers = []
    for first in range(0, len(prompts), batch_size):
        batch = prompts[first : first + batch_size]
        greedy, seeds = Sampling(temperature=0), [0] * len(batch)
        answers += continue_texts(model, tokenizer, batch, max_new_tokens, greedy, seeds, stop, ends, slide=False)
    return [answer.text.strip() for answer in answers]


def after_thinking(answer: str, reference: str) -> str:
    """Return the part of an answer after its `</think>`, or all of it if the reference contains thinking too."""
    return answer if "</think>" in reference else answer.rpartition("</think>")[2].strip()


def bleu_of(references: list[str]):
    """Return sacrebleu's BLEU with the tokenizer for the most common script in `references`, and the reason as text.

    It uses the effective order: n-grams longer than every answer do not count, so that short answers have a BLEU.
    """
    import regex
    from sacrebleu.metrics import BLEU

    text = "".join(references)
    n_letters = len(regex.findall(r"\p{L}", text))
    counts = {name: len(regex.findall(f"(?=[{scripts}])\\p{{L}}", text)) for name, scripts in UNSPACED_SCRIPTS.items()}
    counts["scripts with spaces"] = n_letters - sum(counts.values())
    if counts["Japanese"] > counts["Chinese"] / 9:  # a tenth or more are kana, so the Han letters are Japanese too
        counts["Japanese"] += counts.pop("Chinese")
    script = max(counts, key=counts.__getitem__) if n_letters else "scripts with spaces"
    reason = f"letters of the references: {counts[script]} of {n_letters} {script}"
    for name in BLEU_TOKENIZERS.get(script, ["13a"]):
        try:
            return BLEU(tokenize=name, effective_order=True, force=True), reason
        except (RuntimeError, AssertionError):  # MeCab or its dictionary is not installed
            reason += f"; {name} is not installed"
    raise AssertionError(f"no tokenizer for {script}")


class RougeWords:
    """Tokenizer for ROUGE: lowercase words of letters and digits, and single characters of scripts without spaces.

    ASCII words are stemmed (Porter). For ASCII text, the tokens equal those of rouge-score's own tokenizer, which drops
    all other letters.
    """

    def __init__(self):
        import regex
        from rouge_score.tokenizers import DefaultTokenizer

        unspaced = "".join(UNSPACED_SCRIPTS.values())
        self.pattern = regex.compile(rf"(?V1)[{unspaced}]\p{{M}}*|[[\p{{L}}\p{{M}}\p{{N}}]--[{unspaced}]]+")
        self.ascii = DefaultTokenizer(use_stemmer=True)

    def tokenize(self, text: str) -> list[str]:
        words = self.pattern.findall(text.lower())
        return [part for word in words for part in (self.ascii.tokenize(word) if word.isascii() else [word])]


def corpus_figure(metric, answers: list[str], references: list[str], reason: str = "") -> Figure:
    """Compute a corpus-level metric of sacrebleu, with its standard error from 1000 bootstrap samples."""
    if not answers:
        return figure(math.nan, math.nan, 0)
    value = metric.corpus_score(answers, [references]).score
    method = f"{metric.get_signature()}{f' ({reason})' if reason else ''}"
    statistics = np.array(metric._extract_corpus_statistics(answers, [references]))  # (n, counts)
    random, n = np.random.default_rng(0), len(answers)
    if not statistics[:, 1].any():  # column 1 is the length of each reference
        return Figure(None, None, n, method, "all references are empty")
    sums = [statistics[random.integers(n, size=n)].sum(0).tolist() for _ in range(1000)]
    scores = [metric._compute_score_from_stats(each).score for each in sums if each[1]]
    error = np.std(scores) if n > 1 else math.nan
    return figure(value, float(error), n, method)


def check_packages(option: str) -> None:
    """Raise UserError if a package that `measure_answers` needs is missing. `option` is its cause, for the message."""
    missing = [name for name in ("sacrebleu", "rouge_score", "regex") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"{option} needs the package {missing[0]}, which is not installed. "
            f"Run `pip install sacrebleu rouge-score regex`, or leave out {option}."
        )


def measure_answers(answers: list[str], references: list[str]) -> dict[str, Figure]:
    """Compare answers with one reference each: exact match, BLEU, chrF and ROUGE F-measures, all in percent.

    BLEU: https://aclanthology.org/W18-6319; chrF: https://aclanthology.org/W15-3049; ROUGE:
    https://aclanthology.org/W04-1013. ROUGE is the mean over the examples whose reference has tokens (ROUGE-2: two or
    more). A note counts the others.
    """
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics import CHRF

    n = len(answers)
    exact = [100.0 * (answer == reference) for answer, reference in zip(answers, references, strict=True)]
    result = {"exact match": figure(*mean_and_error(exact), n)}
    bleu, reason = bleu_of(references)
    result["BLEU"] = corpus_figure(bleu, answers, references, reason)
    result["chrF"] = corpus_figure(CHRF(), answers, references)

    words = RougeWords()
    names = {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L"}
    scorer = RougeScorer(list(names), tokenizer=words)
    scores = [scorer.score(reference, answer) for answer, reference in zip(answers, references, strict=True)]
    lengths = [len(words.tokenize(reference)) for reference in references]
    method = "rouge-score over words (ASCII ones stemmed) and single characters of scripts without spaces"
    for key, name in names.items():
        min_length = 2 if key == "rouge2" else 1
        values = [100 * score[key].fmeasure for score, k in zip(scores, lengths, strict=True) if k >= min_length]
        short = "no letter or digit" if min_length == 1 else "fewer than 2 words or characters"
        note = f"{n - len(values)} of {n} references have {short}" if len(values) < n else ""
        result[name] = figure(*mean_and_error(values), len(values), method, note)
    return result


@torch.no_grad()
def choice_logprobs(
    model: GPT, rows: list[tuple[list[int], list[int]]], dist: runtime.Runtime, batch_size: int
) -> np.ndarray:
    """Return the log-probability (nats) of each continuation given its prompt: (len(rows),).

    Each row is a pair of id lists, the prompt and the continuation.
    """
    check_prompts(model, [prompt + continuation for prompt, continuation in rows])
    model.eval()
    result = []
    for first in range(0, len(rows), batch_size):
        batch = rows[first : first + batch_size]
        T = max(len(prompt) + len(continuation) for prompt, continuation in batch) - 1
        x, y = np.zeros((len(batch), T), dtype=np.int64), np.full((len(batch), T), -1, dtype=np.int64)
        for i, (prompt, continuation) in enumerate(batch):
            ids = np.array(prompt + continuation)
            x[i, : len(ids) - 1] = ids[:-1]
            y[i, len(prompt) - 1 : len(ids) - 1] = continuation
        with dist.autocast():
            _, nats = model(dist.to_device(x), dist.to_device(y), reduction="none")
        result += (-nats.double().sum(1)).tolist()
    return np.array(result)


def encode_record(tokenizer: Tokenizer, prompt: str, choices: list[str]) -> list[tuple[list[int], list[int]]]:
    """Return for each choice the ids before it and its own ids.

    The choice is encoded together with what precedes it, so that it has the same tokens as in text, or as in a reply of
    the chat template. Where a choice merges with the end of the prompt, the choices of this record begin earlier by the
    merged tokens, all at the same token, so that they stay comparable. Raises UserError for a choice without tokens.
    """
    if tokenizer.chat_template:
        before = prompt_ids(tokenizer, [{"role": "user", "content": prompt}])
        start = before + chat.encode_reply(tokenizer, "")
        wholes = [before + chat.encode_reply(tokenizer, choice) for choice in choices]
    else:
        start = encode_prompt(tokenizer, prompt.rstrip())  # the space before a word belongs to its token
        wholes = [encode_prompt(tokenizer, prompt + choice) for choice in choices]
    n = next(n for n in range(len(start), -1, -1) if all(whole[:n] == start[:n] for whole in wholes))
    for whole, choice in zip(wholes, choices, strict=True):
        if len(whole) == n:
            raise UserError(f"this tokenizer encodes the choice {choice!r:.50} without tokens. Remove it.")
    if n == 0:  # no prompt, or the first token contains all of it
        return [(encode_prompt(tokenizer, ""), whole) for whole in wholes]
    return [(whole[:n], whole[n:]) for whole in wholes]


def encode_choices(
    tokenizer: Tokenizer, records: list[tuple[str, dict]]
) -> tuple[list[list[tuple[list[int], list[int]]]], list[int]]:
    """Return the rows of each record's choices, from `encode_record`, and the length of its longest input. Raises
    UserError, which names the record's location, if one cannot be encoded."""
    encoded = []
    for where, record in records:
        try:
            encoded.append(encode_record(tokenizer, record["prompt"], record["choices"]))
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
    return encoded, [max(len(prompt) + len(continuation) for prompt, continuation in rows) - 1 for rows in encoded]


def measure_choices(
    model: GPT,
    records: list[tuple[str, dict]],
    encoded: list[list[tuple[list[int], list[int]]]],
    lengths: list[int],
    dist: runtime.Runtime,
    batch_size: int,
) -> tuple[dict[str, Figure], list[int | None]]:
    """Measure the accuracy, in percent, of the most likely choice, and return the chosen index of each record too.

    `encoded` and `lengths` are the results of `encode_choices`. "accuracy" compares log-probabilities, "accuracy by
    byte" log-probabilities per byte. A choice with the same text as the right one is right too. A record with a choice
    that exceeds the block size is skipped; its chosen index is None.
    """
    fits = [length <= model.config.block_size for length in lengths]
    rows = [row for of_record, fit in zip(encoded, fits, strict=True) if fit for row in of_record]
    logprobs = choice_logprobs(model, rows, dist, batch_size)
    right, right_by_bytes, start = [], [], 0
    chosen: list[int | None] = []
    for (_, record), fit in zip(records, fits, strict=True):
        if not fit:
            chosen.append(None)
            continue
        choices = record["choices"]
        scores = logprobs[start : start + len(choices)]
        start += len(scores)
        by_bytes = scores / [len(choice.encode()) for choice in choices]
        answer = choices[record["answer"]]
        finite = not np.isnan(scores).any()  # argmax would return the index of a NaN
        chosen.append(int(scores.argmax()) if finite else None)
        right.append(100.0 * (choices[scores.argmax()] == answer) if finite else math.nan)
        right_by_bytes.append(100.0 * (choices[by_bytes.argmax()] == answer) if finite else math.nan)
    note = skipped_note(records, lengths, model.config.block_size)
    figures = {"accuracy": right, "accuracy by byte": right_by_bytes}
    return {name: figure(*mean_and_error(each), len(each), note=note) for name, each in figures.items()}, chosen


def skipped_note(records: list[tuple[str, dict]], lengths: list[int], limit: int) -> str:
    """Return a note on the records that are skipped because they exceed `limit` tokens, or "" if there are none."""
    skipped = [(where, length) for (where, _), length in zip(records, lengths, strict=True) if length > limit]
    if not skipped:
        return ""
    (where, length), n = skipped[0], len(skipped)
    return f"skipped {n} of {len(records)} records, which exceed {limit} tokens (the first: {where}, with {length})"


def read_records(path: str, limit: int) -> list[tuple[str, dict]]:
    """Read the first `limit` objects (0: all) of a .jsonl file, each with its location ("line 3 of FILE")."""
    located = files.read_json_lines(path, limit)
    for where, record in located:
        if not isinstance(record, dict):
            raise UserError(f"{where} is not a JSON object. Write one JSON object per line.")
        try:
            json.dumps(record, ensure_ascii=False).encode()
        except (ValueError, RecursionError) as error:  # an unpaired surrogate
            raise UserError(f"{where} is not valid JSON ({error}). Write one JSON object per line.") from error
    return located


def read_choices(path: str, limit: int = 0) -> list[tuple[str, dict]]:
    """Read multiple-choice records like `read_records`. Raises UserError for an invalid one."""
    located = read_records(path, limit)
    for where, record in located:
        check_choices(where, record)
    return located


def check_choices(where: str, record: dict) -> None:
    """Raise UserError, which names the location `where`, if `record` is not a valid multiple-choice record."""
    choices, answer = record.get("choices"), record.get("answer")
    texts = [record.get("prompt"), *choices] if isinstance(choices, list) else [None]
    n_choices = len(texts) - 1
    if not all(isinstance(text, str) for text in texts) or len(texts) < 3 or not all(texts[1:]):
        raise UserError(f'{where} needs a "prompt" (a string) and "choices" (a list of two or more non-empty strings)')
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < n_choices:
        raise UserError(
            f'{where} has "answer": {json.dumps(answer)[:50]}. Use the index of the right choice, from 0 to '
            f"{n_choices - 1}."
        )


def remarks(rows: list[dict]) -> dict[str, list[str]]:
    """Return the methods and notes to print below the table, each with the names of its metrics."""
    result: dict[str, list[str]] = {}
    for row in rows:
        notes = [f"{row['on']}: {note}" for note in (row["note"] or "").split("; ") if note]
        for words in [*filter(None, [row["method"]]), *notes]:
            names = result.setdefault(words, [])
            names += [row["measure"]] * (row["measure"] not in names)
    return result


def check_target(path: Path, inputs: list[str | None]) -> None:
    """Raise UserError if `path` cannot be written, or is one of the input files."""
    if not path.parent.is_dir() or path.is_dir():
        raise UserError(f"--answers {path} cannot be written. Give the path of a file in an existing folder.")
    if path.exists() and any(source and Path(source).exists() and path.samefile(source) for source in inputs):
        raise UserError(f"--answers {path} would overwrite an input file. Give another file.")


def training_dataset(source: str, choice: str) -> tuple[str, bool]:
    """Return the dataset that a run was trained on, and whether it used document_mask."""
    path = Path(source)
    is_foreign = path.is_file() or any((path / name).exists() for name in ("config.json", "ckpt.pt"))
    if (is_foreign or checkpoint.is_on_hub(source)) and not checkpoint.step_folders(path):
        missing = "" if path.exists() else f"there is no folder {source}, and "
        weights = source if path.exists() else "a published model"
        raise UserError(
            f"{missing}{weights} does not record its dataset. Give --dataset, --text, --pairs or --choices."
        )
    saved = checkpoint.find(path, choice)[1]["settings"]
    return str(saved.get("dataset")), saved.get("document_mask") is True


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m acorn.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("source", help="an out_dir, a nanoGPT ckpt.pt, or any other value of init_from")
    add("--checkpoint", default="best", help="which one in an out_dir: best (default), latest, step_002000")
    add("--dataset", help="a prepared dataset: its path, or its name in data/")
    add("--split", choices=("train", "val"), default="val", help="split of --dataset; default: %(default)s")
    add("--text", metavar="FILE", help="a text file")
    add("--pairs", metavar="FILE", help="jsonl of prompts and responses, or of messages")
    add("--choices", metavar="FILE", help="jsonl of prompts, choices, and the index of the right choice")
    add("--limit", type=int, default=0, help="use the first LIMIT records of a jsonl file; 0: all")
    add("--max_new_tokens", type=int, default=128, help="tokens per answer; default: %(default)s")
    add("--stop", action="append", default=[], help="text that ends an answer; may be repeated")
    add("--block_size", type=int, default=0, help="window size; default: the model's, at most 1024")
    add("--batch_size", type=int, default=8, help="windows or prompts per batch; default: %(default)s")
    add("--device", default="auto", help="auto | cpu | cuda | cuda:1 | mps")
    dtypes = ("auto", "float32", "bfloat16", "float16")
    add("--dtype", default="auto", choices=dtypes, help="auto: float32 on a CPU")
    add("--answers", metavar="FILE", help="write the model's answers and choices to this jsonl file")
    add("--json", action="store_true", help="print one JSON object instead of a table")
    args = parser.parse_args()
    settings.check_bounds(vars(args) | {"block_size": args.block_size or 1})  # 0: the default
    if args.max_new_tokens == 0:
        raise UserError("max_new_tokens = 0 leaves no room for an answer. Use at least 1.")
    if args.answers and not (args.pairs or args.choices):
        raise UserError(f"--answers {args.answers} would be empty. Give --pairs or --choices, or leave it out.")
    if args.answers:
        check_target(Path(args.answers), [args.text, args.pairs, args.choices])
    if args.pairs:
        check_packages("--pairs")
    return args


def load_evaluated(args: argparse.Namespace) -> tuple[GPT, Tokenizer, str, runtime.Runtime, int]:
    """Return the model on its device, its tokenizer, its description, the runtime and the block size."""
    dist = runtime.setup(args.device, args.dtype, False)
    model, tokenizer, source = checkpoint.load_with_tokenizer(args.source, args.checkpoint)
    model.to(dist.device).eval()
    limit = model.config.block_size
    block_size = args.block_size or min(limit, 1024)
    if block_size > limit:
        raise UserError(f"--block_size {block_size} exceeds the model's {limit}. Use --block_size {limit} or less.")
    summary = f"{model.num_params():,} parameters, on {dist.device} in {runtime.dtype_name(dist.dtype)}"
    print(printable(f"{source}: {summary}"), file=sys.stderr)
    return model, tokenizer, source, dist, block_size


def load_splits(dataset: str, split: str, document_mask: bool, tokenizer: Tokenizer, source: str) -> dict[str, Tokens]:
    """Return a split of a dataset, or of each dataset of a mixture, by a name for the results.

    Raises UserError if the dataset was prepared with another tokenizer than that of the checkpoint `source`.
    """
    mixture = load_mixture(dataset, document_mask=document_mask)
    if tokenizer_hash(mixture.tokenizer) != tokenizer_hash(tokenizer):
        raise UserError(
            f"{dataset} was prepared with a different tokenizer ({mixture.tokenizer.kind}) than {source} uses "
            f"({tokenizer.kind}). Give the text itself with --text FILE."
        )
    splits = {}
    for part in mixture.datasets:
        if part.train.conversations is not None and part.train.conversations.pairs:
            raise UserError(
                f"{part.path} holds pairs of a chosen and a rejected answer; one loss over both means nothing. "
                "Give other data with --dataset, --text, --pairs or --choices."
            )
        splits[f"{part.path} {split}"] = getattr(part, split)
        if getattr(part, split) is None:
            raise UserError(f"{part.path} has no {split} shards. Use --split train or --text FILE.")
    return splits


def read_pair(record: dict) -> tuple[list[dict], str]:
    """Return the messages before the last reply of a record, and the reference, which is the text of that reply."""
    messages = read_messages(record)
    last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
    if "content" not in messages[last]:
        raise UserError(
            "ends with a reply without text, such as a tool call. Answers are compared as text, so end it with a text "
            "reply."
        )
    return messages[:last], messages[last]["content"].strip()


def encode_pairs(tokenizer: Tokenizer, records: list[tuple[str, dict]]) -> list[tuple[list[int], str]]:
    """Return the prompt (ids) and the reference of each record. Raises UserError, which names the record's location,
    for an invalid one."""
    pairs = []
    for where, record in records:
        try:
            messages, reference = read_pair(record)
        except UserError as error:
            raise UserError(f"{where} {error}") from error
        try:
            pairs.append((prompt_ids(tokenizer, messages), reference))
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
    return pairs


def measure_pairs(
    model: GPT,
    tokenizer: Tokenizer,
    records: list[tuple[str, dict]],
    dist: runtime.Runtime,
    batch_size: int,
    max_new_tokens: int,
    stop: list[str],
) -> tuple[dict[str, Figure], list[str | None]]:
    """Measure the model's answers to prompts by `measure_answers`, and return the answer to each record too.

    A record whose prompt leaves no room for an answer is skipped, and its answer is None.
    """
    pairs = encode_pairs(tokenizer, records)
    lengths = [len(prompt) for prompt, _ in pairs]
    limit = model.config.block_size - 1  # leaves room for one token of the answer
    fitting = [i for i, length in enumerate(lengths) if length <= limit]
    with dist.autocast():
        prompts = [pairs[i][0] for i in fitting]
        answers = greedy_answers(model, tokenizer, prompts, stop, max_new_tokens, batch_size)
    references = [pairs[i][1] for i in fitting]
    measured = measure_answers(list(map(after_thinking, answers, references)), references)
    note = skipped_note(records, lengths, limit)
    figures = {name: each._replace(note="; ".join(filter(None, [each.note, note]))) for name, each in measured.items()}
    answer_of = dict(zip(fitting, answers, strict=True))
    return figures, [answer_of.get(i) for i in range(len(records))]


def print_table(rows: list[dict]) -> None:
    """Print the results as a table, with their methods and notes below it."""
    width = max(len(row["on"]) for row in rows)
    print(f"{'on':{width}}  {'measure':16} {'value':>10}  {'± error':>9} {'n':>11}")
    for row in rows:
        value = "n/a" if row["value"] is None else f"{row['value']:.4f}"
        error = "-" if row["standard_error"] is None else f"{row['standard_error']:.4f}"
        print(f"{printable(row['on']):{width}}  {row['measure']:16} {value:>10}  {error:>9} {row['n']:11,}")
    for words, names in remarks(rows).items():
        print(printable(f"{', '.join(names)}: {words}"))


def main() -> int:
    args = parse_arguments()
    # ---- input, read before the model, because loading the model may take long
    dataset, document_mask = args.dataset, False
    if not (args.dataset or args.text or args.pairs or args.choices):
        dataset, document_mask = training_dataset(args.source, args.checkpoint)
    pairs = read_records(args.pairs, args.limit) if args.pairs else []
    choices = read_choices(args.choices, args.limit) if args.choices else []

    # ---- measurements
    model, tokenizer, source, dist, block_size = load_evaluated(args)
    figures: list[tuple[str, dict[str, Figure]]] = []  # of each input
    answered = []
    if dataset:
        for name, tokens in load_splits(dataset, args.split, document_mask, tokenizer, source).items():
            figures.append((name, measure_tokens(model, tokenizer, tokens, dist, args.batch_size, block_size)))
    if args.text:
        figures.append((args.text, measure_text(model, tokenizer, args.text, dist, args.batch_size, block_size)))
    if pairs:
        measured, answers = measure_pairs(
            model, tokenizer, pairs, dist, args.batch_size, args.max_new_tokens, args.stop
        )
        figures.append((args.pairs, measured))
        answered += [record | {"answered": answer} for (_, record), answer in zip(pairs, answers, strict=True)]
    if choices:
        measured, chosen = measure_choices(model, choices, *encode_choices(tokenizer, choices), dist, args.batch_size)
        figures.append((args.choices, measured))
        answered += [record | {"chosen": choice} for (_, record), choice in zip(choices, chosen, strict=True)]

    # ---- output
    rows = [
        {"on": name, "measure": measure, "value": each.value, "standard_error": each.error, "n": each.n}
        | {"method": each.method or None, "note": each.note or None}
        for name, measured in figures
        for measure, each in measured.items()
    ]
    if args.json:
        result = {"checkpoint": source, "block_size": block_size, "results": rows}
        print(printable(json.dumps(result, ensure_ascii=False)))
    else:
        print_table(rows)
    if args.answers:
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in answered]
        Path(args.answers).write_text("".join(lines), encoding="utf-8")
    return 0
