"""Conversations as tokens: a chat template turns messages into text with control tokens and delimits the replies.

    tokenizer.chat_template = choose_template(tokenizer)
    ids, learned = render_to_learn(tokenizer, messages)     # for training: True for a reply and its end token
    conversations = forms_to_learn(tokenizer, messages)     # the same, also without the oldest turns
    ids = render(tokenizer, messages)                       # for sampling: up to the start of the next reply
    stop_ids(tokenizer)                                     # the tokens that end a reply

A message is a dict {"role": "system" | "user" | "assistant", "content": "..."}. The template gets its other fields too,
such as "tool_calls". acorn/data/records.py reads messages from published data formats. A template is Jinja text in the
format of Hugging Face's `chat_template`, so templates work in both directions. It is stored in the tokenizer's dict,
and therefore in datasets and checkpoints. Only the template writes control tokens: the name of a control token inside a
message stays text. (Exception: in a reply, the tokens that mark thinking, such as "<think>", are control tokens.)
"""

import functools
import itertools
import json
import re
from collections.abc import Iterable

import numpy as np

from acorn import UserError
from acorn.data import sandbox
from acorn.data.records import Conversation
from acorn.data.tokenizer import Tokenizer

# "User:", a line break and the message; a reply ends with the end-of-text token, the only control token it needs.
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
BREAK = "\ufdd0"  # a noncharacter, absent from real text; inserted into names of control tokens that messages contain
PROBE = "\ufdd1"  # another noncharacter, the placeholder for a reply
CALL = {"type": "function", "id": "000000000", "function": {"name": "f", "arguments": {}}}  # a placeholder too
REQUIRED_FIELDS = ("tools", "tool_calls", "documents")  # dropping one would change the meaning of the conversation
REASONING = ("reasoning_content", "reasoning", "thinking")  # synonyms for one field, as in transformers
RESERVED_VARIABLES = {"messages", "bos_token", "eos_token", "add_generation_prompt", "raise_exception", "strftime_now"}
NOT_RENDERED = "the chat template does not render {}, so it would be lost. Choose another --template."
REWRITTEN = (
    "the chat template changes earlier turns when later turns are added, so its replies cannot be located. Use "
    "conversations with one reply each, or choose another --template."
)


class RewrittenHistory(UserError):
    """The template renders earlier turns differently when later turns are added."""


def choose_template(tokenizer: Tokenizer) -> str:
    """Return the tokenizer's own template, else ChatML if it has ChatML's control tokens, else the plain template.
    Raises UserError if the tokenizer has no control token that could end a reply."""
    if tokenizer.chat_template:
        return tokenizer.chat_template
    if {"<|im_start|>", "<|im_end|>"} <= tokenizer.control.keys():
        return CHATML
    if tokenizer.eot is None:
        raise UserError(
            f"the {tokenizer.kind} tokenizer has no end-of-text token to end a reply with. Prepare the conversations "
            "with --tokenizer gpt2, byte, bpe:8192, or the tokenizer of a chat model."
        )
    return PLAIN


def render(tokenizer: Tokenizer, messages: list[dict], most: int | None = None) -> np.ndarray:
    """Return the ids of a conversation up to the start of the next reply: int32, one dimension. They equal the ids
    before this reply in `render_to_learn` and `forms_to_learn`. Exception: a text of more than `most` ids is encoded as
    a whole, which needs only one rendering. Raises UserError if the template rejects the messages, or if it renders
    nothing, as Llama 2's does for a system message alone."""
    whole = _fill_in(tokenizer, messages, True)
    if not whole:
        raise UserError("the chat template renders no text for these messages. Add a user message.")
    if most is not None and len(ids := _encode(tokenizer, whole, False)) > most:
        return ids
    try:
        parts = _regular_parts(tokenizer, messages, whole)
        parts = parts or [text for text, _ in _parts(tokenizer, messages, True)]
    except UserError:  # the template rewrites history or cannot be learned: training has no parts to match
        parts = [whole]
    return np.concatenate([_encode(tokenizer, text, i > 0) for i, text in enumerate(parts)])


