"""The HTTP API: OpenAI's completions and chat completions over a Scheduler.

    app = create_app(model, tokenizer, name="quickstart")      # a FastAPI app; app.mount or a router extends it

A request becomes one `Choice` per prompt and sample. The scheduler's thread decodes a choice's tokens to text and
passes events to the coroutine of the request, which answers with one JSON object, or with a server-sent event each.
"""

import asyncio
import contextlib
import gc
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from starlette.exceptions import HTTPException

from acorn import UserError
from acorn.data import chat
from acorn.data.tokenizer import StreamDecoder, Tokenizer
from acorn.inference.generate import Sampling, TextStream, check_prompts, encode_prompt
from acorn.inference.scheduler import QueueFull, Scheduler, Scored, Sequence
from model import GPT

MOST_BODY = 4 << 20  # bytes of a request
MOST_CHOICES = 128  # samples of a request, over all its prompts
MOST_TOKENS = 256 << 10  # tokens, with their alternatives, that a request may ask for
MOST_OPEN = 256  # requests that are answered at the same time
MOST_MERGED = 10  # events of a request that are sent together if its client or the server is behind
PATIENCE = 30.0  # seconds for a client to send its request, or to read what was sent
MOST_HELD = 256 << 20  # bytes of all requests that have not arrived completely
SMALL_BODY = 64 << 10  # bytes of a request that is received even then
PIECE = 64 << 10  # bytes of an answer that are sent at once; the client must read most of them before the next piece
MOST_DRAINED = 1 << 30  # bytes of a too large request that are read and dropped, so that the client reads the answer


