import json

import numpy as np
import pytest

from moe.data.indexed import bin_path, idx_path, sidecar_path
from moe.data.prepare import prepare, prepare_documents
from moe.data.split import Document
from moe.data.tokenizer import train_byte_bpe
from moe.data.validate import validate_prefix
from moe.errors import CorruptDataError, InputError


def _documents_of(prefix, eod=256):
    ids = np.fromfile(bin_path(prefix), dtype=np.uint16)
    ends = np.flatnonzero(ids == eod)
    return [bytes(part[part != eod].astype(np.uint8)).decode() for part in np.split(ids, ends + 1)[:-1]]


def _jsonl(path, *texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def test_files_lines_and_folders_become_documents_in_order(tmp_path, byte_tokenizer):
    folder = tmp_path / "in"
    (folder / "b").mkdir(parents=True)
    (folder / "b" / "two.md").write_text("# two")
    (folder / "a.py").write_text("one = 1")
    (folder / "__init__.py").write_text("")
    (folder / "picture.png").write_bytes(b"\x89PNG\xff")
    lines = _jsonl(tmp_path / "lines.jsonl", "three", "四")
    odd = tmp_path / "NOTES"
    odd.write_text("five")
    report = prepare([folder, lines, odd], byte_tokenizer, tmp_path / "out" / "set.v1")
    assert _documents_of(tmp_path / "out" / "set.v1") == ["one = 1", "# two", "three", "四", "five"]
    assert (report.documents, report.bytes, report.tokens) == (5, 24, 29)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "set.v1.bin",
        "set.v1.idx",
        "set.v1.json",
    ]


def test_sidecar_says_what_was_written(tmp_path, byte_tokenizer):
    prefix = tmp_path / "out"
    prepare([_jsonl(tmp_path / "in.jsonl", "abc", "")], byte_tokenizer, prefix)
    assert json.loads(sidecar_path(prefix).read_text()) == {
        "documents": 1,
        "tokens": 4,
        "bytes": 3,
        "vocab_size": 257,
        "tokenizer": byte_tokenizer.fingerprint,
        "dtype": "uint16",
    }


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65499, "uint16"), (65500, "int32"), (200_000, "int32")])
def test_ids_take_the_width_that_megatron_gives_them(tmp_path, byte_tokenizer, vocab_size, dtype):
    byte_tokenizer.vocab_size = vocab_size
    byte_tokenizer.eod = vocab_size - 1
    report = prepare_documents([Document("a", "abc")], byte_tokenizer, tmp_path / "out")
    assert report.dtype == dtype
    assert np.fromfile(bin_path(tmp_path / "out"), dtype=dtype).tolist() == [97, 98, 99, vocab_size - 1]


def test_progress_and_many_batches(tmp_path, byte_tokenizer):
    lines = []
    documents = [Document(str(n), "x" * 300_000) for n in range(9)]
    report = prepare_documents(documents, byte_tokenizer, tmp_path / "out", on_progress=lines.append)
    assert report.documents == 9
    assert len(lines) == 3
    assert lines[-1].startswith("9 documents, 2.7 MB")


def test_another_json_key(tmp_path, byte_tokenizer):
    path = tmp_path / "in.jsonl"
    path.write_text('{"content": "abc"}\n\n')
    assert prepare([path], byte_tokenizer, tmp_path / "out", json_key="content").documents == 1


GOOD = b'{"text": "fine"}\n'


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("in.txt", b"abc\xffdef", ["0xff", "byte offset 3", "not UTF-8"]),
        ("in.txt", b"ok\n" * 1000 + b"\xe3\x81", ["0xe3", "byte offset 3000"]),
        ("in.jsonl", GOOD + b'{"text": "\xc3("}\n', ["line 2", f"byte offset {len(GOOD) + 10}", "0xc3"]),
        (
            "in.jsonl",
            GOOD + GOOD + b'{"text": "a"\n',
            ["line 3", f"byte offset {2 * len(GOOD)}", "not JSON", "column"],
        ),
        ("in.jsonl", GOOD + b'{"body": "a"}\n', ["line 2", 'no key "text"', '"body"']),
        ("in.jsonl", GOOD + b'{"text": 5}\n', ["line 2", '"text" is int']),
        ("in.jsonl", GOOD + b'["text"]\n', ["line 2", "expected an object"]),
        ("in.jsonl", GOOD + b'{"text": "\\ud800"}\n', ["line 2", "surrogate"]),
        ("in.jsonl", GOOD + b"[" * 100_000 + b"\n", ["line 2", "nested"]),
        ("in.txt", b"", ["empty", "0 bytes"]),
        ("in.jsonl", b"", ["empty", "0 bytes"]),
    ],
)
def test_damaged_input_is_refused_with_its_place_and_leaves_nothing(
    tmp_path, byte_tokenizer, name, content, expected
):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(CorruptDataError) as error:
        prepare([path], byte_tokenizer, tmp_path / "out" / "set")
    for part in [str(path), *expected]:
        assert part in str(error.value)
    left = tmp_path / "out"
    assert not left.exists() or not list(left.iterdir())


def test_empty_file_in_a_folder_is_refused(tmp_path, byte_tokenizer):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.txt").write_text("")
    with pytest.raises(CorruptDataError, match=r"b\.txt is empty"):
        prepare([tmp_path], byte_tokenizer, tmp_path / "out")


def test_failure_leaves_an_earlier_result_untouched(tmp_path, byte_tokenizer):
    prefix = tmp_path / "out"
    prepare([_jsonl(tmp_path / "good.jsonl", "abc")], byte_tokenizer, prefix)
    before = {path: path.read_bytes() for path in (bin_path(prefix), idx_path(prefix), sidecar_path(prefix))}
    bad = tmp_path / "bad.txt"
    bad.write_bytes(b"x" * 5_000_000 + b"\xff")
    with pytest.raises(CorruptDataError, match="5000000"):
        prepare([_jsonl(tmp_path / "more.jsonl", "y" * 3_000_000), bad], byte_tokenizer, prefix)
    assert {path: path.read_bytes() for path in before} == before
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("content", ["absent", "nothing but a picture", "no text in any line"])
def test_input_without_text_is_refused(tmp_path, byte_tokenizer, content):
    path = tmp_path / "in"
    if content == "nothing but a picture":
        path.mkdir()
        (path / "picture.png").write_bytes(b"\x89")
    elif content == "no text in any line":
        path = _jsonl(tmp_path / "in.jsonl", "", "")
    with pytest.raises(InputError):
        prepare([path], byte_tokenizer, tmp_path / "out")
    assert not bin_path(tmp_path / "out").exists()


def test_unwritable_output_is_refused(tmp_path, byte_tokenizer):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="cannot write"):
        prepare([_jsonl(tmp_path / "in.jsonl", "a")], byte_tokenizer, tmp_path / "file" / "out")


def test_bpe_ids_decode_to_the_text(tmp_path):
    texts = ["def f():\n    return 1\n", "日本語\n"]
    tokenizer = train_byte_bpe(texts * 50, 280, tmp_path / "tokenizer.json")
    prefix = tmp_path / "out"
    prepare([_jsonl(tmp_path / "in.jsonl", *texts)], tokenizer, prefix)
    assert tokenizer.decode(np.fromfile(bin_path(prefix), np.uint16)) == "".join(texts)
    assert validate_prefix(prefix, tokenizer.fingerprint).documents == 2
