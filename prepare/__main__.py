"""Turn text into token shards: python prepare CORPUS [options]"""

import argparse
import difflib
import importlib
import importlib.util
import json
import os
import shlex
import sys
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if not __package__:  # run as `python prepare`: sys.path[0] is this folder, but imports start at its parent
    sys.path[0] = str(ROOT)

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy's idle threads would compete with the tokenizer's

import acorn  # noqa: E402
from acorn import UserError, files, printable, settings  # noqa: E402
from acorn.data.corpora import corpora  # noqa: E402
from acorn.data.shards import SHARD_TOKENS, load_dataset  # noqa: E402
from acorn.data.tokenizer import Tokenizer  # noqa: E402
from acorn.data.tokenizer_json import add_tokens, is_hf, load_hf  # noqa: E402
from acorn.data.tokenizer_kinds import KINDS, bpe_options, from_dict, get_tokenizer  # noqa: E402
from prepare import pipeline  # noqa: E402

# options of every corpus; meta.json records all other options, so that the text can be read again
OPTIONS = (
    "corpus tokenizer digits reserve new_tokens val_fraction val_by val_tokens name out shard_tokens overwrite".split()
)
CONFIG_BLOCK_SIZE = {"config/dpo_style.py": 128, "config/finetune_chat.py": 256}  # as in these files


def main() -> int:
    try:
        prepare_corpus(sys.argv[1:])
    except KeyboardInterrupt:
        return 130
    return 0


def prepare_corpus(argv: list[str]) -> None:
    if argv and not argv[0].startswith("-") and argv[0] not in (*corpora(), "inspect"):
        raise UserError(_unknown_corpus(argv[0]))
    modules, broken = {}, {}
    if argv and argv[0] in corpora():
        modules[argv[0]] = load_corpus(argv[0])
    elif not argv or argv[0] != "inspect":  # load all, for the help
        for name in corpora():
            try:
                modules[name] = load_corpus(name)
            except UserError as error:
                broken[name] = str(error)
    args, unknown = _parser(modules, broken).parse_known_args(argv)
    if unknown:
        options = [f"--{name}" for name in vars(args)]
        near = difflib.get_close_matches(unknown[0].split("=")[0].replace("-", "_").replace("__", "--"), options, 1)
        hint = f"did you mean {near[0]}?" if near else f"`python prepare {args.corpus} --help` lists the options"
        if not unknown[0].startswith("-"):
            hint = "put all files together, before the options"
        raise UserError(f"prepare {args.corpus} does not accept {unknown[0]}; {hint}")

    if args.corpus == "inspect":
        from prepare import inspection

        inspection.inspect(args)
        return
    corpus = modules[args.corpus]
    name = args.name or (corpus.default_name(args) if hasattr(corpus, "default_name") else args.corpus)
    if name in (".", "..") or os.path.basename(name) != name:
        raise UserError(f"the name '{name}' is a path. Use a plain --name, and choose the folder with --out DIR.")
    if set(name) & set(",:\n\r\0"):  # these have a meaning in the names of mixtures
        raise UserError(f"the name {name!r} contains a comma, a colon or a line break. Choose another --name.")
    out = Path(args.out) if args.out else Path("data") / name
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file, not a folder. Choose another folder with --out.")
    if (out / "meta.json").exists() and not args.overwrite:  # checked before a download or a long read
        raise UserError(f"{out} already holds a dataset. Use --overwrite to replace it, or another --name.")

    description = _first_line(corpus)
    arguments = {option: value for option, value in vars(args).items() if option not in OPTIONS}
    source = {"corpus": args.corpus, "description": description, "arguments": arguments}
    tokenizer = tokenizer_of(args.tokenizer)
    if args.digits or args.reserve:
        tokenizer = with_bpe_options(tokenizer, args.digits, args.reserve)
    if args.new_tokens:
        tokenizer = with_new_tokens(tokenizer, args.new_tokens)
    if hasattr(corpus, "prepare"):  # a corpus that does not consist of documents
        meta = corpus.prepare(args, out, name=name, tokenizer=tokenizer, source=source)
        print(printable(summary(meta, out, str(out) if args.out else name, args.tokenizer)))
        return
    meta = pipeline.prepare(
        corpus.documents(args),
        out,
        name=name,
        tokenizer=tokenizer,
        source=source,
        val_by=args.val_by,
        val_fraction=args.val_fraction,
        val_tokens=args.val_tokens,
        max_tokens=getattr(args, "max_tokens", None),
        shard_tokens=args.shard_tokens,
        overwrite=args.overwrite,
    )
    print(printable(summary(meta, out, str(out) if args.out else name, args.tokenizer)))


