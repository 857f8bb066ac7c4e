"""Throughput and peak memory of preparing a corpus with GPT-2's tokenizer: acorn, nanoGPT's way, tiktoken, tokenizers.

$ python benchmarks/prepare.py --megabytes 200

The corpus is the source text of Python's standard library and the installed packages: a file of JSON lines with a
document per source file. Each contender is a separate process that reads the corpus and writes tokens to disk; the
whole process is timed. MB/s counts UTF-8 bytes of text. Memory is the peak of the sum over the contender's processes
(proportional set size, sampled; Linux only).

nanoGPT's way follows its data/openwebtext/prepare.py: datasets.map with tiktoken, one document at a time, in one
process per core, and then one memmap, filled in 1024 parts. tiktoken and (Hugging Face) tokenizers encode batches of
1000 documents on all cores and write one file. acorn writes shards, hashes and a validation split, and can resume.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

REPO = Path(__file__).resolve().parent.parent
sys.path[0] = str(REPO)  # not this folder, because its prepare.py would shadow the package

from acorn.data.shards import load_dataset  # noqa: E402
from acorn.data.tokenizer_gpt2 import _gpt2_encoding, gpt2_config  # noqa: E402

CORES = os.cpu_count() or 1
EOT = 50256


def make_corpus(path: Path, megabytes: float) -> tuple[int, int]:
    """Write the corpus. Returns the number of documents and of bytes of text."""
    seen, documents, size = set(), 0, 0
    folders = [Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib")]
    files = (file for folder in folders for file in sorted(folder.rglob("*")))
    with open(path, "w", encoding="utf-8") as corpus:
        for file in files:
            if file.suffix not in (".py", ".pyi", ".txt", ".md", ".rst", ".h", ".hpp") or not file.is_file():
                continue
            data = file.read_bytes()
            if len(data) < 100 or data in seen:
                continue
            try:
                corpus.write(json.dumps({"text": data.decode()}) + "\n")
            except UnicodeDecodeError:
                continue
            seen.add(data)
            documents, size = documents + 1, size + len(data)
            if size >= megabytes * 1e6:
                break
    return documents, size


def nanogpt(corpus: Path, folder: Path) -> None:
    import datasets

    encoding = _gpt2_encoding()

    def process(example: dict) -> dict:
        ids = [*encoding.encode_ordinary(example["text"]), EOT]
        return {"ids": ids, "len": len(ids)}

    rows = datasets.load_dataset("json", data_files=str(corpus), split="train", cache_dir=str(folder / "cache"))
    rows = rows.map(process, remove_columns=["text"], num_proc=CORES)
    total = int(np.sum(rows["len"], dtype=np.uint64))
    tokens = np.memmap(folder / "train.bin", dtype=np.uint16, mode="w+", shape=(total,))
    parts, at = min(1024, len(rows)), 0
    for i in range(parts):
        part = np.concatenate(rows.shard(num_shards=parts, index=i, contiguous=True).with_format("numpy")["ids"])
        tokens[at : at + len(part)] = part
        at += len(part)
    tokens.flush()


def batches(corpus: Path) -> Iterator[list[str]]:
    texts = []
    with open(corpus, encoding="utf-8") as lines:
        for line in lines:
            texts.append(json.loads(line)["text"])
            if len(texts) == 1000:
                yield texts
                texts = []
    yield texts


def tiktoken(corpus: Path, folder: Path) -> None:
    encoding = _gpt2_encoding()
    with open(folder / "train.bin", "wb") as file:
        for texts in batches(corpus):
            for ids in encoding.encode_ordinary_batch(texts, num_threads=CORES):
                file.write(np.array([EOT, *ids], dtype=np.uint16).data)


def tokenizers(corpus: Path, folder: Path) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(json.dumps(gpt2_config()))
    with open(folder / "train.bin", "wb") as file:
        for texts in batches(corpus):
            for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False):
                file.write(np.array([EOT, *encoding.ids], dtype=np.uint16).data)


PEERS = {"nanoGPT's way": nanogpt, "tiktoken": tiktoken, "tokenizers": tokenizers}


def measure(name: str, corpus: Path, limit: float) -> tuple[float, float, int] | None:
    """Run one contender in a separate process. Returns seconds, peak MB and tokens, or None beyond `limit` seconds."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--peer", name, "--corpus", corpus, "--folder", folder]
        if name == "acorn":
            command = [sys.executable, REPO / "prepare", "text", corpus, "--out", f"{folder}/dataset"]
        # let Python cache acorn's bytecode, as it does for installed packages
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        start, peak = time.perf_counter(), 0.0
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen(command, env=environment, start_new_session=True, **quiet)
        ended = threading.Event()
        threading.Thread(target=lambda: (process.wait(), ended.set()), daemon=True).start()
        while not ended.wait(0.1):  # returns at once when the process ends
            peak = max(peak, memory(process.pid))
            if time.perf_counter() - start > limit:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                return None
        seconds = time.perf_counter() - start
        if process.returncode:
            raise SystemExit(f"{name} failed with exit code {process.returncode}: {' '.join(map(str, command))}")
        if name == "acorn":
            dataset = load_dataset(f"{folder}/dataset")
            return seconds, peak, len(dataset.train) + len(dataset.val)
        return seconds, peak, Path(folder, "train.bin").stat().st_size // 2


