"""Conversations as tokens: a template turns messages into text with control tokens, and says which part is the reply.

    tokenizer.chat_template = choose_template(tokenizer)
    ids, learned = render_to_learn(tokenizer, messages)     # for training: True where a reply, and its end, stands
    conversations = forms_to_learn(tokenizer, messages)     # the same, also without the oldest turns
    ids = render(tokenizer, messages)                       # for sampling: up to where the next reply begins
    stop_ids(tokenizer)                                     # a reply ends with one of these

A message is a dict {"role": "system" | "user" | "assistant", "content": "..."}. A template is Jinja text in the form of
Hugging Face's `chat_template`, so that those of published checkpoints work, and ours work there. It travels inside the
tokenizer's dict, and so inside a dataset and a checkpoint. Only the template writes control tokens: the name of one
that stands in a message stays text.
"""

import re

import numpy as np

from acorn import UserError, sandbox
from acorn.tokenizer import Tokenizer

# "User:", a line break and the message; a reply ends with end of text. It needs no control token but that one.
PLAIN = (
    "{{ bos_token }}{% for message in messages %}{% if not loop.first %}{{ '\\n\\n' }}{% endif %}"
    "{{ message['role'] | capitalize }}{{ ':\\n' }}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n\\nAssistant:\\n' }}{% endif %}"
)
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TEMPLATES = {"plain": PLAIN, "chatml": CHATML}
BREAK = "\ufdd0"  # a noncharacter, which no text has; it keeps names of control tokens in messages apart from real ones


class RewrittenHistory(UserError):
    """The template renders the beginning of a conversation differently once more turns follow."""


def choose_template(tokenizer: Tokenizer) -> str:
    """The template that the tokenizer carries, else ChatML where it has those control tokens, else the plain one.
    Raises UserError where no turn could be ended, since there are no control tokens."""
    if tokenizer.chat_template:
        return tokenizer.chat_template
    if {"<|im_start|>", "<|im_end|>"} <= tokenizer.control.keys():
        return CHATML
    if tokenizer.eot is None:
        raise UserError(
            f"the {tokenizer.kind} tokenizer has no end-of-text token to end a reply with; prepare conversations with "
            "--tokenizer gpt2, byte, bpe:8192, or that of a chat model"
        )
    return PLAIN


def render(tokenizer: Tokenizer, messages: list[dict]) -> np.ndarray:
    """The ids of a conversation up to where the next reply begins: int32, one dimension. They are those that stand
    before this reply in `render_to_learn`, and in `forms_to_learn`."""
    try:
        parts = _parts(tokenizer, messages, True)
    except RewrittenHistory:  # then no part of it is what the model saw before
        parts = [(_fill_in(tokenizer, messages, True), False)]
    return np.concatenate([_encode(tokenizer, text, i > 0) for i, (text, _) in enumerate(parts)])


def render_to_learn(tokenizer: Tokenizer, messages: list[dict]) -> tuple[np.ndarray, np.ndarray]:
    """The ids of a whole conversation (int32), and which of them are to be learned (bool), both of one dimension: the
    assistant's replies, each up to the control token that ends it. Raises UserError where the template ends a reply
    without one, leaves the replies out, or writes a turn differently once others follow."""
    _, ids, learned = zip(*_encoded_parts(tokenizer, messages), strict=True)
    return np.concatenate(ids), np.concatenate(learned)


def _encoded_parts(tokenizer: Tokenizer, messages: list[dict]) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """Text, ids and learned of each of the conversation's `_parts`."""
    parts = []
    for text, is_reply in _parts(tokenizer, messages, False):
        ids = _encode(tokenizer, text, bool(parts))
        learned = np.arange(len(ids)) < (_reply_length(tokenizer, ids) if is_reply else 0)
        parts.append((text, ids, learned))
    if not any(learned.any() for _, _, learned in parts):
        raise UserError(
            "the chat template leaves out what the assistant says, so nothing is to be learned; choose another"
        )
    return parts


def forms_to_learn(tokenizer: Tokenizer, messages: list[dict]) -> list[list[tuple[np.ndarray, np.ndarray]]]:
    """What is learned from a conversation, as pairs of ids and learned like those of `render_to_learn`, which end with
    the last learned token. Each list has the forms of one training example: the whole first, then what the template
    makes of it without the oldest turn, without the two oldest, and so on, as sampling shows a conversation that has
    outgrown the block. What comes before the first user turn stays.

    It is one example with all the replies; or, where the template rewrites history, so that a later reply does not see
    an earlier one as it was learned, one example for each reply. Raises UserError as `render_to_learn` does."""
    ends = [i for i, message in enumerate(messages, 1) if message["role"] == "assistant"]
    try:
        return [_forms(tokenizer, messages[: ends[-1]], _render_again(tokenizer, messages[: ends[-1]]))]
    except RewrittenHistory:
        return [_forms(tokenizer, messages[:end], _render_last_reply) for end in ends]


