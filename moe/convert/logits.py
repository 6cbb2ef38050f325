"""The last check of a conversion: both models compute the same, not only hold the same names and shapes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe.config.schema import ModelSection
from moe.convert.model_of import run_config
from moe.engine.one_rank import logits_of
from moe.errors import InputError

# Both sides compute in fp32, in another order of sums; a wrong rotation or norm is off by 1e-2 and more.
TOLERANCE = 1e-4
_SEQUENCES, _LENGTH, _SEED = 2, 32, 0


@dataclass(frozen=True)
class LogitCheck:
    """What was compared, and the largest difference over the largest logit."""

    tokens: int
    relative_error: float


def compare_logits(
    hf_dir: Path, checkpoint: Path, model: ModelSection, *, tolerance: float = TOLERANCE
) -> LogitCheck:
    """Run sample tokens through transformers' model of the folder and through ours, in fp32 on the CPU.

    Args:
        hf_dir: a Hugging Face folder.
        checkpoint: a verified folder of ours.
        model: what the checkpoint holds.
        tolerance: the largest difference that passes, over the largest logit.

    Raises:
        InputError: transformers is missing or cannot load the folder, or the logits differ.
    """
    generator = torch.Generator().manual_seed(_SEED)
    tokens_BS = torch.randint(model.vocab_size, (_SEQUENCES, _LENGTH), generator=generator)
    theirs_BSV = transformers_logits(hf_dir, tokens_BS)
    config = run_config(_as_published(model), precision="fp32", seq_length=_LENGTH)
    ours_BSV = logits_of(config, checkpoint, tokens_BS).float()
    error = float((ours_BSV - theirs_BSV).abs().max() / theirs_BSV.abs().max())
    if math.isnan(error) or error > tolerance:
        raise InputError(
            f"the logits of {checkpoint} differ from those of {hf_dir} by {error:.2e} of the largest "
            f"(allowed: {tolerance:.0e}): the two are not the same model"
        )
    return LogitCheck(tokens_BS.numel(), error)


def _as_published(model: ModelSection) -> ModelSection:
    """Without what transformers' model leaves out or never does: it drops no token and quantises nothing."""
    router = model.router.model_copy(update={"capacity_factor": 0.0})
    wide = {
        "expert_precision": "wide",
        "expert_fp8_input_store": False,
        "expert_wide_into_activation": False,
    }
    return model.model_copy(update={"mtp_layers": 0, "router": router} | wide)


@torch.no_grad()
def transformers_logits(hf_dir: Path, tokens_BS: Tensor) -> Tensor:
    """[B, S, V] of the folder's model, in fp32 with transformers' plainest attention.

    Raises:
        InputError: transformers is missing or cannot load the folder.
    """
    try:
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        raise InputError(
            "the logit check needs transformers 5: pip install 'joulemoe[convert]', "
            "or leave the check out with --unchecked"
        ) from error
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            hf_dir,
            dtype=torch.float32,
            attn_implementation="eager",
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"{hf_dir}: transformers cannot load it: {error}") from error
    model, report = loaded
    unfit = sorted(str(name) for kind in ("missing_keys", "mismatched_keys") for name in report[kind])
    if unfit:
        raise InputError(f"{hf_dir}: transformers finds no weights for {', '.join(unfit)}")
    logits_BSV: Tensor = model.eval()(tokens_BS).logits
    return logits_BSV
