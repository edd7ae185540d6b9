"""Checkpoints of MoCo's and SwAV's layouts, and their forward written out, sharing no code with the package."""

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

State = dict[str, Tensor]
Shapes = dict[str, tuple[int, ...]]
DEPTHS = {"resnet18": (False, (2, 2, 2, 2)), "resnet50": (True, (3, 4, 6, 3))}


def norm(prefix: str, width: int) -> Shapes:
    names = ("weight", "bias", "running_mean", "running_var")
    return {**{f"{prefix}.{name}": (width,) for name in names}, f"{prefix}.num_batches_tracked": ()}


def body(arch: str, width: int = 1, inner: int = 1) -> Shapes:
    """Returns a ResNet's shapes; `inner` widens only the 3 x 3 convolutions of bottlenecks, as in torchvision's wide_resnet."""
    bottleneck, depths = DEPTHS[arch]
    before = 64 * width
    shapes: Shapes = {"conv1.weight": (before, 3, 7, 7), **norm("bn1", before)}
    for layer, depth in enumerate(depths, start=1):
        planes = 64 * width * 2 ** (layer - 1)
        after = planes * (4 if bottleneck else 1)
        for block in range(depth):
            name, p = f"layer{layer}.{block}", planes * inner
            convs = [(p, before, 1), (p, p, 3), (after, p, 1)] if bottleneck else [(p, before, 3), (p, p, 3)]
            for k, (outputs, inputs, side) in enumerate(convs, start=1):
                shapes |= {f"{name}.conv{k}.weight": (outputs, inputs, side, side), **norm(f"{name}.bn{k}", outputs)}
            if block == 0 and before != after:
                shapes |= {f"{name}.downsample.0.weight": (after, before, 1, 1), **norm(f"{name}.downsample.1", after)}
            before = after
    return shapes


def linear(prefix: str, inputs: int, outputs: int) -> Shapes:
    return {f"{prefix}.weight": (outputs, inputs), f"{prefix}.bias": (outputs,)}


def moco(arch: str = "resnet18", *, version: int = 2, dim: int = 128, prefix: str = "module.", inner: int = 1) -> Shapes:
    features = 2048 if arch == "resnet50" else 512
    head = {**linear("fc.0", features, features), **linear("fc.2", features, dim)}
    encoder = {**body(arch, inner=inner), **(head if version == 2 else linear("fc", features, dim))}
    return {
        **{f"{prefix}encoder_q.{key}": shape for key, shape in encoder.items()},
        **{f"{prefix}encoder_k.{key}": shape for key, shape in encoder.items()},
        f"{prefix}queue": (dim, 8),
        f"{prefix}queue_ptr": (1,),
    }


def swav(
    arch: str = "resnet18",
    *,
    width: int = 1,
    batch_norm: bool = True,
    hidden: int = 96,
    prototypes: int = 30,
    prefix: str = "module.",
) -> Shapes:
    features = (2048 if arch == "resnet50" else 512) * width
    middle = norm("projection_head.1", hidden) if batch_norm else {}
    shapes = {
        **body(arch, width),
        **linear("projection_head.0", features, hidden),
        **middle,
        **linear(f"projection_head.{3 if batch_norm else 2}", hidden, 128),
        "prototypes.weight": (prototypes, 128),
    }
    return {prefix + key: shape for key, shape in shapes.items()}


def fill(shapes: Shapes, seed: int = 0) -> State:
    """Returns random weights, with non-trivial BatchNorm statistics and moderate activations."""
    generator = torch.Generator().manual_seed(seed)
    state: State = {}
    keys = hollow({key: shape for key, shape in shapes.items() if "encoder_k." in key} or {"": ()})
    for key, shape in shapes.items():
        fan_in = max(1, torch.Size(shape[1:]).numel())
        if key.endswith(("num_batches_tracked", "queue_ptr")):
            state[key] = torch.full(shape, 7, dtype=torch.int64)
        elif "encoder_k." in key:  # ignored, and half of the file
            state[key] = keys[key]
        elif key.endswith("running_var") or (key.endswith("weight") and len(shape) == 1):
            state[key] = torch.empty(shape).uniform_(0.5, 1.5, generator=generator)
        elif len(shape) == 1:
            state[key] = torch.empty(shape).uniform_(-0.2, 0.2, generator=generator)
        else:
            bound = (6 / fan_in) ** 0.5
            state[key] = torch.empty(shape).uniform_(-bound, bound, generator=generator)
    return state


def hollow(shapes: Shapes) -> State:
    """Returns zeros of these shapes that share one storage, for small files."""
    counters = ("num_batches_tracked", "queue_ptr")
    most = max(torch.Size(shape).numel() for shape in shapes.values())
    zeros = {True: torch.zeros(most, dtype=torch.int64), False: torch.zeros(most)}
    return {k: zeros[k.endswith(counters)][: torch.Size(s).numel()].view(s) for k, s in shapes.items()}


