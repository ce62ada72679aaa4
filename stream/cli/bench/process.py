"""A system under test as a process: started, watched through its output topic and its CPU time, and ended."""

import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, NamedTuple, Self

from confluent_kafka import Consumer, KafkaException, TopicPartition

from stream.errors import UembError

_TICKS: Final = os.sysconf("SC_CLK_TCK")
_POLL_S: Final = 0.02
START_PATIENCE_S: Final = 60.0
_QUIET_S: Final = 5.0
STALL_S: Final = 10.0


class BenchError(UembError):
    """A system under test did not do its job."""


class Mark(NamedTuple):
    """A moment of a run: clock and CPU seconds, and records written by then."""

    at_s: float
    cpu_s: float
    records: int


def cpu_s_of(pid: int) -> float:
    """CPU seconds of a process so far, all threads, user and system."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


class Ends:
    """Looks at the ends of topics, and at what a group has committed."""

    def __init__(self, client: Mapping[str, Any], partitions: int, group: str = "bench-ends") -> None:
        self._consumer = Consumer({**client, "group.id": group, "log_level": 0})
        self._partitions = range(partitions)

    def count(self, topic: str) -> int:
        """Records written to a topic so far; 0 while it does not exist."""
        try:
            places = [TopicPartition(topic, p) for p in self._partitions]
            return sum(self._consumer.get_watermark_offsets(place, timeout=10)[1] for place in places)
        except KafkaException:
            return 0

    def committed(self, topics: Sequence[str]) -> int:
        """Sum of the group's committed offsets."""
        places = [TopicPartition(topic, p) for topic in topics for p in self._partitions]
        return sum(max(0, place.offset) for place in self._consumer.committed(places, timeout=10))

    def close(self) -> None:
        """Disconnect."""
        self._consumer.close()


class System:
    """A running process; its log is shown when it fails."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path, group: str = "") -> None:
        self.group = group
        self._log = log
        with log.open("ab") as out:
            self._process = subprocess.Popen(  # noqa: S603 - our own commands
                list(command), env={**os.environ, **environment}, stdout=out, stderr=subprocess.STDOUT
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def kill(self) -> None:
        """SIGKILL."""
        self._process.kill()
        self._process.wait()

    def cpu_s(self) -> float:
        """CPU seconds of the process so far, all threads, user and system."""
        return cpu_s_of(self._process.pid)

    def mark(self, records: int = 0) -> Mark:
        """This moment."""
        return Mark(time.perf_counter(), self.cpu_s(), records)

    def peak_bytes(self) -> int:
        """Largest resident memory of the process so far."""
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        return 1024 * int(status.partition("VmHWM:")[2].split()[0])

    def stop(self) -> None:
        """SIGTERM, and wait for a clean end."""
        self._process.terminate()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired as exc:
            msg = "it did not stop within 60 s"
            raise BenchError(msg) from exc

    def until_count(self, ends: Ends, topic: str, target: int) -> "Mark":
        """Wait until a topic has `target` records; return when that was and what it had cost by then."""
        last, moved_at = -1, time.perf_counter()
        while True:
            count = ends.count(topic)
            mark = self.mark(count)
            if count >= target:
                return mark
            self.check()
            if count > last:
                last, moved_at = count, mark.at_s
            patience = STALL_S if count else START_PATIENCE_S
            if time.perf_counter() - moved_at > patience:
                msg = f"{topic} has {count} records and no more after {patience:g} s:\n{self.tail()}"
                raise BenchError(msg)
            time.sleep(_POLL_S)

    def until_claimed(self, partitions: int) -> None:
        """Wait until a worker owns all partitions."""
        started = time.perf_counter()
        while self._log.read_text(errors="replace").count("claimed epoch") < partitions:
            self.check()
            if time.perf_counter() - started > START_PATIENCE_S:
                msg = f"it does not own its partitions after {START_PATIENCE_S:g} s:\n{self.tail()}"
                raise BenchError(msg)
            time.sleep(_POLL_S)

    def until_quiet(self, ends: Ends, topic: str, target: int) -> int:
        """Wait until a topic has `target` records, or some and no more for a while; return how many."""
        count, moved_at = 0, time.perf_counter()
        patience = START_PATIENCE_S
        while count < target and time.perf_counter() - moved_at < patience:
            self.check()
            time.sleep(_POLL_S)
            if (now := ends.count(topic)) > count:
                count, moved_at, patience = now, time.perf_counter(), _QUIET_S
        return count

    def check(self) -> None:
        """Raise if the process has ended."""
        if self._process.poll() is not None:
            msg = f"it ended with {self._process.returncode}:\n{self.tail()}"
            raise BenchError(msg)

    def tail(self) -> str:
        """Last lines of its log."""
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-8:])
