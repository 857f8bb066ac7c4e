"""Small data to try the recipes on, made from what Python brings along: the functions of its standard library.

    python -m acorn.examples data/examples

    answers.jsonl, answers_val.jsonl      {"prompt", "response"}: what does this function do? its docstring's first line
    choices.jsonl, choices_val.jsonl      {"prompt", "choices", "answer"}: which of four modules is this function of?
    labels.jsonl                          the same as {"prompt", "response"}, to learn it from
    topics/*.txt                          texts behind a prefix that says their topic: `<topic=json>`
    fewshot.txt                           prompts, one a line, in which three examples come before what is asked for

The files *_val.jsonl hold one function in ten, and the others none of these.
"""

import argparse
import ast
import hashlib
import json
import sysconfig
from pathlib import Path

from acorn import UserError, run

TOPICS = ("asyncio", "email", "json", "logging", "os", "random", "sqlite3", "statistics", "unittest", "zipfile")


def functions(folder: Path) -> list[tuple[str, str, str]]:
    """Module, name and first docstring line of each public function or class in the Python files of `folder`, in order
    and each line once."""
    found = {}
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        if any(part.startswith(("_", "test", "idlelib", "site-packages", "lib2to3")) for part in parts):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # some are meant to be broken
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                line = (ast.get_docstring(node) or "").split("\n\n")[0].replace("\n", " ").strip()
                if 20 <= len(line) <= 200:
                    found.setdefault(line, (".".join(parts), node.name, line))
    return list(found.values())


def is_val(name: str) -> bool:
    return hashlib.sha256(name.encode()).digest()[0] < 26  # one in ten


def choices_of(module: str, line: str) -> dict:
    """A question with four answers, the right one among them at a place that only a hash knows."""
    digest = hashlib.sha256(line.encode()).digest()
    others = [topic for topic in TOPICS if topic != module]
    options = [others[(digest[0] + 3 * k) % len(others)] for k in range(3)]
    options.insert(digest[1] % 4, module)
    prompt = f"Which module of Python has a function that does this: {line}"
    return {"prompt": prompt, "choices": options, "answer": options.index(module)}


def write_examples(folder: Path) -> dict[str, int]:
    """Write the files; how many examples each has."""
    answers, choices, topics = {"": [], "_val": []}, {"": [], "_val": []}, []
    for module, name, line in functions(Path(sysconfig.get_path("stdlib"))):
        split = "_val" if is_val(line) else ""
        answers[split].append({"prompt": f"What does {module}.{name} of Python do?", "response": line})
        topic = module.split(".")[0]
        if topic in TOPICS:
            choices[split].append(choices_of(topic, line))
            topics.append(f"<topic={topic}> {line}\n")
    if not answers["_val"] or not choices["_val"]:
        raise UserError(f"{sysconfig.get_path('stdlib')} does not hold the sources of Python's standard library")
    labels = [{"prompt": c["prompt"], "response": c["choices"][c["answer"]]} for c in choices[""]]

    shots = "; ".join(f"{a['prompt']} {a['response']}" for a in answers[""][:300:100])
    fewshot = [f"{shots}; {a['prompt']}" for a in answers["_val"][:5]]
    tables = {f"answers{split}": answers[split] for split in answers}
    tables |= {f"choices{split}": choices[split] for split in choices} | {"labels": labels}
    (folder / "topics").mkdir(parents=True, exist_ok=True)
    for name, records in tables.items():
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    for i, text in enumerate(topics):
        (folder / "topics" / f"{i:04}.txt").write_text(text, encoding="utf-8")
    (folder / "fewshot.txt").write_text("".join(f"{prompt}\n" for prompt in fewshot), encoding="utf-8")
    return {name: len(records) for name, records in tables.items()} | {"topics": len(topics), "fewshot": len(fewshot)}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m acorn.examples", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where to write")
    args = parser.parse_args()
    for name, count in write_examples(args.folder).items():
        print(f"{count:6,} {name}")
    print(f"written to {args.folder}")


if __name__ == "__main__":
    run(main)
