"""What is trained: objectives that turn a batch into losses; no loop, no input or output."""
