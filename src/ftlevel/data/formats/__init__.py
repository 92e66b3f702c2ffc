"""Convert rows to examples: column mapping, conversations, labels, tags and languages.

May import `sources`, but not `encoding` or a tokenizer.
"""
