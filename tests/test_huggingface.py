"""acorn/checkpoint/huggingface.py: tiny random transformers models load with the same logits."""

import json

import pytest
import torch
from helpers import TEXT
from hf_models import (
    as_minimind,
    assert_same_logits,
    ours,
    put_bos_first,
    saved,
    theirs,
    tokens,
    transformers,
    write_tokenizer,
)
from published_models import PAGE, REFUSED, SUPPORTED, page
from safetensors.torch import load_file, save_file

from acorn import UserError, checkpoint, hub
from acorn.checkpoint import huggingface
from acorn.checkpoint.huggingface import load_tokenizer
from acorn.data import chat
from acorn.data.records import Conversation
from acorn.data.tokenizer import tokenizer_hash
from acorn.data.tokenizer_kinds import get_tokenizer
from acorn.inference.generate import encode_prompt
from prepare.__main__ import tokenizer_of as prepare_tokenizer_of


def test_a_hugging_face_folder_is_loaded(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=50257, n_positions=16, n_embd=8, n_layer=1, n_head=2)
    ).eval()
    theirs.save_pretrained(tmp_path)
    loaded, tokenizer, _ = checkpoint.load_model(str(tmp_path))
    idx = torch.tensor([[1, 2, 50256]])
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(idx, idx)[0], theirs(idx).logits)
    assert tokenizer.kind == "gpt2"


@pytest.mark.parametrize(
    "family, changes",
    [
        ("gpt2", {}),
        ("gpt2", dict(tie_word_embeddings=False, n_inner=40, activation_function="gelu", layer_norm_epsilon=1e-2)),
        ("llama", {}),
        ("llama", dict(tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 70.0})),
    ],
)
def test_imported_models_match_transformers_logits_and_loss(tmp_path, family, changes):
    model = theirs(family, **changes)
    model.save_pretrained(tmp_path)
    mine, tokenizer, _ = checkpoint.load_model(str(tmp_path))
    assert_same_logits(mine, model)
    with torch.no_grad():
        loss = mine(tokens()[:, :-1], tokens()[:, 1:])[1]
        assert loss.item() == pytest.approx(model(tokens(), labels=tokens()).loss.item(), rel=1e-5)
    assert tokenizer is None and mine.config.block_size == 16


@pytest.mark.parametrize("row", SUPPORTED, ids=lambda row: f"{row.kind}-{'-'.join(row.changes)}")
def test_supported_models_load_and_export_with_the_same_logits(tmp_path, row):
    model = theirs(row.kind, **row.changes)
    model.save_pretrained(tmp_path / "in")
    if row.kind == "MiniMind":
        as_minimind(tmp_path / "in")
    mine, _, _ = checkpoint.load_model(str(tmp_path / "in"))
    assert_same_logits(mine, model)
    hub.export(str(tmp_path / "in"), tmp_path / "out")
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert exported.config.model_type == (row.exported or row.kind.lower())
    assert_same_logits(mine, exported)
    assert checkpoint.load_model(str(tmp_path / "out"))[0].config == mine.config


@pytest.mark.parametrize("row", REFUSED, ids=lambda row: row.models)
def test_unsupported_models_are_refused_with_the_config_field(tmp_path, row):
    kind = {"gpt2": "GPT2", "smollm3": "SmolLM3"}.get(row.config.get("model_type"), "llama")
    theirs(kind).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | row.config))
    with pytest.raises(UserError, match="not support") as caught:
        checkpoint.load_model(str(tmp_path))
    assert row.words in str(caught.value)


def test_the_page_of_published_models_is_up_to_date():
    assert PAGE.read_text(encoding="utf-8") == page(), "run python tests/published_models.py"


@pytest.mark.parametrize("family", ["gpt2", "llama", "Qwen2", "Gemma"])
def test_weights_can_be_read_by_row_range(tmp_path, family):
    theirs(family).save_pretrained(tmp_path)
    model, values, _ = huggingface.open_model(str(tmp_path))
    assert all(p.is_meta for p in model.parameters())
    for name, p in checkpoint.load_model(str(tmp_path))[0].named_parameters():
        for rows in (slice(0, 7), slice(30, 45), slice(7, len(p))):
            assert torch.equal(values[name][rows], p[rows]), name


