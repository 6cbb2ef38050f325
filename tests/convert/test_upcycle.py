"""A dense model upcycled: the same logits at the start, experts that part in training, a Mixtral or Qwen3-MoE
for transformers, and everything that cannot be done refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import EVEN, random_model, save_model, tensors_of
from safetensors.torch import save_file
from typer.testing import CliRunner

from moe.cli import app
from moe.convert.export_hf import export_hf, open_checkpoint
from moe.convert.hf_reader import HfFolder
from moe.convert.logits import transformers_logits
from moe.convert.model_of import run_config
from moe.convert.upcycle import Upcycling, upcycle
from moe.errors import InputError

TOLERANCE = 1e-4  # relative, fp32; see test_families.py
SIZES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {**EVEN, "num_hidden_layers": 2, "intermediate_size": 32}),
    "qwen3": (
        "Qwen3Config",
        {
            **EVEN,
            "num_hidden_layers": 2,
            "head_dim": 10,
            "intermediate_size": 32,
            "tie_word_embeddings": True,
            "attention_bias": True,
        },
    ),
}
EXPERTS = {
    "whole copies": Upcycling(num_experts=5, top_k=2),
    "slices": Upcycling(num_experts=16, top_k=8, slices=4),
    "one copy of many": Upcycling(num_experts=8, top_k=2, slices=2),
}


@pytest.fixture(scope="module", params=SIZES)
def dense(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config_class, sizes = SIZES[request.param]
    model = random_model(config_class, sizes, seed=0)
    return save_model(model, tmp_path_factory.mktemp(request.param) / "hf")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(random_model(*SIZES["llama"], seed=1), tmp_path_factory.mktemp("llama") / "hf")


def changed_config(folder: Path, out: Path, **changes: object) -> Path:
    shutil.copytree(folder, out)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | changes))
    return out


@pytest.mark.parametrize("experts", EXPERTS)
def test_logits_are_those_of_the_dense_model_here_and_in_transformers(
    dense: Path, tmp_path: Path, experts: str
) -> None:
    found = upcycle(dense, tmp_path / "ours", EXPERTS[experts], check_logits=True, note=str)
    assert found is not None
    assert found.relative_error < TOLERANCE
    export_hf(tmp_path / "ours", tmp_path / "back", family=None, check_logits=False, note=str)
    tokens_BS = torch.randint(EVEN["vocab_size"], (2, 16), generator=torch.Generator().manual_seed(1))
    expected, exported = (transformers_logits(folder, tokens_BS) for folder in (dense, tmp_path / "back"))
    assert float((exported - expected).abs().max() / expected.abs().max()) < TOLERANCE


def trained(checkpoint: Path, *, steps: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses over some steps on one batch, and the weights after them."""
    from moe.engine.one_rank import _groups_of_one
    from moe.model.build import assemble_model, load_weights

    model = open_checkpoint(checkpoint, None).model
    generator = torch.Generator().manual_seed(2)
    tokens_BS = torch.randint(model.vocab_size, (4, 16), generator=generator)
    with _groups_of_one() as groups:
        ours = assemble_model(run_config(model, precision="fp32", seq_length=16), groups, num_microbatches=1)
        load_weights(ours, checkpoint)
        optimizer = torch.optim.AdamW(ours.parameters(), lr=1e-3)
        positions_BS, losses = torch.arange(16).expand_as(tokens_BS), []
        for _ in range(steps):
            loss = ours(tokens_BS, positions_BS, None, labels=tokens_BS.roll(-1, 1))[:, :-1].mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        weights = {name: parameter.detach().clone() for name, parameter in ours.named_parameters()}
    return losses, weights


