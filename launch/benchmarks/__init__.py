"""Benchmarks of `tim bench`, alone and compared with other tools."""
