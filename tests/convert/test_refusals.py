"""A conversion that cannot be whole says which tensor is wrong and writes nothing."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hf_models import FAMILIES, make_model, save_model, tensors_of
from safetensors.torch import save_file

from moe.checkpoint.manifest import verify
from moe.config.schema import ModelSection
from moe.convert.check import check
from moe.convert.export_hf import export_hf
from moe.convert.import_hf import import_hf
from moe.convert.logits import compare_logits
from moe.errors import CorruptCheckpointError, InputError

Tensors = dict[str, torch.Tensor]


def silent(_: str) -> None:
    pass


@pytest.fixture(scope="module", params=FAMILIES)
def sound(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a family's sound model."""
    return save_model(make_model(request.param, "odd", seed=6), tmp_path_factory.mktemp(request.param) / "hf")


def changed(sound: Path, folder: Path, change: Callable[[Tensors], object]) -> Path:
    """A copy of the folder with other tensors."""
    shutil.copytree(sound, folder)
    tensors = tensors_of(folder)
    change(tensors)
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors")
    return folder


def refusal(folder: Path, checkpoint: Path) -> str:
    """What import says; it must have written nothing."""
    before = sorted(checkpoint.parent.iterdir())
    with pytest.raises(InputError) as raised:
        import_hf(folder, checkpoint, check_logits=False, note=silent)
    assert sorted(checkpoint.parent.iterdir()) == before
    return str(raised.value)


def one_of_each_kind(names: list[str]) -> list[str]:
    """Names that differ in more than the numbers of layer and expert: the last of each kind."""
    return list({re.sub(r"\d+", "", name): name for name in sorted(names)}.values())


def some_at_a_time(names: list[str]) -> list[list[str]]:
    """Fewer than a message lists."""
    kinds = one_of_each_kind(names)
    return [kinds[start : start + 12] for start in range(0, len(kinds), 12)]


def test_missing_tensor_of_any_kind_is_named(sound: Path, tmp_path: Path) -> None:
    for number, names in enumerate(some_at_a_time(list(tensors_of(sound)))):

        def delete(tensors: Tensors, names: list[str] = names) -> None:
            for name in names:
                del tensors[name]

        message = refusal(changed(sound, tmp_path / str(number), delete), tmp_path / "ours")
        assert [name for name in names if f"{name}: missing" not in message] == []


def test_transposed_tensor_of_any_kind_is_named(sound: Path, tmp_path: Path) -> None:
    turned = [name for name, t in tensors_of(sound).items() if t.dim() > 1 and t.shape[-1] != t.shape[-2]]
    for number, names in enumerate(some_at_a_time(turned)):

        def transpose(tensors: Tensors, names: list[str] = names) -> None:
            tensors.update({name: tensors[name].mT for name in names})

        message = refusal(changed(sound, tmp_path / str(number), transpose), tmp_path / "ours")
        assert [name for name in names if f"{name}: its shape is" not in message] == []


def test_renamed_tensor_is_named_by_both_names(sound: Path, tmp_path: Path) -> None:
    name = sorted(tensors_of(sound))[-2]

    def rename(tensors: Tensors) -> None:
        tensors[f"{name}_new"] = tensors.pop(name)

    message = refusal(changed(sound, tmp_path / "hf", rename), tmp_path / "ours")
    assert f"{name}: missing" in message
    assert f"{name}_new: no place for it" in message


def test_shortened_tensor_is_named(sound: Path, tmp_path: Path) -> None:
    def shorten(tensors: Tensors) -> None:
        tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1]

    message = refusal(changed(sound, tmp_path / "hf", shorten), tmp_path / "ours")
    size = len(tensors_of(sound)["model.norm.weight"])
    assert f"model.norm.weight: its shape is [{size - 1}], expected [{size}]" in message


def test_cut_file_names_a_tensor_that_it_lacks(sound: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(sound, tmp_path / "hf")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    message = refusal(folder, tmp_path / "ours")
    assert "model.safetensors is damaged: it ends before" in message
    assert any(name in message for name in tensors_of(sound))


def test_integer_tensor_is_named(sound: Path, tmp_path: Path) -> None:
    def quantise(tensors: Tensors) -> None:
        tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int8)

    message = refusal(changed(sound, tmp_path / "hf", quantise), tmp_path / "ours")
    assert "model.norm.weight: its dtype is I8; allowed: F32" in message


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """One model in both forms."""
    folder = tmp_path_factory.mktemp("pair")
    save_model(make_model("qwen3_moe", "even", seed=7), folder / "hf")
    import_hf(folder / "hf", folder / "ours", check_logits=False, note=silent)
    return folder / "hf", folder / "ours"


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("model_type", "bert", "'bert' cannot be converted; allowed: "),
        ("model_type", "llama", "; it is dense: moe convert upcycle takes it"),
        ("quantization_config", {"quant_method": "fp8"}, "these weights are rounded"),
        ("hidden_act", "gelu", "hidden_act='gelu' cannot be computed; allowed: 'silu'"),
        ("attention_dropout", 0.1, "attention_dropout=0.1"),
        ("vocab_size", None, "vocab_size is missing"),
        ("hidden_size", 42, "model.hidden_size=42 is not a multiple of 4"),
        ("rope_parameters", {"rope_type": "longrope", "rope_theta": 1e4}, "allowed: default, yarn"),
    ],
)
def test_config_that_cannot_be_computed_is_refused(
    pair: tuple[Path, Path], tmp_path: Path, key: str, value: object, words: str
) -> None:
    folder = shutil.copytree(pair[0], tmp_path / "hf")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, key: value}))
    assert words in refusal(folder, tmp_path / "ours")


def test_existing_folder_is_kept(pair: tuple[Path, Path]) -> None:
    for convert in (
        lambda: import_hf(pair[0], pair[1], check_logits=False, note=silent),
        lambda: export_hf(pair[1], pair[0], family=None, check_logits=False, note=silent),
    ):
        with pytest.raises(InputError, match="exists already"):
            convert()


def test_damaged_checkpoint_is_not_exported(pair: tuple[Path, Path], tmp_path: Path) -> None:
    damaged = shutil.copytree(pair[1], tmp_path / "ours")
    shard = damaged / "__0_0.distcp"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(CorruptCheckpointError, match=r"__0_0\.distcp"):
        export_hf(damaged, tmp_path / "hf", family=None, check_logits=False, note=silent)
    assert not (tmp_path / "hf").exists()


def test_family_that_cannot_say_the_model_is_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"attention\.qk_norm=head would be read as none"):
        export_hf(pair[1], tmp_path / "hf", family="mixtral", check_logits=False, note=silent)


def test_check_names_the_tensor_that_differs_in_one_bit(pair: tuple[Path, Path], tmp_path: Path) -> None:
    def flip(tensors: Tensors) -> None:
        tensors["lm_head.weight"].view(torch.int32)[3, 5] ^= 1

    other = changed(pair[0], tmp_path / "hf", flip)
    with pytest.raises(InputError, match=r"lm_head\.weight: 1 of 15,360 bytes differ"):
        check(other, pair[1], check_logits=False)


def test_logit_check_sees_what_names_and_shapes_do_not(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """As a wrong order of heads would look: every name and shape fits."""

    def swap(tensors: Tensors) -> None:
        name = "model.layers.1.self_attn.o_proj.weight"
        tensors[name] = tensors[name].flip(1)

    wrong = changed(pair[0], tmp_path / "hf", swap)
    model = ModelSection.model_validate(verify(pair[1]).state["model"])
    with pytest.raises(InputError, match="the two are not the same model"):
        compare_logits(wrong, pair[1], model)
