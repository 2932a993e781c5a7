"""From noise to images: the any-step sampler, and the generator around it."""
