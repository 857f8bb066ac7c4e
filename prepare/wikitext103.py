"""WikiText-103: 28,000 good and featured articles of Wikipedia, 540 MB, with its own validation split"""

import argparse
import re
from collections.abc import Iterator

from prepare import hub

TOKENIZER = "gpt2"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    hub.add_options(parser, config="wikitext-103-raw-v1", val_split="validation")


def documents(args: argparse.Namespace) -> hub.HubDocuments:
    return hub.HubDocuments("Salesforce/wikitext", args, join=articles)


def articles(lines: Iterator[str]) -> Iterator[str]:
    """Join lines (the rows) into articles. An article begins with ` = Title = `, a section with ` = = Title = = `."""
    article = ""
    for line in lines:
        if re.fullmatch(r" = (?!=).* = \n", line):
            yield article
            article = ""
        article += line
    yield article
