"""Measure and check a user's own model: `compare`, `estimate_memory` and `gradcheck`."""
