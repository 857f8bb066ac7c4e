"""The recipes of docs/preferences.md before and after, with standard errors over seeds.

$ python benchmarks/recipes.py
$ python benchmarks/recipes.py --seeds 1 --only rewards

For each seed, a tiny chat model learns sums. It is the start of DPO and the teacher of two students. It then learns a
bad habit from `hasty.jsonl`, in which four of five answers forget to carry, and GRPO has to correct the habit. All
figures are from the 365 sums of `sums_val.jsonl`, which no run has trained on:

    greedy, sampled   percent of answers whose last number is the sum: greedy, and sampled at temperature 1 (pass@1)
    sentences         percent of greedy answers in the preferred style, "The sum is 73."
    perplexity        of correct answers to these sums: of sentences, and of bare numbers
    KL, token loss    of the student, in nats per token of correct sentences: KL(teacher || student) at temperature 1
    equal tokens      percent of these tokens for which student and teacher have the same most likely token
"""

import argparse
import json
import math
import re
import sys
import tempfile
from pathlib import Path

import torch
from bench import REPO, machine, parse_args, table, timed, write  # first, because it makes acorn importable

from acorn import checkpoint
from acorn.data import chat
from acorn.evaluation.tasks import mean_and_error, prompt_ids
from acorn.examples import write_examples
from acorn.inference.generate import Sampling, continue_texts
from acorn.training.rewards import arithmetic
from model import GPT

SUMS = "--block_size=128 --max_iters=800 --cooldown_frac=0.5 --eval_interval=200".split()
HASTY = "--block_size=128 --max_iters=150 --learning_rate=1e-3 --muon_lr=0.002".split()
RECIPES = ("rewards", "preferences", "teacher")


def answers(model: GPT, tokenizer, questions: list[str], temperature: float) -> list[str]:
    """Return the model's answer to each question; temperature 0 is greedy."""
    prompts = [prompt_ids(tokenizer, [{"role": "user", "content": question}]) for question in questions]
    sampling, seeds = Sampling(temperature=temperature), list(range(len(prompts)))
    found = continue_texts(model, tokenizer, prompts, 24, sampling, seeds, ends=chat.stop_ids(tokenizer))
    return [completion.text.strip() for completion in found]


