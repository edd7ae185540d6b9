"""Backbones by name: torchvision's classifiers, timm's networks, ReActNet."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fkd_ssl.errors import RequestError, did_you_mean
from fkd_ssl.students.reactnet import ReActNet

REACTNETS = {"reactnet": True, "reactnet_step1": False}
"""By name, whether the weights are binary too."""
TIMM = "timm/"
AUXILIARY = ("googlenet", "inception_v3")
"""Those of torchvision's with further classifiers for training, which are left out."""
_CLASSIFIERS = ("fc", "classifier", "heads", "head")  # what torchvision's families call their last layers
_WIDTHS = ("mobilenet_v2", "mobilenet_v3_small", "mobilenet_v3_large")  # those of torchvision's that can be narrower


def make_backbone(name: str, *, stem: str = "standard", width: float = 1.0) -> tuple[nn.Module, int]:
    """An untrained network without its last layers, in train mode, and the dimension F of its features.

    Args:
        name: A classifier of torchvision's, timm/NAME, reactnet or reactnet_step1.
        stem: `standard`, or `small` for images of 32 or 64 px: the first convolution is 3 x 3 with stride 1, and the max-pool
            after it is left out (SimCLR, arXiv 2002.05709, appendix B.9).
        width: Factor of the channels, where the network can have another.

    Raises:
        RequestError: There is no such network, its last layers are not known here, or it has no such stem or width.
    """
    if stem not in ("standard", "small"):
        raise RequestError(f"stem {stem!r} is unknown; there are standard, small")
    if not 0 < width <= 4:
        raise RequestError(f"width {width}: must lie in 0 to 4")
    if width != 1 and name not in (*REACTNETS, *_WIDTHS):
        raise RequestError(f"width {width}: student {name!r} has one width; others have {', '.join((*REACTNETS, *_WIDTHS))}")
    if name in REACTNETS:
        network: Any = ReActNet(binary_weights=REACTNETS[name], width=width)
    elif name.startswith(TIMM):
        network = _timm(name)
    else:
        network = _torchvision(name, {"width_mult": width} if width != 1 else {})
    if stem == "small":
        make_small(network, name)
    network.eval()
    try:
        with torch.no_grad():
            dim = network(torch.zeros(1, 3, *_probe(network))).shape[1]
    except Exception as error:  # what a network that takes no images, or gives no vectors, raises
        raise RequestError(f"student {name!r}: gives no features of images: {type(error).__name__}: {error}") from error
    network.train()
    return network, int(dim)


def last_layer(name: str, classes: int, dim: int, backbone: Mapping[str, Tensor]) -> str | None:
    """What a library calls the last layer of a network of `classes` whose backbone has these weights.

    None where that is more than one linear layer on the backbone's features [B, dim], as MobileNetV3's of torchvision's is.
    """
    if name in REACTNETS:
        return None
    try:
        whole = (
            _whole_timm(name, num_classes=classes) if name.startswith(TIMM) else _whole_torchvision(name, num_classes=classes)
        )
    except (TypeError, RequestError):  # a network without such an option
        return None
    rest = {key: tuple(value.shape) for key, value in whole.state_dict().items() if key not in backbone}
    last = next((key.removesuffix(".weight") for key in rest if key.endswith(".weight")), None)
    return last if rest == {f"{last}.weight": (classes, dim), f"{last}.bias": (classes,)} else None


def has_dynamic_size(name: str) -> bool:
    """Whether a network of timm's has to be asked for other sizes of images than its own."""
    return getattr(_timm(name), "dynamic_img_size", False) is True


def make_small(network: nn.Module, name: str) -> None:
    """Gives a network the stem for small images; raises RequestError where it begins with no convolution of 2 to 7 px."""
    path, first = next(((path, part) for path, part in network.named_modules() if isinstance(part, nn.Conv2d)), ("", None))
    if first is None or max(first.kernel_size) > 7 or first.groups != 1:
        raise RequestError(f"student {name!r}: has no small stem: its first layer is no convolution of up to 7 px")
    conv = nn.Conv2d(first.in_channels, first.out_channels, 3, padding=1, bias=first.bias is not None)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    _put(network, path, conv)
    pool = next((path for path, part in network.named_modules() if isinstance(part, nn.MaxPool2d)), None)
    # the first one, unless it lies deep in the network
    if pool is not None and pool.rpartition(".")[2] in ("maxpool", "maxpool1", "pool0"):
        _put(network, pool, nn.Identity())


def _put(network: nn.Module, path: str, part: nn.Module) -> None:
    parent, _, last = path.rpartition(".")
    setattr(network.get_submodule(parent), last, part)


def _whole_torchvision(name: str, **options: Any) -> nn.Module:
    from torchvision import models

    names = models.list_models(module=models)
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
    # these pool or flatten in their classifier, all others before it
    late = name.startswith(("squeezenet", "convnext", "maxvit"))
    setattr(network, last, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()) if late else nn.Identity())
    return network


def _timm(name: str) -> nn.Module:
    return _whole_timm(name, num_classes=0)


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
        try:  # so that a vision transformer takes other sizes than its own
            network: nn.Module = timm.create_model(model, **options, dynamic_img_size=True)
        except TypeError:  # most networks need no such option
            network = timm.create_model(model, **options)
    except Exception as error:  # whatever timm raises
        raise RequestError(f"student {name!r}: timm cannot make it: {type(error).__name__}: {error}") from error
    return network


def _probe(network: Any) -> tuple[int, int]:
    """The size at which the dimension of features is measured."""
    size = getattr(network, "pretrained_cfg", {}).get("input_size", (3, 224, 224))
    return size[1], size[2]
