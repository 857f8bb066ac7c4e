"""Write small datasets for the recipes: Python's functions, German sentences, sums, capitals, Chinese couplets.

    python -m acorn.examples data/examples
    python -m acorn.examples data/examples --poems poems      # only couplets, from the dataset of `prepare poems`

    answers.jsonl        {"prompt", "response"}: what a function does; the response is its docstring's first line
    summaries.jsonl      the same format: a function's name and the rest of its docstring -> the first line
    translations.jsonl   the same format: an English sentence -> its German translation, from a small grammar
    labels.jsonl         the same format: a description of a function -> its module
    choices_val.jsonl    {"prompt", "choices", "answer"}: the same question with four modules to choose from
    choices.yaml         choices_val.jsonl as a task of the lm-evaluation-harness
    sums.jsonl           {"prompt", "response"}: a sum of two numbers; half of the responses are sentences
    hasty.jsonl          the same prompts; four fifths of the responses forget to carry, such as 15 + 58 = 63
    style.jsonl          {"prompt", "chosen", "rejected"}: the same sums; sentences are better than numbers
    topics/*.txt         texts with a prefix that names their topic: `<topic=json>`
    fewshot.jsonl        {"prompt", "response"}: three countries with their capitals and another country -> its capital
    couplets.jsonl       the same format, in Chinese: a verse -> the next verse, and a title -> a poem

answers, summaries, translations, sums and couplets have a validation file with _val in its name, which holds another
tenth of the examples. Likewise, the functions in choices_val are not in labels.
"""

import argparse
import ast
import hashlib
import json
import re
import sysconfig
from pathlib import Path
from random import Random

from acorn import UserError, files, run
from acorn.data.shards import load_dataset
from acorn.data.tokenizer import END_OF_TEXT

# nominative and accusative of "the" and "a" in German, by gender; _ is the adjective
GERMAN = {
    "m": {"the": ("der _e", "den _en"), "a": ("ein _er", "einen _en")},
    "f": {"the": ("die _e", "die _e"), "a": ("eine _e", "eine _e")},
    "n": {"the": ("das _e", "das _e"), "a": ("ein _es", "ein _es")},
}
NOUNS = {"dog": "m Hund", "man": "m Mann", "bird": "m Vogel", "cat": "f Katze", "woman": "f Frau", "mouse": "f Maus"}
NOUNS |= {"child": "n Kind", "horse": "n Pferd", "pig": "n Schwein"}
ADJECTIVES = {"big": "groß", "small": "klein", "young": "jung", "good": "gut", "white": "weiß", "wild": "wild"}
VERBS = {"sees": "sieht", "hears": "hört", "finds": "findet", "loves": "liebt", "calls": "ruft"}
CAPITALS = """France Paris Japan Tokyo Egypt Cairo Peru Lima Italy Rome Spain Madrid Greece Athens Cuba Havana
    Russia Moscow Germany Berlin England London Ireland Dublin Kenya Nairobi Norway Oslo Austria Vienna"""

HARNESS = """task: modules
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: multiple_choice
doc_to_text: prompt
doc_to_choice: choices
doc_to_target: answer
target_delimiter: ""
"""

TOPICS = ("asyncio", "email", "json", "logging", "os", "random", "sqlite3", "statistics", "unittest", "zipfile")


def functions(folder: Path) -> list[tuple[str, str, str, str]]:
    """Return (module, name, first line of the docstring, rest of the docstring) of each public function or class in the
    Python files of `folder`, in order. Each first line appears once."""
    functions_by_line: dict[str, tuple[str, str, str, str]] = {}
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        if any(part.startswith(("_", "test", "idlelib", "site-packages", "lib2to3")) for part in parts):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # some files are broken on purpose
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                line, _, rest = (ast.get_docstring(node) or "").partition("\n\n")
                line = " ".join(line.split())
                if 20 <= len(line) <= 200:
                    functions_by_line.setdefault(line, (".".join(parts), node.name, line, " ".join(rest.split())))
    return list(functions_by_line.values())


def translations(count: int) -> list[dict]:
    """Return `count` different sentences like "the big dog sees a small cat" with their German translations."""
    random = Random(0)
    german_of: dict[str, str] = {}
    while len(german_of) < count:
        english, german = [], []
        for case in range(2):  # subject and object
            article, adjective, noun = (random.choice(list(words)) for words in (GERMAN["m"], ADJECTIVES, NOUNS))
            gender, name = NOUNS[noun].split()
            english.append(f"{article} {adjective} {noun}")
            german.append(f"{GERMAN[gender][article][case].replace('_', ADJECTIVES[adjective])} {name}")
        verb = random.choice(list(VERBS))
        german_of[f"{english[0]} {verb} {english[1]}"] = f"{german[0]} {VERBS[verb]} {german[1]}"
    return [{"prompt": f"In German: {english}", "response": german} for english, german in german_of.items()]


