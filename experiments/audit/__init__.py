"""Does the promise hold, and what would an attacker get: canaries, membership, extraction."""
