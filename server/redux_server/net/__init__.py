"""Outgoing connections, which never reach a private network unless allowed."""
