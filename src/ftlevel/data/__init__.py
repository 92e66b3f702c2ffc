"""From a file of examples to batches of token ids: sources, formats, encoding, collation."""
