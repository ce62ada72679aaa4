"""One batch of one partition: decode, fold, keep, make durable, mark."""