def render_to_learn(tokenizer: Tokenizer, messages: list[dict]) -> tuple[np.ndarray, np.ndarray]:
    """Return the ids of a whole conversation (int32) and a mask of the learned ones (bool), both of one dimension.

    The assistant's replies are learned, each up to and including the control token that ends it, except replies with
    `"learn": False`. Raises UserError if the template ends a reply without a control token, leaves replies out, or
    changes earlier turns when later turns are added."""
    _, ids, learned = zip(*_encoded_parts(tokenizer, messages), strict=True)
    return np.concatenate(ids), np.concatenate(learned)


def _encoded_parts(tokenizer: Tokenizer, messages: list[dict]) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """Return (text, ids, learned) of each of the conversation's `_parts`."""
    parts: list[tuple[str, np.ndarray, np.ndarray]] = []
    for text, is_learned in _parts(tokenizer, messages, False):
        ids = _encode(tokenizer, text, bool(parts))
        parts.append((text, ids, np.full(len(ids), is_learned)))
    return parts


def forms_to_learn(tokenizer: Tokenizer, messages: list[dict]) -> list[list[tuple[np.ndarray, np.ndarray]]]:
    """Return the training examples of a conversation, each a list of its forms.

    A form is a pair (ids, learned) as in `render_to_learn`, up to the last learned token. The first form is the whole
    conversation; the next ones are rendered without the oldest turn, without the two oldest, and so on. Sampling drops
    turns in the same way from a conversation longer than the block. Messages before the first user turn stay.

    Usually one example holds all replies. If the template rewrites history, a later reply follows a different rendering
    of the earlier ones; then each reply becomes its own example. Raises UserError as `render_to_learn` does."""
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
        except UserError:  # some templates reject the remaining messages
            if turn == first:
                raise
            continue
        if not learned.any():
            continue
        end = np.flatnonzero(learned)[-1] + 1
        forms.append((ids[:end], learned[:end]))
    return forms


def _render_again(tokenizer: Tokenizer, messages: list[dict]):
    """Return a function like `render_to_learn` for `messages` and for `messages` without the oldest turns.

    It reuses the ids after the first reply's prompt if the template renders the same text there. A conversation of n
    turns then takes O(n) renderings instead of O(n^2)."""
    parts = _encoded_parts(tokenizer, messages)
    whole = "".join(text for text, _, _ in parts)
    begins = np.cumsum([0, *(len(text) for text, _, _ in parts)])  # the offset of each part in the text
    reply_begin = begins[max(k for k, (_, _, learned) in enumerate(parts) if learned.any())]  # the last reply's offset

    def render_whole(tokenizer: Tokenizer, shown: list[dict]) -> tuple[np.ndarray, np.ndarray]:
        if len(shown) == len(messages):
            _, ids, learned = zip(*parts, strict=True)
            return np.concatenate(ids), np.concatenate(learned)
        to_reply = next(i for i, message in enumerate(shown) if message["role"] == "assistant")
        text, prompt = _fill_in(tokenizer, shown, False), _fill_in(tokenizer, shown[:to_reply], True)
        suffix = text.removeprefix(prompt)
        k = int(np.searchsorted(begins, len(whole) - len(suffix)))
        is_same = begins[k] == len(whole) - len(suffix) and whole.endswith(suffix) and text == prompt + suffix
        last_prompt = text[: len(text) - (len(whole) - reply_begin)]
        if not is_same or last_prompt != _fill_in(tokenizer, shown[:-1], True):
            return render_to_learn(tokenizer, shown)
        _, ids, learned = zip(*parts[k:], strict=True)
        first = _encode(tokenizer, prompt, False)
        return np.concatenate([first, *ids]), np.concatenate([np.zeros(len(first), dtype=bool), *learned])

    return render_whole


def _render_last_reply(tokenizer: Tokenizer, messages: list[dict]) -> tuple[np.ndarray, np.ndarray]:
    """Like `render_to_learn`, but only the last reply is learned; the ids before it come from `render`."""
    prompt, reply = render(tokenizer, messages[:-1]), _last_reply(tokenizer, messages)
    ids = _encode(tokenizer, reply[: _reply_length(tokenizer, reply)], True)
    return np.concatenate([prompt, ids]), np.arange(len(prompt) + len(ids)) >= len(prompt)


