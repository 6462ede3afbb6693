"""Measuring videos, of any kind: statistics of frames, results of many videos, curves."""
