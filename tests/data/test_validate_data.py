import json
import socket
import struct

import numpy as np
import pytest

from moe.data.indexed import HEADER, bin_path, idx_path, indexed_writer, sidecar_path
from moe.data.prepare import prepare_documents
from moe.data.split import Document
from moe.data.validate import check_ids, validate_prefix
from moe.errors import CorruptDataError, InputError

VOCAB = 257
LENGTHS = (6, 2, 4)  # tokens of each document, the closing id included


@pytest.fixture
def prefix(tmp_path, byte_tokenizer):
    documents = [Document(str(n), "x" * (length - 1)) for n, length in enumerate(LENGTHS)]
    prepare_documents(documents, byte_tokenizer, tmp_path / "set")
    return tmp_path / "set"


def _patch(path, offset, data):
    content = bytearray(path.read_bytes())
    content[offset : offset + len(data)] = data
    path.write_bytes(content)


def _refusal(prefix):
    with pytest.raises(CorruptDataError) as error:
        validate_prefix(prefix)
        check_ids(prefix, VOCAB)
    return str(error.value)


def test_good_files_are_described(prefix, byte_tokenizer):
    info = validate_prefix(prefix, byte_tokenizer.fingerprint)
    assert (info.documents, info.tokens, info.dtype, info.text_bytes) == (3, 12, "uint16", 9)
    sidecar_path(prefix).unlink()
    assert validate_prefix(prefix, "anything").tokenizer is None


@pytest.mark.parametrize("cut", [1, 2, 23])
def test_truncated_bin_is_refused_with_both_sizes(prefix, cut):
    path = bin_path(prefix)
    path.write_bytes(path.read_bytes()[:-cut])
    message = _refusal(prefix)
    assert f"{path} is truncated: {24 - cut} bytes, its .idx needs 24" in message
    assert f"byte offset {24 - cut}" in message


def test_empty_and_long_bin_are_refused(prefix):
    path = bin_path(prefix)
    path.write_bytes(path.read_bytes() + b"\0")
    assert "too long: 25 bytes, its .idx needs 24" in _refusal(prefix)
    path.write_bytes(b"")
    assert "truncated: 0 bytes" in _refusal(prefix)


@pytest.mark.parametrize("position", [0, 7, 11])
def test_id_outside_the_vocabulary_is_refused_with_its_offset(prefix, position):
    _patch(bin_path(prefix), 2 * position, struct.pack("<H", VOCAB))
    message = _refusal(prefix)
    assert f"{bin_path(prefix)}: token id {VOCAB} at byte offset {2 * position} " in message
    check_ids(prefix, VOCAB + 1)


def test_first_of_many_bad_ids_is_named_far_into_a_large_file(tmp_path):
    prefix = tmp_path / "large"
    ids = np.full(9_000_000, 7)
    ids[[8_500_000, 8_700_000]] = 300
    with indexed_writer(prefix, VOCAB) as writer:
        writer.add_document(ids)
    assert "token id 300 at byte offset 17000000 " in _refusal(prefix)


def test_negative_id_of_wide_storage_is_refused(tmp_path, byte_tokenizer):
    byte_tokenizer.vocab_size = 100_000
    prefix = tmp_path / "wide"
    prepare_documents([Document("a", "abc")], byte_tokenizer, prefix)
    _patch(bin_path(prefix), 4, struct.pack("<i", -1))
    with pytest.raises(CorruptDataError, match="token id -1 at byte offset 4"):
        check_ids(prefix, 100_000)


@pytest.mark.parametrize("parts", [2, 5, 12, 30])
def test_ranks_that_share_the_ids_find_each_bad_one_once(prefix, parts):
    _patch(bin_path(prefix), 2 * 7, struct.pack("<H", VOCAB))
    finders = []
    for part in range(parts):
        try:
            check_ids(prefix, VOCAB, share=(part, parts))
        except CorruptDataError as error:
            assert "at byte offset 14 " in str(error)
            finders.append(part)
    assert len(finders) == 1


