"""Steps of packs from metadata alone: configuration, planner, state and summary."""
