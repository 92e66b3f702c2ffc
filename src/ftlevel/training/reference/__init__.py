"""The model as it begins, which preferences are held against: computed once, and kept.

`fill` asks the model, and `kept` is the file in which the answers lie between runs.
"""
