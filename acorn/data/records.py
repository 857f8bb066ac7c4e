"""Conversations from the records in which they are published.

    messages = read_messages(record)     # a JSON object -> messages for acorn/data/chat.py

Four forms are read. What is not part of one stays in `messages.extras`, where the chat template finds what it uses
(`tools`, `documents`, `enable_thinking`).

    {"messages": [{"role": "user", "content": "..."}, ...]}      also as JSON text, or inside another object
    {"conversations": [{"from": "human", "value": "..."}, ...]}  ShareGPT
    {"prompt": "...", "response": "..."}                         or "completion"; texts, or lists of messages
    {"instruction": "...", "input": "...", "output": "..."}      Alpaca

A reply that is marked with `"weight": 0`, `"train": false` or the like has `"learn": False` in the result.
"""

import json

from acorn import UserError

LISTS = ("messages", "conversations", "conversation")
ROLES = {  # of ShareGPT, in the words of chat templates
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
}
CALLS = ("function_call", "tool_call")  # as roles: the content is a call as JSON
TEXT_PARTS = ("text", "input_text", "output_text")
RESULTS = ("tool", "function", "ipython", "observation")  # roles whose content may be any JSON value
WITHOUT_CONTENT = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")  # a reply may be these
FLAGS = {  # what marks a message as to be learned, with the value that means it is
    "weight": True,
    "train": True,
    "training": True,
    "trainable": True,
    "learn": True,
    "loss": True,
    "loss_weight": True,
    "masked": False,
    "mask": False,
}


class Conversation(list):
    """A list of messages, and the `extras` of its record: other values that a chat template may use, by name. Slices
    and sums keep them."""

    def __init__(self, messages=(), extras: dict | None = None):
        super().__init__(messages)
        self.extras = extras or {}

    def __getitem__(self, at):
        found = super().__getitem__(at)
        return Conversation(found, self.extras) if isinstance(at, slice) else found

    def __add__(self, other):
        return Conversation(super().__add__(other), self.extras)


def read_messages(record: dict) -> Conversation:
    """The messages of a record in one of the forms above. Raises UserError, in words that follow the record's place,
    where it has none of them, holds no reply to learn, or has a part that a text model cannot take."""
    messages, used, record = _turns(record)
    system = next((name for name in ("system", "system_prompt") if record.get(name) and name not in used), None)
    if system:
        if not messages or messages[0]["role"] != "system":
            messages = [{"role": "system", "content": _text(record[system], f'"{system}"')}, *messages]
        used = {*used, system}
    by_default = _flag(record, "")
    for i, message in enumerate(messages, 1):
        _apply_flag(message, i, by_default)
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        raise UserError('has no message of the role "assistant", so there is nothing to learn from it')
    if "user" not in roles[: roles.index("assistant")]:
        raise UserError('has a reply before anything of the role "user"')
    if not any(message["role"] == "assistant" and message.get("learn", True) for message in messages):
        raise UserError("has nothing to learn: all its replies are marked as not to be learned; leave it out")

    extras = {name: value for name, value in record.items() if name not in {*used, *FLAGS} and value is not None}
    if isinstance(settings := _parsed(extras.pop("chat_template_kwargs", None)), dict):  # as vLLM's requests have them
        extras |= settings
    for name in ("tools", "documents"):
        if name in extras:
            extras[name] = _parsed(extras[name])
            if not isinstance(extras[name], list) or not all(isinstance(item, dict) for item in extras[name]):
                raise UserError(f'has "{name}" that are no list of objects')
    return Conversation(messages, extras)


def _turns(record: dict) -> tuple[list[dict], set[str], dict]:
    """The messages of a record, the names of the fields that hold them, and the record that has these fields."""
    for name in LISTS:
        if name in record:
            return _read_list(record[name], f'"{name}"'), {name}, record
    given = {name for name, value in record.items() if value is not None}
    if "instruction" in given:
        reply = next((name for name in ("output", "response", "completion") if name in given), None)
        inputs = [name for name in ("input", "context") if name in given]
        if reply is None:
            raise UserError('has "instruction" without "output"')
        texts = [_text(record[name], f'"{name}"') for name in ("instruction", *inputs)]
        question = "\n\n".join(text for text in texts if text)
        messages = [_message("user", question), _message("assistant", _text(record[reply], f'"{reply}"'))]
        return _history(record) + messages, {"instruction", "history", reply, *inputs}, record
    reply = next((name for name in ("response", "completion") if name in given), None)
    if "prompt" in given and reply:
        messages = []
        for name, role in (("prompt", "user"), (reply, "assistant")):
            value = record[name]
            is_list = isinstance(value, list) and all(isinstance(item, dict) and "role" in item for item in value)
            messages += _read_list(value, f'"{name}"') if is_list else [_message(role, _text(value, f'"{name}"'))]
        return messages, {"prompt", reply}, record
    inside = [value for value in record.values() if isinstance(value, dict) and any(name in value for name in LISTS)]
    if len(inside) == 1:  # as {"body": {"messages": [...]}}
        return _turns({**record, **inside[0]})
    fields = ", ".join(map(str, record)) or "no fields"
    raise UserError(
        f'has {fields}; it should have "prompt" and "response", two texts, or "messages", "conversations", or '
        '"instruction" and "output"'
    )


