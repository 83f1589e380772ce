"""One group through the model: poses, state, parameter hooks, first and second run."""
