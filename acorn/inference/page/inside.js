"use strict";
// Draws what `look_inside` (acorn/inference/inside.py) found: probabilities, attention, logit lens, heads.

/** Return the tokens as a row of buttons. `onChoose(i)` is called when one gets the focus. */
function tokenRow(data, name, onChoose) {
  const row = make("div", { className: "tokens", attributes: { role: "group", "aria-label": name } });
  data.tokens.forEach((label, i) => {
    const button = make("button", { type: "button", className: "token", tabIndex: -1, data: { i } }, word(label));
    button.addEventListener("focus", () => onChoose(i));
    button.addEventListener("click", () => onChoose(i));
    row.append(button);
    if (label.includes("⏎")) row.append(make("span", { className: "break" }));
  });
  arrowKeys(row);
  return row;
}

/** Colour a token by its probability: orange for 0, blue for 1, none where there is no probability. */
function colour(element, p) {
  element.classList.toggle("scored", p !== null);
  element.style.setProperty("--p", p ?? 0);
}

/** Return a list of tokens with a bar for each number from 0 to 1. */
function bars(pairs, format = percent) {
  const list = make("ol", { className: "bars" });
  for (const [label, value, mark] of pairs) {
    const bar = make("span", { className: "bar" });
    bar.style.setProperty("--p", value);
    const name = word(label, { className: "word" });
    list.append(make("li", { className: mark ? "mark" : "" }, name, bar, make("span", {}, format(value))));
  }
  return list;
}

/** Return a function (layer, head, query, key) -> attention weight from 0 to 1. */
function attentionOf(data) {
  const bytes = Uint8Array.from(atob(data.attention), (c) => c.charCodeAt(0));
  const n = data.tokens.length;
  const size = (n * (n + 1)) / 2;
  return (layer, head, i, j) => bytes[(layer * data.n_head + head) * size + (i * (i + 1)) / 2 + j] / 255;
}

