"""NVIDIA GPUs through NVML: counters, and power of a known scope.

GPUs are addressed by UUID, because an index means another GPU as soon as CUDA_VISIBLE_DEVICES is set. A GPU
that is cut into MIG instances is refused: NVML counts the whole GPU only, neighbours included, and dividing
it would be a guess.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

from moe.errors import InputError
from moe.metering.energy import Boundary, EnergyMeterError, Source


class NvmlBoards:
    """An open NVML session on the given GPUs; every NVML failure leaves it as EnergyMeterError.

    Attributes:
        power_boundary: `module` if a GPU's power can only be read together with its CPU's (Grace).
    """

    counter_source: Source = "nvml_counter"
    power_source: Source = "nvml_power"

    def __init__(self, nvml: Any, uuids: Sequence[str]) -> None:
        """Open the session.

        Args:
            nvml: The `pynvml` module of nvidia-ml-py.
            uuids: CUDA or NVML device UUIDs, with or without the "GPU-" prefix; several ranks on one GPU
                count it once.

        Raises:
            InputError: No UUID was given, NVML cannot start or does not know one, or a GPU is cut by MIG.
        """
        if not uuids:
            raise InputError("the NVML meter needs at least one GPU UUID; this process uses no CUDA device")
        self._nvml = nvml
        self.names = tuple(dict.fromkeys(_nvml_uuid(uuid) for uuid in uuids))
        try:
            nvml.nvmlInit()
        except nvml.NVMLError as error:
            raise InputError(
                f"NVML cannot start ({error}); check that nvidia-smi runs on this machine"
            ) from error
        try:
            self._handles = [self._handle(uuid) for uuid in self.names]
            self._scopes = [self._power_scope(handle) for handle in self._handles]
        except InputError:
            self.close()
            raise
        by_module = nvml.NVML_POWER_SCOPE_MODULE in self._scopes
        self.power_boundary: Boundary = "module" if by_module else "gpu"

    def counters_j(self) -> list[float]:
        """Joules of each GPU since its driver was loaded."""
        counters_j = []
        for name, handle in zip(self.names, self._handles, strict=True):
            try:
                counters_j.append(self._nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3)
            except self._nvml.NVMLError as error:
                raise EnergyMeterError(f"{name}: the energy counter cannot be read: {error}") from error
        return counters_j

    def powers_w(self) -> list[float | None]:
        """Watts of each GPU; None where NVML fails or says zero."""
        return [
            (self._scoped_mw(handle, scope) or 0) / 1e3 or None
            for handle, scope in zip(self._handles, self._scopes, strict=True)
        ]

    def close(self) -> None:
        """End the NVML session (NVML counts its users, so others are not disturbed)."""
        self._nvml.nvmlShutdown()

    def _handle(self, uuid: str) -> Any:
        nvml = self._nvml
        if uuid.startswith("MIG-"):
            raise _cut_by_mig(uuid)
        try:
            handle = nvml.nvmlDeviceGetHandleByUUID(uuid)
        except nvml.NVMLError as error:
            raise InputError(
                f"NVML does not know GPU {uuid} ({error}); `nvidia-smi -L` lists the UUIDs"
            ) from error
        mig_mode = nvml.NVML_DEVICE_MIG_DISABLE
        with contextlib.suppress(nvml.NVMLError):  # GPUs before Ampere do not know the question
            mig_mode, _pending = nvml.nvmlDeviceGetMigMode(handle)
        if mig_mode != nvml.NVML_DEVICE_MIG_DISABLE:
            raise _cut_by_mig(uuid)
        return handle

    def _power_scope(self, handle: Any) -> int | None:
        """The narrowest scope whose power can be read; None for boards that know no scopes."""
        for scope in (self._nvml.NVML_POWER_SCOPE_GPU, self._nvml.NVML_POWER_SCOPE_MODULE):
            if self._scoped_mw(handle, scope):
                return int(scope)
        return None

    def _scoped_mw(self, handle: Any, scope: int | None) -> int | None:
        """Milliwatts averaged by the driver; None where it gives none.

        The mean, not the instant: the instant reading of A100 and H100 sees a quarter of the time
        (arXiv 2312.02741), so that regular steps alias with it.
        """
        nvml = self._nvml
        with contextlib.suppress(nvml.NVMLError):
            if scope is None:
                return int(nvml.nvmlDeviceGetPowerUsage(handle))
            field = nvml.nvmlDeviceGetFieldValues(handle, [(nvml.NVML_FI_DEV_POWER_AVERAGE, scope)])[0]
            if field.nvmlReturn == nvml.NVML_SUCCESS:
                return int(field.value.uiVal)
        return None


def _nvml_uuid(uuid: str) -> str:
    """Return a UUID as NVML writes it; CUDA's device properties leave out the prefix."""
    return uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"


def _cut_by_mig(uuid: str) -> InputError:
    return InputError(
        f"{uuid} is a GPU cut into MIG instances, or one of them, whose energy NVML does not tell apart; "
        "use whole GPUs, or energy.meter=estimate with energy.gpu_w"
    )
