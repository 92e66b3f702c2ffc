"""What a method's update is as plain LoRA on the untouched base: products of two matrices.

Each method that has such a form says so in its own module, by these types. May import what methods
may; knows no method.
"""
