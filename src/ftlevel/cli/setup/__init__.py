"""The commands that write what a run begins from: recipes, and jobs for a cluster."""
