"""Backbones by name: torchvision's classifiers, timm's networks, ReActNet."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fkd_ssl.errors import RequestError, did_you_mean
from fkd_ssl.maps import feature_map
from fkd_ssl.options import Named
from fkd_ssl.students.reactnet import ReActNet

REACTNETS = {"reactnet": True, "reactnet_step1": False}
"""Name -> whether the weights are binary too."""
TIMM = "timm/"
MOMENTUM = 0.1
"""Minimum momentum of BatchNorm's running statistics; torch's default.

Some networks of torchvision have 0.01 (MobileNetV3, EfficientNet-B5 to B7, MaxViT) or 0.0003 (MNASNet), for trainings of
several 100,000 steps. After a few hundred steps, the running statistics would still be close to their initial values, or to
those of much earlier weights, and the features in eval mode would be nearly constant. Losses and weights do not depend on this
value, because train mode does not read the running statistics.
"""
AUXILIARY = ("googlenet", "inception_v3")
"""torchvision's networks with auxiliary classifiers for training, which are left out."""
_CLASSIFIERS = ("fc", "classifier", "heads", "head")  # names of the last layers in torchvision
_WIDTHS = ("mobilenet_v2", "mobilenet_v3_small", "mobilenet_v3_large")  # torchvision's networks with a width option


def make_backbone(name: str, *, stem: str = "standard", width: float = 1.0, drop_path: float = 0.0) -> tuple[nn.Module, int]:
    """Makes an untrained network without its last layers, in train mode; returns it and its feature dimension F.

    Args:
        name: A classifier of torchvision, timm/NAME, reactnet or reactnet_step1, or the Named of a module.
        stem: `standard`, or `small` for images of 32 or 64 px: the first convolution is 3 x 3 with stride 1, without the
            max-pooling after it (SimCLR, arXiv 2002.05709, appendix B.9).
        width: Multiplier of the number of channels, for networks that support it.
        drop_path: Rate of stochastic depth (arXiv 1603.09382) of the last block, increasing linearly from 0 at the first one;
            only for timm.

    Raises:
        RequestError: The network is unknown, its last layers cannot be found, or it does not support an option.
    """
    if stem not in ("standard", "small"):
        raise RequestError(f"stem {stem!r} is unknown; expected standard or small")
    if isinstance(name, Named):
        return _own(name, stem, width)
    if not 0 < width <= 4:
        raise RequestError(f"width {width}: must be between 0 and 4")
    if width != 1 and name not in (*REACTNETS, *_WIDTHS):
        raise RequestError(f"width {width}: student {name!r} has one width; choose {', '.join((*REACTNETS, *_WIDTHS))}")
    if drop_path and not name.startswith(TIMM):
        raise RequestError(f"drop_path {drop_path}: only for students of timm, not {name!r}")
    if name in REACTNETS:
        network: Any = ReActNet(binary_weights=REACTNETS[name], width=width)
    elif name.startswith(TIMM):
        network = _timm(name, drop_path)
    else:
        network = _torchvision(name, {"width_mult": width} if width != 1 else {})
    if stem == "small":
        make_small(network, name)
    return _prepare(network, name)


def _own(name: Named, stem: str, width: float) -> tuple[nn.Module, int]:
    """A copy of the user's module, and its feature dimension."""
    if stem != "standard" or width != 1:
        raise RequestError(f"student {name}: a module of your own has its own stem and width; leave out stem and width")
    if not isinstance(name.value, nn.Module):
        raise RequestError(f"student {name}: expected a torch.nn.Module, got {type(name.value).__name__}")
    return _prepare(copy.deepcopy(name.value), name)


def _prepare(network: Any, name: str) -> tuple[nn.Module, int]:
    """Raises BatchNorm's momentum to MOMENTUM and measures F; returns the network in train mode, and F."""
    network.eval()
    size = _input_size(network, name)
    try:
        with torch.no_grad():
            output = network(torch.zeros(1, 3, *size))
            _, dim = output.shape
    except (Exception, SystemExit) as error:  # the network may raise anything, for instance if its input is not images
        raise RequestError(
            f"student {name!r}: gives no features [B, F] of images of {size[1]} x {size[0]} px: {type(error).__name__}: {error}"
        ) from error
    network.train()
    for part in network.modules():
        if isinstance(part, _BatchNorm) and part.momentum is not None:
            part.momentum = max(part.momentum, MOMENTUM)
    return network, int(dim)


def map_dim(network: nn.Module, name: str) -> int:
    """The number of channels of a backbone's last map, which may differ from F.

    Raises:
        RequestError: It has no map.
    """
    network.eval()
    try:
        with torch.no_grad():
            return feature_map(network, torch.zeros(1, 3, *_input_size(network, name))).shape[1]
    except RequestError as error:
        raise RequestError(f"student {name!r}: {error}") from error
    finally:
        network.train()


