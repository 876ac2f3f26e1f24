"""A federation on machines of its own: keys, services, submitted runs, checks."""
