"""The training loop and what it needs: sharding, optimisers, EMA, checkpoints, logs."""
