"""Bytes of embedding records: what consumers of the output topic and of the store decode."""

from stream.core.records import CorruptRecord, EmbeddingRecord, decode, encode, kv_entry, to_json

__all__ = ["CorruptRecord", "EmbeddingRecord", "decode", "encode", "kv_entry", "to_json"]
