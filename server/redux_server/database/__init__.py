"""The database: its tables, connections, clock and migrations."""
