"""Continue prompts, and chat on the console."""

import dataclasses
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from acorn import UserError, files, printable
from acorn.data import chat
from acorn.data.tokenizer import Tokenizer
from acorn.inference.generate import Sampling, continue_texts, encode_prompt
from model import GPT

if TYPE_CHECKING:
    from sample import SampleSettings


def sampling_of(s: "SampleSettings") -> Sampling:
    return Sampling(**{f.name: getattr(s, f.name) for f in dataclasses.fields(Sampling)})


def for_stdout(text: str) -> str:
    """Escape control characters in a model's text if stdout is a terminal; keep it unchanged for a pipe or file."""
    return printable(text) if sys.stdout.isatty() else text


def read_prompts(path: str, tokenizer: Tokenizer) -> list[str]:
    """Read the prompts from a file: one per line, or from a .jsonl file the "prompt" of each object. Raises UserError,
    which names the line, for a prompt that the tokenizer cannot encode."""
    prompts = []
    if path.endswith(".jsonl"):
        for where, value in files.read_json_lines(path):
            prompt = value.get("prompt") if isinstance(value, dict) else value
            if not isinstance(prompt, str):
                raise UserError(f'{where} is not a prompt. Write a JSON string, or an object: {{"prompt": "..."}}.')
            prompts.append((where, prompt))
    else:
        lines = enumerate(files.read_text(path).split("\n"), 1)
        prompts = [(f"line {n} of {path}", line.rstrip("\r")) for n, line in lines if line.strip()]
        if not prompts:
            raise UserError(f"the prompt file {path} is empty. Write one prompt per line.")
    for where, prompt in prompts:
        try:
            encode_prompt(tokenizer, prompt)
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
    return [prompt for _, prompt in prompts]


def read_line() -> str:
    """Return a line that the user types. Raises EOFError at the end of the input. If stdout is a file or a pipe, it
    gets only samples, and the prompt sign goes to stderr."""
    if sys.stdout.isatty():
        return input("> ")
    print("> ", end="", file=sys.stderr, flush=True)
    return input()


def explain_keys(what: str) -> None:
    """Say on a terminal how to enter `what`, and how to exit."""
    if sys.stdin.isatty():
        exit_keys = "Ctrl-Z and Enter" if sys.platform == "win32" else "Ctrl-D"
        print(f"Type {what} and press Enter; {exit_keys} to exit.", file=sys.stderr)


def continue_prompts(
    model: GPT,
    tokenizer,
    prompts: list[str],
    control: bool,
    seed: int,
    s: "SampleSettings",
    compile: bool,
    show: Callable[[str], None],
) -> list[dict]:
    """Draw one sample for each prompt, as one batch.

    `control`: names of control tokens in the prompts are these tokens. `show` is called with the first sample's text as
    it is generated. Returns a dict for each sample: prompt, text, seed, number of tokens, why it stopped, and, if asked
    for, the tokens with their log-probabilities.
    """
    ids = [encode_prompt(tokenizer, prompt, control) for prompt in prompts]
    sampling = sampling_of(s)
    seeds = [seed] * len(prompts)

    def on_text(row: int, piece: str) -> None:
        if row == 0:
            show(piece)

    continuations = continue_texts(
        model, tokenizer, ids, s.max_new_tokens, sampling, seeds, s.stop, on_text=on_text, compile=compile
    )
    samples = []
    for prompt, result in zip(prompts, continuations, strict=True):
        sample = dict(prompt=prompt, text=result.text, seed=seed, n_tokens=len(result.ids))
        sample["stopped_by"] = result.stopped_by or "max_new_tokens"
        if s.logprobs:
            sample["ids"] = result.ids
            sample["tokens"] = [tokenizer.decode_bytes([token]).decode(errors="replace") for token in result.ids]
            sample["logprobs"] = [round(logprob, 5) for logprob in result.logprobs]
        samples.append(sample)
    return samples


def fit_conversation(tokenizer, messages: list[dict], block_size: int, room: int) -> list[int]:
    """Return the ids of a conversation up to the next reply.

    The oldest turns (a message and its reply) are removed from `messages` until `room` tokens of the block are free.
    The system message stays. Raises UserError if the last message, with the system message, does not fit into the
    block; `messages` then stays as it is.
    """
    first = int(messages[0]["role"] == "system")
    start = first  # of the turns that remain
    while True:
        ids = chat.render(tokenizer, messages[:first] + messages[start:], block_size - room).tolist()
        if len(ids) + room <= block_size or len(messages) == start + 1:
            break
        start += 2
    if len(ids) >= block_size:
        text, fix = ("this message with the system message", "one of them") if first else ("this message", "it")
        raise UserError(f"{text} has {len(ids)} tokens, but the block size is {block_size}. Shorten {fix}.")
    del messages[first:start]
    return ids


def converse(model: GPT, tokenizer, s: "SampleSettings", opening: str | None, compile: bool) -> None:
    """Answer messages from the console until its input ends. The model sees as many of the last turns as fit."""
    if not tokenizer.chat_template:
        raise UserError(
            "this checkpoint has no chat template, so it was not trained to chat. Train it on conversations "
            "(python prepare chat), or use --interactive=True."
        )
    block_size, ends = model.config.block_size, chat.stop_ids(tokenizer)
    sampling = sampling_of(s)
    messages = [{"role": "system", "content": s.system}] if s.system else []
    n_replies = 0

    def show_piece(row: int, piece: str) -> None:
        print(for_stdout(piece), end="", flush=True)

    explain_keys("a message")
    while True:
        try:
            said = opening if opening is not None else read_line()
        except EOFError:
            return
        opening = None
        if not said.strip():
            continue
        messages.append({"role": "user", "content": said})
        try:
            ids = fit_conversation(tokenizer, messages, block_size, min(s.max_new_tokens, block_size // 2))
        except UserError as error:  # bad input must not end the conversation
            print(printable(str(error)), file=sys.stderr)
            messages.pop()
            continue
        n_tokens, seeds = min(s.max_new_tokens, block_size - len(ids)), [s.seed + n_replies]
        (reply,) = continue_texts(
            model, tokenizer, [ids], n_tokens, sampling, seeds, s.stop, ends, on_text=show_piece, compile=compile
        )
        print(flush=True)
        if reply.stopped_by is None:
            print(f"(stopped after {n_tokens} tokens)", file=sys.stderr)
        messages.append({"role": "assistant", "content": chat.as_content(tokenizer, reply.text)})
        n_replies += 1
