"""A worker that commits nothing by itself before it stops, so that what it has done stays uncommitted until then."""

from stream.config import load_settings
from stream.logs import setup_logging
from stream.worker.app import EmbeddingApp
from stream.worker.run import main

setup_logging("info")
app = EmbeddingApp(load_settings())
app.conf.broker_commit_interval = 3600.0
main(app)