def _history(record: dict) -> list[dict]:
    """The turns before an Alpaca record's own: [[question, answer], ...]."""
    messages = []
    for pair in _parsed(record.get("history")) or []:
        if not isinstance(pair, list) or len(pair) != 2:
            raise UserError('has a "history" that is no list of questions with their answers')
        messages += [
            _message(role, _text(text, '"history"')) for role, text in zip(("user", "assistant"), pair, strict=True)
        ]
    return messages


def _read_list(value, name: str) -> list[dict]:
    value = _parsed(value)
    if isinstance(value, dict) and value and all(isinstance(column, list) for column in value.values()):
        if len({len(column) for column in value.values()}) > 1:
            raise UserError(f"has {name} whose lists are of different lengths")
        value = [dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)]
    if not isinstance(value, list):
        raise UserError(f"has {name} that are no list")
    return [_read_message(message, i) for i, message in enumerate(value, 1)]


def _read_message(message, number: int) -> dict:
    where = f"a message, number {number},"
    if not isinstance(message, dict):
        raise UserError(f'has {where} without a "role" and a "content"')
    message = {name: value for name, value in message.items() if value is not None}  # as transformers does
    role_field = "from" if "from" in message else "role"
    content_field = "value" if "value" in message else "content"
    role, content = message.pop(role_field, None), message.pop(content_field, None)
    if not isinstance(role, str):
        raise UserError(f'has {where} without a "role" that is a text')
    for name in ("tool_calls", "function_call"):
        if name in message:
            message[name] = _parsed(message[name])
    if role_field == "from":
        if role in CALLS:
            call = _parsed(content)
            calls = call if isinstance(call, list) else [call]
            if not all(isinstance(call, dict) and "name" in call for call in calls):
                raise UserError(f"has {where} whose call is no JSON object with a name")
            message |= {"tool_calls": [{"type": "function", "function": call} for call in calls]}
            role, content = "assistant", ""
        role = ROLES.get(role, role)
    if isinstance(content, list) and content and not (role in RESULTS and not any(map(_is_part, content))):
        content = "".join(_part(part, number) for part in content)
    if content is None and role == "assistant" and any(message.get(name) for name in WITHOUT_CONTENT):
        return {"role": role, **message}
    if not isinstance(content, str) and (role not in RESULTS or content is None):
        raise UserError(f'has {where} without a "content" that is a text')
    return {"role": role, "content": content, **message}


def _is_part(part) -> bool:
    return isinstance(part, str) or (isinstance(part, dict) and ("type" in part or "text" in part))


def _part(part, number: int) -> str:
    text = part if isinstance(part, str) else part.get("text") if isinstance(part, dict) else None
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(text, str) or kind not in (None, *TEXT_PARTS):
        raise UserError(f"has a message, number {number}, with a part of type {kind!r:.40}; only text is read")
    return text


def _flag(fields: dict, place: str) -> bool | None:
    """Whether `fields` say that a reply is to be learned, None where they do not say."""
    found = {name: fields[name] for name in FLAGS if fields.get(name) is not None}
    for name, value in found.items():
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise UserError(
                f'has "{name}": {json.dumps(value, default=str)[:40]}{place}; a reply is learned (1, true) or not '
                "(0, false), and nothing between: change it or leave it out"
            )
    said = {bool(value) == FLAGS[name] for name, value in found.items()}
    if len(said) == 2:
        raise UserError(f"has {' and '.join(found)} that contradict each other{place}; leave one of them out")
    return said.pop() if said else None


def _apply_flag(message: dict, number: int, by_default: bool | None) -> None:
    """Replace what marks a message as learned or not by `"learn": False` where it is a reply not to be learned."""
    learn = _flag(message, f" in message {number}")
    if learn and message["role"] != "assistant" and "weight" not in message:  # 1 is a common default
        raise UserError(f"asks to learn message {number}, of role {message['role']!r:.40}; only replies are learned")
    for name in FLAGS:
        message.pop(name, None)
    if message["role"] == "assistant" and (by_default if learn is None else learn) is False:
        message["learn"] = False


def _parsed(value):
    """What JSON text stands for; any other value as it is."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _text(value, name: str) -> str:
    if isinstance(value, list) and value:
        return "".join(_part(part, 1) for part in value)
    if not isinstance(value, str):
        raise UserError(f"has {name} that is no text")
    return value


def _message(role: str, content: str) -> dict:
    return {"role": role, "content": content}
