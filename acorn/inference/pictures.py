"""Look inside a model while it reads a text, and write what it does as one HTML page and as pictures.

python -m acorn.inspect out/quickstart --text "ROMEO: I love thee." --out=inside
"""

import argparse
import functools
import json
import math
from pathlib import Path

import numpy as np
from tqdm import tqdm

from acorn import UserError, checkpoint, files, printable, visible
from acorn.data.tokenizer import Tokenizer
from acorn.distributed import runtime
from acorn.inference import inside
from acorn.inference.generate import encode_prompt
from acorn.report import fonts_for, import_pyplot, save_picture

PAGE = Path(__file__).parent / "page"
MOST_LABELS = 64  # tokens whose names fit at the edges of a picture


def write_page(data: dict, source: str, file: Path) -> None:
    """Write one HTML file that shows the values of `look_inside` and needs no other file."""
    style, words, drawing = (
        (PAGE / name).read_text(encoding="utf-8") for name in ("style.css", "words.js", "inside.js")
    )
    values = json.dumps({"data": data, "source": source}).replace("<", "\\u003c")  # </script> would end the script
    files.replace(
        file,
        f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>acorn</title>
<link rel="icon" href="data:,">
<style>
{style}</style>
<header><h1>acorn</h1><span class="model" id="source"></span>
<button type="button" id="language" data-t="other_language"></button></header>
<main><div id="inside_result"></div><p class="made" id="made"></p></main>
<script>
{words}
{drawing}
const {{ data, source }} = {values};
function draw() {{
  translate();
  document.getElementById("source").textContent = source;
  document.getElementById("made").textContent = t("made_by", {{ source }});
  showInside(document.getElementById("inside_result"), data);
}}
document.getElementById("language").addEventListener("click", () => {{
  language = language === "en" ? "zh" : "en";
  draw();
}});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
draw();
</script>
</html>
""",
    )


def write_pictures(data: dict, attention: np.ndarray, folder: Path) -> tuple[list[str], set[int]]:
    """Draw the values of `look_inside`, and the attention weights (L, H, T, T), into PNG files.

    Returns the names of the files, and the code points that no installed font has. Removes pictures of an earlier text.
    """
    words = {*data["tokens"], *(label for row in data["lens"] for _, label, _, _ in row)}
    families, missing = fonts_for("".join(words) + "␣")
    plt = import_pyplot()

    def name(label: str) -> str:
        """Return a label with visible spaces; characters that no font has become U+ and their number."""
        text = "".join(f"U+{ord(c):04X}" if ord(c) in missing else c for c in label)
        return f"{text:.14}".replace(" ", "␣") or "∅"

    tokens = [name(label) for label in data["tokens"]]
    with plt.rc_context({"font.family": families, "text.parse_math": False, "font.size": 9}):
        names = []

        def save(stem: str, figure) -> None:
            names.append(f"{stem}.png")
            save_picture(figure, folder / names[-1])

        save("loss", draw_losses(plt, tokens, data["loss"]))
        save("lens", draw_lens(plt, tokens, data, name))
        for layer, weights in enumerate(attention, 1):
            save(f"attention_{layer:02d}", draw_attention(plt, tokens, weights, layer))
        if "heads" in data:
            save("heads", draw_heads(plt, np.array(data["heads"])))
    for old in [*folder.glob("attention_[0-9]*.png"), folder / "heads.png"]:
        if old.name not in names:
            old.unlink(missing_ok=True)
    return names, missing


def draw_losses(plt, tokens: list[str], losses: list[float | None]):
    """Draw a bar for the loss of each token."""
    n = len(tokens)
    figure, axes = plt.subplots(figsize=(max(5, min(0.32 * n, 40)), 3.6), layout="constrained")
    values = [0 if loss is None else loss for loss in losses]
    axes.bar(range(n), values, color=plt.get_cmap("RdYlBu")([math.exp(-value) for value in values]))
    mean = sum(values) / (n - 1)
    axes.axhline(mean, color="0.4", lw=1, ls="--")
    axes.set_title(f"loss of each token; mean {mean:.3f} nats (dashed)", fontsize=10)
    axes.set(ylabel="loss (nats)", xlim=(-0.6, n - 0.4))
    axes.set_xticks(range(n), tokens, rotation=90)
    return figure


def draw_lens(plt, tokens: list[str], data: dict, name):
    """Draw a table: after each block (rows) and token (columns), the next token that the logit lens predicts."""
    p = np.array([[cell[2] for cell in row] for row in data["lens"]])  # (L + 1, T)
    rows, columns = p.shape
    widest = max(len(name(label)) for row in data["lens"] for _, label, _, _ in row)
    size = min((0.09 * widest + 0.25) * columns + 2, 60), min(0.26 * rows + 1.5, 40)
    figure, axes = plt.subplots(figsize=size, layout="constrained")
    image = axes.imshow(p, aspect="auto", cmap="Blues", vmin=0, vmax=1)
    for row, cells in enumerate(data["lens"]):
        for column, (token, label, value, _) in enumerate(cells):
            is_right = column + 1 < columns and token == data["ids"][column + 1]
            style = dict(color="white" if value > 0.6 else "black", weight="bold" if is_right else "normal")
            axes.text(column, row, name(label), ha="center", va="center", fontsize=7, **style)
    axes.set_xticks(range(columns), tokens, rotation=90)
    axes.set_yticks(range(rows), ["embedding", *(f"block {layer}" for layer in range(1, rows))])
    axes.set_title("logit lens: the next token after each block; bold: it is the real one", fontsize=10)
    figure.colorbar(image, label="probability", fraction=0.03)
    return figure


def draw_attention(plt, tokens: list[str], weights: np.ndarray, layer: int):
    """Draw the attention weights (H, T, T) of a layer, a square for each head."""
    H, T = weights.shape[:2]
    columns, step = min(4, H), T + max(2, T // 8)
    rows = math.ceil(H / columns)
    mosaic = np.full((rows * step, columns * step), np.nan)  # one image, because many panels are slow to lay out
    future = np.triu(np.ones((T, T), dtype=bool), 1)
    side = min(max(2.2, 0.13 * T), 6)  # inches
    figure, axes = plt.subplots(figsize=(side * columns + 1.2, side * rows + 1.2), layout="constrained")
    for head in range(H):
        top, left = head // columns * step, head % columns * step
        mosaic[top : top + T, left : left + T] = np.where(future, np.nan, weights[head] ** 0.5)
        axes.text(left + T / 2, top - 0.6, f"head {head + 1}", ha="center", va="bottom")
    axes.imshow(mosaic, cmap="Blues", vmin=-0.05, vmax=1)
    if T <= MOST_LABELS:
        axes.set_xticks([c * step + i for c in range(columns) for i in range(T)], tokens * columns, rotation=90)
        axes.set_yticks([r * step + i for r in range(rows) for i in range(T)], tokens * rows)
        axes.tick_params(length=0, labelsize=min(8, 72 * 0.8 * side / step))
    else:
        axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    axes.set_ylim(rows * step - (step - T), -step / 8 - 1)
    axes.set_title(f"attention, layer {layer}: row looks at column (square root of the weight)", fontsize=10)
    return figure


def draw_heads(plt, changes: np.ndarray):
    """Draw by how much the loss grows without each head: changes (L, H), in nats."""
    rows, columns = changes.shape
    figure, axes = plt.subplots(figsize=(0.5 * columns + 2.5, 0.36 * rows + 1.5), layout="constrained")
    most = max(float(np.abs(changes).max()), 1e-9)
    image = axes.imshow(changes, cmap="RdBu_r", vmin=-most, vmax=most, aspect="auto")
    axes.set_xticks(range(columns), range(1, columns + 1))
    axes.set_yticks(range(rows), range(1, rows + 1))
    axes.set(xlabel="head", ylabel="layer")
    axes.set_title("growth of the loss without a head (nats)", fontsize=10)
    figure.colorbar(image)
    return figure


def summary(data: dict) -> list[str]:
    """Return the lines to print: the mean loss, the least expected tokens, and the heads that matter most."""
    scored = [(loss, token) for loss, token in zip(data["loss"], data["tokens"], strict=True) if loss is not None]
    mean = sum(loss for loss, _ in scored) / len(scored)
    least = ", ".join(f"'{token}' ({loss:.1f})" for loss, token in sorted(scored, reverse=True)[:3])
    lines = [f"{len(data['ids'])} tokens, mean loss {mean:.4f} nats; least expected: {least}"]
    if "heads" in data:
        changes = [(change, f"{i}.{j}") for i, row in enumerate(data["heads"], 1) for j, change in enumerate(row, 1)]
        best = ", ".join(f"{place} ({change:+.3f})" for change, place in sorted(changes, reverse=True)[:3])
        lines.append(f"heads that matter most, as layer.head with the growth of the loss without it: {best}")
    return lines


def encode(tokenizer: Tokenizer, text: str, control: bool, source: str) -> list[int]:
    if not text:
        raise UserError("--text is empty. Give the text that the model should read.")
    try:
        return encode_prompt(tokenizer, text, control)
    except UserError as error:
        raise UserError(f"{source} cannot read the text: {error}") from error


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m acorn.inspect",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("source", help="an out_dir, a nanoGPT ckpt.pt, or any other value of init_from")
    parser.add_argument("--text", required=True, help="what the model reads, or FILE:text.txt")
    parser.add_argument("--out", default="inside", help="the folder to write; default: %(default)s")
    parser.add_argument(
        "--checkpoint", default="best", help="which one in an out_dir: best (default), latest, step_002000"
    )
    parser.add_argument(
        "--control_tokens", action="store_true", help="names such as <|im_end|> in the text are control tokens"
    )
    parser.add_argument("--no_ablation", action="store_true", help="skip the head ablation, the slowest part")
    parser.add_argument("--device", default="auto", help="auto | cpu | cuda | cuda:1 | mps")
    args = parser.parse_args()
    folder = Path(args.out)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {args.out} is a file. Give a folder.")
    text = files.read_text(args.text[5:]) if args.text.startswith("FILE:") else args.text

    dist = runtime.setup(args.device, "float32", False)
    model, tokenizer, source = checkpoint.load_with_tokenizer(args.source, args.checkpoint)
    ids = encode(tokenizer, text, args.control_tokens, source)
    inside.check_text(ids, min(tokenizer.n_vocab, model.config.vocab_size), model.config.block_size)
    model.to(dist.device).eval().requires_grad_(False)

    data = inside.look_inside(model, tokenizer, ids)
    attention = inside.look(model, ids).attention.cpu().numpy()
    if not args.no_ablation:
        bar = functools.partial(tqdm, desc="heads", unit="layer", leave=False, disable=None)
        rows = inside.head_ablation(model, ids, bar)
        data["heads"] = [[round(x, 6) for x in row] for row in rows.tolist()]
    files.make_folder(folder)
    write_page(data, visible(source), folder / "index.html")
    names, missing = write_pictures(data, attention, folder)
    for line in [source, *summary(data)]:
        print(printable(line))
    if missing:
        without = "".join(map(chr, sorted(missing)))
        print(
            f"note: no installed font has {without:.20}; the PNG files show U+ and its number. Install Noto Sans CJK."
        )
    print(printable(f"saved {folder / 'index.html'}, to open in a browser, and {len(names)} pictures beside it"))
    return 0
