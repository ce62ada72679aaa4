"""Several processes looked after by one, with small programs in place of workers."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import warm_start

from stream.config import load_settings
from stream.errors import ConfigError
from stream.worker.supervisor import worker_processes

SUPERVISOR = """
import os, sys
from stream.logs import setup_logging
from stream.worker import supervisor
setup_logging("info")
supervisor.FIRST_PAUSE_S, supervisor.WELL_S = 0.05, float(sys.argv[1])
children = [supervisor.Child([sys.executable, "-c", program], dict(os.environ)) for program in sys.argv[2:]]
sys.exit(supervisor.supervise(children))
"""
#: Ends with a status when it is told to stop; tells of itself when it is ready for that.
WAIT = "signal.signal(signal.SIGTERM, lambda *_: sys.exit({code})); TELL; [time.sleep(0.05) for _ in iter(int, 1)]"
ORPHAN = "from stream.worker.supervisor import stop_when_orphaned; stop_when_orphaned(); "


class Started:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.process: warm_start.Process | subprocess.Popen[bytes] | None = None
        self.log = folder / "log"

    def start(self, *programs: str, well_s: float = 60.0) -> None:
        with self.log.open("wb") as log:
            command = [sys.executable, "-c", SUPERVISOR, str(well_s), *programs]
            self.process = warm_start.start(command, os.environ, log)

    def told(self, name: str) -> list[int]:
        path = self.folder / name
        return [int(line) for line in path.read_text().split()] if path.exists() else []

    def until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.02)

    def program(self, name: str, does: str) -> str:
        """One that appends a line with its process id to a file where it says TELL."""
        tell = f"open({str(self.folder / name)!r}, 'a').write(f'{{os.getpid()}}\\n')"
        return f"import os, signal, sys, time; {does.replace('TELL', tell)}"

    def ended(self) -> int:
        assert self.process is not None
        return self.process.wait(60)


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Started]:
    made = Started(tmp_path)
    yield made
    if made.process is not None and made.process.poll() is None:
        made.process.kill()
        made.process.wait()


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text()


@pytest.mark.parametrize(
    ("codes", "worst"),
    [((0, 0), 0), ((0, 3), 3), ((4, 1), 4), ((75, 0), 75), ((1, 75), 1), ((137, 75), 137), ((2, 137), 2), ((75, 2), 2)],
)
def test_a_signal_goes_to_all_and_the_worst_status_is_told(
    started: Started, codes: tuple[int, int], worst: int
) -> None:
    started.start(*[started.program(f"p{n}", WAIT.format(code=code)) for n, code in enumerate(codes)])
    started.until(lambda: bool(started.told("p0") and started.told("p1")))
    assert started.process is not None
    started.process.send_signal(signal.SIGTERM)
    assert started.ended() == worst
    assert all(gone(pid) for n in range(2) for pid in started.told(f"p{n}"))


def test_one_that_dies_is_started_again_and_the_others_go_on(started: Started) -> None:
    started.start(
        started.program("dies", "TELL; time.sleep(0.2); os.kill(os.getpid(), 9)"),
        started.program("stays", WAIT.format(code=0)),
        well_s=0.1,  # each life was long enough: so it may die as often as it likes
    )
    started.until(lambda: len(started.told("dies")) >= 7)
    assert len(set(started.told("dies"))) >= 7
    assert len(started.told("stays")) == 1
    assert "process 0 ended with 137; it is started again in 0.05 s" in started.log.read_text()
    assert started.process is not None
    started.process.send_signal(signal.SIGTERM)
    started.ended()
    assert all(gone(pid) for name in ("dies", "stays") for pid in started.told(name))


def test_one_that_dies_again_and_again_ends_them_all(started: Started) -> None:
    started.start(started.program("dies", "TELL; sys.exit(5)"), started.program("stays", WAIT.format(code=0)))
    assert started.ended() == 5
    assert len(started.told("dies")) == 5
    text = started.log.read_text()
    assert "process 0 ended with 5: 5 times in a row; the others are stopped" in text
    for pause in ("0.05", "0.1", "0.2", "0.4"):
        assert f"it is started again in {pause} s" in text
    assert all(gone(pid) for pid in started.told("stays"))


def test_a_setting_that_is_wrong_is_not_tried_again(started: Started) -> None:
    started.start(started.program("wrong", "TELL; sys.exit(2)"), started.program("stays", WAIT.format(code=0)))
    assert started.ended() == 2
    assert len(started.told("wrong")) == 1
    assert "what it was told is wrong" in started.log.read_text()


def test_one_that_is_stopped_before_it_listens_for_that_is_no_fault(started: Started) -> None:
    seen = f"[time.sleep(0.05) for _ in iter(lambda: os.path.exists({str(started.folder / 'early')!r}), True)]"
    started.start(
        started.program("wrong", f"{seen}; sys.exit(2)"),
        started.program("early", "TELL; [time.sleep(0.05) for _ in iter(int, 1)]"),
    )
    assert started.ended() == 2
    assert all(gone(pid) for pid in started.told("early"))


def test_children_stop_when_their_parent_is_killed(started: Started) -> None:
    orphan = started.program("child", ORPHAN + WAIT.format(code=0))
    started.start(orphan, orphan)
    started.until(lambda: len(started.told("child")) == 2)
    assert started.process is not None
    started.process.kill()
    started.ended()
    started.until(lambda: all(gone(pid) for pid in started.told("child")))


def test_each_has_a_folder_and_a_name_of_its_own_and_its_part_of_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UEMB_STATE_DIR", str(tmp_path))
    monkeypatch.setenv("UEMB_HOT_USERS", "10")
    assert not any("UEMB_GROUP_INSTANCE_ID" in child.environment for child in worker_processes(load_settings(), 3))
    monkeypatch.setenv("UEMB_GROUP_INSTANCE_ID", "host-7")
    children = worker_processes(load_settings(), 3)
    assert [child.environment["UEMB_STATE_DIR"] for child in children] == [
        str(tmp_path / f"process-{n}") for n in range(3)
    ]
    assert [child.environment["UEMB_GROUP_INSTANCE_ID"] for child in children] == ["host-7-0", "host-7-1", "host-7-2"]
    assert {child.environment["UEMB_HOT_USERS"] for child in children} == {"3"}
    assert [child.environment["UEMB_HTTP"] for child in children] == [f"127.0.0.1:{9464 + n}" for n in range(3)]
    with pytest.raises(ConfigError, match="can't be shared by 11 processes"):
        worker_processes(load_settings(), 11)


@pytest.mark.parametrize("http", ["", "127.0.0.1:0"])
def test_processes_that_listen_nowhere_or_anywhere_are_told_the_same(
    http: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UEMB_STATE_DIR", str(tmp_path))
    monkeypatch.setenv("UEMB_HTTP", http)
    assert {child.environment["UEMB_HTTP"] for child in worker_processes(load_settings(), 3)} == {http}


def test_there_must_be_a_port_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UEMB_HTTP", "[::1]:65534")
    assert worker_processes(load_settings(), 2)[1].environment["UEMB_HTTP"] == "[::1]:65535"
    with pytest.raises(ConfigError, match=r"UEMB_HTTP=\[::1\]:65534: 3 processes"):
        worker_processes(load_settings(), 3)