def _forms(tokenizer: Tokenizer, messages: list[dict], render_whole) -> list[tuple[np.ndarray, np.ndarray]]:
    roles = [message["role"] for message in messages]
    first = roles.index("user")
    turns = [i for i in range(first, len(roles)) if roles[i] == "user" and (i == first or roles[i - 1] != "user")]
    forms = []
    for turn in turns:
        try:
            ids, learned = render_whole(tokenizer, messages[:first] + messages[turn:])
        except UserError:  # some templates do not take what is left
            if turn == first:
                raise
            continue
        if not learned.any():
            continue
        end = np.flatnonzero(learned)[-1] + 1
        forms.append((ids[:end], learned[:end]))
    return forms


def _render_again(tokenizer: Tokenizer, messages: list[dict]):
    """Return a function like `render_to_learn` for `messages` and for what is left of them without the oldest turns.

    It reuses the ids behind the first reply's prompt where the template renders the same text there. A conversation of
    n turns then takes O(n) renderings instead of O(n^2)."""
    parts = _encoded_parts(tokenizer, messages)
    whole = "".join(text for text, _, _ in parts)
    begins = np.cumsum([0, *(len(text) for text, _, _ in parts)])  # of each part, in the text
    reply_begin = begins[max(k for k, (_, _, learned) in enumerate(parts) if learned.any())]  # of the last reply

    def render_whole(tokenizer: Tokenizer, shown: list[dict]) -> tuple[np.ndarray, np.ndarray]:
        if len(shown) == len(messages):
            _, ids, learned = zip(*parts, strict=True)
            return np.concatenate(ids), np.concatenate(learned)
        to_reply = next(i for i, message in enumerate(shown) if message["role"] == "assistant")
        text, prompt = _fill_in(tokenizer, shown, False), _fill_in(tokenizer, shown[:to_reply], True)
        behind = text.removeprefix(prompt)
        k = int(np.searchsorted(begins, len(whole) - len(behind)))
        is_same = begins[k] == len(whole) - len(behind) and whole.endswith(behind) and text == prompt + behind
        last_prompt = text[: len(text) - (len(whole) - reply_begin)]
        if not is_same or last_prompt != _fill_in(tokenizer, shown[:-1], True):
            return render_to_learn(tokenizer, shown)
        _, ids, learned = zip(*parts[k:], strict=True)
        first = _encode(tokenizer, prompt, False)
        return np.concatenate([first, *ids]), np.concatenate([np.zeros(len(first), dtype=bool), *learned])

    return render_whole


def _render_last_reply(tokenizer: Tokenizer, messages: list[dict]) -> tuple[np.ndarray, np.ndarray]:
    """As `render_to_learn`, but only the last reply is learned, after what `render` gives for the messages before."""
    prompt, reply = render(tokenizer, messages[:-1]), _last_reply(tokenizer, messages)
    ids = _encode(tokenizer, reply, True)
    learned = np.arange(len(prompt) + len(ids)) < len(prompt) + _reply_length(tokenizer, ids)
    return np.concatenate([prompt, ids]), learned & (np.arange(len(learned)) >= len(prompt))


def _last_reply(tokenizer: Tokenizer, messages: list[dict]) -> str:
    """The text of the last message behind the prompt for a reply. Raises UserError where it does not begin with it."""
    prompt, whole = _fill_in(tokenizer, messages[:-1], True), _fill_in(tokenizer, messages, False)
    if not whole.startswith(prompt):
        raise UserError(
            "the chat template begins a reply otherwise than its prompt for one does, so the reply would be learned "
            "behind a prompt that sampling never shows; give another --template"
        )
    return whole[len(prompt) :]


def _reply_length(tokenizer: Tokenizer, ids: np.ndarray) -> int:
    """The length of a reply up to the control token that ends it. Raises UserError where none does."""
    ends = np.flatnonzero(np.isin(ids, list(tokenizer.control.values())))
    if not len(ends):
        raise UserError("the chat template ends a reply without a control token of this tokenizer; choose another")
    return int(ends[-1]) + 1


def as_content(tokenizer: Tokenizer, reply: str) -> str:
    """The content of a message that the template renders as the text `reply`, which a model generated: without what
    the template itself puts around a content, such as the space in "[/INST] Hello"."""
    probe = "\ufdd1"  # a noncharacter, as BREAK is
    text = _last_reply(tokenizer, [_message("user", "?"), _message("assistant", probe)])
    before, _, after = text.partition(probe)
    after = re.split(_any_of(tokenizer.control), after, maxsplit=1)[0]
    return reply.removeprefix(before).removesuffix(after)


