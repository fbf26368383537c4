"""Reads an ONNX file as a torch network: one rule per operator, on top of onnx-ir."""