class ApiError(Exception):
    """An error that the client gets as OpenAI's error object."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None, headers=None):
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, headers

    def json(self) -> dict:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        kind = "rate_limit_error" if self.status == 429 else kind
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        return Json(self.json(), self.status, self.headers)


class Json(JSONResponse):
    def render(self, content: Any) -> bytes:
        return to_json(content)


def to_json(value: Any) -> bytes:
    """Return a value as JSON. Lone surrogates, which UTF-8 cannot encode, become question marks."""
    return json.dumps(value, ensure_ascii=False).encode(errors="replace")


# ---------------------------------------------------------------------------------------------------------------------
# Requests


class StreamOptions(BaseModel):
    include_usage: bool = False
    include_obfuscation: bool = False  # ignored


class GenerationRequest(BaseModel):
    """The fields that completions and chat completions share. An unknown field is an error, so that none is lost."""

    model_config = ConfigDict(allow_inf_nan=False, hide_input_in_errors=True)

    model: str = ""  # any name: there is one model
    max_tokens: int | None = Field(None, ge=0, le=2**31)
    n: int = Field(1, ge=1, le=MOST_CHOICES)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0, le=2**31)
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, gt=0, le=100)
    no_repeat_ngram_size: int = Field(0, ge=0, le=1000)
    stop: Any = None  # see `stops`
    stop_token_ids: list[int] = Field([], max_length=64)  # tokens that end the text, as in vLLM
    seed: int | None = Field(None, ge=0, lt=2**62)
    stream: bool = False
    stream_options: StreamOptions | None = None
    return_tokens_as_token_ids: bool = False  # write the tokens in logprobs as "token_id:17", as vLLM does
    # not supported: only values without effect are accepted
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: dict | None = None
    # in MEANINGLESS
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None

    @model_validator(mode="before")
    @classmethod
    def drop_nulls(cls, fields: Any) -> Any:
        """A field that is null has its default. A field without meaning is not kept: it may be large."""
        if not isinstance(fields, dict):
            return fields
        kept = {name: value for name, value in fields.items() if value is not None and name not in MEANINGLESS}
        unknown = next((name for name in kept if name not in cls.model_fields), None)
        if unknown is not None:  # pydantic would make an error of each
            raise ApiError(400, f"there is no parameter {unknown!r:.100}. Leave it out.", unknown[:100])
        return kept

    def stops(self) -> list[str]:
        stops = [self.stop] if isinstance(self.stop, str) else [] if self.stop is None else self.stop
        is_list = isinstance(stops, list) and len(stops) <= 16
        if not is_list or not all(isinstance(stop, str) and len(stop) <= 256 for stop in stops):
            message = "stop should be a string or a list of at most 16 strings, each of at most 256 characters."
            raise ApiError(400, message, "stop")
        return stops

    def sampling(self) -> Sampling:
        return Sampling(**{name: getattr(self, name) for name in Sampling.__dataclass_fields__})


class CompletionRequest(GenerationRequest):
    prompt: Any = ""  # text, token ids, or a list of either; see `prompts_of`
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool = False
    best_of: int | None = None
    suffix: str | None = None


class ChatRequest(GenerationRequest):
    messages: list[dict[str, Any]] = Field(min_length=1, max_length=1024)
    max_completion_tokens: int | None = Field(None, ge=0, le=2**31)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: dict | None = None
    tools: list | None = None
    tool_choice: Any = None
    parallel_tool_calls: Any = None
    modalities: list | None = None
    reasoning_effort: Any = None
    verbosity: Any = None


NEUTRAL = {  # unsupported fields with the values that mean nothing
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": (None, {}),
    "best_of": (None, 1),
    "suffix": (None, ""),
    "response_format": (None, {"type": "text"}),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "modalities": (None, ["text"]),
}


MEANINGLESS = {"user", "metadata", "store", "service_tier", "parallel_tool_calls", "reasoning_effort", "verbosity"}

R = TypeVar("R", bound=GenerationRequest)


def parse(kind: type[R], body: bytes) -> R:
    """Return the request in a JSON body. Raises ApiError 400, which names the field."""
    try:
        request = kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=True)[0]
        name = ".".join(map(str, first["loc"]))
        if not first["loc"]:  # not JSON, or not an object
            raise ApiError(400, f"the request is not a valid JSON object: {first['msg']:.300}.") from None
        raise ApiError(
            400, f"{name} = {brief(first['input'])} is not valid: {first['msg']:.200}.", name[:100]
        ) from None
    for name, values in NEUTRAL.items():
        if getattr(request, name, values[0]) not in values:
            raise ApiError(400, f"{name} is not supported. Leave it out.", name)
    return request


def prompts_of(prompt: Any) -> list[str | list[int]]:
    """Return the prompts of a completion request, each a text or a list of token ids."""
    prompts = prompt if isinstance(prompt, list) else [prompt]
    if prompts and all(is_id(id) for id in prompts):
        return [prompts]
    for p in prompts:
        if not (isinstance(p, str) or (isinstance(p, list) and p and all(is_id(id) for id in p))):
            message = "prompt should be a string, a list of token ids, or a list of either, and not empty."
            raise ApiError(400, message, "prompt")
    if not prompts:
        raise ApiError(400, "prompt is an empty list. Give at least one prompt.", "prompt")
    return prompts


def brief(value: Any) -> str:
    """Return a value of a request for an error message."""
    if isinstance(value, (dict, list)):
        return "an object" if isinstance(value, dict) else "a list"
    if not isinstance(value, (str, int, float)):
        return str(value)
    try:
        return f"{value!r:.60}"
    except ValueError:  # Python does not print an integer of more than 4300 digits
        return "a huge number"


def is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def messages_of(messages: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Return chat messages with a role and text. Raises ApiError for what a chat of text cannot hold."""
    result = []
    for i, message in enumerate(messages):
        role, content, param = message.get("role"), message.get("content"), f"messages[{i}]"
        if role not in ("system", "developer", "user", "assistant"):
            raise ApiError(400, f"the role {role!r:.60} is not supported. Use system, user or assistant.", param)
        if isinstance(content, list):  # parts
            parts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
            texts = [part for part in parts if isinstance(part, str)]
            content = "".join(texts) if len(texts) == len(content) else None
        if not isinstance(content, str) or message.get("tool_calls"):
            raise ApiError(400, f"the content of message {i} should be text. Leave out images, audio and calls.", param)
        result.append({"role": "system" if role == "developer" else role, "content": content})
    return result


