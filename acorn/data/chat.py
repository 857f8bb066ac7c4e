"""Conversations as tokens: a template turns messages into text with control tokens, and says which part is the reply.

    tokenizer.chat_template = choose_template(tokenizer)
    ids, learned = render_to_learn(tokenizer, messages)     # for training: True where a reply, and its end, stands
    conversations = forms_to_learn(tokenizer, messages)     # the same, also without the oldest turns
    ids = render(tokenizer, messages)                       # for sampling: up to where the next reply begins
    stop_ids(tokenizer)                                     # a reply ends with one of these

A message is a dict {"role": "system" | "user" | "assistant", "content": "..."}; other fields, such as "tool_calls",
reach the template too. acorn/data/records.py reads messages from their published forms. A template is Jinja text in
the form of Hugging Face's `chat_template`, so that those of published checkpoints work, and ours work there. It travels
inside the tokenizer's dict, and so inside a dataset and a checkpoint. Only the template writes control tokens: the name
of one that stands in a message stays text. (In a reply, the marks of thinking are those tokens.)
"""

import functools
import json
import re

import numpy as np

from acorn import UserError
from acorn.data import sandbox
from acorn.data.records import Conversation
from acorn.data.tokenizer import Tokenizer

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
PROBE = "\ufdd1"  # another one, which stands for a reply
NEEDED = ("tools", "tool_calls", "documents")  # without which a conversation would mean something else
REASONING = ("reasoning_content", "reasoning", "thinking")  # names of one field, as transformers has it
RESERVED = {"messages", "bos_token", "eos_token", "add_generation_prompt", "raise_exception", "strftime_now"}
NO_PLACE = "the chat template has no place for {}, which would be lost; give another --template"
REWRITTEN = (
    "the chat template writes the beginning of a conversation differently once more follows, so it cannot be told what "
    "the reply is; give conversations of one reply, or another --template"
)


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
    whole = _fill_in(tokenizer, messages, True)
    try:
        parts = _parts(tokenizer, messages, True)
    except UserError:  # it rewrites history, or cannot be learned: then no part of it is what the model saw before
        parts = [(whole, False)]
    return np.concatenate([_encode(tokenizer, text, i > 0) for i, (text, _) in enumerate(parts)])


def render_to_learn(tokenizer: Tokenizer, messages: list[dict]) -> tuple[np.ndarray, np.ndarray]:
    """The ids of a whole conversation (int32), and which of them are to be learned (bool), both of one dimension: the
    assistant's replies, each up to the control token that ends it, but for those with `"learn": False`. Raises
    UserError where the template ends a reply without one, leaves the replies out, or writes a turn differently once
    others follow."""
    _, ids, learned = zip(*_encoded_parts(tokenizer, messages), strict=True)
    return np.concatenate(ids), np.concatenate(learned)


def _encoded_parts(tokenizer: Tokenizer, messages: list[dict]) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """Text, ids and learned of each of the conversation's `_parts`."""
    parts = []
    for text, is_learned in _parts(tokenizer, messages, False):
        ids = _encode(tokenizer, text, bool(parts))
        parts.append((text, ids, np.full(len(ids), is_learned)))
    return parts


def forms_to_learn(tokenizer: Tokenizer, messages: list[dict]) -> list[list[tuple[np.ndarray, np.ndarray]]]:
    """What is learned from a conversation, as pairs of ids and learned like those of `render_to_learn`, which end with
    the last learned token. Each list has the forms of one training example: the whole first, then what the template
    makes of it without the oldest turn, without the two oldest, and so on, as sampling shows a conversation that has
    outgrown the block. What comes before the first user turn stays.

    It is one example with all the replies; or, where the template rewrites history, so that a later reply does not see
    an earlier one as it was learned, one example for each reply. Raises UserError as `render_to_learn` does."""
    ends = [i for i, message in enumerate(messages, 1) if _is_learned(message)]
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
    ids = _encode(tokenizer, reply[: _reply_length(tokenizer, reply)], True)
    return np.concatenate([prompt, ids]), np.arange(len(prompt) + len(ids)) >= len(prompt)


