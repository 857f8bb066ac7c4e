"""acorn/data/sandbox.py: chat templates render as in transformers, and endless ones raise a clear error."""

import json
import os
import sys
import time

import pytest
from helpers import PAIR, Terminal, on_posix, save_small

import sample
from acorn import UserError, checkpoint
from acorn.data import chat, sandbox
from acorn.data.tokenizer import ByteTokenizer

pytestmark = [on_posix, pytest.mark.usefixtures("alarm")]


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 'a' * 10000000000 }}",
        "{{ (9 ** 9) ** (9 ** 9) }}",
        "{{ ['ab' * 9999] | map('replace', 'ab', 'ab' * 9999) | map('replace', 'ab', 'ab' * 9999) | join }}",
        "{% set n = namespace(x='a') %}{% for a in range(64) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
        "{{ 'a'.center(90000000) }}",
        "{{ '%2000000000d' % 1 }}{{ '{:>2000000000}'.format(1) }}",
        "{% if a %}" * 20_000 + "{% endif %}" * 20_000,
        "{{ " + "(" * 20_000 + "1" + ")" * 20_000 + " }}",
        "{{ " + "[" * 20_000 + "]" * 20_000 + " }}",
        "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    ],
    ids=range(11),
)
def test_endless_template_raises_a_clear_error(template, monkeypatch):
    monkeypatch.setattr(sandbox, "CPU_SECONDS", 1)
    tokenizer = ByteTokenizer()
    tokenizer.chat_template = template
    began = time.process_time()
    with pytest.raises(UserError, match="chat template"):
        chat.render(tokenizer, PAIR[:1])
    assert time.process_time() - began < 2  # CPU time of this process, not of the worker
    tokenizer.chat_template = chat.CHATML + " "
    assert tokenizer.decode(chat.render(tokenizer, PAIR[:1])).startswith("<|im_start|>user\na<|im_end|>")


def test_template_renders_as_in_transformers():
    from transformers.utils.chat_template_utils import render_jinja_template

    template = "{{ bos_token }}{% for m in messages %}{{ m['content'] | tojson }} {% endfor %}{{ messages | length }}"
    talk = [*PAIR, {"role": "user", "content": 'é字\ud800 "x"\n'}]
    arguments = dict(conversations=[talk], chat_template=template, add_generation_prompt=True, bos_token="<s>")
    assert sandbox.render("it", **arguments) == render_jinja_template(**arguments)[0][0]


def test_forked_process_has_its_own_sandbox():
    arguments = dict(conversations=[PAIR], chat_template="{{ messages[0]['content'] }}.")
    assert sandbox.render("it", **arguments) == "a."
    child = os.fork()
    if not child:
        os._exit(0 if sandbox.render("it", **arguments) == "a." else 1)
    assert os.waitpid(child, 0)[1] == 0 and sandbox.render("it", **arguments) == "a."


def test_chat_with_an_endless_template_raises_a_clear_error(tmp_path, monkeypatch):
    monkeypatch.setattr(sandbox, "CPU_SECONDS", 1)
    step = save_small(tmp_path, 1, best=1)
    state = json.loads((step / "state.json").read_text())
    state["tokenizer"]["chat_template"] = (
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    )
    state["sha256"]["state"] = checkpoint.state_hash(state)
    (step / "state.json").write_text(json.dumps(state))
    words = [f"--out_dir={tmp_path}", "--chat=True", "--start=hi", "--device=cpu", "--compile=False"]
    monkeypatch.setattr(sys, "argv", ["sample.py", *words])
    monkeypatch.setattr(sys, "stdin", None)
    monkeypatch.setattr(sys, "stdout", Terminal())
    with pytest.raises(UserError, match="chat template"):
        sample.main()
