"""One batch through the model: plain chunks, model state, parameter hooks, the first and the second run."""
