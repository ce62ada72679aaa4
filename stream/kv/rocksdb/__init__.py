"""The embedded store: one RocksDB per partition, written by its owner, read by other processes."""