def test_checkpoint_format_variants_load(tmp_path):
    """Load sharded bfloat16 weights with a config.json from transformers 4, and the format of the published gpt2: names
    without the prefix, and stored masks."""
    model = theirs("llama").bfloat16()
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    config = json.loads((tmp_path / "shards" / "config.json").read_text())
    config["rope_theta"], config["rope_scaling"] = 500.0, None
    model.config.rope_parameters = {"rope_type": "default", "rope_theta": 500.0}
    del config["rope_parameters"], config["num_key_value_heads"], config["head_dim"]
    config["num_key_value_heads"] = 2
    (tmp_path / "shards" / "config.json").write_text(json.dumps(config))
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 2
    other = transformers.LlamaForCausalLM(model.config)  # RoPE frequencies are computed by the constructor
    other.load_state_dict(model.state_dict())
    assert_same_logits(checkpoint.load_model(str(tmp_path / "shards"))[0], other)

    model = theirs("gpt2")
    model.save_pretrained(tmp_path / "bare")
    path = tmp_path / "bare" / "model.safetensors"
    tensors = {name.removeprefix("transformer."): t for name, t in load_file(path).items()}
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 16, 16)
    save_file(tensors, path)
    assert_same_logits(checkpoint.load_model(str(tmp_path / "bare"))[0], model)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_tied_weights_can_be_stored_only_as_lm_head(tmp_path, family):
    model = theirs(family, tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    name = {"gpt2": "transformer.wte.weight", "llama": "model.embed_tokens.weight"}[family]
    tensors = load_file(path)
    tensors["lm_head.weight"] = tensors.pop(name)
    save_file(tensors, path)
    assert_same_logits(checkpoint.load_model(str(tmp_path))[0], model)


def test_swish_is_an_alias_of_silu(tmp_path):
    model = theirs("llama", hidden_act="swish")
    model.save_pretrained(tmp_path)
    assert_same_logits(checkpoint.load_model(str(tmp_path))[0], model)


@pytest.mark.parametrize("inside", [{}, {"original_max_position_embeddings": 16}])
def test_the_original_context_can_be_outside_the_rope_parameters(tmp_path, inside):
    theirs("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    rope = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, rope_theta=100.0)
    config["rope_parameters"] = rope | inside
    (tmp_path / "config.json").write_text(json.dumps(config | {"original_max_position_embeddings": 4}))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert_same_logits(checkpoint.load_model(str(tmp_path))[0], model)


def test_yarn_without_a_factor_uses_the_ratio_of_the_contexts(tmp_path):
    theirs("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    rope = dict(rope_type="yarn", factor=None, original_max_position_embeddings=16, rope_theta=100.0)
    (tmp_path / "config.json").write_text(json.dumps(config | {"rope_parameters": rope}))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert_same_logits(checkpoint.load_model(str(tmp_path))[0], model)


def test_end_tokens_survive_import_saving_and_export(tmp_path):
    """A run's checkpoint stores the end tokens with its tokenizer."""
    theirs("llama", vocab_size=262).save_pretrained(tmp_path / "base")
    write_tokenizer(tmp_path / "base")
    assert checkpoint.load_model(str(tmp_path / "base"))[1].ends == {259, 261}  # not 2, the default in transformers
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps({"eos_token_id": [200, 201]}))
    model, tokenizer, _ = checkpoint.load_model(str(tmp_path / "base"))
    assert tokenizer.ends == {200, 201, 259, 261}
    writer = checkpoint.Writer(tmp_path / "out", keep=1)
    writer.save(model, [], {"settings": {}, "tokenizer": tokenizer.to_dict(), "step": 1})
    assert writer.wait()
    hub.export(str(tmp_path / "out"), tmp_path / "hf")
    written = json.loads((tmp_path / "hf" / "generation_config.json").read_text())["eos_token_id"]
    assert written[0] == 261 and set(written) == {200, 201, 259, 261}
    assert checkpoint.load_model(str(tmp_path / "hf"))[1].ends == tokenizer.ends
    (tmp_path / "hf" / "generation_config.json").write_text(json.dumps({"eos_token_id": 99}))
    assert 99 in checkpoint.load_model(str(tmp_path / "hf"))[1].ends


def test_exports_keep_pad_and_unk_tokens_and_can_pad_batches(tmp_path):
    theirs("llama", vocab_size=262).save_pretrained(tmp_path / "base")
    write_tokenizer(tmp_path / "base")
    settings = json.loads((tmp_path / "base" / "tokenizer_config.json").read_text())
    named = {"pad_token": {"content": "<|im_start|>"}, "unk_token": "the"}
    (tmp_path / "base" / "tokenizer_config.json").write_text(json.dumps(settings | named))
    hub.export(str(tmp_path / "base"), tmp_path / "hf")
    fast = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert (fast.pad_token, fast.unk_token, len(fast)) == ("<|im_start|>", "the", 262)
    for kind in ("byte", "gpt2"):
        saved(tmp_path / kind, ours(vocab_size=50257 if kind == "gpt2" else 257), kind)
        hub.export(str(tmp_path / kind), tmp_path / f"{kind}-hf")
        fast = transformers.AutoTokenizer.from_pretrained(tmp_path / f"{kind}-hf")
        batch = fast(["a", "a longer one"], padding=True)
        assert fast.pad_token == fast.unk_token == "<|endoftext|>" and len(fast) == get_tokenizer(kind).n_vocab
        assert len(batch["input_ids"][0]) == len(batch["input_ids"][1]) and batch["attention_mask"][0][-1] == 0


def test_exports_keep_the_bos_token(tmp_path):
    theirs("llama", vocab_size=262).save_pretrained(tmp_path / "base")
    write_tokenizer(tmp_path / "base")
    put_bos_first(tmp_path / "base")
    hub.export(str(tmp_path / "base"), tmp_path / "hf")
    _, tokenizer, _ = checkpoint.load_model(str(tmp_path / "base"))
    for folder in ("base", "hf"):
        fast = transformers.AutoTokenizer.from_pretrained(tmp_path / folder)
        assert (
            fast("the one")["input_ids"] == encode_prompt(tokenizer, "the one") != tokenizer.encode("the one").tolist()
        )


@pytest.mark.parametrize("kind", ["byte", "gpt2", "bpe:340"])
def test_tokenizer_kind_and_hash_survive_resaving_by_transformers(tmp_path, capsys, kind):
    vocab_size = get_tokenizer(kind, [TEXT]).n_vocab
    hub.export(str(saved(tmp_path / "out", ours(vocab_size=vocab_size), kind, [TEXT])), tmp_path / "hf")
    before = load_tokenizer(str(tmp_path / "hf"))
    assert "note" not in capsys.readouterr().err
    fast = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    fast.chat_template = "{{ messages[0].content }}"
    fast.save_pretrained(tmp_path / "hf")
    after = load_tokenizer(str(tmp_path / "hf"))
    assert "changed since the export" in capsys.readouterr().err
    assert (after.kind, tokenizer_hash(after)) == (before.kind, tokenizer_hash(before))
    assert after.chat_template == fast.chat_template and before.chat_template is None


@pytest.mark.parametrize("change", ["tokens", "template", "eos", "jinja", "everything"])
def test_tokenizer_changes_made_in_transformers_are_loaded(tmp_path, capsys, change):
    theirs("llama", vocab_size=262).save_pretrained(tmp_path / "base")
    write_tokenizer(tmp_path / "base")
    hub.export(str(tmp_path / "base"), tmp_path / "hf")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    fast = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    if change in ("tokens", "everything"):
        fast.add_tokens(["<tool>"], special_tokens=True)
        model.resize_token_embeddings(len(fast))
    if change in ("template", "everything"):
        fast.chat_template = "NEW {{ messages[0].content }}"
    if change in ("eos", "everything"):
        fast.eos_token = "<|endoftext|>"
    if change == "jinja":
        (tmp_path / "hf" / "chat_template.jinja").write_text("NEW {{ messages[0].content }}")
        fast = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    else:
        model.save_pretrained(tmp_path / "hf")
        fast.save_pretrained(tmp_path / "hf")
    tokenizer = checkpoint.load_model(str(tmp_path / "hf"))[1]
    assert "changed since the export; using tokenizer.json" in capsys.readouterr().err
    text = "the <tool><|im_end|> one"
    assert tokenizer.n_vocab == len(fast) and tokenizer.eos == fast.eos_token
    assert tokenizer.encode(text).tolist() == fast(text, split_special_tokens=True)["input_ids"]
    assert tokenizer.encode_part(text, False, control=True).tolist() == fast(text)["input_ids"]
    messages = [{"role": "user", "content": "Hi"}]
    expected = fast.apply_chat_template(messages, tokenize=False)
    assert tokenizer.decode(chat.render(tokenizer, Conversation(messages, {}))) == expected


def test_an_export_without_hashes_keeps_its_own_tokenizer(tmp_path, capsys):
    """Older versions wrote no hashes. A char tokenizer with hashes is kept too, because it has no other format."""
    for kind in ("bpe:340", "char"):
        folder, tokenizer = tmp_path / f"hf-{kind[:3]}", get_tokenizer(kind, [TEXT])
        hub.export(str(saved(tmp_path / kind[:3], ours(vocab_size=tokenizer.n_vocab), kind, [TEXT])), folder)
        if kind != "char":
            own = json.loads((folder / "acorn_tokenizer.json").read_text())
            assert own.pop("files").keys() == {"tokenizer.json", "tokenizer_config.json"}
            (folder / "acorn_tokenizer.json").write_text(json.dumps(own))
        transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
        capsys.readouterr()
        assert tokenizer_hash(load_tokenizer(str(folder))) == tokenizer_hash(tokenizer)
        assert ("using acorn_tokenizer.json" in capsys.readouterr().err) == (kind == "char")


def test_invalid_checkpoints_are_refused_with_the_reason(tmp_path):
    source = tmp_path / "source"
    theirs("llama").save_pretrained(source)
    config = json.loads((source / "config.json").read_text())
    tensors = load_file(source / "model.safetensors")
    up = "model.layers.0.mlp.up_proj.weight"
    case = tmp_path / "case"
    case.mkdir()

    def said(config, tensors=tensors) -> str:
        (case / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
        save_file(tensors, case / "model.safetensors")
        with pytest.raises(UserError) as caught:
            checkpoint.load_model(str(case))
        return str(caught.value)

    for changes, words in (
        (dict(model_type=["llama"]), "['llama']"),
        (dict(sliding_window=8), "sliding_window"),
        (dict(hidden_act="gelu"), "hidden_act = gelu"),
        (dict(quantization_config={"bits": 4}), "quantized"),
        (dict(hidden_size="wide"), "expected int, got str"),
        (dict(num_attention_heads=0), "does not describe a llama model"),
        (dict(num_hidden_layers=4), "lacks 9 tensors, model.layers.3."),
        (dict(num_hidden_layers=2), "has 9 tensors, model.layers.2."),
        (dict(intermediate_size=47), "[48, 32], but its config.json says [47, 32]"),
        (dict(tie_word_embeddings=True), "a separate head"),
    ):
        assert words in said(config | changes), changes
    headless = {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"}
    assert "has no head (lm_head.weight), so it cannot predict tokens" in said(config, headless)
    assert "valid JSON" in said("{")
    assert "I8, and quantized" in said(config, tensors | {up: tensors[up].to(torch.int8)})
    path = case / "model.safetensors"
    (case / "config.json").write_text(json.dumps(config))
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(UserError, match="incomplete or damaged"):
        checkpoint.load_model(str(case))
    path.rename(case / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"no model.safetensors.* pickle .* python -c"):
        checkpoint.load_model(str(case))
    (case / "model.gguf").write_bytes(b"GGUF")
    for name, words in (
        ("pytorch_model.bin", "one file of a checkpoint"),
        ("config.json", "one file of a checkpoint"),
        ("model.gguf", "does not read"),
    ):
        with pytest.raises(UserError, match=words):
            checkpoint.load_model(str(case / name))
    (case / "model.safetensors.index.json").write_text('{"weight_map": {"x": "model-00001-of-00002.safetensors"}}')
    with pytest.raises(UserError, match=r"model-00001-of-00002.safetensors is missing"):
        checkpoint.load_model(str(case))
    (case / "model.safetensors.index.json").write_text('{"weight_map": {"x": "../source/model.safetensors"}}')
    with pytest.raises(UserError, match="not in its folder"):
        checkpoint.load_model(str(case))
    (case / "config.json").unlink()
    save_file(tensors, case / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"without their config\.json"):
        checkpoint.load_model(str(case))
    (case / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"peft.*merge_and_unload"):
        checkpoint.load_model(str(case))


def test_hub_downloads_and_hub_errors(tmp_path, monkeypatch):
    import huggingface_hub
    from huggingface_hub import errors

    monkeypatch.chdir(tmp_path)
    theirs("gpt2").save_pretrained("copy")
    asked, answers = [], [None]

    def download(name, allow_patterns):
        assert huggingface_hub.utils.are_progress_bars_disabled()  # because stderr is not a terminal
        asked.append((name, allow_patterns))
        if answers[-1]:
            raise answers[-1]
        return "copy"

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    for name in ("gpt2-xl", "distilgpt2", "owner/some-model.1"):
        model, _, source = checkpoint.load_model(name)
        assert model.config.n_layer == 3 and name in source
    assert [name for name, _ in asked] == ["gpt2-xl", "distilgpt2", "owner/some-model.1"]
    assert not any("bin" in pattern for pattern in asked[0][1])

    response = errors.Response(403, request="GET")
    for answer, words in (
        (errors.GatedRepoError("no", response=response), "is gated"),
        (errors.RepositoryNotFoundError("no", response=response), "no such model"),
        (errors.HfHubHTTPError("no", response=response), "cannot be reached"),
        (errors.LocalEntryNotFoundError("no"), "cannot be reached.*HF_ENDPOINT"),
    ):
        answers.append(answer)
        with pytest.raises(UserError, match=f"owner/model.*{words}|{words}.*owner/model"):
            checkpoint.load_model("owner/model")
    (tmp_path / "out").mkdir()
    for slip in ("out/quikstart", "./nowhere", "nowhere"):
        with pytest.raises(UserError, match="there is no folder"):
            checkpoint.load_model(slip)
    assert len(asked) == 7  # no mistyped path was looked up on the hub

    answers.append(None)
    write_tokenizer(tmp_path / "copy")
    assert prepare_tokenizer_of("owner/model").n_vocab == 262 and "model.safetensors" not in asked[-1][1]
