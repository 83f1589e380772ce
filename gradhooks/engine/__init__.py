"""One group through the model: pose inputs, model state, parameter hooks, the first and the second run."""
