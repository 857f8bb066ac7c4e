"""The HTTP server, tested with OpenAI's Python client and with hostile clients."""

import asyncio
import collections
import contextlib
import http.client
import json
import os
import random
import re
import signal
import socket
import sys
import threading
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from helpers import REPO, STATE, bpe_tokenizer, llama_tokenizer, on_linux, start_process

from acorn import UserError, checkpoint, serve
from acorn.checkpoint.export import export
from acorn.data import chat
from acorn.data.tokenizer_json import add_tokens
from acorn.data.tokenizer_kinds import get_tokenizer
from acorn.inference import scheduler
from acorn.inference.generate import Sampling, TextStream, encode_prompt, generate
from model import GPT, GPTConfig

openai, httpx = pytest.importorskip("openai"), pytest.importorskip("httpx")
uvicorn = pytest.importorskip("uvicorn")
from acorn.inference import server as api  # noqa: E402  # needs FastAPI
from acorn.inference.connection import Connection  # noqa: E402

MESSAGES = [{"role": "developer", "content": "Be kind."}, {"role": "user", "content": "Hi<|endoftext|>!"}]


def make_model() -> GPT:
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=128, vocab_size=260, n_layer=2, n_head=2, n_embd=32))
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
        model.transformer.wte.weight[128:256] *= 0.1  # mostly ASCII
    return model.eval()


def make_app(template=chat.PLAIN, **settings):
    tokenizer = get_tokenizer("byte")
    tokenizer.chat_template = template
    return api.create_app(make_model(), tokenizer, "tiny", **settings)


@contextlib.contextmanager
def serving(app):
    """Serve an app in a thread and return its address."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, http=Connection, log_level="error"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="module")
def served():
    app = make_app()
    with serving(app) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield SimpleNamespace(app=app, url=url, client=client, scheduler=app.state.scheduler)


@pytest.fixture
def post(served):
    """Post a body to a path and return (status, JSON)."""

    def call(body, path="completions", **headers):
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"content-type": "application/json"} | headers
        answer = httpx.post(f"{served.url}/v1/{path}", content=content, headers=headers, timeout=60)
        return answer.status_code, answer.json()

    return call


def expected(served, prompt: list[int], n_new: int, sampling: Sampling, seed=0, stop=(), ends=()) -> str:
    """Return the text that sample.py's loop generates."""
    text, pieces = TextStream(served.app.state.tokenizer, stop, set(ends)), []

    def on_token(row, token, logprob):
        pieces.append(text.push(token))
        return text.stopped_by is not None

    generate(served.app.state.model, [prompt], n_new, sampling, [seed], on_token, 257)
    return "".join([*pieces, text.finish()])


# ---------------------------------------------------------------------------------------------------------------------
# Completions


def test_completions_match_sample_py(served):
    sampling = Sampling(temperature=0.9, top_k=40, top_p=0.95, min_p=0.01, repetition_penalty=1.1)
    extra = {"top_k": 40, "min_p": 0.01, "repetition_penalty": 1.1}
    settings = dict(temperature=0.9, top_p=0.95, seed=3, max_tokens=200, extra_body=extra)
    answer = served.client.completions.create(model="any", prompt="Once", n=2, **settings)
    prompt = encode_prompt(served.app.state.tokenizer, "Once")
    for k, choice in enumerate(answer.choices):
        assert choice.text == expected(served, prompt, 200, sampling, 3 + k) and choice.index == k
    assert answer.object == "text_completion" and answer.model == "tiny"
    assert answer.usage.prompt_tokens == 4 and answer.usage.total_tokens == 4 + answer.usage.completion_tokens


def test_prompts_can_be_texts_or_token_ids(served):
    greedy = dict(model="tiny", temperature=0, max_tokens=5)
    create = served.client.completions.create
    ids = [list(b"abc"), list("é字".encode())]
    texts = [expected(served, prompt, 5, Sampling(temperature=0)) for prompt in ids]
    assert create(prompt=ids[0], **greedy).choices[0].text == texts[0]
    assert [choice.text for choice in create(prompt=ids, **greedy).choices] == texts
    assert [choice.text for choice in create(prompt=["abc", "é字"], **greedy).choices] == texts
    assert create(prompt="", **greedy).usage.prompt_tokens == 1  # the end-of-text token starts a document
    control = create(prompt="<|endoftext|>", **greedy)
    assert control.usage.prompt_tokens == 13  # encoded as text, not as the control token