def _last_reply(tokenizer: Tokenizer, messages: list[dict], prompt: str | None = None, whole: str | None = None) -> str:
    """Return the text of the last message after the generation prompt. The rendered prompt and conversation are reused
    if they are given. Raises UserError if the conversation does not begin with the prompt."""
    prompt = _fill_in(tokenizer, messages[:-1], True) if prompt is None else prompt
    whole = _fill_in(tokenizer, messages, False) if whole is None else whole
    if not whole.startswith(prompt):
        reply = _reply_without_system(tokenizer, messages)
        if reply and whole.endswith(reply):
            return reply
        prefix = _fill_in(tokenizer, messages[:-1], False)
        shared = next((i for i, char in enumerate(prompt) if whole[i : i + 1] != char), 0)
        opening = prompt[min(len(prefix), shared) :] if prompt.startswith(prefix) else prompt[shared:]
        raise UserError(
            f"the chat template opens a reply with {opening!r:.80} but renders a finished reply without it. Training "
            "would therefore begin replies differently than sampling; sampling and evaluation work. To train, put each "
            'reply\'s thinking into "reasoning_content" if the template renders that, or choose another --template.'
        )
    return whole[len(prompt) :]


def _reply_without_system(tokenizer: Tokenizer, messages: list[dict]) -> str | None:
    """Return the text of the last reply, rendered without the system message; None if there is no system message. Some
    templates write the system message into the last user message only while no reply follows."""
    rest = Conversation([m for m in messages if m["role"] != "system"], getattr(messages, "extras", {}))
    return _last_reply(tokenizer, rest) if 1 < len(rest) < len(messages) else None


def _reply_length(tokenizer: Tokenizer, reply: str) -> int:
    """Return the length of a reply's text, including the control token that ends it. Raises UserError if none does."""
    ends = list(_any_of(tokenizer.control).finditer(reply))
    if not ends:
        raise UserError(
            "the chat template ends a reply without a control token of this tokenizer. Choose another --template."
        )
    if len(ends) > 1:  # others may be inside the reply, such as around a tool call, or after it, such as end of text
        stop = "".join(_stop_names(tokenizer, tokenizer.chat_template))
        if stop and stop in reply:
            length = reply.rindex(stop) + len(stop)
            last = next((end for end in reversed(ends) if tokenizer.control[end[0]] in tokenizer.ends), None)
            between = _any_of(tokenizer.control).sub("", reply[length : last.start()]) if last else ""
            return last.end() if last and between.strip() else length  # in gpt-oss, `stop` also ends the thinking
        ends = [end for end in ends if tokenizer.control[end[0]] in tokenizer.ends] or ends
    return ends[-1].end()


def _is_learned(message: dict) -> bool:
    return message["role"] == "assistant" and message.get("learn", True)


def _around_content(tokenizer: Tokenizer) -> tuple[str, str]:
    """Return the text before and after the content of the reply in a conversation of two messages."""
    text = _fill_in(tokenizer, [_message("user", "?"), _message("assistant", PROBE)], False)
    prefix, found, ending = text.rpartition(PROBE)
    if not found:
        raise UserError(
            "the chat template leaves out the assistant's messages, so there is nothing to learn. Choose another "
            "--template."
        )
    return prefix, ending


def _stop_name(tokenizer: Tokenizer) -> str | None:
    """Return the name of the control token that ends a reply; None if the template ends it with text."""
    return next(iter(_stop_names(tokenizer, tokenizer.chat_template)), None)


@functools.lru_cache(1)  # preparation needs it for each conversation
def _stop_names(tokenizer: Tokenizer, template: str) -> tuple[str, ...]:
    """Return the names of the control tokens that end a reply: the first one after it, and any end tokens that follow
    immediately, as in "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>". A token that appears only at the end of a conversation
    does not count. `template` is the tokenizer's, as a key of the cache."""
    conversation = [_message("user", "?"), _message("assistant", PROBE), _message("user", "?")]
    _, found, ending = _fill_in(tokenizer, conversation, True).rpartition(PROBE)
    if not found or not _any_of(tokenizer.control).search(ending):
        ending = _around_content(tokenizer)[1]
    names: list[str] = []
    end = 0
    for match in _any_of(tokenizer.control).finditer(ending):
        if names and (match.start() != end or tokenizer.control[match[0]] not in tokenizer.ends):
            break
        names.append(match[0])
        end = match.end()
    return tuple(names)


