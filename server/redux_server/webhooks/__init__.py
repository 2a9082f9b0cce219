"""Webhooks: the outbox, and who sends what is in it."""
