"""The kind and the shape of a teacher's targets."""

import math
from dataclasses import dataclass

from fkd_ssl.errors import RequestError
from fkd_ssl.targets.distribution import Distribution
from fkd_ssl.targets.embedding import Embedding
from fkd_ssl.targets.kind import Kind, Shape
from fkd_ssl.targets.tokens import Tokens

KINDS: dict[str, Kind] = {kind.name: kind for kind in (Embedding(), Distribution(), Tokens())}
"""The kinds of targets, by name."""
MAX_SIZE = 2**20
"""Maximum number of values in one target."""


@dataclass(frozen=True)
class TargetSpec:
    """The kind and shape of one target.

    Attributes:
        kind: A name in `KINDS`.
        shape: Shape of one target: [D] for an embedding, [K] for class probabilities, [h, w, D] for tokens.

    Raises:
        RequestError: The kind is unknown, or the shape is invalid for it.
    """

    kind: str
    shape: Shape

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise RequestError(f"kind {self.kind!r}: expected {' or '.join(KINDS)}")
        whole = all(type(length) is int and length > 0 for length in self.shape)
        if not whole or not self.shape or math.prod(self.shape) > MAX_SIZE:
            raise RequestError(f"targets of shape {list(self.shape)}: expected positive lengths, at most {MAX_SIZE} numbers")
        self.definition.check_shape(self.shape)

    @property
    def definition(self) -> Kind:
        """The `Kind` of this name."""
        return KINDS[self.kind]

    @property
    def size(self) -> int:
        """Number of values in one target."""
        return math.prod(self.shape)

    def check_codec(self, codec: str, whose: str) -> int:
        """Returns the bytes of one code of `codec`. Raises RequestError, naming the teacher `whose`, if it does not fit."""
        if not self.definition.has_codec(codec):
            raise RequestError(
                f"codec {codec}: is not for {self.definition.display_name}, the targets of {whose}; choose, for "
                f"instance, {', '.join(self.definition.example_codecs)}"
            )
        return self.definition.code_size(codec, self.shape)

    def __str__(self) -> str:
        return self.definition.describe(self.shape)
