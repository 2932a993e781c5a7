"""Plan steps of packs from metadata: configuration, planner, state and summary."""
