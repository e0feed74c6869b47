"""amft-fast: single-stage SFT + RL fine-tuning with a learned mixing weight. Importing it imports no torch."""

__version__ = "0.1.0"
