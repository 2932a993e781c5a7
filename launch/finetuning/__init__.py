"""Fine-tuning: which parameters are trained, and adapters of low rank."""
