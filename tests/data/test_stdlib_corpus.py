import hashlib
import os
import subprocess
import sys

import pytest

from moe.data.stdlib_corpus import documents, source_files


@pytest.fixture(scope="module")
def splits():
    return list(documents("train")), list(documents("heldout"))


def _words_13(text):
    parts = text.split()
    return {tuple(parts[i : i + 13]) for i in range(len(parts) - 12)}


def test_sources_leave_out_tests_installed_packages_and_tables():
    names = [name.as_posix() for _, name in source_files()]
    assert {"argparse.py", "json/decoder.py", "pydoc_data/topics.py"} <= set(names)
    assert names == sorted(names)
    unwanted = {"test", "tests", "idlelib", "site-packages", "__pycache__", "encodings"}
    assert not [name for name in names if unwanted & set(name.split("/"))]
    assert not [name for name in names if name.startswith("_sysconfigdata")]


def test_split_is_about_five_percent_without_shared_names_or_runs(splits):
    train, heldout = splits
    train_bytes = sum(len(document.text) for document in train)
    heldout_bytes = sum(len(document.text) for document in heldout)
    assert train_bytes > 5_000_000
    assert 0.01 < heldout_bytes / (train_bytes + heldout_bytes) < 0.15
    assert not {document.name for document in train} & {
        document.name.rsplit("#", 1)[0] for document in heldout
    }
    runs = set().union(*(_words_13(document.text) for document in heldout))
    assert runs
    assert not [document.name for document in train if runs & _words_13(document.text)]


def test_topics_are_documents_of_prose(splits):
    topics = [document for document in splits[0] if document.name.startswith("pydoc_data/topics.py#")]
    assert len(topics) > 50
    assert any("lambda" in document.text for document in topics)


def test_split_does_not_depend_on_the_process(splits):
    code = (
        "import hashlib; from moe.data.stdlib_corpus import documents;"
        "print(hashlib.sha256(repr(list(documents('heldout'))).encode()).hexdigest())"
    )
    other = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert other.stdout.strip() == hashlib.sha256(repr(splits[1]).encode()).hexdigest()