def load_corpus(name: str) -> types.ModuleType:
    """Import the module of a corpus. Raises UserError, with its file and line, if it fails or lacks a part."""
    spec = importlib.util.find_spec(f"prepare.{name}")
    file = Path(spec.origin) if spec and spec.origin else ROOT / "prepare" / f"{name}.py"
    where = f"prepare/{file.name}"
    try:
        corpus = importlib.import_module(f"prepare.{name}")
    except (Exception, SystemExit) as error:
        line = settings.line_of(error, file)
        reason = f"{type(error).__name__}: {error.msg if isinstance(error, SyntaxError) else error}"
        raise UserError(f"{where}{f', line {line}' if line else ''} cannot be imported: {reason}") from error
    parts = {
        "a docstring": (corpus.__doc__ or "").strip(),
        "TOKENIZER (a name, such as 'gpt2')": isinstance(getattr(corpus, "TOKENIZER", None), str),
        "documents(args)": callable(getattr(corpus, "documents", getattr(corpus, "prepare", None))),
    }
    if missing := [part for part, present in parts.items() if not present]:
        raise UserError(f"{where} lacks {' and '.join(missing)}. prepare/__init__.py describes the parts of a corpus.")
    try:
        _parser({name: corpus})
    except Exception as error:
        line = settings.line_of(error, file)
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{where}{f', line {line}' if line else ''}: add_arguments fails: {reason}") from error
    return corpus


def tokenizer_of(name: str) -> str | Tokenizer:
    """Return the name of a kind of tokenizer unchanged; otherwise load the tokenizer of a Hugging Face checkpoint, a
    tokenizer.json, a dataset, or a run's newest checkpoint."""
    if name == "bpe" and not Path(name).exists():
        raise UserError("--tokenizer bpe lacks the size of its vocabulary. Add it, such as --tokenizer bpe:8192.")
    if name.startswith("bpe:"):
        bpe_options(name)  # checked before a long read
    if name in KINDS or name.startswith("bpe:"):
        return name
    states = _states(name)
    if (Path(name) / "config.json").exists() or not Path(name).exists():
        from acorn import checkpoint  # imported here because it imports torch
        from acorn.checkpoint import huggingface

        published = (Path(name) / "config.json").exists() or checkpoint.is_on_hub(name)
        if published and (tokenizer := huggingface.load_tokenizer(name)) is not None:
            return tokenizer
    if is_hf(name):
        return load_hf(name)
    if Path(name).is_file():  # a nanoGPT checkpoint
        from acorn import checkpoint

        if (tokenizer := checkpoint.open_model(name).tokenizer) is not None:
            return tokenizer
    try:
        if states:
            return from_dict(files.read_json(states[-1])["tokenizer"])
        return load_dataset(name).tokenizer
    except (UserError, OSError, ValueError, KeyError, TypeError) as error:
        near = difflib.get_close_matches(name, KINDS, 1)
        raise UserError(
            f"--tokenizer {name} is neither {', '.join(KINDS)} or bpe:8192, nor a tokenizer.json, nor a dataset, nor "
            f"the out_dir of a run with a checkpoint.{f' Did you mean {near[0]}?' if near else ''}"
        ) from error


def _states(source: str) -> list[Path]:
    """Return the state.json files of the checkpoints in an out_dir, the newest last, or of a step folder."""
    states = sorted(Path(source).glob("step_*/state.json"), key=lambda path: (len(path.parent.name), path))
    state_file = Path(source) / "state.json"
    return [state_file] if state_file.is_file() else states


def _is_run(source: str) -> bool:
    """Whether `source` is an out_dir or a step folder with a checkpoint, or a ckpt.pt."""
    return bool(_states(source)) or Path(source).suffix == ".pt"


def _block_size(source: str) -> int:
    """Return the block_size of a run from its out_dir, step folder or ckpt.pt."""
    from acorn import checkpoint

    return checkpoint.open_model(source).model.config.block_size


def with_bpe_options(tokenizer: str | Tokenizer, digits: int, reserve: int) -> str:
    """Return the spec of a BPE to train, with these options. Raises UserError for another kind of tokenizer."""
    if not isinstance(tokenizer, str) or not tokenizer.startswith("bpe:"):
        option = "--digits" if digits else "--reserve"
        raise UserError(
            f"{option} applies only to a tokenizer that is trained. Use --tokenizer bpe:8192, or leave it out."
        )
    spec = f"{tokenizer}:{digits}:{reserve}"
    bpe_options(spec)
    return spec


def with_new_tokens(tokenizer: str | Tokenizer, names: list[str]) -> Tokenizer:
    """Return the tokenizer with new control tokens. Raises UserError for a kind that cannot be extended."""
    if tokenizer == "gpt2":
        tokenizer = get_tokenizer("gpt2")
    if isinstance(tokenizer, str):
        raise UserError(
            f"--new_tokens cannot be added to --tokenizer {tokenizer}. Use gpt2, or the tokenizer of a checkpoint or "
            "of a dataset prepared with bpe:8192."
        )
    return add_tokens(tokenizer, names)


