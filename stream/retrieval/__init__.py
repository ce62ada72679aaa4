"""Reading vectors: readers, blocking and asynchronous, and a matrix that follows the output topic."""

from stream.retrieval.answers import UserEmbedding
from stream.retrieval.async_reader import AsyncEmbeddingReader, get_or_build_user_embedding_async
from stream.retrieval.reader import EmbeddingReader, get_or_build_user_embedding
from stream.retrieval.user_matrix import UserMatrix

__all__ = [
    "AsyncEmbeddingReader",
    "EmbeddingReader",
    "UserEmbedding",
    "UserMatrix",
    "get_or_build_user_embedding",
    "get_or_build_user_embedding_async",
]
