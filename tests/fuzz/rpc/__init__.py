"""Fuzzers of every RPC: messages that are wrong in ways that know the contract, over real sockets.

`servers.py` runs what is under test in processes of its own; `methods.py` lists the RPCs and how
each is called rightly; `hostile.py` makes that wrong; `calls.py` sends it; `trial.py` judges what
came of it. `python -m tests.fuzz.rpc --help` runs them by hand.
"""
