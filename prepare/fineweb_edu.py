"""FineWeb-Edu: the web pages of FineWeb that teach; the sample of 10 billion tokens, others by --config"""

import argparse

from prepare import hub

TOKENIZER, VAL_FRACTION = "gpt2", 0.0005


def add_arguments(parser: argparse.ArgumentParser) -> None:
    hub.add_options(parser, "sample-10BT")


def documents(args: argparse.Namespace) -> hub.HubDocuments:
    return hub.HubDocuments("HuggingFaceFW/fineweb-edu", args)
