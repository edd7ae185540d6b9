"""Published checkpoints by name. This module does not import torch, so that `fkd-ssl teachers` is fast."""

from dataclasses import dataclass

from fkd_ssl.targets.info import IMAGENET_MEAN, IMAGENET_STD, Rgb

SWAV_STD: Rgb = (0.228, 0.224, 0.225)

_MOCO = "https://dl.fbaipublicfiles.com/moco/moco_checkpoints"
_SWAV = "https://dl.fbaipublicfiles.com/deepcluster"
# facebookresearch/moco was relicensed; its README still names the first licence
_MOCO_LICENCE = "facebookresearch/moco: its README says CC BY-NC 4.0, its source files MIT"
_SWAV_LICENCE = "CC BY-NC 4.0 (facebookresearch/swav): not for commercial use"
_MOCO_HEAD = "MLP 2048-2048-128"
_SWAV_HEAD = "MLP with BatchNorm to 128, 3000 prototypes"  # the hidden width is read from the file


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A published checkpoint."""

    family: str
    """Layout of the file: mocov2 or swav."""
    network: str
    """Backbone; the shapes in the file must match it."""
    head: str
    """Description of the projection head."""
    url: str
    """URL of the authors' file."""
    source: str
    """Repository and paper."""
    licence: str
    """Licence of the weights."""
    top1: float
    """ImageNet linear top-1 in percent, as its authors report it."""
    dim: int = 128
    """D of the targets."""
    prototypes: int = 0
    """K, number of prototypes that the file must have."""
    pixels: int = 224
    """Side of the crops that it was trained on."""
    mean: Rgb = IMAGENET_MEAN
    """Mean of the normalisation, for RGB in 0 to 1."""
    std: Rgb = IMAGENET_STD
    """Standard deviation of the normalisation."""
    size: int | None = None
    """Size of the file in bytes, if known."""
    md5: str | None = None
    """First digits of the file's md5, if the authors give them."""

    @property
    def file(self) -> str:
        """The name of the file in the URL and in the cache folder."""
        return self.url.rpartition("/")[2]


def _moco(epochs: int, top1: float, md5: str) -> Preset:
    return Preset(
        family="mocov2",
        network="resnet50",
        head=_MOCO_HEAD,
        url=f"{_MOCO}/moco_v2_{epochs}ep/moco_v2_{epochs}ep_pretrain.pth.tar",
        source="facebookresearch/moco, arXiv 2003.04297",
        licence=_MOCO_LICENCE,
        top1=top1,
        md5=md5,
    )


def _swav(network: str, file: str, top1: float, head: str = _SWAV_HEAD) -> Preset:
    return Preset(
        family="swav",
        network=network,
        head=head,
        url=f"{_SWAV}/{file}_pretrain.pth.tar",
        source="facebookresearch/swav, arXiv 2006.09882",
        licence=_SWAV_LICENCE,
        top1=top1,
        prototypes=3000,
        std=SWAV_STD,
    )


PRESETS: dict[str, Preset] = {
    "mocov2_r50_800ep": _moco(800, 71.1, "a04e12f8"),
    "mocov2_r50_200ep": _moco(200, 67.7, "59fd9945"),
    "swav_r50_800ep": _swav("resnet50", "swav_800ep", 75.3),
    "swav_r50w2_400ep": _swav("resnet50w2", "swav_RN50w2_400ep", 77.3),
    "swav_r50w4_400ep": _swav("resnet50w4", "swav_RN50w4_400ep", 77.9),
    "swav_r50w5_400ep": _swav("resnet50w5", "swav_RN50w5_400ep", 78.5, "MLP without BatchNorm to 128, 3000 prototypes"),
}
"""From the tables of the authors' repositories, facebookresearch/moco and facebookresearch/swav."""
