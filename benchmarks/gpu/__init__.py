"""The report of a machine with a GPU: `python -m benchmarks.gpu --help`, or `make gpu-report`."""
