"""Sample text from a trained GPT.

From your own run:     python sample.py --out_dir=out/quickstart --start="ROMEO:"
From published weights: python sample.py --init_from=gpt2 --start="Once upon a time" --num_samples=1
Prompt after prompt:   python sample.py --out_dir=out/quickstart --interactive=True
A conversation:        python sample.py --out_dir=out/chat --chat=True
"""

import dataclasses
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import acorn  # noqa: F401  # isort: skip  # before torch: it selects the OpenMP runtime
import torch

from acorn import UserError, checkpoint, files, printable, run, settings
from acorn.data import chat
from acorn.data.tokenizer import END_OF_TEXT
from acorn.distributed import runtime
from acorn.inference.cpu_decode import prepare_for_decoding
from acorn.inference.generate import Sampling, TextStream, encode_prompt, generate
from model import GPT


@dataclass
class SampleSettings:
    """Sample from a GPT: python sample.py [CONFIG.py ...] [--key=value ...]"""

    init_from: str = "resume"  # resume: the run in out_dir | an acorn out_dir | a nanoGPT ckpt.pt | gpt2, gpt2-xl, ...
    out_dir: str = "out"  # where the run lies
    checkpoint: str = "best"  # of the run: best (the newest where none is) | latest | step_002000
    start: str = "\n"  # the prompt, or FILE:prompt.txt; <|endoftext|> alone begins a document, as in nanoGPT
    control_tokens: bool = False  # True: names such as <|im_end|> in start are control tokens; False: they are text
    prompts: str = ""  # a file of prompts, one a line or jsonl with "prompt" in each object, continued as one batch
    num_samples: int = 10  # samples to draw from each prompt (of a file of prompts: 1 unless set)
    max_new_tokens: int = 500  # tokens in each sample
    temperature: float = 0.8  # below 1 safer, above 1 wilder; 0: always the likeliest token
    top_k: int = 200  # draw from the k likeliest tokens only; 0: from all
    top_p: float = 1.0  # draw from the likeliest tokens that together have this probability; 1: from all
    min_p: float = 0.0  # draw from tokens at least this fraction as likely as the likeliest
    repetition_penalty: float = 1.0  # above 1: tokens that occurred become less likely
    no_repeat_ngram_size: int = 0  # n > 0: no n tokens in a row occur twice
    stop: list[str] = field(default_factory=list)  # end before this text; may be given several times
    seed: int = 1337  # sample k is drawn with seed + k, so the same seed draws the same samples
    stream: Literal["auto", True, False] = "auto"  # show text as it comes; auto: on a terminal, for one sample
    logprobs: bool = False  # also give each token's log-probability
    json: bool = False  # one JSON object a sample instead of text
    interactive: bool = False  # ask for prompts, one after the other
    chat: bool = False  # hold a conversation, by the chat template that the checkpoint carries; --start opens it
    system: str = ""  # what a conversation says to the model before it begins
    device: str = "auto"  # auto | cpu | cuda | cuda:1 | mps
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: float32 on a CPU
    quantize: Literal["none", "int8"] = "none"  # int8: weights of a byte each, on a CPU: faster, and nearly as good
    compile: Literal["auto", True, False] = "auto"  # torch.compile what one token takes; auto: where it pays back


def check(s: SampleSettings) -> None:
    """Raise UserError for a number that no sampling can have."""
    for name in ("max_new_tokens", "top_k", "no_repeat_ngram_size", "temperature"):
        if getattr(s, name) < 0:
            raise UserError(f"{name} = {getattr(s, name)} must not be negative")
    if s.num_samples < 1:
        raise UserError(f"num_samples = {s.num_samples} must be at least 1")
    if not 0 < s.top_p <= 1:
        raise UserError(f"top_p = {s.top_p} must be above 0 and at most 1")
    if not 0 <= s.min_p <= 1:
        raise UserError(f"min_p = {s.min_p} must be from 0 to 1")
    if s.repetition_penalty <= 0:
        raise UserError(f"repetition_penalty = {s.repetition_penalty} must be above 0")
    if not 0 <= s.seed < 2**62:
        raise UserError(f"seed = {s.seed} must be from 0 to 2^62")
    if s.chat and (s.interactive or s.prompts or s.json or s.logprobs):
        raise UserError("chat holds a conversation on the console: leave out interactive, prompts, json and logprobs")
    if s.control_tokens and (s.chat or s.interactive or s.prompts):
        raise UserError("control_tokens is for start; leave it out, or leave out chat, interactive and prompts")
    if s.system and not s.chat:
        raise UserError("system is for conversations; give --chat=True too")


