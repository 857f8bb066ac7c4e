"""Turn text into token shards: `python prepare CORPUS [options]`.

Every module here is a corpus, except `pipeline` (documents -> shards), `reading` (files -> documents), `encoding`
(character encodings) and `inspection`; acorn/data/corpora.py lists them. To add a corpus, add a file with:

    the first line of its docstring   a description
    TOKENIZER                         the default tokenizer
    documents(args)                   a re-iterable of documents: str, or an iterable of str blocks for documents too
                                      long for memory
    add_arguments(parser)             optional: options of this corpus
    VAL_FRACTION                      optional: the default of --val_fraction, otherwise 0.1
    default_name(args)                optional: the default name of the dataset, otherwise the module's name
    DEFAULT_NAME                      optional: words for it in the help text, otherwise "after the first file"

A corpus can support bookmarks, so that an interrupted preparation does not read everything again, and can have its own
validation split: see `pipeline.prepare` and `pipeline.Document`. A corpus that does not consist of documents (`chat`)
has `prepare(args, out, ...)` instead of `documents`.
"""
