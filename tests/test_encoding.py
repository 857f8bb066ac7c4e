"""prepare/encoding.py: encodings are detected correctly or not at all, and `prepare text` uses them."""

import codecs
import json
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from helpers import prepare_fails

from acorn import UserError
from acorn.data.shards import load_dataset
from prepare import __main__ as cli
from prepare import encoding, reading
from prepare.encoding import detect

pytestmark = pytest.mark.usefixtures("in_tmp_path")
CHINESE = "今天天气很好，适合出游。我们去公园看花，然后在湖边吃午饭。\n孩子们在草地上放风筝，老人坐在树下下棋。\n"
TAIWANESE = "今天天氣很好，適合出遊。我們去公園看花，然後在湖邊吃午飯。\n孩子們在草地上放風箏，老人坐在樹下下棋。\n"
JAPANESE = (
    "今日は天気がとても良いので、公園へ花を見に行きました。\n湖のそばで昼ご飯を食べて、子供たちは凧を揚げました。\n"
)
KOREAN = "오늘은 날씨가 아주 좋아서 공원에 꽃을 보러 갔습니다.\n호숫가에서 점심을 먹고 아이들은 연을 날렸습니다.\n"
RUSSIAN = "Сегодня хорошая погода, и мы пойдём гулять в парк.\nДети запускают змея, старики играют в шахматы.\n"
FRENCH = "Il fait très beau aujourd'hui, nous irons à la forêt.\nL'été dernier, où étiez-vous ? La crème brûlée.\n"
ENGLISH = "The weather is fine today.\n"


def prepare(*argv) -> str:
    """Run `python prepare text ...` and return the text of the dataset."""
    cli.prepare_corpus(["text", *map(str, argv), "--tokenizer=byte", "--val_by=end", "--name=x", "--overwrite"])
    dataset = load_dataset("x")
    ids = [i for part in (dataset.train, dataset.val) for i in part.read([0], len(part))[0].tolist()]
    assert ids[0] == dataset.tokenizer.eot
    return dataset.tokenizer.decode(ids[1:])


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (CHINESE, "gb18030"),
        (CHINESE + "𠮷龘\n", "gb18030"),
        (CHINESE, "gb2312"),
        (TAIWANESE, "big5"),
        (TAIWANESE, "gb18030"),
        (JAPANESE, "shift_jis"),
        (JAPANESE, "iso2022_jp"),
        (JAPANESE * 10, "euc_jp"),
        (KOREAN, "euc_kr"),
        *((text, name) for text in (ENGLISH, CHINESE, RUSSIAN, KOREAN) for name in ("utf-16-le", "utf-16-be")),
        (ENGLISH, "utf-16"),
        (ENGLISH, "utf-32"),
        (ENGLISH, "utf-8-sig"),
        (RUSSIAN, "utf-8"),
        (FRENCH, "utf-8"),
    ],
)
@pytest.mark.parametrize("times", [1, 30])
def test_unambiguous_encoding_is_detected(text, name, times):
    data = (text * times).encode(name)
    found = detect(data, "f")
    decoded = data.decode(found.encoding)
    assert decoded.removeprefix("\ufeff") == text * times
    assert found.confidence is None or found.confidence > 0.9


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (FRENCH, "cp1252"),
        (RUSSIAN, "cp1251"),
        (RUSSIAN, "koi8_r"),
        (RUSSIAN.upper(), "koi8_r"),
        (RUSSIAN, "iso8859_5"),
        (RUSSIAN, "cp866"),
        ("Σήμερα ο καιρός είναι πολύ καλός και θα πάμε στο πάρκο.\n", "cp1253"),
        ("היום מזג האוויר יפה מאוד ואנחנו הולכים לפארק\n", "cp1255"),
        ("الطقس اليوم جميل جدا وسوف نذهب إلى الحديقة\n", "cp1256"),
        ("วันนี้อากาศดีมาก เราจะไปสวนสาธารณะ\n", "tis_620"),
        (CHINESE[:6], "gb18030"),
        (TAIWANESE[:6], "big5"),
        ("caf\u00e9\n", "cp1252"),
    ],
)
@pytest.mark.parametrize("times", [1, 100])
def test_ambiguous_encoding_is_refused(text, name, times):
    if times > 1 and name in ("gb18030", "big5"):
        text = text[:2]  # a longer text in these encodings is unambiguous
    data = (text * (times if name not in ("gb18030", "big5") else 1)).encode(name)
    with pytest.raises(UserError, match="--encoding NAME"):
        detect(data, "f")
    assert detect(data, "f", "replace").encoding == "utf-8"


