"""A small server for test_page.py: the page, and the streams of /v1/ that it uses, one request at a time."""

import json
import queue
import threading
import time

import torch
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse

from acorn.data import chat
from acorn.inference.generate import Sampling, TextStream, encode_prompt, generate
from acorn.inference.page import inside_router, page_router


def create_app(model, tokenizer, name="test", pause=0.0):
    """Return an app; `pause` seconds before each token give a test time to stop an answer."""
    app = FastAPI()
    app.include_router(page_router())
    app.include_router(inside_router(model, tokenizer, name))

    def run(ids, query, ends, emit, scored):
        text = TextStream(tokenizer, [], ends)
        sampling = Sampling(temperature=query.get("temperature", 1.0), top_p=query.get("top_p", 1.0))

        def top(logits):
            best = logits.log_softmax(-1).topk(min(5, tokenizer.n_vocab))
            return {f"token_id:{i}": v for i, v in zip(best.indices.tolist(), best.values.tolist(), strict=True)}

        def on_token(row, token, logprob):
            time.sleep(pause)
            before = [*ids, *generated]
            generated.append(token)
            piece = text.push(token)
            if not scored:
                emit(piece, None)
                return text.stopped_by is not None
            window = torch.tensor([before[-model.config.block_size :]])
            logprobs = {
                "tokens": [f"token_id:{token}"],
                "token_logprobs": [logprob],
                "top_logprobs": [top(model(window)[0][0, 0, : tokenizer.n_vocab])],
            }
            emit(piece, logprobs)
            return text.stopped_by is not None

        generated = []
        seed = query.get("seed", 0)
        generate(model, [ids], query.get("max_tokens", 16), sampling, [seed], on_token, tokenizer.n_vocab)
        emit(None, None)

    def events(ids, query, ends, is_chat):
        pieces = queue.Queue()
        threading.Thread(
            target=run, args=(ids, query, ends, lambda *item: pieces.put(item), not is_chat), daemon=True
        ).start()
        while (item := pieces.get())[0] is not None:
            choice = {"delta": {"content": item[0]}} if is_chat else {"text": item[0], "logprobs": item[1]}
            yield f"data: {json.dumps({'choices': [choice | {'index': 0, 'finish_reason': None}]})}\n\n"
        yield "data: [DONE]\n\n"

    @app.post("/v1/completions")
    async def completions(request: Request):
        query = await request.json()
        prompt = query["prompt"]
        ids = prompt if isinstance(prompt, list) else encode_prompt(tokenizer, prompt)
        if query.get("echo"):
            logits = model(torch.tensor([ids]), torch.tensor([ids]))[0][0].log_softmax(-1)
            best = logits.topk(min(5, tokenizer.n_vocab))
            tops = [
                {f"token_id:{t}": v for t, v in zip(*row, strict=True)}
                for row in zip(best.indices.tolist(), best.values.tolist(), strict=True)
            ]
            logprobs = {
                "tokens": [f"token_id:{t}" for t in ids],
                "token_logprobs": [None, *(logits[i, t].item() for i, t in enumerate(ids[1:]))],
                "top_logprobs": [None, *tops[:-1]],
            }
            return {"choices": [{"text": "", "logprobs": logprobs}]}
        return StreamingResponse(events(ids, query, set(), False), media_type="text/event-stream")

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request):
        query = await request.json()
        ids = chat.render(tokenizer, query["messages"]).tolist()
        if len(ids) >= model.config.block_size:
            error = {"message": "too long", "code": "context_length_exceeded"}
            return JSONResponse({"error": error}, 400)
        return StreamingResponse(events(ids, query, chat.stop_ids(tokenizer), True), media_type="text/event-stream")

    return app
