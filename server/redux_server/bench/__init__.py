"""The benchmark of servers that speak the task API. Loads torch only to measure likeness."""
