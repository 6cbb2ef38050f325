import subprocess
import sys
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from moe.data.dataset import batch_for, build_gpt_datasets
from moe.data.indexed import bin_path
from moe.data.prepare import prepare_documents
from moe.data.split import Document
from moe.errors import InputError

SEQ = 16
SEED = 1234


def _prepare(prefix, tokenizer, letters, size=37):
    prepare_documents((Document(c, c * size) for c in letters), tokenizer, prefix)
    return prefix


@contextmanager
def _job(folder, rank, world_size):
    """A torch.distributed job over gloo."""
    store = torch.distributed.FileStore(str(folder / f"store_of_{world_size}"), world_size)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture
def arguments(tmp_path, byte_tokenizer):
    """Datasets of small letters to train on and of capital letters held out."""
    _prepare(tmp_path / "train", byte_tokenizer, "abcdefghij")
    _prepare(tmp_path / "heldout", byte_tokenizer, "XYZ")
    return {
        "train": ((tmp_path / "train", 1.0),),
        "heldout": ((tmp_path / "heldout", 1.0),),
        "seq_length": SEQ,
        "train_samples": 20,
        "heldout_samples": 5,
        "tokenizer": byte_tokenizer,
        "seed": SEED,
        "cache_dir": tmp_path / "cache",
    }


@pytest.fixture
def build(arguments, tmp_path):
    """Builds the datasets in a job of one process, with some arguments changed."""
    with _job(tmp_path, 0, 1):
        yield lambda **changes: build_gpt_datasets(**{**arguments, **changes})


def _all_tokens(dataset, count):
    return batch_for(dataset, range(count))["tokens_BS"]


def test_batch_has_shapes_types_and_shifted_labels(build):
    train, _ = build()
    batch = batch_for(train, [3, 0, 7])
    assert {name: tuple(tensor.shape) for name, tensor in batch.items()} == dict.fromkeys(
        ["tokens_BS", "labels_BS", "loss_mask_BS", "position_ids_BS"], (3, SEQ)
    )
    assert batch["tokens_BS"].dtype == batch["labels_BS"].dtype == torch.int64
    assert torch.equal(batch["labels_BS"][:, :-1], batch["tokens_BS"][:, 1:])
    assert torch.equal(batch["position_ids_BS"], torch.arange(SEQ).repeat(3, 1))
    assert bool((batch["loss_mask_BS"] == 1).all())
    assert torch.equal(batch["tokens_BS"][1], batch_for(train, [0])["tokens_BS"][0])


def test_one_epoch_reads_every_token_once(build, tmp_path):
    train, _ = build(train_samples=23)  # 10 documents of 38 ids are 23 samples of 16 and a rest
    ids = np.fromfile(bin_path(tmp_path / "train"), np.uint16)
    read = np.bincount(_all_tokens(train, 23).flatten(), minlength=257)
    assert (read <= np.bincount(ids, minlength=257)).all()
    assert read.sum() == 23 * SEQ


def test_samples_are_a_function_of_seed_and_index(build, tmp_path):
    first = _all_tokens(build()[0], 20)
    assert torch.equal(_all_tokens(build()[0], 20), first)
    assert torch.equal(_all_tokens(build(cache_dir=tmp_path / "other")[0], 20), first)
    assert torch.equal(_all_tokens(build(train_samples=10)[0], 10), first[:10])
    assert not torch.equal(_all_tokens(build(seed=SEED + 1)[0], 20), first)


def test_splits_read_their_own_data(build):
    train, heldout = build()
    assert _all_tokens(heldout, 5).lt(ord("a")).logical_or(_all_tokens(heldout, 5) == 256).all()
    assert _all_tokens(train, 20).ge(ord("a")).all()


def test_data_is_repeated_when_more_is_asked(build):
    train, heldout = build(train_samples=500, heldout_samples=100)
    assert len(train) >= 500
    assert len(heldout) >= 100
    assert _all_tokens(train, 500).shape == (500, SEQ)


@pytest.mark.parametrize("samples", [10, 400])
def test_blend_follows_its_weights(build, tmp_path, byte_tokenizer, samples):
    other = _prepare(tmp_path / "digits", byte_tokenizer, "0123456789", size=400)
    train, _ = build(train=((tmp_path / "train", 3.0), (other, 1.0)), train_samples=samples)
    tokens = _all_tokens(train, samples)
    digits = (tokens < ord("a")).any(dim=1).float().mean().item()
    assert digits == pytest.approx(0.25, abs=0.1)


@pytest.mark.parametrize("samples", [1, 2, 7, 64])
def test_small_parts_of_a_blend_have_enough_samples(build, tmp_path, byte_tokenizer, samples):
    weights = [0.1, 0.01, 0.01, 3.3, 0.01]
    parts = [_prepare(tmp_path / f"part{n}", byte_tokenizer, "a", size=33) for n in range(len(weights))]
    blend = tuple(zip(parts, weights, strict=True))
    train, heldout = build(train=blend, heldout=blend, train_samples=samples, heldout_samples=samples)
    assert len(_all_tokens(train, samples)) == len(_all_tokens(heldout, samples)) == samples


def test_data_prepared_anew_under_the_same_name_is_not_read_by_old_indices(build, tmp_path, byte_tokenizer):
    build()
    _prepare(tmp_path / "train", byte_tokenizer, "kl", size=101)
    assert _all_tokens(build()[0], 20).ge(ord("k")).all()


def test_indices_of_a_killed_build_are_not_used(build, tmp_path):
    wanted = _all_tokens(build()[0], 20)
    (kept,) = (tmp_path / "cache").iterdir()
    half_built = kept.rename(kept.with_name(f"{kept.name}.0123"))
    for path in half_built.glob("*.npy"):
        path.write_bytes(path.read_bytes()[:100])
    assert torch.equal(_all_tokens(build()[0], 20), wanted)
    assert kept.is_dir()


@pytest.mark.parametrize(
    "bad", [{"train": ()}, {"train_samples": 0}, {"seq_length": 0}, {"heldout": (("x", 0.0),)}]
)
def test_unusable_arguments_are_refused(build, bad):
    with pytest.raises(InputError):
        build(**bad)


SECOND_RANK = """
import sys
from pathlib import Path
import torch
from moe.data.dataset import batch_for, build_gpt_datasets
from moe.data.tokenizer import Tokenizer
folder = Path(sys.argv[1])
store = torch.distributed.FileStore(str(folder / "store_of_2"), 2)
torch.distributed.init_process_group("gloo", store=store, rank=1, world_size=2)
train, _ = build_gpt_datasets(
    train=((folder / "train", 1.0),), heldout=((folder / "heldout", 1.0),), seq_length=16,
    train_samples=20, heldout_samples=5, tokenizer=Tokenizer.load("bytes"), seed=1234,
    cache_dir=folder / "cache_of_2",
)
print(batch_for(train, range(20))["tokens_BS"].tolist())
torch.distributed.destroy_process_group()
"""


def test_two_ranks_see_the_samples_of_one(arguments, tmp_path):
    second = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", SECOND_RANK, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    with _job(tmp_path, 0, 2):
        of_first = _all_tokens(
            build_gpt_datasets(**{**arguments, "cache_dir": tmp_path / "cache_of_2"})[0], 20
        )
    of_second = second.communicate(timeout=120)[0].splitlines()[-1]
    with _job(tmp_path, 0, 1):
        of_one = _all_tokens(build_gpt_datasets(**arguments)[0], 20)
    assert torch.equal(of_first, of_one)
    assert of_second == str(of_one.tolist())
    (kept,) = (tmp_path / "cache_of_2").iterdir()
    assert "." not in kept.name
