"""The command line, `penstock ...`: thin over the protos, core's planner and services/local."""
