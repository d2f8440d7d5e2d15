"""What SECURITY.md promises, and who tries to break it.

`promises.py` lists the promises with their tests; `python -m tests.security` tries them all for
long; the abuse cases here are those that others' CVEs suggest.
"""
