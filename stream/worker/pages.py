"""What a worker tells over HTTP: its metrics, whether it is alive, whether it is ready."""

import json
from collections.abc import Callable, Mapping

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.exposition import choose_encoder

from stream.metrics import Collector
from stream.worker.health import Health, Vitals
from stream.worker.http import Answer, Page
from stream.worker.metrics import METRICS, WorkerMetrics


def pages(of: Vitals, health: Health) -> dict[str, Page]:
    """The pages of a worker, by path."""
    registry = CollectorRegistry()
    registry.register(Collector(METRICS, WorkerMetrics(of).read))
    ProcessCollector(registry=registry)

    return {"/metrics": metrics(registry), "/healthz": _verdict(health.dead), "/readyz": _verdict(health.not_ready)}


def metrics(registry: CollectorRegistry) -> Page:
    """The page of metrics, in the format that is asked for."""

    def page(headers: Mapping[str, str]) -> Answer:
        try:
            encode, content_type = choose_encoder(headers.get("accept", ""))
        except Exception:  # noqa: BLE001 - anybody may ask for anything, and the client expects what Prometheus asks for
            encode, content_type = choose_encoder("")
        if not (content_type.isascii() and content_type.isprintable()):  # it repeats some of what was asked for
            encode, content_type = choose_encoder("")
        return Answer(200, encode(registry), content_type)

    return page


def _verdict(reasons_against: Callable[[], list[str]]) -> Page:
    def page(_: Mapping[str, str]) -> Answer:
        reasons = reasons_against()
        body = json.dumps({"ok": not reasons, "reasons": reasons}) + "\n"
        return Answer(503 if reasons else 200, body.encode(), "application/json")

    return page
