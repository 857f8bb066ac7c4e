"use strict";
// The words of the page, in English and Chinese. {name} is replaced by a value.

const WORDS = {
  en: {
    other_language: "中文",
    chat: "Chat",
    complete: "Complete",
    why: "Why this token?",
    inside: "Inside",
    views: "Views",
    settings: "Settings",
    temperature: "Temperature",
    top_p: "Top p",
    max_tokens: "Most tokens",
    seed: "Seed",
    seed_random: "random",
    system: "System message",
    api_key: "API key (only if the server asks for one)",
    message: "Message",
    message_hint: "Write a message. Enter sends it, Shift+Enter starts a new line.",
    prompt: "Text to continue",
    prompt_hint: "Once upon a time",
    send: "Send",
    stop: "Stop",
    regenerate: "Regenerate",
    clear: "New conversation",
    copy: "Copy",
    copied: "Copied",
    go: "Continue the text",
    show_why: "Why these tokens?",
    look: "Look inside",
    you: "You",
    model: "Model",
    result: "Result",
    no_chat: "This model was not trained to chat. Use “Complete” instead.",
    chat_intro: "Say something to the model. It sees the whole conversation, and answers one token at a time.",
    dropped: "The conversation is longer than the model's context, so the oldest turns were left out.",
    why_intro:
      "Every token of the answer has a colour: blue was expected, orange was a surprise. Point at a token, or move with the arrow keys, to see what else the model considered. Choose an alternative to continue from it.",
    expected: "expected",
    surprising: "surprising",
    alternatives: "The model's choices at this place",
    chosen: "chosen",
    continue_with: "Continue with {token}, {percent}",
    nothing_yet: "Continue a text first.",
    inside_intro: "Paste a text to see how the model reads it: at most {n} tokens.",
    text: "Text",
    text_hint: "The cat sat on the mat because it was tired.",
    busy: "Working…",
    error_network: "The server does not answer. Is it still running?",
    error_key: "The API key is missing or wrong. Enter the server's key under “Settings”.",
    error_cut: "The server ended the answer early.",
    loss_title: "How well was each token predicted?",
    loss_help:
      "Blue tokens were expected, orange ones a surprise. The loss of a token is −ln of its probability; the mean loss of this text is {loss} nats per token. Choose a token: all pictures follow it.",
    first_token: "The first token has nothing before it, so the model does not predict it.",
    token_detail: "{token}: probability {percent}, loss {loss} nats",
    predicted_here: "Expected in its place",
    predicted_next: "Expected after it",
    neighbours: "Most similar embeddings",
    attention_title: "Attention: where does each token look?",
    attention_help:
      "Each small square is one head. In a square, row i shows how much token i looks at every token up to itself; darker is more. Choose a head.",
    layer: "Layer",
    head: "Head",
    heads_map: "All heads: one row per layer, one column per head. The arrow keys choose a head.",
    head_map: "Attention of layer {layer}, head {head}",
    looks_at: "In this head, {token} looks at:",
    lens_title: "Logit lens: what would the model say if it stopped here?",
    lens_help:
      "Each row reads the model after one more block, and shows the token it would predict next; the bottom row is the model's real answer. Stronger colour is a higher probability. A frame marks the token that really follows.",
    embedding: "embedding",
    after_block: "block {layer}",
    lens_cell: "{token} {percent}; the real next token: {real}",
    heads_title: "Which heads matter for this text?",
    heads_help:
      "The change of the mean loss when the output of one head is set to zero. Orange: the loss grows, so the head helps. Blue: the model does better without it.",
    measure_heads: "Measure",
    heads_cell: "layer {layer}, head {head}: {change} nats",
    most_helpful: "The heads that help most:",
    made_by: "Made by python -m acorn.inspect from {source}.",
  },
  zh: {
    other_language: "English",
    chat: "对话",
    complete: "续写",
    why: "为什么是这个词？",
    inside: "模型内部",
    views: "视图",
    settings: "设置",
    temperature: "温度",
    top_p: "Top p",
    max_tokens: "最多 token 数",
    seed: "随机种子",
    seed_random: "随机",
    system: "系统消息",
    api_key: "API 密钥（仅在服务器要求时填写）",
    message: "消息",
    message_hint: "写一条消息。回车发送，Shift+回车换行。",
    prompt: "要续写的文本",
    prompt_hint: "从前有座山，",
    send: "发送",
    stop: "停止",
    regenerate: "重新生成",
    clear: "新对话",
    copy: "复制",
    copied: "已复制",
    go: "续写",
    show_why: "为什么是这些词？",
    look: "查看内部",
    you: "你",
    model: "模型",
    result: "结果",
    no_chat: "这个模型没有经过对话训练，请使用“续写”。",
    chat_intro: "对模型说点什么吧。它能看到整个对话，每次生成一个 token。",
    dropped: "对话超过了模型的上下文长度，最早的几轮已被省略。",
    why_intro:
      "回答中的每个 token 都有颜色：蓝色表示在模型意料之中，橙色表示出乎意料。把鼠标移到一个 token 上，或用方向键移动，可以看到模型考虑过的其他选择。点一个选择，就从那里继续。",
    expected: "意料之中",
    surprising: "出乎意料",
    alternatives: "模型在这里的选择",
    chosen: "已选",
    continue_with: "改用 {token} 继续，概率 {percent}",
    nothing_yet: "请先续写一段文本。",
    inside_intro: "粘贴一段文本，看看模型怎样阅读它：最多 {n} 个 token。",
    text: "文本",
    text_hint: "小猫坐在垫子上，因为它累了。",
    busy: "正在计算……",
    error_network: "服务器没有回应。它还在运行吗？",
    error_key: "缺少 API 密钥，或密钥不正确。请在“设置”中输入服务器的密钥。",
    error_cut: "服务器提前结束了回答。",
    loss_title: "每个 token 预测得有多准？",
    loss_help:
      "蓝色的 token 在意料之中，橙色的出乎意料。一个 token 的损失是其概率的负对数（−ln）；这段文本的平均损失是每个 token {loss} nat。选一个 token，所有的图都会随之变化。",
    first_token: "第一个 token 之前没有内容，所以模型不预测它。",
    token_detail: "{token}：概率 {percent}，损失 {loss} nat",
    predicted_here: "模型认为这里应该是",
    predicted_next: "模型认为后面会是",
    neighbours: "嵌入向量最相近的 token",
    attention_title: "注意力：每个 token 在看哪里？",
    attention_help:
      "每个小方块是一个注意力头。方块的第 i 行表示第 i 个 token 对它自己以及之前每个 token 的关注程度，颜色越深，关注越多。请选一个头。",
    layer: "层",
    head: "头",
    heads_map: "所有的头：每行一层，每列一个头。用方向键选择。",
    head_map: "第 {layer} 层第 {head} 头的注意力",
    looks_at: "在这个头里，{token} 关注的是：",
    lens_title: "Logit lens：如果模型停在这一层，会说什么？",
    lens_help:
      "每往下一行，模型多算一个块；格子里是它此时预测的下一个 token，最下面一行是模型真正的输出。颜色越深，概率越高。带框的格子就是真正的下一个 token。",
    embedding: "嵌入",
    after_block: "第 {layer} 块",
    lens_cell: "{token} {percent}；真正的下一个 token：{real}",
    heads_title: "哪些头对这段文本重要？",
    heads_help:
      "把一个头的输出设为零时，平均损失的变化。橙色：损失变大，说明这个头有帮助；蓝色：没有它反而更好。",
    measure_heads: "测量",
    heads_cell: "第 {layer} 层第 {head} 头：{change} nat",
    most_helpful: "帮助最大的头：",
    made_by: "由 python -m acorn.inspect 根据 {source} 生成。",
  },
};

