"""What a run will need: memory by ZeRO stage, time and price, from its configuration."""