@pytest.mark.parametrize("experts", ["whole copies", "slices"])
def test_training_parts_the_copies(llama: Path, tmp_path: Path, experts: str) -> None:
    upcycling = EXPERTS[experts]
    upcycle(llama, tmp_path / "ours", upcycling, check_logits=False, note=str)
    _, start = trained(tmp_path / "ours", steps=0)
    _, weights = trained(tmp_path / "ours", steps=1)  # Adam would make a difference of any rounding later
    losses, late = trained(tmp_path / "ours", steps=6)
    assert losses[-1] < losses[0] - 0.05
    for name in start:
        if name.endswith(("w_gate_up_eGD", "w_down_eDF")):
            copies = start[name].unflatten(0, (-1, upcycling.slices))
            assert torch.equal(copies, copies[:1].expand_as(copies))
            copies = weights[name].unflatten(0, (-1, upcycling.slices))
            for one in range(len(copies)):
                assert all(not torch.equal(copies[one], other) for other in copies[:one]), name
        if name.endswith("weight_ED"):
            rows = start[name].unflatten(0, (-1, upcycling.slices))
            assert torch.equal(rows, rows[:, :1].expand_as(rows))
            assert not torch.equal(late[name], start[name])  # the router learns


def test_noise_parts_the_copies_at_once_and_is_said(llama: Path, tmp_path: Path) -> None:
    argv = ["convert", "upcycle", str(llama), str(tmp_path / "ours"), "--experts", "4", "--top-k", "2"]
    result = CliRunner().invoke(app, [*argv, "--noise", "0.01"], catch_exceptions=False)
    assert "written, noise moved the logits of 64 tokens by " in result.stdout, result.output
    export_hf(tmp_path / "ours", tmp_path / "back", family="mixtral", check_logits=False, note=str)
    tensors = tensors_of(tmp_path / "back")
    whole = tensors_of(llama)["model.layers.1.mlp.down_proj.weight"]
    noisy = [tensors[f"model.layers.1.block_sparse_moe.experts.{e}.w2.weight"] for e in range(4)]
    for expert in noisy:
        assert float((expert - whole).std() / whole.std()) == pytest.approx(0.01, rel=0.15)
    assert not torch.equal(noisy[0], noisy[1])


def test_same_seed_same_bytes_and_another_seed_another_router(llama: Path, tmp_path: Path) -> None:
    routers = []
    for number, seed in enumerate((3, 3, 4)):
        upcycling = Upcycling(num_experts=4, top_k=2, noise=0.1, seed=seed)
        upcycle(llama, tmp_path / str(number), upcycling, check_logits=False, note=str)
        routers.append(open_checkpoint(tmp_path / str(number), "mixtral"))
    names = [name for name in routers[0].layout if "block_sparse_moe" in name]
    for name in names:
        assert torch.equal(routers[0].read(name), routers[1].read(name)), name
        assert not torch.equal(routers[0].read(name), routers[2].read(name)), name


def test_bf16_stays_bf16_and_exact(llama: Path, tmp_path: Path) -> None:
    """Multiplying by the number of slices rounds nothing, so 1e-4 holds for narrow weights, too."""
    folder = save_model(random_model(*SIZES["llama"], seed=1).bfloat16(), tmp_path / "hf")
    upcycling = EXPERTS["slices"]
    found = upcycle(folder, tmp_path / "ours", upcycling, check_logits=True, note=str)
    assert found is not None
    dtypes = {dtype for _, dtype in open_checkpoint(tmp_path / "ours", None).layout.values()}
    assert dtypes == {"BF16"}


def test_head_that_repeats_a_tied_embedding_is_taken_and_one_that_differs_refused(tmp_path: Path) -> None:
    config_class, sizes = SIZES["qwen3"]
    folder = save_model(random_model(config_class, sizes, seed=0), tmp_path / "hf")
    tensors = tensors_of(folder)
    head = tensors["model.embed_tokens.weight"].clone()
    save_file({**tensors, "lm_head.weight": head}, folder / "model.safetensors")
    upcycle(folder, tmp_path / "ours", EXPERTS["whole copies"], check_logits=False, note=str)
    head[0, 0] += 1
    save_file({**tensors, "lm_head.weight": head}, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"lm_head\.weight: differs from model\.embed_tokens\.weight"):
        upcycle(folder, tmp_path / "other", EXPERTS["whole copies"], check_logits=False, note=str)


def refusal(folder: Path, out: Path, upcycling: Upcycling = EXPERTS["whole copies"]) -> str:
    """What is said; nothing may have been written."""
    with pytest.raises(InputError) as raised:
        upcycle(folder, out / "ours", upcycling, check_logits=False, note=str)
    assert not [path for path in out.iterdir() if path.name.startswith("ours")]
    return str(raised.value)


