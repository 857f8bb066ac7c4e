"use strict";
// The page: chat, complete, why this token, inside. All text of the model is shown as plain text, never as HTML.

const $ = (id) => document.getElementById(id);
const VIEWS = ["chat", "complete", "why", "inside"];
const N_TOP = 5; // alternatives per token
const CHAR_TOKENS = 4; // the most tokens that a character spans: it has at most 4 bytes

let view = "complete";
let model = null; // the response of GET inside; null after a failure: the next action asks again
let running = null; // the AbortController of the answer that is being written
const conversation = []; // messages: {role, content}
let dropped = 0; // the oldest of them, which the model no longer sees
const completion = { ids: [], text: "", ends: [], tokens: [], written: "", chosen: -1 }; // ids, text: of the prompt
let drawn = { tokens: [], buttons: [] }; // the tokens of the completion that have buttons
let insideIds = null; // ids to look at instead of the text, until the reader edits it
let insideData = null;

// -------------------- the server

class ServerError extends Error {}

/** Send a request with the API key. Return the response. Throw ServerError with the server's message, or with a hint
 * if the API key is missing or wrong. */
async function request(path, options = {}) {
  const headers = { ...options.headers };
  // fetch accepts only Latin-1 in headers: one character per UTF-8 byte
  const key = new TextEncoder().encode($("api_key").value);
  if (key.length) headers.Authorization = `Bearer ${String.fromCharCode(...key)}`;
  let answer;
  try {
    answer = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError(t("error_network"));
  }
  if (answer.ok) return answer;
  const problem = await answer.json().catch(() => ({}));
  const error = new ServerError(problem.error?.message ?? `${answer.status} ${answer.statusText}`);
  error.code = problem.error?.code;
  if (error.code === "invalid_api_key") {
    error.message = t("error_key");
    $("settings").open = true;
  }
  throw error;
}

function post(path, body, signal) {
  const headers = { "Content-Type": "application/json" };
  return request(path, { method: "POST", headers, body: JSON.stringify(body), signal });
}

async function ask(path, body, signal) {
  return (await post(path, body, signal)).json();
}

/** Yield the objects of a stream of server-sent events. */
async function* stream(path, body, signal) {
  const answer = await post(path, { ...body, stream: true }, signal);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) throw new ServerError(t("error_cut"));
      buffer += value;
      const events = buffer.split(/\r?\n\r?\n/);
      buffer = events.pop();
      for (const event of events) {
        const data = event.split(/\r?\n/).filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trim()).join("\n");
        if (data === "[DONE]") return;
        if (!data) continue;
        const chunk = JSON.parse(data);
        if (chunk.error) throw new ServerError(chunk.error.message);
        yield chunk;
      }
    }
  } catch (error) {
    throw error instanceof TypeError ? new ServerError(t("error_network")) : error; // the connection broke
  } finally {
    reader.cancel().catch(() => {});
  }
}

function settings() {
  const chosen = { model: model?.name ?? "" };
  for (const name of ["temperature", "top_p", "max_tokens", "seed"]) {
    if ($(name).value !== "") chosen[name] = Number($(name).value);
  }
  return chosen;
}

/** Run `work(signal)`, which Stop interrupts. Errors are shown in the element `place`. */
async function run(place, work) {
  if (running) return;
  running = new AbortController();
  place.textContent = "";
  enable();
  try {
    if (!model) await connect();
    if (model) await work(running.signal);
  } catch (error) {
    if (error.name !== "AbortError") place.textContent = error.message;
    if (!(error instanceof ServerError) && error.name !== "AbortError") throw error; // a fault of this page
  } finally {
    running = null;
    enable();
  }
}

