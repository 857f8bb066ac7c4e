"""Continue prompts, and chat on the console."""

import dataclasses
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from acorn import UserError, files, printable
from acorn.data import chat
from acorn.inference.generate import Sampling, continue_texts, encode_prompt
from model import GPT

if TYPE_CHECKING:
    from sample import SampleSettings


def sampling_of(s: "SampleSettings") -> Sampling:
    return Sampling(**{f.name: getattr(s, f.name) for f in dataclasses.fields(Sampling)})


def for_stdout(text: str) -> str:
    """Escape control characters in a model's text if stdout is a terminal; keep it unchanged for a pipe or file."""
    return printable(text) if sys.stdout.isatty() else text


def read_prompts(path: str) -> list[str]:
    """Read the prompts from a file: one per line, or from a .jsonl file the "prompt" of each object."""
    if not path.endswith(".jsonl"):
        prompts = [line.rstrip("\r") for line in files.read_text(path).split("\n") if line.strip()]
        if not prompts:
            raise UserError(f"the prompt file {path} is empty. Write one prompt per line.")
        return prompts
    prompts = []
    for location, value in files.read_json_lines(path):
        prompt = value.get("prompt") if isinstance(value, dict) else value
        if not isinstance(prompt, str):
            raise UserError(f'{location} is not a prompt. Write a JSON string, or an object: {{"prompt": "..."}}.')
        prompts.append(prompt)
    return prompts


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
            sample["tokens"] = [tokenizer.decode([token]) for token in result.ids]
            sample["logprobs"] = [round(logprob, 5) for logprob in result.logprobs]
        samples.append(sample)
    return samples


def fit_conversation(tokenizer, messages: list[dict], block_size: int, room: int) -> list[int]:
    """Return the ids of a conversation up to the next reply.

    The oldest turns (a message and its reply) are removed from `messages` until `room` tokens of the block are free.
    The system message stays. Raises UserError if the last message alone does not fit into the block.
    """
    first = int(messages[0]["role"] == "system")
    while True:
        ids = chat.render(tokenizer, messages).tolist()
        if len(ids) + room <= block_size:
            return ids
        if len(messages) == first + 1:
            if len(ids) < block_size:
                return ids
            raise UserError(f"this message has {len(ids)} tokens, but the block size is {block_size}. Shorten it.")
        del messages[first : first + 2]


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
        except UserError as error:  # bad input must not end the conversation
            print(printable(str(error)))
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
