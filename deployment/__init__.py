"""A federation on separate machines: keys, services, submitted runs, checks."""
