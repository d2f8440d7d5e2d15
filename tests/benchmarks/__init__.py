"""Benchmarks: `make bench` measures a mesh through its public API."""
