"""Text goes in, token shards come out: `python prepare CORPUS [options]`.

Every module here is a corpus, but `pipeline` (documents -> shards), `reading` (files -> documents) and `inspection`. A
new corpus is a new file:

    the first line of its docstring   says what it is
    TOKENIZER                         its default tokenizer
    documents(args)                   an iterable of documents, which can be gone through more than once: str, or an
                                      iterable of str, block by block, for what is too long to be held whole
    add_arguments(parser)             options of its own, where it has any
    VAL_FRACTION                      where its default is not 0.1
    default_name(args)                where that is not the name of the module

Files and hub datasets can also say where they are, so that a stopped preparation need not read all again; and a corpus
may come with a validation split: see `pipeline.prepare` and `pipeline.Document`. One that is not made of documents
(`chat`) has `prepare(args, out, ...)` in place of `documents`.
"""