/** Show everything in `root`. `measure`, if given, computes data.heads when the reader asks for it. */
function showInside(root, data, measure = null) {
  const weight = attentionOf(data);
  const state = (data.state ??= { token: data.tokens.length - 1, layer: 0, head: 0 });
  const scored = data.loss.filter((loss) => loss !== null);
  const mean = scored.reduce((a, b) => a + b, 0) / scored.length;
  const parts = [losses(), attention(), lens(), heads()];
  root.replaceChildren(...parts.map((part) => part.element));
  update();

  function section(name, help, ...children) {
    const title = make("h2", { id: name }, t(`${name}_title`));
    return make("section", { className: "card", attributes: { "aria-labelledby": name } }, title, make("p", { className: "help" }, help), ...children);
  }

  function update() {
    for (const part of parts) part.update();
    for (const button of root.querySelectorAll(".token")) {
      const chosen = Number(button.dataset.i) === state.token;
      button.classList.toggle("chosen", chosen);
      button.setAttribute("aria-pressed", chosen);
      button.tabIndex = chosen ? 0 : -1;
    }
  }

  function choose(changes) {
    if (Object.entries(changes).every(([name, value]) => state[name] === value)) return;
    Object.assign(state, changes);
    update();
  }

  function losses() {
    const probability = (i) => (data.loss[i] === null ? null : Math.exp(-data.loss[i]));
    const row = tokenRow(data, t("loss_title"), (token) => choose({ token }));
    row.querySelectorAll(".token").forEach((button, i) => colour(button, probability(i)));
    const detail = make("div", { className: "detail", attributes: { "aria-live": "polite" } });

    function update() {
      const i = state.token;
      const label = shown(data.tokens[i]);
      const head = i === 0 ? t("first_token") : t("token_detail", { token: label, percent: percent(probability(i)), loss: data.loss[i].toFixed(2) });
      const choices = (position) => bars(data.next[position].map(([id, label, p]) => [label, p, id === data.ids[position + 1]]));
      const column = (title, list) => make("div", {}, make("h3", {}, title), list);
      const own = data.ids.indexOf(data.ids[i]); // neighbours are listed in the order in which tokens first occur
      const rank = new Set(data.ids.slice(0, own)).size;
      detail.replaceChildren(
        make("p", { className: "fact" }, head),
        make(
          "div",
          { className: "columns" },
          ...(i > 0 ? [column(t("predicted_here"), choices(i - 1))] : []),
          column(t("predicted_next"), choices(i)),
          column(t("neighbours"), bars(data.neighbours[rank][1].map(([, label, s]) => [label, s]), (s) => s.toFixed(2))),
        ),
      );
    }
    return { element: section("loss", t("loss_help", { loss: mean.toFixed(3) }), legend(), row, detail), update };
  }

  function attention() {
    const select = (name, count) => {
      const options = Array.from({ length: count }, (_, i) => make("option", { value: i }, String(i + 1)));
      const box = make("select", { id: `${name}_box` }, ...options);
      box.addEventListener("change", () => choose({ [name]: Number(box.value) }));
      return box;
    };
    const layer = select("layer", data.n_layer);
    const head = select("head", data.n_head);
    const boxes = make("p", { className: "boxes" }, make("label", {}, t("layer"), " ", layer), make("label", {}, t("head"), " ", head));
    const all = headsMap(data, weight, state, choose);
    const one = headMap(data, weight, state, choose);
    const title = make("h3");
    const row = tokenRow(data, t("attention_title"), (token) => choose({ token }));
    row.classList.add("shaded");
    const paint = () => {
      for (const [j, button] of row.querySelectorAll(".token").entries()) {
        const p = j > state.token ? 0 : weight(state.layer, state.head, state.token, j);
        button.style.setProperty("--w", Math.sqrt(p));
        button.title = j > state.token ? "" : percent(p);
      }
    };
    const most = make("div", { className: "detail" });

    function update() {
      [layer.value, head.value] = [state.layer, state.head];
      title.textContent = t("looks_at", { token: shown(data.tokens[state.token]) });
      all.update();
      one.update();
      paint();
      const looks = data.tokens.slice(0, state.token + 1).map((label, j) => [label, weight(state.layer, state.head, state.token, j)]);
      most.replaceChildren(bars(looks.sort((a, b) => b[1] - a[1]).slice(0, 5)));
    }
    const maps = make("div", { className: "maps" }, all.element, make("div", { className: "one" }, boxes, one.element));
    return { element: section("attention", t("attention_help"), maps, title, row, most), update };
  }

  function lens() {
    const header = make("tr", {}, make("td"), ...data.tokens.map((label, i) => make("th", { scope: "col", data: { i } }, word(label))));
    const rows = data.lens.map((cells, layer) => {
      const name = layer === 0 ? t("embedding") : t("after_block", { layer });
      const row = make("tr", {}, make("th", { scope: "row" }, name));
      cells.forEach(([id, label, p, real], i) => {
        const right = i + 1 < data.tokens.length;
        const words = t("lens_cell", { token: shown(label), percent: percent(p), real: right ? percent(real) : "–" });
        const cell = make("td", { title: words, data: { i } }, word(label));
        cell.style.setProperty("--w", p);
        cell.classList.toggle("hit", id === data.ids[i + 1]);
        row.append(cell);
      });
      return row;
    });
    const table = make("table", { className: "lens" }, make("thead", {}, header), make("tbody", {}, ...rows));
    table.addEventListener("click", (event) => {
      const cell = event.target.closest("[data-i]");
      if (cell) choose({ token: Number(cell.dataset.i) });
    });
    const wrapper = make("div", { className: "scroll", tabIndex: 0, attributes: { role: "region", "aria-label": t("lens_title") } }, table);
    let shownToken = -1;
    function update() {
      if (shownToken === state.token) return;
      shownToken = state.token;
      for (const cell of table.querySelectorAll("[data-i]")) cell.classList.toggle("chosen", Number(cell.dataset.i) === state.token);
      const th = header.children[state.token + 1];
      const left = th.offsetLeft - header.children[0].offsetWidth;
      if (left < wrapper.scrollLeft || th.offsetLeft + th.offsetWidth > wrapper.scrollLeft + wrapper.clientWidth) wrapper.scrollLeft = left - 40;
    }
    return { element: section("lens", t("lens_help"), wrapper), update };
  }

  function heads() {
    const box = make("div");
    function draw() {
      const values = data.heads.flat();
      const most = Math.max(...values.map(Math.abs), 1e-9);
      const name = (i) => t("heads_cell", { layer: Math.floor(i / data.n_head) + 1, head: (i % data.n_head) + 1, change: signed(values[i]) });
      const go = (i) => choose({ layer: Math.floor(i / data.n_head), head: i % data.n_head });
      const rows = data.heads.map((row, layer) => {
        const cells = row.map((value, head) => {
          const i = layer * data.n_head + head;
          const cell = make("td", { title: name(i) });
          colour(cell, 0.5 - (0.5 * value) / most);
          cell.addEventListener("click", () => go(i));
          return cell;
        });
        return make("tr", {}, make("th", { scope: "row" }, `${t("layer")} ${layer + 1}`), ...cells);
      });
      const columns = data.heads[0].map((_, head) => make("th", { scope: "col" }, String(head + 1)));
      const table = make("table", { className: "heads" }, make("thead", {}, make("tr", {}, make("td"), ...columns)), make("tbody", {}, ...rows));
      const helpful = values.map((_, i) => i).filter((i) => values[i] > 0);
      const order = helpful.sort((a, b) => values[b] - values[a]).slice(0, 5);
      const list = make("ol", { className: "plain" });
      for (const i of order) {
        const button = make("button", { type: "button", className: "link" }, name(i));
        button.addEventListener("click", () => {
          go(i);
          document.getElementById("attention").scrollIntoView();
        });
        list.append(make("li", {}, button));
      }
      const scroll = make("div", { className: "scroll", tabIndex: 0, attributes: { role: "region", "aria-label": t("heads_title") } }, table);
      box.replaceChildren(make("div", { className: "columns" }, scroll, make("div", {}, make("h3", {}, t("most_helpful")), list)));
    }
    if (data.heads) draw();
    else if (measure) {
      const button = make("button", { type: "button", id: "measure" }, t("measure_heads"));
      const status = make("span", { className: "status", attributes: { role: "status" } });
      button.addEventListener("click", async () => {
        button.disabled = true;
        status.textContent = t("busy");
        try {
          data.heads = await measure();
          draw();
        } catch (error) {
          status.textContent = error.message;
          button.disabled = false;
        }
      });
      box.append(make("p", { className: "row" }, button, status));
    } else return { element: "", update() {} };
    return { element: section("heads", t("heads_help"), box), update() {} };
  }
}