def forward(state: State, prefix: str, images: Tensor, std: tuple[float, float, float], swav_stem: bool) -> Tensor:
    """Returns pooled features [B, F] in float64 from the state dict; converts one layer at a time, since w4 takes 3 GB."""

    def w(name: str) -> Tensor:
        return state[prefix + name].double()

    def bn(x: Tensor, name: str) -> Tensor:
        mean, var = w(f"{name}.running_mean"), w(f"{name}.running_var")
        return F.batch_norm(x, mean, var, w(f"{name}.weight"), w(f"{name}.bias"), training=False, eps=1e-5)

    x = images.double() / 255
    x = (x - torch.tensor((0.485, 0.456, 0.406)).view(1, 3, 1, 1)) / torch.tensor(std, dtype=torch.float64).view(1, 3, 1, 1)
    if swav_stem:  # as in SwAV's code: the image is padded by 1, the stem by 2
        x = F.conv2d(F.pad(x, (1, 1, 1, 1)), w("conv1.weight"), stride=2, padding=2)
    else:
        x = F.conv2d(x, w("conv1.weight"), stride=2, padding=3)
    x = F.max_pool2d(F.relu(bn(x, "bn1")), 3, stride=2, padding=1)
    for layer in range(1, 5):
        block = 0
        while f"{prefix}layer{layer}.{block}.conv1.weight" in state:
            name = f"layer{layer}.{block}"
            bottleneck = f"{prefix}{name}.conv3.weight" in state
            stride = 2 if layer > 1 and block == 0 else 1
            y = x
            for k in range(1, 4 if bottleneck else 3):
                strided = stride if k == (2 if bottleneck else 1) else 1
                weight = w(f"{name}.conv{k}.weight")
                y = bn(F.conv2d(y, weight, stride=strided, padding=weight.shape[-1] // 2), f"{name}.bn{k}")
                y = F.relu(y) if k < (3 if bottleneck else 2) else y
            if f"{prefix}{name}.downsample.0.weight" in state:
                x = bn(F.conv2d(x, w(f"{name}.downsample.0.weight"), stride=stride), f"{name}.downsample.1")
            x = F.relu(x + y)
            block += 1
    return x.mean(dim=(2, 3))


def moco_target(state: State, images: Tensor, prefix: str = "module.") -> Tensor:
    """MoCo v2's normalised embedding [B, D] in float64: Linear, ReLU, Linear."""
    w = {name: state[f"{prefix}encoder_q.fc.{name}"].double() for name in ("0.weight", "0.bias", "2.weight", "2.bias")}
    features = forward(state, f"{prefix}encoder_q.", images, (0.229, 0.224, 0.225), swav_stem=False)
    target = F.linear(F.relu(F.linear(features, w["0.weight"], w["0.bias"])), w["2.weight"], w["2.bias"])
    return target / target.pow(2).sum(dim=1, keepdim=True).sqrt()


def swav_target(state: State, images: Tensor, prefix: str = "module.") -> Tensor:
    """SwAV's normalised embedding [B, D] in float64: Linear, BatchNorm (absent in w5), ReLU, Linear."""

    def w(name: str) -> Tensor:
        return state[f"{prefix}projection_head.{name}"].double()

    features = forward(state, prefix, images, (0.228, 0.224, 0.225), swav_stem=True)
    hidden = F.linear(features, w("0.weight"), w("0.bias"))
    last = "2"
    if f"{prefix}projection_head.1.weight" in state:
        hidden = (hidden - w("1.running_mean")) / (w("1.running_var") + 1e-5).sqrt() * w("1.weight") + w("1.bias")
        last = "3"
    target = F.linear(hidden.clamp(min=0), w(f"{last}.weight"), w(f"{last}.bias"))
    return target / target.pow(2).sum(dim=1, keepdim=True).sqrt()


def save(path: Path, state: State, **other: object) -> Path:
    torch.save({"epoch": 1, "arch": "resnet", "state_dict": state, **other}, path)
    return path


@pytest.fixture(scope="session")
def kit() -> SimpleNamespace:
    targets = {"moco_target": moco_target, "swav_target": swav_target}
    return SimpleNamespace(moco=moco, swav=swav, body=body, fill=fill, hollow=hollow, forward=forward, save=save, **targets)


@pytest.fixture(scope="session")
def crops() -> Tensor:
    return torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def moco18(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, State]]:
    state = fill(moco("resnet18"))
    path = save(tmp_path_factory.mktemp("moco") / "moco18.pth.tar", state, optimizer={"param_groups": [{"lr": 0.03}]})
    yield path, state
    path.unlink()


Write = Callable[[State], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    return lambda state: save(tmp_path / "checkpoint.pth.tar", state)
