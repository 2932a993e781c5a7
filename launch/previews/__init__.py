"""Images drawn from a run's averaged weights, while it trains and afterwards."""
