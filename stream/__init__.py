"""A stream of user embeddings: Kafka events in, versioned vectors out.

What a program imports that reads vectors, or tests what does:

- `EmbeddingReader`, `AsyncEmbeddingReader`: stored vectors by user id, each a `UserEmbedding`.
- `get_or_build_user_embedding`, `get_or_build_user_embedding_async`: the same, or built from a history.
- `ItemSpace`: one version of the item vectors.
- `UserMatrix`: all users of the embedding topic as a matrix.
- `MemoryStore`: a store for tests.
- `UembError` and what is below it, `CorruptRecord`, `UnknownItemError`: what these raise.

Each name loads what it needs when it is first used: `import stream` alone loads nothing, reading no Kafka client.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from stream.errors import ConfigError, ItemSpaceError, StoreError, UembError, UnknownItemError
    from stream.items import ItemSpace
    from stream.kv.memory import MemoryStore
    from stream.records import CorruptRecord
    from stream.retrieval import (
        AsyncEmbeddingReader,
        EmbeddingReader,
        UserEmbedding,
        UserMatrix,
        get_or_build_user_embedding,
        get_or_build_user_embedding_async,
    )

__all__ = [
    "AsyncEmbeddingReader",
    "ConfigError",
    "CorruptRecord",
    "EmbeddingReader",
    "ItemSpace",
    "ItemSpaceError",
    "MemoryStore",
    "StoreError",
    "UembError",
    "UnknownItemError",
    "UserEmbedding",
    "UserMatrix",
    "get_or_build_user_embedding",
    "get_or_build_user_embedding_async",
]

_HOMES: Final = {
    "stream.errors": ("ConfigError", "ItemSpaceError", "StoreError", "UembError", "UnknownItemError"),
    "stream.items": ("ItemSpace",),
    "stream.kv.memory": ("MemoryStore",),
    "stream.records": ("CorruptRecord",),
    "stream.retrieval": (
        "AsyncEmbeddingReader",
        "EmbeddingReader",
        "UserEmbedding",
        "UserMatrix",
        "get_or_build_user_embedding",
        "get_or_build_user_embedding_async",
    ),
}
_HOME_OF: Final = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    value = getattr(import_module(_HOME_OF[name]), name)
    globals()[name] = value  # the next time it is found without this function
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
