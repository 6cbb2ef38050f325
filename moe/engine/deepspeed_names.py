"""Names of DeepSpeed that this engine relies on although nobody promises them, checked at start.

A later version may rename one: then a run ends before its first step, and not in its middle. What can be
found by importing is looked for before there is a process group, what ZeRO leaves on its objects once it has
made them. `deepspeed.ops.__compatible_ops__` is not asked for: answering starts compilers.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pkgutil import resolve_name
from typing import Any

from moe.errors import InputError

KNOWN_VERSION = "0.19.8"  # of DeepSpeed, with which all tests pass
REMEDY = f"DeepSpeed {KNOWN_VERSION} is known to work: pip install deepspeed=={KNOWN_VERSION}, or use "
REMEDY += "engine.name=megatron"

NAMES = (
    "deepspeed.comm.comm:cdb",
    "deepspeed.module_inject.auto_ep_layer:AutoEPMoELayer",
    "deepspeed.runtime.compiler:compile",
    "deepspeed.runtime.compiler:dummy_decorator",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # found, not imported: that compiles
    "deepspeed.runtime.zero.parameter_offload:DeepSpeedZeRoOffload._register_deepspeed_module",
    "deepspeed.runtime.zero.partition_parameters:Init.param_id",
    "deepspeed.runtime.zero.partition_parameters:register_external_parameter",
    "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3._create_param_groups_fp16_flat_cpu_memory",
    "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3.get_param_id",
    "deepspeed.runtime.zero.stage3:defragment",
    "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer._use_compact_grad_partition_buffer",
    "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer.update_lp_params",
    "deepspeed.utils.groups:_EXPERT_DATA_PARALLEL_GROUP",
    "deepspeed.utils.groups:_EXPERT_DATA_PARALLEL_GROUP_RANKS",
    "deepspeed.utils.groups:_EXPERT_PARALLEL_GROUP",
    "deepspeed.utils.groups:_EXPERT_PARALLEL_GROUP_RANKS",
    "deepspeed.utils.groups:_release_process_group_references",
)
# Attributes that exist once ZeRO has taken the model over, by stage: of its optimizer, of a parameter.
ATTRIBUTES = {
    1: (("single_partition_of_fp32_groups", "use_grad_accum_attribute"), ("_hp_mapping", "grad_accum")),
    2: (("single_partition_of_fp32_groups",), ("_hp_mapping",)),
    3: (
        ("fp32_partitioned_groups_flat", "grad_position", "persistent_parameters"),
        ("ds_numel", "ds_tensor", "ds_zero_partition_rank"),
    ),
}


def require_names(names: Iterable[str] = NAMES) -> None:
    """See that DeepSpeed can be imported and has `names`.

    Args:
        names: `module:attribute.attribute`, whose modules are imported, or `module`, which is only found.

    Raises:
        InputError: listing what is missing, or why DeepSpeed or a module of it cannot be imported.
    """
    try:
        found = version("deepspeed")
    except PackageNotFoundError as error:
        raise InputError(f"engine.name=deepspeed: DeepSpeed is not installed. {REMEDY}") from error
    try:
        resolve_name("deepspeed")  # imports it; why that fails says more than the names that are missing then
        missing = [name for name in names if not _exists(name)]
    except ImportError as error:
        raise InputError(
            f"engine.name=deepspeed: DeepSpeed {found} is installed but cannot be imported: {error}. Install "
            "what it misses, or use engine.name=megatron"
        ) from error
    if missing:
        raise InputError(_lacks(found, missing))


def require_attributes(optimizer: Any, parameter: Any, *, zero_stage: int) -> None:
    """See that ZeRO left on its optimizer and on a parameter what the engine reads there.

    Raises:
        InputError: listing what is missing.
    """
    of_optimizer, of_parameter = ATTRIBUTES[zero_stage]
    kind = type(optimizer).__name__
    missing = [f"{kind}.{name}" for name in of_optimizer if not hasattr(optimizer, name)]
    missing += [f"{name} of parameters" for name in of_parameter if not hasattr(parameter, name)]
    if missing:
        raise InputError(_lacks(version("deepspeed"), missing))


def _exists(name: str) -> bool:
    module, _, attribute = name.partition(":")
    try:
        if not attribute:
            return find_spec(module) is not None
        resolve_name(name)
    except AttributeError:
        return False
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # something else that the module needs
        return False
    return True


def _lacks(found: str, missing: list[str]) -> str:
    return f"engine.name=deepspeed: DeepSpeed {found} lacks {', '.join(missing)}. {REMEDY}"
