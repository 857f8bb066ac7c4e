"""How well a model's poems scan: couplets of equal lines, complete poems and rhymes, next to real poems.

$ python prepare poems
$ python train.py config/poems.py
$ python benchmarks/verses.py --out_dir out/poems

The model writes --samples poems. They are compared with as many poems of the validation split, and with the same poems
after a shuffle of all characters and punctuation of each poem. Two couplets rhyme if their last characters belong to
the same of the thirteen rhyme classes of modern Mandarin (十三辙). Tang pronunciation was different, so not even real
poems reach 100%.
"""

import argparse
import random
import re
import sys
from itertools import pairwise

import numpy as np
from bench import table  # first, because it makes acorn importable

from acorn import checkpoint
from acorn.data.shards import load_dataset
from acorn.data.tokenizer import END_OF_TEXT
from acorn.inference.generate import Sampling, generate

START, END = "《", "\n\n"
VERSE_ENDS = re.compile("[，。？！；：、]")
RHYMES = {  # the finals of each class in pypinyin's spelling; Mandarin's er rhymes with i in these poems
    "a": "a ia ua",
    "o": "o e uo",
    "ie": "ie ve ê",
    "u": "u",
    "i": "i v er",
    "ai": "ai uai",
    "ei": "ei uei",
    "ao": "ao iao",
    "ou": "ou iou",
    "an": "an ian uan van",
    "en": "en in uen vn",
    "ang": "ang iang uang",
    "eng": "eng ing ueng ong iong",
}
CLASS = {final: name for name, finals in RHYMES.items() for final in finals.split()}


def write_poems(out_dir: str, n: int, temperature: float, seed: int) -> list[str]:
    """Return `n` poems that the model in `out_dir` writes after a document's first character."""
    model, tokenizer, source = checkpoint.load_model(out_dir)
    print(f"{n} poems from {source}", file=sys.stderr)
    poems = [START] * n

    def on_token(row: int, token: int, logprob: float) -> bool:
        poems[row] += tokenizer.decode([token])
        return token == tokenizer.eot or poems[row].endswith(END)

    start = [*tokenizer.before_document, *tokenizer.encode(START).tolist()]
    room, seeds = model.config.block_size - len(start), list(range(seed, seed + n))
    generate(model, [start] * n, room, Sampling(temperature=temperature), seeds, on_token, tokenizer.n_vocab)
    return [documents(poem)[0] for poem in poems]


def documents(text: str) -> list[str]:
    return [poem for poem in re.split(f"{END}|{re.escape(END_OF_TEXT)}", text) if poem]


def couplets(poem: str) -> list[list[str]]:
    """Return the verses of each line after the title, without punctuation."""
    return [[verse for verse in VERSE_ENDS.split(line) if verse] for line in poem.split("\n")[1:]]


def is_even(couplet: list[str]) -> bool:
    return len(couplet) == 2 and len(couplet[0]) == len(couplet[1])


def is_regular(poem: list[list[str]]) -> bool:
    """Whether a poem has two or four couplets, whose lines all have five or all have seven characters."""
    lengths = {len(verse) for couplet in poem for verse in couplet}
    return len(poem) in (2, 4) and all(map(is_even, poem)) and lengths in ({5}, {7})


def rhyme(couplet: list[str]) -> str | None:
    """Return the rhyme class of the last character, None if it has no known reading."""
    from pypinyin import Style, pinyin

    if not couplet:
        return None
    final = pinyin(couplet[-1], style=Style.FINALS, strict=True, errors=lambda chars: [""])[-1][0]
    return CLASS.get(final)


def shuffled(poem: str, source: random.Random) -> str:
    """Return the poem with all characters after the title shuffled, except line breaks."""
    title, _, body = poem.partition("\n")
    chars = [char for char in body if char != "\n"]
    source.shuffle(chars)
    return "\n".join([title, *("".join(chars.pop() for _ in line) for line in body.split("\n"))])


def figures(name: str, texts: list[str], known: set[str]) -> dict[str, str]:
    """Return a row of the table. `known` holds the training split's couplets."""
    poems = list(map(couplets, texts))
    lines = [couplet for poem in poems for couplet in poem]
    pairs = [pair for poem in poems for pair in pairwise(map(rhyme, poem))]
    copied = ["".join(couplet) in known for couplet in lines]
    shares = {
        "even couplets": [is_even(couplet) for couplet in lines],
        "regular poems": list(map(is_regular, poems)),
        "rhyming couplets": [a is not None and a == b for a, b in pairs],
        "copied couplets": copied,
    }
    return {"poems": name} | {key: f"{sum(values) / max(1, len(values)):.1%}" for key, values in shares.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out_dir", default="out/poems", help="default: %(default)s")
    parser.add_argument("--dataset", default="poems", help="default: %(default)s")
    parser.add_argument("--samples", type=int, default=300, help="default: %(default)s")
    parser.add_argument("--temperature", type=float, nargs="+", default=[1.0, 0.8], help="default: 1.0 0.8")
    parser.add_argument("--seed", type=int, default=1337, help="default: %(default)s")
    parser.add_argument("--show", type=int, default=3, metavar="N", help="print N of the poems; default: %(default)s")
    args = parser.parse_args()

    data = load_dataset(args.dataset)
    splits = [split.read(np.array([0]), len(split))[0] for split in (data.train, data.val)]
    train, val = (documents(data.tokenizer.decode(ids)) for ids in splits)
    known = {"".join(couplet) for poem in train for couplet in couplets(poem)}
    source = random.Random(args.seed)
    real = source.sample(val, min(args.samples, len(val)))
    rows = [figures("validation split", real, known)]
    rows.append(figures("validation split, shuffled", [shuffled(poem, source) for poem in real], known))
    for temperature in args.temperature:
        written = write_poems(args.out_dir, args.samples, temperature, args.seed)
        rows.append(figures(f"{args.out_dir}, temperature {temperature:g}", written, known))
    print(*written[: args.show], sep=END)
    print(table(rows))


if __name__ == "__main__":
    main()
