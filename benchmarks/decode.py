"""Tokens a second of generation: acorn, nanoGPT, Hugging Face, CTranslate2 and llama.cpp on the same shapes.

$ python benchmarks/decode.py --nanogpt PATH_OF_A_CHECKOUT

GPT-2 124M shapes with random weights, greedy, so that only speed is compared. A run reads a prompt and writes
`new` tokens; tokens/s counts the written ones over the whole time, prompt included; the first token's time stands
beside it. Peers that are not installed are named and left out (requirements-bench.txt).
"""

import contextlib
import importlib.util
import io
import tempfile
import time
from pathlib import Path

import torch

from acorn.generate import Sampling, fast_decoding, generate
from model import GPT, GPTConfig

SHAPES = dict(block_size=1024, vocab_size=50257, n_layer=12, n_head=12, n_embd=768)


def acorn_run(dtype, device, quantize="", compile=False):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SHAPES)).to(device, dtype).eval()
    model = fast_decoding(model, quantize, compile)

    def run(prompts, new):
        first = []
        start = time.perf_counter()

        def on_token(row, token, logprob):
            if not first:
                first.append(time.perf_counter() - start)
            return False

        generate(model, prompts, new, Sampling(temperature=0), [0] * len(prompts), on_token, compile=compile)
        return first[0]

    return run


def hugging_face_run(dtype, device):
    import transformers

    transformers.logging.set_verbosity_error()
    config = transformers.GPT2Config(eos_token_id=None, bos_token_id=None)
    model = transformers.GPT2LMHeadModel(config).to(device, dtype).eval()

    def run(prompts, new):
        idx = torch.tensor(prompts, device=device)
        start = time.perf_counter()
        model.generate(idx, max_new_tokens=1, do_sample=False, pad_token_id=0)
        first = time.perf_counter() - start
        model.generate(idx, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)
        return first

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
        model.generate(idx, new, top_k=1)
        return first

    return run


def ctranslate2_run(compute_type, threads):
    import ctranslate2
    import transformers

    with tempfile.TemporaryDirectory() as scratch:
        config = transformers.GPT2Config()
        transformers.GPT2LMHeadModel(config).save_pretrained(f"{scratch}/hf")
        from acorn.tokenizer import gpt2_files

        for name, file in zip(("vocab.json", "merges.txt"), gpt2_files(), strict=True):
            Path(f"{scratch}/hf/{name}").write_bytes(Path(file).read_bytes())
        transformers.GPT2TokenizerFast.from_pretrained(f"{scratch}/hf").save_pretrained(f"{scratch}/hf")
        ctranslate2.converters.TransformersConverter(f"{scratch}/hf").convert(f"{scratch}/ct2", force=True)
        generator = ctranslate2.Generator(f"{scratch}/ct2", compute_type=compute_type, intra_threads=threads)
        words = transformers.GPT2TokenizerFast.from_pretrained(f"{scratch}/hf").convert_ids_to_tokens(list(range(2000)))

    def run(prompts, new):
        texts = [[words[i] for i in prompt] for prompt in prompts]
        options = dict(sampling_topk=1, include_prompt_in_result=False, end_token=[])
        start = time.perf_counter()
        generator.generate_batch(texts, max_length=1, **options)
        first = time.perf_counter() - start
        generator.generate_batch(texts, max_length=new, min_length=new, **options)
        return first

    return run
