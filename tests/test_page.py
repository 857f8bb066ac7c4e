"""acorn/inference/page.py and page/: the JSON endpoints of the server's web page, and the page in a real browser."""

import contextlib
import json
import re
import shutil
import socket
import threading
import time

import pytest
from hf_models import ours

fastapi = pytest.importorskip("fastapi", reason="the server needs `pip install fastapi uvicorn`")

from fastapi.testclient import TestClient  # noqa: E402

from acorn.data import chat  # noqa: E402
from acorn.data.tokenizer import ByteTokenizer, StreamDecoder, train_char  # noqa: E402
from acorn.inference import inside, page, pictures, scheduler  # noqa: E402
from acorn.inference.server import create_app  # noqa: E402

TEXT = "Hello <b>world</b>"
SOURCES = {name: (page.FOLDER / name).read_text(encoding="utf-8") for name in ("index.html", *page.FILES)}


def chat_tokenizer() -> ByteTokenizer:
    tokenizer = ByteTokenizer()
    tokenizer.chat_template = chat.PLAIN
    return tokenizer


@pytest.fixture(scope="module")
def model():
    return ours(block_size=128).requires_grad_(False)


def page_app(model, tokenizer, **settings):
    app = create_app(model, tokenizer, "test", **settings)
    page.add_page(app)
    return app


@pytest.fixture(scope="module")
def client(model):
    return TestClient(page_app(model, chat_tokenizer()))


def test_page_is_served_and_loads_no_external_resources(client):
    answer = client.get("/")
    assert answer.status_code == 200 and "default-src 'self'" in answer.headers["content-security-policy"]
    for path in re.findall(r'(?:src|href)="(.*?)"', answer.text):
        assert path == "data:," or client.get(f"/{path}").status_code == 200, path
    for name, source in SOURCES.items():
        assert not re.search(r"https?://|//cdn|@import|url\(", source), name
    assert client.get("/page/../page.py").status_code == client.get("/page/page.py").status_code == 404


def test_page_sources_contain_no_html_injection_or_eval():
    for name, source in SOURCES.items():
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", source), (
            name
        )


def test_page_texts_are_complete_in_both_languages():
    english, chinese = re.findall(r"^  (?:en|zh): \{\n(.*?)^  \}", SOURCES["words.js"], re.S | re.M)
    keys = [set(re.findall(r"^    (\w+):", part, re.M)) for part in (english, chinese)]
    assert keys[0] == keys[1]
    used = set(re.findall(r'data-t(?:-\w+)?="(\w+)"', SOURCES["index.html"]))
    used |= set(re.findall(r'\bt\("(\w+)"', SOURCES["app.js"] + SOURCES["inside.js"]))
    assert used <= keys[0], used - keys[0]


