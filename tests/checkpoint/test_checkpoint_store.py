from __future__ import annotations

import resource
from pathlib import Path

import pytest

from moe.checkpoint.manifest import MANIFEST_NAME, commit_manifest, hash_files, verify
from moe.checkpoint.store import (
    apply_retention,
    begin,
    checkpoint_dir,
    finish,
    list_complete,
    newest_valid,
    quarantine,
)
from moe.durable import require_free_space, write_atomically
from moe.errors import CorruptCheckpointError, InputError


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def damage(checkpoint: Path) -> None:
    with (checkpoint / "common.pt").open("r+b") as file:
        file.write(b"damaged")


def test_only_committed_checkpoints_are_listed_newest_first(tmp_path: Path, write_checkpoint) -> None:
    assert list_complete(tmp_path / "none") == []
    expected = [write_checkpoint(tmp_path, step) for step in (9, 123_456_789, 10)]
    begin(tmp_path, 11)
    (tmp_path / "step_00000012").mkdir()
    for ignored in ("step_00000013.deleting", "step_00000014.corrupt", "notes", "step_15"):
        (tmp_path / ignored).mkdir()
        (tmp_path / ignored / MANIFEST_NAME).touch()
    assert list_complete(tmp_path) == [expected[1], expected[2], expected[0]]
    assert checkpoint_dir(tmp_path, 9) == expected[0] == tmp_path / "step_00000009"
    with pytest.raises(InputError, match="-1"):
        checkpoint_dir(tmp_path, -1)


def test_newest_valid_reports_each_damaged_one_and_falls_back(tmp_path: Path, write_checkpoint) -> None:
    folders = [write_checkpoint(tmp_path, step) for step in (1, 2, 3)]
    damage(folders[2])
    damage(folders[1])
    reported = []
    found = newest_valid(tmp_path, on_corrupt=lambda path, error: reported.append((path, str(error))))
    assert found == folders[0]
    assert [path for path, _ in reported] == [folders[2], folders[1]]
    assert all("common.pt" in text for _, text in reported)
    damage(folders[0])
    with pytest.raises(CorruptCheckpointError, match="none of the 3"):
        newest_valid(tmp_path, on_corrupt=lambda *_: None)
    with pytest.raises(InputError, match="no complete checkpoint"):
        newest_valid(tmp_path / "none", on_corrupt=lambda *_: None)


def test_a_renamed_checkpoint_is_not_taken_for_another_step(tmp_path: Path, write_checkpoint) -> None:
    older, newest = write_checkpoint(tmp_path, 1), write_checkpoint(tmp_path, 2)
    newest.rename(tmp_path / "step_00000003")
    reported = []
    assert newest_valid(tmp_path, on_corrupt=lambda path, _: reported.append(path.name)) == older
    assert reported == ["step_00000003"]


def test_begin_removes_what_a_killed_save_left(tmp_path: Path) -> None:
    (begin(tmp_path / "run", 5) / "stale").write_bytes(b"x")
    partial = begin(tmp_path / "run", 5)
    assert partial.name == "step_00000005.partial"
    assert names(partial) == []


def test_finish_refuses_what_was_not_committed(tmp_path: Path) -> None:
    partial = begin(tmp_path, 5)
    with pytest.raises(CorruptCheckpointError, match=r"manifest\.json"):
        finish(partial)
    commit_manifest(partial, step=6, entries=[], state={})
    with pytest.raises(CorruptCheckpointError, match="step 6"):
        finish(partial)
    assert list_complete(tmp_path) == []


def test_saving_a_step_again_replaces_it(tmp_path: Path, write_checkpoint) -> None:
    final = write_checkpoint(tmp_path, 5)
    damage(final)
    assert write_checkpoint(tmp_path, 5) == final
    verify(final)
    assert names(tmp_path) == ["step_00000005"]


def test_a_replaced_checkpoint_counts_until_its_successor_is_there(tmp_path: Path, write_checkpoint) -> None:
    # The state that a kill between the two renames of `finish` leaves.
    replaced = write_checkpoint(tmp_path, 5).rename(tmp_path / "step_00000005.replaced")
    begin(tmp_path, 5)
    apply_retention(tmp_path, keep=1)
    assert newest_valid(tmp_path, on_corrupt=lambda *_: pytest.fail("refused")) == replaced
    final = write_checkpoint(tmp_path, 5)
    assert names(tmp_path) == [final.name]


def test_retention_keeps_the_newest_and_clears_remains(tmp_path: Path, write_checkpoint) -> None:
    for step in (1, 2, 3, 4):
        write_checkpoint(tmp_path, step)
    begin(tmp_path, 2)
    write_checkpoint(tmp_path, 9).rename(tmp_path / "step_00000009.deleting")
    (tmp_path / "notes.txt").touch()
    apply_retention(tmp_path, keep=2)
    assert names(tmp_path) == ["notes.txt", "step_00000003", "step_00000004"]
    apply_retention(tmp_path, keep=5)
    assert len(list_complete(tmp_path)) == 2
    apply_retention(tmp_path / "none", keep=1)
    with pytest.raises(InputError, match="keep must be 1"):
        apply_retention(tmp_path, keep=0)


def test_a_quarantined_checkpoint_does_not_push_out_a_good_one(tmp_path: Path, write_checkpoint) -> None:
    write_checkpoint(tmp_path, 10)
    for _ in range(2):
        damage(write_checkpoint(tmp_path, 30))
        good = newest_valid(tmp_path, on_corrupt=lambda path, _: quarantine(path) and None)
        assert good.name == "step_00000010"
    write_checkpoint(tmp_path, 20)
    apply_retention(tmp_path, keep=1)
    assert names(tmp_path) == ["step_00000020", "step_00000030.corrupt"]


def test_free_space_is_checked_before_a_save(tmp_path: Path) -> None:
    missing = tmp_path / "not" / "yet"
    require_free_space(missing, 1)
    with pytest.raises(
        InputError, match=r"no space .*not/yet.* 1,152,921,504,606,846,976 bytes are needed, [\d,]+ are free"
    ):
        require_free_space(missing, 2**60)


def test_disk_full_says_no_space_and_leaves_older_checkpoints_intact(
    tmp_path: Path, write_checkpoint, fork, wait
) -> None:
    older = write_checkpoint(tmp_path, 1)

    def save_on_a_full_disk() -> None:
        partial = begin(tmp_path, 2)
        (partial / "a").write_bytes(b"a")
        entries = hash_files(partial, ["a"])
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        with pytest.raises(InputError, match=r"no space to store .*manifest\.json.* bytes are free"):
            commit_manifest(partial, step=2, entries=entries, state={"large": "x" * 5000})
        assert names(partial) == ["a"]

    assert wait(fork(save_on_a_full_disk)) == 0
    assert newest_valid(tmp_path, on_corrupt=lambda *_: pytest.fail("refused")) == older
    apply_retention(tmp_path, keep=1)
    assert names(tmp_path) == ["step_00000001"]


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, fork, wait) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def fill() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2, 2))
        with pytest.raises(InputError, match="no space"):
            write_atomically(path, b"newer")

    assert wait(fork(fill)) == 0
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


def test_a_write_that_fails_for_another_reason_names_the_path(tmp_path: Path) -> None:
    (tmp_path / "root").touch()
    with pytest.raises(InputError, match=r"cannot store .*root/file: ") as caught:
        write_atomically(tmp_path / "root" / "file", b"x")
    assert isinstance(caught.value.__cause__, OSError)
    with pytest.raises(InputError, match="cannot store"):
        begin(tmp_path / "root", 1)
    assert names(tmp_path) == ["root"]
