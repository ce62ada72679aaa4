"""Bodies in Protobuf as documents like those of JSON. It needs the extra ``registry``; nothing else imports this."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, NamedTuple

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import DecodeError, Message

from stream.core.framing import Moment, NotOfSchema

_NANOS_PER_MS: Final = 1_000_000
#: Messages that stand for one value.
_WRAPPERS: Final = frozenset(
    f"google.protobuf.{name}Value"
    for name in ("Double", "Float", "Int64", "UInt64", "Int32", "UInt32", "Bool", "String", "Bytes")
)
_TIMESTAMP: Final = "google.protobuf.Timestamp"
#: A varint of a message's place in its file has fewer bytes.
_MAX_SHIFT: Final = 28
_MAX_DEPTH: Final = 32


class ProtobufReader:
    """Reads bodies in Protobuf; each begins with the place of its message in the schema's file.

    Args:
        files: serialized ``FileDescriptorProto`` of all that the schema imports, each after those that it needs itself,
            and of the schema last.

    Raises:
        NotOfSchema: they are none.
    """

    def __init__(self, files: Sequence[bytes]) -> None:
        pool = descriptor_pool.DescriptorPool()
        name = ""
        try:
            for data in files:
                file = descriptor_pb2.FileDescriptorProto.FromString(data)
                pool.Add(file)
                name = file.name
            self._file = pool.FindFileByName(name)
        except Exception as exc:  # TypeError, KeyError, DecodeError: what is wrong with it is the library's secret
            msg = f"its Protobuf schema can't be used ({type(exc).__name__})"
            raise NotOfSchema(msg) from exc
        self._messages: dict[bytes, tuple[type[Message], _Fields]] = {}

    def __call__(self, body: bytes) -> Any:
        """See `ReadBody`.

        Raises:
            NotOfSchema: the body is not of the schema.
        """
        end = _end_of_indexes(body)
        place = body[:end]
        known = self._messages.get(place)
        if known is None:
            descriptor = self._descriptor(place)
            known = self._messages[place] = message_factory.GetMessageClass(descriptor), _Fields(descriptor)
        kind, fields = known
        try:
            return _Document(kind.FromString(body[end:]), fields)
        except DecodeError as exc:
            msg = "the body is not of its Protobuf schema"
            raise NotOfSchema(msg) from exc

    def _descriptor(self, indexes: bytes) -> Descriptor:
        """The message that the place stands for: a place in the file, then in that message, and so on."""
        places = list(_varints(indexes))[1:] or [0]
        among: Sequence[Descriptor] = list(self._file.message_types_by_name.values())
        found: Descriptor | None = None
        for place in places:
            if not 0 <= place < len(among):
                msg = "its Protobuf schema has no message where the body says it is"
                raise NotOfSchema(msg)
            found = among[place]
            among = found.nested_types
        assert found is not None  # noqa: S101 - there is at least one place
        return found


def _varints(data: bytes) -> Iterable[int]:
    """Zigzag varints, which are whole."""
    value = shift = 0
    for byte in data:
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            yield (value >> 1) ^ -(value & 1)
            value = shift = 0


def _end_of_indexes(body: bytes) -> int:
    """Where the message begins: behind a count of places, and the places; no count stands for the first message."""
    if body.startswith(b"\0"):
        return 1
    left, at, value, shift = 1, 0, 0, 0
    is_count = True
    while left:
        if at >= len(body) or shift > _MAX_SHIFT:
            msg = "the body does not say of which message of its Protobuf schema it is"
            raise NotOfSchema(msg)
        byte = body[at]
        at += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            left -= 1
            if is_count:
                left, is_count = (value >> 1) ^ -(value & 1), False
                if not 0 < left <= _MAX_DEPTH:
                    msg = "the body does not say of which message of its Protobuf schema it is"
                    raise NotOfSchema(msg)
            value = shift = 0
    return at


class _Field(NamedTuple):
    """How a field of a message is read: whether it may be absent, and what makes a value of what it holds."""

    may_be_absent: bool
    read: Callable[[Any], Any]


class _Fields:
    """The fields of one message by name, each looked up once."""

    def __init__(self, message: Descriptor) -> None:
        self._message = message
        self._fields: dict[str, _Field] = {}

    def __getitem__(self, name: str) -> _Field:
        found = self._fields.get(name)
        if found is None:
            field = self._message.fields_by_name[name]
            found = self._fields[name] = _Field(field.has_presence, _reader_of(field))
        return found


class _Document(dict[str, Any]):
    """A message as a dict of its fields, each made when it is first asked for: events have more than we read."""

    __slots__ = ("_fields", "_message")

    def __init__(self, message: Message, fields: _Fields) -> None:
        super().__init__()
        self._message = message
        self._fields = fields

    def __missing__(self, name: str) -> Any:
        field = self._fields[name]
        if field.may_be_absent and not self._message.HasField(name):
            raise KeyError(name)
        found = self[name] = field.read(getattr(self._message, name))
        return found


def _reader_of(field: FieldDescriptor) -> Callable[[Any], Any]:
    """What makes of a field's value what JSON would have: maps are objects, and other repeated fields arrays."""
    if not field.is_repeated:
        return _reader_of_one(field)
    entry = field.message_type
    if entry is None or not entry.GetOptions().map_entry:
        of_one = _reader_of_one(field)
        return lambda values: [of_one(value) for value in values]
    of_value = _reader_of_one(entry.fields_by_name["value"])
    return lambda pairs: {str(key): of_value(pairs[key]) for key in pairs}


def _reader_of_one(field: FieldDescriptor) -> Callable[[Any], Any]:
    if field.type == FieldDescriptor.TYPE_ENUM:
        names = {number: value.name for number, value in field.enum_type.values_by_number.items()}
        return lambda number: names.get(number, number)
    message = field.message_type
    if message is None:
        return lambda value: value
    if message.full_name == _TIMESTAMP:
        return lambda at: Moment(at.seconds * 1_000 + at.nanos // _NANOS_PER_MS)
    if message.full_name in _WRAPPERS:
        return lambda wrapper: wrapper.value
    fields = _Fields(message)
    return lambda value: _Document(value, fields)