def test_a_stop_string_ends_a_completion(served):
    greedy = dict(model="tiny", prompt="The", temperature=0)
    whole = served.client.completions.create(**greedy, max_tokens=40)
    text = whole.choices[0].text
    assert whole.choices[0].finish_reason == "length" and whole.usage.completion_tokens == 40
    stop = text[10:13]
    stopped = served.client.completions.create(**greedy, max_tokens=40, stop=["never", stop]).choices[0]
    assert stopped.text == text[: text.index(stop)] and stopped.finish_reason == "stop"


def generating(monkeypatch, ids: list[int]) -> None:
    """Patch sampling so that every model continues the first n of `ids` with the next one."""
    monkeypatch.setattr(scheduler, "draw", lambda logits, rows, *_: torch.tensor([ids[len(rows[0])]]))


@pytest.mark.parametrize(
    "tokenizer", [get_tokenizer("byte"), bpe_tokenizer(), llama_tokenizer()], ids=["byte", "bpe", "sentencepiece"]
)
def test_a_prompt_may_end_inside_a_character(tokenizer, monkeypatch):
    text, model = "a 字😀 horse", GPT(GPTConfig(block_size=64, vocab_size=400, n_layer=1, n_head=1, n_embd=8))
    ids = tokenizer.encode(text).tolist()
    names = [api.token_text(tokenizer, id, False) for id in ids]
    with (
        serving(api.create_app(model, tokenizer)) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        generating(monkeypatch, ids)
        for n in range(1, len(ids)):
            settings = dict(model="any", prompt=ids[:n], max_tokens=len(ids) - n, logprobs=0)
            whole = client.completions.create(**settings, echo=True).choices[0]
            assert whole.text == text and whole.logprobs.tokens == names
            chunks = [chunk.choices[0] for chunk in client.completions.create(**settings, stream=True)]
            given = tokenizer.decode_bytes(ids[:n]).decode(errors="ignore")  # the whole characters of the prompt
            assert given + "".join(chunk.text for chunk in chunks) == tokenizer.decode_bytes(ids).decode()
        generating(monkeypatch, [tokenizer.eot, *ids])
        settings |= dict(prompt="", max_tokens=len(ids))  # SentencePiece's added space is dropped at the start
        assert client.completions.create(**settings).choices[0].text == text


def test_echoed_logprobs_match_the_model(served):
    settings = dict(model="tiny", prompt=["ab字", "q"], temperature=0, echo=True, logprobs=3, max_tokens=2)
    for choice, prompt in zip(served.client.completions.create(**settings).choices, settings["prompt"], strict=True):
        ids = list(prompt.encode())
        rows = served.app.state.model(torch.tensor([ids]), torch.tensor([ids]))[0][0, :, :257].log_softmax(-1).detach()
        got, n = choice.logprobs, len(ids)
        assert got.token_logprobs[0] is None and got.top_logprobs[0] is None and len(got.tokens) == n + 2
        assert got.token_logprobs[1:n] == pytest.approx([float(rows[i, ids[i + 1]]) for i in range(n - 1)], abs=1e-4)
        best = max(got.top_logprobs[n].values())
        assert got.token_logprobs[n] == best == pytest.approx(float(rows[-1].max()), abs=1e-4)
        assert choice.text.startswith(prompt) and got.text_offset[0] == 0 and got.text_offset[n] == len(prompt)
        assert all(len(top) in (3, 4) for top in got.top_logprobs[1:])
    assert "bytes:\\xe5" in served.client.completions.create(**settings).choices[0].logprobs.tokens
    only = served.client.completions.create(**settings | {"max_tokens": 0}).choices[1]
    assert only.text == "q" and only.logprobs.tokens == ["q"] and only.finish_reason == "length"


# ---------------------------------------------------------------------------------------------------------------------
# Chat and streams


def test_chat_uses_the_template_and_its_end_token(served):
    tokenizer = served.app.state.tokenizer
    settings = dict(model="gpt-5", messages=MESSAGES, temperature=0, max_completion_tokens=30)
    answer = served.client.chat.completions.create(**settings, logprobs=True, top_logprobs=2)
    messages = [{"role": "system", "content": "Be kind."}, MESSAGES[1]]
    prompt = chat.render(tokenizer, messages).tolist()
    text = expected(served, prompt, 30, Sampling(temperature=0), ends=chat.stop_ids(tokenizer))
    message, scored = answer.choices[0].message, answer.choices[0].logprobs.content
    assert message.role == "assistant" and message.content == text and answer.usage.prompt_tokens == len(prompt)
    assert len(scored) == answer.usage.completion_tokens
    assert all(token.logprob == token.top_logprobs[0].logprob and token.bytes for token in scored)
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    assert served.client.chat.completions.create(model="x", messages=parts, max_tokens=1).usage.completion_tokens == 1


def test_a_partial_reply_is_continued_to_its_end_token(monkeypatch):
    """As in many chat models, the token that ends a turn is not one of the tokenizer's end-of-text tokens."""
    tokenizer = add_tokens(bpe_tokenizer(), ["<|im_start|>", "<|im_end|>"])
    tokenizer.chat_template = chat.CHATML
    end = tokenizer.control["<|im_end|>"]
    assert end not in tokenizer.ends and end in chat.stop_ids(tokenizer)
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello 字"}]
    prompt = [*chat.render(tokenizer, talk[:1]).tolist(), *chat.encode_reply(tokenizer, "Hello 字")]
    generating(monkeypatch, [*prompt, *tokenizer.encode(" you.").tolist(), end, *tokenizer.encode("More").tolist()])
    model = GPT(GPTConfig(block_size=128, vocab_size=400, n_layer=1, n_head=1, n_embd=8))
    with (
        serving(api.create_app(model, tokenizer)) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        reply = client.chat.completions.create(model="any", messages=talk)
        assert reply.choices[0].message.content == " you." and reply.choices[0].finish_reason == "stop"
        assert reply.usage.prompt_tokens == len(prompt)
        ends = {"stop_token_ids": sorted(chat.stop_ids(tokenizer))}
        text = client.completions.create(model="any", prompt=prompt, max_tokens=20, extra_body=ends).choices[0]
        assert text.text == " you." and text.finish_reason == "stop"


@pytest.mark.parametrize("kind", ["completions", "chat"])
def test_streaming_returns_the_same_text_and_usage(served, kind):
    settings = dict(model="tiny", seed=7, n=2, max_tokens=50, stop=["q"])
    if kind == "chat":
        create, settings["messages"] = served.client.chat.completions.create, MESSAGES
        whole = create(**settings)
        texts = [choice.message.content for choice in whole.choices]
    else:
        create, settings["prompt"] = served.client.completions.create, "é"
        whole = create(**settings)
        texts = [choice.text for choice in whole.choices]
    chunks = list(create(**settings, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].usage == whole.usage and chunks[-1].choices == [] and all(c.usage is None for c in chunks[:-1])
    streamed, reasons = ["", ""], [[], []]
    for chunk in chunks[:-1]:
        (choice,) = chunk.choices
        streamed[choice.index] += choice.delta.content if kind == "chat" else choice.text
        reasons[choice.index].append(choice.finish_reason)
    assert streamed == texts
    assert [each[-1] for each in reasons] == [choice.finish_reason for choice in whole.choices]
    assert all(set(each[:-1]) == {None} for each in reasons)


def test_pending_tokens_are_merged_without_loss(monkeypatch):
    app, is_busy, on_token = make_app(), threading.Event(), api.Choice.on_token

    def on_token_later(choice, scored):
        assert not choice.n_tokens or is_busy.wait(60)
        return on_token(choice, scored)

    @app.get("/busy")
    async def busy() -> None:
        is_busy.set()
        while app.state.scheduler.running:  # blocks the event loop, so that nothing is sent until then
            time.sleep(0.01)

    settings = {"prompt": "a", "max_tokens": 300, "seed": 3, "logprobs": 2, "n": 2}
    with serving(app) as url, httpx.Client(base_url=url, timeout=60) as client:
        whole = client.post("/v1/completions", json=settings).json()["choices"]
        monkeypatch.setattr(api.Choice, "on_token", on_token_later)
        with client.stream("POST", "/v1/completions", json=settings | {"stream": True}) as answer:
            lines = answer.iter_lines()
            first = next(lines)
            client.get("/busy")
            events = [json.loads(line[6:]) for line in [first, *lines] if line.startswith("data: {")]
    assert len(events) < 0.7 * sum(len(choice["logprobs"]["tokens"]) for choice in whole)
    for i, choice in enumerate(whole):
        own = [event["choices"][0] for event in events if event["choices"][0]["index"] == i]
        assert "".join(part["text"] for part in own) == choice["text"]
        assert [part["finish_reason"] for part in own] == [None] * (len(own) - 1) + [choice["finish_reason"]]
        for name, values in choice["logprobs"].items():
            assert [value for part in own for value in part["logprobs"][name]] == values


def test_token_offsets_in_the_text():
    tokenizer = get_tokenizer("byte")

    def offsets(call, **settings) -> list[int]:
        events = []
        call(api.Choice(0, tokenizer, TextStream(tokenizer, ["cd?"]), events.append, **settings))
        return [offset for event in events for _, offset in event[2]]

    def continued(choice) -> None:  # "cd" is held back because it may begin the stop string
        assert not any(choice.on_token(api.Scored(id)) for id in tokenizer.encode("abcde"))

    ids = [tokenizer.eot, *tokenizer.encode("abc")]  # with a token before the text, like Llama's BOS
    assert offsets(continued) == [0, 1, 2, 3, 4]
    assert offsets(continued, echo="abc") == [3, 4, 5, 6, 7]
    assert offsets(lambda choice: choice.on_prompt([api.Scored(id) for id in ids]), echo="abc") == [0, 0, 1, 2]


def test_a_server_sent_event_contains_no_unicode_line_breaks():
    text = "a\x85b\u2028c\u2029d\ne"
    event = api.sse({"text": text}).decode()
    assert event.splitlines() == event.split("\n")[:-1] and json.loads(event[6:]) == {"text": text}


def test_streams_omit_the_template_text_around_a_reply():
    for text in (" Hello \n", " Hi", "  x\n\n", "", " ", "no space"):
        reply, pieces = api.ReplyText(" ", "\n"), []
        for char in text:
            pieces.append(reply.push(char))
        assert "".join(pieces) + reply.finish() == text.removeprefix(" ").removesuffix("\n")


@pytest.mark.parametrize("temperature", [0, 1.2])
def test_concurrent_streams_match_single_streams(served, temperature):
    def ask(i: int) -> str:
        chunks = served.client.completions.create(
            model="tiny", prompt="x" * (1 + 5 * i), max_tokens=20 + 17 * i, temperature=temperature, seed=i, stream=True
        )
        return "".join(chunk.choices[0].text for chunk in chunks)

    alone = [ask(i) for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, range(8))) == alone
    assert len(set(alone)) == 8


# ---------------------------------------------------------------------------------------------------------------------
# Errors and limits


def test_errors_map_to_openai_exceptions(served):
    create = served.client.completions.create
    with pytest.raises(openai.BadRequestError, match=r"temperature = 9") as error:
        create(model="tiny", prompt="a", temperature=9)
    assert error.value.param == "temperature" and error.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError, match="300 tokens") as error:
        create(model="tiny", prompt=[1] * 300)
    assert error.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError):
        served.client.models.retrieve("other")
    assert [model.id for model in served.client.models.list()] == ["tiny"]


