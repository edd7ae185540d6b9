"""Error of a teacher's embedding in fp32 relative to the same forward in float64, and the memory that loading takes.

    python benchmarks/parity.py --networks moco_r50 swav_r50w4

Random weights in the official layouts, with the official heads and numbers of prototypes, since the published files are not
redistributed. The float64 forward is that of the tests (tests/teachers/conftest.py): torch.nn.functional on the file's
tensors, which shares no code with fkd_ssl. Each load runs in a separate process. The script prints its peak resident memory,
minus the memory of Python with its libraries and minus the weights, for a zip file and for the format of PyTorch before 1.6
(that of MoCo's files). w5 takes 6 GB of disk and 8 GB of memory.
"""

import argparse
import json
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

KIT = runpy.run_path(str(Path(__file__).parents[1] / "tests" / "teachers" / "conftest.py"))
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "moco_r50": ("mocov2", {"arch": "resnet50"}),
    "swav_r50": ("swav", {"arch": "resnet50", "hidden": 2048, "prototypes": 3000}),
    "swav_r50w2": ("swav", {"arch": "resnet50", "width": 2, "hidden": 8192, "prototypes": 3000}),
    "swav_r50w4": ("swav", {"arch": "resnet50", "width": 4, "hidden": 8192, "prototypes": 3000}),
    "swav_r50w5": ("swav", {"arch": "resnet50", "width": 5, "hidden": 10240, "prototypes": 3000, "batch_norm": False}),
}
SIZES = ((32, 32), (65, 65), (48, 80), (96, 96))

LOAD = """
import sys
from pathlib import Path
from fkd_ssl.teachers import load_teacher

def peak():  # of this process alone: getrusage's begins with what the parent had when it forked
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

before = peak()
teacher = load_teacher(sys.argv[1], checkpoint=sys.argv[2])
weights = sum(value.nbytes for value in teacher.state_dict().values())
print(weights, peak() - before - weights)
"""


def write(name: str, path: Path) -> dict[str, torch.Tensor]:
    """Writes random weights of a network to `path`; returns them memory-mapped, so that they take no memory of their own."""
    family, options = NETWORKS[name]
    shapes = KIT["moco" if family == "mocov2" else "swav"](**options)
    state = KIT["fill"](shapes)
    if family == "swav":  # SwAV keeps them at unit length
        prototypes = state["module.prototypes.weight"]
        prototypes /= prototypes.norm(dim=1, keepdim=True)
    KIT["save"](path, state)
    mapped: dict[str, torch.Tensor] = torch.load(path, weights_only=True, mmap=True)["state_dict"]
    return mapped


def differences(name: str, path: Path, state: dict[str, torch.Tensor], sizes: tuple[tuple[int, int], ...]) -> dict[str, float]:
    """Returns the largest absolute difference of any component for two images of each size; for SwAV also of the scores."""
    from fkd_ssl.teachers import load_teacher

    family, _ = NETWORKS[name]
    teacher = load_teacher(family, checkpoint=path)
    generator = torch.Generator().manual_seed(1)
    worst: dict[str, float] = {}
    for height, width in sizes:
        images = torch.randint(0, 256, (2, 3, height, width), dtype=torch.uint8, generator=generator)
        with torch.inference_mode():
            expected = KIT["moco_target" if family == "mocov2" else "swav_target"](state, images)
            got = teacher.embed(images)
            worst[f"{height} x {width}"] = float((got.double() - expected).abs().max())
            if family == "swav":
                scores = got @ torch.from_numpy(teacher.info.arrays["prototypes"]).T
                exact = expected @ state["module.prototypes.weight"].double().T
                worst["prototype scores"] = max(worst.get("prototype scores", 0), float((scores.double() - exact).abs().max()))
    return worst


def peak_beyond_weights(family: str, path: Path) -> tuple[int, int]:
    """Returns the bytes of a teacher's weights, and the peak memory beyond them while loading, in a process of its own."""
    done = subprocess.run([sys.executable, "-c", LOAD, family, str(path)], capture_output=True, text=True, check=True)
    weights, beyond = done.stdout.split()
    return int(weights), int(beyond)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    args = parser.parse_args()
    for name in args.networks:
        with tempfile.TemporaryDirectory() as folder:
            path, old = Path(folder) / "weights.pth.tar", Path(folder) / "old.pth.tar"
            state = write(name, path)
            figures: dict[str, Any] = {"network": name, "difference": differences(name, path, state, SIZES)}
            torch.save({"state_dict": state}, old, _use_new_zipfile_serialization=False)
            for kind, file in (("zip", path), ("before 1.6", old)):
                weights, beyond = peak_beyond_weights(NETWORKS[name][0], file)
                figures["weights_megabytes"] = round(weights / 1e6)
                figures[f"loading_beyond_them_megabytes, {kind}"] = round(beyond / 1e6)
            print(json.dumps(figures, indent=2), flush=True)


if __name__ == "__main__":
    main()