def _last_reply(tokenizer: Tokenizer, messages: list[dict]) -> str:
    """The text of the last message behind the prompt for a reply. Raises UserError where it does not begin with it."""
    prompt, whole = _fill_in(tokenizer, messages[:-1], True), _fill_in(tokenizer, messages, False)
    if not whole.startswith(prompt):
        reply = _reply_without_system(tokenizer, messages)
        if reply and whole.endswith(reply):
            return reply
        before = _fill_in(tokenizer, messages[:-1], False)
        shared = next((i for i, char in enumerate(prompt) if whole[i : i + 1] != char), 0)
        opening = prompt[min(len(before), shared) :] if prompt.startswith(before) else prompt[shared:]
        raise UserError(
            f"the chat template opens a reply with {opening!r:.80}, and renders a finished reply without it. Sampling "
            "and evaluation work; training would teach replies that begin otherwise than sampled ones do. Give each "
            'reply its thinking as "reasoning_content" where the template keeps that, or train with another --template.'
        )
    return whole[len(prompt) :]


def _reply_without_system(tokenizer: Tokenizer, messages: list[dict]) -> str | None:
    """The text of the last reply, found without the system message, None where there is none: some templates write the
    system message into the last message only if that is the user's, so a finished reply has it no more."""
    rest = Conversation([m for m in messages if m["role"] != "system"], getattr(messages, "extras", {}))
    return _last_reply(tokenizer, rest) if 1 < len(rest) < len(messages) else None


def _reply_length(tokenizer: Tokenizer, reply: str) -> int:
    """The length of the text of a reply up to the control token that ends it. Raises UserError where none does."""
    ends = list(_any_of(tokenizer.control).finditer(reply))
    if not ends:
        raise UserError("the chat template ends a reply without a control token of this tokenizer; choose another")
    if len(ends) > 1:  # it may have others inside, as around a call, or the end of the whole text behind it
        stop = "".join(_stop_names(tokenizer))
        if stop and stop in reply:
            return reply.rindex(stop) + len(stop)
        ends = [end for end in ends if tokenizer.control[end[0]] in tokenizer.ends] or ends
    return ends[-1].end()


def _is_learned(message: dict) -> bool:
    return message["role"] == "assistant" and message.get("learn", True)


def _around_content(tokenizer: Tokenizer) -> tuple[str, str]:
    """The text of a conversation of two messages before and after the content of the reply."""
    text = _fill_in(tokenizer, [_message("user", "?"), _message("assistant", PROBE)], False)
    before, found, after = text.rpartition(PROBE)
    if not found:
        raise UserError(
            "the chat template leaves out what the assistant says, so nothing is to be learned; choose another"
        )
    return before, after


def _stop_name(tokenizer: Tokenizer) -> str | None:
    """The name of the control token that ends a reply, None where the template ends it with text."""
    return next(iter(_stop_names(tokenizer)), None)


def _stop_names(tokenizer: Tokenizer) -> list[str]:
    """The names of the control tokens that end a reply: the first one behind it, and those that end a text directly
    behind that, as in "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>". What only stands at the end of a conversation is not one
    of the latter."""
    talk = [_message("user", "?"), _message("assistant", PROBE), _message("user", "?")]
    _, found, after = _fill_in(tokenizer, talk, True).rpartition(PROBE)
    if not found or not _any_of(tokenizer.control).search(after):
        after = _around_content(tokenizer)[1]
    names, end = [], None
    for found in _any_of(tokenizer.control).finditer(after):
        if names and (found.start() != end or tokenizer.control[found[0]] not in tokenizer.ends):
            break
        names, end = [*names, found[0]], found.end()
    return names


def as_content(tokenizer: Tokenizer, reply: str) -> str:
    """The content of a message that the template renders as the text `reply`, which a model generated: without what
    the template itself puts around a content, such as the space in "[/INST] Hello"."""
    before, after = _around_content(tokenizer)
    prompt = _fill_in(tokenizer, [_message("user", "?")], True)
    before = before.removeprefix(prompt) if before.startswith(prompt) else ""
    after = _any_of(tokenizer.control).split(after, maxsplit=1)[0]
    return reply.removeprefix(before).removesuffix(after)


