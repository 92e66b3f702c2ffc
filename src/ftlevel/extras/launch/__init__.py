"""`launch`: job files of cluster schedulers."""