BAD = [
    b"",
    b"{",
    b"[]",
    b'"prompt"',
    b"\xff\xfe{}",
    b'{"prompt": "\xff"}',
    b'{"prompt": "a", "temperature": NaN}',
    b'{"prompt": "a", "max_tokens": 1' + b"0" * 5000 + b"}",
    b'{"prompt": [1' + b"0" * 5000 + b"]}",
    b'{"temperature": 1' + b"0" * 400 + b"}",
    b"[" * 100_000,
    b'{"prompt": ' + b"[" * 100_000,
    {"prompt": {}},
    {"prompt": []},
    {"prompt": [[]]},
    {"prompt": [1, "a"]},
    {"prompt": [True]},
    {"prompt": [-1]},
    {"prompt": [257]},
    {"prompt": ["a"] * 129},
    {"prompt": "a" * 1_000_000},
    {"prompt": "a", "n": 0},
    {"prompt": "a", "n": 10**9},
    {"prompt": "a", "max_tokens": -1},
    {"prompt": "a", "max_tokens": 10**9},
    {"prompt": "a", "max_tokens": 5000},
    {"prompt": "a", "max_tokens": "many"},
    {"prompt": "a", "temperature": -0.1},
    {"prompt": "a", "top_p": 0},
    {"prompt": "a", "top_k": -1},
    {"prompt": "a", "min_p": 2},
    {"prompt": "a", "seed": -5},
    {"prompt": "a", "seed": 2**70},
    {"prompt": "a", "logprobs": 100},
    {"prompt": "a", "stop": ["x"] * 10_000},
    {"prompt": "a", "stop": ["x" * 10_000]},
    {"prompt": "a", "stop": [1]},
    {"prompt": "a", "stop": 0},
    {"prompt": "a", "n": 128, "max_tokens": 4000},
    {"prompt": ["a" * 100] * 128, "max_tokens": 0, "logprobs": 20, "echo": True},
    {"prompt": "a", "suffix": "b"},
    {"prompt": "a", "best_of": 4},
    {"prompt": "a", "frequency_penalty": 1},
    {"prompt": "a", "temprature": 1},
    {"messages": []},
    {"messages": ["a"]},
    {"messages": [{"role": "root", "content": "a"}]},
    {"messages": [{"role": "user", "content": None}]},
    {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
    {"messages": [{"role": "user", "content": "a"}], "top_logprobs": 2},
    {"prompt": "a", "stop_token_ids": 1},
    {"prompt": "a", "stop_token_ids": ["x"] * 100_000},
    {"messages": [{"role": "user", "content": "a" * 200}]},
    {"messages": [{"role": "user", "content": "a"}] * 5000},
    {"messages": [{"role": "user", "content": "a"}], "tools": [{"type": "function"}]},
]


@pytest.mark.parametrize("body", BAD, ids=[f"{i}" for i in range(len(BAD))])
def test_bad_requests_get_status_400_and_a_message(post, body):
    path = "chat/completions" if isinstance(body, dict) and "messages" in body else "completions"
    status, answer = post(body, path)
    message = answer["error"]["message"]
    assert status == 400, message
    assert message.endswith(".") and " " in message and len(message) < 500 and "Traceback" not in message


def test_lone_surrogates_do_not_cause_a_server_error(post):
    assert post(b'{"prompt": "\\ud800", "max_tokens": 1, "echo": true}')[0] in (200, 400)


def test_unknown_tokens_are_refused_without_ending_other_requests():
    tokenizer = add_tokens(bpe_tokenizer(), ["<|im_start|>", "<|im_end|>"])
    tokenizer.chat_template = chat.CHATML
    model = GPT(GPTConfig(block_size=64, vocab_size=tokenizer.n_vocab - 2, n_layer=1, n_head=1, n_embd=8))
    with (
        serving(api.create_app(model, tokenizer)) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        chunks = client.completions.create(model="any", prompt="a", max_tokens=300, stream=True, temperature=0)
        next(chunks)
        with pytest.raises(openai.BadRequestError, match=f"token {tokenizer.n_vocab - 1}"):
            client.completions.create(model="any", prompt=[1, tokenizer.n_vocab - 1])
        with pytest.raises(openai.BadRequestError, match="does not know"):
            client.chat.completions.create(model="any", messages=MESSAGES)
        assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == "length"


def test_non_json_and_oversized_bodies_are_refused(served, post):
    assert post({"prompt": "a"}, **{"content-type": "text/plain"})[0] == 415
    status, answer = post(b" " * (100 << 20))
    assert status == 413 and answer["error"]["message"].endswith(".")


def test_a_disconnected_client_frees_its_rows(served):
    scheduler = served.scheduler
    for stream in (True, False):
        before = scheduler.n_cancelled
        with (
            pytest.raises(httpx.ReadTimeout),
            httpx.stream(
                "POST",
                f"{served.url}/v1/completions",
                json={"prompt": "a", "max_tokens": 4000, "n": 8, "stream": stream, "temperature": 0},
                timeout=httpx.Timeout(5, read=0.3),
            ) as answer,
        ):
            for _ in answer.iter_raw():
                if scheduler.running and stream:
                    raise httpx.ReadTimeout("hang up")
        end = time.monotonic() + 30
        while scheduler.n_cancelled < before + 8 and time.monotonic() < end:
            time.sleep(0.01)
        assert not scheduler.running and scheduler.n_cancelled == before + 8


def test_a_full_queue_returns_429_with_retry_after():
    app = make_app(max_batch=1, max_queue=1)
    release = threading.Event()
    app.state.scheduler.call(release.wait)
    with serving(app) as url:
        ask = lambda: httpx.post(f"{url}/v1/completions", json={"prompt": "a", "max_tokens": 1}, timeout=30)  # noqa: E731
        with ThreadPoolExecutor(1) as pool:
            first = pool.submit(ask)
            while not app.state.scheduler.waiting:
                assert not first.done()
                time.sleep(0.01)
            full = ask()
            assert full.status_code == 429 and int(full.headers["retry-after"]) >= 1
            assert full.json()["error"]["type"] == "rate_limit_error"
            release.set()
            assert first.result().status_code == 200
        assert "acorn_requests_refused_total 1" in httpx.get(f"{url}/metrics").text


def test_api_key_cors_metrics_and_unknown_routes():
    """The app is called in this process, without a socket."""

    async def ask(app, method, path, **headers):
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            return await client.request(method, path, headers=headers)

    def call(app, *args, **headers):
        return asyncio.run(ask(app, *args, **headers))

    app = make_app(api_key="secret", cors_origins=["http://friend"])
    assert call(app, "GET", "/v1/models").status_code == 401
    assert call(app, "GET", "/v1/models", Authorization="Bearer wrong").json()["error"]["code"] == "invalid_api_key"
    friend = call(app, "GET", "/v1/models", Authorization="Bearer secret", Origin="http://friend")
    assert friend.status_code == 200 and friend.headers["access-control-allow-origin"] == "http://friend"
    assert "access-control-allow-origin" not in call(app, "GET", "/health", Origin="http://other").headers
    plain = make_app()
    assert "access-control-allow-origin" not in call(plain, "GET", "/health", Origin="http://friend").headers
    assert call(plain, "GET", "/health").status_code == 200
    figures = call(plain, "GET", "/metrics").text
    for line in figures.strip().splitlines():
        assert re.fullmatch(r"# TYPE acorn_\w+ (gauge|counter|histogram)|acorn_\w+(\{le=\"[^\"]+\"\})? [\d.e+-]+", line)
    assert call(plain, "GET", "/v1/nothing").json()["error"]["message"]
    assert call(plain, "PUT", "/v1/completions").status_code == 405


def test_chat_without_a_template_is_refused():
    with serving(make_app(template=None)) as url:
        answer = httpx.post(f"{url}/v1/chat/completions", json={"messages": MESSAGES})
    assert answer.status_code == 400 and "/v1/completions" in answer.json()["error"]["message"]


# ---------------------------------------------------------------------------------------------------------------------
# The command


@contextlib.contextmanager
def command(*words):
    """Start `python -m acorn.serve` and return (process, address)."""
    words = ["-m", "acorn.serve", "--port=0", "--device=cpu", "--compile=False", *words]
    process, output = start_process(*words, cwd=REPO), ""
    try:
        while not (address := re.search(r"running on (http://\S+)", output)):
            line = process.stdout.readline()
            assert line, output  # the process has ended
            output += line
        threading.Thread(target=process.stdout.read, daemon=True).start()  # a full pipe would block the server
        yield process, address[1]
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def begun_stream(url, max_tokens):
    """Request a streamed completion, read its first line, and yield an iterator over the other lines."""
    body = {"prompt": "ANNA", "max_tokens": max_tokens, "stream": True, "temperature": 0}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as answer:
        lines = answer.iter_lines()
        next(lines)
        yield lines


def test_sigterm_lets_running_requests_finish(trained):
    with command(f"--out_dir={trained}") as (process, url):
        with begun_stream(url, max_tokens=400) as lines:
            process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]" and '"length"' in rest[-2]
        assert process.wait(20) == 0


@pytest.mark.slow
def test_a_second_ctrl_c_stops_the_server_immediately(trained):
    with command(f"--out_dir={trained}") as (process, url):
        with begun_stream(url, max_tokens=4000) as lines:
            process.send_signal(signal.SIGINT)
            time.sleep(0.5)  # two pending signals would merge into one
            process.send_signal(signal.SIGINT)
            with pytest.raises(httpx.RemoteProtocolError):
                collections.deque(lines, 0)
        assert process.wait(20) == 130


def test_invalid_server_settings_raise_user_error(trained, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as other:
        in_use = other.getsockname()[1]
        for words, match in (
            (["--max_batch=0"], "max_batch"),
            (["--cache_mb=0", "--port=70000"], "port"),
            ([f"--port={in_use}"], f"port={in_use}: .* use"),
            (["--host=127.0.0.1x"], "host=127.0.0.1x"),
        ):
            monkeypatch.setattr(sys, "argv", ["serve", f"--out_dir={trained}", *words])
            with pytest.raises(UserError, match=match):
                serve.main()


@pytest.mark.slow
def test_lm_eval_results_match_the_exported_model(tmp_path):
    """Compare lm-eval's completions client with its Hugging Face backend on the export, for the same requests."""
    lm_eval = pytest.importorskip("lm_eval", reason="a large package: pip install lm_eval[api]")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    assert lm_eval
    torch.manual_seed(0)
    tokenizer = get_tokenizer("gpt2")
    model = GPT(GPTConfig(block_size=128, vocab_size=50257, n_layer=2, n_head=2, n_embd=32)).eval()
    with torch.no_grad():
        model.transformer.wte.weight *= 20
    state = STATE | {"tokenizer": tokenizer.to_dict(), "step": 0}
    writer = checkpoint.Writer(tmp_path / "out", 1)
    writer.save(model, [], state)
    assert writer.wait()
    export(str(tmp_path / "out"), tmp_path / "hf")
    choices = [("The sky is", f" {word}") for word in ("blue", "green and full of birds", "\u5b57", "2 + 2")]
    choices += [("A much longer question " * 12, " answer"), ("x", " <|endoftext|> y")]

    def digits(lm) -> list[tuple[float, bool]]:
        requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(choices)]
        return lm.loglikelihood(requests)

    reference = digits(HFLM(pretrained=str(tmp_path / "hf"), device="cpu", batch_size=1, dtype="float32"))
    with serving(api.create_app(model, tokenizer, "tiny")) as url:
        lm = LocalCompletionsAPI(
            model="tiny", base_url=f"{url}/v1/completions", tokenizer=str(tmp_path / "hf"), max_length=127, batch_size=2
        )
        got = digits(lm)
    assert [is_greedy for _, is_greedy in got] == [is_greedy for _, is_greedy in reference]
    assert [p for p, _ in got] == pytest.approx([p for p, _ in reference], abs=1e-3)


# ---------------------------------------------------------------------------------------------------------------------
# Limits on memory and time


async def receiving(guard, *messages: tuple[bytes, bool], **options):
    """Return the body that `guard` reads from a request that arrives as `messages`: (bytes, whether more follow)."""
    waiting = iter(messages)

    async def receive() -> dict:
        body, more = next(waiting, (b"", True))
        if not body:
            await asyncio.sleep(3600)  # the rest never arrives
        return {"type": "http.request", "body": body, "more_body": more}

    return await guard.read_body(receive, **options)


def test_large_requests_are_refused_when_pending_bodies_exceed_the_limit(monkeypatch):
    monkeypatch.setattr(api, "MOST_HELD", 4 << 20)
    small, large = b"x" * 1000, b"x" * (3 << 20)

    async def scenario() -> None:
        guard = api.Guard(None, "")
        slow = [asyncio.create_task(receiving(guard, (large, True))) for _ in range(2)]
        await asyncio.sleep(0)  # both have sent most of their requests
        with pytest.raises(api.ApiError, match="too many large requests") as refused:
            await receiving(guard, (large, False))
        assert refused.value.status == 429
        assert await receiving(guard, (small, False)) == small
        slow[0].cancel()  # the client disconnects
        await asyncio.wait(slow[:1])
        assert await receiving(guard, (large, False)) == large
        slow[1].cancel()

    asyncio.run(scenario())


def test_refused_bodies_get_their_status_and_use_no_memory(monkeypatch):
    monkeypatch.setattr(api, "PATIENCE", 0.2)
    guard, large = api.Guard(None, "secret"), b"x" * (3 << 20)
    headers = {"type": "http", "path": "/v1/completions", "headers": []}

    async def scenario() -> None:
        slow = asyncio.create_task(receiving(guard, (large, True), refusal=guard.key_error(headers)))
        await asyncio.sleep(0)
        assert guard.n_held == 0
        with pytest.raises(api.ApiError) as refused:
            await slow
        assert refused.value.status == 401
        with pytest.raises(api.ApiError) as refused:
            await receiving(guard, (large, True), (large, True))
        assert refused.value.status == 413
        with pytest.raises(api.ApiError) as refused:
            await receiving(guard, (large, True))
        assert refused.value.status == 408

    asyncio.run(scenario())


@pytest.mark.parametrize("field", ["stop", "messages", "unknown"])
def test_requests_with_many_errors_use_little_memory(field):
    values = {"stop": [1] * 100_000, "messages": [1] * 100_000, "unknown": {f"{i}": 1 for i in range(100_000)}}[field]
    body = {"messages": [{"role": "user", "content": "a"}], **(values if field == "unknown" else {field: values})}
    data = json.dumps(body).encode()
    tracemalloc.start()
    with pytest.raises(api.ApiError):
        api.parse(api.ChatRequest, data).stops()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 25 * len(data)


def test_requests_keep_only_the_text_of_messages(post, monkeypatch):
    kept, add = [], api.Answer.add
    monkeypatch.setattr(api.Answer, "add", lambda self, *more: kept.append(self.request) or add(self, *more))
    content = [{"type": "text", "text": "a", "junk": [[]] * 1000}]
    body = {"messages": [{"role": "user", "content": content, "junk": [{}] * 1000}], "max_tokens": 1}
    assert post(body, "chat/completions")[0] == 200
    assert kept[0].messages == [{"role": "user", "content": "a"}]


def test_idle_connections_are_closed(monkeypatch):
    monkeypatch.setattr(api, "PATIENCE", 0.5)
    # 20 MB of logprobs, more than the socket buffers hold; fast to compute, because 100 choices share one prompt
    scores = {"prompt": "a" * 110, "n": 100, "echo": True, "logprobs": 20, "max_tokens": 2, "stream": True}
    body = json.dumps(scores)
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    with contextlib.ExitStack() as stack:
        with serving(make_app()) as url:
            host, port = url.removeprefix("http://").split(":")

            def connect(data: str) -> socket.socket:
                connection = stack.enter_context(socket.create_connection((host, int(port)), timeout=60))
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
                connection.sendall(data.encode())
                return connection

            assert connect("").recv(100) == b""  # closed by the server
            assert connect(head).recv(100) == b""
            connect(f"{head}Content-Length: {len(body)}\r\n\r\n{body}")  # the client never reads
            time.sleep(2)
            stopping = time.monotonic()
        assert time.monotonic() - stopping < 20  # the client that never reads does not delay shutdown


def test_large_responses_are_split_into_pieces(served, monkeypatch):
    settings = {"model": "tiny", "prompt": "a", "max_tokens": 50, "seed": 1, "logprobs": 20}
    whole = served.client.completions.create(**settings)
    monkeypatch.setattr(api, "PIECE", 1000)
    assert served.client.completions.create(**settings).choices == whole.choices
    sizes = [len(m["body"]) for m in api.in_pieces({"type": "http.response.body", "body": b"x" * 2500})]
    assert sizes == [1000, 1000, 500]


def test_ignored_fields_are_accepted_and_dropped(post):
    body = {"prompt": "a", "max_tokens": 1, "metadata": {"a": [[]] * 1000}, "user": "me"}
    assert post(body)[0] == 200
    assert api.parse(api.CompletionRequest, json.dumps(body).encode()).metadata is None


# ---------------------------------------------------------------------------------------------------------------------
# Two minutes of hostile clients


HOSTILE_SECONDS = 120


def resident_mb(pid: int) -> float:
    with open(f"/proc/{pid}/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def send(url: str, body: bytes, timeout: float = 120) -> tuple[int, bytes]:
    """Post a body and return (status, response body). http.client, because httpx would take longer than the server."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=timeout)
    with contextlib.closing(connection):
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        return answer.status, answer.read()


LARGE = b"a" * (100 << 20)
HOSTILE = [body if isinstance(body, bytes) else json.dumps(body).encode() for body in BAD]
HOSTILE += [
    json.dumps({"prompt": ["a", "b"], "n": 20, "max_tokens": 3, "stop": [f"{i}" for i in range(10_000)]}).encode(),
    json.dumps({"prompt": "<|endoftext|><|im_start|>\0\x1b[2J", "max_tokens": 2}).encode(),
]


def hostile(url: str, chance: random.Random) -> int | None:
    """Misuse the server once in a random way. Return the status, or None if the client does not wait for a response."""
    kind = chance.choices(("bad", "garbage", "large", "slow", "hang up", "half"), (20, 4, 1, 20, 10, 10))[0]
    if kind == "bad":
        return send(url, chance.choice(HOSTILE))[0]
    if kind == "garbage":
        return send(url, chance.randbytes(chance.choice((1, 1000, 100_000))))[0]
    if kind == "large":
        return send(url, LARGE)[0]
    host, port = url.removeprefix("http://").split(":")
    body = json.dumps({"prompt": "a", "max_tokens": 4000, "stream": True, "n": 3, "logprobs": 20}).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(body)}\r\n\r\n"
    with socket.create_connection((host, int(port))) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)  # the client never reads
        connection.sendall(head.encode() + (body[:10] if kind == "half" else body))
        time.sleep(chance.uniform(0, 3) if kind != "hang up" else 0.05)
    return None


@pytest.mark.slow
@on_linux
def test_two_minutes_of_hostile_clients(trained):
    """200 clients misuse the server. They get only statuses 200 and 4xx, and memory stays flat.

    A polite client, which runs at the same time, gets the same text each time, or status 429.
    """
    with command(f"--out_dir={trained}", "--max_queue=100000") as (process, url):
        polite = json.dumps({"prompt": "ANNA", "max_tokens": 30, "seed": 5}).encode()
        text = json.loads(send(url, polite)[1])["choices"][0]["text"]
        end, statuses = time.monotonic() + HOSTILE_SECONDS, collections.Counter()
        broken, memory, waited = [], [], []

        def misuse(seed: int) -> None:
            chance = random.Random(seed)
            while time.monotonic() < end:
                try:
                    statuses[hostile(url, chance)] += 1
                except (http.client.HTTPException, OSError) as error:
                    broken.append(error)

        def be_polite() -> None:
            while (begun := time.monotonic()) < end:
                status, answer = send(url, polite, timeout=600)  # other processes may be using the CPU
                assert status == 429 or json.loads(answer)["choices"][0]["text"] == text
                waited.append(time.monotonic() - begun)

        with ThreadPoolExecutor(201) as pool:
            clients = [pool.submit(misuse, seed) for seed in range(200)] + [pool.submit(be_polite)]
            while time.monotonic() < end:
                time.sleep(1)
                memory.append(resident_mb(process.pid))
        for client in clients:
            client.result()
        print(f"memory {memory[::10]} MB, {statuses}, broken: {len(broken)}, polite: {waited} s")
        assert process.poll() is None and json.loads(send(url, polite)[1])["choices"][0]["text"] == text
        assert set(statuses) <= {None, 200, 400, 408, 413, 415, 429}, statuses
        assert "acorn_sequences_failed_total 0" in httpx.get(f"{url}/metrics").text
        half = len(memory) // 2
        assert max(memory[half:]) < max(memory[:half]) * 1.1 + 20
