"""Several classifiers as one teacher: the mean of their class probabilities."""

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fkd_ssl.errors import RequestError
from fkd_ssl.teachers.teacher import Teacher


class Ensemble(Teacher):
    """The mean of several classifiers' probabilities for the same crops.

    As in MEAL V2 (Shen and Savvides, arXiv 2009.08453, section 3) and Fast MEAL V2 in FKD. Each member uses its own mean and
    std. The features are the concatenated features of all members.

    Args:
        members: Teachers with class probabilities of the same classes.

    Raises:
        RequestError: A member gives embeddings, or members differ in their number of classes or native size.
    """

    def __init__(self, members: Sequence[Teacher]) -> None:
        first = members[0].info
        names = " + ".join(member.info.name for member in members)
        for member in members:
            if member.info.spec.kind != "distribution":
                raise RequestError(
                    f"teacher {names}: {member.info.name} gives {member.info.spec.definition.display_name}, and only "
                    "class probabilities can be averaged; separate the teachers by commas for one column each"
                )
            if member.info.spec != first.spec:
                raise RequestError(
                    f"teacher {names}: {first.name} has {first.spec.size} classes, {member.info.name} has "
                    f"{member.info.spec.size}; the teachers of an ensemble must have the same classes"
                )
            if member.info.pixels != first.pixels:
                raise RequestError(
                    f"teacher {names}: {first.name} sees {first.pixels} px and {member.info.name} {member.info.pixels} px; "
                    "store a column of each with --codec full (--teacher A,B), and average them: fkd-ssl recode --column A,B"
                )
        digests = [member.info.checkpoint_sha256 for member in members]
        known = None if None in digests else hashlib.sha256(" ".join(map(str, digests)).encode()).hexdigest()
        alike = all((member.info.mean, member.info.std) == (first.mean, first.std) for member in members)
        super().__init__(
            nn.ModuleList(members),
            nn.Identity(),
            name="-and-".join(member.info.name for member in members),
            shape=first.spec.shape,
            feature_dim=sum(member.feature_dim for member in members),
            network=f"mean probabilities of: {'; '.join(member.info.network for member in members)}",
            pixels=first.pixels,
            mean=first.mean if alike else (0, 0, 0),  # no common normalisation
            std=first.std if alike else (1, 1, 1),
            licence="; ".join(dict.fromkeys(member.info.licence for member in members)),
            source=" + ".join(str(member.info.source) for member in members),
            checkpoint=None if known is None else " + ".join(str(member.info.checkpoint) for member in members),
            checkpoint_sha256=known,
            precision=first.precision,
            kind="distribution",
        )
        self.members = list(members)

    def compile(self, *args: Any, **options: Any) -> None:
        """Compiles each member's network."""
        for member in self.members:
            member.compile(*args, **options)

    @torch.inference_mode()
    def embed(self, images: Tensor) -> Tensor:
        """Mean probabilities float32 [B, K] of crops uint8 [B, 3, H, W]."""
        return torch.stack([member.embed(images) for member in self.members]).mean(dim=0)

    @torch.inference_mode()
    def output(self, images: Tensor) -> Tensor:
        """Logarithms of the mean probabilities [B, K]; their softmax equals the probabilities."""
        return self.embed(images).log()

    @torch.inference_mode()
    def features(self, images: Tensor) -> Tensor:
        """Backbone features of all members float32 [B, F] of uint8 [B, 3, H, W]."""
        return torch.cat([member.features(images) for member in self.members], dim=1)

    def map(self, images: Tensor) -> Tensor:
        """Raises RequestError: members may have different feature maps."""
        raise RequestError(f"teacher {self.info.name}: an ensemble has no feature map")
