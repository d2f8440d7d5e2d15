"""Fuzzers: inputs from outside, damaged in ways that know their structure.

`registry.py` lists the targets, each a module here; `running.py` runs one in a process of its
own with bounded memory and time; `python -m tests.fuzz --help` runs them by hand.
`corpus/TARGET/` holds what once was a finding, and is replayed before anything new is tried.
"""