/** Enable the buttons that can do something now. */
function enable() {
  const replies = conversation.some((message) => message.role === "assistant");
  const tokens = completion.tokens.length > 0;
  const ready = { send: model?.chat, message: model?.chat, chat_again: replies, clear: conversation.length > 0 };
  Object.assign(ready, { go: true, again: tokens, copy: tokens, show_why: tokens, look: tokens, look_now: true });
  for (const [id, possible] of Object.entries(ready)) $(id).disabled = !possible || (running !== null && id !== "message");
  // these buttons of a reply ask the server
  for (const button of $("messages").querySelectorAll("[data-t=show_why], [data-t=look]")) button.disabled = running !== null;
  for (const stop of document.querySelectorAll(".stop")) stop.disabled = running === null;
  $("show_why").hidden = view === "why";
}

async function copy(button, text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // without HTTPS, browsers offer the clipboard only on this machine; select the text, so that Ctrl+C works
    const area = make("textarea", { value: text });
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  button.textContent = t("copied");
  setTimeout(() => (button.textContent = t("copy")), 1500);
}

// -------------------- chat

function drawMessage(message) {
  const words = make("div", { className: "words" }, message.content);
  const box = make("article", { className: `message ${message.role}` });
  box.append(make("div", { className: "who", data: { t: message.role === "user" ? "you" : "model" } }), words);
  if (message.role === "assistant") {
    const buttons = make("div", { className: "row" });
    const button = (key, action) => {
      const made = make("button", { type: "button", data: { t: key } });
      made.addEventListener("click", () => action(made));
      buttons.append(made);
    };
    button("copy", (made) => copy(made, message.content));
    button("show_why", () => explain(message));
    button("look", () => lookAtReply(message));
    box.append(buttons);
  }
  translate(box);
  $("messages").append(box);
  enable();
  return [box, words];
}

function drawConversation() {
  $("messages").replaceChildren();
  conversation.forEach(drawMessage);
}

/** The messages to send, with the system message in front. */
function messagesToSend() {
  const system = $("system").value.trim();
  const said = conversation.slice(dropped).map(({ role, content }) => ({ role, content }));
  return system ? [{ role: "system", content: system }, ...said] : said;
}

/** Return the messages to send. Drop the oldest turns until the reply has room, as `fit_conversation` does. */
async function fitConversation(signal) {
  const asked = Number($("max_tokens").value) || Infinity;
  const room = Math.min(asked, Math.floor(model.block_size / 2));
  for (;;) {
    const messages = messagesToSend();
    const { ids } = await ask("inside/tokens", { messages }, signal);
    if (ids.length + room <= model.block_size || conversation.length < dropped + 3) return messages;
    dropped += 2; // a message and its reply
    $("chat_error").textContent = t("dropped");
  }
}

/** Ask for a reply to the conversation. `undo` is called if nothing arrives: after an error, or after Stop. */
async function reply(undo) {
  const message = { role: "assistant", content: "", asked: [], tokens: [] };
  const body = { ...settings(), logprobs: true, top_logprobs: N_TOP, return_tokens_as_token_ids: true };
  const before = dropped;
  let box = null;
  await run($("chat_error"), async (signal) => {
    try {
      message.asked = await fitConversation(signal);
      for await (const chunk of stream("v1/chat/completions", { ...body, messages: message.asked }, signal)) {
        const choice = chunk.choices[0];
        if (!choice) continue;
        if (!box) {
          conversation.push(message);
          box = drawMessage(message);
          box[0].classList.add("writing");
        }
        message.tokens.push(...tokensOfChat(choice.logprobs?.content ?? []));
        message.content += choice.delta.content ?? "";
        box[1].textContent = message.content;
        if (atBottom()) window.scrollTo(0, document.body.scrollHeight);
      }
    } finally {
      box?.[0].classList.remove("writing");
      if (!box) {
        dropped = before;
        undo();
        drawConversation();
      }
    }
  });
}

function atBottom() {
  return window.innerHeight + window.scrollY > document.body.scrollHeight - 160;
}

function send() {
  const content = $("message").value.trim();
  if (!content || running || !model?.chat) return;
  $("message").value = "";
  conversation.push({ role: "user", content });
  drawMessage(conversation.at(-1));
  window.scrollTo(0, document.body.scrollHeight);
  reply(() => {
    conversation.pop();
    const typed = $("message").value; // while the page waited
    $("message").value = typed ? `${content}\n${typed}` : content;
  });
}

