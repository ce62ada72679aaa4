"""A store that is away is asked again until patience ends; what won't pass is not."""

import asyncio
from collections.abc import Mapping, Sequence

import pytest

from stream.core.records import kv_prefix
from stream.errors import Fenced, StoreError, StoreLocked
from stream.kv.memory import MemoryStore, MemoryWriter
from stream.kv.retrying import PatientKV

KEY = b"uemb:u:i:1"


class Away(MemoryWriter):
    """A store whose next calls fail, before or after their work is done."""

    def __init__(self, failures: Sequence[Exception], *, after: bool) -> None:
        super().__init__(MemoryStore("i", "u", fallback=[1.0]))
        self.failures = list(failures)
        self.after = after
        self.calls = 0

    async def put(self, partition: int, entries: Mapping[bytes, bytes], *, ordered: bool = False) -> int:
        self.calls += 1
        failure = self.failures.pop(0) if self.failures else None
        if failure is not None and not self.after:
            raise failure
        refused = await super().put(partition, entries)
        if failure is not None:
            raise failure
        return refused


@pytest.mark.parametrize("after", [False, True])
def test_a_call_is_repeated_until_it_is_answered(after: bool, caplog: pytest.LogCaptureFixture) -> None:
    store = Away([StoreError("the store does not answer")] * 3, after=after)

    async def run() -> None:
        kv = PatientKV(store, 30)
        await kv.open_partition(0)
        assert await kv.put(0, {KEY: kv_prefix(1, 1)}) == 0
        assert await kv.get(0, [KEY]) == [kv_prefix(1, 1)]
        await kv.close()

    with caplog.at_level("INFO"):
        asyncio.run(run())
    assert store.calls == 4
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]


def test_patience_ends() -> None:
    store = Away([StoreError("the store does not answer")] * 1000, after=False)

    async def run() -> None:
        kv = PatientKV(store, 0.2)
        await kv.open_partition(0)
        with pytest.raises(StoreError, match="does not answer"):
            await kv.put(0, {KEY: kv_prefix(1, 1)})
        await kv.close()

    asyncio.run(run())
    assert 3 <= store.calls <= 10


@pytest.mark.parametrize("failure", [Fenced("a newer owner"), StoreLocked("held"), ValueError("short")])
def test_what_waiting_does_not_mend_is_not_repeated(failure: Exception) -> None:
    store = Away([failure], after=False)

    async def run() -> None:
        kv = PatientKV(store, 30)
        await kv.open_partition(0)
        with pytest.raises(type(failure)):
            await kv.put(0, {KEY: kv_prefix(1, 1)})
        await kv.close()

    asyncio.run(run())
    assert store.calls == 1
