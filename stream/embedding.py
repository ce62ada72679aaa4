"""The seed's formulas, one user at a time; every faster path in `stream.core` equals them."""

from stream.core.formulas import (
    build_user_embedding,
    fallback_user_embedding,
    l2_normalize,
    make_user_features,
    safe_take_item_emb,
    user_embed_avg,
    user_embed_learned,
    user_embed_mix,
)

__all__ = [
    "build_user_embedding",
    "fallback_user_embedding",
    "l2_normalize",
    "make_user_features",
    "safe_take_item_emb",
    "user_embed_avg",
    "user_embed_learned",
    "user_embed_mix",
]
