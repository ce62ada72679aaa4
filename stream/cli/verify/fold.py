"""One partition's topics folded into a temporary table, record by record, with the pure core."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Final

from confluent_kafka import Message

from stream.cli.verify.rules import Evidence, Logged, Published, output_order
from stream.config import Settings
from stream.core.events import DeletionDecoder, EventDecoder, Reason, Reject
from stream.core.history import History, joined
from stream.core.history_codec import TS_BYTES, HistoryCodec, stored_order
from stream.core.records import kv_prefix
from stream.kafka.dead_letters import Letter
from stream.kafka.log_reader import unreadable
from stream.kafka.schema_registry import SchemaRegistry
from stream.keys import CLAIM_KEY, partition_of, user_cache_key
from stream.kv.rocksdb.scratch import Scratch
from stream.worker.claims import later_claim

# First byte of a key: what the input adds up to, what the changelog does, the output's last record, rejects, letters,
# records that by their letters no worker has read.
_INPUT, _LOG, _OUTPUT, _REJECT, _LETTER, _UNREAD = b"f", b"c", b"o", b"r", b"d", b"u"
_OFFSET_BYTES: Final = 8
_ORDER_BYTES: Final = 16
#: Reasons that lay outside of the record: it may be one that can be read now.
_NOT_READ: Final = (Reason.EXPANDS_BEYOND_LIMIT, Reason.UNKNOWN_SCHEMA)
_NO_EVENT: Final = b"\xff" * TS_BYTES
Place = tuple[str, int]


class PartitionFold:
    """What the topics of one partition say of its users.

    Args:
        settings: topics, rules and history length.
        versions: user and item version of the keys that are looked at.
        partition: number of the partition.
        partitions: how many there are.
        scratch: an empty table.
        registry: has the schemas of framed values; None without one.

    Attributes:
        claim: the newest claim of the changelog, None without one.
        other_versions: output records of other versions' keys.
    """

    def __init__(
        self,
        settings: Settings,
        versions: tuple[str, str],
        partition: int,
        partitions: int,
        scratch: Scratch,
        registry: SchemaRegistry | None = None,
    ) -> None:
        self._settings = settings
        self._partition = partition
        self._partitions = partitions
        self._scratch = scratch
        self._inputs = (*settings.event_topics, settings.deletion_topic)
        # what precedes a history of the input: the user's next offset in each topic, the time of the oldest event
        self._input_bytes = _OFFSET_BYTES * len(self._inputs) + TS_BYTES
        self._registry = registry
        schemas = None if registry is None else registry.schemas
        self._events = EventDecoder(settings.rules, schemas)
        self._deletions = DeletionDecoder(schemas)
        self._codec = HistoryCodec(settings.event_types)
        self._key_prefix = user_cache_key("", versions[1], versions[0]).encode()
        self._any_unread = False
        self.claim: bytes | None = None
        self.other_versions = 0

    def cache_key(self, user: bytes) -> bytes:
        """Key of a user on the output topic and in the store."""
        return self._key_prefix + user

    def add(self, messages: Iterable[Message]) -> None:
        """Fold records, each topic's in its order."""
        by_topic: dict[str, list[Message]] = defaultdict(list)
        for message in messages:
            by_topic[message.topic()].append(message)
        for topic, some in by_topic.items():
            if topic == self._settings.changelog_topic:
                self._add_log(some)
            elif topic == self._settings.output_topic:
                self._add_output(some)
            elif topic == self._settings.dlq_topic:
                self._add_letters(some)
            else:
                self._add_input(topic, some)

    def unreadable(self, topic: str, partition: int, offset: int) -> None:
        """Take note of a record in a batch that expands too far to be looked at.

        Raises:
            DeliveryError: it is on a topic that workers alone write to.
        """
        if topic not in self._inputs:
            raise unreadable(topic, f"a batch of partition {partition} can't be expanded")
        place = _REJECT + _place(self._inputs.index(topic), offset)
        self._scratch.put({place: Reason.EXPANDS_BEYOND_LIMIT.encode()})

    # -- records in -----------------------------------------------------------------------------------------------

    def _add_input(self, topic: str, messages: Sequence[Message]) -> None:
        index = self._inputs.index(topic)
        entries: dict[bytes, bytes] = {}
        users: dict[bytes, tuple[int, list[bytes | int]]] = {}  # next offset, what to do
        if self._registry is not None:
            self._registry.load(self._registry.missing(message.value() for message in messages))
        unread = self._unread(index, messages)
        for message in messages:
            key = message.key()
            what = unread.get(message.offset()) or self._decode(topic, message)
            if isinstance(what, Reject):
                entries[_REJECT + _place(index, message.offset())] = what.reason.encode()
            elif what is not None:
                todo = [*what] if isinstance(what, tuple) else [what]
                users[key] = (message.offset() + 1, [*users.get(key, (0, []))[1], *todo])
        keys = [_INPUT + user for user in users]
        limit, size = self._settings.history_limit, self._input_bytes
        for key, held, (offset, todo) in zip(keys, self._scratch.get(keys), users.values(), strict=True):
            if held is None:
                held, history = bytes(size - TS_BYTES) + _NO_EVENT, History(self._codec, limit)
            else:
                history = History.decode(held[size:], self._codec, limit)
            for what in todo:
                if isinstance(what, bytes):
                    history.add(what)
                else:
                    history.erase(what)
            offsets = bytearray(held[: size - TS_BYTES])
            offsets[index * _OFFSET_BYTES : (index + 1) * _OFFSET_BYTES] = offset.to_bytes(_OFFSET_BYTES, "big")
            oldest = min(
                held[size - TS_BYTES : size], *(what[:TS_BYTES] for what in todo if isinstance(what, bytes)), _NO_EVENT
            )
            entries[key] = bytes(offsets) + oldest + history.encode(0)
        self._scratch.put(entries)

    def _unread(self, index: int, messages: Sequence[Message]) -> dict[int, Reject]:
        """Records that their letters say were not read, whatever is in them; by offset."""
        if not self._any_unread:
            return {}
        offsets = [message.offset() for message in messages]
        found = self._scratch.get([_UNREAD + _place(index, offset) for offset in offsets])
        return {
            offset: Reject(Reason(letter.decode()), "its letter says so")
            for offset, letter in zip(offsets, found, strict=True)
            if letter is not None
        }

    def _decode(self, topic: str, message: Message) -> bytes | tuple[bytes, ...] | int | Reject | None:
        key, value, ts = message.key(), message.value(), message.timestamp()[1]
        what: bytes | tuple[bytes, ...] | int | Reject | None
        if topic == self._settings.deletion_topic:
            what = self._deletions.decode(key, value, ts)
        else:
            what = self._events.decode(topic, key, value, ts)
        if key is not None and not isinstance(what, Reject) and partition_of(key, self._partitions) != self._partition:
            return Reject(Reason.WRONG_PARTITION, "the key's murmur2 partition is another one")
        return what

    def _add_log(self, messages: Sequence[Message]) -> None:
        states: dict[bytes, list[bytes | None]] = defaultdict(list)
        for message in messages:
            key, value = message.key(), message.value()
            if key == CLAIM_KEY and value is not None:
                self.claim = later_claim(self.claim, value)
            elif key is not None:
                states[_LOG + key].append(value)
        entries: dict[bytes, bytes] = {}
        ended = []
        for key, held in zip(states, self._scratch.get(list(states)), strict=True):
            state = held[2 * _ORDER_BYTES :] if held else None
            newest = held[_ORDER_BYTES : 2 * _ORDER_BYTES] if held else b""
            last = b""
            for value in states[key]:
                if value is None:
                    state, newest = None, b""
                    continue
                state = joined(state, value, self._codec, self._settings.history_limit)
                last = kv_prefix(*stored_order(value))
                newest = max(newest, last)
            if state is None:
                ended.append(key)
            else:
                entries[key] = last + newest + state
        self._scratch.put(entries)
        self._scratch.delete(ended)

    def _add_output(self, messages: Sequence[Message]) -> None:
        records: dict[bytes, list[bytes | None]] = defaultdict(list)
        for message in messages:
            key = message.key() or b""
            if key.startswith(self._key_prefix):
                records[_OUTPUT + key.removeprefix(self._key_prefix)].append(message.value())
            else:
                self.other_versions += 1
        json_output = self._settings.output_format == "json"
        entries = {}
        for key, held in zip(records, self._scratch.get(list(records)), strict=True):
            newest = held[:_ORDER_BYTES] if held else kv_prefix(0, 0)
            for value in records[key]:
                if value is not None and (order := output_order(value, json_output=json_output)):
                    newest = max(newest, kv_prefix(*order))
            last = records[key][-1]
            entries[key] = newest + (b"\0" if last is None else b"\1" + last)
        self._scratch.put(entries)

    def _add_letters(self, messages: Sequence[Message]) -> None:
        entries = {}
        for message in messages:
            letter = Letter.of(message)
            source = letter.source
            if source is not None and source.topic in self._inputs and source.partition == self._partition:
                place = _place(self._inputs.index(source.topic), source.offset)
                entries[_LETTER + place] = b""
                if letter.reason in _NOT_READ:
                    entries[_UNREAD + place] = letter.reason.encode()
                    self._any_unread = True
        self._scratch.put(entries)

    # -- what they add up to --------------------------------------------------------------------------------------

    def users(self) -> Iterator[bytes]:
        """All users that any of the topics knows, but for those of whom only a tombstone tells that they moved away."""
        for user, _ in self._scratch.under(_INPUT):
            yield user
        for prefix, others in ((_LOG, [_INPUT]), (_OUTPUT, [_INPUT, _LOG])):
            for user, held in self._scratch.under(prefix):
                if all(found is None for found in self._scratch.get([other + user for other in others])):
                    gone = prefix == _OUTPUT and held[_ORDER_BYTES] == 0
                    if not gone or partition_of(user, self._partitions) == self._partition:
                        yield user

    def found(self, users: Sequence[bytes]) -> list[Evidence]:
        """What is known of `users`, but for the store."""
        get, limit, size = self._scratch.get, self._settings.history_limit, self._input_bytes
        out = []
        for held, logged, published in zip(
            *(get([prefix + user for user in users]) for prefix in (_INPUT, _LOG, _OUTPUT)), strict=True
        ):
            out.append(
                Evidence(
                    None if held is None else History.decode(held[size:], self._codec, limit),
                    None if logged is None else self._logged(logged),
                    Published() if published is None else _published(published),
                    None,
                    None if held is None else _oldest_ms(held[size - TS_BYTES : size]),
                )
            )
        return out

    def _logged(self, held: bytes) -> Logged:
        state = History.decode(held[2 * _ORDER_BYTES :], self._codec, self._settings.history_limit)
        return Logged(state, _order(held[_ORDER_BYTES:]), _order(held))

    def is_busy(self, user: bytes, committed: Mapping[str, int]) -> bool:
        """Whether the user has input at or above the committed offsets, by topic."""
        (held,) = self._scratch.get([_INPUT + user])
        if held is None:
            return False
        ends = (held[n * _OFFSET_BYTES : (n + 1) * _OFFSET_BYTES] for n in range(len(self._inputs)))
        return any(
            int.from_bytes(end, "big") > committed.get(topic, 0) for topic, end in zip(self._inputs, ends, strict=True)
        )

    def letterless(self, committed: Mapping[str, int], wrong: Callable[[str, int, str], None]) -> int:
        """Call `wrong` with topic, offset and reason of each committed reject without a letter; return the rejects."""
        count = 0
        for place, reason in self._scratch.under(_REJECT):
            topic, offset = self._inputs[place[0]], int.from_bytes(place[1:], "big")
            if offset < committed.get(topic, 0):
                count += 1
                if self._scratch.get([_LETTER + place]) == [None]:
                    wrong(topic, offset, reason.decode())
        return count


def _place(index: int, offset: int) -> bytes:
    return bytes([index]) + offset.to_bytes(_OFFSET_BYTES, "big")


def _order(data: bytes) -> tuple[int, int]:
    half = _ORDER_BYTES // 2
    return int.from_bytes(data[:half], "big"), int.from_bytes(data[half:_ORDER_BYTES], "big")


def _oldest_ms(data: bytes) -> int | None:
    return None if data == _NO_EVENT else int.from_bytes(data, "big")


def _published(held: bytes) -> Published:
    live = held[_ORDER_BYTES] == 1
    return Published(held[_ORDER_BYTES + 1 :] if live else None, _order(held))
