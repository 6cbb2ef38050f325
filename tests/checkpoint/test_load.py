"""Resuming on several ranks: who reads what of a checkpoint, what counts as damage, which states fit.

A rank that sees another disk than the rest is one whose working folder is another.
"""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from pydantic import JsonValue
from torch import Tensor

from moe.checkpoint import manifest as manifest_module
from moe.checkpoint.load import find_checkpoint
from moe.checkpoint.manifest import commit_manifest, hash_files, read_manifest, split_by_bytes
from moe.checkpoint.save import save_checkpoint
from moe.checkpoint.store import begin, finish
from moe.config.load import load_config
from moe.engine.base import Layout
from moe.engine.megatron_job import MegatronJob
from moe.errors import CorruptCheckpointError, MoeError
from moe.train.loop import Progress
from moe.train.run import RunOptions, _begin, _restore

RANKS = 4
TIMEOUT_S = 30.0  # ranks that disagree on what comes next would wait for each other
QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
SIZES_BYTES = [9_000_000, 100, 5_000_000, 100, 4_000_000, 100, 4_000_000, 100, 3_000_000, 3_000_000, 100, 100]


@pytest.fixture(scope="module")
def pool(start_ranks):
    return start_ranks(RANKS)


def write(root: Path, step: int, state: Mapping[str, JsonValue] | None = None) -> Path:
    """Files of uneven sizes, large and small ones by turns."""
    partial = begin(root, step)
    names = [f"__{index}_0.distcp" for index in range(len(SIZES_BYTES))]
    for name, size_bytes in zip(names, SIZES_BYTES, strict=True):
        (partial / name).write_bytes(f"{step}".encode() * (size_bytes // 2))
    commit_manifest(partial, step=step, entries=hash_files(partial, names), state=state or {})
    return finish(partial)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """checkpoints/ with the steps 10 and 20, in a folder `all`."""
    for step in (10, 20):
        write(tmp_path / "all" / "checkpoints", step)
    return tmp_path / "all" / "checkpoints"


def share(root: Path, rank: int, ranks: int = RANKS) -> list[str]:
    """Files of the newest checkpoint that a rank hashes."""
    files = read_manifest(root / "step_00000020").files
    return [entry.name for entry in split_by_bytes(files, ranks)[rank]]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def flip_bit(path: Path) -> None:
    with path.open("r+b") as file:
        first = file.read(1)[0]
        file.seek(0)
        file.write(bytes([first ^ 1]))


@contextmanager
def inside(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def find(all_see: Path, one_sees: Path | None = None, which: int = -1) -> tuple[str, list[str], list[str]]:
    """What find_checkpoint gives a rank (or its error), its notes, and the files that the rank hashed."""
    notes: list[str] = []
    hashed: list[str] = []
    scans: list[Path] = []
    hashes, scan = manifest_module._size_and_hash, manifest_module._scan
    rank = dist.get_rank()
    with (
        inside(one_sees if rank == which and one_sees else all_see),
        patch.object(manifest_module, "_size_and_hash", lambda p: hashed.append(p.name) or hashes(p)),
        patch.object(manifest_module, "_scan", lambda p: scans.append(p) or scan(p)),
    ):
        try:
            found = str(find_checkpoint(Path("checkpoints"), notes.append))
        except MoeError as error:
            assert error.on_all_ranks
            found = f"{type(error).__name__}: {error}"
    assert rank == 0 or not scans
    return found, notes, hashed


def test_ranks_share_the_bytes_evenly_and_rank_0_alone_scans(pool, root: Path) -> None:
    results = pool.run(find, root.parent, timeout_s=TIMEOUT_S)
    sizes = {entry.name: entry.size_bytes for entry in read_manifest(root / "step_00000020").files}
    assert [found for found, _, _ in results] == ["checkpoints/step_00000020"] * RANKS
    load = [sum(sizes[name] for name in hashed) for _, _, hashed in results]
    assert sum(load) == sum(SIZES_BYTES)
    assert max(load) == 9_000_000  # the largest file
    assert min(load) >= 5_000_000
    assert [sorted(hashed) for _, _, hashed in results] == [sorted(share(root, r)) for r in range(RANKS)]


def test_damage_in_any_share_is_named_once_set_aside_and_the_one_before_found(pool, root: Path) -> None:
    newest = root / "step_00000020"
    damaged = [share(root, rank)[-1] for rank in range(RANKS)]
    for name in damaged:
        flip_bit(newest / name)
    (newest / "extra").touch()
    results = pool.run(find, root.parent, timeout_s=TIMEOUT_S)
    assert [found for found, _, _ in results] == ["checkpoints/step_00000010"] * RANKS
    assert [len(notes) for _, notes, _ in results] == [1, 0, 0, 0]
    (note,) = results[0][1]
    assert "damaged in 5 file(s)" in note
    assert all(f"'{name}'" in note for name in [*damaged, "extra"])
    assert names(root) == ["step_00000010", "step_00000020.corrupt"]

    flip_bit(root / "step_00000010" / "__0_0.distcp")
    results = pool.run(find, root.parent, timeout_s=TIMEOUT_S)
    assert {found.partition(" is intact")[0] for found, _, _ in results} == {
        "CorruptCheckpointError: none of the 1 checkpoint(s) in checkpoints"
    }


@pytest.mark.parametrize("which", [1, 3])
def test_a_rank_that_does_not_see_the_folder_is_named_and_nothing_is_renamed(
    pool, root: Path, tmp_path: Path, which: int
) -> None:
    results = pool.run(find, root.parent, tmp_path, which, timeout_s=TIMEOUT_S)
    where = f"host {socket.gethostname()} cannot read {tmp_path}/checkpoints/step_00000020"
    for found, notes, _ in results:
        assert found.startswith(f"InputError: rank {which}: {where}: No such file")
        assert notes == []
    assert names(root) == ["step_00000010", "step_00000020"]


@pytest.mark.parametrize(("ranks", "second"), [(4, 0), (3, 1)])
def test_bytes_that_one_rank_alone_reads_otherwise_are_no_damage(
    pool, root: Path, tmp_path: Path, ranks: int, second: int
) -> None:
    shutil.copytree(root.parent, tmp_path / "one")
    mine = share(root, 2, ranks)[0]
    flip_bit(tmp_path / "one" / "checkpoints" / "step_00000020" / mine)
    found = [
        found
        for found, _, _ in pool.run(
            find, root.parent, tmp_path / "one", 2, num_ranks=ranks, timeout_s=TIMEOUT_S
        )
    ]
    host = socket.gethostname()
    assert set(found) == {found[0]}
    assert found[0].startswith(f"InputError: rank 2 on host {host} read other bytes of checkpoints/step_")
    assert f"rank {second} on host {host} then read the right ones, in {mine}. " in found[0]
    assert names(root) == names(tmp_path / "one" / "checkpoints") == ["step_00000010", "step_00000020"]


def test_a_file_that_one_rank_alone_misses_is_no_damage(pool, root: Path, tmp_path: Path) -> None:
    shutil.copytree(root.parent, tmp_path / "one")
    there = tmp_path / "one" / "checkpoints" / "step_00000020" / share(root, 2)[0]
    there.unlink()
    found = [found for found, _, _ in pool.run(find, root.parent, tmp_path / "one", 2, timeout_s=TIMEOUT_S)]
    assert set(found) == {found[0]}
    where = f"host {socket.gethostname()} cannot read {there}: No such file"
    assert found[0].startswith(f"InputError: rank 2: {where}")
    assert names(root) == names(tmp_path / "one" / "checkpoints") == ["step_00000010", "step_00000020"]


def test_without_a_checkpoint_all_ranks_say_so(pool, tmp_path: Path) -> None:
    results = pool.run(find, tmp_path, num_ranks=2, timeout_s=TIMEOUT_S)
    assert {found.partition(". ")[0] for found, _, _ in results} == {
        "InputError: there is no complete checkpoint in checkpoints"
    }


def begin_from(source: Path, run_dir: Path) -> str:
    """The error of a new run that starts from the weights of a checkpoint."""
    config = load_config(QUICKSTART, [f"train.init_from={source}"], world_size=2)
    with pytest.raises(CorruptCheckpointError) as caught:
        _begin(Rank("cpu"), config, RunOptions(run_dir, resume=False, note=print))
    return str(caught.value)


def test_damaged_weights_are_not_started_from(pool, tmp_path: Path) -> None:
    model = load_config(QUICKSTART, [], world_size=1).model
    source = write(tmp_path, 1, {"model": model.model_dump(mode="json")})
    damaged = [split_by_bytes(read_manifest(source).files, 2)[rank][0].name for rank in range(2)]
    for name in damaged:
        flip_bit(source / name)
    errors = pool.run(begin_from, source, tmp_path / "run", num_ranks=2, timeout_s=TIMEOUT_S)
    assert errors[0] == errors[1]
    assert all(f"'{name}': XXH3-128" in errors[0] for name in damaged)


# ---- kinds of device ---------------------------------------------------------------------------------------


class Rank:
    """The random states of an engine, and nothing else of it."""

    checkpoint_bytes = 0
    layout = Layout(1, 1, 1, 1, 2, 1)

    def __init__(self, device: str) -> None:
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.torch_device = torch.device(device)
        self.restored: Mapping[str, Tensor] = {}

    def save_shards(self, directory: Path) -> None:
        """No weights."""

    def load_shards(self, directory: Path, step: int) -> None:
        """No weights."""

    def shard_files(self, directory: Path) -> list[str]:
        return []

    def rng_state(self) -> dict[str, Tensor]:
        on_cuda = {"cuda": torch.zeros(16, dtype=torch.uint8)} if self.torch_device.type == "cuda" else {}
        return {"torch": torch.get_rng_state(), **on_cuda}

    def set_rng_state(self, state: Mapping[str, Tensor]) -> None:
        self.restored = state


CASES = (
    # written on, read on, data-parallel ranks then (2 wrote), states restored, what is said
    ("cpu", "cpu", 2, ["torch"], ""),
    ("cuda", "cuda", 2, ["cuda", "torch"], ""),
    ("cpu", "cuda", 2, [], ", on another kind of device"),
    ("cuda", "cpu", 2, [], ", on another kind of device"),
    ("cuda", "cpu", 1, [], ", in another layout, on another kind of device"),
    ("cpu", "cpu", 1, [], ", in another layout"),
)


def write_and_restore(run_dir: Path) -> list[tuple[list[str], list[str]]]:
    """The names of the states that a rank restores and its notes, case by case."""
    state = {
        "layout": Rank.layout.as_dict(),
        "world_size": 2,
        "progress": dict.fromkeys(vars(Progress()), 0),
    }
    seen = []
    for step, (written, read, dp, _, _) in enumerate(CASES):
        save_checkpoint(Rank(written), run_dir / "checkpoints", step, state, keep=1)
        engine, notes = Rank(read), []
        engine.layout = Layout(1, 1, 1, 1, dp, 1)
        _restore(engine, run_dir, notes.append)
        seen.append((sorted(engine.restored), notes))
    return seen


def test_random_states_are_restored_on_the_same_kind_of_device_only(pool, tmp_path: Path) -> None:
    first, second = pool.run(write_and_restore, tmp_path, num_ranks=2, timeout_s=TIMEOUT_S)
    assert [states for states, _ in first] == [states for states, _ in second] == [case[3] for case in CASES]
    assert [note.partition(" at step 0")[2] for _, (note,) in first] == [case[4] for case in CASES]
    assert all(notes == [] for _, notes in second)


@pytest.mark.parametrize(("device", "held"), [("cpu", "cuda"), ("cuda", "cpu")])
def test_an_engine_refuses_states_of_another_kind_of_device(device: str, held: str) -> None:
    job = object.__new__(MegatronJob)
    job.torch_device = torch.device(device)
    states = {"torch": torch.get_rng_state()} | ({"cuda": torch.zeros(16)} if held == "cuda" else {})
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match=f"'torch'.* cannot be restored on {device}"):
        job.set_rng_state(states)
    assert torch.equal(torch.get_rng_state(), before)
    if device == "cpu":
        assert "cuda" not in job.rng_state()
