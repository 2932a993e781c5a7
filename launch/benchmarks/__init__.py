"""Benchmarks of `tim bench`: of the network here, of data in `data`."""
