"""Models of transformers with our kernels against their own eager experts: logits, loss, every gradient."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hf_models import FAMILIES, make_model, same_bytes, tensors_of
from tolerances import LARGEST_DIFFERENCE, assert_close, difference
from torch import Tensor

from moe.convert import families as convert
from moe.errors import InputError
from moe.transformers_backend import register_with_transformers, switch_experts

DROPOUT = {"attention_dropout": 0.2}  # what makes training differ from evaluation
ONE_LAYER = {"num_hidden_layers": 1, "mlp_only_layers": [], "first_k_dense_replace": 0}


@pytest.fixture(autouse=True, scope="module")
def registered() -> None:
    register_with_transformers()
    register_with_transformers()  # twice is once


def some_tokens(model: Any, *shape: int) -> Tensor:
    return torch.randint(model.config.vocab_size, shape, generator=torch.Generator().manual_seed(4))


def results(model: Any, experts: str, tokens_BS: Tensor) -> dict[str, Tensor]:
    """Logits, the loss of the next token and the gradient of every parameter, with these experts."""
    model.set_experts_implementation(experts)
    model.zero_grad()
    torch.manual_seed(5)
    logits_BSV = model(tokens_BS).logits
    loss = F.cross_entropy(logits_BSV[:, :-1].flatten(0, 1), tokens_BS[:, 1:].flatten())
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {"logits": logits_BSV.detach(), "loss": loss.detach(), **gradients}


def assert_as_good_as_eager(name: str, ours: Tensor, eager: Tensor, exact: Tensor) -> None:
    """Fail if ours errs by more than twice what eager does; by the table where eager is right by luck."""
    assert ours.dtype == eager.dtype
    times = 10 if "sinks" in name else 2  # four numbers, sums over all tokens that mostly cancel: chance
    allowed = max(times * difference(eager, exact), LARGEST_DIFFERENCE[ours.dtype])
    assert difference(ours, exact) < allowed, name


CASES = [(family, "even", True) for family in FAMILIES]
CASES += [(family, "odd", False) for family in FAMILIES]


@pytest.mark.parametrize(("family", "size", "training"), CASES)
def test_loss_and_every_gradient_equal_eager(family: str, size: str, training: bool) -> None:
    model = make_model(family, size, seed=0, **DROPOUT).train(training)
    tokens_BS = some_tokens(model, 2, 24)
    wide = copy.deepcopy(model).double()
    exact, ours_wide = (results(wide, experts, tokens_BS) for experts in ("eager", "moe"))
    eager, ours = (results(model, experts, tokens_BS) for experts in ("eager", "moe"))
    assert any("experts.gate_up_proj" in name for name in ours)
    for name, tensor in ours.items():
        assert_close(name, ours_wide[name], exact[name])
        assert_as_good_as_eager(name, tensor, eager[name], exact[name])
        if family != "gpt_oss":  # gradients of its sinks and key biases mostly cancel; fp64 has shown them
            assert_close(name, tensor, eager[name])


def every_expert(family: str) -> dict[str, int]:
    """Changes by which a token goes to all experts: their choice would hang on roundings of bf16."""
    sizes = FAMILIES[family][1]["even"]
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    (num_experts,) = (sizes[name] for name in names if name in sizes)
    return {"num_experts_per_tok": num_experts, "topk_group": sizes.get("n_group", 1)}


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_is_as_good_as_eager(family: str) -> None:
    changes = DROPOUT | ONE_LAYER | every_expert(family)
    model = make_model(family, "even", seed=0, **changes).bfloat16().train()
    tokens_BS = some_tokens(model, 2, 24)
    exact = results(copy.deepcopy(model).double(), "eager", tokens_BS)
    eager, ours = (results(model, experts, tokens_BS) for experts in ("eager", "moe"))
    assert_close("loss", ours.pop("loss"), exact["loss"], dtype=torch.bfloat16)
    for name, tensor in ours.items():
        assert_as_good_as_eager(name, tensor, eager[name], exact[name])


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_without_tokens_have_gradients_of_exact_zeros(family: str) -> None:
    model = make_model(family, "even", seed=1, **ONE_LAYER)
    tokens_BS = some_tokens(model, 1, 2)
    eager, ours = (results(model, experts, tokens_BS) for experts in ("eager", "moe"))
    (name,) = (name for name in ours if name.endswith(".experts.down_proj"))
    idle_E = ~eager[name].flatten(1).any(dim=1)
    assert 0 < idle_E.sum() < len(idle_E)
    assert torch.equal(~ours[name].flatten(1).any(dim=1), idle_E)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_grad_gives_the_same_bits(family: str) -> None:
    model = make_model(family, "odd", seed=2, **DROPOUT).train()
    tokens_BS = some_tokens(model, 2, 16)
    expected = results(model, "moe", tokens_BS)["logits"]
    torch.manual_seed(5)
    with torch.no_grad():
        assert torch.equal(model(tokens_BS).logits, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_generates_the_tokens_that_eager_generates(family: str) -> None:
    model = make_model(family, "even", seed=3)
    prompt_BS = some_tokens(model, 2, 5)
    found = {}
    for experts in ("eager", "moe"):
        model.set_experts_implementation(experts)
        found[experts] = model.generate(prompt_BS, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    assert torch.equal(found["moe"], found["eager"])


@pytest.mark.parametrize("family", FAMILIES)
def test_from_config_and_a_folder_and_back(family: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    eager = make_model(family, "odd", seed=4)
    ours = AutoModelForCausalLM.from_config(
        copy.deepcopy(eager.config), attn_implementation="eager", experts_implementation="moe"
    ).eval()
    ours.load_state_dict(eager.state_dict())
    eager.save_pretrained(tmp_path / "eager")
    ours.save_pretrained(tmp_path / "ours")
    assert same_bytes(tensors_of(tmp_path / "eager"), tensors_of(tmp_path / "ours")) == []
    # The choice is that of the process: a folder loads where our package is absent.
    ours_config, eager_config = ((tmp_path / n / "config.json").read_text() for n in ("ours", "eager"))
    assert ours_config == eager_config
    loaded, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours",
        attn_implementation="eager",
        experts_implementation="moe",
        output_loading_info=True,
    )
    assert not any(report.values()), report
    assert loaded.get_experts_implementation()[""] == "moe"
    tokens_BS = some_tokens(eager, 2, 12)
    with torch.no_grad():
        expected = ours(tokens_BS).logits
        assert torch.equal(loaded(tokens_BS).logits, expected)
        assert_close("logits", expected, eager(tokens_BS).logits)


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    model = make_model("mixtral", "even", seed=5).train()
    tokens_BS = some_tokens(model, 2, 16)
    kept = results(model, "moe", tokens_BS)
    model.gradient_checkpointing_enable()
    for name, tensor in results(model, "moe", tokens_BS).items():
        assert torch.equal(tensor, kept[name]), name


def test_experts_compile_without_a_graph_break() -> None:
    model = make_model("mixtral", "odd", seed=6)
    model.set_experts_implementation("moe")
    experts = model.model.layers[0].mlp.experts
    x_TD = torch.randn(7, 20, generator=torch.Generator().manual_seed(8))
    ids_TK, weights_TK = torch.tensor([[0, 2]] * 7), torch.rand(7, 2)
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x_TD, ids_TK, weights_TK), experts(x_TD, ids_TK, weights_TK))


def test_autocast_computes_in_its_dtype() -> None:
    model = make_model("mixtral", "even", seed=7, **ONE_LAYER)
    tokens_BS = some_tokens(model, 2, 24)
    with torch.autocast("cpu", torch.bfloat16):
        eager, ours = (results(model, experts, tokens_BS) for experts in ("eager", "moe"))
    for name, tensor in ours.items():
        assert_close(name, tensor, eager[name], dtype=torch.bfloat16)
    experts = model.model.layers[0].mlp.experts
    inputs = torch.randn(7, 40), torch.tensor([[0, 2]] * 7), torch.rand(7, 2)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = experts(*inputs)
    expected = experts.bfloat16()(inputs[0].bfloat16(), *inputs[1:])
    assert found.dtype == torch.float32  # that of the tokens, as eager returns it
    assert torch.equal(found, expected.float())


def test_switching_says_how_many_and_refuses_the_rest() -> None:
    import transformers

    model = make_model("qwen3_moe", "even", seed=0)
    assert switch_experts(model) == 3  # its first layer is dense
    assert model.get_experts_implementation() == {"": "moe"}
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    dense = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads))
    with pytest.raises(InputError, match=r"LlamaForCausalLM has no experts that go through .* registry"):
        switch_experts(dense)
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    config = transformers.GptOssConfig(**sizes, **heads, **experts, swiglu_limit=5.0)  # our kernels' is 7
    clamped = transformers.GptOssForCausalLM(config)
    before = clamped.get_experts_implementation()
    with pytest.raises(
        InputError, match=r"GptOssExperts .* needs its own gate, .* Use .*\"grouped_mm\" or \"ea"
    ):
        switch_experts(clamped)
    assert clamped.get_experts_implementation() == before
    clamped.set_experts_implementation("moe")  # transformers asks nobody, so the first forward must refuse
    with pytest.raises(InputError, match="GptOssExperts"):
        clamped(torch.zeros(1, 3, dtype=torch.long))


@pytest.mark.parametrize("family", convert.FAMILIES)
def test_every_converted_family_goes_through_the_registry(family: str) -> None:
    """Why no function replaces the blocks of a model: none of these would need it."""
    model = make_model(family, "even", seed=0).to("meta")
    blocks = [name for name, _ in model.named_modules() if name.endswith(".mlp.experts")]
    assert len(blocks) in (3, 4)  # of four layers; the first may be dense
    assert switch_experts(model) == len(blocks)


def test_importing_ours_does_not_import_transformers() -> None:
    program = "import sys, moe.transformers_backend; print('transformers' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout == "False\n"


def test_absent_transformers_is_said_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers.integrations.moe", None)
    with pytest.raises(ImportError, match=r"needs transformers 5: pip install 'joulemoe\[convert\]'"):
        register_with_transformers()
