"""A reader's deadline: an answer and a true reason whatever the store does; nobody crowds a store that is down."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from kv_entries import eventually
from reader_store import PARTITIONS, Clock, FakeStore, Gate, check_fallback, key, record, stored

from stream.errors import StoreError, StorePartlyDown
from stream.keys import partition_of
from stream.kv import outages
from stream.kv.lookups import STORE_DOWN, TIMEOUT, BoundedLookups
from stream.kv.outages import Outages
from stream.retrieval.answers import UserEmbedding
from stream.retrieval.reader import EmbeddingReader

ROOT = Path(__file__).resolve().parents[3]
LOOKUP = [(b"7", key("7"))]


# -- what counts as down


def test_a_part_that_failed_is_closed_for_a_second_then_one_is_let_through() -> None:
    clock = Clock()
    down = Outages(clock)
    assert not down
    assert down.admits("p")
    down.failed("p")
    assert down
    clock.now += 0.99
    assert not down.admits("p")
    assert down.admits("q"), "the others are not down"
    clock.now += 0.02
    assert [down.admits("p") for _ in range(4)] == [True, False, False, False]
    clock.now += 0.5
    assert not down.admits("p"), "the first has not found out yet"
    clock.now += 0.51
    assert [down.admits("p") for _ in range(2)] == [True, False], "it never came back, so another one tries"
    down.answered("p")
    assert not down
    assert [down.admits("p") for _ in range(2)] == [True, True]


def test_a_failed_attempt_begins_a_second_of_its_own() -> None:
    clock = Clock()
    down = Outages(clock)
    down.failed("p")
    clock.now += 1.1
    assert down.admits("p")
    clock.now += 0.4
    down.failed("p")
    clock.now += 0.9
    assert not down.admits("p")
    clock.now += 0.2
    assert down.admits("p")


def test_of_many_threads_one_is_let_through() -> None:
    clock = Clock()
    down = Outages(clock)
    down.failed("p")
    clock.now += 1.1
    start = threading.Barrier(8)
    let: list[bool] = []

    def ask() -> None:
        start.wait()
        let.append(down.admits("p"))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(let) == [False] * 7 + [True]


# -- readers of a store that fails


def start_one_by_one(callers: list[threading.Thread], gate: Gate, reader: EmbeddingReader) -> None:
    """Start callers of a store that is held: the first four occupy the threads that read, the others queue in order."""
    for number, caller in enumerate(callers):
        caller.start()
        state = (min(number + 1, 4), max(number - 3, 0))
        eventually(lambda s=state: (gate.held, reader._state.bounded._jobs.qsize()) == s)  # type: ignore[misc]


def ask_together(reader: EmbeddingReader, users: list[int]) -> list[str]:
    """The reasons that as many threads are given."""
    reasons = [""] * len(users)

    def ask(place: int) -> None:
        reasons[place] = reader.get(users[place]).reason

    threads = [threading.Thread(target=ask, args=(place,)) for place in range(len(users))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return reasons


def test_after_the_second_one_call_tries_and_the_others_do_not_wait_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outages, "DOWN_S", 60.0)
    fake, gate = FakeStore(), Gate()
    with EmbeddingReader(lambda: fake, timeout_s=0.05) as reader:
        fake.before = gate
        check_fallback(reader.get(7), "timeout")
        assert reader._state.bounded._outages._until
        for part in reader._state.bounded._outages._until:  # the second is over
            reader._state.bounded._outages._until[part] = 0.0
        reasons = ask_together(reader, [7, 7, 8, 9, 7, 8, 9, 7])
        assert sorted(reasons) == ["store_down"] * 7 + ["timeout"]
        assert gate.held == 2
        gate.open.set()
        eventually(lambda: fake.calls == 2)


def test_reads_that_nobody_waits_for_any_more_are_not_made_and_prove_nothing() -> None:
    fake, gate = FakeStore(), Gate()
    with EmbeddingReader(lambda: fake, timeout_s=0.05) as reader:
        fake.before = gate
        # More than there are threads for them: the last ones are given up before anyone has looked at them.
        reasons = ask_together(reader, list(range(8)))
        assert set(reasons) <= {"timeout", "store_down"}
        time.sleep(0.3)  # longer than what counts as soon after
        gate.open.set()
        eventually(lambda: reader._state.bounded._jobs.empty())
        time.sleep(0.05)
        check_fallback(reader.get(7), "store_down")
        assert fake.calls <= 4


def test_an_error_that_comes_soon_after_the_deadline_is_no_answer() -> None:
    fake = FakeStore()
    with EmbeddingReader(lambda: fake, timeout_s=0.05) as reader:
        fake.delay_s, fake.broken = 0.1, set(range(PARTITIONS))
        check_fallback(reader.get(7), "timeout")
        fake.delay_s = 0.0
        time.sleep(0.2)
        check_fallback(reader.get(7), "store_down")
        assert fake.calls == 1, "answered at once"


def test_of_a_store_of_which_a_server_hung_the_others_are_asked_again_once_it_is_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(outages, "DOWN_S", 3600.0)  # so that it is not the second's end that helps
    fake, lookups = FakeStore(), BoundedLookups(0.05)
    fake.entries[key("7")] = stored(record("7"))

    def hang() -> None:
        fake.before = lambda: None
        time.sleep(0.4)  # longer than what counts as soon after
        raise StorePartlyDown("told so", [None], frozenset({0}))

    fake.before = hang
    assert lookups.find(fake, LOOKUP, PARTITIONS) == [TIMEOUT]
    assert lookups.find(fake, LOOKUP, PARTITIONS) == [STORE_DOWN]
    eventually(lambda: not lookups._outages)
    assert lookups.find(fake, LOOKUP, PARTITIONS) == [stored(record("7"))]
    lookups.close()


def test_a_partition_that_comes_back_is_tried_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outages, "DOWN_S", 60.0)
    fake = FakeStore()
    user = next(n for n in range(99) if partition_of(b"%d" % n, PARTITIONS) == 1)
    with EmbeddingReader(lambda: fake, timeout_s=5) as reader:
        fake.broken = {1}
        check_fallback(reader.get(user), "store_down")
        reader._state.bounded._outages._until[1] = 0.0
        check_fallback(reader.get(user), "store_down")
        check_fallback(reader.get(user), "store_down")
        assert fake.calls == 2, "one tried, and its failure counts for another second"
        reader._state.bounded._outages._until[1] = 0.0
        fake.broken = set()
        assert reader.get(user).reason == "missing"
        assert not reader._state.bounded._outages


def test_a_user_who_can_not_be_asked_for_does_not_use_up_the_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second of a slow store is over while one of its partitions is known to be down."""
    monkeypatch.setattr(outages, "DOWN_S", 60.0)
    fake = FakeStore()
    down, up = (next(n for n in range(99) if partition_of(b"%d" % n, PARTITIONS) == p) for p in (1, 0))
    with EmbeddingReader(lambda: fake, timeout_s=5) as reader:
        fake.broken = {1}
        check_fallback(reader.get(down), "store_down")
        reader._state.bounded._outages.failed(-1)
        reader._state.bounded._outages._until[-1] = 0.0
        check_fallback(reader.get(down), "store_down")
        assert reader.get(up).reason == "missing"


