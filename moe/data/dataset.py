"""Samples of fixed length from token files, through Megatron's GPTDataset and its blends.

Legend: B samples of a micro-batch, S tokens of a sample.

The only file of this folder that imports Megatron.
"""

from __future__ import annotations

import hashlib
import math
import shutil
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

from moe.data.indexed import idx_path
from moe.data.tokenizer import Tokenizer
from moe.durable import storage_error
from moe.errors import InputError
from moe.ranks import on_rank0

Blend = tuple[tuple[Path, float], ...]
"""Prefixes of token files, each with its weight; the weights need not sum to 1."""

_BATCH_KEYS = {
    "tokens": "tokens_BS",
    "labels": "labels_BS",
    "loss_mask": "loss_mask_BS",
    "position_ids": "position_ids_BS",
}


class TokenDataset(Protocol):
    """What a built dataset offers: samples by index, each a dictionary of tensors of shape [S]."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> dict[str, Any]: ...


class _MegatronTokenizer:
    """The attributes of a tokenizer that Megatron's dataset reads.

    There is no `pad` on purpose: Megatron would mask the loss of every token equal to it, and prepared
    samples are never padded.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.eod = tokenizer.eod
        self.vocab_size = tokenizer.vocab_size
        # Becomes part of the name of Megatron's cached indices.
        self.unique_identifiers = {"fingerprint": tokenizer.fingerprint}


def build_gpt_datasets(
    *,
    train: Blend,
    heldout: Blend,
    seq_length: int,
    train_samples: int,
    heldout_samples: int,
    tokenizer: Tokenizer,
    seed: int,
    cache_dir: Path,
) -> tuple[TokenDataset, TokenDataset]:
    """Build the training and the held-out dataset; every rank of the initialised job calls this.

    Rank 0 computes the indices and the others read them, so `cache_dir` must be on storage that all ranks
    see. A sample depends only on the data, the arguments here and its index, never on the parallel layout.
    While the data is not yet repeated it does not depend on `train_samples` either; once it is, a run that
    resumes with another number sees another order. Documents follow one another in a sample, separated by
    the end-of-document id; attention and positions run across them, and the loss counts every token.

    Args:
        train: Blend of the training data.
        heldout: Blend of the held-out data.
        seq_length: Tokens of a sample.
        train_samples: Least number of training samples; the data is repeated as needed.
        heldout_samples: Least number of held-out samples; the data is repeated as needed.
        tokenizer: The tokenizer that made the data.
        seed: Decides the order of documents and samples.
        cache_dir: Where the indices are kept from run to run.

    Returns:
        The training and the held-out dataset.

    Raises:
        InputError: A blend is empty or has a weight that is not positive, a number is not positive, or the
            indices cannot be stored.
    """
    sizes = [train_samples, heldout_samples, 0]
    if seq_length < 1 or min(sizes[:2]) < 1:
        raise InputError(
            f"seq_length {seq_length}, train_samples {train_samples} and heldout_samples {heldout_samples} "
            "must be 1 or more"
        )
    blends = [_megatron_blend(train, "train"), _megatron_blend(heldout, "held-out"), None]
    key = on_rank0(lambda: _index_key((train, heldout), [seq_length, seed, *sizes, tokenizer.fingerprint]))
    final = cache_dir / key
    building = on_rank0(lambda: _building_folder(final))
    config = GPTDatasetConfig(
        random_seed=seed,
        sequence_length=seq_length,
        blend_per_split=blends,
        path_to_cache=str(building),
        tokenizer=_MegatronTokenizer(tokenizer),
        mid_level_dataset_surplus=max(_surplus(train, train_samples), _surplus(heldout, heldout_samples)),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,  # attention is causal by itself
    )
    try:
        datasets = BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, config).build()
    except Exception as error:
        if isinstance(
            error.__cause__, OSError
        ):  # Megatron hides a full or read-only disk in a bare Exception
            raise storage_error(building, error.__cause__) from error
        raise
    _publish(building, final)
    return datasets[0], datasets[1]


def batch_for(dataset: TokenDataset, indices: Iterable[int]) -> dict[str, torch.Tensor]:
    """Collate samples into a batch on the CPU.

    Args:
        dataset: A dataset from `build_gpt_datasets`.
        indices: The samples, in order.

    Returns:
        tokens_BS, labels_BS and position_ids_BS (int64; labels are the tokens one place on) and loss_mask_BS
        (float32, 1 where the loss counts).
    """
    samples = [dataset[index] for index in indices]
    return {name: torch.stack([sample[key] for sample in samples]) for key, name in _BATCH_KEYS.items()}


def _megatron_blend(blend: Blend, name: str) -> tuple[list[str], list[float]]:
    if not blend:
        raise InputError(f"the {name} blend is empty; give at least one prefix of prepared data")
    for prefix, weight in blend:
        if not weight > 0:
            raise InputError(f"weight {weight} of {name} data {prefix} must be above 0")
    return [str(prefix) for prefix, _ in blend], [float(weight) for _, weight in blend]


def _surplus(blend: Blend, samples: int) -> float:
    """Share of samples to build beyond a dataset's own part of `samples`.

    Megatron rounds every part up and then draws as many samples as the parts sum to, at most one more from
    each dataset, while its own surplus of 0.5 % is less than one sample where a part is small: it then stops
    with "oversamples the contributing datasets".
    """
    total = sum(weight for _, weight in blend)
    smallest_part = min(math.ceil(samples * weight / total) for _, weight in blend)
    return max(0.005, (len(blend) + 1) / smallest_part)


def _index_key(blends: tuple[Blend, Blend], arguments: list[int | str]) -> str:
    """Name the indices by everything that they are computed from.

    Megatron goes by the paths. The indices depend on the documents' lengths, so data prepared anew under the
    same name must not meet the indices of the old.
    """
    digest = hashlib.sha256(repr((blends, arguments)).encode())
    for prefix, _ in (part for blend in blends for part in blend):
        with idx_path(prefix).open("rb") as file:  # may be larger than the memory
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def _building_folder(final: Path) -> Path:
    """Choose where Megatron looks: in `final`, or if that is absent in a new folder.

    Megatron takes any file that exists for whole, so a job that is killed while it writes must not leave its
    files where the next one looks.
    """
    return final if final.is_dir() else final.with_name(f"{final.name}.{uuid.uuid4().hex}")


def _publish(building: Path, final: Path) -> None:
    """Give the new indices their lasting name, once every rank has opened them."""
    dist.barrier()
    if dist.get_rank() != 0 or building == final:
        return
    try:
        building.rename(final)
    except OSError:
        if not final.is_dir():
            raise
        shutil.rmtree(building)  # another job built the same indices meanwhile
