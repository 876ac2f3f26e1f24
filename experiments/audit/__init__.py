"""Audits of a run's privacy: canaries, and one attack on them from the server's view."""