def summary(meta: dict, out: Path, dataset: str, tokenizer: str) -> str:
    """Return what `prepare` prints at the end: counts, and a command that trains on the dataset."""
    train, val = meta["train"], meta["val"]
    tokens, size = train["tokens"] + val["tokens"], train["bytes"] + val["bytes"]
    kind = meta["tokenizer"]["kind"]
    if dataset == "shakespeare_char" and kind == "char":
        command = "python train.py config/train_shakespeare_char.py"
    elif dataset == "plays" and kind == "char":
        command = "python train.py config/quickstart.py"
    elif dataset == "poems" and kind == "char":
        command = "python train.py config/poems.py"
    else:
        command = _training_command(meta, dataset, tokenizer)
    chat = []
    if "chat" in meta:
        learned = train["learned"] + val["learned"]
        chat.append(f"learned          {learned:,} tokens ({learned / tokens:.1%}): the replies")
        cut, left_out = meta["chat"]["cut"], meta["chat"]["left_out"]
        chat.append(f"too long         {cut:,} shortened (oldest turns or the reply's end); {left_out:,} left out")
    if "preferences" in meta:
        chat.append(f"pairs            {meta['preferences']['pairs']:,}, the longest of {meta['longest']:,} tokens")
    chat += losses(meta)
    return "\n".join(
        [
            f"documents        {meta['documents']:,}",
            f"bytes            {size:,}",
            f"tokens           {tokens:,} ({train['tokens']:,} train, {val['tokens']:,} val)",
            *chat,
            f"bytes per token  {size / tokens:.2f} ({val['bytes'] / val['tokens']:.2f} on val)",
            f"vocabulary       {meta['vocab_size']:,} ({kind})",
            f"written to       {out}",
            f"train next       {command}",
        ]
    )


def _training_command(meta: dict, dataset: str, tokenizer: str) -> str:
    """Return the command that trains on the dataset.

    `tokenizer` is the value of --tokenizer; if it names a checkpoint, training starts from it. Preferences need a
    model: if `tokenizer` names a dataset, that is the model in out/DATASET, which the command trains first if it does
    not exist. With a new tokenizer, the command also prepares conversations for this model, from FILES."""
    is_hub_name = meta["tokenizer"]["kind"] == "hf" and "/" in tokenizer and not Path(tokenizer).exists()
    is_published = is_hub_name or (Path(tokenizer) / "config.json").exists()
    init_from, first_command = tokenizer if is_published or _is_run(tokenizer) else "", ""
    if "preferences" in meta:
        config = "config/dpo_style.py"
        if not init_from:
            init_from, first_command = _preference_start(tokenizer, dataset)
    elif not init_from:
        config = "config/poems.py" if meta["source"]["corpus"] == "poems" else "config/quickstart.py"
    elif is_published and "chat" not in meta:
        config = "config/finetune_lora.py"
    else:
        config = "config/finetune_chat.py"
    options = [f"--init_from={shlex.quote(init_from)}"] if init_from else []
    options += [f"--dataset={shlex.quote(dataset)}", f"--out_dir={shlex.quote('out/' + meta['name'])}"]
    if init_from and not first_command and _is_run(init_from):
        block_size = _block_size(init_from)
        if block_size < CONFIG_BLOCK_SIZE.get(config, 0):
            options.append(f"--block_size={block_size}")
    command = f"python train.py {config} {' '.join(options)}"
    return f"{first_command} && {command}" if first_command else command


def _preference_start(tokenizer: str, dataset: str) -> tuple[str, str]:
    """Return the model from which training on preferences starts, for a `tokenizer` that names no checkpoint, and the
    command that trains this model first, or "". `dataset` is that of the preferences."""
    if tokenizer == "gpt2":
        return "gpt2", ""
    base, first_command = tokenizer, ""
    folders = [] if tokenizer in KINDS else [Path(tokenizer), Path("data") / tokenizer]
    metas = [files.read_json(folder / "meta.json") for folder in folders if (folder / "meta.json").exists()]
    if not metas or "preferences" in metas[0]:  # no text or conversations to train on
        base = f"{Path(dataset).name}_chat"
        first_command = f"python prepare chat FILES --tokenizer {shlex.quote(dataset)} --name {shlex.quote(base)} && "
    init_from = f"out/{Path(base).name}"
    if _states(init_from):
        return init_from, ""
    options = f"--dataset={shlex.quote(base)} --out_dir={shlex.quote(init_from)}"
    block_size = CONFIG_BLOCK_SIZE["config/dpo_style.py"]
    return init_from, f"{first_command}python train.py config/quickstart.py {options} --block_size={block_size}"


