"""What is measured against what; LOG.md keeps what was tried."""
