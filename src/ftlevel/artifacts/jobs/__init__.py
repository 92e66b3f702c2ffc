"""Files by which the scheduler of a cluster starts a run on several machines. Imports nothing."""
