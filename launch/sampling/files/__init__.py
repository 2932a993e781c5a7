"""Files of sampled images: formats, metadata, names, `samples.jsonl`, layouts of benchmarks."""
