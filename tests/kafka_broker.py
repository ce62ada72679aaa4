"""One real Apache Kafka for tests, without Docker: its jars from Maven Central, run by the machine's Java.

`KafkaBroker()` is one KRaft node (broker and controller) on free ports of 127.0.0.1 with a data directory of its own.
`KAFKA_BOOTSTRAP_SERVERS` in the environment stands for a running one instead, which is used but never stopped.
"""

import atexit
import contextlib
import fcntl
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from closing import Closing

KAFKA_VERSION: Final = "4.3.1"
MIN_JAVA: Final = 17
MAVEN_TIMEOUT_S: Final = 200.0
START_TIMEOUT_S: Final = 90.0
STOP_TIMEOUT_S: Final = 30.0
#: Less work before a broker serves, and on the whole for one that lives minutes.
_QUICK_JAVA: Final = ("-Xshare:auto", "-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC")
#: Settings of a broker that nobody stops: it need not be missed soon, and a busy machine may well keep it from its
#: heartbeats for seconds.
PATIENT: Final = {"broker.session.timeout.ms": "60000"}
#: Below the range from which the system takes the local ports of outgoing connections: a client that retries a stopped
#: broker's port from that very port would connect to itself, and the broker could not have its port back.
PORTS: Final = range(15_000, 32_000)

_POM: Final = f"""\
<project xmlns="http://maven.apache.org/POM/4.0.0">
  <modelVersion>4.0.0</modelVersion>
  <groupId>tests</groupId><artifactId>kafka</artifactId><version>1</version><packaging>pom</packaging>
  <dependencies>
    <dependency>
      <groupId>org.apache.kafka</groupId><artifactId>kafka_2.13</artifactId><version>{KAFKA_VERSION}</version>
    </dependency>
    <dependency>
      <groupId>org.apache.kafka</groupId><artifactId>kafka-tools</artifactId><version>{KAFKA_VERSION}</version>
    </dependency>
    <dependency>
      <groupId>org.slf4j</groupId><artifactId>slf4j-simple</artifactId><version>1.7.36</version>
    </dependency>
  </dependencies>
</project>
"""

_PROPERTIES: Final = """\
process.roles=broker,controller
node.id=1
listeners={listeners},CONTROLLER://127.0.0.1:{controller_port}
advertised.listeners={advertised}
controller.listener.names=CONTROLLER
listener.security.protocol.map=CONTROLLER:PLAINTEXT,{protocols}
inter.broker.listener.name=PLAINTEXT
controller.quorum.bootstrap.servers=127.0.0.1:{controller_port}
log.dirs={data}
auto.create.topics.enable=false
broker.heartbeat.interval.ms=500
broker.session.timeout.ms=3000
metadata.max.idle.interval.ms=10000
group.initial.rebalance.delay.ms=0
group.min.session.timeout.ms=1000
log.cleaner.backoff.ms=1000
offsets.topic.num.partitions=4
offsets.topic.replication.factor=1
transaction.state.log.num.partitions=4
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
share.coordinator.state.topic.replication.factor=1
share.coordinator.state.topic.min.isr=1
"""


class BrokerError(RuntimeError):
    """The broker could not be fetched, started or stopped; the message ends with its own last words."""


def why_unavailable() -> str | None:
    """The reason why no broker can be had on this machine, or None."""
    if _external():
        return None
    java = shutil.which("java")
    if java is None:
        return f"no Kafka: install Java {MIN_JAVA} (java) or set KAFKA_BOOTSTRAP_SERVERS"
    try:
        found = re.search(r'version "(?:1\.)?(\d+)', _run([java, "-version"], timeout_s=60.0))
    except BrokerError:
        found = None
    if found is None or int(found[1]) < MIN_JAVA:
        has = f"java is version {found[1]}" if found else "java does not tell its version"
        return f"no Kafka: {has}; install Java {MIN_JAVA} or newer, or set KAFKA_BOOTSTRAP_SERVERS"
    if shutil.which("mvn") is None and not _complete(_home()):
        return "no Kafka: install Maven (mvn), which fetches its jars, or set KAFKA_BOOTSTRAP_SERVERS"
    return None


def kafka_jars() -> Path:
    """The folder with Kafka's jars, fetched by Maven on first use.

    Raises:
        BrokerError: Maven failed.
    """
    home = _home()
    if not _complete(home):
        home.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{home.name}.", dir=home.parent))
        try:
            _fetch(work)
            _move_in(work, home)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return home / "libs"


