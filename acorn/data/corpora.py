"""The names of corpora: the modules in prepare/. Others derive theirs from here."""

import shlex
from pathlib import Path

from acorn import REPO

HELPERS = {"__init__", "__main__", "encoding", "inspection", "pipeline", "reading"}  # modules that are no corpus
CHAT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
# Datasets that are not named like their corpus -> arguments of `python prepare`. nanoGPT has the first two; the config
# files of the recipes use those in data/examples, which `python -m acorn.examples` makes.
RENAMED = {
    "shakespeare": "tinyshakespeare --tokenizer gpt2 --name shakespeare",
    "shakespeare_char": "tinyshakespeare --name shakespeare_char",
    "plays": "shakespeare",
    "answers": f"chat data/examples/answers.jsonl --tokenizer {CHAT_MODEL} --name answers",
    "sums": "chat data/examples/sums.jsonl --tokenizer byte --name sums",
    "style": "preferences data/examples/style.jsonl --tokenizer out/sums --name style",
}


def corpora() -> list[str]:
    """Return the names of the corpora of `python prepare`, in alphabetical order."""
    return sorted({path.stem for path in (REPO / "prepare").glob("*.py")} - HELPERS)


def dataset_names() -> list[str]:
    """Return the names of the datasets that a corpus makes by default or as in RENAMED."""
    sources = {name: (REPO / "prepare" / f"{name}.py").read_text("utf-8", "replace") for name in corpora()}
    return [*(name for name in sources if "default_name" not in sources[name]), *RENAMED]


def prepare_command(dataset: str) -> str:
    """Return the command that makes a dataset of this name, in backquotes."""
    if dataset in RENAMED:
        first = "python -m acorn.examples data/examples && " if "data/examples/" in RENAMED[dataset] else ""
        return f"`{first}python prepare {RENAMED[dataset]}`"
    if dataset in dataset_names():
        return f"`python prepare {dataset}`"
    if Path(dataset).name not in ("", dataset):  # a path
        return f"`python prepare text FILES --out {shlex.quote(dataset)}`"
    return f"`python prepare text FILES --name {Path(dataset).name or 'NAME'}`"
