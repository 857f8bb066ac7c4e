"""Text goes in, token shards come out: `python prepare CORPUS [options]`.

Every module here but `pipeline`, `reading` and `inspection` is a corpus. The first line of its docstring says what it
is; `TOKENIZER` names its default tokenizer; `documents(args)` gives an iterable of documents (str) that can be gone
through twice; and where it has options of its own, `add_arguments(parser)` adds them. A new corpus is a new file.
A corpus that is not made of documents (`chat`) has `prepare(args, out, ...)` in place of `documents`.
"""
