import subprocess
import sys
from pathlib import Path

import pytest

from moe.data import default, stdlib_corpus
from moe.data.default import ensure_default
from moe.data.tokenizer import Tokenizer
from moe.data.validate import validate_prefix
from moe.errors import InputError

VOCAB = 320


@pytest.fixture
def small_library(tmp_path, monkeypatch):
    """A standard library of 200 short modules, so that a build takes a moment."""
    root = tmp_path / "stdlib"
    root.mkdir()
    for n in range(200):
        body = " ".join(f"name_{n}_{m}" for m in range(40))
        (root / f"module_{n:03}.py").write_text(f'"""Module number {n}."""\n{body}\n')
    monkeypatch.setattr(stdlib_corpus.sysconfig, "get_path", lambda name: str(root))
    return root


def test_default_is_built_once_and_is_valid(small_library, tmp_path):
    lines = []
    data = ensure_default(tmp_path / "cache", VOCAB, lines.append)
    tokenizer = Tokenizer.load(data.tokenizer)
    assert tokenizer.vocab_size == VOCAB
    train = validate_prefix(data.train, tokenizer.fingerprint)
    heldout = validate_prefix(data.heldout, tokenizer.fingerprint)
    assert train.documents > heldout.documents > 0
    assert lines
    again = []
    assert ensure_default(tmp_path / "cache", VOCAB, again.append) == data
    assert not again


def test_another_corpus_or_vocabulary_is_another_build(small_library, tmp_path):
    first = ensure_default(tmp_path / "cache", VOCAB)
    assert ensure_default(tmp_path / "cache", VOCAB + 1) != first
    (small_library / "module_000.py").write_text("changed = 1\n")
    assert ensure_default(tmp_path / "cache", VOCAB) != first


def test_failed_build_leaves_no_folder(small_library, tmp_path, monkeypatch):
    def fail(*arguments, **options):
        raise InputError("stopped in the middle")

    with monkeypatch.context() as patch:
        patch.setattr(default, "prepare_documents", fail)
        with pytest.raises(InputError, match="in the middle"):
            ensure_default(tmp_path / "cache", VOCAB)
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    assert ensure_default(tmp_path / "cache", VOCAB).tokenizer.is_file()


def test_python_without_sources_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(stdlib_corpus.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(InputError, match="install a full Python or set data"):
        ensure_default(tmp_path / "cache", VOCAB)


def test_unwritable_cache_is_refused(small_library, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="choose another cache"):
        ensure_default(tmp_path / "file" / "cache", VOCAB)


PROGRAM = """
import sys, sysconfig
from pathlib import Path
sysconfig.get_path = lambda name: sys.argv[1]
from moe.data.default import ensure_default
lines = []
print(ensure_default(Path(sys.argv[2]), 320, lines.append).train, bool(lines))
"""


def test_two_processes_at_once_build_once(small_library, tmp_path):
    command = [sys.executable, "-c", PROGRAM, str(small_library), str(tmp_path / "cache")]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=60)[0].split() for process in started]
    assert outputs[0][0] == outputs[1][0]
    assert sorted(built for _, built in outputs) == ["False", "True"]
    assert validate_prefix(Path(outputs[0][0])).documents > 0
