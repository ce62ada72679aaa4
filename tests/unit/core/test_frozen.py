"""What is made fast is what the constructor makes."""

import copy
from dataclasses import FrozenInstanceError, dataclass

import pytest

from stream.core.frozen import maker_of


@dataclass(frozen=True, slots=True)
class Point:
    x: int
    y: str

    def both(self) -> str:
        return f"{self.x}{self.y}"


def test_an_instance_is_one_of_the_class_and_frozen() -> None:
    made = maker_of(Point)(1, "a")
    assert type(made) is Point
    assert made == Point(1, "a")
    assert hash(made) == hash(Point(1, "a"))
    assert repr(made) == repr(Point(1, "a"))
    assert made.both() == "1a"
    assert copy.copy(made) == made
    with pytest.raises(FrozenInstanceError):
        made.x = 2  # type: ignore[misc]
    assert not hasattr(made, "__dict__")


@pytest.mark.parametrize("values", [(), (1,), (1, "a", 2)])
def test_every_field_is_asked_for(values: tuple[object, ...]) -> None:
    with pytest.raises(TypeError):
        maker_of(Point)(*values)
