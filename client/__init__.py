"""An institution: it holds its own records, its own budget, and answers one order at a time."""