def test_error_names_likely_encodings_and_the_invalid_byte():
    data = ("ok\n" + FRENCH * 5).encode("cp1252")
    with pytest.raises(UserError, match=r"mine\.txt is not UTF-8: byte 13 is 0xe8 \(line 2\).*cp1252 \(confidence"):
        detect(data, "mine.txt")
    with pytest.raises(UserError, match=r"byte 5 is 0xe4"):  # an incomplete character at the end
        detect(b"hello\xe4\xbb", "f")


def test_damaged_utf8_is_not_detected_as_another_encoding():
    data = (CHINESE * 20).encode()
    at = len(CHINESE.encode()) * 5
    with pytest.raises(UserError, match=f"not UTF-8: byte {at} is 0xff"):
        detect(data[:at] + b"\xff" + data[at:], "f")


def test_encoding_is_detected_after_a_long_ascii_prefix():
    data = ENGLISH.encode() * 20_000 + (CHINESE * 20).encode("gb18030")
    assert len(data) > 5 * encoding.SAMPLE_BYTES and detect(data, "f").encoding == "gb18030"


@pytest.mark.parametrize("name", ["gb18030", "big5", "shift_jis", "utf-16-le", "utf-16-be", "utf-16", "utf-8"])
def test_prepare_prints_the_detected_encoding(name, capsys):
    text = {"big5": TAIWANESE, "shift_jis": JAPANESE}.get(name, CHINESE)
    Path("a.txt").write_bytes(text.encode(name))
    assert prepare("a.txt") == text
    said = capsys.readouterr().err
    assert ("is read as" in said) == (name != "utf-8")
    assert ("confidence" in said) == (name not in ("utf-8", "utf-16"))
    assert prepare("a.txt", f"--encoding={name}") == text and "is read as" not in capsys.readouterr().err


def test_encoding_option(capsys):
    Path("a.txt").write_bytes(FRENCH.encode("cp1252"))
    for name in ("cp1252", "Windows-1252", "latin-1"):
        assert prepare("a.txt", f"--encoding={name}") == FRENCH
    for name, match in (
        ("gb1803", "Did you mean gb18030"),
        ("base64", "is not a text encoding"),
        ("rot13", "is not a text"),
    ):
        with pytest.raises(UserError, match=match):
            prepare("a.txt", f"--encoding={name}")
    with pytest.raises(UserError, match=r"a\.txt is not gb18030: byte .* another --encoding"):
        prepare("a.txt", "--encoding=gb18030")


def test_encoding_option_that_cannot_decode_the_file():
    Path("a.txt").write_text("plain text")
    Path("a.jsonl").write_text('{"prompt": "a", "response": "b"}')
    prepare_fails("a.txt cannot be read with --encoding utf-16 .*BOM.*utf-16-le", "text", "a.txt", "--encoding=utf-16")
    prepare_fails("a.jsonl cannot be read .*utf-32-le", "chat", "a.jsonl", "--encoding=utf-32")
    prepare_fails("a.txt cannot be read with --encoding idna", "text", "a.txt", "--encoding=idna")


def test_encoding_of_record_files_is_detected():
    line = json.dumps({"text": CHINESE}, ensure_ascii=False) + "\n"
    for name in ("gb18030", "utf-16", "utf-16-le"):
        Path("a.jsonl").write_bytes((line * 20).encode(name))
        assert prepare("a.jsonl").count(CHINESE) == 20
        Path("a.csv").write_bytes(("id,text\n" + f'1,"{CHINESE}"\n' * 20).encode(name))
        assert prepare("a.csv").count(CHINESE) == 20


def test_byte_order_mark_is_not_part_of_a_csv_header():
    for name in ("gb18030", "utf-8", "utf-16-le"):
        for header in ("text,id", '"text",id'):
            Path("a.csv").write_bytes(("\ufeff" + header + "\n" + f'"{CHINESE}",1\n' * 20).encode(name))
            assert prepare("a.csv", f"--encoding={name}").count(CHINESE) == 20