def reply_frame(tokenizer: Tokenizer) -> tuple[str, str]:
    """Return the text that the template writes before and after the content of a reply, such as the space in
    "[/INST] Hello". The text after it ends where a control token begins."""
    return _reply_frame(tokenizer, tokenizer.chat_template)


@functools.lru_cache(1)  # evaluation needs it for each choice
def _reply_frame(tokenizer: Tokenizer, template: str) -> tuple[str, str]:
    before, after = _around_content(tokenizer)
    prompt = _fill_in(tokenizer, [_message("user", "?")], True)
    before = before.removeprefix(prompt) if before.startswith(prompt) else ""
    return before, _any_of(tokenizer.control).split(after, maxsplit=1)[0]


def encode_reply(tokenizer: Tokenizer, content: str) -> list[int]:
    """Return the ids of a reply that follows `render`: what the template writes before the content, and the content."""
    return _encode(tokenizer, reply_frame(tokenizer)[0] + _broken(content, _names_in_reply(tokenizer)), True).tolist()


def as_content(tokenizer: Tokenizer, reply: str) -> str:
    """Return the message content of `reply`, a text that a model generated, without its `reply_frame`."""
    before, after = reply_frame(tokenizer)
    return reply.removeprefix(before).removesuffix(after)


def stop_ids(tokenizer: Tokenizer) -> set[int]:
    """Return the ids that end a reply: the control tokens that the template writes there, and those that end a text."""
    names = (_stop_name(tokenizer), _call_end(tokenizer))
    return {tokenizer.control[name] for name in names if name is not None} | tokenizer.ends


def _call_end(tokenizer: Tokenizer) -> str | None:
    """Return the name of the control token that ends a reply with a tool call; None if the template has no calls."""
    if "tool_calls" not in _template(tokenizer):
        return None
    try:
        reply = _last_reply(tokenizer, [_message("user", "?"), _message("assistant", "") | {"tool_calls": [CALL]}])
        reply = reply[: _reply_length(tokenizer, reply)]
    except UserError:
        return None
    return _any_of(tokenizer.control).findall(reply)[-1]


def check_learnable(tokenizer: Tokenizer) -> None:
    """Raise UserError, with the reason, if the tokenizer's template cannot be used for training. It may still work for
    sampling. Some templates can be learned only from replies with reasoning."""
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
    """Return the names of message fields that the template ignores. Contents count only if it ignores them in all
    messages with this role, or in all replies with a tool call."""
    names = {name for message in messages for name in message} - {"role", "content", "learn"}
    template = _template(tokenizer)
    names = {name for name in names if not any(other in template for other in {name, *REASONING * (name in REASONING)})}
    for role in {message["role"] for message in messages} - {"user", "assistant"}:
        if _drops_content(tokenizer, template, role):
            names.add(f"content of the role {role!r:.40}")
    has_text = any(message.get("tool_calls") and message.get("content") for message in messages)
    if has_text and _drops_content(tokenizer, template, "assistant", calls=True):
        names.add("content beside tool_calls")
    return names


@functools.lru_cache(64)  # preparation needs it for each conversation
def _drops_content(tokenizer: Tokenizer, template: str, role: str, calls: bool = False) -> bool:
    """Whether the template leaves out the content of a message with this role, before and after a question. `template`
    is the tokenizer's, as a key of the cache."""
    question = _message("user", "?")
    message = _message(role, PROBE) | ({"tool_calls": [CALL]} if calls else {})
    try:
        return all(PROBE not in _fill_in(tokenizer, talk, False) for talk in ([message, question], [question, message]))
    except UserError:
        return False


def _template(tokenizer: Tokenizer) -> str:
    assert tokenizer.chat_template is not None, "only tokenizers with a template encode conversations"
    return tokenizer.chat_template