def test_tensor_that_does_not_fit_is_refused_by_its_dense_name(dense: Path, tmp_path: Path) -> None:
    names = [name for name in tensors_of(dense) if ".layers.0." not in name]
    for number, name in enumerate(names):
        folder = shutil.copytree(dense, tmp_path / f"hf{number}")
        tensors = tensors_of(dense)
        tensors[f"{name}_new"] = tensors.pop(name)
        save_file(tensors, folder / "model.safetensors")
        said = refusal(folder, tmp_path)
        assert f"{name}: missing" in said
        assert f"{name}_new: no place for it" in said
    name = "model.layers.1.mlp.down_proj.weight"
    tensors = tensors_of(dense)
    tensors[name] = tensors[name].mT.contiguous()
    save_file(tensors, folder / "model.safetensors")
    assert f"{name}: its shape is [32, 40], expected [40, 32]" in refusal(folder, tmp_path)


@pytest.mark.parametrize(
    ("upcycling", "words"),
    [
        (Upcycling(num_experts=2, top_k=3), "--top-k 3 is more than --experts 2"),
        (Upcycling(num_experts=2, top_k=1), "--top-k 1 would never train the router"),
        (Upcycling(num_experts=6, top_k=3, slices=3), "--slices 3 must be 1, 2, 4, 8"),
        (Upcycling(num_experts=64, top_k=64, slices=64), "--slices 64 does not divide intermediate_size=32"),
        (
            Upcycling(num_experts=5, top_k=2, slices=2),
            "--experts 5 must be a positive multiple of --slices 2",
        ),
        (Upcycling(num_experts=4, top_k=1, slices=2), "--top-k 1 must be a positive multiple of --slices 2"),
        (
            Upcycling(num_experts=0, top_k=0),
            "--experts 0 must be a positive multiple of --slices 1; --top-k 0",
        ),
        (Upcycling(num_experts=4, top_k=2, noise=-0.1), "--noise -0.1 must be 0 or more"),
        (Upcycling(num_experts=4, top_k=2, noise=float("nan")), "--noise nan must be 0 or more"),
    ],
)
def test_experts_that_cannot_be_are_refused(
    llama: Path, tmp_path: Path, upcycling: Upcycling, words: str
) -> None:
    assert words in refusal(llama, tmp_path, upcycling)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "mixtral"}, "'mixtral' cannot be upcycled; allowed: llama, qwen3"),
        ({"model_type": "qwen3", "use_sliding_window": True}, "use_sliding_window=True cannot be computed"),
        ({"mlp_bias": True}, "mlp_bias=True cannot be computed; allowed: False"),
        ({"attention_bias": True}, "attention_bias=True cannot be computed; allowed: False"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' cannot be computed"),
        ({"quantization_config": {"quant_method": "fp8"}}, "these weights are rounded"),
        ({"intermediate_size": None}, "intermediate_size is missing"),
        ({"intermediate_size": "wide"}, "intermediate_size='wide' is no size"),
        ({"intermediate_size": 48}, "model.layers.0.mlp.down_proj.weight: its shape is [40, 32]"),
    ],
)
def test_models_that_cannot_be_upcycled_are_refused(
    llama: Path, tmp_path: Path, changes: dict[str, object], words: str
) -> None:
    assert words in refusal(changed_config(llama, tmp_path / "hf", **changes), tmp_path)


def test_start_that_is_not_the_dense_model_is_refused(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a mistake in the cutting would look: every name and shape fits."""
    read = HfFolder.read

    def upside_down(folder: HfFolder, name: str, region: Any = None) -> torch.Tensor:
        return read(folder, name, region).flip(0) if region else read(folder, name)

    monkeypatch.setattr(HfFolder, "read", upside_down)
    with pytest.raises(InputError, match="the two are not the same model"):
        upcycle(llama, tmp_path / "ours", EXPERTS["slices"], check_logits=True, note=str)
    assert not list(tmp_path.iterdir())
