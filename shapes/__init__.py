"""The laboratory: a world of moving shapes in which everything in a video is known."""