def losses(meta: dict) -> list[str]:
    """Return lines of the summary that name what a WordPiece tokenizer does not keep of the text."""
    config = meta["tokenizer"].get("config") or {}
    if config.get("model", {}).get("type") != "WordPiece":
        return []
    lowercase = '"lowercase": true' in json.dumps(config.get("normalizer"))
    lines = [f"lost             line breaks, repeated spaces{' and the case of letters' if lowercase else ''}"]
    if unknown := meta.get("unknown"):
        most = ", ".join(f"{acorn.visible(word)} ({count:,})" for word, count in list(unknown["words"].items())[:8])
        lines.append(f"unknown          {unknown['tokens']:,} words became [UNK], most often {most}")
    return lines


def _parser(modules: dict, broken: dict[str, str] | None = None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python prepare", description=__doc__.split(":")[0], allow_abbrev=False)
    subparsers = parser.add_subparsers(dest="corpus", metavar="CORPUS", required=True)
    for name, corpus in modules.items():
        sub = subparsers.add_parser(
            name,
            help=_first_line(corpus).replace("%", "%%"),
            description=corpus.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        if hasattr(corpus, "add_arguments"):
            corpus.add_arguments(sub)
        add = sub.add_argument
        add(
            "--tokenizer",
            default=corpus.TOKENIZER,
            help="char, byte, gpt2, cl100k_base, o200k_base, bpe:8192 (trains a tokenizer of that size on the corpus), "
            "or a tokenizer.json, dataset or out_dir whose tokenizer to use; default: %(default)s",
        )
        add(
            "--digits",
            type=int,
            choices=(1, 3),
            default=0,
            help="with bpe:SIZE: split numbers into groups of at most this many digits, from the left; default: whole "
            "numbers",
        )
        add(
            "--reserve",
            type=int,
            metavar="N",
            default=0,
            help="with bpe:SIZE: reserve N of its tokens as control tokens for later use by a chat template: "
            "<|reserved_0|>, <|reserved_1|>, ...",
        )
        add(
            "--new_tokens",
            nargs="+",
            metavar="NAME",
            help="control tokens to add to the tokenizer, such as '<|note|>'. Only chat templates write them; in "
            "documents their names stay text. Fine-tuning a checkpoint on the dataset extends its embedding",
        )
        add(
            "--val_fraction",
            type=float,
            default=getattr(corpus, "VAL_FRACTION", 0.1),
            help="the fraction of the text for validation, between 0 and 1; default: %(default)s",
        )
        add(
            "--val_by",
            choices=("end", "document"),
            help="how to choose it: the end of the corpus, or whole documents by a hash of their text; "
            "default: end for fewer than 100 files, else document",
        )
        add("--val_tokens", type=int, metavar="N", help="at most N tokens for validation; the rest is for training")
        add("--name", help="the name of the dataset; default: " + _default_name(corpus, name))
        add("--out", metavar="DIR", help="the folder to write; default: data/NAME")
        add(
            "--shard_tokens",
            type=int,
            metavar="N",
            default=SHARD_TOKENS,
            help="tokens per shard; an interrupted preparation resumes after the last complete shard; default: "
            "%(default)s",
        )
        add("--overwrite", action="store_true", help="replace an existing dataset")
        add(
            "--errors",
            choices=("strict", "replace"),
            default="strict",
            help="for bytes that are invalid in the file's encoding: strict stops with an error, replace turns them "
            "into U+FFFD and counts them; default: strict",
        )
    for name, error in (broken or {}).items():
        subparsers.add_parser(name, help=f"broken: {error}".replace("%", "%%"))
    if len(modules) != 1:  # no corpus was named
        _add_inspect(subparsers)
    return parser


def _first_line(corpus: types.ModuleType) -> str:
    return (corpus.__doc__ or "").strip().splitlines()[0]


def _add_inspect(subparsers) -> None:
    from prepare import inspection

    sub = subparsers.add_parser(
        "inspect",
        help=inspection.__doc__.splitlines()[0],
        description=inspection.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    inspection.add_arguments(sub)


def _default_name(corpus, name: str) -> str:
    return getattr(corpus, "DEFAULT_NAME", "after the first file") if hasattr(corpus, "default_name") else name


def _unknown_corpus(name: str) -> str:
    if os.path.exists(name):
        return f"'{name}' is a path, not a corpus. Use `python prepare text {shlex.quote(name)}`."
    near = difflib.get_close_matches(name, [*corpora(), "inspect"], 1)
    hint = f"Did you mean {near[0]}? " if near else ""
    return f"there is no corpus '{name}'. {hint}The corpora are {', '.join(corpora())}."


if __name__ == "__main__":
    acorn.run(main)