def last_layer(name: str, classes: int, dim: int, backbone: Mapping[str, Tensor]) -> str | None:
    """The library's name of the last layer of a network with `classes` classes and this backbone.

    Returns None if it is more than one linear layer on the backbone's features [B, dim], as in torchvision's MobileNetV3.
    """
    if name in REACTNETS:
        return None
    try:
        whole = (
            _whole_timm(name, num_classes=classes) if name.startswith(TIMM) else _whole_torchvision(name, num_classes=classes)
        )
    except (TypeError, RequestError):  # the network lacks the option
        return None
    rest = {key: tuple(value.shape) for key, value in whole.state_dict().items() if key not in backbone}
    last = next((key.removesuffix(".weight") for key in rest if key.endswith(".weight")), None)
    return last if rest == {f"{last}.weight": (classes, dim), f"{last}.bias": (classes,)} else None


def has_dynamic_size(name: str) -> bool:
    """Whether a timm network needs an option to accept other image sizes than its own."""
    return getattr(_timm(name), "dynamic_img_size", False) is True


def make_small(network: nn.Module, name: str) -> None:
    """Replaces the stem for small images; raises RequestError if the first layer is not a convolution of up to 7 px."""
    path, first = next(((path, part) for path, part in network.named_modules() if isinstance(part, nn.Conv2d)), ("", None))
    if first is None or max(first.kernel_size) > 7 or first.groups != 1:
        raise RequestError(f"student {name!r}: has no small stem: its first layer is not a convolution of up to 7 px")
    conv = nn.Conv2d(first.in_channels, first.out_channels, 3, padding=1, bias=first.bias is not None)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    _put(network, path, conv)
    pool = next((path for path, part in network.named_modules() if isinstance(part, nn.MaxPool2d)), None)
    # the max-pooling of the stem, not a later one
    if pool is not None and pool.rpartition(".")[2] in ("maxpool", "maxpool1", "pool0"):
        _put(network, pool, nn.Identity())


def _put(network: nn.Module, path: str, part: nn.Module) -> None:
    parent, _, last = path.rpartition(".")
    setattr(network.get_submodule(parent), last, part)


def _whole_torchvision(name: str, **options: Any) -> nn.Module:
    from torchvision import models

    names = models.list_models(module=models)
    if ":" in name:
        raise RequestError(
            f"student {name!r}: module:function cannot name a student: pass the module from Python, "
            "fkd_ssl.train(student=module, ...), or name a network of torchvision, timm/NAME, reactnet or reactnet_step1"
        )
    if name not in names:
        known = [*names, *REACTNETS]
        raise RequestError(f"student {name!r}: torchvision has no such classifier{did_you_mean(name, known)}")
    extra = {"aux_logits": False} if name in AUXILIARY else {}
    network: nn.Module = models.get_model(name, weights=None, **extra, **options)
    return network


def _torchvision(name: str, options: dict[str, Any]) -> nn.Module:
    network = _whole_torchvision(name, **options)
    last = next((part for part in _CLASSIFIERS if hasattr(network, part)), None)
    if last is None:
        raise RequestError(f"student {name!r}: cannot tell its classifier from its backbone")
    # these networks pool or flatten inside their classifier, all others before it
    late = name.startswith(("squeezenet", "convnext", "maxvit"))
    setattr(network, last, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()) if late else nn.Identity())
    return network


def _timm(name: str, drop_path: float = 0.0) -> nn.Module:
    return _whole_timm(name, num_classes=0, **({"drop_path_rate": drop_path} if drop_path else {}))


def _whole_timm(name: str, **more: Any) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise RequestError(f"student {name!r}: timm is not installed ({error}): pip install 'fkd_ssl[timm]'") from error
    model = name.removeprefix(TIMM)
    if not timm.is_model(model):
        raise RequestError(f"student {name!r}: timm has no such model{did_you_mean(model, timm.list_models())}")
    options: dict[str, Any] = {"pretrained": False, **more}
    try:
        try:  # lets a vision transformer accept other sizes than its own
            network: nn.Module = timm.create_model(model, **options, dynamic_img_size=True)
        except TypeError:  # most networks do not have this option
            network = timm.create_model(model, **options)
    except Exception as error:  # timm may raise anything
        raise RequestError(f"student {name!r}: timm cannot make it: {type(error).__name__}: {error}") from error
    return network


def _input_size(network: Any, name: str) -> tuple[Any, Any]:
    """The image size at which the dimensions are measured."""
    if isinstance(name, Named):
        side = name.pixels or getattr(network, "pixels", 224)
        return side, side
    size = getattr(network, "pretrained_cfg", {}).get("input_size", (3, 224, 224))
    return size[1], size[2]
