"""AMD GPUs through AMD SMI: counters, and power.

GPUs are addressed by PCI address, the one name that ROCm and AMD SMI write alike. Some boards count wrongly
(MI100, ROCm/amdsmi issue 38), which the comparison with their power shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moe.errors import InputError
from moe.metering.energy import Boundary, EnergyMeterError, Source


class AmdBoards:
    """An open AMD SMI session on the given GPUs; every failure leaves it as EnergyMeterError."""

    counter_source: Source = "amd_counter"
    power_source: Source = "amd_counter"  # never used: a board without a counter is refused
    power_boundary: Boundary = "gpu"

    def __init__(self, smi: Any, pci_addresses: Sequence[str]) -> None:
        """Open the session.

        Args:
            smi: The `amdsmi` module that comes with ROCm.
            pci_addresses: Such as 0000:c1:00.0; several ranks on one GPU count it once.

        Raises:
            InputError: No address was given, or AMD SMI cannot start or does not know one.
        """
        if not pci_addresses:
            raise InputError("the AMD SMI meter needs at least one GPU; this process uses none")
        self._smi = smi
        self.names = tuple(dict.fromkeys(address.lower() for address in pci_addresses))
        try:
            smi.amdsmi_init(smi.AmdSmiInitFlags.INIT_AMD_GPUS)
        except smi.AmdSmiException as error:
            raise InputError(f"AMD SMI cannot start ({error}); check that `amd-smi list` works") from error
        try:
            self._handles = self._find()
        except (InputError, smi.AmdSmiException) as error:
            self.close()
            raise InputError(str(error)) from error

    def counters_j(self) -> list[float]:
        """Joules of each GPU since its driver was loaded."""
        counters_j = []
        for name, handle in zip(self.names, self._handles, strict=True):
            try:
                count = self._smi.amdsmi_get_energy_count(handle)
            except self._smi.AmdSmiException as error:
                raise EnergyMeterError(f"{name}: the energy counter cannot be read: {error}") from error
            counters_j.append(count["energy_accumulator"] * count["counter_resolution"] / 1e6)
        return counters_j

    def powers_w(self) -> list[float | None]:
        """Watts of each GPU; None where AMD SMI fails, or says zero or N/A."""
        return [self._power_w(handle) for handle in self._handles]

    def close(self) -> None:
        """End the session."""
        self._smi.amdsmi_shut_down()

    def _find(self) -> list[Any]:
        handles = {
            self._smi.amdsmi_get_gpu_device_bdf(handle).lower(): handle
            for handle in self._smi.amdsmi_get_processor_handles()
        }
        for name in self.names:
            if name not in handles:
                raise InputError(f"AMD SMI does not know GPU {name}; it knows {', '.join(sorted(handles))}")
        return [handles[name] for name in self.names]

    def _power_w(self, handle: Any) -> float | None:
        try:
            power = self._smi.amdsmi_get_power_info(handle)
        except self._smi.AmdSmiException:
            return None
        # MI300 gives the current power, boards before it the average; the other one is "N/A" or zero.
        for key in ("average_socket_power", "current_socket_power"):
            if isinstance(power.get(key), int | float) and power[key] > 0:
                return float(power[key])
        return None
