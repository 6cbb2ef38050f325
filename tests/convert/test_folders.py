"""What folders in the wild look like: several files, other files beside them, old configs, mixed dtypes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import make_model, same_bytes, save_model, tensors_of
from safetensors.torch import save_file

from moe.checkpoint.manifest import verify
from moe.convert import hf_writer, shards
from moe.convert.check import check
from moe.convert.export_hf import export_hf
from moe.convert.families import family_of_config
from moe.convert.import_hf import import_hf
from moe.errors import InputError


def round_trip(folder: Path, out: Path, *, check_logits: bool = True) -> Path:
    import_hf(folder, out / "ours", check_logits=check_logits, note=str)
    export_hf(out / "ours", out / "back", family=None, check_logits=check_logits, note=str)
    return out / "back"


def test_several_files_in_and_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With limits of a few kilobytes, so that this small model needs several files on both sides."""
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(hf_writer, "FILE_BYTES", 30_000)
    monkeypatch.setattr(shards, "FILE_BYTES", 20_000)
    model = make_model("qwen3_moe", "even", seed=0)
    model.save_pretrained(tmp_path / "hf", max_shard_size=40_000)
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 3
    save_file({"not.ours": torch.zeros(3)}, tmp_path / "hf" / "adapter.safetensors")  # no file of the index
    back = round_trip(tmp_path / "hf", tmp_path)
    assert len(list((tmp_path / "ours").glob("*.distcp"))) > 3
    assert len(list(back.glob("*.safetensors"))) > 3
    (tmp_path / "hf" / "adapter.safetensors").unlink()
    assert same_bytes(tensors_of(tmp_path / "hf"), tensors_of(back)) == []
    reloaded, report = AutoModelForCausalLM.from_pretrained(back, output_loading_info=True)
    assert not any(report.values()), report
    assert same_bytes(dict(model.state_dict()), dict(reloaded.state_dict())) == []


def test_tensor_in_two_files_is_named(tmp_path: Path) -> None:
    make_model("qwen3_moe", "odd", seed=0).save_pretrained(tmp_path / "hf", max_shard_size=20_000)
    files = sorted((tmp_path / "hf").glob("*.safetensors"))
    shutil.copy(files[0], files[1])
    with pytest.raises(InputError, match=r"stands in .* and in"):
        import_hf(tmp_path / "hf", tmp_path / "ours", check_logits=False, note=str)


@pytest.mark.parametrize("index", ["[]", "{}", '{"weight_map": {"a": "../b.safetensors"}}'])
def test_broken_index_is_refused(tmp_path: Path, index: str) -> None:
    folder = save_model(make_model("qwen3_moe", "odd", seed=0), tmp_path / "hf")
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(InputError, match=r"model\.safetensors\.index\.json"):
        import_hf(folder, tmp_path / "ours", check_logits=False, note=str)


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_bf16_keeps_every_bit(tmp_path: Path, family: str) -> None:
    """transformers keeps DeepSeek's routing bias in fp32 beside bf16 weights."""
    folder = save_model(make_model(family, "even", seed=0).bfloat16(), tmp_path / "hf")
    back = round_trip(folder, tmp_path, check_logits=False)
    assert same_bytes(tensors_of(folder), tensors_of(back)) == []
    assert json.loads((back / "config.json").read_text())["dtype"] == "bfloat16"


def test_dtypes_mixed_in_one_fused_tensor_keep_every_bit(tmp_path: Path) -> None:
    folder = save_model(make_model("qwen3_moe", "even", seed=0), tmp_path / "hf")
    tensors = tensors_of(folder)
    narrow = {
        name: t.bfloat16() if "q_proj" in name or "up_proj" in name else t for name, t in tensors.items()
    }
    save_file(narrow, folder / "model.safetensors")
    back = round_trip(folder, tmp_path)
    assert same_bytes(tensors_of(folder), tensors_of(back)) == []
    assert check(folder, tmp_path / "ours", check_logits=True).logits is not None


