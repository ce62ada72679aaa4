"""A real Redis cluster for tests: some primaries, replicas if asked for, all on free ports of this machine."""

import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Final

from closing import Closing
from kafka_broker import free_ports
from redis_server import START_TIMEOUT_S, RedisServer

SLOTS: Final = 16_384
NODE_TIMEOUT_MS: Final = 1500


class RedisCluster(Closing):
    """Running servers, the first `primaries` of which share the slots evenly; each may be killed and started again.

    Attributes:
        servers: all of them, primaries first; a replica follows the primary at its place modulo their number.
    """

    def __init__(self, primaries: int = 3, replicas: int = 0, **settings: str) -> None:
        self._running = ExitStack()
        self.servers: list[RedisServer] = []
        self._bus: dict[int, str] = {}
        self._tls_ports: list[int] = []
        try:
            for number in range(primaries + replicas):
                self.add(**settings)
                if number < primaries:
                    first, end = number * SLOTS // primaries, (number + 1) * SLOTS // primaries
                    self.call(number, "CLUSTER ADDSLOTSRANGE", first, end - 1)
                    self.call(number, "CLUSTER SET-CONFIG-EPOCH", number + 1)
            self.meet(*range(1, len(self.servers)))
            for number in range(primaries, len(self.servers)):
                self.call(number, "CLUSTER REPLICATE", self.node(number % primaries))
            for number in range(primaries, len(self.servers)):
                self._until(lambda n=number: self._link(n) == "up", "the replicas are in step")
        except BaseException:
            self.close()
            raise

    @property
    def url(self) -> str:
        """Where a store is on it."""
        scheme = "rediss" if self._tls_ports else "redis"
        ports = self._tls_ports or [server.port for server in self.servers]
        return f"{scheme}+cluster://" + ",".join(f"127.0.0.1:{port}" for port in ports)

    def add(self, **settings: str) -> int:
        """Start another server, which knows nobody yet; return its number. With `tls_cluster` it also talks TLS."""
        bus, tls_port = free_ports(2)
        if "tls_cluster" in settings:
            settings |= {"tls_port": str(tls_port)}
            self._tls_ports.append(tls_port)
        server = RedisServer(
            cluster_enabled="yes",
            cluster_port=str(bus),
            cluster_node_timeout=str(NODE_TIMEOUT_MS),
            cluster_require_full_coverage="no",
            repl_diskless_sync_delay="0",
            **settings,
        )
        self.servers.append(self._running.enter_context(server))
        self._bus[server.port] = str(bus)
        return len(self.servers) - 1

    def meet(self, *numbers: int) -> None:
        """Make servers known to the first one, and wait until all know each other."""
        for number in numbers:
            port = self.servers[number].port
            self.call(0, "CLUSTER MEET", "127.0.0.1", port, self._bus[port])
        everyone = len(self.servers)
        for number in range(everyone):
            self._until(
                lambda n=number: self._known_to(n) == everyone,
                "all servers know each other",
            )
        self.until_ok()

    def call(self, number: int, *command: str | int) -> Any:
        """Run a command on one server."""
        with self.servers[number].client() as client:
            return client.execute_command(*command)

    def node(self, number: int) -> str:
        """A server's name in the cluster."""
        return str(self.call(number, "CLUSTER MYID").decode())

    def everything(self) -> dict[bytes, bytes]:
        """All keys and values, of the primaries that answer."""
        found: dict[bytes, bytes] = {}
        for server in self.servers:
            with server.client() as client:
                if client.info("replication")["role"] == "master" and (keys := client.keys("*")):
                    values = client.pipeline(transaction=False)
                    for key in keys:
                        values.get(key)
                    found |= zip(keys, values.execute(raise_on_error=False), strict=True)
        return found

    def empty(self) -> None:
        """Remove all keys."""
        for number in range(len(self.servers)):
            self.call(number, "FLUSHALL")

    def until_ok(self, *numbers: int) -> None:
        """Wait until these servers, all of them without any, see all slots served."""
        for number in numbers or range(len(self.servers)):
            self._until(lambda n=number: self._all_served(n), "all slots are served")

    def reshard(self, source: int, target: int, slots: int) -> None:
        """Move slots with their keys from one primary to another, as an operator does."""
        with self.resharding(source, target, slots) as moving:
            moving.wait(120)

    @contextmanager
    def resharding(self, source: int, target: int, slots: int) -> Iterator["subprocess.Popen[bytes]"]:
        """The same, under way: the process that does it, which is waited for at the end."""
        command = ["redis-cli", "--cluster", "reshard", f"127.0.0.1:{self.servers[0].port}", "--cluster-yes"]
        command += ["--cluster-from", self.node(source), "--cluster-to", self.node(target)]
        with (
            tempfile.TemporaryFile() as said,
            subprocess.Popen([*command, "--cluster-slots", str(slots)], stdout=said, stderr=said) as moving,
        ):
            try:
                yield moving
                moving.wait(120)
            finally:
                moving.kill()
            said.seek(0)
            assert moving.returncode == 0, said.read()[-2000:].decode()

    def close(self) -> None:
        """Kill all servers and remove their data; any number of times."""
        self._running.close()

    def _all_served(self, number: int) -> bool:
        info = self.call(number, "CLUSTER INFO")
        return bool(info["cluster_state"] == "ok" and int(info["cluster_slots_ok"]) == SLOTS)

    def _known_to(self, number: int) -> int:
        nodes = self.call(number, "CLUSTER NODES").values()
        return sum("handshake" not in node["flags"] for node in nodes)

    def _link(self, number: int) -> str:
        with self.servers[number].client() as client:
            return str(client.info("replication").get("master_link_status"))

    @staticmethod
    def _until(condition: Any, what: str) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not condition():
            assert time.monotonic() < deadline, f"not within {START_TIMEOUT_S} s: {what}"
            time.sleep(0.02)
