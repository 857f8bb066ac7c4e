"""OpenWebText: 8 million web pages, 40 GB, 9 billion GPT-2 tokens; nanoGPT's corpus for GPT-2 124M"""

import argparse

from prepare import hub

TOKENIZER, VAL_FRACTION = "gpt2", 0.0005


def add_arguments(parser: argparse.ArgumentParser) -> None:
    hub.add_options(parser)


def documents(args: argparse.Namespace) -> hub.HubDocuments:
    return hub.HubDocuments("Skylion007/openwebtext", args)