def test_characters_that_span_blocks_are_decoded(monkeypatch):
    for size in (7, 64, 1001):
        monkeypatch.setattr(reading, "BLOCK_BYTES", size)
        for name in ("gb18030", "utf-16-le", "shift_jis", "iso2022_jp"):
            text = JAPANESE * 20 if "jis" in name or "jp" in name else (CHINESE + "𠮷\r\n") * 20
            Path("a.txt").write_bytes(text.encode(name))
            assert "".join(reading.text_blocks("a.txt", encoding=name)) == text.replace("\r\n", "\n")


def test_line_breaks_are_normalized_as_in_text_mode(monkeypatch, capsys):
    Path("a.txt").write_bytes(b"one\r\ntwo\rthree\n\r\n" * 400)
    want = Path("a.txt").read_text()
    assert "\r" not in want and prepare("a.txt") == want
    monkeypatch.setattr(reading, "BLOCK_BYTES", 4)  # a block ends between \r and \n
    assert prepare("a.txt") == want


def test_replaced_bytes_are_counted(capsys):
    Path("few.txt").write_bytes(ENGLISH.encode() * 400 + b"caf\xe9 \xff\n")
    assert prepare("few.txt", "--errors=replace").endswith("caf\ufffd \ufffd\n")
    said = capsys.readouterr().err
    assert said.count("U+FFFD") == 1 and "note: " in said and " 2 times" in said and "warning" not in said
    Path("many.txt").write_bytes(FRENCH.encode("cp1252") * 10)
    wrong = sum(not char.isascii() for char in FRENCH * 10)
    assert prepare("many.txt", "--errors=replace").count("\ufffd") == wrong
    said = capsys.readouterr().err
    assert "warning: " in said and f" {wrong} times" in said and "--encoding NAME" in said


def test_replaced_bytes_in_conversations_are_counted(capsys):
    line = json.dumps({"prompt": "Which word?", "response": "caf\u00e9"}, ensure_ascii=False) + "\n"
    Path("a.jsonl").write_bytes(line.encode("cp1252") * 40)
    argv = ["chat", "a.jsonl", "--tokenizer=byte"]
    with pytest.raises(UserError, match=r"not UTF-8.*--encoding NAME"):
        cli.prepare_corpus(argv)
    cli.prepare_corpus([*argv, "--errors=replace"])
    said = capsys.readouterr().err
    assert "U+FFFD" in said and " 40 times" in said
    cli.prepare_corpus([*argv, "--encoding=cp1252", "--overwrite"])
    assert "replaced" not in capsys.readouterr().err


def test_encoding_of_conversation_files_is_detected(capsys):
    record = {"prompt": CHINESE, "response": CHINESE}
    for name, data in (
        ("a.jsonl", (json.dumps(record, ensure_ascii=False) + "\n") * 20),
        ("a.json", json.dumps([record] * 20, ensure_ascii=False)),
        ("a.csv", "prompt,response\n" + f'"{CHINESE}","{CHINESE}"\n' * 20),
    ):
        Path(name).write_bytes(data.encode("gb18030"))
        cli.prepare_corpus(["chat", name, "--tokenizer=bpe:300", "--name=x", "--overwrite"])
        dataset = load_dataset("x")
        text = dataset.tokenizer.decode(dataset.train.read([0], len(dataset.train))[0])
        assert text.count(CHINESE) == 36
        assert capsys.readouterr().err.count(f"{name} is read as GB18030") == 1  # although it is read more than once


def test_conversation_file_that_is_not_text_is_refused():
    for name in ("a.jsonl", "a.csv", "a.json"):
        Path(name).write_bytes(b"%PDF-1.7\n%\xe2\xe3")
        for option in ([], ["--encoding=cp1252"], ["--errors=replace"], ["--skip_bad"]):
            with pytest.raises(UserError, match=rf"{name} is a PDF document, not text.*pdftotext"):
                cli.prepare_corpus(["chat", name, "--tokenizer=byte", *option])


