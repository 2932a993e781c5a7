"""Model folders of published networks, from the hub or from given files."""
