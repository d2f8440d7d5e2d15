"""The I/O: one folder a process, and `common` for what they share."""

import os

# gRPC's C core writes lines of its own to standard error, between our structured ones, unless
# it is told before its first import. What matters comes back as exceptions and statuses.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
