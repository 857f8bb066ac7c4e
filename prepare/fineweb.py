"""FineWeb: filtered web pages; the sample of 10 billion tokens, or others with --config"""

import argparse

from prepare import hub

TOKENIZER, VAL_FRACTION = "gpt2", 0.0005


def add_arguments(parser: argparse.ArgumentParser) -> None:
    hub.add_options(parser, "sample-10BT")


def documents(args: argparse.Namespace) -> hub.HubDocuments:
    return hub.HubDocuments("HuggingFaceFW/fineweb", args)