def test_a_call_over_many_partitions_keeps_one_deadline() -> None:
    fake, gate = FakeStore(), Gate()
    users = list(range(40))
    bad = {n for n in users if partition_of(b"%d" % n, PARTITIONS) == 0}
    with EmbeddingReader(lambda: fake, timeout_s=0.05) as reader:
        fake.broken = {0}
        assert {a.reason for a in reader.get_many(bad)[1]} == {"store_down"}
        fake.before = gate
        answers = reader.get_many(users)[1]
        assert {a.user_id: a.reason for a in answers} == {
            str(n): "store_down" if n in bad else "timeout" for n in users
        }
        assert gate.held == 1
        gate.open.set()


@pytest.mark.parametrize("broken", [set(), {1}])
def test_lookups_that_wait_together_are_read_together_and_answered_each_by_itself(broken: set[int]) -> None:
    fake, gate = FakeStore(), Gate()
    users = list(range(30))
    for user in users:
        fake.entries[key(str(user))] = stored(record(str(user)))
    answers: dict[int, UserEmbedding] = {}
    with EmbeddingReader(lambda: fake, timeout_s=20) as reader:
        fake.before = gate
        threads = [threading.Thread(target=lambda n=n: answers.update({n: reader.get(n)})) for n in users]  # type: ignore[misc]
        start_one_by_one(threads, gate, reader)
        fake.broken = broken
        gate.open.set()
        for thread in threads:
            thread.join()
        for user, answer in answers.items():
            lost = partition_of(b"%d" % user, PARTITIONS) in broken
            assert (answer.user_id, answer.reason) == (str(user), "store_down" if lost else "")
        assert broken or fake.calls < len(users)


def test_nobody_waits_for_a_large_lookup_of_another_caller() -> None:
    fake, gate = FakeStore(), Gate()
    sizes: list[int] = []
    with EmbeddingReader(lambda: fake, timeout_s=20) as reader:
        real = fake.get
        fake.get = lambda lookups: (sizes.append(len(lookups)), real(lookups))[1]  # type: ignore[method-assign]
        fake.before = gate
        asks = [*[[n] for n in range(4)], *[[n] for n in range(10)], range(500), *[[n] for n in range(10)]]
        threads = [threading.Thread(target=reader.get_many, args=(users,)) for users in asks]
        start_one_by_one(threads, gate, reader)
        gate.open.set()
        for thread in threads:
            thread.join()
    assert 500 in sizes, "read by itself"
    assert sum(sizes) == 524


def test_a_backlog_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stream.kv.lookups._BACKLOG", 3)
    fake, gate = FakeStore(), Gate()
    fake.before = gate
    bounded = BoundedLookups(0.02)
    late = [bounded._read(fake, LOOKUP, 0.0) for _ in range(12)]  # whose time was up before they began
    assert set(late) == {TIMEOUT, STORE_DOWN}
    assert bounded._jobs.qsize() <= 3
    gate.open.set()
    bounded.close()


