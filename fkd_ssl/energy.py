"""Energy, where the machine tells: of Intel's and AMD's processors by Linux's powercap, of NVIDIA's GPUs by NVML.

Both count what the whole machine uses, other programs included. Linux lets only root read the processors' counters.
"""

from pathlib import Path
from typing import Any

POWERCAP = Path("/sys/class/powercap")


class Meter:
    """Joules since it was made, None where no counter can be read.

    A processor's counter starts again at 0 after some ten minutes to hours of full load, so `read` it every few minutes.

    Args:
        powercap: Folder of the processors' counters.
    """

    def __init__(self, powercap: Path = POWERCAP) -> None:
        self._packages = [zone for zone in powercap.glob("intel-rapl:*") if zone.name.count(":") == 1]
        self._gpus = _gpus()
        self._last = self._counters()
        self._microjoules = 0

    def read(self) -> float | None:
        """Joules since the meter was made."""
        now = self._counters()
        for name, (count, most) in now.items():
            used = count - self._last[name][0] if name in self._last else 0
            self._microjoules += used if used >= 0 else used + most
        self._last = now
        return self._microjoules / 1e6 if now else None

    def _counters(self) -> dict[str, tuple[int, int]]:
        """Microjoules of each device, and where its counter starts again."""
        found = {}
        for zone in self._packages:
            try:
                found[zone.name] = (int((zone / "energy_uj").read_text()), int((zone / "max_energy_range_uj").read_text()))
            except (OSError, ValueError):
                continue
        for number, (library, handle) in enumerate(self._gpus):
            try:
                found[f"gpu{number}"] = (1000 * library.nvmlDeviceGetTotalEnergyConsumption(handle), 0)
            except library.NVMLError:
                continue
        return found


def _gpus() -> list[tuple[Any, Any]]:
    """NVML (the package nvidia-ml-py, where it is installed) and its handle of each GPU."""
    try:
        import pynvml
    except ImportError:
        return []
    try:
        pynvml.nvmlInit()
        return [(pynvml, pynvml.nvmlDeviceGetHandleByIndex(k)) for k in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError:
        return []