def test_replacement_and_nul_characters_in_the_input_are_reported(capsys):
    Path("a.txt").write_text(ENGLISH * 50 + "caf\ufffd\n", encoding="utf-8")
    prepare("a.txt")
    assert "already contains 1 U+FFFD" in capsys.readouterr().err
    Path("b.txt").write_bytes(ENGLISH.encode() * 50 + b"a\0b\n")
    prepare("b.txt")
    assert "1 NUL characters" in capsys.readouterr().err
    Path("c.jsonl").write_text('{"prompt": "a", "response": "cut \\ud83d"}\n' * 3)  # the first half of an emoji
    cli.prepare_corpus(["chat", "c.jsonl", "--tokenizer=byte"])
    assert "3 lone surrogates" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"%PDF-1.7\n%\xe2\xe3", "a PDF document.*pdftotext"),
        (b"{\\rtf1\\ansi fine weather}", "an RTF document"),
        (b"PK\x03\x04" + bytes(40), "a zip archive"),
        (bytes(4000), "4,000 of its first 4,000 bytes are NUL"),
        (b"text\0\0\0\0" * 500, "2,000 of its first 4,000 bytes are NUL"),
    ],
)
def test_binary_file_is_refused_with_its_type(data, match):
    Path("mine.txt").write_bytes(data)
    with pytest.raises(UserError, match=rf"mine\.txt is.*{match}"):
        prepare("mine.txt")
    Path("folder").mkdir()
    Path("folder/mine.txt").write_bytes(data)
    Path("folder/fine.txt").write_text(ENGLISH)
    assert prepare("folder") == ENGLISH  # other files in a folder are skipped


def test_html_is_reported_in_a_note(capsys):
    for i, page in enumerate(("<html><body><p>fine</p></body></html>\n", "\n<!DOCTYPE html>\n<p>fine weather\n")):
        Path(f"{i}.html").write_text(page * 9)
        assert prepare(f"{i}.html") == page * 9
        assert f"{i}.html is HTML" in capsys.readouterr().err
    Path("a.txt").write_text("The tag <html> begins a page.\n" * 9)
    prepare("a.txt")
    assert "HTML" not in capsys.readouterr().err


def test_encoding_of_a_large_file_is_detected_from_a_sample(monkeypatch):
    with open("a.txt", "wb") as file:
        file.write((CHINESE * 15_000).encode("gb18030"))
        file.truncate(1 << 33)
    asked = []
    monkeypatch.setattr(encoding, "_guesses", lambda *args, find=encoding._guesses: asked.append(args) or find(*args))
    tracemalloc.start()
    from prepare.text import TextFiles

    files = TextFiles()
    files.add("a.txt")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert files.sources[0].encoding == "gb18030" and peak < 32 << 20
    assert max(len(sample) for sample, _ in asked) <= encoding.SAMPLE_BYTES


# ---------------------------------------------------------------------------------------------------------------------
# parquet


def strings(values: list[bytes], type_=None) -> pyarrow.Array:
    """Return a string column of arbitrary bytes, as other programs may write it."""
    return pyarrow.Array.from_buffers(type_ or pyarrow.string(), len(values), pyarrow.array(values).buffers())


def write_parquet(folder: str, column, **options) -> str:
    Path(folder).mkdir(exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), f"{folder}/train.parquet", **options)
    return folder


@pytest.mark.parametrize("dictionary", [True, False])
def test_parquet_strings_that_are_not_utf8(dictionary, capsys):
    folder = write_parquet("p", strings([b"good text"] * 30 + [b"caf\xe9 ok"]), use_dictionary=dictionary)
    path = f"{folder}/train.parquet"
    with pytest.raises(UserError, match=r"row 31 of p/train\.parquet is not UTF-8 in its field 'text': byte 3 is 0xe9"):
        prepare(path)
    assert prepare(path, "--errors=replace").endswith("caf\ufffd ok")
    assert "U+FFFD" in capsys.readouterr().err
    assert prepare(path, "--encoding=cp1252").endswith("caf\u00e9 ok")
    if not dictionary:
        return
    hub = ["hub", folder, "--tokenizer=byte", "--val_by=end", "--val_fraction=0.1"]
    with pytest.raises(UserError, match=r"row 31 of p is not UTF-8 in its field 'text': byte 3 is 0xe9"):
        cli.prepare_corpus(hub)
    capsys.readouterr()
    cli.prepare_corpus([*hub, "--errors=replace"])
    said = capsys.readouterr().err
    assert "replaced by U+FFFD 1 times" in said and "--encoding" not in said