def test_text_on_token_colours_has_enough_contrast():
    """WCAG's level AA, https://www.w3.org/TR/WCAG22/#contrast-minimum, in the light and in the dark scheme."""

    def luminance(colour: str) -> float:
        channels = [int(colour[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = SOURCES["style.css"].split("@media (prefers-color-scheme: dark)", 1)
    for scheme in (light, dark):
        colours = {name: luminance(value) for name, value in re.findall(r"--([\w-]+): #(\w{6});", scheme)}
        for text, ground in (("text", "high"), ("text", "low"), ("text", "field"), ("soft", "back"), ("soft", "field")):
            lower, higher = sorted((colours[text], colours[ground]))
            assert (higher + 0.05) / (lower + 0.05) >= 4.5, (text, ground)


def test_inside_endpoints_return_model_internals_as_json(client, model):
    values = client.post("/inside", json={"text": TEXT}).json()
    assert values == inside.look_inside(model, ByteTokenizer(), list(TEXT.encode()))
    assert client.post("/inside", json={"ids": values["ids"]}).json() == values
    heads = client.post("/inside/heads", json={"text": TEXT}).json()["heads"]
    assert heads == [[round(x, 6) for x in row] for row in inside.head_ablation(model, values["ids"]).tolist()]
    about = client.get("/inside").json()
    assert about["chat"] and about["most_tokens"] == 128 and about["n_layer"] == 2


def test_tokens_endpoint_encodes_texts_and_conversations(client):
    answer = client.post("/inside/tokens", json={"text": "é"}).json()
    assert answer == {"ids": [0xC3, 0xA9], "tokens": ["⟨C3⟩", "…é"], "text": "é", "ends": []}
    query = {"ids": [0xC3, 0xA9], "alternatives": [[0x61, 0xC3], [0xA8, 0x61]]}
    alternatives = client.post("/inside/tokens", json=query).json()["alternatives"]
    assert alternatives == [["a", "⟨C3⟩"], ["…è", "a"]]
    query = {"before": [0x61, 0xC3], "ids": [0xA9, 0xC3], "alternatives": [[0xA8], [0x62]]}
    answer = client.post("/inside/tokens", json=query).json()
    expected = {"ids": [0xA9, 0xC3], "tokens": ["…é", "⟨C3⟩"], "text": "é", "alternatives": [["…è"], ["b"]]}
    assert answer == expected | {"ends": []}
    messages = [{"role": "user", "content": "<|endoftext|>"}]
    answer = client.post("/inside/tokens", json={"messages": messages}).json()
    assert answer["text"].endswith("User:\n<|endoftext|>\n\nAssistant:\n")
    assert answer["ids"].count(256) == 1  # from the template; the one in the message is encoded as text
    assert answer["ends"] == [256]


def test_invalid_alternatives_are_rejected(client):
    for others in ([["a"]], [[257]], ["a"], [None]):
        assert client.post("/inside/tokens", json={"ids": [1], "alternatives": others}).status_code == 400


@pytest.mark.parametrize(
    "body, word",
    [
        (b"\xff", "JSON"),
        (b"[" * 100_000, "JSON"),
        (b"[]", "JSON"),
        (b"{}", "text"),
        (b'{"text": ["a"]}', "text"),
        (b'{"text": "a"}', "1 tokens"),
        (json.dumps({"text": "a" * 129}).encode(), "129 tokens"),
        (b'{"ids": [1, 257]}', "256"),
        (b'{"ids": [1, true]}', "integers"),
        (b'{"ids": [1, 1e400]}', "integers"),
        (b'{"messages": [{"role": "user"}]}', "content"),
        (b'{"messages": ["a"]}', "role"),
    ],
)
def test_invalid_requests_return_a_clear_error(client, body, word):
    answer = client.post("/inside", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400 and word in answer.json()["error"]["message"]


def test_oversized_cross_site_and_concurrent_requests_are_rejected(client, monkeypatch):
    answer = client.post("/inside/tokens", json={"text": "a" * (page.MOST_CHARACTERS + 1)})
    assert answer.status_code == 400 and "Shorten" in answer.json()["error"]["message"]
    assert client.post("/inside", content=b'{"text": "ab"}').status_code == 415  # as in a cross-site request
    monkeypatch.setattr(page, "MOST_ABLATIONS", 50)
    answer = client.post("/inside/heads", json={"text": TEXT})
    assert answer.status_code == 400 and "6" in answer.json()["error"]["message"]
    begun, go_on = threading.Event(), threading.Event()

    def slow(*_):
        begun.set()
        go_on.wait(10)
        return {}

    monkeypatch.setattr(inside, "look_inside", slow)
    first = threading.Thread(target=client.post, args=("/inside",), kwargs={"json": {"text": TEXT}})
    first.start()
    assert begun.wait(10)
    answer = client.post("/inside", json={"text": TEXT})
    go_on.set()
    first.join()
    assert answer.status_code == 503 and answer.headers["retry-after"] == "1"


def test_model_without_a_chat_template_rejects_messages():
    tokenizer = train_char(["abc"])
    client = TestClient(page_app(ours(vocab_size=3), tokenizer))
    assert not client.get("/inside").json()["chat"]
    for query in ({"messages": [{"role": "user", "content": "a"}]}, {"text": ""}, {"text": "é"}):
        assert client.post("/inside/tokens", json=query).status_code == 400


def test_api_key_protects_the_model_but_not_the_page(model):
    client = TestClient(page_app(model, chat_tokenizer(), api_key="secret"))
    assert client.get("/").status_code == client.get("/page/app.js").status_code == 200
    assert client.get("/inside").status_code == client.post("/inside", json={"text": TEXT}).status_code == 401
    assert client.get("/inside", headers={"authorization": "Bearer secret"}).status_code == 200


def test_logprobs_can_report_token_ids(client):
    ask = {"max_tokens": 3, "temperature": 0, "return_tokens_as_token_ids": True}
    text = client.post("/v1/completions", json={"prompt": "To be", "logprobs": 2, **ask}).json()
    names = text["choices"][0]["logprobs"]["tokens"]
    assert len(names) == 3 and all(re.fullmatch(r"token_id:\d+", name) for name in names)
    assert [max(top, key=top.get) for top in text["choices"][0]["logprobs"]["top_logprobs"]] == names
    messages = [{"role": "user", "content": "a"}]
    talk = client.post("/v1/chat/completions", json={"messages": messages, "logprobs": True, "top_logprobs": 2, **ask})
    for token in talk.json()["choices"][0]["logprobs"]["content"]:
        assert token["token"] == token["top_logprobs"][0]["token"] and token["token"].startswith("token_id:")


# ---------------------------------------------------------------------------------------------------------------------
# In a browser

PAUSE = 0.03  # seconds per token, which leaves time to stop the generation


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("there is no Chromium on this machine: apt install chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextlib.contextmanager
def serving(app):
    """Serve an app in a thread and return its address."""
    import uvicorn

    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.05)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
        server.should_exit = True
        thread.join(10)


@pytest.fixture(scope="module")
def address(model):
    """The address of a running server, which pauses before each token."""

    def slow_step(self, step=scheduler.Scheduler.step):
        time.sleep(PAUSE)
        step(self)

    with pytest.MonkeyPatch.context() as patch, serving(page_app(model, chat_tokenizer())) as url:
        patch.setattr(scheduler.Scheduler, "step", slow_step)
        yield url


@pytest.fixture
def visit(browser, address):
    """Return a function that opens a view of the page in a new browser context.

    At the end, assert that the page had no errors and requested nothing from other hosts.
    """
    with contextlib.ExitStack() as stack:
        problems = []

        def open_view(view="", width=1100, height=900, url=None, **options):
            options = {"locale": "en-US", "viewport": {"width": width, "height": height}, **options}
            context = browser.new_context(**options)
            stack.callback(context.close)
            tab = context.new_page()
            tab.set_default_timeout(20_000)
            tab.on("pageerror", lambda error: problems.append(str(error)))
            tab.on(
                "request",
                lambda request: request.url.startswith((address, "file:", "data:")) or problems.append(request.url),
            )
            tab.goto(url or f"{address}#/{view}")
            if not url:
                tab.wait_for_function("() => document.getElementById('model').textContent === 'test'")
                tab.evaluate("() => { document.getElementById('max_tokens').value = 12 }")
            return tab

        yield open_view
        assert problems == []


def wait_until_done(tab) -> None:
    tab.wait_for_selector("#go:not(:disabled)", state="attached")


def write(tab, prompt: str) -> None:
    """Let the model continue the prompt and wait until it is done."""
    tab.fill("#prompt", prompt)
    tab.click("#go")
    wait_until_done(tab)


def choices(tab) -> list[dict]:
    """Return the id of each displayed alternative, and whether it is the chosen one."""
    script = "buttons => buttons.map(b => ({id: Number(b.dataset.id), chosen: b.classList.contains('mark')}))"
    return tab.eval_on_selector_all("#why_detail button", script)


def token_ids(tab) -> list[int]:
    return tab.evaluate("() => completion.tokens.map(token => token.id)")


@pytest.mark.slow
def test_chat_streams_stops_regenerates_and_clears(visit):
    tab = visit()  # the chat is the default view if the model has a chat template
    assert tab.get_attribute("#chat", "aria-selected") == "true"
    tab.click("#settings summary")
    tab.fill("#max_tokens", "60")
    tab.fill("#message", "Hello <i>you</i>")
    tab.press("#message", "Enter")
    reply = tab.locator(".message.assistant .words")
    tab.wait_for_function("() => document.querySelector('.message.assistant .words')?.textContent.length > 3")
    explain = tab.locator(".message.assistant >> text=Why these tokens?")
    assert explain.is_disabled()  # the server is busy with the reply
    tab.click("#chat_panel .stop")
    wait_until_done(tab)
    text = reply.text_content()
    assert 3 < len(text) and tab.evaluate("() => conversation.length") == 2
    time.sleep(5 * PAUSE)
    assert reply.text_content() == text
    assert tab.locator(".message.user .words").text_content() == "Hello <i>you</i>"
    tab.click("#chat_again")
    wait_until_done(tab)
    again = reply.text_content()
    assert tab.locator(".message").count() == 2 and len(again) > len(text)
    explain.click()
    tab.wait_for_selector("#why_tokens button")
    assert "User:" in tab.input_value("#prompt")
    assert bytes(i for i in token_ids(tab) if i < 256).decode(errors="replace").startswith(again)
    tab.hover("#why_tokens button >> nth=1")
    with tab.expect_request("**/v1/completions") as continued:
        tab.click("#why_detail button:not(.mark)")
    assert continued.value.post_data_json["stop_token_ids"] == [256]  # the token that ends a reply in the chat
    wait_until_done(tab)
    tab.click("#chat")
    tab.click("#clear")
    assert tab.locator(".message").count() == 0


@pytest.mark.slow
def test_unanswered_message_returns_to_the_input_field(visit):
    tab = visit("chat")
    roles = "() => conversation.map(message => message.role)"

    def say(text: str) -> None:
        tab.fill("#message", text)
        tab.press("#message", "Enter")
        wait_until_done(tab)

    say("x" * 200)
    assert "Shorten" in tab.text_content("#chat_error") and tab.input_value("#message") == "x" * 200
    assert tab.locator(".message").count() == 0 and tab.evaluate(roles) == []
    say("Hi")
    assert tab.text_content("#chat_error") == "" and tab.evaluate(roles) == ["user", "assistant"]
    before = tab.text_content("#messages")
    tab.route("**/v1/**", lambda route: route.abort())
    say("Again")
    assert tab.input_value("#message") == "Again" and tab.text_content("#messages") == before
    tab.click("#chat_again")
    wait_until_done(tab)
    assert "server" in tab.text_content("#chat_error") and tab.text_content("#messages") == before
    tab.unroute("**/v1/**")
    tab.route("**/v1/**", lambda route: None)  # the server does not answer
    tab.press("#message", "Enter")
    tab.fill("#message", "More")
    tab.click("#chat_panel .stop")
    wait_until_done(tab)
    assert tab.input_value("#message") == "Again\nMore" and tab.evaluate(roles) == ["user", "assistant"]


@pytest.mark.slow
def test_oldest_turns_are_dropped_until_the_reply_has_room(visit):
    tab = visit("chat")
    tab.evaluate("() => { document.getElementById('max_tokens').value = 40 }")
    chunk = {"choices": [{"index": 0, "delta": {"role": "assistant", "content": "b" * 9}, "finish_reason": "stop"}]}
    body = f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n"
    tab.route("**/v1/**", lambda route: route.fulfill(content_type="text/event-stream", body=body))
    lengths = []
    for i in range(5):
        tab.fill("#message", f"{i}" * 9)
        with tab.expect_request("**/v1/**") as sent:
            tab.press("#message", "Enter")
        wait_until_done(tab)
        messages = sent.value.post_data_json["messages"]
        assert messages[0]["role"] == "user" and messages[-1]["content"] == f"{i}" * 9
        assert ("left out" in tab.text_content("#chat_error")) == (len(messages) < 2 * i + 1)
        lengths.append(len(chat.render(chat_tokenizer(), messages)))
    assert 128 - 60 < lengths[-1] <= 128 - 40 and tab.locator(".message").count() == 10  # all stay visible
    tab.fill("#message", "x" * 200)
    tab.unroute("**/v1/**")
    tab.press("#message", "Enter")
    wait_until_done(tab)
    assert "Shorten" in tab.text_content("#chat_error") and tab.evaluate("() => messagesToSend().length") > 3


@pytest.mark.slow
def test_empty_reply_is_kept_in_the_conversation(visit):
    tab = visit("chat")
    chunk = {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": "stop"}]}
    body = f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n"
    tab.route("**/v1/**", lambda route: route.fulfill(content_type="text/event-stream", body=body))
    tab.fill("#message", "Hi")
    tab.press("#message", "Enter")
    wait_until_done(tab)
    assert tab.evaluate("() => conversation.map(message => message.role)") == ["user", "assistant"]


@pytest.mark.slow
def test_choosing_an_alternative_regenerates_the_rest(visit):
    tab = visit("why")
    write(tab, "To be")
    before = token_ids(tab)
    assert len(before) == 12 and tab.locator("#why_tokens button").count() == 12
    tab.hover("#why_tokens button >> nth=4")
    found = choices(tab)
    assert {"id": before[4], "chosen": True} in found and len(found) >= 5
    other = next(choice["id"] for choice in found if not choice["chosen"])
    tab.click(f'#why_detail button[data-id="{other}"]')
    wait_until_done(tab)
    after = token_ids(tab)
    assert after[:5] == [*before[:4], other] and len(after) == 17
    probabilities = tab.evaluate("() => completion.tokens.map(token => Math.exp(token.logprob))")
    colours = tab.eval_on_selector_all(
        "#why_tokens button", "all => all.map(b => Number(b.style.getPropertyValue('--p')))"
    )
    assert colours == pytest.approx(probabilities, abs=1e-6)
    tab.click("#complete")
    text = tab.text_content("#complete_result")
    assert text.startswith("To be") and text == tab.evaluate("() => completion.text + completion.written")


@pytest.mark.slow
def test_alternative_beyond_the_block_size_is_continued_with_the_same_context(visit):
    tab = visit("why")
    tab.evaluate("() => { for (const [id, value] of [['max_tokens', 150], ['temperature', 0]]) $(id).value = value }")
    write(tab, "To be or not to be, that is the question.")
    before = token_ids(tab)
    tab.hover("#why_tokens button >> nth=110")
    tab.click("#why_detail button.mark")  # the same token, so the continuation must be the same
    wait_until_done(tab)
    after = token_ids(tab)
    assert after[:150] == before and len(after) == 261 and tab.evaluate("() => completion.chosen") == 110
    decoder = StreamDecoder(ByteTokenizer(), [])
    assert tab.evaluate("() => completion.written") == "".join(map(decoder.push, after))


@pytest.mark.slow
def test_failed_continuation_keeps_the_text(visit):
    tab = visit("why")
    write(tab, "To be")
    before = tab.evaluate("() => [completion, document.getElementById('why_tokens').textContent]")
    tab.route("**/v1/**", lambda route: route.abort())
    tab.hover("#why_tokens button >> nth=4")
    tab.click("#why_detail button:not(.mark)")
    wait_until_done(tab)
    assert "server" in tab.text_content("#complete_error")
    after = tab.evaluate("() => [completion, document.getElementById('why_tokens').textContent]")
    assert after[1] == before[1] and after[0] == before[0] | {"chosen": 4}


@pytest.mark.slow
def test_each_token_label_is_requested_once(visit):
    tab, named = visit("why"), []
    tab.on("request", lambda request: named.append(request.post_data_json) if request.url.endswith("tokens") else None)
    write(tab, "To be")
    assert [id for query in named for id in query.get("ids", [])] == token_ids(tab) and len(token_ids(tab)) == 12
    tab.hover("#why_tokens button >> nth=4")
    named.clear()
    tab.click("#why_detail button:not(.mark)")
    wait_until_done(tab)
    assert [id for query in named if "alternatives" in query for id in query["ids"]] == token_ids(tab)[5:]
    labels = inside.labels(ByteTokenizer(), token_ids(tab))
    assert tab.evaluate("() => completion.tokens.map(token => token.label)") == labels


@pytest.mark.slow
def test_language_follows_the_browser_locale_and_the_button(visit):
    tab = visit("inside", locale="zh-CN")
    assert tab.get_attribute("html", "lang") == "zh-CN" and tab.text_content("#chat") == "对话"
    tab.click("#look_now")  # the Chinese example
    tab.wait_for_selector(".lens")
    assert "注意力" in tab.text_content("#inside_result") and "…小" in tab.text_content("#inside_result")
    tab.click("#language")
    assert tab.get_attribute("html", "lang") == "en" and tab.text_content("#chat") == "Chat"
    assert "Attention" in tab.text_content("#inside_result")
    words = tab.text_content("body") + " ".join(
        tab.eval_on_selector_all("[aria-label]", "all => all.map(e => e.ariaLabel)")
    )
    assert "undefined" not in words and not re.search(
        r"[\u4e00-\u9fff]", tab.text_content("header").replace("中文", "")
    )


@pytest.mark.slow
def test_page_is_usable_with_the_keyboard_alone(visit):
    tab = visit("chat")
    tab.evaluate("() => { document.getElementById('max_tokens').value = 100 }")  # three seconds, enough to stop it

    def tab_to(selector: str) -> None:
        for _ in range(30):
            if tab.evaluate("selector => document.activeElement.matches(selector)", selector):
                return
            tab.keyboard.press("Tab")
        raise AssertionError(f"the Tab key does not reach {selector}")

    tab_to("#chat")
    tab.keyboard.press("ArrowRight")
    tab.keyboard.press("ArrowRight")
    assert tab.get_attribute("#why", "aria-selected") == "true"
    tab_to("#prompt")
    tab.keyboard.type("abc")
    tab_to("#go")
    tab.keyboard.press("Enter")
    tab_to("#complete_panel .stop")
    tab.wait_for_selector("#why_tokens button >> nth=2")
    tab.keyboard.press("Escape")
    wait_until_done(tab)
    before = token_ids(tab)
    assert 3 <= len(before) < 100
    tab.focus("#prompt")
    tab_to("#why_tokens button")
    tab.keyboard.press("ArrowRight")
    assert tab.evaluate("() => completion.chosen") == 1
    tab_to("#why_detail button:not(.mark)")
    other = tab.evaluate("() => Number(document.activeElement.dataset.id)")
    tab.keyboard.press("Enter")
    wait_until_done(tab)
    assert token_ids(tab)[:2] == [before[0], other]
    tab.click("#inside")
    tab_to("#text")
    tab.keyboard.type("Hello")
    tab_to("#look_now")
    tab.keyboard.press("Enter")
    tab.wait_for_selector(".lens")
    tab_to("#loss_row, .tokens button")
    tab.keyboard.press("Home")
    assert "first token" in tab.text_content("#inside_result .fact")
    tab_to("canvas")
    tab.keyboard.press("ArrowDown")
    tab.keyboard.press("ArrowRight")
    assert [tab.input_value("#layer_box"), tab.input_value("#head_box")] == ["1", "1"]


@pytest.mark.slow
def test_inside_view_shows_all_plots_and_errors(visit):
    tab = visit("inside")
    tab.fill("#text", "x" * 129)
    tab.click("#look_now")
    tab.wait_for_function("() => document.getElementById('inside_error').textContent.includes('129 tokens')")
    tab.fill("#text", TEXT)
    tab.click("#look_now")
    tab.wait_for_selector(".lens")
    assert tab.text_content("#inside_error") == "" and tab.locator("#inside_result b").count() == 0
    assert tab.locator(".lens tbody tr").count() == 3
    tab.click("#measure")
    tab.wait_for_selector("table.heads")
    assert tab.locator("table.heads tbody td").count() == 8
    tab.select_option("#layer_box", index=1)
    tab.click("#loss ~ .tokens button >> nth=3")
    share = tab.evaluate("() => attentionOf(insideData)(1, 0, 3, 2)")
    title = tab.get_attribute(".shaded button >> nth=2", "title")
    assert title == tab.evaluate("share => percent(share)", share)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_phone_layout_does_not_scroll_horizontally(visit, scheme):
    tab = visit("complete", width=390, height=800, color_scheme=scheme, has_touch=True)
    write(tab, "To be or not to be, that is the question. " * 2)
    tab.click("#look")
    tab.wait_for_selector(".lens")
    for view in ("chat", "complete", "why", "inside"):
        tab.click(f"#{view}")
        assert tab.evaluate("() => document.documentElement.scrollWidth") <= 390, view
    light = tab.evaluate("() => getComputedStyle(document.body).backgroundColor")
    channels = [int(n) for n in re.findall(r"\d+", light)][:3]
    assert (sum(channels) > 380) == (scheme == "light")


@pytest.mark.slow
def test_page_of_acorn_inspect_works_from_a_file(visit, model, tmp_path):
    values = inside.look_inside(model, ByteTokenizer(), list(TEXT.encode()))
    values["heads"] = inside.head_ablation(model, values["ids"]).tolist()
    pictures.write_page(values, "out/<b>run</b>", tmp_path / "index.html")
    tab = visit(url=f"file://{tmp_path}/index.html")
    tab.wait_for_selector("table.heads")
    assert "out/<b>run</b>" in tab.text_content("#made") and tab.locator("b").count() == 0
    assert tab.locator(".lens tbody tr").count() == 3 and tab.locator("canvas").count() == 2
    tab.click("#language")
    assert "注意力" in tab.text_content("body")


@pytest.mark.slow
def test_unreachable_server_is_reported(visit, address):
    tab = visit("complete")
    tab.route("**/v1/**", lambda route: route.abort())
    tab.fill("#prompt", "a")
    tab.click("#go")
    tab.wait_for_function("() => document.getElementById('complete_error').textContent.includes('server')")
    tab.unroute("**/v1/**")
    tab.click("#go")
    wait_until_done(tab)
    assert tab.text_content("#complete_error") == "" and len(token_ids(tab)) == 12


@pytest.mark.slow
@pytest.mark.parametrize("view", ["chat", "complete", "why", "inside"])
def test_every_view_asks_for_a_missing_api_key(browser, model, view):
    app = page_app(model, chat_tokenizer(), api_key="秘密")
    with serving(app) as url, browser.new_context(locale="en-US") as context:
        tab = context.new_page()
        tab.set_default_timeout(20_000)
        tab.goto(f"{url}#/{view}")
        tab.wait_for_selector("#page_error:has-text('Settings')")
        for key, error in (("wrong", "API key"), ("秘密", "")):
            tab.fill("#api_key", key)  # fails if the field is not visible
            tab.press("#api_key", "Tab")
            tab.wait_for_function("error => $('page_error').textContent.slice(4, 11) === error", arg=error)
        tab.wait_for_selector("#model:has-text('test')")
        assert tab.is_enabled("#send")
