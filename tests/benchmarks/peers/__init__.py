"""`make bench-peers`: ours and the peers on the same work, in alternation, in one run."""