def _message(role: str, content: str) -> dict:
    return {"role": role, "content": content}


def _parts(tokenizer: Tokenizer, messages: list[dict], add_generation_prompt: bool) -> list[tuple[str, bool]]:
    """Cut the text of a conversation before and after each reply; return (text, whether it is a learned reply) of each
    part. A reply is the difference between the text that includes it and the text before it with a generation prompt.
    This works for any template."""
    whole = _fill_in(tokenizer, messages, add_generation_prompt)
    parts, done = [], 0
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt = _fill_in(tokenizer, messages[:i], True)
            if not whole.startswith(prompt) and i + 1 < len(messages):
                raise RewrittenHistory(REWRITTEN)
            is_last = i + 1 == len(messages) and not add_generation_prompt
            reply = _last_reply(tokenizer, messages[: i + 1], prompt, whole if is_last else None)
            reply = reply[: _reply_length(tokenizer, reply)]
            if not whole.startswith(prompt + reply) or len(prompt) < done:
                raise RewrittenHistory(REWRITTEN)
            parts += [(whole[done : len(prompt)], False), (reply, _is_learned(message))]
            done = len(prompt) + len(reply)
    parts.append((whole[done:], False))
    return [part for part in parts if part[0]]


def _regular_parts(tokenizer: Tokenizer, messages: list[dict], whole: str) -> list[str] | None:
    """Return the texts of `_parts` up to the next reply, in a few renderings instead of two per reply. `whole` is the
    text of the conversation. Return None if there are fewer than 4 replies, if the content of one is not a string, or
    if the template may render replies differently. Raises UserError, such as RewrittenHistory.

    One rendering puts a PROBE before and after the content of each reply. The text around the first and the last
    content, found as in `_parts`, must also surround all others."""
    replies = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    contents: list = [messages[i].get("content") for i in replies]
    if len(replies) < 4 or not all(isinstance(content, str) for content in contents):
        return None
    for candidate in (contents, [content.strip() for content in contents]):  # many templates strip replies
        probed = Conversation(messages, getattr(messages, "extras", {}))
        for i, content in zip(replies, candidate, strict=True):
            probed[i] = messages[i] | {"content": PROBE + content + PROBE}
        pieces = _fill_in(tokenizer, probed, True).split(PROBE)
        if len(pieces) == 2 * len(replies) + 1 and "".join(pieces) == whole:
            break
    else:
        return None
    begins = np.cumsum([0, *map(len, pieces)])[1:-1:2].tolist()  # of each content
    ends = [begin + len(content) for begin, content in zip(begins, pieces[1::2], strict=True)]

    around = set()
    for k in (0, -1):
        prompt = _fill_in(tokenizer, messages[: replies[k]], True)
        reply = _last_reply(tokenizer, messages[: replies[k] + 1], prompt)
        reply = reply[: _reply_length(tokenizer, reply)]
        if not whole.startswith(prompt + reply):
            raise RewrittenHistory(REWRITTEN)
        around.add((whole[len(prompt) : begins[k]], whole[ends[k] : len(prompt) + len(reply)]))
    if len(around) != 1:
        return None
    [(before, after)] = around
    cuts = [0]
    for begin, end in zip(begins, ends, strict=True):
        if not (whole.startswith(before, begin - len(before)) and whole.startswith(after, end)):
            return None
        cuts += [begin - len(before), end + len(after)]
    if not after or cuts != sorted(cuts):
        return None
    return [whole[i:j] for i, j in itertools.pairwise([*cuts, len(whole)]) if i < j]