function replyAgain() {
  const old = [];
  while (conversation.at(-1)?.role === "assistant") old.unshift(conversation.pop());
  drawConversation();
  reply(() => conversation.push(...old));
}

/** Show the tokens of a reply under "Why this token?". */
async function explain(message) {
  await run($("chat_error"), async () => {
    const { ids, text, ends } = await ask("inside/tokens", { messages: message.asked });
    await nameTokens(ids, message.tokens);
    Object.assign(completion, { ids, text, ends, tokens: message.tokens, written: message.content, chosen: -1 });
  });
  if ($("chat_error").textContent) return;
  $("prompt").value = completion.text;
  choose("why");
}

async function lookAtReply(message) {
  let ids = null;
  await run($("chat_error"), async () => {
    ({ ids } = await ask("inside/tokens", { messages: message.asked }));
  });
  if (ids) lookAt([...ids, ...idsOf(message.tokens)]);
}

// -------------------- complete, and why

const idOf = (name) => Number(name.replace("token_id:", ""));

/** Return the tokens in the "logprobs" of a chat completion: {id, logprob, top: [[id, logprob], ...]}. */
function tokensOfChat(content) {
  return content.map(({ token, logprob, top_logprobs }) => {
    return { id: idOf(token), logprob, top: top_logprobs.map((other) => [idOf(other.token), other.logprob]) };
  });
}

/** Return the same for a completion. */
function tokensOf(logprobs) {
  return logprobs.tokens.map((name, i) => ({
    id: idOf(name),
    logprob: logprobs.token_logprobs[i],
    top: Object.entries(logprobs.top_logprobs?.[i] ?? {}).map(([other, logprob]) => [idOf(other), logprob]),
  }));
}

const idsOf = (tokens) => tokens.map((token) => token.id);

/** Ask for the labels of the tokens that have none yet, and of their alternatives. `ids`: of the prompt. */
async function nameTokens(ids, tokens) {
  let first = tokens.length;
  while (first && tokens[first - 1].label === undefined) first -= 1;
  const unnamed = tokens.slice(first);
  if (!unnamed.length) return;
  // the last of them may begin a character
  const before = [...ids.slice(-CHAR_TOKENS), ...idsOf(tokens.slice(Math.max(0, first - CHAR_TOKENS), first))];
  const alternatives = unnamed.map((token) => token.top.map(([id]) => id));
  const names = await ask("inside/tokens", { before, ids: idsOf(unnamed), alternatives });
  unnamed.forEach((token, i) => Object.assign(token, { label: names.tokens[i], names: names.alternatives[i] }));
}

/** Return the last ids that fit into the model's block, as `context` in generate.py does. */
function contextOf(ids) {
  const stride = Math.max(1, Math.floor(model.block_size / 2));
  return ids.slice(stride * Math.max(0, Math.ceil((ids.length - model.block_size) / stride)));
}

/** Continue the prompt, or with `kept` tokens, continue after these. If nothing arrives, the old text stays. */
async function continueText(kept = []) {
  await run($("complete_error"), async (signal) => {
    const text = kept.length ? completion.text : $("prompt").value;
    const known = text === completion.text && completion.ids.length; // such as the ids of a conversation
    const { ids, ends } = known ? completion : await ask("inside/tokens", { text });
    const query = { before: ids.slice(-CHAR_TOKENS), ids: idsOf(kept) };
    const written = kept.length ? (await ask("inside/tokens", query)).text : "";
    const old = { ...completion };
    const tokens = [...kept];
    Object.assign(completion, { ids, text, ends, tokens, written, chosen: -1 });
    drawCompletion(true);
    const prompt = kept.length ? contextOf([...ids, ...idsOf(kept)]) : ids;
    const body = { ...settings(), prompt, stop_token_ids: ends, logprobs: N_TOP, return_tokens_as_token_ids: true };
    const nameAndDraw = () => nameTokens(ids, tokens).then(() => drawCompletion(running !== null));
    let naming = null;
    try {
      for await (const chunk of stream("v1/completions", body, signal)) {
        const choice = chunk.choices[0];
        if (!choice) continue;
        completion.written += choice.text;
        if (choice.logprobs) tokens.push(...tokensOf(choice.logprobs));
        drawCompletion(true);
        // the call after the stream reports errors
        naming ??= nameAndDraw().catch(() => {}).finally(() => (naming = null));
      }
    } catch (error) {
      if (tokens.length === kept.length) Object.assign(completion, old);
      throw error;
    } finally {
      drawCompletion(false);
      await naming;
      await nameTokens(ids, tokens);
      if (kept.length && completion.tokens === tokens) completion.chosen = kept.length - 1;
      drawCompletion(false);
    }
  });
}

