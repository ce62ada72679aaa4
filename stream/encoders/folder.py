"""A learned encoder's folder: written whole or not at all, read back, checked.

``encoder.json`` (contract version, features, type weights, the item version that it was learned from, the model's hash)
and ``model.onnx``. Folders are immutable, like those of item spaces.
"""

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import msgspec
import numpy as np

from stream.core.encoders import MadeFor
from stream.core.formulas import Float64, l2_normalize
from stream.core.learned_encoder import SEED_FEATURES, LearnedEncoder
from stream.encoders.onnx_model import OnnxModel
from stream.errors import EncoderError
from stream.security.regular_files import read_regular

MANIFEST: Final = "encoder.json"
MODEL: Final = "model.onnx"
#: Beyond any model that answers within an event's time.
MAX_MODEL_BYTES: Final = 256 << 20
_MAX_MANIFEST_BYTES: Final = 1 << 20
_PROBES: Final = 8
#: Furthest that a direction may be from the one that the model says of the same history in a batch of others.
_ALONE_TOLERANCE: Final = 1e-5

Sha256 = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{64}\Z")]


class Manifest(msgspec.Struct, omit_defaults=True):
    """``encoder.json``.

    Attributes:
        contract: of this file, and of what the model is given and must say.
        features: what the model is given, see `LearnedEncoder`.
        item_version: name of the item version that it was learned from.
        items_sha256: hash of that.
        dim: its dimension d.
        model_sha256: hash of ``model.onnx``.
        type_weights: factor per type in its means.
        about: how it came to be; decides nothing.
    """

    contract: Literal[1]
    features: Annotated[list[str], msgspec.Meta(min_length=1, max_length=64)]
    item_version: str
    items_sha256: Sha256
    dim: Annotated[int, msgspec.Meta(ge=1)]
    model_sha256: Sha256
    type_weights: dict[str, float] = {}
    about: dict[str, Any] = {}


def bad_encoder(folder: Path, text: str) -> EncoderError:
    """An error about a folder."""
    return EncoderError(f"encoder {folder}: {text}")


def read_manifest(folder: Path) -> Manifest:
    """What a folder says of itself.

    Raises:
        EncoderError: there is no such folder, or it is none of an encoder.
    """
    data = _read(folder / MANIFEST, _MAX_MANIFEST_BYTES)
    try:
        return msgspec.json.decode(data, type=Manifest)
    except (ValueError, msgspec.MsgspecError, RecursionError) as exc:
        text = f"{MANIFEST} is not a manifest of this format; make it with `uemb encoder train`"
        raise bad_encoder(folder, text) from exc


def open_encoder(folder: Path) -> LearnedEncoder:
    """The encoder of a folder; its model is loaded, and compared with its hash, when it is first asked.

    Raises:
        EncoderError: the manifest is missing, damaged, or names features that this release doesn't know.
    """
    manifest = read_manifest(folder)

    def model() -> bytes:
        data = _read(folder / MODEL, MAX_MODEL_BYTES)
        if sha256(data).hexdigest() != manifest.model_sha256:
            text = f"{MODEL} is not the file its manifest describes (sha256 differs); publish it again"
            raise bad_encoder(folder, text)
        return data

    try:
        return LearnedEncoder(
            OnnxModel(model, str(folder)),
            manifest.model_sha256,
            MadeFor(manifest.item_version, manifest.items_sha256, manifest.dim),
            tuple(manifest.features),
            manifest.type_weights,
        )
    except ValueError as exc:
        raise bad_encoder(folder, str(exc)) from exc


def load_encoder(folder: Path) -> LearnedEncoder:
    """The encoder of a folder, its model loaded and tried: it takes these features, and says directions.

    Raises:
        EncoderError: in one line, what is wrong.
    """
    encoder = open_encoder(folder)
    width = len(encoder.features) * encoder.made_for.dim
    probes = l2_normalize(np.random.default_rng(0).normal(size=(_PROBES, len(encoder.features), encoder.made_for.dim)))
    features = probes.reshape(_PROBES, width)
    if isinstance(encoder.model, OnnxModel):
        encoder.model.load()
    together = _tried(encoder, features, folder)
    alone = np.concatenate([_tried(encoder, row[None], folder) for row in features])
    if np.abs(l2_normalize(together) - l2_normalize(alone)).max() > _ALONE_TOLERANCE:
        raise bad_encoder(folder, "what the model says of a history depends on the others in the batch; make it not")
    return encoder


def save_encoder(
    folder: Path,
    model: bytes,
    made_for: MadeFor,
    *,
    features: Sequence[str] = SEED_FEATURES,
    type_weights: Mapping[str, float] | None = None,
    about: Mapping[str, Any] | None = None,
) -> LearnedEncoder:
    """Write a folder as a whole or not at all, and return the encoder, loaded and tried.

    Args:
        folder: to make; it must not exist.
        model: in ONNX.
        made_for: the item version that it was learned from.
        features: what it is given.
        type_weights: factor per type in its means.
        about: what else to say of it, for people.

    Raises:
        EncoderError: the folder exists, can't be written, or is no encoder.
    """
    if folder.exists():
        raise bad_encoder(folder, "exists already; choose a new folder")
    manifest = Manifest(
        contract=1,
        features=list(features),
        item_version=made_for.version,
        items_sha256=made_for.sha256,
        dim=made_for.dim,
        model_sha256=sha256(model).hexdigest(),
        type_weights=dict(type_weights or {}),
        about=dict(about or {}),
    )
    staging = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        (staging / MODEL).write_bytes(model)
        (staging / MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(manifest)) + b"\n")
        load_encoder(staging)
        staging.chmod(0o755)
        staging.rename(folder)
    except OSError as exc:
        raise bad_encoder(folder, f"can't be written ({exc.strerror or exc})") from exc
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)
    return load_encoder(folder)


def _tried(encoder: LearnedEncoder, features: Float64, folder: Path) -> Float64:
    try:
        said = encoder.model(features)
    except EncoderError:
        raise
    except Exception as exc:
        first = str(exc).splitlines()[0][:200] if str(exc) else type(exc).__name__
        raise bad_encoder(folder, f"the model fails on {len(encoder.features)}·d features ({first})") from exc
    if said.shape != (len(features), encoder.made_for.dim):
        wanted = f"[{len(features)}, {encoder.made_for.dim}]"
        raise bad_encoder(folder, f"the model must say {wanted} of {len(features)} histories, it says {said.shape}")
    if not np.isfinite(said).all():
        raise bad_encoder(folder, "the model says no finite numbers of ordinary histories")
    return np.asarray(said, dtype=np.float64)


def _read(path: Path, limit: int) -> bytes:
    folder = path.parent
    try:
        return read_regular(path, limit)
    except OSError as exc:
        raise bad_encoder(folder, f"{path.name} can't be read ({exc.strerror})") from exc
