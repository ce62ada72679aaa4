"""One batch of one partition: decode, fold, keep, make durable, mark."""

from stream.extras import need_worker

need_worker(__name__)
