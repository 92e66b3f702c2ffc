"""Ask the loaded model itself whether a part of the fast step gives what the plain step gives."""
