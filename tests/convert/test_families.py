"""Each family against transformers itself: logits, gradients, and the way back without a differing byte."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hf_models import FAMILIES, make_model, same_bytes, save_model, tensors_of

from moe.convert.check import check
from moe.convert.export_hf import export_hf, open_checkpoint
from moe.convert.families import family_named
from moe.convert.import_hf import import_hf
from moe.convert.mapping import bind
from moe.convert.model_of import run_config

# Relative, both sides in fp32; asked for by issue 4. What is seen is 1e-6 and less.
TOLERANCE = 1e-4
CASES = [  # seeds of which no two families share one, and more of them in the slow tests
    pytest.param(family, size, seed, marks=[pytest.mark.slow] if seed >= 100 else [])
    for number, family in enumerate(FAMILIES)
    for size, seeds in (("even", (2 * number, 100)), ("odd", (2 * number + 1, 101)))
    for seed in seeds
]


def silent(_: str) -> None:
    pass


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference over the largest value; where all are expected to be zero, they must be."""
    difference, scale = float((found - expected).abs().max()), float(expected.abs().max())
    return difference / scale if scale else difference


@pytest.mark.parametrize(("family", "size", "seed"), CASES)
def test_logits_equal_and_the_way_back_loses_nothing(
    tmp_path: Path, family: str, size: str, seed: int
) -> None:
    from transformers import AutoModelForCausalLM

    model = make_model(family, size, seed)
    folder = save_model(model, tmp_path / "hf")
    found = import_hf(folder, tmp_path / "ours", check_logits=True, note=silent)
    assert found is not None
    assert found.relative_error < TOLERANCE
    export_hf(tmp_path / "ours", tmp_path / "back", family=None, check_logits=False, note=silent)
    assert same_bytes(tensors_of(folder), tensors_of(tmp_path / "back")) == []
    reloaded, report = AutoModelForCausalLM.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(report.values()), report
    assert same_bytes(dict(model.state_dict()), dict(reloaded.state_dict())) == []
    assert reloaded.config.to_diff_dict() == model.config.to_diff_dict()
    assert check(folder, tmp_path / "ours", check_logits=False).tensors == len(tensors_of(folder))


@pytest.mark.parametrize("family", FAMILIES)
def test_config_of_our_own_describes_the_same_model(tmp_path: Path, family: str) -> None:
    """As after training, when no foreign config is at hand."""
    from transformers import AutoConfig, AutoModelForCausalLM

    for size in ("even", "odd"):
        model = make_model(family, size, seed=2)
        save_model(model, tmp_path / size)
        described = family_named(family)
        written = described.write_config(described.read_config(model.config.to_dict()))
        config = AutoConfig.for_model(family, **written)
        ours = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        ours.load_state_dict(model.state_dict())
        tokens_BS = torch.randint(config.vocab_size, (2, 16), generator=torch.Generator().manual_seed(3))
        with torch.no_grad():
            assert relative_error(ours(tokens_BS).logits, model(tokens_BS).logits) < TOLERANCE


def our_gradients(checkpoint: Path, tokens_BS: torch.Tensor) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss of the next token and the gradient of every parameter, by the family's names."""
    from moe.engine.one_rank import _groups_of_one
    from moe.model.build import assemble_model, load_weights

    source = open_checkpoint(checkpoint, None)
    config = run_config(source.model, precision="fp32", seq_length=tokens_BS.shape[1])
    with _groups_of_one() as groups:
        model = assemble_model(config, groups, num_microbatches=1).eval()
        load_weights(model, checkpoint)
        positions_BS = torch.arange(tokens_BS.shape[1]).expand_as(tokens_BS)
        nll_BS = model(tokens_BS, positions_BS, None, labels=tokens_BS.roll(-1, 1))
        loss = nll_BS[:, :-1].mean()
        loss.backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    parts = bind(source.family.table(source.model), {k: tuple(g.shape) for k, g in gradients.items()}, "any")
    named = {}
    for part in parts:
        region = tuple(slice(o, o + n) for o, n in zip(part.offset, part.shape, strict=True))
        pieces = part.split(gradients[part.key][region])
        named |= {name: piece for (name, _), piece in zip(part.theirs, pieces, strict=True)}
    return loss.item(), named


def their_gradients(
    model: Any, tokens_BS: torch.Tensor, folder: Path
) -> tuple[float, dict[str, torch.Tensor]]:
    """The same of transformers' model; names as on disk, where its own saving puts them."""
    logits_BSV = model(tokens_BS).logits
    loss = F.cross_entropy(logits_BSV[:, :-1].flatten(0, 1), tokens_BS[:, 1:].flatten())
    loss.backward()
    carrier = copy.deepcopy(model)
    for parameter, source in zip(carrier.parameters(), model.parameters(), strict=True):
        parameter.data = source.grad
    return loss.item(), tensors_of(save_model(carrier, folder))


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_of_every_parameter_equals(tmp_path: Path, family: str) -> None:
    model = make_model(family, "even", seed=3)
    import_hf(save_model(model, tmp_path / "hf"), tmp_path / "ours", check_logits=False, note=silent)
    tokens_BS = torch.randint(model.config.vocab_size, (2, 24), generator=torch.Generator().manual_seed(4))
    loss, found = our_gradients(tmp_path / "ours", tokens_BS)
    expected_loss, expected = their_gradients(model, tokens_BS, tmp_path / "gradients")
    buffers = {name for name in expected if name.endswith("e_score_correction_bias")}
    assert abs(loss - expected_loss) < 1e-5 * expected_loss
    assert found.keys() == expected.keys() - buffers
    errors = {name: relative_error(found[name], expected[name]) for name in found}
    assert {name: error for name, error in errors.items() if not error < TOLERANCE} == {}