# ---------------------------------------------------------------------------------------------------------------------
# Choices


class Choice:
    """One sample of a request, and its state while tokens arrive.

    The scheduler's thread calls `on_prompt`, `on_token` and `on_end`; each passes an event (choice, text, tokens,
    finish_reason) to `put`, or an exception. A token in an event is (scored, offset of its text).
    """

    def __init__(self, index: int, tokenizer: Tokenizer, text: TextStream, put: Callable, echo: str | None = None):
        self.index, self.tokenizer, self.text, self.put, self.echo = index, tokenizer, text, put, echo
        self.length = len(echo or "")  # characters so far
        self.n_tokens = 0

    def on_prompt(self, scores: list[Scored]) -> None:
        decoder, offsets = StreamDecoder(self.tokenizer), [0]
        for scored in scores:
            offsets.append(offsets[-1] + len(decoder.push(scored.id)))
        bos = max(0, offsets[-1] - len(self.echo or ""))  # characters of a BOS token's name, which is not in the text
        self.put((self, "", [(s, max(0, offset - bos)) for s, offset in zip(scores, offsets, strict=False)], None))

    def on_token(self, scored: Scored) -> bool:
        offset = self.length + len(self.text.pending)  # pending: not shown yet, because a stop string may begin there
        piece = self.text.push(scored.id)
        self.put((self, piece, [(scored, offset)], None))
        self.n_tokens += 1
        self.length += len(piece)
        return self.text.stopped_by is not None

    def on_end(self, error: Exception | None) -> None:
        if error is None:
            self.put((self, self.text.finish(), [], "stop" if self.text.stopped_by else "length"))
        else:
            known = isinstance(error, UserError)
            self.put(ApiError(500, str(error) if known else "the server failed. Its log has the reason."))


class ReplyText:
    """A reply's text as it arrives, without what the chat template writes around the content (see chat.as_content)."""

    def __init__(self, before: str, after: str):
        self.before, self.after, self.pending, self.is_start = before, after, "", True

    def push(self, piece: str) -> str:
        """Add text, and return the text that can be shown now."""
        self.pending += piece
        if self.is_start and len(self.pending) < len(self.before) and self.before.startswith(self.pending):
            return ""
        if self.is_start:
            self.pending, self.is_start = self.pending.removeprefix(self.before), False
        held = max((n for n in range(len(self.after) + 1) if self.pending.endswith(self.after[:n])), default=0)
        shown, self.pending = self.pending[: len(self.pending) - held], self.pending[len(self.pending) - held :]
        return shown

    def finish(self) -> str:
        return self.pending.removesuffix(self.after)


def token_text(tokenizer: Tokenizer, id: int, as_id: bool) -> str:
    """Return the text of a token, or its bytes as in "bytes:\\xe5\\xad" if they are not whole characters.

    With `as_id`, it is "token_id:" and the id, which names every token without ambiguity."""
    if as_id:
        return f"token_id:{id}"
    data = tokenizer.decode_bytes([id])
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def completion_logprobs(tokenizer: Tokenizer, tokens: list[tuple], as_ids: bool) -> dict:
    """Return tokens in the format of completions."""

    def name(id: int) -> str:
        return token_text(tokenizer, id, as_ids)

    return {
        "tokens": [name(scored.id) for scored, _ in tokens],
        "token_logprobs": [scored.logprob for scored, _ in tokens],
        "top_logprobs": [
            None if s.logprob is None else {name(i): p for i, p in {**dict(s.top), s.id: s.logprob}.items()}
            for s, _ in tokens
        ],
        "text_offset": [offset for _, offset in tokens],
    }


