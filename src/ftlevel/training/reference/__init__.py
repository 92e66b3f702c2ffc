"""What models say of the rows before the first step, computed once and kept.

`fill` asks the model as it begins, which preferences are held against; `another` asks a model that
is not trained in its place, and `teacher` one whose predictions are learned. `beside` finds these
two before weights load, `asked` is the order of it all, and `kept` is the file in which answers lie
between runs.
"""
