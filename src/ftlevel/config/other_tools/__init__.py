"""What other tools call things: words for values, flags that there are not, files of theirs.

Data and small functions; it may import `config.flag`, and nothing that is heavy.
"""
