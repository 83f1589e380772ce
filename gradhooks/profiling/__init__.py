"""Tools that measure and check a user's own model: compare, estimate_memory, gradcheck."""
