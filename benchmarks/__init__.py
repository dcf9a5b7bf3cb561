"""Measures every op against its peers; see `python -m benchmarks --help`."""
