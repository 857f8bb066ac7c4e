"""docs/: what the pages quote is in the code."""

import math
import re

import pytest
from conftest import REPO


def code_lines(page: str) -> list[str]:
    """The lines in a page's blocks of Python."""
    text = (REPO / "docs" / page).read_text(encoding="utf-8")
    return [line.strip() for block in re.findall(r"```python\n(.*?)```", text, re.S) for line in block.splitlines()]


def test_the_tour_of_the_model_quotes_lines_of_the_model():
    quoted = code_lines("how-the-model-works.md")
    lines = {line.strip() for line in (REPO / "model.py").read_text(encoding="utf-8").splitlines()}
    assert len(quoted) > 15
    for line in quoted:
        assert any(line.split("  # ")[0] == own.split("  # ")[0] for own in lines), line


@pytest.mark.parametrize(("n_vocab", "loss"), [(65, "4.17"), (50257, "10.82")])
def test_the_tour_gives_the_loss_of_a_model_that_knows_nothing(n_vocab, loss):
    assert f"{math.log(n_vocab):.2f}" == loss
    assert loss in (REPO / "docs" / "how-the-model-works.md").read_text(encoding="utf-8")