# -- stores under a reader


def test_a_rocksdb_that_is_removed_or_replaced_always_gives_an_answer(tmp_path: Path) -> None:
    """Its own process, which may open and close databases as it likes, while this one reads without a pause."""
    program = ROOT / "tests" / "integration" / "test_reader_processes.py"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    code = f"""
import asyncio, shutil, sys
sys.argv = ["x", {str(tmp_path / "kv")!r}]
sys.path.insert(0, {str(program.parent)!r})
from test_reader_processes import Worker
async def main():
    path = sys.argv[1]
    for revision in range(1, 5):
        worker = Worker(path)
        await worker.meta(2)
        await worker.open(0, 1)
        for partition in range(2):
            await worker.put(["1", "2", "3", "4"], partition, 1, revision)
        print(revision, flush=True)
        sys.stdin.readline()
        await worker.close()
        shutil.rmtree(path)
        print("gone", flush=True)
        sys.stdin.readline()
asyncio.run(main())
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as other:
        assert other.stdin is not None
        assert other.stdout is not None

        def step() -> str:
            assert other.stdin is not None
            assert other.stdout is not None
            other.stdin.write("\n")
            other.stdin.flush()
            return other.stdout.readline().strip()

        assert other.stdout.readline().strip() == "1"
        seen: set[tuple[str, str]] = set()
        raised: list[BaseException] = []
        stop = threading.Event()
        with EmbeddingReader.open(f"rocksdb://{tmp_path}/kv", timeout_s=1.0) as reader:

            def probe() -> None:
                try:
                    while not stop.is_set():
                        vectors, answers = reader.get_many(["1", "2", "3", "4"])
                        assert vectors.shape[0] == 4
                        seen.update((a.status, a.reason) for a in answers)
                except BaseException as exc:
                    raised.append(exc)

            thread = threading.Thread(target=probe)
            thread.start()
            for revision in range(1, 5):
                eventually(lambda r=revision: reader.get("1").revision == r, 5.0)  # type: ignore[misc]
                assert step() == "gone"
                eventually(lambda: reader.get("1").reason == "store_down")
                assert step() == ("" if revision == 4 else str(revision + 1))
            stop.set()
            thread.join()
        assert raised == []
        assert ("ok", "") in seen
        assert {reason for _, reason in seen} <= {"", "store_down", "missing", "timeout"}


# -- closing and forking


def test_closing_is_final_and_harmless_under_load() -> None:
    fake = FakeStore()
    fake.entries[key("7")] = stored(record("7"))
    reader = EmbeddingReader(lambda: fake, timeout_s=5)
    reasons: set[str] = set()
    stop = threading.Event()

    def ask() -> None:
        while not stop.is_set():
            reasons.add(reader.get(7).reason)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    eventually(lambda: "" in reasons)
    reader.close()
    reader.close()
    eventually(lambda: "store_down" in reasons)
    stop.set()
    for thread in threads:
        thread.join()
    assert reasons == {"", "store_down"}
    assert reader.get_many([7, 8])[0].shape[0] == 2


FORKED = """
import os, sys, threading
from pathlib import Path
sys.path.insert(0, "tests/unit/retrieval"); sys.path.insert(0, "tests")
from test_reader import Store
from reader_store import record, stored
from stream.retrieval import EmbeddingReader

store = Store(Path(sys.argv[1]))
store.put("7", stored(record("7")))
reader = EmbeddingReader.open(store.url, timeout_s=5)
assert reader.get(7).status == "ok"
reader._state.counted._lock.acquire()  # as a thread that counts at that moment holds it
pid = os.fork()
if pid == 0:
    answer, many = reader.get(7), reader.get_many([7, 8])[1]
    print(answer.status, answer.reason, many[1].reason, flush=True)
    own = EmbeddingReader.open(store.url, timeout_s=5)
    print(own.get(7).status, flush=True)
    own.close()
    reader.close()
    os._exit(0)  # as multiprocessing does; RocksDB's own exit handler crashes in a child
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
reader._state.counted._lock.release()
print(reader.get(7).status, flush=True)
reader.close()
store.close()
"""


def test_a_forked_child_is_answered_and_opens_its_own(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", FORKED, str(tmp_path / "kv")],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines() == ["fallback store_down store_down", "ok", "ok"]
    assert ended.stderr.count("open one in each process") == 1


def test_whatever_a_store_raises_it_is_down() -> None:
    fake = FakeStore()
    failures: list[Callable[[], None]] = [
        lambda: (_ for _ in ()).throw(StoreError("told so")),
        lambda: (_ for _ in ()).throw(MemoryError),
        lambda: (_ for _ in ()).throw(KeyError("x")),
    ]
    for fail in failures:
        with EmbeddingReader(lambda: fake, timeout_s=5) as reader:
            fake.before = fail
            check_fallback(reader.get(7), "store_down")