def _fill_in(tokenizer: Tokenizer, messages: list[dict], add_generation_prompt: bool) -> str:
    """Return the template's text for the messages, with a BREAK inside each name of a control token that comes from a
    message."""
    template, extras = _template(tokenizer), getattr(messages, "extras", {})
    variables = _variables(template)
    extras = {name: value for name, value in extras.items() if name in variables or name in REQUIRED_FIELDS}
    for name in REQUIRED_FIELDS:
        if name not in template and (extras.get(name) or any(message.get(name) for message in messages)):
            raise UserError(NOT_RENDERED.format(name))
    text = _rendered(tokenizer, messages, extras, add_generation_prompt)
    # OpenAI's format has a call's arguments as JSON text, which most templates would encode as JSON a second time
    arguments = [function["arguments"] for function in _functions(messages) if _is_json(function.get("arguments"))]
    names = _any_of(tokenizer.control)
    if any(json.dumps(_broken(text_, names), ensure_ascii=False) in text for text_ in arguments):
        messages = json.loads(json.dumps(messages))
        for function in _functions(messages):
            if _is_json(function.get("arguments")):
                function["arguments"] = json.loads(function["arguments"])
        text = _rendered(tokenizer, messages, extras, add_generation_prompt)
    for function in _functions(messages):
        called = function.get("name")
        if isinstance(called, str) and _broken(called, names) not in text and json.dumps(called)[1:-1] not in text:
            raise UserError(NOT_RENDERED.format(f"the call of {called!r:.60}"))
    return text


def _rendered(tokenizer: Tokenizer, messages: list[dict], extras: dict, add_generation_prompt: bool) -> str:
    import jinja2

    names = _any_of(tokenizer.control)
    in_reply = _names_in_reply(tokenizer)
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
        raise UserError(f"the chat template rejects this conversation ({error!s:.200})") from error
    return text.replace(json.dumps(BREAK)[1:-1], BREAK) if "ensure_ascii" in _template(tokenizer) else text


def _names_in_reply(tokenizer: Tokenizer) -> re.Pattern:
    """Match the control tokens that a reply must not write. It may write those around thinking, such as <think>."""
    return _any_of(name for name in tokenizer.control if "think" not in name.lower())


def _render_template(**arguments) -> str:
    """Return the output of transformers' `render_jinja_template` for one conversation. A template that is not one of
    ours may loop forever or exhaust memory, so it runs in a process with limits."""
    if arguments["chat_template"] not in TEMPLATES.values():
        return sandbox.render("the chat template", **arguments)
    from transformers.utils.chat_template_utils import render_jinja_template

    return render_jinja_template(**arguments)[0][0]


def _broken(value, names: re.Pattern):
    """Return a value for a template with a BREAK inside each of the `names` in its strings."""
    if isinstance(value, str):
        return names.sub(lambda match: match[0][:1] + BREAK + match[0][1:], value.replace(BREAK, ""))
    if isinstance(value, dict):
        return {_broken(name, names): _broken(item, names) for name, item in value.items()}
    return [_broken(item, names) for item in value] if isinstance(value, list) else value


@functools.lru_cache(16)
def _takes_parts(template: str) -> bool:
    """Whether a template drops content that is a string and needs a list of parts, as multimodal templates do."""

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
    """Return the functions that messages call, each a dict with a name and arguments."""
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
    """Return the names of variables that a template may use besides the messages: all its words except Jinja's own.
    Jinja's parser would be exact, but it evaluates constants such as 'a' * 10**10 while parsing."""
    from jinja2.defaults import DEFAULT_NAMESPACE

    return frozenset(re.findall(r"[^\W\d]\w*", template)) - DEFAULT_NAMESPACE.keys() - RESERVED_VARIABLES


def _encode(tokenizer: Tokenizer, text: str, continues: bool) -> np.ndarray:
    """Return the ids of a part of a text from `_fill_in`; `continues` is True if text precedes it."""
    ids = [np.zeros(0, dtype=np.int32)]
    broken = _any_of(name[:1] + BREAK + name[1:] for name in tokenizer.control)
    for i, part in enumerate(re.split(f"({broken.pattern})", text)):  # every second part is a name with a BREAK
        for piece in [part.replace(BREAK, "")] if i % 2 else part.split(BREAK):
            if piece:
                ids.append(tokenizer.encode_part(piece, continues, control=i % 2 == 0))
                continues = True
    return np.concatenate(ids)


def _any_of(names: Iterable[str]) -> re.Pattern:
    return _alternatives(tuple(names))


@functools.lru_cache(16)
def _alternatives(names: tuple[str, ...]) -> re.Pattern:
    longest_first = sorted(names, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")  # (?!) never matches