let language = /^zh/i.test(navigator.language) ? "zh" : "en";

/** Return a text in the chosen language, with {name} replaced by values[name]. */
function t(key, values = {}) {
  return WORDS[language][key].replace(/\{(\w+)\}/g, (_, name) => values[name]);
}

/** Make an element. `properties` are assigned; a child is an element or a string, which is shown as plain text. */
function make(tag, properties = {}, ...children) {
  const { data = {}, attributes = {}, ...rest } = properties;
  const element = Object.assign(document.createElement(tag), rest);
  Object.assign(element.dataset, data);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/** Write the words of every element below `root` that names them: data-t (text), data-t-hint, data-t-label. */
function translate(root = document) {
  document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
  for (const element of root.querySelectorAll("[data-t]")) element.textContent = t(element.dataset.t);
  for (const element of root.querySelectorAll("[data-t-hint]")) element.placeholder = t(element.dataset.tHint);
  for (const element of root.querySelectorAll("[data-t-label]"))
    element.setAttribute("aria-label", t(element.dataset.tLabel));
}

/** Format a probability: 97%, 3.1%, 0.02%. */
function percent(p) {
  const value = 100 * p;
  if (value > 0 && value < 0.01) return "<0.01%";
  return `${value.toFixed(value >= 10 ? 0 : value >= 1 ? 1 : 2)}%`;
}

/** A token as people see it: spaces at its ends are visible. */
function shown(label) {
  return label.replace(/^ | $/g, "␣") || "∅";
}

/** Return an element with a token's text, in which the marks of spaces and line breaks are faint. */
function word(label, properties = {}) {
  const parts = shown(label).split(/([␣⏎]+)/);
  return make("span", properties, ...parts.map((part, i) => (i % 2 ? make("span", { className: "space" }, part) : part)));
}

/** Let the arrow keys, Home and End move the focus among the buttons of `list`, which is one stop of the Tab key. */
function arrowKeys(list) {
  list.addEventListener("keydown", (event) => {
    const buttons = [...list.querySelectorAll("button")];
    const at = buttons.indexOf(document.activeElement);
    const next = { ArrowRight: at + 1, ArrowLeft: at - 1, ArrowDown: at + 1, ArrowUp: at - 1 };
    Object.assign(next, { Home: 0, End: buttons.length - 1 });
    if (!(event.key in next) || at < 0) return;
    event.preventDefault();
    focusOnly(buttons[Math.min(buttons.length - 1, Math.max(0, next[event.key]))], buttons);
  });
}

function focusOnly(button, buttons) {
  for (const other of buttons) other.tabIndex = other === button ? 0 : -1;
  button.focus();
}
