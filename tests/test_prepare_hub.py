"""prepare/hub.py: datasets in the format of the Hugging Face hub, from a local folder, and named corpora on the hub."""

import contextlib
import gzip
from pathlib import Path

import datasets
import pytest
from helpers import RECORDS, Stopped, documents_of, hub_folder, prepare, prepare_fails

from acorn.data.shards import ShardWriter, load_dataset
from prepare import __main__ as cli
from prepare import hub

pytestmark = pytest.mark.usefixtures("in_tmp_path")


def test_hub_preparation_resumes_from_its_bookmark(capsys, small_steps, monkeypatch):
    hub_folder()
    monkeypatch.setattr(hub, "MAX_ROWS", 70)
    argv = ["hub", "hubset", "--val_split=validation", "--tokenizer=byte", "--shard_tokens=1500"]
    prepare(*argv)
    want = {path.name: path.read_bytes() for path in Path("data/hubset").iterdir()}
    save, read_from, calls, bookmarks = ShardWriter.save, hub.HubDocuments.read_from, [], []

    def stop_now_and_then(writer):
        calls.append(1)
        if len(calls) % 8 == 0:
            raise Stopped
        return save(writer)

    def noted(documents, bookmark):
        bookmarks.append(bookmark["documents"])
        return read_from(documents, bookmark)

    monkeypatch.setattr(ShardWriter, "save", stop_now_and_then)
    monkeypatch.setattr(hub.HubDocuments, "read_from", noted)
    argv.append("--overwrite")
    for _ in range(20):
        with contextlib.suppress(Stopped):
            prepare(*argv)
            break
    assert {path.name: path.read_bytes() for path in Path("data/hubset").iterdir()} == want
    assert len(bookmarks) > 3 and max(bookmarks) > 300  # it did not restart from the first row


@pytest.mark.parametrize("streaming", [True, False])
def test_hub_datasets(streaming, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", "cache")
    hub_folder()
    prepare_fails(r"hubset has no field 'body'.*: id, text", "hub", "hubset", "--key=body")
    prepare_fails(r"hubset needs another --split: .*train", "hub", "hubset", "--split=test")
    prepare_fails(r"hubset needs another --config: .*default", "hub", "hubset", "--config=other")
    prepare("hub", "hubset", f"--streaming={streaming}", "--tokenizer=byte", "--val_fraction=0.1")
    dataset = load_dataset("hubset")
    assert len(documents_of(dataset, "train")) + len(documents_of(dataset, "val")) == 600

    options = ("--val_split=validation", "--max_tokens=1000", "--overwrite")
    meta = prepare("hub", "hubset", f"--streaming={streaming}", "--tokenizer=byte", *options)
    assert meta["train"]["tokens"] + meta["val"]["tokens"] == 1000
    dataset = load_dataset("hubset")
    assert documents_of(dataset, "val") == ["val one", "val two"]
    assert documents_of(dataset, "train")[:-1] == RECORDS[: len(documents_of(dataset, "train")) - 1]
    prepare("hub", "hubset", f"--streaming={streaming}", "--tokenizer=byte", *options, "--val_tokens=10")
    dataset = load_dataset("hubset")
    assert documents_of(dataset, "val") == ["val one", "v"]  # the rest of this split is not in train
    assert documents_of(dataset, "train")[0] == RECORDS[0] and len(dataset.train) == 990


@pytest.mark.parametrize(
    ("error", "match"),
    [
        (RuntimeError("Dataset scripts are no longer supported, but found x.py"), "--revision refs/convert/parquet"),
        (datasets.exceptions.DatasetNotFoundError("Dataset 'a/b' is a gated dataset on the Hub."), "hf auth login"),
        (datasets.exceptions.DatasetNotFoundError("Dataset 'a/b' doesn't exist on the Hub"), "there is no dataset a/b"),
        (ConnectionError("Couldn't reach 'a/b' on the Hub"), "cannot be reached.*HF_ENDPOINT.*python prepare stdlib"),
        (ValueError("Config name is missing. Please pick one among: ['x', 'y']"), "needs another --config: .*'y'"),
    ],
)
def test_hub_errors_are_explained(monkeypatch, error, match):
    def ask(*args, **kwargs):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", ask)
    prepare_fails(match, "hub", "a/b")
    assert not list(Path("data").glob("*"))


@pytest.mark.parametrize("tokenizer", ["byte", "bpe:300"])
@pytest.mark.parametrize(
    ("file", "data", "match"),
    [
        ("train.parquet", b"PAR1PAR1", "Parquet file size is 8 bytes"),
        ("train.arrow", b"hello", "File is too small"),
        ("train.csv", b"text,n\na,1\nb\nc,3,4,5\n", "Expected 2 fields in line 4"),
        ("train.csv", b"text\ncaf\xe9\n", "can't decode byte 0xe9"),
        ("train.jsonl", b'{"text": "a"}\n{bad\n', "JSON parse error"),
        ("train.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 99, mtime=0)[:30], "ended before"),
        ("train.jsonl.zst", b"", "empty or cut short"),
    ],
)
def test_unreadable_files_are_reported(file, data, match, tokenizer):
    Path("broken").mkdir()
    Path("broken", file).write_bytes(data)
    prepare_fails(f"datasets cannot read broken: .*{match}", "hub", "broken", f"--tokenizer={tokenizer}")
    assert not list(Path("data").glob("*"))


def test_invalid_dataset_name_is_refused():
    for name in ("./nofolder", "/no/folder", "a/b/c"):
        prepare_fails(f"'{name}' is neither a local folder nor a dataset name.*such as OWNER/NAME", "hub", name)


def test_named_corpora_load_the_expected_dataset(monkeypatch):
    asked = []

    def ask(*args, **kwargs):
        asked.append((*args, kwargs["split"]))
        rows = [{"text": line} for line in (" = A = \n", " one \n", " = = B = = \n", " two \n", " = C = \n", " x \n")]
        return datasets.IterableDataset.from_generator(lambda: iter(rows))

    monkeypatch.setattr(datasets, "load_dataset", ask)
    meta = prepare("wikitext103", "--tokenizer=byte")
    names = ("Salesforce/wikitext", "wikitext-103-raw-v1")
    assert asked == [(*names, "validation"), (*names, "train")] and meta["documents"] == 4
    assert documents_of(load_dataset("wikitext103"), "val") == [
        " = A = \n one \n = = B = = \n two \n",
        " = C = \n x \n",
    ]
    for corpus, name, config in (
        ("openwebtext", "Skylion007/openwebtext", None),
        ("fineweb", "HuggingFaceFW/fineweb", "sample-10BT"),
        ("fineweb_edu", "HuggingFaceFW/fineweb-edu", "sample-10BT"),
        ("tinystories", "roneneldan/TinyStories", None),
    ):
        asked.clear()
        cli.prepare_corpus([corpus, "--tokenizer=byte", "--val_fraction=0.5", f"--out={corpus}"])
        assert asked[-1] == (name, config, "train")
