"""One process: partitions claimed, restored, given up; its health."""

from stream.extras import need_worker

need_worker(__name__)
