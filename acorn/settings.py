"""Settings: defaults from a dataclass, overridden by config files, overridden by `--key=value` on the command line.

A config file is Python code that is executed. Each public name in it that is not a module, function or class is a
setting. Names that start with an underscore are helpers. The function `reward` is a setting too; its value is the path
of the file. The settings on the command line are global variables in the file, which can derive others from them.
"""

import argparse
import contextlib
import difflib
import inspect
import math
import re
import runpy
import shlex
import sys
import traceback
import types
import typing
from pathlib import Path

from acorn import REPO, UserError

FUNCTIONS = ("reward",)  # settings that a config file may define as a function

# The bounds of settings, the same for training, sampling, evaluation and `prepare`: (condition, its words, settings).
# GPTConfig checks the shape of a model.
BOUNDS = (
    (
        lambda value: value >= 1,
        "be at least 1",
        "gradient_accumulation_steps batch_size block_size eval_interval keep_checkpoints max_bad_steps num_samples "
        "group_size",
    ),
    (
        lambda value: value >= 0,
        "not be negative",
        "log_interval eval_iters max_iters warmup_iters lr_decay_iters sample_interval learning_rate muon_lr min_lr "
        "weight_decay grad_clip max_minutes max_new_tokens top_k no_repeat_ngram_size temperature limit simpo_gamma "
        "kl_beta embedding_std",
    ),
    (lambda value: 0 <= value < 1, "be at least 0 and below 1", "beta1 beta2 muon_momentum dropout ngram_dropout"),
    (
        lambda value: 0 <= value < 1 or value == -1,
        "be at least 0 and below 1, or -1 for that of dropout",
        "attn_dropout",
    ),
    (lambda value: 0 < value <= 1, "be above 0 and at most 1", "cooldown_frac top_p"),
    (lambda value: 0 <= value < 0.5, "be at least 0 and below 0.5", "label_smoothing"),
    (lambda value: 0 <= value <= 1, "be from 0 to 1", "min_p distill_weight"),
    (lambda value: value > 0, "be above 0", "repetition_penalty dpo_beta distill_temperature rollout_temperature"),
    (lambda value: 0 <= value < 2**62, "be from 0 to 2^62", "seed"),
    (lambda value: 0 <= value < 2**20, "be from 0 to 2^20; 8 or 16 is usual", "lora_rank"),
    (lambda value: 1 <= value <= 1000, "be from 1 to 1000", "num_beams"),
    (lambda value: -10 <= value <= 10, "be from -10 to 10", "length_penalty"),
    (lambda value: 0 < value < 1, "be between 0 and 1, such as 0.1", "val_fraction"),
    (lambda value: value is None or value >= 2, "be 2 or more", "val_tokens shard_tokens"),
    (lambda value: value is None or value >= 8, "be 8 or more", "max_tokens"),
)


Settings = typing.TypeVar("Settings")  # a dataclass of settings


def check_bounds(values: dict) -> None:
    """Raise UserError for the first of the settings `values`, by name, that is outside its bounds."""
    for is_valid, words, names in BOUNDS:
        for name in names.split():
            if name in values and not is_valid(values[name]):
                raise UserError(f"{name} = {values[name]} must {words}")


def parse(cls: type, argv: list[str]) -> dict:
    """Return the settings given in `argv`, by name.

    `--key=value` overrides config files, in any order. Among several of the same kind, the last one wins. Options of
    list type accumulate. `--help` prints the fields of the dataclass `cls` with their comments, and exits.

    Raises UserError for an unknown name, a value of the wrong type, and a config file that fails.
    """
    if "--help" in argv or "-h" in argv:
        print_help(cls)
    types_of = typing.get_type_hints(cls)
    paths: list[str] = []
    from_words: dict = {}
    words = list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith("-"):
            paths.append(word)
            continue
        key, equals, value = word.lstrip("-").partition("=")  # the value may hold further equals signs
        key = key.replace("-", "_")
        if not word.startswith("--") or not key:
            raise UserError(f"{word!r} is neither a config file nor an option. Write --key=value.")
        check_name(key, types_of, "on the command line")
        if not equals:
            is_flag = types_of[key] is bool or True in typing.get_args(types_of[key])
            if words and not words[0].startswith("--") and not (is_flag and words[0].endswith(".py")):
                value = words.pop(0)
            elif is_flag:
                value = "True"
            else:
                raise UserError(f"--{key} has no value. Write --{key}=VALUE.")
        if typing.get_origin(types_of[key]) is list:
            from_words[key] = [*from_words.get(key, []), value]
        else:
            from_words[key] = convert(value, types_of[key], f"--{key}")
    from_files: dict = {}
    for path in paths:
        from_files |= read_config(path, types_of, from_words)
    return from_files | from_words