function signed(value) {
  return (value > 0 ? "+" : "") + value.toFixed(Math.abs(value) >= 0.1 ? 2 : 4);
}

function legend() {
  return make("p", { className: "legend", attributes: { "aria-hidden": "true" } }, t("surprising"), make("span", { className: "scale" }), t("expected"));
}

/** Return a canvas of the given size in CSS pixels and its 2D context, sharp on screens with small pixels. */
function resize(canvas, width, height) {
  const ratio = window.devicePixelRatio || 1;
  Object.assign(canvas, { width: Math.round(width * ratio), height: Math.round(height * ratio) });
  Object.assign(canvas.style, { width: `${width}px`, height: `${height}px` });
  const context = canvas.getContext("2d");
  context.scale(ratio, ratio);
  return context;
}

function cssColour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

/** The small squares of all heads. Arrow keys and clicks choose one. */
function headsMap(data, weight, state, choose) {
  const canvas = make("canvas", { tabIndex: 0, className: "all_heads", attributes: { role: "img", "aria-label": t("heads_map") } });
  const room = Math.min(440, document.documentElement.clientWidth - 70);
  const gap = data.n_head > 16 ? 2 : 4;
  const size = Math.max(12, Math.min(52, Math.floor((room - 24) / data.n_head) - gap));
  const n = data.tokens.length;
  const pictures = [];
  for (let layer = 0; layer < data.n_layer; layer++) {
    for (let head = 0; head < data.n_head; head++) {
      const picture = make("canvas", { width: n, height: n });
      const context = picture.getContext("2d");
      const image = context.createImageData(n, n);
      for (let i = 0; i < n; i++) {
        for (let j = 0; j <= i; j++) image.data[4 * (i * n + j) + 3] = 255 * Math.sqrt(weight(layer, head, i, j));
      }
      context.putImageData(image, 0, 0);
      pictures.push(picture);
    }
  }

  function update() {
    const context = resize(canvas, 24 + data.n_head * (size + gap), 20 + data.n_layer * (size + gap));
    context.font = "11px system-ui, sans-serif";
    context.textAlign = "center";
    context.textBaseline = "middle";
    for (let head = 0; head < data.n_head; head++) {
      context.fillStyle = cssColour("--soft");
      if (size > 16 || head % 2 === 0) context.fillText(head + 1, 24 + head * (size + gap) + size / 2, 9);
    }
    pictures.forEach((picture, i) => {
      const [layer, head] = [Math.floor(i / data.n_head), i % data.n_head];
      const [x, y] = [24 + head * (size + gap), 20 + layer * (size + gap)];
      if (head === 0) {
        context.fillStyle = cssColour("--soft");
        context.fillText(layer + 1, 11, y + size / 2);
      }
      context.fillStyle = cssColour("--field");
      context.fillRect(x, y, size, size);
      context.globalCompositeOperation = "source-over";
      context.drawImage(tinted(picture), x, y, size, size);
      if (layer === state.layer && head === state.head) {
        context.strokeStyle = cssColour("--mark");
        context.lineWidth = 3;
        context.strokeRect(x - 0.5, y - 0.5, size + 1, size + 1);
      }
    });
  }

  canvas.addEventListener("click", (event) => {
    const head = Math.floor((event.offsetX - 24) / (size + gap));
    const layer = Math.floor((event.offsetY - 20) / (size + gap));
    if (head >= 0 && head < data.n_head && layer >= 0 && layer < data.n_layer) choose({ layer, head });
  });
  canvas.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    if (!move) return;
    event.preventDefault();
    const clamp = (value, count) => Math.min(count - 1, Math.max(0, value));
    choose({ layer: clamp(state.layer + move[0], data.n_layer), head: clamp(state.head + move[1], data.n_head) });
  });
  return { element: make("div", { className: "scroll all" }, canvas), update };
}