function drawCompletion(writing) {
  const { text, written, tokens } = completion;
  $("complete_result").replaceChildren(make("span", { className: "given" }, text), make("span", {}, written));
  $("plain_result").classList.toggle("writing", writing);
  const row = $("why_tokens");
  if (drawn.tokens !== tokens) {
    drawn = { tokens, buttons: [] };
    row.replaceChildren();
    $("why_prompt").textContent = text;
    $("why_prompt").scrollTop = $("why_prompt").scrollHeight;
  }
  for (let i = drawn.buttons.length; tokens[i]?.label !== undefined; i++) {
    const { label, logprob } = tokens[i];
    const button = make("button", { type: "button", className: "token", tabIndex: i ? -1 : 0, data: { i } }, word(label));
    button.setAttribute("aria-label", `${shown(label)} ${percent(Math.exp(logprob))}`);
    colour(button, Math.exp(logprob));
    button.addEventListener("mouseenter", () => running || showChoices(i));
    button.addEventListener("focus", () => running || showChoices(i));
    drawn.buttons.push(button);
    row.append(button);
    if (label.includes("⏎")) row.append(make("span", { className: "break" }));
  }
  showChoices(completion.chosen);
}

/** Show the alternatives to token i. */
function showChoices(i) {
  completion.chosen = i;
  $("why_tokens").querySelector(".chosen")?.classList.remove("chosen");
  if (drawn.buttons[i]) {
    drawn.buttons[i].classList.add("chosen");
    drawn.buttons.forEach((button, k) => (button.tabIndex = k === i ? 0 : -1));
  }
  const token = completion.tokens[i];
  const detail = $("why_detail");
  if (!token?.names) {
    detail.replaceChildren(completion.tokens.length ? "" : t("nothing_yet"));
    return;
  }
  const choices = token.top.map(([id, logprob], k) => [id, token.names[k], logprob]);
  if (!choices.some(([id]) => id === token.id)) choices.push([token.id, token.label, token.logprob]);
  choices.sort((a, b) => b[2] - a[2]);
  const list = make("ul", { className: "alternatives" });
  for (const [id, label, logprob] of choices) {
    const p = Math.exp(logprob);
    const bar = make("span", { className: "bar" });
    bar.style.setProperty("--p", p);
    const chosen = id === token.id;
    const button = make("button", { type: "button", className: chosen ? "mark" : "", data: { id } }, word(label, { className: "word" }), bar, make("span", {}, percent(p)));
    button.setAttribute("aria-label", t("continue_with", { token: shown(label), percent: percent(p) }));
    if (chosen) button.setAttribute("aria-current", "true");
    button.addEventListener("click", () => continueText([...completion.tokens.slice(0, i), { ...token, id, logprob, label }]));
    list.append(make("li", {}, button));
  }
  detail.replaceChildren(make("h3", {}, t("alternatives")), list);
}

// -------------------- inside

/** Show the Inside view for tokens, or for the last ones if there are too many. */
async function lookAt(ids) {
  insideIds = ids.slice(-model.most_tokens);
  choose("inside");
  await run($("inside_error"), async () => {
    $("text").value = (await ask("inside/tokens", { ids: insideIds })).text;
  });
  look();
}

