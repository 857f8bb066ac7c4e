"""Measure a checkpoint on text, on answers, and on choices; each figure comes with its standard error.

    python -m acorn.evaluate out/x                        # the validation split that it was trained beside
    python -m acorn.evaluate out/x --dataset NAME --split val
    python -m acorn.evaluate out/x --text FILE            # perplexity and bits per byte of a text file
    python -m acorn.evaluate out/x --pairs FILE.jsonl     # {"prompt", "response"}: exact match, BLEU, ROUGE
    python -m acorn.evaluate out/x --choices FILE.jsonl   # {"prompt", "choices", "answer"}: accuracy by likelihood

Where the checkpoint carries a chat template, a prompt is what a user says to it; otherwise it is text to be continued.
"""

import argparse
import json
import math
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from acorn import UserError, chat, checkpoint, files, printable, records, runtime
from acorn.evaluate import refuse_none, window_sums
from acorn.generate import Sampling, TextStream, encode_prompt, generate
from acorn.mixture import load_mixture
from acorn.shards import ShardWriter, Tokens, open_shard
from acorn.tokenizer import Tokenizer, tokenizer_hash
from model import GPT


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """The mean of n values, and its standard error: their standard deviation / sqrt(n)."""
    values = np.asarray(values, dtype=np.float64)
    error = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return float(values.mean()), float(error)


def ratio_and_error(numerators: np.ndarray, denominators: np.ndarray) -> tuple[float, float]:
    """The sum of numerators over that of denominators, and its standard error by linearization: tokens of one window
    depend on each other, windows are taken as independent. Cochran, Sampling Techniques, 1977, section 6.4."""
    ratio, n = numerators.sum() / denominators.sum(), len(numerators)
    _, error = mean_and_error((numerators - ratio * denominators) * n / denominators.sum())
    return float(ratio), error


def measure_tokens(
    model: GPT, tokenizer: Tokenizer, tokens: Tokens, r: runtime.Runtime, batch_size: int, block_size: int
) -> dict[str, tuple]:
    """Value, standard error and number of tokens or bytes of loss (nats), perplexity and bits per byte; windows of
    `block_size` tokens stand side by side."""
    sums = window_sums(model, tokens, r, batch_size, block_size, 0, tokenizer.token_bytes()).numpy()
    n_tokens, n_bytes = int(sums[:, 0].sum()), int(sums[:, 3].sum())
    refuse_none(n_tokens, tokens)
    loss, error = ratio_and_error(sums[:, 1], sums[:, 0])
    perplexity = math.exp(min(loss, 700.0))
    result = {"loss": (loss, error, n_tokens), "perplexity": (perplexity, perplexity * error, n_tokens)}
    if n_bytes:
        bits, error = ratio_and_error(sums[:, 2] / math.log(2), sums[:, 3])
        result["bits per byte"] = (bits, error, n_bytes)
    return result


def measure_text(model: GPT, tokenizer: Tokenizer, path: str, *how) -> dict[str, tuple]:
    """`measure_tokens` of a UTF-8 text file, as one document of a dataset."""
    ids = [*tokenizer.before_document, *tokenizer.encode(files.read_text(path)), *tokenizer.after_text]
    ids = np.array(ids, dtype=np.int32)
    if len(ids) < 2:
        raise UserError(f"{path} has nothing in it to predict; give a file with more text")
    with tempfile.TemporaryDirectory() as folder:  # the loop over windows reads shards
        with ShardWriter(folder, "val", tokenizer.n_vocab) as writer:
            writer.write(ids)
        shards = [open_shard(shard) for shard in sorted(Path(folder).glob("*.bin"))]
        return measure_tokens(model, tokenizer, Tokens(shards, tokenizer.n_vocab, "val"), *how)


def prompt_ids(tokenizer: Tokenizer, messages: list[dict]) -> list[int]:
    """What the model sees before it answers: the conversation by its chat template; without one, the prompt as text."""
    if tokenizer.chat_template:
        return chat.render(tokenizer, messages).tolist()
    if len(messages) > 1:
        raise UserError("is a conversation of several messages, but this checkpoint has no chat template")
    return encode_prompt(tokenizer, messages[0]["content"], control=False)