def stop_ids(tokenizer: Tokenizer) -> set[int]:
    """The ids that end a reply: what the template ends it with, and the end-of-text token where there is one."""
    ids, learned = render_to_learn(tokenizer, [_message("user", "?"), _message("assistant", "!")])
    return {int(ids[learned][-1])} | ({tokenizer.eot} - {None})


def read_messages(record: dict) -> list[dict]:
    """The messages of a JSON object: {"prompt": ..., "response": ...} or {"messages": [{"role", "content"}, ...]}.
    Raises UserError, in words that follow the object's place, where it is neither or holds no reply."""
    messages = record.get("messages")
    if "messages" not in record:
        if not all(isinstance(record.get(field), str) for field in ("prompt", "response")):
            fields = ", ".join(map(str, record)) or "no fields"
            raise UserError(f'has {fields}; it should have "prompt" and "response", two texts, or "messages"')
        return [_message("user", record["prompt"]), _message("assistant", record["response"])]
    if not isinstance(messages, list):
        raise UserError('has "messages" that are no list')
    for i, message in enumerate(messages, 1):
        fields = [message.get(field) for field in ("role", "content")] if isinstance(message, dict) else [None]
        if not all(isinstance(field, str) for field in fields):
            raise UserError(f'has a message, number {i}, without a "role" and a "content" that are texts')
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        raise UserError('has no message of the role "assistant", so there is nothing to learn from it')
    if "user" not in roles[: roles.index("assistant")]:
        raise UserError('has a reply before anything of the role "user"')
    return [_message(message["role"], message["content"]) for message in messages]


def _message(role: str, content: str) -> dict:
    return {"role": role, "content": content}


def _parts(tokenizer: Tokenizer, messages: list[dict], add_generation_prompt: bool) -> list[tuple[str, bool]]:
    """The text of a conversation cut before and after each reply, with whether it is one. A reply is what the text up
    to it, with the prompt for a reply, lacks of the text that has it: so every template is understood."""
    parts, done = [], ""

    def add(text: str, is_reply: bool) -> None:
        nonlocal done
        if not text.startswith(done):
            raise RewrittenHistory(
                "the chat template writes the beginning of a conversation differently once more follows, so it cannot "
                "be told what the reply is; give conversations of one reply, or another --template"
            )
        if text != done:
            parts.append((text[len(done) :], is_reply))
        done = text

    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            add(_fill_in(tokenizer, messages[:i], True), False)
            add(_fill_in(tokenizer, messages[: i + 1], False), True)
    add(_fill_in(tokenizer, messages, add_generation_prompt), False)
    return parts


def _fill_in(tokenizer: Tokenizer, messages: list[dict], add_generation_prompt: bool) -> str:
    """The template's text for the messages, in which a BREAK stands inside each name of a control token that comes from
    a message."""
    import jinja2

    names = _any_of(tokenizer.control)

    def broken(text: str) -> str:
        return names.sub(lambda match: match[0][:1] + BREAK + match[0][1:], text.replace(BREAK, ""))

    try:
        rendered = _render_template(
            conversations=[[{name: broken(text) for name, text in message.items()} for message in messages]],
            chat_template=tokenizer.chat_template,
            add_generation_prompt=add_generation_prompt,
            bos_token=tokenizer.bos or "",
            eos_token=tokenizer.eos or "",
        )
    except (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
        raise UserError(f"the chat template does not take this conversation ({error!s:.200})") from error
    return rendered


def _render_template(**arguments) -> str:
    """What transformers' `render_jinja_template` makes of a conversation. A template that is not one of ours may loop
    without end or fill the memory, so it runs in a process with limits."""
    if arguments["chat_template"] not in TEMPLATES.values():
        return sandbox.render("the chat template", **arguments)
    from transformers.utils.chat_template_utils import render_jinja_template

    return render_jinja_template(**arguments)[0][0]


def _encode(tokenizer: Tokenizer, text: str, continues: bool) -> np.ndarray:
    """The ids of a part that `_fill_in` made."""
    ids = [np.zeros(0, dtype=np.int32)]
    broken = _any_of(name[:1] + BREAK + name[1:] for name in tokenizer.control)
    for i, part in enumerate(re.split(f"({broken.pattern})", text)):  # every second one is a broken name
        for piece in [part.replace(BREAK, "")] if i % 2 else part.split(BREAK):
            if piece:
                ids.append(tokenizer.encode_part(piece, continues, control=i % 2 == 0))
                continues = True
    return np.concatenate(ids)


def _any_of(names) -> re.Pattern:
    longest_first = sorted(names, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")  # (?!) is found nowhere