def read_config(path: str, types_of: dict, given: dict) -> dict:
    """Run a config file, in which the settings `given` on the command line are variables, and return its settings.

    A relative path is tried from the working directory, then the repo.
    """
    file = next((f for f in (Path(path), REPO / path) if f.is_file()), None)
    if file is None:
        near = difflib.get_close_matches(Path(path).name, [f.name for f in (REPO / "config").glob("*.py")], n=1)
        hint = f"Did you mean config/{near[0]}?" if near else "Give its path, such as config/quickstart.py."
        raise UserError(f"there is no config file {path}. {hint}")
    try:
        names = runpy.run_path(str(file), init_globals=given)
    except (Exception, SystemExit) as error:  # from the user's code
        line = line_of(error, file)
        where = f"{path}, line {line}" if line else path
        raise UserError(f"the config file fails at {where}: {type(error).__name__}: {error}") from error
    settings = {}
    for name, value in names.items():
        if name in FUNCTIONS and isinstance(value, types.FunctionType):
            value = str(file)
        if name.startswith("_") or isinstance(value, types.ModuleType) or callable(value):
            continue
        check_name(name, types_of, f"in {path}; start the name of a helper variable with an underscore")
        settings[name] = convert(value, types_of[name], f"{name} in {path}")
    return settings


def line_of(error: BaseException, file: Path) -> int | None:
    """Return the line of a Python file at which running it raised `error`, or None if unknown."""
    if isinstance(error, SyntaxError) and error.filename == str(file):
        return error.lineno
    frames = traceback.extract_tb(error.__traceback__)
    return next((frame.lineno for frame in reversed(frames) if frame.filename == str(file)), None)


def check_name(name: str, types_of: dict, where: str) -> None:
    if name not in types_of:
        near = difflib.get_close_matches(name, types_of, n=1, cutoff=0.5)
        hint = f"Did you mean {near[0]!r}?" if near else "Use --help for a list."
        raise UserError(f"there is no setting {name!r} ({where}). {hint}")


def convert(value, kind, name: str):
    """Convert `value`, a string from the command line or a value from a config file, to the type `kind`.

    Raises UserError, which starts with `name`, if that is not possible.
    """
    text = value.strip() if isinstance(value, str) else None
    if kind is str and isinstance(value, str):
        return value
    if kind is bool:
        if isinstance(value, bool):
            return value
        if text is not None and text.lower() in ("true", "false", "1", "0"):
            return text.lower() in ("true", "1")
    elif kind in (int, float) and not isinstance(value, bool):
        try:
            number = kind(text) if text is not None else value
        except ValueError:
            try:
                number = float(value)  # an int may be written as 1e3
            except ValueError:
                number = math.nan
        with contextlib.suppress(OverflowError):  # an int too large for a float
            if isinstance(number, (int, float)) and math.isfinite(number) and kind(number) == number:
                return kind(number)
    elif typing.get_origin(kind) is typing.Literal:
        for choice in typing.get_args(kind):
            if (value == choice and type(value) is type(choice)) or (
                text is not None and text.lower() == str(choice).lower()
            ):
                return choice
        raise UserError(f"{name} = {value!r} is unknown. Use one of {', '.join(map(str, typing.get_args(kind)))}.")
    elif typing.get_origin(kind) is list and isinstance(value, (str, list, tuple)):
        items = [value] if isinstance(value, str) else value
        return [convert(item, typing.get_args(kind)[0], name) for item in items]
    elif kind is dict and isinstance(value, dict):  # of a checkpoint's configuration
        return value
    expected = {bool: "True or False", int: "an integer", float: "a number", str: "a string"}.get(kind, "a list")
    raise UserError(f"{name} = {value!r} has the wrong type. It should be {expected}.")


def print_help(cls: type) -> None:
    """Print the fields of `cls` with the comments after them, and exit.

    A comment on a line of its own is the title of the fields below it. A line break in a default is printed as \\n.
    """
    spec = getattr(sys.modules["__main__"], "__spec__", None)  # of a module that was started with `python -m`
    parser = argparse.ArgumentParser(
        prog=f"python -m {spec.name}" if spec else None,
        usage="%(prog)s [CONFIG.py ...] [--key=value ...]",
        description=cls.__doc__,
    )
    group = parser.add_argument_group()  # of fields above the first title
    types_of, defaults = typing.get_type_hints(cls), vars(cls())
    for line in inspect.getsource(cls).splitlines():
        title = re.fullmatch(r" {4}# (.+)", line)
        field = re.fullmatch(r" {4}(\w+): .+?  # (.+)", line)
        if title:
            group = parser.add_argument_group(title[1])
        elif field:
            name, comment = field.groups()
            default = "none" if defaults[name] == [] else shlex.quote(str(defaults[name]).replace("\n", "\\n"))
            text = f"{comment} (default: {default})".replace("%", "%%")
            group.add_argument(f"--{name}", metavar=metavar_of(types_of[name]), help=text)
    parser.print_help()
    sys.exit()


def metavar_of(kind) -> str:
    """Return what stands for a value of this type in the help."""
    if typing.get_origin(kind) is list:  # the option can be repeated
        kind = typing.get_args(kind)[0]
    choices = (True, False) if kind is bool else typing.get_args(kind)  # of a Literal
    return "{" + ",".join(map(str, choices)) + "}" if choices else kind.__name__.upper()


def checked(cls: type, values: dict) -> dict:
    """Return the values for which `cls` has a field, converted to its type. Raises UserError if one cannot be."""
    types_of = typing.get_type_hints(cls)
    return {name: convert(value, types_of[name], name) for name, value in values.items() if name in types_of}


def build(cls: type[Settings], *layers: dict) -> Settings:
    """Build the dataclass `cls` from its defaults and from layers of values, in which later layers override earlier.

    Unknown names, as in a checkpoint of another version, are ignored.
    """
    names = typing.get_type_hints(cls)
    return cls(**{name: value for layer in layers for name, value in layer.items() if name in names})
