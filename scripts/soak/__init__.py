"""Random checkpoints there and back, for as long as one likes."""
