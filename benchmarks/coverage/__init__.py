"""What becomes of every residual sum of torchvision and timm: ``python -m benchmarks.coverage``, see ``__main__``."""
