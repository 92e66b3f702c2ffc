"""An adapter becomes part of its base, tensor by tensor, and other programs' files are made of it.

May import evaluation and what is below it; not training, which stands beside it, nor a command.
"""