def stop_ids(tokenizer: Tokenizer) -> set[int]:
    """The ids that end a reply: of the control tokens that the template ends it with, and those that end a text."""
    names = {_stop_name(tokenizer), _call_end(tokenizer)} - {None}
    return {tokenizer.control[name] for name in names} | tokenizer.ends


def _call_end(tokenizer: Tokenizer) -> str | None:
    """The name of the control token that ends a reply which calls a tool, None where the template has no calls."""
    if "tool_calls" not in tokenizer.chat_template:
        return None
    call = {"type": "function", "id": "000000000", "function": {"name": "f", "arguments": {}}}
    try:
        reply = _last_reply(tokenizer, [_message("user", "?"), _message("assistant", "") | {"tool_calls": [call]}])
        reply = reply[: _reply_length(tokenizer, reply)]
    except UserError:
        return None
    return _any_of(tokenizer.control).findall(reply)[-1]


def check_learnable(tokenizer: Tokenizer) -> None:
    """Raise UserError where the tokenizer's template cannot be learned, saying why. It may still do for sampling. Some
    templates can be learned from replies that think, and from no others."""
    _around_content(tokenizer)
    question, reply = _message("user", "?"), _message("assistant", "!")
    try:
        render_to_learn(tokenizer, [question, reply])
    except UserError as error:
        try:
            render_to_learn(tokenizer, [question, reply | {"reasoning_content": "."}])
        except UserError:
            raise error from None


def unused_fields(tokenizer: Tokenizer, messages: list[dict]) -> set[str]:
    """The names of the fields of messages that the template does not look at, so that they are left out."""
    names = {name for message in messages for name in message} - {"role", "content", "learn"}
    template = tokenizer.chat_template
    return {name for name in names if not any(other in template for other in {name, *REASONING * (name in REASONING)})}


def _message(role: str, content: str) -> dict:
    return {"role": role, "content": content}


def _parts(tokenizer: Tokenizer, messages: list[dict], add_generation_prompt: bool) -> list[tuple[str, bool]]:
    """The text of a conversation cut before and after each reply, with whether it is one that is learned. A reply is
    what the text up to it, with the prompt for a reply, lacks of the text that has it: so every template is
    understood."""
    whole = _fill_in(tokenizer, messages, add_generation_prompt)
    parts, done = [], 0
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt = _fill_in(tokenizer, messages[:i], True)
            if not whole.startswith(prompt) and i + 1 < len(messages):
                raise RewrittenHistory(REWRITTEN)
            reply = _last_reply(tokenizer, messages[: i + 1])
            reply = reply[: _reply_length(tokenizer, reply)]
            if not whole.startswith(prompt + reply) or len(prompt) < done:
                raise RewrittenHistory(REWRITTEN)
            parts += [(whole[done : len(prompt)], False), (reply, _is_learned(message))]
            done = len(prompt) + len(reply)
    parts.append((whole[done:], False))
    return [part for part in parts if part[0]]


def _fill_in(tokenizer: Tokenizer, messages: list[dict], add_generation_prompt: bool) -> str:
    """The template's text for the messages, in which a BREAK stands inside each name of a control token that comes from
    a message."""
    template, extras = tokenizer.chat_template, getattr(messages, "extras", {})
    variables = _variables(template)
    extras = {name: value for name, value in extras.items() if name in variables or name in NEEDED}
    for name in NEEDED:
        if name not in template and (extras.get(name) or any(message.get(name) for message in messages)):
            raise UserError(NO_PLACE.format(name))
    text = _rendered(tokenizer, messages, extras, add_generation_prompt)
    # OpenAI's form has a call's arguments as JSON text, of which most templates make JSON once more
    arguments = [function["arguments"] for function in _functions(messages) if _is_json(function.get("arguments"))]
    names = _any_of(tokenizer.control)
    if any(json.dumps(_broken(text_, names), ensure_ascii=False) in text for text_ in arguments):
        messages = json.loads(json.dumps(messages))
        for function in _functions(messages):
            if _is_json(function.get("arguments")):
                function["arguments"] = json.loads(function["arguments"])
        text = _rendered(tokenizer, messages, extras, add_generation_prompt)
    for function in _functions(messages):
        name = function.get("name")
        if isinstance(name, str) and _broken(name, names) not in text and json.dumps(name)[1:-1] not in text:
            raise UserError(NO_PLACE.format(f"the call of {name!r:.60}"))
    return text


