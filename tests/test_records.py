"""acorn/data/records.py: records in published formats become conversations, and others raise UserError."""

import json
import re

import pytest
from helpers import CALL, PAIR, TWO

from acorn import UserError
from acorn.data.records import read_messages

SYSTEM = {"role": "system", "content": "Be kind."}
HISTORY = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.mark.parametrize(
    ("record", "messages"),
    [
        ({"prompt": "Say hi", "response": "hi", "id": 5}, TWO),
        ({"prompt": "Say hi", "completion": "hi"}, TWO),
        ({"prompt": TWO[:1], "completion": TWO[1:]}, TWO),
        ({"prompt": "Say hi", "response": "hi", "system": "Be kind."}, [SYSTEM, *TWO]),
        ({"messages": TWO, "prompt": "other"}, TWO),
        ({"messages": json.dumps(TWO)}, TWO),
        ({"messages": {"role": ["user", "assistant"], "content": ["Say hi", "hi"]}}, TWO),
        ({"id": 1, "body": {"messages": TWO}}, TWO),
        ({"conversations": TWO}, TWO),
        ({"conversations": [{"from": "human", "value": "Say hi"}, {"from": "gpt", "value": "hi"}]}, TWO),
        (
            {
                "system": "Be kind.",
                "conversations": [{"from": "human", "value": "Say hi"}, {"from": "gpt", "value": "hi"}],
            },
            [SYSTEM, *TWO],
        ),
        ({"instruction": "Say hi", "input": "", "output": "hi"}, TWO),
        ({"instruction": "Say hi", "output": "hi", "history": [["a", "b"]]}, HISTORY + TWO),
        ({"prompt": "Say hi", "response": "hi", "history": [["a", "b"]]}, HISTORY + TWO),
        ({"instruction": "Say", "input": "hi", "output": "hi"}, [TWO[0] | {"content": "Say\n\nhi"}, TWO[1]]),
        ({"messages": [TWO[0] | {"content": [{"type": "text", "text": "Say "}, {"text": "hi"}]}, TWO[1]]}, TWO),
        ({"messages": [SYSTEM, TWO[0], TWO[0], TWO[1]]}, [SYSTEM, TWO[0], TWO[0], TWO[1]]),
        (
            {"messages": [TWO[0], {"role": "assistant", "content": None, "tool_calls": [CALL]}]},
            [TWO[0], {"role": "assistant", "tool_calls": [CALL]}],
        ),
        (
            {"messages": [TWO[0], {"role": "assistant", "content": "", "tool_calls": json.dumps([CALL])}, TWO[1]]},
            [TWO[0], {"role": "assistant", "content": "", "tool_calls": [CALL]}, TWO[1]],
        ),
        (
            {
                "conversations": [
                    {"from": "human", "value": "Say hi"},
                    {"from": "function_call", "value": json.dumps(CALL["function"])},
                    {"from": "observation", "value": "18 C"},
                    {"from": "gpt", "value": "hi"},
                ]
            },
            [
                TWO[0],
                {"role": "assistant", "content": "", "tool_calls": [CALL]},
                {"role": "tool", "content": "18 C"},
                TWO[1],
            ],
        ),
        (
            {"messages": [TWO[0] | {"name": "Ann", "weight": 1}, TWO[1] | {"weight": 1}]},
            [TWO[0] | {"name": "Ann"}, TWO[1]],
        ),
        ({"messages": HISTORY + TWO, "train": True}, HISTORY + TWO),
        ({"instruction": "Say hi", "output": "hi", "kto_tag": True, "label": 0}, TWO),
        ({"messages": TWO, "tools": ""}, TWO),
        ({"messages": None, "prompt": "a", "response": "b"}, read_messages({"prompt": "a", "response": "b"})),
    ],
)
def test_records_in_published_formats_become_messages(record, messages):
    assert read_messages(record) == messages


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({}, "fields (none)"),
        ({"prompt": "a", "answer": "b"}, "fields prompt, answer"),
        ({"prompt": "a", "response": None}, "fields prompt, response"),
        ({"prompt": "a", "response": 5}, '"response" that is not a string'),
        ({"instruction": "a"}, 'without "output"'),
        ({"messages": "a"}, "not a list"),
        ({"messages": [PAIR[0], "b"]}, "number 2"),
        ({"messages": [PAIR[0], {"role": "assistant", "content": [{"type": "text"}]}]}, "number 2"),
        ({"messages": [PAIR[0], {"role": "assistant", "content": [{"type": "image_url"}]}]}, "image_url"),
        ({"messages": [PAIR[0], {"role": "assistant", "content": None}]}, "number 2"),
        ({"messages": [PAIR[0] | {"content": 5}, PAIR[1]]}, "number 1"),
        ({"messages": {"role": ["user"], "content": []}}, "different lengths"),
        ({"messages": PAIR[:1]}, "nothing to learn"),
        ({"messages": [PAIR[0], PAIR[1] | {"role": "bot"}]}, "(its roles: bot, user)"),
        ({"messages": PAIR[::-1]}, "before the first"),
        ({"messages": [PAIR[0], PAIR[1] | {"weight": 0.5}]}, '"weight": 0.5 in message 2'),
        ({"messages": [PAIR[0], PAIR[1] | {"train": "no"}]}, '"train": "no"'),
        ({"messages": [PAIR[0], PAIR[1] | {"weight": "nan"}]}, '"weight": NaN in message 2'),
        ({"messages": [PAIR[0], PAIR[1] | {"train": True, "weight": 0}]}, "contradict"),
        ({"messages": [PAIR[0] | {"train": True}, PAIR[1]]}, "Only replies"),
        ({"messages": [PAIR[0], PAIR[1] | {"weight": 0}]}, "nothing to learn"),
        ({"messages": PAIR, "loss": 1.7}, '"loss": 1.7'),
        ({"prompt": "a", "completion": "b", "label": False}, '"label": false, which marks a bad reply'),
        ({"instruction": "a", "output": "b", "kto_tag": "false"}, '"kto_tag": false'),
        ({"messages": PAIR, "tools": "weather"}, "not a list of objects"),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": "b"}]},
            "not a JSON object",
        ),
    ],
)
def test_invalid_records_raise_user_error(record, message):
    with pytest.raises(UserError, match=re.escape(message)):
        read_messages(record)


@pytest.mark.parametrize("tools", [[CALL], json.dumps([CALL])])
def test_tools_of_the_system_message_become_those_of_the_conversation(tools):
    assert read_messages({"conversations": [SYSTEM | {"tools": tools}, *TWO]}).extras == {"tools": [CALL]}
    other = read_messages({"conversations": [SYSTEM | {"tools": tools}, *TWO], "tools": []})
    assert other.extras == {"tools": []}
