"""dstrain: a DeepSpeed trainer for translation and other sequence-to-sequence transformers."""

__version__ = "0.2.0"
