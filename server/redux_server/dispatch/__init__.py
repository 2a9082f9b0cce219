"""How tasks reach workers: processes of ours, polling, or Celery."""
