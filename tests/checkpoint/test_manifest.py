from __future__ import annotations

import json
import os
import random
import resource
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import xxhash

from moe.checkpoint.manifest import (
    MANIFEST_NAME,
    FileEntry,
    commit_manifest,
    hash_files,
    read_manifest,
    split_by_bytes,
    verify,
    wrong_hashes,
)
from moe.checkpoint.store import newest_valid
from moe.errors import CorruptCheckpointError, InputError


def files_of(checkpoint: Path) -> list[Path]:
    return sorted(path for path in checkpoint.rglob("*") if path.is_file())


def flip_bit(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def refused(checkpoint: Path) -> str:
    with pytest.raises(CorruptCheckpointError) as caught:
        verify(checkpoint)
    return str(caught.value)


def rewrite_manifest(checkpoint: Path, change: Callable[[dict], None]) -> None:
    """Forge a manifest that matches its own hash, so that only the later checks can refuse it."""
    payload = json.loads((checkpoint / MANIFEST_NAME).read_text())
    payload.pop("manifest_xxh3_128")
    change(payload)

    def canonical(value: dict) -> bytes:
        return json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False).encode() + b"\n"

    payload["manifest_xxh3_128"] = xxhash.xxh3_128_hexdigest(canonical(payload))
    (checkpoint / MANIFEST_NAME).write_bytes(canonical(payload))


def test_manifest_round_trip_keeps_state_and_hashes(checkpoint: Path) -> None:
    manifest = verify(checkpoint, workers=2)
    assert manifest.step == 10
    assert manifest.state == {
        "step": 10, "text": "é日本", "lr": 1e-300, "layout": {"tp": 1, "ep": 2}, "seeds": [1, 2**70],
    }  # fmt: skip
    assert [entry.name for entry in manifest.files] == sorted(entry.name for entry in manifest.files)
    for entry in manifest.files:
        content = (checkpoint / entry.name).read_bytes()
        assert (entry.size_bytes, entry.xxh3_128) == (len(content), xxhash.xxh3_128_hexdigest(content))


def test_fifty_random_bit_flips_are_refused_by_name_and_fall_back(tmp_path: Path, write_checkpoint) -> None:
    older, newest = write_checkpoint(tmp_path, 10), write_checkpoint(tmp_path, 20)
    choice, hit = random.Random(0), set()
    for _ in range(50):
        path = choice.choice(files_of(newest))
        bit = choice.randrange(path.stat().st_size * 8)
        flip_bit(path, bit)
        assert path.relative_to(newest).as_posix() in refused(newest)
        reported: list[Path] = []
        assert newest_valid(tmp_path, on_corrupt=lambda bad, _, seen=reported: seen.append(bad)) == older
        assert reported == [newest]
        flip_bit(path, bit)
        hit.add(path.name)
    assert hit == {path.name for path in files_of(newest)}
    assert (
        newest_valid(tmp_path, on_corrupt=lambda *_: pytest.fail("an intact checkpoint was refused"))
        == newest
    )


def test_a_flip_in_any_byte_of_the_manifest_is_refused(checkpoint: Path) -> None:
    path = checkpoint / MANIFEST_NAME
    for byte in range(path.stat().st_size):
        bit = 8 * byte + byte % 8
        flip_bit(path, bit)
        with pytest.raises(CorruptCheckpointError, match=r"manifest\.json"):
            read_manifest(checkpoint)
        flip_bit(path, bit)
    read_manifest(checkpoint)


def truncate(checkpoint: Path, _older: Path) -> str:
    os.truncate(checkpoint / "__0_0.distcp", 39_999)
    return "__0_0.distcp"


def empty_the_manifest(checkpoint: Path, _older: Path) -> str:
    os.truncate(checkpoint / MANIFEST_NAME, 0)
    return MANIFEST_NAME


def delete(checkpoint: Path, _older: Path) -> str:
    (checkpoint / "rng/0.bin").unlink()
    return "'rng/0.bin': missing"


