"""The front door: any ``nn.Module`` in, its graph in normal form out."""
