"""What one GPU does: run on a machine that has one."""