def for_stdout(text: str) -> str:
    """A model's text as it is printed: control characters are escaped on a terminal, which would obey them, and exact
    in a pipe or a file."""
    return printable(text) if sys.stdout.isatty() else text


def read_prompts(path: str) -> list[str]:
    """The prompts in a file: a line each, or, of a .jsonl file, the "prompt" of each line's object."""
    numbered = enumerate(files.read_text(path).split("\n"), 1)
    lines = [(number, line.rstrip("\r")) for number, line in numbered if line.strip()]
    if not lines:
        raise UserError(f"the prompt file {path} is empty; write a prompt a line")
    if not path.endswith(".jsonl"):
        return [line for _, line in lines]
    prompts = []
    for number, line in lines:
        try:
            value = json.loads(line)
            prompts.append(value if isinstance(value, str) else value["prompt"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f'{path}, line {number} is neither a JSON string nor an object with a "prompt"') from error
        if not isinstance(prompts[-1], str):
            raise UserError(f'{path}, line {number}: "prompt" should be a string')
    return prompts


def continue_prompts(
    model: GPT,
    tokenizer,
    prompts: list[str],
    control: bool,
    seed: int,
    s: SampleSettings,
    compile: bool,
    show: Callable[[str], None],
) -> list[dict]:
    """Draw one sample for each prompt, side by side; `control` says that names of control tokens in them are those
    tokens. `show` gets the first one's text as it comes. Returns, for each, its prompt, text, seed, number of tokens,
    why it ended, and the tokens with their log-probabilities."""
    ids = [encode_prompt(tokenizer, prompt, control) for prompt in prompts]
    streams = [TextStream(tokenizer, s.stop) for _ in prompts]
    texts = [""] * len(prompts)
    tokens = [[] for _ in prompts]

    def on_token(row: int, token: int, logprob: float) -> bool:
        piece = streams[row].push(token)
        texts[row] += piece
        tokens[row].append((token, logprob))
        if row == 0:
            show(piece)
        return streams[row].stopped_by is not None

    how = Sampling(**{f.name: getattr(s, f.name) for f in dataclasses.fields(Sampling)})
    seeds = [seed] * len(prompts)
    generate(model, ids, s.max_new_tokens, how, seeds, on_token, tokenizer.n_vocab, compile)
    samples = []
    for row, stream in enumerate(streams):
        rest = stream.finish()
        if row == 0:
            show(rest)
        sample = dict(prompt=prompts[row], text=texts[row] + rest, seed=seed, n_tokens=len(tokens[row]))
        sample["stopped_by"] = stream.stopped_by or "max_new_tokens"
        if s.logprobs:
            sample["ids"] = [token for token, _ in tokens[row]]
            sample["tokens"] = [tokenizer.decode([token]) for token, _ in tokens[row]]
            sample["logprobs"] = [round(logprob, 5) for _, logprob in tokens[row]]
        samples.append(sample)
    return samples


def fit_conversation(tokenizer, messages: list[dict], block_size: int, room: int) -> list[int]:
    """The ids of a conversation up to the next reply. Its oldest turns, each a message and its reply, are removed from
    `messages` until `room` tokens are left in the block; what the system said stays. Raises UserError where the last
    message alone does not fit the block."""
    first = int(messages[0]["role"] == "system")
    while True:
        ids = chat.render(tokenizer, messages).tolist()
        if len(ids) + room <= block_size:
            return ids
        if len(messages) == first + 1:
            if len(ids) < block_size:
                return ids
            raise UserError(f"this message takes {len(ids)} tokens, and the model holds {block_size}; make it shorter")
        del messages[first : first + 2]


def converse(model: GPT, tokenizer, s: SampleSettings, opening: str | None, compile: bool) -> None:
    """Answer message after message from the console until its end. The model sees as many of the last turns as fit."""
    if not tokenizer.chat_template:
        raise UserError(
            "this checkpoint carries no chat template, so it was not trained to converse; train it on conversations "
            "(python prepare chat), or give it prompts by --interactive=True"
        )
    block_size, ends = model.config.block_size, chat.stop_ids(tokenizer)
    how = Sampling(**{f.name: getattr(s, f.name) for f in dataclasses.fields(Sampling)})
    messages = [{"role": "system", "content": s.system}] if s.system else []
    n_replies = 0
    while True:
        try:
            said = opening if opening is not None else input("> ")
        except EOFError:
            return
        opening = None
        if not said.strip():
            continue
        messages.append({"role": "user", "content": said})
        try:
            ids = fit_conversation(tokenizer, messages, block_size, min(s.max_new_tokens, block_size // 2))
        except UserError as error:  # a slip of the pen should not end the conversation
            print(printable(str(error)))
            messages.pop()
            continue
        stream, pieces = TextStream(tokenizer, s.stop, ends), []

        def on_token(row: int, token: int, logprob: float, stream=stream, pieces=pieces) -> bool:
            pieces.append(stream.push(token))
            print(for_stdout(pieces[-1]), end="", flush=True)
            return stream.stopped_by is not None

        n_tokens = min(s.max_new_tokens, block_size - len(ids))
        generate(model, [ids], n_tokens, how, [s.seed + n_replies], on_token, tokenizer.n_vocab, compile)
        pieces.append(stream.finish())
        print(for_stdout(pieces[-1]), flush=True)
        if stream.stopped_by is None:
            print(f"(cut off after {n_tokens} tokens)", file=sys.stderr)
        messages.append({"role": "assistant", "content": chat.as_content(tokenizer, "".join(pieces))})
        n_replies += 1


def main() -> int:
    sys.stdout.reconfigure(errors="replace")  # what a terminal's encoding lacks should not end a sample
    if sys.stdin:
        sys.stdin.reconfigure(errors="replace")  # nor should a byte that is no UTF-8 end a conversation
    given = settings.parse(SampleSettings, sys.argv[1:])
    s = settings.build(SampleSettings, given)
    check(s)

    # ---- machine; what is not a sample goes to standard error, so that samples can be piped on
    r = runtime.setup(s.device, s.dtype, s.compile)
    if s.dtype == "auto" and r.device.type == "cpu":
        r.dtype = torch.float32
    # ---- model
    load_from = s.out_dir if s.init_from == "resume" else s.init_from
    model, tokenizer, source = checkpoint.load_model(load_from, s.checkpoint)
    if tokenizer is None:
        raise UserError(f"{source} comes without a tokenizer that this script knows")
    model.to(r.device, r.dtype)
    if s.quantize != "none" and r.device.type != "cpu":
        raise UserError(f"quantize = {s.quantize} is for CPUs; on {r.device} leave it out")
    on = f"{model.num_params():,} parameters, on {r.device} in {str(r.dtype)[6:]}"
    print(printable(f"{source}: {on}"), file=sys.stderr)

    # ---- prompts
    start = files.read_text(s.start[5:]) if s.start.startswith("FILE:") else s.start
    if "start" not in given and tokenizer.kind == "char" and "\n" not in tokenizer.to_dict()["vocab"]:
        start = tokenizer.decode([0])  # this vocabulary has no line break to begin with
    prompts = read_prompts(s.prompts) if s.prompts else [start]
    control = s.control_tokens or (prompts == [END_OF_TEXT] and not s.prompts)
    num_samples = 1 if s.prompts and "num_samples" not in given else s.num_samples
    longest = max(len(encode_prompt(tokenizer, prompt, control)) for prompt in prompts) + s.max_new_tokens
    if longest > model.config.block_size and not s.chat:
        print(
            f"note: {longest} tokens are beyond the block size of {model.config.block_size}; "
            "the model sees a window that slides along",
            file=sys.stderr,
        )
    compile = s.compile is True
    if r.device.type == "cpu" and (s.compile or s.quantize != "none"):
        n_rows = 1 if s.interactive or s.chat else len(prompts)
        model = prepare_for_decoding(model, s.quantize, s.compile, n_rows, num_samples * s.max_new_tokens)
        compile = False  # on a CPU, that has compiled what is worth it
    stream = s.stream if s.stream != "auto" else sys.stdout.isatty() and num_samples == 1
    stream = stream and not s.json and len(prompts) == 1

    def show(text: str) -> None:
        if stream:
            print(for_stdout(text), end="", flush=True)

    # ---- samples
    if s.chat:
        converse(model, tokenizer, s, start if "start" in given else None, compile)
        return 0

    def answer(prompts: list[str], num_samples: int, control: bool) -> None:
        for k in range(num_samples):
            show(prompts[0])
            for sample in continue_prompts(model, tokenizer, prompts, control, s.seed + k, s, compile, show):
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
    while True:
        try:
            answer([input("> ")], num_samples if "num_samples" in given else 1, False)
        except EOFError:
            return 0
        except UserError as error:  # a slip of the pen should not end the conversation
            print(printable(str(error)))


if __name__ == "__main__":
    run(main)
