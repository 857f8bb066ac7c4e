"""Conversations from records in published data formats.

    messages = read_messages(record)     # a JSON object -> messages for acorn/data/chat.py

Four formats are read. Other fields stay in `messages.extras`, where the chat template finds those that it uses
(`tools`, `documents`, `enable_thinking`).

    {"messages": [{"role": "user", "content": "..."}, ...]}      also as JSON text, or inside another object
    {"conversations": [{"from": "human", "value": "..."}, ...]}  ShareGPT
    {"prompt": "...", "response": "..."}                         or "completion"; strings, or lists of messages
    {"instruction": "...", "input": "...", "output": "..."}      Alpaca

The last two may have earlier turns, {"history": [["question", "answer"], ...]}.
A reply marked with `"weight": 0`, `"train": false` or a similar flag has `"learn": False` in the result.
"""

import json

from acorn import UserError

LISTS = ("messages", "conversations", "conversation")
ROLES = {  # roles of ShareGPT -> roles of chat templates
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
}
CALL_ROLES = ("function_call", "tool_call")  # roles whose content is a tool call as JSON
TEXT_PARTS = ("text", "input_text", "output_text")
RESULT_ROLES = ("tool", "function", "ipython", "observation")  # roles whose content may be any JSON value
SUBSTITUTES = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")  # replace the content
BAD_IF_FALSE = ("label", "kto_tag")  # in data for KTO, false marks a bad reply
FLAGS = {  # fields that say whether a message is learned, each with the value that means yes
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
    """A list of messages with `extras`, the record's other fields by name, which a chat template may use. Slices and
    sums keep the extras."""

    def __init__(self, messages=(), extras: dict | None = None):
        super().__init__(messages)
        self.extras = extras or {}

    def __getitem__(self, index):
        item = super().__getitem__(index)
        return Conversation(item, self.extras) if isinstance(index, slice) else item

    def __add__(self, other):
        return Conversation(super().__add__(other), self.extras)


def read_messages(record: dict) -> Conversation:
    """Return the messages of a record in one of the formats above.

    Raises UserError if the record has another format, holds no reply to learn, or has a part that is not text. The
    message is a predicate, such as 'has no ...': the caller puts the record's location before it."""
    messages, used, record = _turns(record)
    for name in BAD_IF_FALSE:
        if _parse_flag(record.get(name)) is False:
            raise UserError(
                f'has "{name}": false, which marks a bad reply in data for KTO. Remove the record, or rename the field '
                "if it means something else."
            )
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
        found = ", ".join(sorted(set(roles))) or "none"
        raise UserError(
            f'has no message with the role "assistant", so there is nothing to learn (its roles: {found:.100}). '
            "Correct or remove it."
        )
    if "user" not in roles[: roles.index("assistant")]:
        raise UserError('has a reply before the first message with the role "user". Correct or remove it.')
    if not any(message["role"] == "assistant" and message.get("learn", True) for message in messages):
        raise UserError("has nothing to learn: all its replies are marked as not learned. Remove it.")

    extras = {name: value for name, value in record.items() if name not in {*used, *FLAGS} and value is not None}
    for name, value in extras.items():
        if isinstance(value, str) and value.strip().lower() in ("true", "false"):  # csv stores true and false as text
            extras[name] = _parse_flag(value)
    if isinstance(settings := _parsed(extras.pop("chat_template_kwargs", None)), dict):  # vLLM's name for extras
        extras |= settings
    if messages[0]["role"] == "system" and messages[0].get("tools"):  # as in MiniMind's data
        extras.setdefault("tools", messages[0]["tools"])
    for name in ("tools", "documents"):
        if name in extras:
            extras[name] = _parsed(extras[name]) or []  # "" is common for no tools
            if not isinstance(extras[name], list) or not all(isinstance(item, dict) for item in extras[name]):
                raise UserError(f'has "{name}" that is not a list of objects')
    return Conversation(messages, extras)


def read_pair(record: dict) -> tuple[Conversation, Conversation]:
    """Return the conversations with the chosen and with the rejected answer of a record of preferences.

    "prompt" (a string, or a list of messages), "messages", ShareGPT's "conversations" or Alpaca's "instruction" and
    "input" precede both answers. "chosen" and "rejected" are strings, messages or lists of messages, which may also
    repeat the prompt, as in published data sets. Only messages after the common beginning of both conversations are
    learned. Raises UserError as `read_messages` does.
    """
    for name in ("chosen", "rejected"):
        if record.get(name) is None:
            fields = ", ".join(map(str, record)) or "(none)"
            raise UserError(f'has the fields {fields}. It needs "chosen", "rejected", and "prompt" or "messages".')
    prompt, used = _prompt(record)
    rest = {k: v for k, v in record.items() if k not in {*used, *LISTS, "prompt", "chosen", "rejected", *BAD_IF_FALSE}}
    pair = []
    for name in ("chosen", "rejected"):
        answer = _messages_in(record[name])
        answer = [answer] if isinstance(answer, dict) else answer
        messages = _read_list(answer, f'"{name}"') if isinstance(answer, list) else [_message("assistant", answer)]
        begins = bool(messages) and messages[0]["role"] != "assistant"  # it repeats the prompt
        if not begins and not prompt:
            fields = ", ".join(map(str, record))
            raise UserError(
                f'has answers without a question (its fields: {fields:.200}). It needs "prompt", "messages", '
                '"conversations" or "instruction".'
            )
        if not begins and prompt[-1]["role"] == "assistant":
            raise UserError(f"has a reply before its {name} answer, where a question belongs. Correct or remove it.")
        pair.append(read_messages(rest | {"messages": _joined(prompt, messages)}))
    chosen, rejected = pair
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    for messages in pair:
        if not any(message["role"] == "assistant" for message in messages[shared:]):
            raise UserError("has the same answer as chosen and as rejected, so it says nothing. Remove it.")
        if messages[shared]["role"] != "assistant":
            raise UserError("has a chosen and a rejected answer to different prompts. Correct or remove it.")
        for message in messages[:shared]:
            if message["role"] == "assistant":
                message["learn"] = False
    return chosen, rejected


def _joined(prompt: list[dict], messages: list[dict]) -> list[dict]:
    """Return `prompt` and `messages` as one conversation. The messages may repeat the end of the prompt. If they begin
    with another question, perhaps the same one in another format, only the system messages of `prompt` remain."""
    if messages and messages[0]["role"] == "assistant":
        return prompt + messages
    for i in range(len(prompt)):
        if messages[: len(prompt) - i] == prompt[i:]:
            return prompt[:i] + messages
    has_system = bool(messages) and messages[0]["role"] == "system"
    return [message for message in prompt if message["role"] == "system" and not has_system] + messages


def _prompt(record: dict) -> tuple[list[dict], set[str]]:
    """Return the messages before the answers of a pair, and the names of the fields that hold them."""
    for name in (*LISTS, "prompt"):
        if record.get(name) is not None:
            value = _messages_in(record[name])
            messages = [_message("user", value)] if isinstance(value, str) else _read_list(value, f'"{name}"')
            return _history(record) + messages, {name, "history"}
    if record.get("instruction") is not None:
        question, used = _question(record)
        return [*_history(record), question], {*used, "history"}
    return [], set()


def _question(record: dict) -> tuple[dict, set[str]]:
    """Return the user's message of an Alpaca record, and the names of the fields that hold it."""
    names = ["instruction", *(name for name in ("input", "context") if record.get(name) is not None)]
    texts = [_text(record[name], f'"{name}"') for name in names]
    return _message("user", "\n\n".join(text for text in texts if text)), set(names)


def _turns(record: dict) -> tuple[list[dict], set[str], dict]:
    """Return the messages of a record, the names of the fields that hold them, and the record with these fields."""
    present = {name for name, value in record.items() if value is not None}
    for name in LISTS:
        if name in present:
            return _read_list(record[name], f'"{name}"'), {name}, record
    if "instruction" in present:
        reply = next((name for name in ("output", "response", "completion") if name in present), None)
        if reply is None:
            raise UserError('has "instruction" without "output"')
        question, used = _question(record)
        messages = [question, _message("assistant", _text(record[reply], f'"{reply}"'))]
        return _history(record) + messages, {*used, "history", reply}, record
    reply = next((name for name in ("response", "completion") if name in present), None)
    if "prompt" in present and reply:
        messages = _history(record)
        for name, role in (("prompt", "user"), (reply, "assistant")):
            value = record[name]
            is_list = isinstance(value, list) and all(isinstance(item, dict) and "role" in item for item in value)
            messages += _read_list(value, f'"{name}"') if is_list else [_message(role, _text(value, f'"{name}"'))]
        return messages, {"prompt", "history", reply}, record
    wrapped = [value for value in record.values() if isinstance(value, dict) and any(name in value for name in LISTS)]
    if len(wrapped) == 1:  # such as {"body": {"messages": [...]}}
        return _turns({**record, **wrapped[0]})
    fields = ", ".join(map(str, record)) or "(none)"
    raise UserError(
        f'has the fields {fields}. It needs "prompt" and "response" (strings), "messages", "conversations", or '
        '"instruction" and "output".'
    )


def _history(record: dict) -> list[dict]:
    """Return the turns before a record's own question, from [[question, answer], ...]."""
    messages = []
    for pair in _parsed(record.get("history")) or []:
        if not isinstance(pair, list) or len(pair) != 2:
            raise UserError('has a "history" that is not a list of [question, answer] pairs')
        messages += [
            _message(role, _text(text, '"history"')) for role, text in zip(("user", "assistant"), pair, strict=True)
        ]
    return messages


def _read_list(value, name: str) -> list[dict]:
    value = _parsed(value)
    if isinstance(value, dict) and value and all(isinstance(column, list) for column in value.values()):
        if len({len(column) for column in value.values()}) > 1:
            raise UserError(f"has {name} with lists of different lengths")
        value = [dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)]
    if not isinstance(value, list):
        raise UserError(f"has {name} that is not a list")
    return [_read_message(message, i) for i, message in enumerate(value, 1)]


