"""Multi-token prediction against transformers' own module, and its tensors in and out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hf_models import add_predictions, make_model, same_bytes, save_model, tensors_of
from safetensors.torch import save_file

from moe.convert.export_hf import export_hf, open_checkpoint
from moe.convert.import_hf import import_hf
from moe.convert.model_of import run_config
from moe.errors import InputError

TOLERANCE = 1e-4  # relative, fp32; see test_families.py
FAMILIES = ("deepseek_v3", "glm4_moe")
COEFF = 0.1


@pytest.mark.parametrize(("family", "with_copies"), [("deepseek_v3", True), ("glm4_moe", False)])
def test_every_tensor_comes_back(tmp_path: Path, family: str, with_copies: bool) -> None:
    model = make_model(family, "odd", seed=0)
    folder = save_model(model, tmp_path / "hf")
    add_predictions(model, folder, with_copies=with_copies)
    import_hf(folder, tmp_path / "ours", check_logits=True, note=str)
    export_hf(tmp_path / "ours", tmp_path / "back", family=None, check_logits=True, note=str)
    assert same_bytes(tensors_of(folder), tensors_of(tmp_path / "back")) == []


def test_copy_that_differs_is_named(tmp_path: Path) -> None:
    model = make_model("deepseek_v3", "odd", seed=0)
    folder = save_model(model, tmp_path / "hf")
    add_predictions(model, folder, with_copies=True)
    tensors = tensors_of(folder)
    tensors["model.layers.3.shared_head.head.weight"][0, 0] += 1
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(
        InputError, match=r"model\.layers\.3\.shared_head\.head\.weight: differs from lm_head"
    ):
        import_hf(folder, tmp_path / "ours", check_logits=False, note=str)


def test_config_that_counts_layers_which_are_not_there_is_corrected(tmp_path: Path) -> None:
    """transformers writes the number, whatever it saves."""
    folder = save_model(make_model("deepseek_v3", "odd", seed=0, num_mtp_layers=1), tmp_path / "hf")
    notes: list[str] = []
    import_hf(folder, tmp_path / "ours", check_logits=False, note=notes.append)
    assert "config.json counts 1 layer(s) of multi-token prediction; the folder has none" in notes
    export_hf(tmp_path / "ours", tmp_path / "back", family=None, check_logits=True, note=str)
    assert same_bytes(tensors_of(folder), tensors_of(tmp_path / "back")) == []


def their_gradients(model: Any, ahead: Any, tokens_BS: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of the mean losses of both predictions, for what the family and the layer share or own."""
    from moe.model.spec import MTP_LAYER

    hidden_BSD = model.model(tokens_BS).last_hidden_state
    positions_BS = torch.arange(tokens_BS.shape[1] - 1).expand(tokens_BS.shape[0], -1)
    next_BSD = ahead.forward_layer(0, hidden_BSD[:, :-1], positions_BS, None, input_ids=tokens_BS[:, 1:])
    first = F.cross_entropy(model.lm_head(hidden_BSD)[:, :-1].flatten(0, 1), tokens_BS[:, 1:].flatten())
    second = F.cross_entropy(model.lm_head(next_BSD)[:, :-1].flatten(0, 1), tokens_BS[:, 2:].flatten())
    (first + COEFF * second).backward()
    layer = ahead.layers[0]
    block, ours = layer.mtp_block, f"mtp.layers.0.{MTP_LAYER}"
    return {
        "embedding.word_embeddings.weight": model.model.embed_tokens.weight.grad,
        "output_layer.weight": model.lm_head.weight.grad,
        "decoder.final_layernorm.weight": model.model.norm.weight.grad,
        "mtp.layers.0.enorm.weight": layer.enorm.weight.grad,
        "mtp.layers.0.hnorm.weight": layer.hnorm.weight.grad,
        "mtp.layers.0.eh_proj.weight": layer.eh_proj.weight.grad,
        "mtp.layers.0.final_layernorm.weight": layer.post_norm.weight.grad,
        f"{ours}.self_attention.linear_proj.weight": block.self_attn.o_proj.weight.grad,
        f"{ours}.mlp.layer.experts.w_gate_up_eGD": block.mlp.experts.gate_up_proj.grad,
        f"{ours}.mlp.layer.router.weight_ED": block.mlp.gate.weight.grad,
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_both_losses_equal(tmp_path: Path, family: str) -> None:
    from moe.engine.one_rank import _groups_of_one
    from moe.model.build import assemble_model, load_weights

    theirs = make_model(family, "odd", seed=1)
    folder = save_model(theirs, tmp_path / "hf")
    ahead = add_predictions(theirs, folder, with_copies=False)
    import_hf(folder, tmp_path / "ours", check_logits=False, note=str)
    tokens_BS = torch.randint(theirs.config.vocab_size, (2, 18), generator=torch.Generator().manual_seed(2))
    expected = their_gradients(theirs, ahead, tokens_BS)

    model = open_checkpoint(tmp_path / "ours", None).model.model_copy(update={"mtp_loss_coeff": COEFF})
    assert model.mtp_layers == 1
    mask_BS = torch.ones(2, 18)
    mask_BS[:, -1] = 0
    with _groups_of_one() as groups:
        config = run_config(model, precision="fp32", seq_length=18)
        ours = assemble_model(config, groups, num_microbatches=1).eval()
        load_weights(ours, tmp_path / "ours")
        positions_BS = torch.arange(18).expand_as(tokens_BS)
        nll_BS = ours(tokens_BS, positions_BS, None, labels=tokens_BS.roll(-1, 1), loss_mask=mask_BS)
        nll_BS[:, :-1].mean().backward()
        found = {name: parameter.grad for name, parameter in ours.named_parameters()}
    for name, gradient in expected.items():
        error = float((found[name] - gradient).abs().max() / gradient.abs().max())
        assert error < TOLERANCE, name
