"""An adapter in its normal form: plain LoRA on the untouched base, one rank, which alpha is too.

A reader that forgets a scale, a pattern or a square root reads the same numbers then. By a method's
own algebra where it has one, else by asking the loaded layers. Knows no server and no file format.
"""
