"""The engine: the loop, processes, checkpoints, optimiser, logs."""