def _read_message(message, number: int) -> dict:
    where = f"a message (number {number})"
    if not isinstance(message, dict):
        raise UserError(f'has {where} without "role" and "content"')
    message = {name: value for name, value in message.items() if value is not None}  # like transformers
    role_field = "from" if "from" in message else "role"
    content_field = "value" if "value" in message else "content"
    role, content = message.pop(role_field, None), message.pop(content_field, None)
    if not isinstance(role, str):
        raise UserError(f'has {where} whose "{role_field}" is not a string')
    for name in ("tool_calls", "function_call"):
        if name in message:
            message[name] = _parsed(message[name])
    if role_field == "from":
        if role in CALL_ROLES:
            call = _parsed(content)
            calls = call if isinstance(call, list) else [call]
            if not all(isinstance(call, dict) and "name" in call for call in calls):
                raise UserError(f"has {where} whose tool call is not a JSON object with a name")
            message |= {"tool_calls": [{"type": "function", "function": call} for call in calls]}
            role, content = "assistant", ""
        role = ROLES.get(role, role)
    if isinstance(content, list) and content and not (role in RESULT_ROLES and not any(map(_is_part, content))):
        content = "".join(_part(part, number) for part in content)
    if content is None and role == "assistant" and any(message.get(name) for name in SUBSTITUTES):
        return {"role": role, **message}
    if not isinstance(content, str) and (role not in RESULT_ROLES or content is None):
        raise UserError(f'has {where} whose "{content_field}" is not a string')
    return {"role": role, "content": content, **message}


