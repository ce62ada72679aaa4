"""Learned encoders: folders with an ONNX model, the item version that it was learned from, and a hash of each."""
