"""A worker that kills or freezes itself (SIGKILL, SIGSTOP) when a given user's batch first passes a given stage."""

import os
import signal
import sys

from stream.config import load_settings
from stream.logs import setup_logging
from stream.pipeline.lane import Outlet, Work
from stream.worker.app import EmbeddingApp
from stream.worker.run import main

stage, users = sys.argv[1], {user.encode() for user in sys.argv[2].split(",")}
pending = [signal.Signals[sys.argv[3]]]


def hit_here(name: str, work: Work) -> None:
    """End or freeze the process without any warning, as a power cut or a stalled host would."""
    here = {user for effects in work.effects.values() for user in (*effects.states, *effects.forgotten)}
    if name == stage and users & here and pending:
        # The store would refuse the next heartbeat of one that was frozen, and end it before its writes are tried; that
        # may be the rest of a round that is under way.
        Outlet.is_due = property(lambda _: False)
        os.kill(os.getpid(), pending.pop())


setup_logging("info")
app = EmbeddingApp(load_settings(), on_stage=hit_here)
main(app)
