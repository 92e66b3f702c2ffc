"""What a command beside train is told, one file each."""
