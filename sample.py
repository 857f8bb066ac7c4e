"""Sample text from a trained GPT.

From a training run:    python sample.py --out_dir=out/quickstart --start="ROMEO:"
From published weights: python sample.py --init_from=gpt2 --start="Once upon a time" --num_samples=1
Interactive prompts:    python sample.py --out_dir=out/quickstart --interactive=True
A conversation:         python sample.py --out_dir=out/chat --chat=True
"""

import json
import sys
from dataclasses import dataclass, field
from typing import Literal

import acorn  # noqa: F401  # isort: skip  # before torch: it selects the OpenMP runtime

from acorn import UserError, checkpoint, files, printable, replace_invalid, run, settings
from acorn.data.tokenizer import END_OF_TEXT
from acorn.distributed import runtime
from acorn.inference import beam
from acorn.inference.console import continue_prompts, converse, explain_keys, for_stdout, read_line, read_prompts
from acorn.inference.cpu_decode import prepare_for_decoding
from acorn.inference.generate import encode_prompt


@dataclass
class SampleSettings:
    """Sample from a GPT."""

    # model
    init_from: str = "resume"  # resume: the run in out_dir | an acorn out_dir | a nanoGPT ckpt.pt | gpt2, gpt2-xl, ...
    out_dir: str = "out"  # the run's folder
    checkpoint: str = "best"  # of the run: best (or the newest if there is no best) | latest | step_002000
    # prompts
    start: str = "\n"  # the prompt, or FILE:prompt.txt; <|endoftext|> alone starts a document, as in nanoGPT
    control_tokens: bool = False  # True: names such as <|im_end|> in start are control tokens; False: they are text
    prompts: str = ""  # a file of prompts to continue as one batch: one per line, or jsonl objects with "prompt"
    interactive: bool = False  # read prompts from the console
    chat: bool = False  # chat on the console, with the checkpoint's chat template; --start is the first message
    system: str = ""  # system message of the chat
    # sampling
    num_samples: int = 10  # samples per prompt; 1 if not given with --prompts, --interactive or --num_beams
    max_new_tokens: int = 500  # maximum tokens per sample
    temperature: float = 0.8  # below 1: more predictable; above 1: more random; 0: greedy
    top_k: int = 200  # sample from the k most likely tokens only; 0: from all
    top_p: float = 1.0  # sample from the most likely tokens that together reach this probability; 1: from all
    min_p: float = 0.0  # sample from tokens at least this fraction as likely as the most likely one
    repetition_penalty: float = 1.0  # above 1: tokens that already occurred become less likely
    no_repeat_ngram_size: int = 0  # n > 0: no n-gram occurs twice
    num_beams: int = 1  # above 1: beam search for the num_samples most likely texts, instead of sampling
    length_penalty: float = 1.0  # beams are ranked by log-probability / length^length_penalty; above 0 favors long ones
    early_stopping: Literal[True, False, "never"] = False  # end at num_beams texts; never: when no better one can come
    stop: list[str] = field(default_factory=list)  # end before this text; may be repeated
    seed: int = 1337  # sample k uses seed + k, so the same seed gives the same samples
    # output
    stream: Literal["auto", True, False] = "auto"  # print text as it is generated; auto: for one sample on a terminal
    logprobs: bool = False  # also print each token's log-probability
    json: bool = False  # print one JSON object per sample instead of text
    # machine
    device: str = "auto"  # auto | cpu | cuda | cuda:1 | mps
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: float32 on a CPU
    quantize: Literal["none", "int8"] = "none"  # int8: one byte per weight, on CPUs only; faster, slightly less exact
    compile: Literal["auto", True, False] = "auto"  # torch.compile the one-token step; auto: if this saves time


def check(s: SampleSettings, given: dict) -> None:
    """Raise UserError for a setting that is out of range, and for settings that exclude each other."""
    settings.check_bounds(vars(s))
    sources = [name for name in ("start", "prompts", "interactive") if name in given and getattr(s, name)]
    if len(sources) > 1:
        raise UserError(f"{sources[0]} and {sources[1]} both give prompts. Leave out one of them.")
    if s.chat and (s.interactive or s.prompts or s.json or s.logprobs):
        raise UserError("chat works on the console only. Leave out interactive, prompts, json and logprobs.")
    if s.control_tokens and (s.chat or s.interactive or s.prompts):
        raise UserError(
            "control_tokens applies to start only. Leave it out, or leave out chat, interactive and prompts."
        )
    if s.system and not s.chat:
        raise UserError("system needs a chat. Add --chat=True.")
    beam.check(s, given)


