"""Saving and loading: graph as JSON, weights as safetensors, no pickle."""
