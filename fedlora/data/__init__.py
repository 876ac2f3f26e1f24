"""From a source of records to tokenised shards: read, split, partition, tokenise, cache.

Imports the room config. Loads no torch before tensors are made.
"""