def test_nested_parquet_strings_that_are_not_utf8():
    turns = [{"role": "user", "content": b"q"}, {"role": "assistant", "content": b"caf\xe9"}]
    content, role = strings([turn["content"] for turn in turns]), [turn["role"] for turn in turns]
    turn = pyarrow.StructArray.from_arrays([role, content], ["role", "content"])
    tags = pyarrow.MapArray.from_arrays([0, 1], strings([b"caf\xe9"]), [None])
    columns = {"messages": pyarrow.ListArray.from_arrays([0, 2], turn), "tags": tags}
    pyarrow.parquet.write_table(pyarrow.table(columns), "a.parquet")
    with pytest.raises(UserError, match=r"row 1 of a\.parquet is not UTF-8 in its field 'messages': byte 3 is 0xe9"):
        list(reading._parquet("a.parquet", None, "strict"))
    for errors, encoding_, word in (("replace", None, "caf\ufffd"), ("strict", "cp1252", "caf\u00e9")):
        ((_, row),) = reading._parquet("a.parquet", None, errors, encoding_)
        assert row["messages"] == [{"role": "user", "content": "q"}, {"role": "assistant", "content": word}]
        assert row["tags"] == [(word, None)]


def test_parquet_field_whose_name_is_not_utf8():
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"], "caXX": ["b"]}), "a.parquet", store_schema=False)
    data = Path("a.parquet").read_bytes()
    Path("a.parquet").write_bytes(data.replace(b"caXX", b"ca\xe9\xff"))
    with pytest.raises(UserError, match=r"a\.parquet has a field whose name is not UTF-8"):
        prepare("a.parquet")


def test_long_parquet_cells_are_read_in_blocks(monkeypatch):
    monkeypatch.setattr(reading, "MAX_WHOLE_CELL_BYTES", 1000)
    monkeypatch.setattr(reading, "BLOCK_BYTES", 64)
    long = CHINESE * 50
    path = write_parquet("p", [long, "short", long, ""]) + "/train.parquet"
    texts = [text if isinstance(text, str) else "".join(text) for text in reading.records(path, None)]
    assert texts == [long, "short", long, ""]
    bad = write_parquet("q", strings([long.encode() + b"\xff" + long.encode()])) + "/train.parquet"
    with pytest.raises(UserError, match=f"byte {len(long.encode())} is 0xff"):
        ["".join(text) for text in reading.records(bad, None)]


@pytest.mark.parametrize("dictionary", [True, False])
def test_parquet_rows_are_decoded_in_bounded_memory(dictionary):
    """Peak memory depends on the stored size, not on the total length of the rows in a batch."""
    rng = np.random.default_rng(0)
    documents = [rng.integers(97, 123, 1 << 18, dtype=np.uint8).tobytes().decode() for _ in range(8)]
    table = {"text": documents * 24 if dictionary else documents}  # 50 MB of text with a dictionary, or 2 MB without
    pyarrow.parquet.write_table(pyarrow.table(table), "a.parquet", use_dictionary=dictionary)
    before, pool = pyarrow.total_allocated_bytes(), pyarrow.default_memory_pool()
    largest = n = 0
    for text in reading.records("a.parquet", None):
        largest, n = max(largest, pool.bytes_allocated() - before), n + len(text)
    assert n == sum(map(len, table["text"])) and largest < 40 << 20


def test_parquet_that_needs_too_much_memory_is_refused(monkeypatch):
    for limit, match in (("MAX_RECORD", "rows of"), ("MAX_PAGE_BYTES", "a page of")):
        with monkeypatch.context() as patch:
            patch.setattr(reading, limit, 1 << 20)
            folder = write_parquet("p", ["word " * (1 << 19)] * 2 + ["x"] * (limit != "MAX_RECORD"), compression="zstd")
            with pytest.raises(UserError, match=f"p/train.parquet has {match}"):
                prepare(f"{folder}/train.parquet")
            with pytest.raises(UserError, match=f"{match} "):
                cli.prepare_corpus(["hub", folder, "--tokenizer=byte"])


def test_detectable_encodings_exist_in_python():
    for name in (
        *encoding.DETECTED,
        *encoding.COMMON_ENCODINGS,
        *encoding.FAMILIES.values(),
        *encoding.BYTE_ORDER_MARKS.values(),
    ):
        assert codecs.lookup(name)
