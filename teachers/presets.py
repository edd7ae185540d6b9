"""Published checkpoints, by name. No torch here: `fkd-ssl teachers` lists them."""

from dataclasses import dataclass

_MOCO = "https://dl.fbaipublicfiles.com/moco/moco_checkpoints"
_SWAV = "https://dl.fbaipublicfiles.com/deepcluster"
# facebookresearch/moco was relicensed; its README still names the first licence
_MOCO_LICENCE = "facebookresearch/moco: its README says CC BY-NC 4.0, its source files MIT"
_SWAV_LICENCE = "CC BY-NC 4.0 (facebookresearch/swav): not for commercial use"


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A published checkpoint."""

    family: str
    """Its layout: mocov2 or swav."""
    network: str
    """Its backbone, which the file's shapes are held against."""
    url: str
    """Where its authors publish it."""
    licence: str
    """Of the weights."""
    top1: float
    """ImageNet linear top-1 in percent, as its authors report it."""
    dim: int = 128
    """D of its targets."""
    md5: str | None = None
    """First digits of the file's md5, where the authors give them."""


PRESETS: dict[str, Preset] = {
    "mocov2_r50_800ep": Preset(
        family="mocov2",
        network="resnet50",
        url=f"{_MOCO}/moco_v2_800ep/moco_v2_800ep_pretrain.pth.tar",
        licence=_MOCO_LICENCE,
        top1=71.1,
        md5="a04e12f8",
    ),
    "mocov2_r50_200ep": Preset(
        family="mocov2",
        network="resnet50",
        url=f"{_MOCO}/moco_v2_200ep/moco_v2_200ep_pretrain.pth.tar",
        licence=_MOCO_LICENCE,
        top1=67.7,
        md5="59fd9945",
    ),
    "swav_r50_800ep": Preset(
        family="swav",
        network="resnet50",
        url=f"{_SWAV}/swav_800ep_pretrain.pth.tar",
        licence=_SWAV_LICENCE,
        top1=75.3,
    ),
    "swav_r50w2_400ep": Preset(
        family="swav",
        network="resnet50w2",
        url=f"{_SWAV}/swav_RN50w2_400ep_pretrain.pth.tar",
        licence=_SWAV_LICENCE,
        top1=77.3,
    ),
    "swav_r50w4_400ep": Preset(
        family="swav",
        network="resnet50w4",
        url=f"{_SWAV}/swav_RN50w4_400ep_pretrain.pth.tar",
        licence=_SWAV_LICENCE,
        top1=77.9,
    ),
    "swav_r50w5_400ep": Preset(
        family="swav",
        network="resnet50w5",
        url=f"{_SWAV}/swav_RN50w5_400ep_pretrain.pth.tar",
        licence=_SWAV_LICENCE,
        top1=78.5,
    ),
}
"""From the tables of the authors' repositories, facebookresearch/moco and facebookresearch/swav."""
