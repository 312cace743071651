"""What attention and training steps cost: the benchmarks behind ``aaconv bench``."""