def test_machine_that_cannot_see_the_tokens_is_named(prefix):
    bin_path(prefix).unlink()
    with pytest.raises(InputError, match=f"host {socket.gethostname()} cannot read data file .*set.bin"):
        check_ids(prefix, VOCAB)


POINTERS_AT = HEADER.size + 4 * 3
DOCUMENTS_AT = POINTERS_AT + 8 * 3


@pytest.mark.parametrize(
    ("offset", "data", "expected"),
    [
        (0, b"WRONG", "bad magic"),
        (9, struct.pack("<Q", 2), "version 2 at byte offset 9"),
        (17, b"\x06", "dtype code 6 at byte offset 17"),
        (17, b"\xff", "dtype code 255 at byte offset 17"),
        (18, struct.pack("<Q", 4), "need"),
        (18, struct.pack("<Q", 2**63), "need"),
        (26, struct.pack("<Q", 3), "need"),
        (
            HEADER.size + 4,
            struct.pack("<i", -2),
            f"negative length, entry 1 at byte offset {HEADER.size + 4}",
        ),
        (HEADER.size, struct.pack("<i", 7), f"entry 1 at byte offset {POINTERS_AT + 8}"),
        (POINTERS_AT + 16, struct.pack("<q", 0), f"entry 2 at byte offset {POINTERS_AT + 16}"),
        (DOCUMENTS_AT, struct.pack("<q", 1), f"byte offset {DOCUMENTS_AT} do not run from 0 to 3"),
        (DOCUMENTS_AT + 24, struct.pack("<q", 4), "do not run from 0 to 3"),
        (DOCUMENTS_AT + 8, struct.pack("<q", 9), f"backwards, entry 1 at byte offset {DOCUMENTS_AT + 16}"),
    ],
)
def test_damaged_index_is_refused_with_its_offset(prefix, offset, data, expected):
    _patch(idx_path(prefix), offset, data)
    message = _refusal(prefix)
    assert str(idx_path(prefix)) in message
    assert expected in message


@pytest.mark.parametrize("size", [0, 20, 34, 90])
def test_truncated_index_is_refused(prefix, size):
    idx_path(prefix).write_bytes(idx_path(prefix).read_bytes()[:size])
    message = _refusal(prefix)
    assert f"{idx_path(prefix)}" in message
    assert f"{size} bytes" in message


def test_index_that_lies_about_the_dtype_is_refused(prefix):
    _patch(idx_path(prefix), 17, b"\x04")
    assert "entry 1" in _refusal(prefix)  # the offsets fit two bytes an id, not four


@pytest.mark.parametrize("lengths", [[], [0, 0]])
def test_index_without_data_is_refused(prefix, lengths):
    count = len(lengths)
    header = HEADER.pack(b"MMIDIDX\0\0", 1, 8, count, count + 1)
    arrays = np.zeros(count, np.int32).tobytes() + np.zeros(count, np.int64).tobytes()
    idx_path(prefix).write_bytes(header + arrays + np.arange(count + 1, dtype=np.int64).tobytes())
    bin_path(prefix).write_bytes(b"")
    assert "no data" in _refusal(prefix)


@pytest.mark.parametrize("ending", ["bin", "idx"])
def test_absent_file_is_refused_by_name(prefix, ending):
    path = prefix.with_name(f"set.{ending}")
    path.unlink()
    with pytest.raises(InputError, match=rf"set\.{ending} does not exist"):
        validate_prefix(prefix)


def test_data_of_another_tokenizer_is_refused(prefix):
    with pytest.raises(InputError, match="the run uses other"):
        validate_prefix(prefix, "other")


@pytest.mark.parametrize(
    ("content", "expected"), [("{", "not JSON"), ("[]", "lacks tokens"), ('{"tokens": 12}', "lacks bytes")]
)
def test_damaged_sidecar_is_refused(prefix, content, expected):
    sidecar_path(prefix).write_text(content)
    assert expected in _refusal(prefix)


def test_sidecar_of_another_run_is_refused(prefix):
    sidecar = json.loads(sidecar_path(prefix).read_text())
    sidecar_path(prefix).write_text(json.dumps({**sidecar, "tokens": 13}))
    assert "of two runs" in _refusal(prefix)
