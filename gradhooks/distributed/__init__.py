"""Several processes: pose parallel groups, sharded models, and refusal of unsupported arrangements."""
