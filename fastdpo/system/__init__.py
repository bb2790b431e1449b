"""The disk, signals, device memory, random numbers, versions and the terminal."""