def swap_two_shards(checkpoint: Path, _older: Path) -> str:
    (checkpoint / "__0_0.distcp").rename(checkpoint / "aside")
    (checkpoint / "__1_0.distcp").rename(checkpoint / "__0_0.distcp")
    (checkpoint / "aside").rename(checkpoint / "__1_0.distcp")
    return "'__0_0.distcp': XXH3-128"


def add_a_file(checkpoint: Path, _older: Path) -> str:
    (checkpoint / "rng/extra.pt").write_bytes(b"")
    return "'rng/extra.pt': not listed"


def zero_a_page(checkpoint: Path, _older: Path) -> str:
    with (checkpoint / "__1_0.distcp").open("r+b") as file:
        file.seek(8192)
        file.write(bytes(4096))
    return "__1_0.distcp"


def take_a_shard_of_an_older_step(checkpoint: Path, older: Path) -> str:
    shutil.copy(older / "__1_0.distcp", checkpoint / "__1_0.distcp")
    return "__1_0.distcp"


def replace_by_a_link(checkpoint: Path, _older: Path) -> str:
    original = checkpoint / "common.pt"
    original.rename(checkpoint.parent / "common.pt")
    original.symlink_to(checkpoint.parent / "common.pt")
    return "'common.pt': not a regular file"


def link_the_folder(checkpoint: Path, _older: Path) -> str:
    (checkpoint / "rng").rename(checkpoint.parent / "elsewhere")
    (checkpoint / "rng").symlink_to(checkpoint.parent / "elsewhere")
    return "'rng': not listed"


def link_the_manifest(checkpoint: Path, _older: Path) -> str:
    (checkpoint / MANIFEST_NAME).rename(checkpoint.parent / "m.json")
    (checkpoint / MANIFEST_NAME).symlink_to(checkpoint.parent / "m.json")
    return "manifest.json is a link"


