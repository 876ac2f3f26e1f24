"""Audits of a run's privacy: canaries, membership inference, extraction of secrets."""
