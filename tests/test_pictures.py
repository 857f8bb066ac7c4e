"""python -m acorn.inspect: the files that it writes, and the input that it refuses."""

import json
import re
import sys

import numpy as np
import pytest
import torch
from hf_models import ours, saved
from matplotlib import image

from acorn import UserError, checkpoint
from acorn.data.tokenizer_kinds import get_tokenizer
from acorn.inference import inside, pictures


def inspect(monkeypatch, *words) -> None:
    monkeypatch.setattr(sys, "argv", ["inspect", *map(str, words)])
    assert pictures.main() == 0


def values_of(page: str) -> dict:
    """Return the values that an index.html shows."""
    return json.loads(re.search(r"^const \{ data, source \} = (.*);$", page, re.M)[1])["data"]


def test_a_page_and_pictures_are_written(tmp_path, monkeypatch, capsys):
    run = saved(tmp_path / "run", ours(n_layer=1, n_head=2))
    out = tmp_path / "inside"
    out.mkdir()
    (out / "attention_07.png").touch()  # left by an earlier model with more layers
    (out / "attention_notes.png").touch()
    inspect(monkeypatch, run, "--text", "</script>你", f"--out={out}")
    files = {"attention_01.png", "attention_notes.png", "heads.png", "index.html", "lens.png", "loss.png"}
    assert {path.name for path in out.iterdir()} == files
    page = (out / "index.html").read_text(encoding="utf-8")
    assert page.count("</script>") == 1 and not re.search(r"https?://|src=", page)
    values = values_of(page)
    assert values["tokens"] == [*"</script>", "⟨E4⟩", "⟨BD⟩", "…你"]
    model, tokenizer, _ = checkpoint.load_model(str(run))
    assert values == inside.look_inside(model, tokenizer, values["ids"]) | {"heads": values["heads"]}
    assert np.allclose(values["heads"], inside.head_ablation(model, values["ids"]), atol=1e-5)
    mean = np.mean(values["loss"][1:])
    said = capsys.readouterr()
    assert f"12 tokens, mean loss {mean:.4f}" in said.out and "heads" not in said.err  # no bar outside a terminal
    for name in files - {"index.html", "attention_notes.png"}:
        picture = image.imread(out / name)
        assert min(picture.shape[:2]) > 150 and picture[..., :3].std() > 0.05  # not empty

    inspect(monkeypatch, run, "--text=ab", f"--out={out}", "--no_ablation")
    assert not (out / "heads.png").exists()
    assert "heads" not in values_of((out / "index.html").read_text(encoding="utf-8"))


def test_inspect_supports_nanogpt_checkpoints_and_control_tokens(tmp_path, monkeypatch):
    model = ours(vocab_size=50257, n_layer=1, n_embd=8)
    keys = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")
    arguments = {key: getattr(model.config, key) for key in keys}
    torch.save({"model": model.state_dict(), "model_args": arguments, "iter_num": 5}, tmp_path / "ckpt.pt")
    text = ["--text", "<|endoftext|>Hello world", "--no_ablation"]
    for control, first in (["--control_tokens"], "<|endoftext|>"), ([], "<"):
        inspect(monkeypatch, tmp_path / "ckpt.pt", *text, *control, f"--out={tmp_path / 'inside'}")
        assert values_of((tmp_path / "inside/index.html").read_text(encoding="utf-8"))["tokens"][0] == first


@pytest.mark.parametrize(
    "words, message",
    [
        (["--text="], "empty"),
        (["--text=a"], "1 tokens"),
        (["--text", "a" * 17], "17 tokens, but needs 2 to 16"),
        (["--text=FILE:none.txt"], "none.txt"),
        (["--text=ab", "--out=run/best"], "is a file"),
    ],
)
def test_invalid_input_is_refused_before_files_are_written(tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    saved(tmp_path / "run", ours(n_layer=1))
    with pytest.raises(UserError, match=message):
        inspect(monkeypatch, "run", *words)
    assert not (tmp_path / "inside").exists()


def test_the_error_names_a_character_outside_the_vocabulary(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    vocab_size = get_tokenizer("char", ["abc"]).n_vocab
    saved(tmp_path / "run", ours(n_layer=1, vocab_size=vocab_size), "char", ["abc"])
    with pytest.raises(UserError, match="'é'"):
        inspect(monkeypatch, "run", "--text=abé")
