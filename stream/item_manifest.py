"""``manifest.json`` of an item space: what a version is, and the hashes of its files."""

from typing import Annotated, Final, Literal

import msgspec

UNIT_TOLERANCE: Final = 1e-4

Metric = Literal["cosine", "dot"]


class Manifest(msgspec.Struct):
    """``manifest.json``."""

    format: Literal[1]
    version: str
    dim: Annotated[int, msgspec.Meta(ge=1)]
    count: Annotated[int, msgspec.Meta(ge=1)]
    dtype: Literal["float32"]
    metric: Metric
    max_row_norm: Annotated[float, msgspec.Meta(gt=0)]
    fallback: list[float]
    sha256: dict[str, str]
