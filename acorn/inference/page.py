"""The page at `/` of the server, and the JSON that only the page needs: tokens, and the inside of the model.

    GET  /                the page: index.html, and /page/style.css and so on
    GET  /inside          the name and size of the model, and whether it can chat
    POST /inside/tokens   {"text"}, {"ids"} or {"messages"} -> "ids", "tokens" (their labels), "text", and "ends" (ids
                          that end a reply; [] without messages). Optional: "before", ids that precede "ids";
                          "alternatives", a list of ids for each token, answered with their labels
    POST /inside          {"text"} or {"ids"} -> the values of `look_inside`
    POST /inside/heads    the same -> {"heads"}: the values of `head_ablation`

The rest of the page uses the OpenAI-compatible endpoints.
"""

import json
import threading
from collections.abc import Callable
from pathlib import Path

from fastapi import APIRouter, FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import FileResponse, Response

from acorn import UserError
from acorn.data import chat
from acorn.data.tokenizer import StreamDecoder
from acorn.inference import inside
from acorn.inference.generate import encode_prompt
from acorn.inference.server import ApiError, Json, body_of
from model import GPT

FOLDER = Path(__file__).parent / "page"
FILES = ("style.css", "words.js", "inside.js", "app.js")
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}
MOST_CHARACTERS = 200_000  # of a text that is only split into tokens
MOST_TOKENS = 128  # of a text to look into; about the most that fits on a screen
CHAR_TOKENS = 4  # the most tokens that a character spans: it has at most 4 bytes
MOST_ABLATIONS = 40_000  # tokens that head ablation may run through the model: heads * tokens


def add_page(app: FastAPI) -> None:
    """Add the page and its routes to an app of `create_app`."""
    app.include_router(page_router())
    app.include_router(inside_router(app.state.model, app.state.tokenizer, app.state.name))


def page_router() -> APIRouter:
    """Return the routes of the page itself, which contain nothing of the model."""
    router = APIRouter()

    @router.get("/")
    def index() -> Response:
        return FileResponse(FOLDER / "index.html", headers=HEADERS)

    @router.get("/page/{name}")
    def file(name: str) -> Response:
        if name not in FILES:
            raise ApiError(404, f"there is no file {name!r:.50}.")
        return FileResponse(FOLDER / name, headers=HEADERS)

    return router


def inside_router(model: GPT, tokenizer, name: str) -> APIRouter:
    """Return the routes about the model. They compute for one request at a time, beside the scheduler's thread."""
    router, computing = APIRouter(), threading.Lock()
    most_tokens = min(MOST_TOKENS, model.config.block_size)

    async def answer(request: Request, compute: Callable[[dict], dict]) -> Response:
        """Answer with compute(the request's JSON object)."""
        try:
            query = json.loads(await body_of(request))
        except (ValueError, RecursionError):
            query = None
        if not isinstance(query, dict):
            raise ApiError(400, "the request is not a JSON object.")
        try:
            return Json(await run_in_threadpool(compute, query))
        except UserError as error:
            raise ApiError(400, str(error)) from error

    def of_text(query: dict, function: Callable[[list[int]], dict]) -> dict:
        """Return function(ids) of a short text, or refuse if it would have to wait: a crowd could fill all threads."""
        ids = read_ids(tokenizer, query)
        inside.check_text(ids, min(tokenizer.n_vocab, model.config.vocab_size), most_tokens)
        if not computing.acquire(blocking=False):
            message = "the model is busy with another text. Try again in a moment."
            raise ApiError(503, message, headers={"Retry-After": "1"})
        try:
            return function(ids)
        finally:
            computing.release()

    def look(ids: list[int]) -> dict:
        return inside.look_inside(model, tokenizer, ids)

    def heads(ids: list[int]) -> dict:
        n_heads = model.config.n_layer * model.config.n_head
        if n_heads * len(ids) > MOST_ABLATIONS:
            raise UserError(
                f"the text has {len(ids)} tokens, but the {n_heads} heads of this model are measured here for at most "
                f"{MOST_ABLATIONS // n_heads}. Shorten the text, or use python -m acorn.inspect."
            )
        return {"heads": [[round(x, 6) for x in row] for row in inside.head_ablation(model, ids).tolist()]}

    def tokens(query: dict) -> dict:
        ids, text, before = read_ids(tokenizer, query), "", []
        if "before" in query:
            before = read_ids(tokenizer, {"ids": query["before"]})
            text = "".join(map(StreamDecoder(tokenizer, before).push, ids))
        else:
            text = tokenizer.decode(ids)
        whole, n = [*before, *ids], len(before)
        ends = sorted(chat.stop_ids(tokenizer)) if "messages" in query else []
        found = {"ids": ids, "tokens": inside.labels(tokenizer, whole)[n:], "text": text, "ends": ends}
        if isinstance(others := query.get("alternatives"), list):
            rows = [read_ids(tokenizer, {"ids": row}) for row in others[: len(ids)]]
            found["alternatives"] = [
                [inside.label_after(tokenizer, whole[max(0, i - CHAR_TOKENS) : i], token) for token in row]
                for i, row in enumerate(rows, n)
            ]
        return found

    @router.get("/inside")
    async def about() -> Response:
        sizes = {key: getattr(model.config, key) for key in ("n_layer", "n_head", "block_size")}
        can_chat = bool(tokenizer.chat_template)
        return Json({"name": name, "chat": can_chat, "most_tokens": most_tokens, **sizes})

    @router.post("/inside")
    async def post_inside(request: Request) -> Response:
        return await answer(request, lambda query: of_text(query, look))

    @router.post("/inside/heads")
    async def post_heads(request: Request) -> Response:
        return await answer(request, lambda query: of_text(query, heads))

    @router.post("/inside/tokens")
    async def post_tokens(request: Request) -> Response:
        return await answer(request, tokens)

    return router


def read_ids(tokenizer, query: dict) -> list[int]:
    """Return the token ids that a request means: its "ids", or those of its "text" or "messages".

    Raises UserError if they are invalid.
    """
    if isinstance(ids := query.get("ids"), list):
        if not all(type(i) is int and 0 <= i < tokenizer.n_vocab for i in ids):
            raise UserError(f"ids must be integers from 0 to {tokenizer.n_vocab - 1}, the vocabulary of the model.")
        return ids
    if isinstance(text := query.get("text"), str):
        check_length(len(text))
        if not text and tokenizer.eot is None and not tokenizer.before_text:
            raise UserError("the text is empty. Write at least one character.")
        return encode_prompt(tokenizer, text)
    if isinstance(messages := query.get("messages"), list):
        roles = ("system", "user", "assistant")
        for message in messages:
            if not isinstance(message, dict) or message.get("role") not in roles:
                raise UserError('each of the messages must be an object with a "role" of system, user or assistant.')
            if not isinstance(message.get("content"), str):
                raise UserError('each of the messages must have a "content", which is a string.')
        check_length(sum(len(message["content"]) for message in messages))
        if not messages or not tokenizer.chat_template:
            raise UserError("messages need a model with a chat template, and at least one message.")
        return chat.render(tokenizer, messages).tolist()
    raise UserError('the request needs a "text", a list of "ids", or a list of "messages".')


def check_length(n_characters: int) -> None:
    if n_characters > MOST_CHARACTERS:
        raise UserError(f"the text has {n_characters} characters, but at most {MOST_CHARACTERS}. Shorten it.")