def main() -> int:
    replace_invalid(sys.stdin)  # invalid UTF-8 input must not end a conversation
    given = settings.parse(SampleSettings, sys.argv[1:])
    s = settings.build(SampleSettings, given)
    check(s, given)

    # ---- machine; only samples go to stdout, so that they can be piped
    dist = runtime.setup(s.device, s.dtype, s.compile)
    # ---- model
    load_from = checkpoint.source_of(s.init_from, s.out_dir)
    model, tokenizer, source = checkpoint.load_with_tokenizer(load_from, s.checkpoint)
    model.to(dist.device, dist.dtype)
    if s.quantize != "none" and dist.device.type != "cpu":
        raise UserError(f"quantize={s.quantize} works on CPUs only. Leave it out on {dist.device}.")
    summary = f"{model.num_params():,} parameters, on {dist.device} in {runtime.dtype_name(dist.dtype)}"
    print(printable(f"{source}: {summary}"), file=sys.stderr)

    # ---- prompts
    start = files.read_text(s.start[5:]) if s.start.startswith("FILE:") else s.start
    if "start" not in given and tokenizer.kind == "char" and "\n" not in tokenizer.to_dict()["vocab"]:
        start = tokenizer.decode([0])  # the vocabulary has no line break, the default prompt
    if start == END_OF_TEXT and END_OF_TEXT not in tokenizer.control and not s.chat:
        start = ""  # begins a document with the BOS or the end-of-text token, which has another name here
    prompts = read_prompts(s.prompts, tokenizer) if s.prompts else [start]
    control = s.control_tokens or (prompts == [END_OF_TEXT] and not s.prompts)
    num_samples = 1 if (s.prompts or s.num_beams > 1) and "num_samples" not in given else s.num_samples
    longest = max(len(encode_prompt(tokenizer, prompt, control)) for prompt in prompts) + s.max_new_tokens
    if longest > model.config.block_size and not s.chat:
        print(
            f"note: {longest} tokens exceed the block size of {model.config.block_size}; "
            "the model sees a sliding window of the text",
            file=sys.stderr,
        )
    compile = s.compile is True
    if dist.device.type == "cpu" and (s.compile or s.quantize != "none"):
        n_rows = (1 if s.interactive or s.chat else len(prompts)) * s.num_beams
        n_tokens = (num_samples if s.num_beams == 1 else 1) * s.max_new_tokens
        model = prepare_for_decoding(model, s.quantize, s.compile, n_rows, n_tokens)
        compile = False  # prepare_for_decoding has already compiled the model if it is worthwhile
    stream = s.stream if s.stream != "auto" else sys.stdout.isatty() and num_samples == s.num_beams == 1
    stream = stream and not s.json and len(prompts) == 1

    def show(text: str) -> None:
        if stream:
            print(for_stdout(text), end="", flush=True)

    # ---- samples
    if s.chat:
        converse(model, tokenizer, s, start if "start" in given else None, compile)
        return 0

    def answer(prompts: list[str], num_samples: int, control: bool) -> None:
        if s.num_beams > 1:
            print_samples(beam.continue_prompts(model, tokenizer, prompts, control, num_samples, s, compile))
            return
        for k in range(num_samples):
            show(prompts[0])
            print_samples(continue_prompts(model, tokenizer, prompts, control, s.seed + k, s, compile, show))

    def print_samples(samples: list[dict]) -> None:
        for sample in samples:
            if s.json:
                print(for_stdout(json.dumps(sample, ensure_ascii=False)), flush=True)
                continue
            print("" if stream else for_stdout(sample["prompt"] + sample["text"]))
            if s.logprobs:
                for token, logprob in zip(sample["tokens"], sample["logprobs"], strict=True):
                    print(f"{logprob:9.4f}  {token!r}")
            print("---------------", flush=True)

    if not s.interactive:
        answer(prompts, num_samples, control)
        return 0
    explain_keys("a prompt")
    while True:
        try:
            answer([read_line()], num_samples if "num_samples" in given else 1, False)
        except EOFError:
            return 0
        except UserError as error:  # bad input must not end the session
            print(printable(str(error)), file=sys.stderr)


if __name__ == "__main__":
    run(main)