class KafkaBroker(Closing):
    """A running broker: stopped, killed, paused and restarted at will, with the same data and port.

    Its methods block; in an async test call them through `asyncio.to_thread` where clients must go on meanwhile.
    """

    def __init__(
        self,
        properties: Mapping[str, str] | None = None,
        *,
        listeners: Mapping[str, str] | None = None,
        astray: Mapping[str, str] | None = None,
        bootstrap: str = "",
        archive_to: Path | None = None,
        java: Sequence[str] = (),
    ) -> None:
        """Start it, or stand for the running one at `bootstrap`.

        Args:
            properties: settings beside the usual ones, and never a running broker's.
            listeners: names and protocols of listeners beside PLAINTEXT; `at` has their addresses.
            astray: listeners that advertise another address than theirs.
            bootstrap: address of a broker that runs.
            archive_to: at its orderly end it writes its loaded classes there, for others to start with.
            java: further options of its Java.
        """
        running = bootstrap or ("" if properties or archive_to else _external())
        self.external: Final = bool(running)
        self._protocols: Final = {"PLAINTEXT": "PLAINTEXT", **(listeners or {})}
        self.at: dict[str, str] = {}
        self._astray: Final = dict(astray or {})
        self._more: Final = "".join(f"{name}={value}\n" for name, value in (properties or {}).items())
        self._process: subprocess.Popen[bytes] | None = None
        self._guard: subprocess.Popen[bytes] | None = None
        self._paused = False
        if self.external:
            self.bootstrap = running
            _wait_until(lambda: _answers(self.bootstrap), START_TIMEOUT_S, f"no Kafka answers at {self.bootstrap}")
            return
        libs = kafka_jars()
        self._dir = Path(tempfile.mkdtemp(prefix="kafka-test-"))
        self.log: Final = self._dir / "kafka.log"
        command = [shutil.which("java") or "java", "-Xmx1g", *_QUICK_JAVA]
        classes = ["-cp", f"{libs}/*"]
        shared = [] if archive_to else [f"-XX:SharedArchiveFile={_archive(libs)}"]
        self._tool: Final = [*command, *shared, *classes, "kafka.tools.StorageTool"]
        written = [f"-XX:ArchiveClassesAtExit={archive_to}"] if archive_to else []
        self._java: Final = [*command, *java, *shared, *written, *classes, "kafka.Kafka"]
        atexit.register(self.close)
        try:
            self._first_start()
        except BaseException:
            self.close()
            raise

    @property
    def running(self) -> bool:
        """Whether its process lives and is not paused (a broker that isn't ours: always)."""
        return self.external or (self._alive() and not self._paused)

    def stop(self) -> None:
        """Shut down in an orderly way; one that doesn't follow is killed and reported."""
        self._ours("stop")
        if self._process is None or not self._alive():
            self._reap()
            return
        self.resume()
        self._process.terminate()
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            msg = f"Kafka did not stop within {STOP_TIMEOUT_S:g} s{self._last_words()}"
            raise BrokerError(msg) from None
        finally:
            self._reap()

    def kill(self) -> None:
        """End it at once (SIGKILL); paused or not."""
        self._ours("kill")
        self._reap()

    def pause(self) -> None:
        """Freeze its process (SIGSTOP): connections stay open, nothing is answered."""
        self._ours("pause")
        if self._process is None or not self._alive():
            msg = "a stopped broker can't be paused"
            raise BrokerError(msg)
        os.killpg(self._process.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, self._process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        self._paused = True

    def resume(self) -> None:
        """Let a paused broker go on; it answers as soon as it can, this does not wait for it."""
        self._ours("resume")
        if self._paused and self._process is not None and self._alive():
            os.killpg(self._process.pid, signal.SIGCONT)
        self._paused = False

    def restart(self) -> None:
        """Stop if it runs, start on the same data and port, and wait until it answers."""
        self._ours("restart")
        self.stop()
        self._start()

    def restore(self) -> None:
        """Undo what a test left behind: a paused broker goes on, a stopped or killed one starts again."""
        if not self.external and self._paused:
            self.resume()
        if not self.running:
            self.restart()

    def close(self) -> None:
        """Kill it and remove its data; any number of times."""
        if self.external:
            return
        atexit.unregister(self.close)
        self._reap()
        shutil.rmtree(self._dir, ignore_errors=True)

    def _first_start(self) -> None:
        for attempt in range(3):
            controller_port, *ports = free_ports(1 + len(self._protocols))
            self.at = {name: f"127.0.0.1:{port}" for name, port in zip(self._protocols, ports, strict=True)}
            self.bootstrap = self.at["PLAINTEXT"]
            data, properties = self._dir / f"data-{attempt}", self._dir / "server.properties"
            settings = _PROPERTIES.format(
                listeners=_listed(self.at),
                advertised=_listed({**self.at, **self._astray}),
                protocols=",".join(f"{name}:{protocol}" for name, protocol in self._protocols.items()),
                controller_port=controller_port,
                data=data,
            )
            properties.write_text(settings + self._more)
            command = [*self._tool, "format", "--standalone", "-t", _cluster_id(), "-c", str(properties)]
            _run(command, timeout_s=START_TIMEOUT_S)
            try:
                self._start()
            except BrokerError as e:
                if attempt == 2 or "Address already in use" not in str(e):
                    raise
            else:
                return

    def _start(self) -> None:
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [*self._java, str(self._dir / "server.properties")],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self._dir,
                start_new_session=True,
            )
        # Reads the end of its input when this process ends, in whatever way, and takes the broker with it.
        self._guard = subprocess.Popen(
            ["/bin/sh", "-c", 'read -r _; kill -9 -"$0"; rm -rf "$1"', str(self._process.pid), str(self._dir)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            _wait_until(self._up_or_dead, START_TIMEOUT_S, f"Kafka did not answer in {START_TIMEOUT_S:g} s")
        except BrokerError as e:
            self._reap()
            msg = f"{e}{self._last_words()}"
            raise BrokerError(msg) from None

    def _up_or_dead(self) -> bool:
        if not self._alive():
            msg = "Kafka ended while it started"
            raise BrokerError(msg)
        return _answers(self.bootstrap)

    def _alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def _reap(self) -> None:
        # The guard goes first: the number of a process that was waited for may be given to another.
        if self._guard is not None:
            self._guard.kill()
            self._guard.wait()
            if self._guard.stdin is not None:
                self._guard.stdin.close()
            self._guard = None
        if self._process is not None:
            if self._process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None
        self._paused = False

    def _ours(self, what: str) -> None:
        if self.external:
            msg = f"won't {what} the broker at {self.bootstrap}: it is shared; take `own_kafka`"
            raise BrokerError(msg)

    def _last_words(self) -> str:
        return f"; the end of its log:\n{_tail(self.log.read_text(errors='replace'))}"


@contextlib.contextmanager
def shared_broker(folder: Path) -> Iterator[KafkaBroker]:
    """The one broker of all processes that name the same folder; it ends with the last of them, in whatever way.

    Each holds a lock on a file while it uses the broker; a process of the broker's own waits for all to be given up.
    """
    with (folder / "starting").open("w") as starting, (folder / "users").open("w") as users:
        fcntl.flock(starting, fcntl.LOCK_EX)
        fcntl.flock(users, fcntl.LOCK_SH)
        address = folder / "bootstrap"
        if not address.exists():
            log = os.open(folder / "broker.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            command = [sys.executable, __file__, str(folder)]  # no Popen: it outlives this process, perhaps
            outputs = [(os.POSIX_SPAWN_DUP2, log, 1), (os.POSIX_SPAWN_DUP2, log, 2)]
            keeper = os.posix_spawn(command[0], command, os.environ, file_actions=outputs, setsid=True)
            os.close(log)

            def up_or_ended() -> bool:
                return address.exists() or os.waitpid(keeper, os.WNOHANG) != (0, 0)

            _wait_until(up_or_ended, MAVEN_TIMEOUT_S + 2 * START_TIMEOUT_S, "the shared broker did not start")
            if not address.exists():
                raise BrokerError((folder / "broker.log").read_text())
        fcntl.flock(starting, fcntl.LOCK_UN)
        yield KafkaBroker(bootstrap=address.read_text())


def _keep(folder: Path) -> None:
    """Run the broker of a folder until nobody uses it."""
    with KafkaBroker(PATIENT) as broker, (folder / "users").open("w") as users:
        (folder / "bootstrap.new").write_text(broker.bootstrap)
        (folder / "bootstrap.new").rename(folder / "bootstrap")
        fcntl.flock(users, fcntl.LOCK_EX)
        (folder / "bootstrap").unlink()


def _external() -> str:
    return os.environ.get("KAFKA_BOOTSTRAP_SERVERS", "").strip()


def _home() -> Path:
    root = os.environ.get("UEMB_TEST_CACHE") or "~/.cache/user-embedding-stream"
    return Path(root).expanduser().absolute() / f"kafka-{KAFKA_VERSION}"


def _complete(home: Path) -> bool:
    """Whether the stamp, written last, is there and so is every jar that it lists."""
    try:
        names = (home / "complete").read_text().split()
    except OSError:
        return False
    return bool(names) and all((home / "libs" / name).is_file() for name in names)


def _fetch(work: Path) -> None:
    mvn = shutil.which("mvn")
    if mvn is None:
        msg = "no mvn to fetch Kafka's jars with"
        raise BrokerError(msg)
    (work / "pom.xml").write_text(_POM)
    goal = ["dependency:copy-dependencies", "-DincludeScope=runtime", f"-DoutputDirectory={work / 'libs'}"]
    _run([mvn, "-q", "-B", "-ntp", "-f", str(work / "pom.xml"), *goal], timeout_s=MAVEN_TIMEOUT_S)
    names = sorted(p.name for p in (work / "libs").glob("*.jar"))
    if f"kafka_2.13-{KAFKA_VERSION}.jar" not in names:
        msg = "Maven ended well but brought no Kafka"
        raise BrokerError(msg)
    (work / "complete").write_text("\n".join(names) + "\n")


def _archive(libs: Path) -> Path:
    """The classes of a broker as they are in memory: with them another starts in a third of the time."""
    archive = libs.parent / "classes.jsa"
    with (libs.parent / "archiving").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not archive.exists():
            unfinished = archive.with_suffix(".new")
            with KafkaBroker(archive_to=unfinished) as broker:
                broker.stop()
            unfinished.touch()  # a Java that writes none isn't asked again
            unfinished.rename(archive)
    return archive


def _move_in(work: Path, home: Path) -> None:
    """Give a finished folder its name; one that another run finished first is kept, a broken one replaced."""
    while True:
        try:
            work.rename(home)
        except OSError:
            if _complete(home):
                return
            aside = Path(tempfile.mkdtemp(prefix=f".{home.name}.", dir=home.parent))
            with contextlib.suppress(FileNotFoundError):
                home.rename(aside)
            shutil.rmtree(aside, ignore_errors=True)
        else:
            return


def _run(command: Sequence[str], *, timeout_s: float) -> str:
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=timeout_s,
            text=True,
            errors="replace",
            check=False,
        )
    except subprocess.TimeoutExpired:
        msg = f"{Path(command[0]).name} did not end within {timeout_s:g} s"
        raise BrokerError(msg) from None
    if done.returncode != 0:
        msg = f"{Path(command[0]).name} ended with {done.returncode}:\n{_tail(done.stdout)}"
        raise BrokerError(msg)
    return done.stdout


def _tail(text: str, lines: int = 40) -> str:
    return "\n".join(text.splitlines()[-lines:])


def _listed(addresses: Mapping[str, str]) -> str:
    """Listeners as a broker's properties have them."""
    return ",".join(f"{name}://{address}" for name, address in addresses.items())


def _cluster_id() -> str:
    # Kafka reads 16 bytes in base64; an id of letters and digits can't be taken for an option.
    return uuid.uuid4().hex[:21] + "A"


def free_ports(n: int) -> list[int]:
    with contextlib.ExitStack() as held:
        ports: list[int] = []
        for port in random.SystemRandom().sample(PORTS, 200):
            s = held.enter_context(socket.socket())
            try:
                s.bind(("127.0.0.1", port))
            except OSError:
                continue
            ports.append(port)
            if len(ports) == n:
                return ports
    msg = "no free port on 127.0.0.1"
    raise BrokerError(msg)


def _answers(bootstrap: str) -> bool:
    """Whether the broker serves metadata that names a broker."""
    # Imported here: tests of readers run without a client of Kafka.
    from confluent_kafka import KafkaException
    from confluent_kafka.admin import AdminClient

    host, _, port = bootstrap.split(",")[0].strip().rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=1.0).close()
    except OSError:
        return False
    admin = AdminClient({"bootstrap.servers": bootstrap, "log_level": 0, "socket.timeout.ms": 2000})
    try:
        return bool(admin.list_topics(timeout=2.0).brokers)
    except KafkaException:
        return False


def _wait_until(done: Callable[[], bool], timeout_s: float, complaint: str) -> None:
    deadline = time.monotonic() + timeout_s
    while not done():
        if time.monotonic() > deadline:
            raise BrokerError(complaint)
        time.sleep(0.05)


if __name__ == "__main__":
    _keep(Path(sys.argv[1]))