def _is_part(part) -> bool:
    return isinstance(part, str) or (isinstance(part, dict) and ("type" in part or "text" in part))


def _part(part, number: int) -> str:
    text = part if isinstance(part, str) else part.get("text") if isinstance(part, dict) else None
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(text, str) or kind not in (None, *TEXT_PARTS):
        raise UserError(f"has a message (number {number}) with a part of type {kind!r:.40}; only text is supported")
    return text


def _flag(fields: dict, place: str) -> bool | None:
    """Return whether `fields` mark a reply as learned, None if no flag is set. `place` follows the value in errors."""
    flags = {name: value for name in FLAGS if (value := _parse_flag(fields.get(name))) is not None}
    for name, value in flags.items():
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise UserError(
                f'has "{name}": {json.dumps(value, default=str)[:40]}{place}, which is neither 1 (true) nor 0 (false). '
                "Weights between them are not supported: correct or remove it."
            )
    answers = {bool(value) == FLAGS[name] for name, value in flags.items()}
    if len(answers) == 2:
        raise UserError(f"has {' and '.join(flags)} that contradict each other{place}. Remove one of them.")
    return answers.pop() if answers else None


def _parse_flag(value):
    """Return the value of a flag that csv stores as text: a bool, a float, or None for an empty text. Return any other
    value unchanged."""
    if not isinstance(value, str):
        return value
    words = {"true": True, "false": False, "": None}
    if (word := value.strip().lower()) in words:
        return words[word]
    try:
        return float(word)
    except ValueError:
        return value


def _apply_flag(message: dict, number: int, by_default: bool | None) -> None:
    """Remove the FLAGS of a message, and set `"learn": False` if it is a reply that they exclude from learning."""
    learn = _flag(message, f" in message {number}")
    if learn and message["role"] != "assistant" and "weight" not in message:  # weight 1 is a common default
        raise UserError(
            f"marks message {number}, with the role {message['role']!r:.40}, as learned. Only replies can be learned: "
            "remove the flag."
        )
    for name in FLAGS:
        message.pop(name, None)
    if message["role"] == "assistant" and (by_default if learn is None else learn) is False:
        message["learn"] = False


def _parsed(value):
    """Parse a value that is the JSON text of an object or array; return any other value unchanged."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _messages_in(value):
    """Parse a value that is the JSON text of a list of messages. Other text is returned unchanged, even other JSON."""
    parsed = _parsed(value)
    if not isinstance(parsed, list) or not parsed:
        return value
    return parsed if all(isinstance(m, dict) and ("role" in m or "from" in m) for m in parsed) else value


def _text(value, name: str) -> str:
    if isinstance(value, list) and value:
        return "".join(_part(part, 1) for part in value)
    if not isinstance(value, str):
        raise UserError(f"has {name} that is not a string")
    return value


def _message(role: str, content: str) -> dict:
    return {"role": role, "content": content}
