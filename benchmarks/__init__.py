"""Every op against its peers: `python -m benchmarks --help`."""
