"""Keys and commands that are gone, and what to use in their place: one line each."""

KEYS: dict[str, str] = {}
"""A key that was removed -> what to use, the end of the sentence "KEY is gone; ..."."""
COMMANDS: dict[str, str] = {}
"""A command that was removed -> what to use, the end of the sentence "COMMAND is gone; ..."."""
