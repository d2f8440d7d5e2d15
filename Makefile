# One Makefile for everything; `make help` lists the targets.
VENV := .venv
PYTHON := $(VENV)/bin/python

.PHONY: help
help:
	@echo "see README.md"
