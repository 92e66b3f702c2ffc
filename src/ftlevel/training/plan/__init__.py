"""What a run will do, known before weights load: model, targets, lengths, parameters, rate.

May import what training may. It loads no weights and writes nothing.
"""