/** Return the picture with its black replaced by the accent colour. */
function tinted(picture) {
  const copy = make("canvas", { width: picture.width, height: picture.height });
  const context = copy.getContext("2d");
  context.drawImage(picture, 0, 0);
  context.globalCompositeOperation = "source-in";
  context.fillStyle = cssColour("--accent");
  context.fillRect(0, 0, copy.width, copy.height);
  return copy;
}

/** The square of the chosen head, with the tokens at its edges. A click chooses the token of a row. */
function headMap(data, weight, state, choose) {
  const canvas = make("canvas", { className: "one_head", attributes: { role: "img" } });
  const caption = make("p", { className: "caption", attributes: { "aria-live": "polite" } });
  const n = data.tokens.length;
  const room = Math.min(560, document.documentElement.clientWidth - 70);
  const edge = n > 64 ? 10 : room < 400 ? 56 : 84; // room for the names of tokens
  const cell = Math.max(n > 64 ? 3 : 11, Math.min(30, Math.floor((room - edge) / n)));
  const font = `${Math.max(9, Math.min(13, cell - 2))}px system-ui, sans-serif`;

  function update() {
    canvas.setAttribute("aria-label", t("head_map", { layer: state.layer + 1, head: state.head + 1 }));
    caption.textContent = t("head_map", { layer: state.layer + 1, head: state.head + 1 });
    const context = resize(canvas, edge + n * cell + 2, edge + n * cell + 2);
    context.font = font;
    context.textBaseline = "middle";
    const [accent, field, soft, mark, text] = ["--accent", "--field", "--soft", "--mark", "--text"].map(cssColour);
    for (let i = 0; i < n; i++) {
      for (let j = 0; j <= i; j++) {
        const [x, y] = [edge + j * cell, edge + i * cell];
        context.globalAlpha = 1;
        context.fillStyle = field;
        context.fillRect(x, y, cell - (cell > 5), cell - (cell > 5));
        context.globalAlpha = Math.sqrt(weight(state.layer, state.head, i, j));
        context.fillStyle = accent;
        context.fillRect(x, y, cell - (cell > 5), cell - (cell > 5));
      }
    }
    context.globalAlpha = 1;
    if (n <= 64) {
      for (let i = 0; i < n; i++) {
        context.fillStyle = i === state.token ? text : soft;
        context.textAlign = "right";
        context.fillText(shown(data.tokens[i]), edge - 6, edge + (i + 0.5) * cell, edge - 10);
        context.save();
        context.translate(edge + (i + 0.5) * cell, edge - 6);
        context.rotate(-Math.PI / 2);
        context.textAlign = "left";
        context.fillText(shown(data.tokens[i]), 0, 0, edge - 10);
        context.restore();
      }
    }
    context.strokeStyle = mark;
    context.lineWidth = 2;
    context.strokeRect(edge - 1, edge + state.token * cell - 1, (state.token + 1) * cell + 1, cell + 1);
  }

  const place = (event) => [Math.floor((event.offsetY - edge) / cell), Math.floor((event.offsetX - edge) / cell)];
  canvas.addEventListener("mousemove", (event) => {
    const [i, j] = place(event);
    const inside = i >= 0 && i < n && j >= 0 && j <= i;
    canvas.title = inside ? `${shown(data.tokens[i])} → ${shown(data.tokens[j])}: ${percent(weight(state.layer, state.head, i, j))}` : "";
  });
  canvas.addEventListener("click", (event) => {
    const [token] = place(event);
    if (token >= 0 && token < n) choose({ token });
  });
  return { element: make("div", {}, caption, make("div", { className: "scroll" }, canvas)), update };
}
