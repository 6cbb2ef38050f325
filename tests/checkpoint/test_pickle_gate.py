from __future__ import annotations

import copyreg
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from moe.checkpoint.pickle_gate import DCP_METADATA_GLOBALS, check_pickle, weights_only_forced
from moe.errors import CorruptCheckpointError


def short(text: str) -> bytes:
    return b"\x8c" + bytes([len(text)]) + text.encode()


def hostile_pickles(mark: Path) -> dict[str, bytes]:
    """Each runs `touch mark` under a plain `pickle.load`."""
    command = f"touch {mark}"
    call = b"\x85R."  # TUPLE1 REDUCE STOP
    return {
        "global": b"cos\nsystem\n" + short(command) + call,
        "posix alias": b"cposix\nsystem\n" + short(command) + call,
        "stack global": b"\x80\x04" + short("os") + short("system") + b"\x93" + short(command) + call,
        # The operands come from the memo, in the other order, behind allowed names that are popped.
        "memo": b"\x80\x04" + short("system") + b"\x94" + short("os") + b"\x94"
        + b"ctorch\nSize\n0" + short("torch") + b"0h\x01h\x00\x93" + short(command) + call,
        # An allowed name is memoised and its slot overwritten before use.
        "memo overwritten": b"\x80\x04" + short("Size") + b"q\x07" + short("system") + b"q\x07"
        + short("os") + b"h\x07\x93" + short(command) + call,
        "long memo": b"\x80\x04" + short("os") + b"r\xff\x00\x00\x00" + b"0" + short("system") + b"p9\n0"
        + b"j\xff\x00\x00\x00" + b"g9\n\x93" + short(command) + call,
        "duplicate": b"\x80\x04" + short("os") + b"20" + short("system") + b"\x93" + short(command) + call,
        "inst": b"(" + short(command) + b"ios\nsystem\n.",
        "obj": b"(cos\nsystem\n" + short(command) + b"o.",
        "dotted name": b"\x80\x04" + short("os") + short("path.os.system") + b"\x93" + short(command) + call,
        "after a real object": b"\x80\x04" + short("torch") + short("Size") + b"\x93)R0"
        + b"cos\nsystem\n" + short(command) + call,
        "builtins eval": b"cbuiltins\neval\n" + short(f"__import__('os').system({command!r})") + call,
    }  # fmt: skip


HOSTILE_NAMES = list(hostile_pickles(Path("mark")))


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_hostile_pickle_is_refused_without_being_run(tmp_path: Path, name: str) -> None:
    mark, path = tmp_path / "mark", tmp_path / ".metadata"
    path.write_bytes(hostile_pickles(mark)[name])
    with pytest.raises(CorruptCheckpointError, match=r"\.metadata refers to (os|posix|builtins)\."):
        check_pickle(path, DCP_METADATA_GLOBALS)
    assert not mark.exists()
    # The sample must be a real attack, or refusing it proves nothing.
    with path.open("rb") as file:
        pickle.load(file)
    assert mark.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"garbage",
        b"Pid\n.",
        b"\x80\x04" + short("id") + b"Q.",
        b"\x82\xf0.",
        b"\x80\x04" + short("torch") + b"K\x01\x93.",
        b"\x80\x04" + short("torch") + short("Size") + b"\x93",
        b"h\x05.",
        b"\x80\x63N.",
    ],
    ids=[
        "empty",
        "garbage",
        "persid",
        "binpersid",
        "ext",
        "name is a number",
        "no stop",
        "empty memo",
        "protocol",
    ],
)
def test_a_pickle_that_cannot_be_resolved_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / ".metadata"
    path.write_bytes(content)
    with pytest.raises(CorruptCheckpointError, match=r"\.metadata is not a well-formed pickle"):
        check_pickle(path, DCP_METADATA_GLOBALS)


def test_an_extension_code_is_held_to_the_list(tmp_path: Path) -> None:
    path = tmp_path / ".metadata"
    path.write_bytes(b"\x82\xf0.")
    copyreg.add_extension("os", "system", 0xF0)
    try:
        with pytest.raises(CorruptCheckpointError, match=r"os\.system"):
            check_pickle(path, DCP_METADATA_GLOBALS)
    finally:
        copyreg.remove_extension("os", "system", 0xF0)