DAMAGES = [
    truncate, empty_the_manifest, delete, swap_two_shards, add_a_file, zero_a_page,
    take_a_shard_of_an_older_step, replace_by_a_link, link_the_folder, link_the_manifest,
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damage_is_refused_by_name(tmp_path: Path, write_checkpoint, damage) -> None:
    older, newest = write_checkpoint(tmp_path, 10), write_checkpoint(tmp_path, 20)
    named = damage(newest, older)
    assert named in refused(newest)
    verify(older)


def test_every_damaged_file_is_named_at_once(checkpoint: Path) -> None:
    expected = [
        truncate(checkpoint, checkpoint),
        delete(checkpoint, checkpoint),
        add_a_file(checkpoint, checkpoint),
    ]
    flip_bit(checkpoint / ".metadata", 5)
    message = refused(checkpoint)
    assert all(named in message for named in [*expected, "'.metadata': XXH3-128"])
    assert "in 4 file(s)" in message
    assert "older checkpoint" in message


def test_what_cannot_be_read_is_no_damage(checkpoint: Path, tmp_path: Path, fork, wait) -> None:
    def read_without_descriptors() -> None:
        entries = read_manifest(checkpoint).files
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
        for name, look in (
            (MANIFEST_NAME, lambda: read_manifest(checkpoint)),
            ("step_00000010", lambda: commit_manifest(checkpoint, step=1, entries=entries, state={})),
            (".metadata", lambda: wrong_hashes(checkpoint, entries, workers=1)),
        ):
            with pytest.raises(InputError, match=rf"{socket.gethostname()} cannot read .*{name}: Too many"):
                look()

    assert wait(fork(read_without_descriptors)) == 0
    with pytest.raises(CorruptCheckpointError, match=r"manifest\.json is missing"):
        read_manifest(tmp_path)


def entries_of(sizes_bytes: list[int]) -> list[FileEntry]:
    return [
        FileEntry(name=f"f{index}", size_bytes=size_bytes, xxh3_128="0" * 32)
        for index, size_bytes in enumerate(sizes_bytes)
    ]


@pytest.mark.parametrize("ranks", [1, 3, 8, 64])
def test_shares_are_even_by_bytes_and_cover_every_file_once(ranks: int) -> None:
    choice = random.Random(ranks)
    # Large and small ones alternate, as `__0_0.distcp` and `rng_00000.safetensors` do.
    entries = entries_of([choice.randrange(10**9) if index % 2 else 2_500 for index in range(200)])
    shares = split_by_bytes(entries, ranks)
    assert sorted(entry.name for share in shares for entry in share) == sorted(e.name for e in entries)
    load = [sum(entry.size_bytes for entry in share) for share in shares]
    assert max(load) - min(load) <= max(entry.size_bytes for entry in entries)
    assert max(load) <= 1.15 * sum(load) / ranks or ranks == 64
    choice.shuffle(entries)
    assert split_by_bytes(entries, ranks) == shares  # every rank comes to the same


@pytest.mark.parametrize(
    "name", ["../outside", "/etc/passwd", "a/../b", "./a", "a//b", "", ".", "..", "manifest.json", "a\0b"]
)
def test_names_that_leave_the_folder_are_refused(checkpoint: Path, name: str) -> None:
    with pytest.raises(InputError):
        hash_files(checkpoint, [name])
    rewrite_manifest(checkpoint, lambda payload: payload["files"][0].update(name=name))
    with pytest.raises(CorruptCheckpointError, match=r"manifest\.json"):
        read_manifest(checkpoint)


@pytest.mark.parametrize(
    "change",
    [
        lambda payload: payload["files"].append(payload["files"][0]),
        lambda payload: payload["files"][0].update(size_bytes=-1),
        lambda payload: payload["files"][0].update(xxh3_128="0"),
        lambda payload: payload.update(extra=1),
        lambda payload: payload.update(step="10"),
        lambda payload: payload.pop("state"),
    ],
)
def test_a_manifest_that_is_not_well_formed_is_refused(checkpoint: Path, change) -> None:
    rewrite_manifest(checkpoint, change)
    with pytest.raises(CorruptCheckpointError, match=r"manifest\.json"):
        read_manifest(checkpoint)


def test_a_manifest_of_another_version_says_what_to_do(checkpoint: Path) -> None:
    rewrite_manifest(checkpoint, lambda payload: payload.update(schema_version=2))
    with pytest.raises(InputError, match="schema version 2"):
        read_manifest(checkpoint)


@pytest.mark.parametrize("content", [b"", b"[]", b"null", b"\xff", b"{}", b'{"a": NaN}', b"[" * 100_000])
def test_a_manifest_of_garbage_is_refused(checkpoint: Path, content: bytes) -> None:
    (checkpoint / MANIFEST_NAME).write_bytes(content)
    with pytest.raises(CorruptCheckpointError, match=r"manifest\.json"):
        read_manifest(checkpoint)


def written(folder: Path) -> list[FileEntry]:
    (folder / "a").write_bytes(b"a")
    (folder / "b").write_bytes(b"bb")
    return hash_files(folder, ["a", "b"])


def test_commit_refuses_what_does_not_fit_the_folder(tmp_path: Path) -> None:
    entries = written(tmp_path)
    for wrong, named in [
        ([*entries, entries[0]], "'a': listed more than once"),
        (entries[:1], "'b': not listed"),
        ([*entries, entries[0].model_copy(update={"name": "c"})], "'c': missing"),
        ([entries[0], entries[1].model_copy(update={"size_bytes": 3})], "'b': 2 bytes"),
    ]:
        with pytest.raises(CorruptCheckpointError, match=named):
            commit_manifest(tmp_path, step=1, entries=wrong, state={})
        assert not (tmp_path / MANIFEST_NAME).exists()
    (tmp_path / (MANIFEST_NAME + ".tmp")).write_bytes(b"what a killed commit left")
    assert commit_manifest(tmp_path, step=1, entries=entries, state={}) == tmp_path / MANIFEST_NAME
    assert verify(tmp_path).step == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf"), (1, 2), {1: 2}, b"x", Path(), "\ud800"])
def test_state_that_json_would_change_is_refused(tmp_path: Path, value: object) -> None:
    entries = written(tmp_path)
    with pytest.raises(InputError, match="JSON"):
        commit_manifest(tmp_path, step=1, entries=entries, state={"value": value})
    assert not (tmp_path / MANIFEST_NAME).exists()


def test_a_file_that_is_not_there_cannot_be_hashed(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="ghost"):
        hash_files(tmp_path, ["ghost"])
