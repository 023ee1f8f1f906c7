"""What the commands of `shoal` do, a file each."""
