"""TinyStories: 2 million short stories in the vocabulary of a small child, 2 GB"""

import argparse

from prepare import hub

TOKENIZER = "gpt2"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    hub.add_options(parser, val_split="validation")


def documents(args: argparse.Namespace) -> hub.HubDocuments:
    return hub.HubDocuments("roneneldan/TinyStories", args)