def memory(session: int) -> float:
    """Return the MB used by all processes of a session; shared pages count once."""
    total = 0
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if int((process / "stat").read_text().rsplit(")", 1)[1].split()[3]) == session:
                total += int((process / "smaps_rollup").read_text().split("Pss:")[1].split()[0])
        except (OSError, IndexError):  # the process has ended
            continue
    return total * 1024 / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=200, help="size of the corpus")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--limit", type=float, default=600, help="seconds after which a contender's run is stopped")
    parser.add_argument("--only", default="", help="only contenders whose name contains this")
    parser.add_argument("--json", default="", help="also write the result to this file")
    parser.add_argument("--peer", help=argparse.SUPPRESS)  # this and the next two are for the contenders' processes
    parser.add_argument("--corpus", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peer:
        PEERS[args.peer](args.corpus, args.folder)
        return
    sys.path.append(str(Path(__file__).parent))
    import bench  # imports torch, which the contenders' processes do not need
    import torch
    from bench import machine, median, table

    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "corpus.jsonl"
        documents, size = make_corpus(corpus, args.megabytes)
        print(machine(torch.device("cpu")))
        print(f"{documents:,} documents, {size / 1e6:.1f} MB; medians of {args.rounds} rounds\n")
        runs = {name: [] for name in ("acorn", *PEERS) if args.only in name}
        for turn in range(args.rounds):
            for name, results in runs.items():
                if len(results) < turn:  # the contender was stopped
                    continue
                run = measure(name, corpus, args.limit)
                results += [run] if run else []
                output = f"{run[0]:.2f} s, {run[1]:,.0f} MB" if run else f"stopped after {args.limit:g} s"
                print(f"round {turn + 1}, {name}: {output}", flush=True)
    seconds = {name: median([run[0] for run in results]) for name, results in runs.items() if results}
    base = seconds.get("nanoGPT's way")
    rows = []
    for name, s in sorted(seconds.items(), key=lambda item: item[1]):
        row = {"contender": name, "MB/s": f"{size / 1e6 / s:.1f}", "peak MB": f"{max(r[1] for r in runs[name]):,.0f}"}
        if base:
            row["x nanoGPT's way"] = f"{base / s:.1f}"
        rows.append(row | {"tokens": f"{runs[name][0][2]:,}"})
    rows += [{"contender": name, "MB/s": f"over {args.limit:g} s"} for name, results in runs.items() if not results]
    print("\n" + table(rows))
    bench.write(args.json, machine=machine(torch.device("cpu")), bytes=size, runs=runs)


if __name__ == "__main__":
    main()