def greedy_answers(
    model: GPT, tokenizer: Tokenizer, prompts: list[list[int]], stop: list[str], max_new_tokens: int, batch_size: int
) -> list[str]:
    """The likeliest continuation of each prompt, token by token, up to the end of a turn or text, or a stop string."""
    ends = chat.stop_ids(tokenizer) if tokenizer.chat_template else set()
    streams = [TextStream(tokenizer, stop, ends) for _ in prompts]
    answers = [""] * len(prompts)
    for first in range(0, len(prompts), batch_size):
        batch = prompts[first : first + batch_size]

        def on_token(row: int, token: int, logprob: float, first=first) -> bool:
            answers[first + row] += streams[first + row].push(token)
            return streams[first + row].stopped_by is not None

        greedy = Sampling(temperature=0)
        generate(model, batch, max_new_tokens, greedy, [0] * len(batch), on_token, tokenizer.n_vocab)
    return [(answer + stream.finish()).strip() for answer, stream in zip(answers, streams, strict=True)]


def after_thinking(answer: str, reference: str) -> str:
    """The part of an answer that is compared: what follows its thinking, unless the reference thinks too."""
    return answer if "</think>" in reference else answer.rpartition("</think>")[2].strip()


def measure_answers(answers: list[str], references: list[str]) -> dict[str, tuple]:
    """Exact match, BLEU (https://aclanthology.org/W18-6319, its error from 1000 bootstrap samples of the examples) and
    ROUGE F-measures (https://aclanthology.org/W04-1013) of answers against one reference each, all in percent."""
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics import BLEU

    n = len(answers)
    exact = [100.0 * (answer == reference) for answer, reference in zip(answers, references, strict=True)]
    result = {"exact match": (*mean_and_error(exact), n)}

    bleu = BLEU(effective_order=True)
    each = [bleu.sentence_score(answer, [reference]) for answer, reference in zip(answers, references, strict=True)]
    statistics = np.array([[*s.counts, *s.totals, s.sys_len, s.ref_len] for s in each])  # (n, 10)

    def corpus_bleu(sums: np.ndarray) -> float:
        counts, totals, (answer_length, reference_length) = sums[:4].tolist(), sums[4:8].tolist(), sums[8:].tolist()
        return BLEU.compute_bleu(counts, totals, answer_length, reference_length).score

    random = np.random.default_rng(0)
    samples = [corpus_bleu(statistics[random.integers(n, size=n)].sum(0)) for _ in range(1000)]
    result["BLEU"] = (corpus_bleu(statistics.sum(0)), float(np.std(samples)) if n > 1 else math.nan, n)

    names = {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L"}
    scorer = RougeScorer(list(names), use_stemmer=True)
    scores = [scorer.score(reference, answer) for answer, reference in zip(answers, references, strict=True)]
    for key, name in names.items():
        result[name] = (*mean_and_error([100 * score[key].fmeasure for score in scores]), n)
    return result


@torch.no_grad()
def choice_logprobs(
    model: GPT, rows: list[tuple[list[int], list[int]]], r: runtime.Runtime, batch_size: int
) -> np.ndarray:
    """The log-probability (nats) of each continuation after its prompt, both token ids: (len(rows),)."""
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
        with r.autocast():
            _, nats = model(r.to_device(x), r.to_device(y), reduction="none")
        result += (-nats.double().sum(1)).tolist()
    return np.array(result)


def encode_choice(tokenizer: Tokenizer, prompt: str, choice: str) -> tuple[list[int], list[int]]:
    """The ids of a prompt and of a choice after it. In text to be continued both are encoded as one, so that the choice
    has the tokens that it would have there."""
    if tokenizer.chat_template:
        ids = prompt_ids(tokenizer, [{"role": "user", "content": prompt}])
        return ids, tokenizer.encode_part(choice, continues=True, control=False).tolist()
    text = prompt.rstrip()  # the space before a word belongs to its token
    ids = encode_prompt(tokenizer, text, control=False)
    return ids, encode_prompt(tokenizer, prompt + choice, control=False)[len(ids if text else tokenizer.before_text) :]


def measure_choices(
    model: GPT, tokenizer: Tokenizer, records: list[tuple[str, dict]], r: runtime.Runtime, batch_size: int
) -> tuple[dict[str, tuple], list[int]]:
    """Accuracy, in percent, of the choice that is likeliest, as it is and for each of its bytes; and the choices."""
    rows = []
    for where, record in records:
        for choice in record["choices"]:
            prompt, continuation = encode_choice(tokenizer, record["prompt"], choice)
            if len(prompt) + len(continuation) > model.config.block_size + 1:
                raise UserError(
                    f"{where} has {len(prompt) + len(continuation)} tokens, more than the block size of "
                    f"{model.config.block_size}; make its prompt shorter"
                )
            rows.append((prompt, continuation))
    logprobs = choice_logprobs(model, rows, r, batch_size)
    right, right_by_bytes, chosen, at = [], [], [], 0
    for _, record in records:
        own = logprobs[at : at + len(record["choices"])]
        at += len(own)
        by_bytes = own / [len(choice.encode()) for choice in record["choices"]]
        chosen.append(int(own.argmax()))
        right.append(100.0 * (chosen[-1] == record["answer"]))
        right_by_bytes.append(100.0 * (by_bytes.argmax() == record["answer"]))
    n = len(records)
    figures = {"accuracy": (*mean_and_error(right), n), "accuracy by byte": (*mean_and_error(right_by_bytes), n)}
    return figures, chosen


def read_jsonl(path: str, limit: int) -> list[tuple[str, dict]]:
    """The first `limit` objects (0: all) of a .jsonl file, each with the words that say where it stands."""
    records = []
    for number, line in enumerate(files.read_text(path).split("\n"), 1):
        if line.strip() and not (limit and len(records) == limit):
            try:
                record = json.loads(line)
                json.dumps(record, ensure_ascii=False).encode()  # fails where an escape is half a character
            except (ValueError, RecursionError) as error:
                raise UserError(
                    f"line {number} of {path} is no JSON ({error}); a .jsonl file has one object a line"
                ) from error
            if not isinstance(record, dict):
                raise UserError(f"line {number} of {path} is no object with fields; a .jsonl file has one a line")
            records.append((f"line {number} of {path}", record))
    if not records:
        raise UserError(f"{path} is empty; write one JSON object a line")
    return records


def check_choices(where: str, record: dict) -> None:
    choices, answer = record.get("choices"), record.get("answer")
    texts = [record.get("prompt"), *choices] if isinstance(choices, list) else [None]
    if not all(isinstance(text, str) for text in texts) or len(texts) < 3 or not all(texts[1:]):
        raise UserError(f'{where} should have "prompt", a text, and "choices", a list of two or more texts')
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        raise UserError(f'{where}: "answer" should be the number of the right choice, from 0 to {len(choices) - 1}')


def check_target(path: Path, inputs: list[str | None]) -> None:
    if not path.parent.is_dir() or path.is_dir():
        raise UserError(f"--answers {path} cannot be written: give a file, in a folder that is there")
    if path.exists() and any(source and Path(source).exists() and path.samefile(source) for source in inputs):
        raise UserError(f"--answers {path} would replace what is measured on; give another file")


def trained_beside(source: str, which: str) -> tuple[str, bool]:
    """The dataset that a run was trained on, and whether it kept documents apart."""
    path = Path(source)
    from_elsewhere = path.is_file() or any((path / name).exists() for name in ("config.json", "ckpt.pt"))
    if (from_elsewhere or checkpoint.is_on_hub(source)) and not checkpoint.step_folders(path):
        raise UserError(f"{source} does not say what it was trained on; give --dataset, --text, --pairs or --choices")
    settings = checkpoint.find(path, which)[1]["settings"]
    return str(settings.get("dataset")), settings.get("document_mask") is True


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m acorn.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("source", help="an out_dir, a nanoGPT ckpt.pt, or whatever else init_from takes")
    parser.add_argument("--checkpoint", default="best", help="of an out_dir: best (default), latest, or step_002000")
    parser.add_argument("--dataset", help="a prepared dataset: its path, or its name in data/")
    parser.add_argument("--split", choices=("train", "val"), default="val", help="of it; default: %(default)s")
    parser.add_argument("--text", metavar="FILE", help="a text file")
    parser.add_argument("--pairs", metavar="FILE", help="jsonl of prompts and responses, or of messages")
    parser.add_argument("--choices", metavar="FILE", help="jsonl of prompts, choices, and the number of the right one")
    parser.add_argument("--limit", type=int, default=0, help="look at so many lines of a jsonl file; 0: all")
    parser.add_argument("--max_new_tokens", type=int, default=128, help="in an answer; default: %(default)s")
    parser.add_argument("--stop", action="append", default=[], help="text that ends an answer; may be given repeatedly")
    parser.add_argument("--block_size", type=int, default=0, help="of windows; default: the model's, at most 1024")
    parser.add_argument("--batch_size", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--device", default="auto", help="auto | cpu | cuda | cuda:1 | mps")
    dtypes = ("auto", "float32", "bfloat16", "float16")
    parser.add_argument("--dtype", default="auto", choices=dtypes, help="auto: float32 on a CPU")
    parser.add_argument("--answers", metavar="FILE", help="write what the model answered and chose to this jsonl file")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    args = parser.parse_args()
    for name in ("batch_size", "max_new_tokens"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)} must be at least 1")
    for name in ("limit", "block_size"):
        if getattr(args, name) < 0:
            raise UserError(f"--{name} {getattr(args, name)} must not be negative")

    # ---- what is measured on, read before the model, which may take long
    if args.answers:
        check_target(Path(args.answers), [args.text, args.pairs, args.choices])
    dataset, apart = args.dataset, False
    if not (args.dataset or args.text or args.pairs or args.choices):
        dataset, apart = trained_beside(args.source, args.checkpoint)
    pairs = read_jsonl(args.pairs, args.limit) if args.pairs else []
    choices = read_jsonl(args.choices, args.limit) if args.choices else []
    for where, record in choices:
        check_choices(where, record)

    # ---- model
    r = runtime.setup(args.device, args.dtype, False)
    model, tokenizer, source = checkpoint.load_model(args.source, args.checkpoint)
    if tokenizer is None:
        raise UserError(f"{source} comes without a tokenizer that is known here")
    model.to(r.device).eval()
    block_size = args.block_size or min(model.config.block_size, 1024)
    if block_size > model.config.block_size:
        raise UserError(f"--block_size {block_size} is beyond the model's {model.config.block_size}")
    on = f"{model.num_params():,} parameters, on {r.device} in {str(r.dtype)[6:]}"
    print(printable(f"{source}: {on}"), file=sys.stderr)
    figures, answered = {}, []  # by what they were measured on
    how = (r, args.batch_size, block_size)

    # ---- text
    if dataset:
        mixture = load_mixture(dataset, document_mask=apart)
        if tokenizer_hash(mixture.tokenizer) != tokenizer_hash(tokenizer):
            raise UserError(
                f"{dataset} was prepared with another tokenizer ({mixture.tokenizer.kind}) than that of {source} "
                f"({tokenizer.kind}); give the text itself by --text FILE"
            )
        for each in mixture.datasets:
            tokens = getattr(each, args.split)
            if tokens is None:
                raise UserError(f"{each.path} has no validation shards; give --split train, or --text FILE")
            figures[f"{each.path} {args.split}"] = measure_tokens(model, tokenizer, tokens, *how)
    if args.text:
        figures[args.text] = measure_text(model, tokenizer, args.text, *how)

    # ---- answers and choices
    if pairs:
        prompts, references = [], []
        for where, record in pairs:
            try:
                messages = records.read_messages(record)
                last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
                if "content" not in messages[last]:
                    raise UserError(
                        "has a last reply without text, such as a call of a tool; answers are compared as text"
                    )
                prompts.append(prompt_ids(tokenizer, messages[:last]))
                if len(prompts[-1]) >= model.config.block_size:
                    raise UserError(
                        f"has {len(prompts[-1])} tokens before the answer; the model holds {model.config.block_size}"
                    )
            except UserError as error:
                raise UserError(f"{where} {error}") from error
            references.append(messages[last]["content"].strip())
        with r.autocast():
            options = (args.stop, args.max_new_tokens, args.batch_size)
            answers = greedy_answers(model, tokenizer, prompts, *options)
        figures[args.pairs] = measure_answers(list(map(after_thinking, answers, references)), references)
        answered += [record | {"answered": answer} for (_, record), answer in zip(pairs, answers, strict=True)]
    if choices:
        figures[args.choices], chosen = measure_choices(model, tokenizer, choices, r, args.batch_size)
        answered += [record | {"chosen": choice} for (_, record), choice in zip(choices, chosen, strict=True)]

    # ---- what came out
    rows = [
        {"on": on, "measure": name, "value": value, "standard_error": None if math.isnan(error) else error, "n": n}
        for on, each in figures.items()
        for name, (value, error, n) in each.items()
    ]
    if args.json:
        result = {"checkpoint": source, "block_size": block_size, "results": rows}
        print(printable(json.dumps(result, ensure_ascii=False)))
    else:
        width = max(len(row["on"]) for row in rows)
        print(f"{'on':{width}}  {'measure':16} {'value':>10}  {'± error':>9} {'n':>11}")
        for row in rows:
            error = "-" if row["standard_error"] is None else f"{row['standard_error']:.4f}"
            print(
                f"{printable(row['on']):{width}}  {row['measure']:16} {row['value']:10.4f}  {error:>9} {row['n']:11,}"
            )
    if args.answers:
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in answered]
        Path(args.answers).write_text("".join(lines), encoding="utf-8")
    return 0
