"""Step time of a sharded run on several GPUs, for `plan`."""
