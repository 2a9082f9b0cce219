"""One network over several processes: shares of rows, their exchange, and the processes."""
