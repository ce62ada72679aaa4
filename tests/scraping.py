"""What a worker tells over HTTP, asked as Prometheus and probes ask."""

import http.client
import json
import re
from typing import Any

from pipeline import Pipeline
from prometheus_client.parser import text_string_to_metric_families

#: What workers are told, so that several can run on a host: the log names the port that was taken.
ANY_PORT = "127.0.0.1:0"
Labels = tuple[str, ...]


class Scraped:
    """A worker's pages; `pipeline` is started with `ANY_PORT`."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline = pipeline

    @property
    def address(self) -> str:
        """Where the present run of the worker listens; waits for that."""
        pattern = r"metrics and health: http://(\S+)/metrics"
        self.pipeline.until(lambda: bool(re.search(pattern, self._log())), "it listens")
        return re.findall(pattern, self._log())[-1]

    def _log(self) -> str:
        return self.pipeline.log.read_text(errors="replace")[self.pipeline._log_start :]

    def get(self, path: str, timeout_s: float = 30) -> tuple[int, str]:
        """Status and body of a page."""
        connection = http.client.HTTPConnection(self.address, timeout=timeout_s)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        finally:
            connection.close()

    def verdict(self, path: str) -> tuple[int, list[str]]:
        """Status of ``/healthz`` or ``/readyz``, and the reasons against."""
        status, body = self.get(path)
        document: dict[str, Any] = json.loads(body)
        assert document["ok"] is (status == 200) is (not document["reasons"])
        return status, document["reasons"]

    def is_ready(self) -> bool:
        return self.verdict("/readyz")[0] == 200

    def until_ready(self) -> None:
        self.pipeline.until(self.is_ready, "it is ready")

    def samples(self, *names: str) -> list[dict[Labels, float]]:
        """Samples of metrics in one scrape, by the values of their labels in the order of the labels' names."""
        status, body = self.get("/metrics")
        assert status == 200
        found: dict[str, dict[Labels, float]] = {name: {} for name in names}
        for family in text_string_to_metric_families(body):
            for sample in family.samples:
                if sample.name in found:
                    values = tuple(value for _, value in sorted(sample.labels.items()))
                    found[sample.name][values] = sample.value
        return list(found.values())

    def value(self, name: str) -> float:
        """The only sample of a metric."""
        (samples,) = self.samples(name)
        (value,) = samples.values()
        return value
