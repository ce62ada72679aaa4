"""A worker that does not look at its grants before it starts: as if they were taken right after it did."""

from stream.cli.root import cli
from stream.kafka import topics
from stream.worker import app

topics._check_grants = lambda *_: None
app.check_group = lambda *_: None
cli(["worker"])