def chat_logprobs(tokenizer: Tokenizer, tokens: list[tuple], as_ids: bool) -> dict:
    """Return tokens in the format of chat completions."""

    def entry(id: int, logprob: float | None) -> dict:
        data = tokenizer.decode_bytes([id])
        token = f"token_id:{id}" if as_ids else data.decode(errors="replace")
        return {"token": token, "logprob": logprob, "bytes": list(data)}

    return {
        "content": [entry(s.id, s.logprob) | {"top_logprobs": [entry(*other) for other in s.top]} for s, _ in tokens]
    }


# ---------------------------------------------------------------------------------------------------------------------
# The app


def create_app(
    model: GPT,
    tokenizer: Tokenizer,
    name: str = "acorn",
    *,
    max_batch: int = 8,
    max_queue: int = 64,
    cache_bytes: int = 0,
    max_new_tokens: int = 4096,
    api_key: str = "",
    cors_origins: list[str] | tuple[str, ...] = (),
) -> FastAPI:
    """Return the server's app for a model that is prepared for decoding.

    `app.state` holds model, tokenizer, name and scheduler; `scheduler.call` runs a function that uses the model. A
    client may ask for at most `max_new_tokens` per choice. With an `api_key`, paths below /v1 and /inside need it as a
    bearer token.
    """
    gc.set_threshold(700, 10, 10)  # Python's own; acorn's suit short scripts, and finished requests are cyclic garbage
    scheduler = Scheduler(model, max_batch, max_queue, cache_bytes, tokenizer.n_vocab)
    block_size, created = model.config.block_size, int(time.time())
    most_bytes = max(1, int(tokenizer.token_bytes().max()))  # of a token
    encoder = ThreadPoolExecutor(1)  # encodes and renders, so that the event loop stays free
    if tokenizer.chat_template:
        reply_frame, reply_ends = chat.reply_frame(tokenizer), chat.stop_ids(tokenizer)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI):
        yield
        await asyncio.to_thread(scheduler.close)

    app = FastAPI(title="acorn", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.model, app.state.tokenizer, app.state.scheduler = model, tokenizer, scheduler
    app.state.name = name
    app.add_middleware(Guard, api_key=api_key)
    if cors_origins:
        from starlette.middleware.cors import CORSMiddleware

        app.add_middleware(CORSMiddleware, allow_origins=list(cors_origins), allow_methods=["*"], allow_headers=["*"])

    @app.exception_handler(ApiError)
    async def on_api_error(request: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(HTTPException)
    async def on_http_error(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path:.200}: {error.detail}. The paths are listed in docs/serving.md."
        return ApiError(error.status_code, message, headers=error.headers).response()

    @app.exception_handler(Exception)
    async def on_bug(request: Request, error: Exception) -> Response:
        return ApiError(500, "the server failed to answer this request. Its log has the reason.").response()

    @app.get("/health")
    async def health() -> Response:
        return Json({"status": "ok"})

    @app.get("/metrics")
    async def metrics() -> Response:
        return PlainTextResponse(scheduler.metrics(), media_type="text/plain; version=0.0.4")

    model_card = {"id": name, "object": "model", "created": created, "owned_by": "acorn"}
    model_card["max_model_len"] = block_size

    @app.get("/v1/models")
    async def models() -> Response:
        return Json({"object": "list", "data": [model_card]})

    @app.get("/v1/models/{id:path}")
    async def one_model(id: str) -> Response:
        if id != name:
            raise ApiError(404, f"there is no model {id!r:.100}. Use {name!r}.", "model", "model_not_found")
        return Json(model_card)

    def checked(ids: list[int], param: str) -> list[int]:
        if len(ids) > block_size:
            message = f"the prompt has {len(ids)} tokens, but the model's context is {block_size}. Shorten it."
            raise ApiError(400, message, param, "context_length_exceeded")
        check_prompts(model, [ids])  # else an unknown token would end the sequences that run beside it, too
        return ids

    def check_size(n_characters: int, param: str) -> None:  # before a long text is encoded
        if n_characters > block_size * most_bytes:
            message = (
                f"{n_characters} characters exceed the model's context of {block_size} tokens. Shorten the prompt."
            )
            raise ApiError(400, message, param, "context_length_exceeded")

    def encode(prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str):
            check_size(len(prompt), "prompt")
            return checked(encode_prompt(tokenizer, prompt), "prompt")
        if not all(0 <= id < tokenizer.n_vocab for id in prompt):
            wrong = next(id for id in prompt if not 0 <= id < tokenizer.n_vocab)
            raise ApiError(400, f"the token id {brief(wrong)} is not from 0 to {tokenizer.n_vocab - 1}.", "prompt")
        return checked(prompt, "prompt")

    def render(messages: list[dict[str, str]]) -> list[int]:
        check_size(sum(len(message["content"]) for message in messages), "messages")
        if messages[-1]["role"] != "assistant":
            return checked(chat.render(tokenizer, messages, block_size).tolist(), "messages")
        prompt = chat.render(tokenizer, messages[:-1], block_size).tolist()  # the last message is a reply to continue
        return checked(prompt + chat.encode_reply(tokenizer, messages[-1]["content"]), "messages")

    async def in_encoder(function: Callable, *arguments):
        try:
            return await asyncio.get_running_loop().run_in_executor(encoder, function, *arguments)
        except UserError as error:
            raise ApiError(400, str(error), "messages" if function is render else "prompt") from error

    def n_new_tokens(asked: int | None, default: int, param: str) -> int:
        if asked is not None and asked > max_new_tokens:
            message = f"{param} = {asked!s:.30} exceeds this server's limit of {max_new_tokens}. Use less."
            raise ApiError(400, message, param)
        return min(default, max_new_tokens) if asked is None else asked

    @app.post("/v1/completions")
    async def completions(http: Request) -> Response:
        request = parse(CompletionRequest, await body_of(http))
        prompts = prompts_of(request.prompt)
        if len(prompts) * request.n > MOST_CHOICES:
            message = (
                f"{len(prompts)} prompts with n = {request.n} exceed {MOST_CHOICES} samples. Send several requests."
            )
            raise ApiError(400, message, "prompt")
        n_new = n_new_tokens(request.max_tokens, 16, "max_tokens")
        stops = request.stops()
        ids = [await in_encoder(encode, prompt) for prompt in prompts]
        answer = Answer(http, scheduler, tokenizer, request, "cmpl", name)
        for prompt, prompt_ids in zip(prompts, ids, strict=True):
            echo = prompt if request.echo else None
            if isinstance(echo, list):  # without a last character that the new tokens complete
                echo = "".join(map(StreamDecoder(tokenizer, []).push, echo))
            answer.add(prompt_ids, n_new, stops, set(request.stop_token_ids), request.logprobs, echo)

        def choice_json(choice: Choice, text: str, tokens: list[tuple], reason: str | None, is_first: bool) -> dict:
            as_ids = request.return_tokens_as_token_ids
            return {
                "index": choice.index,
                "text": (choice.echo or "") + text if is_first else text,
                "logprobs": None if request.logprobs is None else completion_logprobs(tokenizer, tokens, as_ids),
                "finish_reason": reason,
            }

        return await answer.response("text_completion", "text_completion", choice_json, choice_json)

    @app.post("/v1/chat/completions")
    async def chat_completions(http: Request) -> Response:
        request = parse(ChatRequest, await body_of(http))
        if not tokenizer.chat_template:
            message = "this model has no chat template: it was not trained to chat. Use /v1/completions."
            raise ApiError(400, message, "messages")
        request.messages = messages_of(request.messages)  # other fields of messages may be large
        ids = await in_encoder(render, request.messages)
        asked = request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens
        n_new = n_new_tokens(asked, max(1, block_size - len(ids)), "max_completion_tokens")
        if request.top_logprobs and not request.logprobs:
            message = f'top_logprobs = {request.top_logprobs} needs logprobs. Add "logprobs": true.'
            raise ApiError(400, message, "top_logprobs")
        n_top = (request.top_logprobs or 0) if request.logprobs else None
        answer = Answer(http, scheduler, tokenizer, request, "chatcmpl", name)
        answer.add(ids, n_new, request.stops(), reply_ends.union(request.stop_token_ids), n_top)
        before, after = reply_frame
        before = "" if request.messages[-1]["role"] == "assistant" else before
        texts = {choice: ReplyText(before, after) for choice in answer.choices}

        def fields(choice: Choice, text: str, tokens: list[tuple], reason: str | None) -> tuple[str, dict]:
            text = texts[choice].push(text) + (texts[choice].finish() if reason else "")
            as_ids = request.return_tokens_as_token_ids
            logprobs = None if n_top is None else chat_logprobs(tokenizer, tokens, as_ids)
            return text, {"index": choice.index, "logprobs": logprobs, "finish_reason": reason}

        def whole(choice: Choice, text: str, tokens: list[tuple], reason: str | None, is_first: bool) -> dict:
            content, rest = fields(choice, text, tokens, reason)
            return rest | {"message": {"role": "assistant", "content": content, "refusal": None}}

        def chunk(choice: Choice, text: str, tokens: list[tuple], reason: str | None, is_first: bool) -> dict:
            content, rest = fields(choice, text, tokens, reason)
            return rest | {"delta": ({"role": "assistant"} if is_first else {}) | {"content": content}}

        return await answer.response("chat.completion", "chat.completion.chunk", whole, chunk)

    return app


async def body_of(http: Request) -> bytes:
    """Return the request's body. JSON is required as its type, which a foreign web page cannot send without CORS."""
    kind = http.headers.get("content-type", "")
    if not kind.lower().startswith("application/json"):
        raise ApiError(415, f"the content type {kind!r:.60} should be application/json. Add this header.")
    return b"".join([piece async for piece in http.stream()])  # http.body() would keep it until the answer ends


class Answer:
    """The choices of a request, and the response that they become."""

    def __init__(self, http: Request, scheduler: Scheduler, tokenizer, request: GenerationRequest, prefix: str, name):
        self.http, self.scheduler, self.tokenizer, self.request = http, scheduler, tokenizer, request
        self.head = {"id": f"{prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": name}
        self.queue: asyncio.Queue = asyncio.Queue()
        self.loop = asyncio.get_running_loop()
        self.choices: list[Choice] = []
        self.sequences: list[Sequence] = []
        self.n_prompt_tokens = self.n_asked = 0

    def put(self, event: tuple | Exception) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the server has ended
            self.loop.call_soon_threadsafe(self.queue.put_nowait, event)

    def add(self, prompt: list[int], n_new: int, stops, ends, n_top: int | None, echo: str | None = None) -> None:
        """Add n samples of a prompt. Sample k has the seed `seed` + k, as in sample.py."""
        self.n_prompt_tokens += len(prompt)
        n_scored = len(prompt) if echo is not None and n_top is not None else 0
        self.n_asked += self.request.n * (n_scored + n_new) * (1 + (n_top or 0))
        if self.n_asked > MOST_TOKENS:
            message = f"the request asks for more than {MOST_TOKENS} tokens, with their alternatives. "
            raise ApiError(400, message + "Use less of n, max_tokens and logprobs, or send several requests.")
        seed = secrets.randbelow(2**61) if self.request.seed is None else self.request.seed
        for k in range(self.request.n):
            text = TextStream(self.tokenizer, stops, ends, prompt)
            choice = Choice(len(self.choices), self.tokenizer, text, self.put, echo)
            on_prompt = choice.on_prompt if echo is not None and n_top is not None else None
            sampling = self.request.sampling()
            self.sequences.append(
                Sequence(prompt, n_new, sampling, seed + k, choice.on_token, choice.on_end, on_prompt, n_top)
            )
            self.choices.append(choice)

    async def response(self, kind: str, chunk_kind: str, whole: Callable, chunk: Callable) -> Response:
        """Run the choices. `whole` and `chunk` make the JSON of a choice, or of its next part in a stream."""
        try:
            self.scheduler.submit(self.sequences)
        except QueueFull as full:
            headers = {"Retry-After": str(full.retry_after)}
            raise ApiError(429, f"{full}.", code="queue_full", headers=headers) from full
        if self.request.stream:
            return Stream(self, self.chunks(chunk_kind, chunk))
        watch = asyncio.create_task(self.cancel_on_disconnect())
        texts: dict[Choice, str] = {}
        tokens: dict[Choice, list[tuple]] = {}
        reasons: dict[Choice, str | None] = {}
        try:
            async for choice, text, new, reason in self.events():
                texts[choice] = texts.get(choice, "") + text
                tokens.setdefault(choice, []).extend(new)
                reasons[choice] = reason
        finally:
            watch.cancel()
            self.cancel()

        def make() -> Response:
            choices = [whole(choice, texts[choice], tokens[choice], reasons[choice], True) for choice in self.choices]
            return Json({**self.head, "object": kind, "choices": choices, "usage": self.usage()})

        return await asyncio.to_thread(make)  # it may take seconds, in which others are served

    async def events(self) -> AsyncIterator[tuple]:
        """Yield (choice, text, tokens, finish_reason) until all choices have ended.

        Events that have piled up become one per choice: under load, this saves most of the work per token.
        """
        n_open = len(self.choices)
        while n_open:
            events = [await self.queue.get()]
            while len(events) < MOST_MERGED and not self.queue.empty():
                events.append(self.queue.get_nowait())
            errors = [event for event in events if isinstance(event, Exception)]
            for event in merged(event for event in events if not isinstance(event, Exception)):
                yield event
                n_open -= event[3] is not None
            if errors:
                raise errors[0]

    async def chunks(self, kind: str, chunk: Callable) -> AsyncIterator[bytes]:
        """Yield the server-sent events of a stream."""
        options, begun = self.request.stream_options, set()
        head = {**self.head, "object": kind} | ({"usage": None} if options and options.include_usage else {})
        try:
            async for choice, *news in self.events():
                yield sse({**head, "choices": [chunk(choice, *news, choice not in begun)]})
                begun.add(choice)
            if options and options.include_usage:
                yield sse({**head, "choices": [], "usage": self.usage()})
            yield b"data: [DONE]\n\n"
        except ApiError as error:  # the status was sent already
            yield sse(error.json())

    def usage(self) -> dict:
        new = sum(choice.n_tokens for choice in self.choices)
        total = self.n_prompt_tokens + new
        return {"prompt_tokens": self.n_prompt_tokens, "completion_tokens": new, "total_tokens": total}

    def cancel(self) -> None:
        for sequence in self.sequences:
            sequence.cancel()

    async def cancel_on_disconnect(self) -> None:
        while (await self.http.receive())["type"] != "http.disconnect":
            pass
        self.put(ApiError(499, "the client has disconnected."))


def merged(events: Iterable[tuple]) -> list[tuple]:
    """Return one event (choice, text, tokens, finish_reason) per choice, with its texts and tokens joined."""
    parts: dict[Choice, tuple[list[str], list[tuple], list[str | None]]] = {}
    for choice, text, tokens, reason in events:
        texts, all_tokens, reasons = parts.setdefault(choice, ([], [], []))
        texts.append(text)
        all_tokens.extend(tokens)
        reasons.append(reason)
    return [(choice, "".join(texts), tokens, reasons[-1]) for choice, (texts, tokens, reasons) in parts.items()]


def sse(value: Any) -> bytes:
    """Return a server-sent event, without the line ends of Unicode: some clients split lines there."""
    data = to_json(value)
    for end in ("\x85", "\u2028", "\u2029"):
        data = data.replace(end.encode(), b"\\u%04x" % ord(end))
    return b"data: " + data + b"\n\n"


class Stream(StreamingResponse):
    """A stream that frees its rows when it ends: at its end, or because the client hangs up."""

    def __init__(self, answer: Answer, chunks: AsyncIterator[bytes]):
        super().__init__(chunks, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self.answer = answer

    async def __call__(self, scope, receive, send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.answer.cancel()


# ---------------------------------------------------------------------------------------------------------------------
# Limits


class SlowReader(Exception):
    """The client did not read what was sent."""


class Guard:
    """ASGI middleware: checks the API key, and limits the size, the duration and the number of requests."""

    def __init__(self, app, api_key: str):
        self.app, self.api_key, self.n_open, self.n_held = app, api_key, 0, 0

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        try:
            body = await self.read_body(receive, self.key_error(scope))
            if scope["method"] == "POST" and self.n_open >= MOST_OPEN:
                message = f"{MOST_OPEN} requests are open. Try again later."
                raise ApiError(429, message, code="too_many_requests", headers={"Retry-After": "1"})
        except ApiError as error:
            return await error.response()(scope, receive, send)
        messages = [{"type": "http.request", "body": body, "more_body": False}]
        del body

        async def replay():
            return messages.pop() if messages else await receive()

        async def send_in_time(message) -> None:
            for piece in in_pieces(message):
                try:
                    await asyncio.wait_for(send(piece), PATIENCE)
                except asyncio.TimeoutError:
                    raise SlowReader from None

        self.n_open += 1
        try:
            with contextlib.suppress(SlowReader):  # the server then closes the connection
                await self.app(scope, replay, send_in_time)
        finally:
            self.n_open -= 1

    def key_error(self, scope) -> ApiError | None:
        header = dict(scope["headers"]).get(b"authorization", b"")
        is_open = not self.api_key or not scope["path"].startswith(("/v1", "/inside"))
        if is_open or secrets.compare_digest(header, b"Bearer " + self.api_key.encode()):
            return None
        return ApiError(401, "the API key is missing or wrong. Send it as a bearer token.", code="invalid_api_key")

    async def read_body(self, receive, refusal: ApiError | None = None) -> bytes:
        """Return a request's body. Raises ApiError if it takes too long, is too large, or if too much arrives at once.

        A body that is refused is read and dropped: many clients read no answer before they have sent everything.
        `refusal`: refuse it in any case.
        """
        pieces: list[bytes] = []
        n_bytes = 0

        def drop() -> None:
            self.n_held -= sum(map(len, pieces))
            pieces.clear()

        async def read() -> None:
            nonlocal n_bytes, refusal
            while n_bytes <= MOST_DRAINED:
                message = await receive()
                piece = message.get("body", b"")
                n_bytes += len(piece)
                if n_bytes > MOST_BODY and not refusal:
                    refusal = ApiError(413, f"the request has more than {MOST_BODY >> 20} MB. Send a shorter one.")
                elif self.n_held > MOST_HELD and n_bytes > SMALL_BODY and not refusal:
                    refusal = ApiError(429, "too many large requests are arriving. Try again later.")
                if refusal:
                    drop()
                else:
                    pieces.append(piece)
                    self.n_held += len(piece)
                if not message.get("more_body"):  # the end, or a client that hung up
                    return

        try:
            await asyncio.wait_for(read(), PATIENCE)
            if refusal:
                raise refusal
            return b"".join(pieces)
        except asyncio.TimeoutError:
            message = f"the request did not arrive within {PATIENCE:g} s. Send it again."
            raise refusal or ApiError(408, message) from None
        finally:
            drop()


def in_pieces(message: dict) -> list[dict]:
    """Return an ASGI message as messages with at most PIECE bytes.

    The last piece of an answer stays in memory until the client reads it, however long it takes.
    """
    body = message.get("body", b"")
    if len(body) <= PIECE:
        return [message]
    pieces = [body[first : first + PIECE] for first in range(0, len(body), PIECE)]
    rest = [message | {"body": piece, "more_body": True} for piece in pieces[:-1]]
    return [*rest, message | {"body": pieces[-1]}]