async function look() {
  const asked = insideIds ? { ids: insideIds } : { text: $("text").value || t("text_hint") };
  if (!insideIds) $("text").value = asked.text;
  $("inside_status").textContent = t("busy");
  await run($("inside_error"), async () => {
    insideData = await ask("inside", asked);
    insideData.measure = async () => (await ask("inside/heads", { ids: insideData.ids })).heads;
    drawInside();
  });
  $("inside_status").textContent = "";
}

function drawInside() {
  if (insideData) showInside($("inside_result"), insideData, insideData.measure);
}

// -------------------- views and language

function choose(name) {
  view = name;
  for (const tab of VIEWS) {
    $(tab).setAttribute("aria-selected", tab === name);
    $(tab).tabIndex = tab === name ? 0 : -1;
  }
  const panel = $(name).getAttribute("aria-controls");
  for (const each of document.querySelectorAll("[role=tabpanel]")) each.hidden = each.id !== panel;
  $("complete_panel").setAttribute("aria-labelledby", name === "why" ? "why" : "complete");
  $("plain_result").hidden = name !== "complete";
  $("why_result").hidden = name !== "why";
  for (const label of document.querySelectorAll(".sampling")) label.hidden = name === "inside";
  $("system_label").hidden = name !== "chat";
  if (name === "complete" || name === "why") drawCompletion(running !== null);
  history.replaceState(null, "", `#/${name}`);
  enable();
}

function speak(chosen) {
  language = chosen;
  translate();
  $("chat_intro").textContent = t(model && !model.chat ? "no_chat" : "chat_intro");
  $("inside_intro").textContent = t("inside_intro", { n: model?.most_tokens ?? "" });
  $("why_legend").replaceChildren(legend());
  showChoices(completion.chosen);
  drawInside();
}

function start() {
  for (const tab of VIEWS) $(tab).addEventListener("click", () => choose(tab));
  document.querySelector("[role=tablist]").addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    choose(VIEWS.at((VIEWS.indexOf(view) + step) % VIEWS.length));
    $(view).focus();
  });
  $("language").addEventListener("click", () => speak(language === "en" ? "zh" : "en"));
  for (const stop of document.querySelectorAll(".stop")) stop.addEventListener("click", () => running?.abort());
  document.addEventListener("keydown", (event) => event.key === "Escape" && running?.abort());
  document.querySelector(".settings").addEventListener("submit", (event) => event.preventDefault());

  const submit = (form, action) =>
    $(form).addEventListener("submit", (event) => {
      event.preventDefault();
      action();
    });
  submit("chat_form", send);
  submit("complete_form", () => continueText());
  submit("inside_form", look);
  $("message").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return; // an input method uses Enter too
    event.preventDefault();
    send();
  });
  $("chat_again").addEventListener("click", replyAgain);
  $("clear").addEventListener("click", () => {
    conversation.length = dropped = 0;
    drawConversation();
    enable();
  });
  $("again").addEventListener("click", () => continueText());
  $("copy").addEventListener("click", () => copy($("copy"), completion.text + completion.written));
  $("show_why").addEventListener("click", () => choose("why"));
  $("look").addEventListener("click", () => lookAt([...completion.ids, ...idsOf(completion.tokens)]));
  $("text").addEventListener("input", () => (insideIds = null));
  arrowKeys($("why_tokens"));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawInside);
  $("api_key").addEventListener("change", connect);

  const named = VIEWS.find((name) => location.hash === `#/${name}`);
  speak(language);
  choose(named ?? view);
  connect().then(() => named || choose(model?.chat ? "chat" : "complete"));
}

/** Ask the server about its model. */
async function connect() {
  try {
    model = await (await request("inside")).json();
    $("page_error").textContent = "";
  } catch (error) {
    $("page_error").textContent = error instanceof ServerError ? error.message : t("error_network");
    return;
  }
  $("model").textContent = $("model").title = model.name;
  speak(language);
  enable();
}

start();
