"""Item spaces: folders of ids and vectors, how they come and go."""

from stream.items.space import ItemSpace

__all__ = ["ItemSpace"]
