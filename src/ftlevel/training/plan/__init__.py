"""Resolution of a run before the weights load. Loads no weights and writes nothing."""
