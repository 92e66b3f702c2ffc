"""What columns mean: from rows to examples, their labels and languages.

May import sources. It knows no tokenizer.
"""
