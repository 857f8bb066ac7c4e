"""The page at `/` of the server, and the JSON that only the page needs: tokens, and the inside of the model.

    GET  /                the page: index.html, and /page/style.css and so on
    GET  /inside          the name and size of the model, and whether it can chat
    POST /inside/tokens   {"text"}, {"ids"} or {"messages"} -> their "ids", the labels of the "tokens", and the "text"
    POST /inside          {"text"} or {"ids"} -> the values of `look_inside`
    POST /inside/heads    the same -> {"heads"}: the values of `head_ablation`

The rest of the page uses the OpenAI-compatible endpoints.
"""

import json
import threading
from pathlib import Path

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import FileResponse, JSONResponse

from acorn import UserError
from acorn.data import chat
from acorn.inference import inside
from acorn.inference.generate import encode_prompt
from model import GPT

FOLDER = Path(__file__).parent / "page"
FILES = ("style.css", "words.js", "inside.js", "app.js")
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}
MOST_BYTES = 1_000_000  # of a request
MOST_TOKENS = 128  # of a text to look into; about the most that fits on a screen
MOST_ABLATIONS = 40_000  # tokens that head ablation may run through the model: heads * tokens


def page_router() -> APIRouter:
    """Return the routes of the page itself, which contain nothing of the model."""
    router = APIRouter(include_in_schema=False)

    @router.get("/")
    def index():
        return FileResponse(FOLDER / "index.html", headers=HEADERS)

    @router.get("/page/{name}")
    def file(name: str):
        if name not in FILES:
            return problem(404, f"there is no file {name!r:.50}")
        return FileResponse(FOLDER / name, headers=HEADERS)

    return router


def inside_router(model: GPT, tokenizer, name: str) -> APIRouter:
    """Return the routes about the model. One request at a time may compute; others are told to try again."""
    router, busy = APIRouter(), threading.Lock()
    most_tokens = min(MOST_TOKENS, model.config.block_size)

    async def answer(request: Request, compute) -> JSONResponse:
        """Answer with compute(the request's JSON object), or with a sentence about what is wrong with it."""
        body = b""
        async for piece in request.stream():
            body += piece
            if len(body) > MOST_BYTES:
                return problem(413, f"the request has more than {MOST_BYTES:,} bytes. Shorten it.")
        try:
            query = json.loads(body)
        except (ValueError, RecursionError):
            query = None
        if not isinstance(query, dict):
            return problem(400, "the request is not a JSON object")
        try:
            return JSONResponse(await run_in_threadpool(compute, query))
        except UserError as error:
            return problem(400, str(error))
        except Busy:
            return problem(503, "the model is busy with another text. Try again in a moment.", {"Retry-After": "1"})

    def checked_ids(query: dict) -> list[int]:
        ids = read_ids(tokenizer, query)
        inside.check_text(tokenizer, ids, most_tokens)
        return ids

    def look(query: dict) -> dict:
        ids = checked_ids(query)
        with alone(busy):
            return inside.look_inside(model, tokenizer, ids)

    def heads(query: dict) -> dict:
        ids = checked_ids(query)
        n_heads = model.config.n_layer * model.config.n_head
        if n_heads * len(ids) > MOST_ABLATIONS:
            most = max(2, MOST_ABLATIONS // n_heads)
            raise UserError(
                f"the text has {len(ids)} tokens, but measuring the {n_heads} heads of this model is limited to {most} "
                "here. Shorten the text, or use python -m acorn.inspect."
            )
        with alone(busy):
            rows = inside.head_ablation(model, ids)
        return {"heads": [[round(x, 6) for x in row] for row in rows.tolist()]}

    def tokens(query: dict) -> dict:
        ids = read_ids(tokenizer, query)
        if query.get("alone") is True:
            return {"ids": ids, "tokens": [inside.label(tokenizer, token) for token in ids]}
        return {"ids": ids, "tokens": inside.labels(tokenizer, ids), "text": tokenizer.decode(ids)}

    @router.get("/inside")
    def about() -> dict:
        return {
            "name": name,
            "parameters": model.num_params(),
            "n_layer": model.config.n_layer,
            "n_head": model.config.n_head,
            "block_size": model.config.block_size,
            "most_tokens": most_tokens,
            "chat": bool(tokenizer.chat_template),
        }

    @router.post("/inside")
    async def post_inside(request: Request):
        return await answer(request, look)

    @router.post("/inside/heads")
    async def post_heads(request: Request):
        return await answer(request, heads)

    @router.post("/inside/tokens")
    async def post_tokens(request: Request):
        return await answer(request, tokens)

    return router


class Busy(Exception):
    pass


class alone:
    """A context that one thread at a time may enter. Raises Busy for others, which would queue without limit."""

    def __init__(self, lock: threading.Lock):
        self.lock = lock

    def __enter__(self):
        if not self.lock.acquire(blocking=False):
            raise Busy

    def __exit__(self, *_):
        self.lock.release()


def problem(status: int, message: str, headers: dict | None = None) -> JSONResponse:
    """Return an error in OpenAI's format."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    content = {"error": {"message": message, "type": kind, "param": None, "code": None}}
    return JSONResponse(content, status, headers)


def read_ids(tokenizer, query: dict) -> list[int]:
    """Return the token ids that a request means: its "ids", or those of its "text" or "messages".

    A "text" that "continues" another gets no BOS. Raises UserError if they are invalid.
    """
    if isinstance(ids := query.get("ids"), list):
        if not all(type(i) is int and 0 <= i < tokenizer.n_vocab for i in ids):
            raise UserError(f"ids must be integers from 0 to {tokenizer.n_vocab - 1}, the vocabulary of the model")
        return ids
    if isinstance(text := query.get("text"), str):
        if query.get("continues") is True:
            return tokenizer.encode(text).tolist()
        if not text and tokenizer.eot is None and not tokenizer.before_text:
            raise UserError("the text is empty. Write at least one character.")
        return encode_prompt(tokenizer, text)
    if isinstance(messages := query.get("messages"), list):
        roles = ("system", "user", "assistant")
        for message in messages:
            if not isinstance(message, dict) or message.get("role") not in roles:
                raise UserError('each of the messages must be an object with a "role" of system, user or assistant')
            if not isinstance(message.get("content"), str):
                raise UserError('each of the messages must have a "content", which is a string')
        if not messages or not tokenizer.chat_template:
            raise UserError("messages need a model with a chat template, and at least one message")
        return chat.render(tokenizer, messages).tolist()
    raise UserError('the request needs a "text", a list of "ids", or a list of "messages"')
