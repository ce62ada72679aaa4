"""A worker that commits nothing by itself before it stops, so that what it has done stays uncommitted until then."""

from stream.app import EmbeddingApp
from stream.config import load_settings
from stream.worker import main, setup_logging

setup_logging("info")
app = EmbeddingApp(load_settings())
app.conf.broker_commit_interval = 3600.0
main(app)
