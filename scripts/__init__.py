"""Thin commands; each is a module with `build_parser` and `main`, PyTorch is imported in `main`."""
