"""What a training step needs on a TPU slice that is not here: ``aaconv compile`` and ``aaconv plan``."""