def test_state_set_on_an_allowed_class_itself_is_refused(tmp_path: Path) -> None:
    # BUILD with slot state would call setattr on the class, for the whole process.
    path = tmp_path / ".metadata"
    metadata = b"ctorch.distributed.checkpoint.metadata\nMetadata\n"
    path.write_bytes(b"\x80\x04" + metadata + b"N}" + short("version") + short("x") + b"s\x86b.")
    with pytest.raises(CorruptCheckpointError, match="not a well-formed pickle"):
        check_pickle(path, DCP_METADATA_GLOBALS)


def test_only_stand_ins_are_built(tmp_path: Path) -> None:
    mark, path = tmp_path / "mark", tmp_path / "p"
    path.write_bytes(hostile_pickles(mark)["global"])
    check_pickle(path, frozenset({("os", "system")}))
    assert not mark.exists()


def test_the_gate_imports_nothing_that_it_reads_about(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from moe.checkpoint import manifest, pickle_gate, store;"
        "p = Path(sys.argv[1]); p.write_bytes(b'ctorch\\nSize\\n)R.');"
        "pickle_gate.check_pickle(p, pickle_gate.DCP_METADATA_GLOBALS);"
        "assert not {'torch', 'megatron'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program, tmp_path / "p"], check=True)


def test_metadata_that_dcp_wrote_is_accepted(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    import torch.distributed.checkpoint as dcp

    names = {name for module, name in DCP_METADATA_GLOBALS if module == "torch"} - {"Size"}
    dtypes = [getattr(torch, name) for name in sorted(names)]
    weights = {str(dtype): torch.empty(3, dtype=dtype) for dtype in dtypes}
    dcp.save({**weights, "nested": {"step": 3, "list": [torch.ones(2, 2)]}}, checkpoint_id=tmp_path)
    check_pickle(tmp_path / ".metadata", DCP_METADATA_GLOBALS)
    allowed = DCP_METADATA_GLOBALS - {("torch", "bfloat16")}
    with pytest.raises(CorruptCheckpointError, match=r"torch\.bfloat16"):
        check_pickle(tmp_path / ".metadata", allowed)


def test_save_plans_that_megatron_adds_to_the_metadata_are_accepted(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter

    planner, writer = DefaultSavePlanner(), FileSystemWriter(tmp_path)
    planner.set_up_planner({"weight": torch.ones(2, 2), "step": 3}, is_coordinator=True)
    plans, metadata = planner.create_global_plan([planner.create_local_plan()])
    metadata.all_local_plans = writer.prepare_global_plan(plans)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    check_pickle(tmp_path / ".metadata", DCP_METADATA_GLOBALS)


class Hostile:
    """Unpickling it creates a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.mark),)


def test_objects_inside_shards_cannot_run_while_weights_only_is_forced(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    mark = tmp_path / "mark"
    dcp.save({"object": Hostile(mark), "step": 3}, checkpoint_id=tmp_path / "c")
    check_pickle(tmp_path / "c" / ".metadata", DCP_METADATA_GLOBALS)  # the gate alone does not see it
    with weights_only_forced():
        harmless: dict[str, object] = {"step": 0}
        dcp.load(harmless, checkpoint_id=tmp_path / "c")
        assert harmless == {"step": 3}
        with pytest.raises(CheckpointException, match="Weights only load failed"):
            dcp.load({"object": 0}, checkpoint_id=tmp_path / "c")
    assert not mark.exists()
    dcp.load({"object": 0}, checkpoint_id=tmp_path / "c")
    assert mark.exists(), "torch no longer runs it: weights_only_forced may have become unnecessary"


def test_forcing_puts_the_environment_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", raising=False)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    before = dict(os.environ)
    with pytest.raises(KeyError), weights_only_forced():
        assert os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] == "1"
        assert "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD" not in os.environ
        raise KeyError
    assert dict(os.environ) == before
