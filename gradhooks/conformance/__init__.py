"""The conformance kit: proves a combination or an accumulator. `gradhooks.testing` offers it to users."""
