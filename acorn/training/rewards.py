"""Rewards of completions, for `objective = "grpo"`.

A reward is a function (prompt, completion, answer) -> float. `prompt` is the rendered text before the completion,
`answer` the reply in the dataset. Choose one of these by its name, such as `reward = "arithmetic"`, or define a
function `reward` in the config file.
"""

import hashlib
import inspect
import re
import runpy
from collections.abc import Callable
from decimal import Decimal
from numbers import Real
from pathlib import Path
from typing import Any

from acorn import REPO, UserError, settings

Reward = Callable[[str, str, str], float]

LARGEST = 1e15  # sums of rewards and of their squares are float32, whose largest value is 3.4e38
NUMBER = re.compile(r"(?:(?<!\d)-)?(?:\d+(?:,\d{3})*(?:\.\d+)?|(?<![\d.])\.\d+)")  # a "-" after a digit subtracts
UNSPACED = r"\u3001-\u9fff\uf900-\ufaff\uff01-\uffef\U00020000-\U0003ffff"  # characters of Chinese and Japanese
WORD = re.compile(f"[{UNSPACED}]|[^{UNSPACED}\\s]+")  # each of these characters, or text between spaces


def exact_match(prompt: str, completion: str, answer: str) -> float:
    """Return 1 if the completion is the answer, apart from white space around it, else 0."""
    return float(completion.strip() == answer.strip())


def arithmetic(prompt: str, completion: str, answer: str) -> float:
    """Return 1 if the last number in the completion equals the last number in the answer, else 0."""
    texts = [text.replace("\u2212", "-") for text in (completion, answer)]  # a minus sign
    values = [[Decimal(number.replace(",", "")) for number in NUMBER.findall(text)] for text in texts]  # exact
    return float(all(values) and values[0][-1] == values[1][-1])


def format(prompt: str, completion: str, answer: str) -> float:
    """Return 1 if the whole completion, apart from white space around it, matches the regular expression `answer`."""
    return float(re.fullmatch(answer.strip(), completion.strip(), re.S) is not None)


def length(prompt: str, completion: str, answer: str) -> float:
    """Return 1 if the completion has as many words as the answer, less for another number, and 0 for none or twice.

    In Chinese and Japanese, which have no spaces, each character is a word."""
    n, target = len(WORD.findall(completion)), max(1, len(WORD.findall(answer)))
    return max(0.0, 1 - abs(n - target) / target)


SHIPPED = {function.__name__: function for function in (exact_match, arithmetic, format, length)}


def load_reward(name: str, variables: dict | None = None) -> tuple[Reward, str]:
    """Return a reward and the SHA-256 of its source: one of SHIPPED, or the function `reward` of a Python file.

    The file may be a config file, so it runs with the settings of the run as `variables`. Raises UserError if there is
    no such function."""
    function: Any = SHIPPED.get(name)
    if function is None:
        file = next((f for f in (Path(name), REPO / name) if f.suffix == ".py" and f.is_file()), None)
        if file is None:
            raise UserError(
                f"reward={name!r:.100} is neither {', '.join(SHIPPED)} nor a Python file with a function `reward`. "
                "Choose one of them."
            )
        try:
            function = runpy.run_path(str(file), init_globals=variables).get("reward")
        except (Exception, SystemExit) as error:  # from the user's code
            raise UserError(f"{name} fails: {type(error).__name__}: {error}. Correct it.") from error
        function = SHIPPED.get(function) if isinstance(function, str) else function
        if not inspect.isfunction(function):
            raise UserError(
                f"{name} defines no function `reward`. Add one: def reward(prompt, completion, answer) -> float."
            )
        if len(inspect.signature(function).parameters) != 3:
            raise UserError(f"the function reward in {name} must have three parameters: prompt, completion, answer.")
    return function, hashlib.sha256(inspect.getsource(function).encode()).hexdigest()


def call_reward(function: Reward, name: str, prompt: str, completion: str, answer: str) -> float:
    """Return the reward of a completion. Raises UserError if the function fails or returns no finite number."""
    try:
        value = function(prompt, completion, answer)
    except (Exception, SystemExit) as error:  # from the user's code
        file = Path(inspect.getsourcefile(function) or name)
        line = settings.line_of(error, file)
        where = f"{name}{f', line {line}' if line else ''}"
        raise UserError(f"the reward fails at {where}: {type(error).__name__}: {error}. Correct it.") from error
    if isinstance(value, Real) and abs(value) <= LARGEST:  # False for NaN
        return float(value)
    raise UserError(
        f"the reward {name} returned {value!r:.60} ({type(value).__name__}). It must return a finite number of at most "
        f"{LARGEST:.0e} in absolute value, such as 0.5."
    )
