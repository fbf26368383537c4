"""ONNX files and the runtime that runs them."""