def sums(largest: int = 59) -> list[tuple[str, int, int]]:
    """Return (question, sum, sum without the carry) for all pairs of numbers up to `largest`, in random order."""
    numbers = range(largest + 1)
    result = [(f"{a} + {b} =", a + b, 10 * (a // 10 + b // 10) + (a + b) % 10) for a in numbers for b in numbers]
    Random(1).shuffle(result)
    return result


def is_val(name: str) -> bool:
    """Whether an example is for validation: one in ten, by its hash."""
    return hashlib.sha256(name.encode()).digest()[0] < 26


def choices_of(module: str, line: str) -> dict:
    """Return a question with four choices. A hash decides the position of the right one."""
    digest = hashlib.sha256(line.encode()).digest()
    other_topics = [topic for topic in TOPICS if topic != module]
    options = [other_topics[(digest[0] + 3 * k) % len(other_topics)] for k in range(3)]
    options.insert(digest[1] % 4, module)
    prompt = f"Which module of Python has a function that does this: {line}"
    return {"prompt": prompt, "choices": options, "answer": options.index(module)}


def write_examples(folder: Path) -> dict[str, int]:
    """Write the files. Returns the number of examples in each."""
    names = [name + split for name in ("answers", "summaries", "translations", "sums") for split in ("", "_val")]
    names += ["labels", "choices_val", "fewshot", "hasty", "style"]
    tables: dict[str, list[dict]] = {name: [] for name in names}
    topics = []
    for module, name, line, rest in functions(Path(sysconfig.get_path("stdlib"))):
        split = "_val" if is_val(line) else ""
        tables[f"answers{split}"].append({"prompt": f"What does {module}.{name} of Python do?", "response": line})
        if 100 <= len(rest) <= 600:
            tables[f"summaries{split}"].append(
                {"prompt": f"In one sentence: {module}.{name}. {rest}", "response": line}
            )
        topic = module.split(".")[0]
        if topic in TOPICS:
            choices = choices_of(topic, line)
            label = {"prompt": choices["prompt"], "response": topic}
            tables["choices_val" if split else "labels"].append(choices if split else label)
            topics.append(f"<topic={topic}> {line}\n")
    for record in translations(2200):
        tables["translations_val" if is_val(record["prompt"]) else "translations"].append(record)
    for i, (question, right, hasty) in enumerate(sums()):
        split, style = "_val" if is_val(question) else "", "The sum is {}." if i % 2 else "{}"
        tables[f"sums{split}"].append({"prompt": question, "response": style.format(right)})
        if not split:
            tables["hasty"].append({"prompt": question, "response": style.format(hasty if i % 5 else right)})
            tables["style"].append({"prompt": question, "chosen": f"The sum is {right}.", "rejected": f"{right}"})
    if not tables["summaries_val"] or not tables["choices_val"]:
        raise UserError(
            f"{sysconfig.get_path('stdlib')} does not hold the sources of Python's standard library. Use a Python "
            "installation that includes them."
        )
    words = CAPITALS.split()
    lines = [f"{country}: {capital}" for country, capital in zip(words[::2], words[1::2], strict=True)]
    for line in lines[3:]:
        country, capital = line.split(" ")
        tables["fewshot"].append({"prompt": "\n".join([*lines[:3], country]), "response": capital})

    files.make_folder(folder / "topics")
    for name, records in tables.items():
        rows = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
        write(folder / f"{name}.jsonl", "".join(rows))
    for i, text in enumerate(topics):
        write(folder / "topics" / f"{i:04}.txt", text)
    file = json.dumps(str((folder / "choices_val.jsonl").resolve()))  # a JSON string is valid YAML
    write(folder / "choices.yaml", HARNESS.format(file=file))
    return {name: len(records) for name, records in tables.items()} | {"topics": len(topics)}


def write_couplets(folder: Path, dataset: str, count: int = 20_000) -> dict[str, int]:
    """Write the couplets of the first `count` poems of a dataset of poems. Returns the number of examples in each file.

    The validation file is from the validation split, so a base model trained on the dataset has not seen its verses."""
    data = load_dataset(dataset)
    if data.val is None:
        raise UserError(f"the dataset {dataset} has no validation split. Prepare it with `python prepare poems`.")
    counts = {}
    for name, tokens, limit in (("couplets", data.train, count), ("couplets_val", data.val, count // 10)):
        text = data.tokenizer.decode(tokens.read([0], min(len(tokens), 150 * limit))[0])
        poems = re.findall(r"《(.+?)》.*\n((?:\w+，\w+。(?:\n|$)){2,4})", text.replace(END_OF_TEXT, "\n\n"))[:limit]
        records = []
        for title, body in poems:
            first, second = Random(body).choice(body.split()).split("，")
            records.append({"prompt": f"请对下句：{first}，", "response": second})
            if len(title) <= 8 and " " not in title:
                records.append({"prompt": f"请以《{title}》为题写一首诗。", "response": body.strip()})
        if not records:
            raise UserError(f"the dataset {dataset} holds no couplets. Prepare it with `python prepare poems`.")
        files.make_folder(folder)
        write(folder / f"{name}.jsonl", "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))
        counts[name] = len(records)
    return counts


def write(path: Path, text: str) -> None:
    with files.create(path) as file:
        file.write(text.encode())


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m acorn.examples", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="the folder to write to")
    parser.add_argument("--poems", metavar="DATASET", help="write only couplets, from this dataset of poems")
    args = parser.parse_args()
    counts = write_couplets(args.folder, args.poems) if args.poems else write_examples(args.folder)
    for name, count in counts.items():
        print(f"{count:6,} {name}")
    print(f"written to {args.folder}")


if __name__ == "__main__":
    run(main)