@torch.no_grad()
def logits_of(model: GPT, tokenizer, questions: list[str], replies: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits (n, V) that predict the tokens of the replies, and these tokens (n,)."""
    logits, targets = [], []
    for question, reply in zip(questions, replies, strict=True):
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
        ids, learned = chat.forms_to_learn(tokenizer, messages)[-1][0]
        ids, learned = torch.from_numpy(ids).long(), torch.from_numpy(learned)[1:]
        logits.append(model(ids[None, :-1], ids[None, 1:])[0][0, learned])
        targets.append(ids[1:][learned])
    return torch.cat(logits).float(), torch.cat(targets)


def measure(out_dir: Path, records: list[dict], teacher: Path | None = None) -> dict[str, float]:
    """Return the figures of the newest checkpoint of a run; with a `teacher`, how close it is to that one."""
    model, tokenizer, _ = checkpoint.load_model(str(out_dir), "latest")
    model.eval()
    questions, numbers = [record["prompt"] for record in records], [record["response"] for record in records]
    numbers = [re.search(r"\d+", answer)[0] for answer in numbers]
    sentences = [f"The sum is {number}." for number in numbers]
    if teacher:
        logits, targets = logits_of(model, tokenizer, questions, sentences)
        logp = logits.log_softmax(-1)
        expected = logits_of(*checkpoint.load_model(str(teacher), "latest")[:2], questions, sentences)[0].log_softmax(
            -1
        )
        return {
            "KL": (expected.exp() * (expected - logp)).sum(1).mean().item(),
            "token loss": -logp.gather(1, targets[:, None]).mean().item(),
            "equal tokens": 100 * (logp.argmax(1) == expected.argmax(1)).double().mean().item(),
        }
    result = {}
    for name, temperature in (("greedy", 0.0), ("sampled", 1.0)):
        given = answers(model, tokenizer, questions, temperature)
        right = [arithmetic("", *pair) for pair in zip(given, numbers, strict=True)]
        result[name] = 100 * sum(right) / len(right)
        if name == "greedy":
            styled = [re.fullmatch(r"The sum is \d+\.", answer) is not None for answer in given]
    result["sentences"] = 100 * sum(styled) / len(styled)
    for name, replies in (("sentences", sentences), ("numbers", numbers)):
        loss = torch.nn.functional.cross_entropy(*logits_of(model, tokenizer, questions, replies)).item()
        result[f"perplexity of {name}"] = math.exp(loss)
    return result


def recipes(folder: Path, seed: int, only: str) -> dict[str, dict[str, float]]:
    """Run the recipes in `folder` with a seed. Returns the figures of each model by its name."""

    def train(out: str, config: str, *words: str) -> Path:
        command = [sys.executable, REPO / "train.py", REPO / "config" / config, f"--out_dir={out}", f"--seed={seed}"]
        seconds, lines = timed([*command, *words, "--keep_checkpoints=1"], folder)
        print(f"seed {seed}, {out}: {seconds:.0f} s; {lines[-2][1]}", flush=True)
        return folder / out

    def prepare(kind: str, file: str, tokenizer: str, name: str) -> None:
        words = [kind, f"data/examples/{file}.jsonl", "--tokenizer", tokenizer, "--name", name]
        timed([sys.executable, REPO / "prepare", *words], folder)

    write_examples(folder / "data/examples")
    lines = (folder / "data/examples/sums_val.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    prepare("chat", "sums", "byte", "sums")
    sums = train("out/sums", "quickstart.py", "--dataset=sums", *SUMS)
    result = {"fine-tuned": measure(sums, records)}
    if only in ("", "rewards"):
        prepare("chat", "hasty", "out/sums", "hasty")
        hasty = train("out/hasty", "quickstart.py", "--dataset=hasty", "--init_from=out/sums", *HASTY)
        result["with the bad habit"] = measure(hasty, records)
        result["after rewards"] = measure(train("out/grpo", "grpo_arithmetic.py"), records)
    if only in ("", "preferences"):
        prepare("preferences", "style", "out/sums", "style")
        result["after preferences"] = measure(train("out/style", "dpo_style.py"), records)
    if only in ("", "teacher"):
        result["distilled"] = measure(train("out/student", "distill.py"), records, sums)
        alone = train("out/alone", "distill.py", "--distill_weight=0")
        result["from tokens alone"] = measure(alone, records, sums)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="default: 1 2 3")
    parser.add_argument("--only", choices=RECIPES, default="", help="default: all")
    parser.add_argument("--json", default="", metavar="FILE", help="also write the figures of each seed")
    args = parse_args(parser)
    print(machine(torch.device("cpu")), flush=True)
    results = []
    for seed in args.seeds:
        with tempfile.TemporaryDirectory() as folder:
            results.append(recipes(Path(folder), seed, args.only))
            write(args.json, seeds=args.seeds, results=results)
    print_tables(results)


def print_tables(results: list[dict]) -> None:
    """Print means and standard errors over the results of the seeds: a table of chat models, and one of students."""
    rows: dict[bool, list[dict]] = {False: [], True: []}  # whether they are students
    for name, figures in results[0].items():
        row = {"model": name}
        for key in figures:
            mean, error = mean_and_error([result[name][key] for result in results])
            digits = 3 if "perplexity" in key else 4 if key in ("KL", "token loss") else 1
            row[key] = f"{mean:.{digits}f} ± {error:.{digits}f}"
        rows["KL" in figures].append(row)
    print("\n\n".join(table(each) for each in rows.values() if each))


if __name__ == "__main__":
    main()