def old_style(config: dict[str, Any]) -> dict[str, Any]:
    """As transformers 4 wrote it: rotary settings in two keys, Qwen's experts under their first name."""
    old = dict(config)
    rope = dict(old.pop("rope_parameters"))
    old["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    old["rope_scaling"] = None if kind == "default" else {"type": kind, **rope}
    if "partial_rotary_factor" in rope:
        old["partial_rotary_factor"] = rope["partial_rotary_factor"]
    if "num_local_experts" in old and old["model_type"] == "qwen3_moe":
        old["num_experts"] = old.pop("num_local_experts")
    return old


@pytest.mark.parametrize("family", ["qwen3_moe", "olmoe", "mixtral", "deepseek_v3", "glm4_moe"])
def test_config_of_version_4_means_the_same(tmp_path: Path, family: str) -> None:
    save_model(make_model(family, "even", seed=0), tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    described = family_of_config(config)
    assert described.model_of(old_style(config)) == described.model_of(config)


def test_kimi_is_read_as_deepseek(tmp_path: Path) -> None:
    folder = save_model(make_model("deepseek_v3", "odd", seed=0), tmp_path / "hf")
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "kimi_k2"}
    (folder / "config.json").write_text(json.dumps(config))
    back = round_trip(folder, tmp_path, check_logits=False)
    assert same_bytes(tensors_of(folder), tensors_of(back)) == []
    assert json.loads((back / "config.json").read_text()) == config


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("hidden_size", "wide", "does not describe a qwen3_moe model"),
        ("num_attention_heads", 0, "does not describe a qwen3_moe model"),
        ("vocab_size", -5, "does not describe a qwen3_moe model"),
        ("mlp_only_layers", [2], "dense layers must be the first ones"),
        ("decoder_sparse_step", 2, "decoder_sparse_step=2 cannot be computed; allowed: 1"),
    ],
)
def test_nonsense_in_a_config_is_one_sentence(tmp_path: Path, key: str, value: object, words: str) -> None:
    folder = save_model(make_model("qwen3_moe", "odd", seed=0), tmp_path / "hf")
    config = json.loads((folder / "config.json").read_text())
    del config["head_dim"]
    (folder / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(InputError, match=words):
        import_hf(folder, tmp_path / "ours", check_logits=False, note=str)


TEXT_FILES = {
    "tokenizer.json": b'{"version": "1.0", "model": {"vocab": {"\xc3\xa9": 0}}}\r\n',
    "tokenizer_config.json": b'{"chat_template": "{{ messages }}", "auto_map": {"AutoTokenizer": "a.py"}}',
    "special_tokens_map.json": b'{"eos_token": "</s>"}',
    "generation_config.json": b'{"eos_token_id": 2}',
    "chat_template.jinja": b"{% for m in messages %}{{ m }}{% endfor %}",
    "tokenizer.model": bytes(range(256)),
}


def test_tokenizer_comes_along_byte_for_byte_and_code_does_not(tmp_path: Path) -> None:
    folder = save_model(make_model("mixtral", "odd", seed=0), tmp_path / "hf")
    for name, content in TEXT_FILES.items():
        (folder / name).write_bytes(content)
    (folder / "a.py").write_text("raise SystemExit")
    back = round_trip(folder, tmp_path, check_logits=False)
    assert {name: (back / name).read_bytes() for name in TEXT_FILES} == TEXT_FILES
    assert {path.name for path in back.iterdir()} == {"config.json", "model.safetensors", *TEXT_FILES}
    assert {entry.name for entry in verify(tmp_path / "ours").files} >= TEXT_FILES.keys()


def test_export_without_a_tokenizer_says_so(tmp_path: Path) -> None:
    folder = save_model(make_model("mixtral", "odd", seed=0), tmp_path / "hf")
    import_hf(folder, tmp_path / "ours", check_logits=False, note=str)
    notes: list[str] = []
    export_hf(tmp_path / "ours", tmp_path / "back", family=None, check_logits=False, note=notes.append)
    assert any("the checkpoint has no tokenizer" in note for note in notes)


@pytest.mark.parametrize("target", ["../secret", "/etc/hostname", "../missing", "."])
def test_tokenizer_that_is_no_file_of_the_folder_is_refused(tmp_path: Path, target: str) -> None:
    folder = save_model(make_model("mixtral", "odd", seed=0), tmp_path / "hf")
    (tmp_path / "secret").write_text("{}")
    (folder / "tokenizer.json").symlink_to(target)
    with pytest.raises(
        InputError, match=r"tokenizer\.json is (a link to .*, outside the folder|no plain file)"
    ):
        import_hf(folder, tmp_path / "ours", check_logits=False, note=str)
    assert not (tmp_path / "ours").exists()


def test_links_of_the_hub_cache_are_followed(tmp_path: Path) -> None:
    """There every file of a snapshot is a link to a blob, two folders up."""
    folder = save_model(
        make_model("mixtral", "odd", seed=0), tmp_path / "models--a--b" / "snapshots" / "0f3c"
    )
    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.mkdir()
    (folder / "tokenizer.json").write_text("{}")
    for path in list(folder.iterdir()):
        path.rename(blobs / f"hash-of-{path.name}")
        path.symlink_to(Path("../../blobs") / f"hash-of-{path.name}")
    back = round_trip(folder, tmp_path, check_logits=False)
    assert (back / "tokenizer.json").read_text() == "{}"
    assert not (back / "tokenizer.json").is_symlink()


def test_rotary_frequencies_of_old_folders_are_left_out(tmp_path: Path) -> None:
    folder = save_model(make_model("mixtral", "odd", seed=0), tmp_path / "hf")
    tensors = tensors_of(folder)
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    save_file({**tensors, name: torch.ones(3)}, folder / "model.safetensors")
    back = round_trip(folder, tmp_path, check_logits=False)
    assert same_bytes(tensors, tensors_of(back)) == []
