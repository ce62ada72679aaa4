"""Another item version or encoder, without downtime."""

from stream.extras import need_worker

need_worker(__name__)
