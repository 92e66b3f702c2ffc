"""Experts of a mixture in 4 bits: packed while they load, multiplied one expert at a time.

transformers 5 holds the experts of a block in one tensor (experts, out, in), which its bitsandbytes
quantizer leaves as it is. Here each is packed in bitsandbytes' 4 bits, by bitsandbytes' own
parametrization. All but `which` imports bitsandbytes, so that nobody imports it before it is used.
"""
