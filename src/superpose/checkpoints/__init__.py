"""Checkpoints: what is in them (headers), reading tensors lazily, writing safetensors as a stream.

A format of weight files is one module that defines `FORMAT`; `weight_files` finds it by existing.
"""
