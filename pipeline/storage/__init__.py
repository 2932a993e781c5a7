"""Bytes of shards: tar members, remote files, range reads and the local shard cache."""
