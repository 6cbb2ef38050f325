"""Newton-Schulz, the matrices inside fused parameters, and whole updates against torch's own Muon."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from muon_runs import MLA, config_of
from tolerances import assert_as_good_as_plain, assert_close
from torch import Tensor
from torch.distributed import HashStore

from moe.config.schema import ModelSection
from moe.optim.matrices import Matrices, matrices_of
from moe.optim.muon import Bucket, MuonAdamW, Piece
from moe.optim.orthogonal import orthogonalize, update_scale


def polar(x_NM: Tensor) -> Tensor:
    """What Newton-Schulz approximates: all singular values become 1."""
    u, _, v = torch.linalg.svd(x_NM, full_matrices=False)
    return u @ v


@pytest.mark.parametrize("shape", [(8, 8), (5, 12), (12, 5), (1, 7), (3, 6, 4)])
def test_singular_values_become_about_one(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = orthogonalize(x)
    values = torch.linalg.svdvals(y)
    assert values.min() > 0.3  # a square of normal numbers has a tiny one, which five steps do not lift whole
    assert values.max() < 1.25
    # The directions are kept: the nearest orthogonal matrix of the result is that of the input.
    for own, ours in zip(x.reshape(-1, *shape[-2:]), y.reshape(-1, *shape[-2:]), strict=True):
        assert_close("polar factor", polar(ours), polar(own))


def test_scale_has_no_effect_and_zero_stays_zero() -> None:
    x = torch.randn(6, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert_close("scaled", orthogonalize(1e3 * x), orthogonalize(x))
    assert torch.equal(orthogonalize(torch.zeros(4, 6)), torch.zeros(4, 6))


def test_several_matrices_in_a_parameter_are_orthogonalised_each_by_itself() -> None:
    generator = torch.Generator().manual_seed(2)
    # Three groups, each of four rows of queries, two of keys, two of values; two experts of them.
    q, k, v = (torch.randn(2, 3, rows, 10, dtype=torch.float64, generator=generator) for rows in (4, 2, 2))
    fused = torch.cat([q, k, v], dim=2).flatten(1, 2)
    update = Matrices(tuple(fused.shape), (4, 2, 2)).update(fused, None)
    turns = update.unflatten(1, (3, 8))
    for name, whole, found in zip("qkv", (q, k, v), turns.split((4, 2, 2), dim=2), strict=True):
        for expert in range(2):
            matrix = whole[expert].flatten(0, 1)
            expected = orthogonalize(matrix) * update_scale(*matrix.shape)
            assert_close(f"{name} of expert {expert}", found[expert].flatten(0, 1), expected)


# Heads of 8, two of queries for each of keys; latent: 8 without and 4 with rotation, values of 6.
GQA, LATENT = config_of([], 1).model, config_of(MLA, 1).model


@pytest.mark.parametrize(
    ("name", "model", "shape", "segments"),
    [
        ("self_attention.linear_qkv.weight", GQA, (128, 32), (16, 8, 8)),
        ("self_attention.linear_proj.weight", GQA, (32, 64), (32,)),
        ("mlp.linear_fc1.weight", GQA, (128, 32), (64, 64)),
        ("mlp.linear_fc2.weight", GQA, (32, 64), (32,)),
        ("mlp.layer.experts.w_gate_up_eGD", GQA, (8, 32, 32), (16, 16)),
        ("mlp.layer.experts.w_down_eDF", GQA, (8, 32, 16), (32,)),
        ("self_attention.linear_q_down.weight", LATENT, (12, 32), (12,)),
        ("self_attention.linear_q_up.weight", LATENT, (96, 12), (8, 4)),
        ("self_attention.linear_kv_down.weight", LATENT, (16, 32), (12, 4)),
        ("self_attention.linear_kv_up.weight", LATENT, (112, 12), (8, 6)),
        ("mtp.layers.0.eh_proj.weight", LATENT, (32, 64), (32,)),
    ],
)
def test_fused_projections_are_taken_apart(
    name: str, model: ModelSection, shape: tuple[int, ...], segments: tuple[int, ...]
) -> None:
    assert matrices_of(name, torch.empty(shape, device="meta"), model) == Matrices(shape, segments)


@pytest.mark.parametrize(
    "name",
    [
        "embedding.word_embeddings.weight",
        "output_layer.weight",
        "mlp.layer.router.weight_ED",
        "mlp.layer.experts.b_gate_up_eG",
        "self_attention.linear_qkv.bias",
        "self_attention.kv_layernorm.weight",
    ],
)
def test_all_else_has_adamw(name: str) -> None:
    assert matrices_of(name, torch.empty(8, 8, device="meta"), GQA) is None


@pytest.fixture
def alone() -> Iterator[dist.ProcessGroup]:
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def updated_by(optimizer: Callable[[Tensor, Tensor], torch.optim.Optimizer], *starts: Tensor) -> list[Tensor]:
    """A matrix and a vector after four updates by drawn gradients."""
    generator = torch.Generator().manual_seed(3)
    parameters = [torch.nn.Parameter(start.clone()) for start in starts]
    moving = optimizer(*parameters)
    for _ in range(4):
        for parameter, rows in zip(parameters, (6, 1), strict=True):
            parameter.grad = torch.randn(rows, 10, generator=generator).view(parameter.shape)
        moving.step()
    return [parameter.detach().view(-1, 10) for parameter in parameters]


def test_updates_are_those_of_torch(alone: dist.ProcessGroup) -> None:
    """Of torch.optim.Muon, which computes in bf16, with Moonlight's scale; the vector's of AdamW."""
    settings = {"lr": 0.02, "weight_decay": 0.1}

    def ours(dtype: torch.dtype) -> Callable[[Tensor, Tensor], torch.optim.Optimizer]:
        def make(matrix: Tensor, vector: Tensor) -> torch.optim.Optimizer:
            bucket = Bucket(60, alone, matrix.device, (Piece(matrix, 0, 0, 0, Matrices((6, 10), (6,))),))
            groups = [{"params": [matrix, vector]}]
            return MuonAdamW(groups, [bucket], momentum=0.95, dtype=dtype, betas=(0.9, 0.95), **settings)

        return make

    start, start_vector = torch.ones(6, 10), torch.ones(10)
    exact, vector = updated_by(ours(torch.float64), start.flatten(), start_vector)
    rounded, _ = updated_by(ours(torch.bfloat16), start.flatten(), start_vector)
    theirs, _ = updated_by(
        lambda matrix, _: torch.optim.Muon([matrix], adjust_lr_fn="match_rms_adamw", **settings),
        start,
        start_vector,
    )
    _, of_adamw = updated_by(
        lambda _, vector: torch.optim.AdamW([vector], betas=(0.9, 0.95), **settings), start, start_vector
    )
    assert float((exact - start).abs().max()) > 0.02
    for result, name in ((theirs, "torch"), (rounded, "bf16")):
        other = rounded if name == "torch" else theirs
        assert_as_good_as_plain(name, result - start, other - start, exact - start, dtype=torch.bfloat16)
    assert torch.equal(vector, of_adamw)