def _rendered(tokenizer: Tokenizer, messages: list[dict], extras: dict, add_generation_prompt: bool) -> str:
    import jinja2

    names = _any_of(tokenizer.control)
    in_reply = _any_of(name for name in tokenizer.control if "think" not in name.lower())  # a reply may think
    conversation = [_broken(message, in_reply if message["role"] == "assistant" else names) for message in messages]
    if _takes_parts(tokenizer.chat_template):
        conversation = [_in_parts(message) for message in conversation]
    tokens = {"bos_token": tokenizer.bos or "", "eos_token": tokenizer.eos or ""}
    try:
        text = _render_template(
            conversations=[conversation],
            chat_template=tokenizer.chat_template,
            add_generation_prompt=add_generation_prompt,
            **tokens | _broken(extras, names),
        )
    except (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
        raise UserError(f"the chat template does not take this conversation ({error!s:.200})") from error
    return text.replace(json.dumps(BREAK)[1:-1], BREAK) if "ensure_ascii" in tokenizer.chat_template else text


def _render_template(**arguments) -> str:
    """What transformers' `render_jinja_template` makes of a conversation. A template that is not one of ours may loop
    without end or fill the memory, so it runs in a process with limits."""
    if arguments["chat_template"] not in TEMPLATES.values():
        return sandbox.render("the chat template", **arguments)
    from transformers.utils.chat_template_utils import render_jinja_template

    return render_jinja_template(**arguments)[0][0]


def _broken(value, names: re.Pattern):
    """A value for a template with a BREAK inside each of the `names` in its texts."""
    if isinstance(value, str):
        return names.sub(lambda match: match[0][:1] + BREAK + match[0][1:], value.replace(BREAK, ""))
    if isinstance(value, dict):
        return {_broken(name, names): _broken(item, names) for name, item in value.items()}
    return [_broken(item, names) for item in value] if isinstance(value, list) else value


@functools.lru_cache(16)
def _takes_parts(template: str) -> bool:
    """Whether a template loses content that is a text, and wants a list of parts, as those for images do."""

    def keeps(messages: list[dict]) -> bool:
        try:
            text = _render_template(conversations=[messages], chat_template=template, bos_token="", eos_token="")
        except UserError:
            return False
        return text.count(PROBE) == 2

    messages = [_message("user", PROBE), _message("assistant", PROBE)]
    return "text" in template and not keeps(messages) and keeps([_in_parts(message) for message in messages])


def _in_parts(message: dict) -> dict:
    content = message.get("content")
    return message | {"content": [{"type": "text", "text": content}]} if isinstance(content, str) else message


def _functions(messages: list[dict]) -> list[dict]:
    """The functions that messages call, each with its name and arguments."""
    calls = [call for message in messages for call in message.get("tool_calls") or ()]
    functions = [call.get("function", call) for call in calls if isinstance(call, dict)]
    return [function for function in functions if isinstance(function, dict)]


def _is_json(value) -> bool:
    """Whether a value is the JSON text of an object."""
    try:
        return isinstance(value, str) and isinstance(json.loads(value), dict)
    except (ValueError, RecursionError):
        return False


@functools.lru_cache(16)
def _variables(template: str) -> frozenset[str]:
    """The names by which a template may look at what it is given beside the messages: all its words but Jinja's own.
    Jinja's parser would know better, but it computes constants such as 'a' * 10**10 while it does."""
    from jinja2.defaults import DEFAULT_NAMESPACE

    return frozenset(re.findall(r"[^\W\d]\w*", template)) - DEFAULT_NAMESPACE.keys() - RESERVED


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
