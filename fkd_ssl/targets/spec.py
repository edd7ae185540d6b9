"""The kind and the shape of a teacher's targets."""

import math
from dataclasses import dataclass

from fkd_ssl.errors import RequestError
from fkd_ssl.targets.distribution import Distribution
from fkd_ssl.targets.embedding import Embedding
from fkd_ssl.targets.kind import Kind, Shape

KINDS: dict[str, Kind] = {kind.name: kind for kind in (Embedding(), Distribution())}
"""The kinds of targets, by name."""
MAX_SIZE = 2**16
"""Numbers in one target."""


@dataclass(frozen=True)
class TargetSpec:
    """What one target is.

    Attributes:
        kind: Of `KINDS`.
        shape: Of one target: [D] of an embedding, [K] of class probabilities.

    Raises:
        RequestError: The kind is unknown, or no target of it has that shape.
    """

    kind: str
    shape: Shape

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise RequestError(f"kind {self.kind!r}: expected {' or '.join(KINDS)}")
        whole = all(type(length) is int and length > 0 for length in self.shape)
        if not whole or not self.shape or math.prod(self.shape) > MAX_SIZE:
            raise RequestError(f"targets of shape {list(self.shape)}: expected positive lengths, at most {MAX_SIZE} numbers")
        self.rules.check_shape(self.shape)

    @property
    def rules(self) -> Kind:
        """What the kind knows of itself."""
        return KINDS[self.kind]

    @property
    def size(self) -> int:
        """Numbers in one target."""
        return math.prod(self.shape)

    def check_codec(self, codec: str, whose: str) -> int:
        """Bytes of one code of `codec` for targets of `whose`; raises RequestError where it is for others."""
        if not self.rules.has_codec(codec):
            raise RequestError(
                f"codec {codec!r}: the targets of {whose} are {self.rules.words}, whose codecs are, for instance, "
                f"{', '.join(self.rules.examples)}"
            )
        return self.rules.code_size(codec, self.shape)

    def __str__(self) -> str:
        return self.rules.describe(self.shape)
