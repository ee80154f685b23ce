"""What can only be shown on a GPU: `python -m tests.gpu`, one call, without network; see script.py."""
