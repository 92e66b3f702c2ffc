"""Resolution of a run before its weights load. Loads no weights and writes nothing."""
